// SPDX-License-Identifier: MIT OR Apache-2.0
//! Finds the patched QEMU and boots the guest on it directly, without `vzdump`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::console::Console;
use crate::guest::{GuestImage, KERNEL_OPTIONS};
use crate::process::{Guarded, Stop};
use serde_json::json;

/// How long a guest may take to boot on two busy cores.
pub const BOOT_WITHIN: Duration = Duration::from_secs(90);

/// The checkout this program was built from.
#[must_use]
pub fn workspace() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// The folder with the patched QEMU's programs.
///
/// # Errors
/// It has not been built; the text says how.
pub fn bin_dir() -> Result<PathBuf> {
    let dir = match std::env::var_os("VZDUMP_QEMU_BIN") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => workspace().join("target/qemu/bin"),
    };
    if dir.join("qemu-system-x86_64").exists() {
        return Ok(dir);
    }
    bail!("the patched QEMU is not in {}: run ./x qemu first", dir.display())
}

/// A guest on a QEMU of our own, with raw images; killed when dropped.
#[derive(Debug)]
pub struct DirectGuest {
    process: Guarded,
    /// What it says on its serial line.
    pub console: Console,
}

impl DirectGuest {
    /// Boots the guest with these disks; `options` go to its kernel.
    ///
    /// # Errors
    /// QEMU is missing or does not start.
    pub fn boot(image: &GuestImage, disks: &[&Path], dir: &Path, options: &str) -> Result<Self> {
        let device = |index: usize| format!("virtio-blk-pci,drive=d{index}");
        Self::boot_with(image, disks, dir, options, &[], device)
    }

    /// The same with several queues for each disk, each served by one of `threads` threads; the
    /// monitor listens at `qmp` in the folder.
    ///
    /// # Errors
    /// Those of [`Self::boot`].
    pub fn boot_multiqueue(
        image: &GuestImage,
        disks: &[&Path],
        dir: &Path,
        options: &str,
        threads: usize,
    ) -> Result<Self> {
        let names: Vec<String> = (0..threads).map(|number| format!("io{number}")).collect();
        let mut more = vec!["-qmp".into()];
        more.push(format!("unix:{},server=on,wait=off", dir.join("qmp").display()));
        for name in &names {
            more.extend(["-object".into(), format!("iothread,id={name}")]);
        }
        let queues: Vec<_> = names.iter().map(|name| json!({ "iothread": name })).collect();
        let device = |index: usize| {
            json!({ "driver": "virtio-blk-pci", "drive": format!("d{index}"),
                    "num-queues": threads, "iothread-vq-mapping": queues })
            .to_string()
        };
        Self::boot_with(image, disks, dir, options, &more, device)
    }

    fn boot_with(
        image: &GuestImage,
        disks: &[&Path],
        dir: &Path,
        options: &str,
        more: &[String],
        device: impl Fn(usize) -> String,
    ) -> Result<Self> {
        let log = dir.join("console.log");
        let console = Console::from_end_of(&log)?;
        let mut command = Command::new(bin_dir()?.join("qemu-system-x86_64"));
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        // One thread, as `vzdump_core::vm::qemu_cmdline::EMULATED` has it.
        command.args(["-machine", "q35", "-accel", "tcg,thread=single", "-cpu", "max"]);
        command.args(["-smp", "2", "-m", "256"]);
        command.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initrd);
        command.arg("-append").arg(format!("{KERNEL_OPTIONS} {options}"));
        command.arg("-serial").arg(format!("file:{}", log.display()));
        command.args(more);
        for (index, disk) in disks.iter().enumerate() {
            let file = disk.display();
            command.arg("-blockdev").arg(format!("driver=file,node-name=f{index},filename={file}"));
            command.arg("-blockdev").arg(format!("driver=raw,node-name=d{index},file=f{index}"));
            command.arg("-device").arg(device(index));
        }
        command.stdin(Stdio::null());
        Ok(Self {
            process: Guarded::spawn(&mut command).context("cannot boot the guest")?,
            console,
        })
    }

    /// Waits until the guest switched itself off.
    ///
    /// # Errors
    /// It does not within the time.
    pub fn wait(&mut self, timeout: Duration, stop: &Stop) -> Result<()> {
        let status = self.process.wait(timeout, stop)?;
        if !status.success() {
            bail!("QEMU ended with {status}");
        }
        Ok(())
    }
}
