// SPDX-License-Identifier: MIT OR Apache-2.0
//! The same comparison inside a Linux guest, emulated so that it runs everywhere: there the processor's
//! emulation takes a large part of each request, which is the same in all modes.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use qmp_client::Session;
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use crate::access::{C_FILTER, DISK, FLEECING};
use crate::cases::{Cache, Case, Filter, Fleecing, Mode, Reading, Work};
use crate::child;
use crate::daemon::connect;
use crate::disk::FleecingFile;
use crate::procfs::usage;
use crate::run::Bench;
use crate::sample::{Outcome, Sample};
use crate::scratch::Scratch;

const INIT: &str = include_str!("../guest/init.sh");
const PACK_WITHIN: Duration = Duration::from_secs(30);
/// Booting takes some seconds on an idle machine.
const BOOT_WITHIN: Duration = Duration::from_secs(120);
const QUIT_WITHIN: Duration = Duration::from_secs(60);
const COMMAND_WITHIN: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What the guest is made of.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The kernel.
    pub kernel: PathBuf,
    /// An initramfs with busybox and the kernel's modules.
    pub initrd: PathBuf,
    /// The load program, linked statically.
    pub load: PathBuf,
}

/// The cases that run in the guest.
#[must_use]
pub fn cases() -> Vec<Case> {
    let case = |depth| {
        let work = Work::Once { sequential: false, block_bytes: 4096, depth };
        let case = Case::new(work, Cache::Direct, Fleecing::Raw, Reading::Absent);
        Case { name: format!("guest-{}", case.name), ..case }
    };
    vec![case(16), case(1)]
}

/// A guest ready to boot: its initramfs with our first process.
#[derive(Debug)]
pub struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
    _folder: Scratch,
}

impl Guest {
    /// Puts it together.
    ///
    /// # Errors
    /// A part or the program cpio is missing.
    pub async fn prepare(parts: &Parts, folder: &Path) -> Result<Self> {
        let folder = Scratch::new(folder, "guest-")?;
        let tree = folder.path().join("tree");
        std::fs::create_dir_all(tree.join("sbin"))?;
        std::fs::write(tree.join("init"), INIT)?;
        std::fs::copy(&parts.load, tree.join("sbin/guest-load"))
            .with_context(|| format!("cannot copy {}", parts.load.display()))?;
        // The kernel unpacks one archive after the other; what is in the second one replaces.
        let initrd = folder.path().join("initrd");
        let script = "chmod 755 init && cat \"$1\" >\"$2\" && find . | cpio -o -H newc >>\"$2\"";
        let mut pack = Command::new("sh");
        pack.args(["-ec", script, "pack"]).arg(&parts.initrd).arg(&initrd).current_dir(&tree);
        child::run(&mut pack, PACK_WITHIN).await.context("cannot make the guest's initramfs")?;
        Ok(Self { kernel: parts.kernel.clone(), initrd, _folder: folder })
    }

    /// Runs a case in a mode.
    ///
    /// # Errors
    /// QEMU or the guest fails, or does not end in time.
    pub async fn run(&self, bench: &Bench, case: &Case, mode: Mode, round: u64) -> Result<Sample> {
        let Work::Once { depth, .. } = case.work else { bail!("no work for a guest") };
        let (disk, cache) = (bench.disk.clone(), case.cache);
        tokio::task::spawn_blocking(move || disk.settle(cache)).await??;
        let folder = Scratch::new(&bench.folder, "run-")?;
        let fleecing =
            FleecingFile::create(case.fleecing, bench.disk.size_bytes, &bench.bin, &bench.folder);
        let fleecing = fleecing.await?;
        let load = format!("{depth},{},{}", bench.seconds, round + 1);
        let mut command = self.command(bench, &fleecing.path, mode, folder.path(), &load);
        let mut qemu = command.spawn().context("cannot start qemu-system-x86_64")?;
        let session = connect(&folder.path().join("qmp"), &mut qemu).await?;
        let execute = async |name: &str, arguments: Value| {
            let result = session.execute_raw(name, arguments, Some(COMMAND_WITHIN)).await;
            result.with_context(|| format!("QEMU failed {name}"))
        };
        if mode.filter == Filter::Ours {
            let request = json!({ "target-id": "bench", "buffer-size": case.buffer_bytes,
                                  "devices": [{ "device": DISK, "fleecing": FLEECING }] });
            execute("backup-access-setup", request).await?;
        }
        execute("cont", json!({})).await?;
        let limit = BOOT_WITHIN + Duration::from_secs(u64::from(bench.seconds) * 2);
        let guest = wait(&folder.path().join("console"), &mut qemu, limit).await?;
        let used = usage(qemu.id().context("QEMU has ended")?)?;
        let mut access = None;
        if mode.filter == Filter::Ours {
            let status = execute("query-backup-access", json!({})).await?;
            let device = status[0]["devices"][0].clone();
            if device["state"] != "active" {
                bail!("the snapshot is {}: {}", device["state"], device["error"]);
            }
            access = Some(device);
        }
        quit(&session, &mut qemu).await?;
        Ok(Sample {
            guest,
            write_amplification: Some(used.write_bytes as f64 / guest.written_bytes as f64),
            resident_mb: used.resident_bytes as f64 / 1e6,
            peak_mb: used.peak_bytes as f64 / 1e6,
            access,
            ..Sample::default()
        })
    }

    fn command(
        &self,
        bench: &Bench,
        fleecing: &Path,
        mode: Mode,
        folder: &Path,
        load: &str,
    ) -> Command {
        let mut command = Command::new(bench.bin.join("qemu-system-x86_64"));
        command.args(["-S", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        // With a thread for each processor QEMU 10.0 aborts in one start of a hundred or so.
        command.args(["-machine", "q35", "-accel", "tcg,thread=single", "-cpu", "max"]);
        command.args(["-smp", "2", "-m", "256"]);
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initrd);
        command
            .arg("-append")
            .arg(format!("console=ttyS0 panic=-1 quiet no_timer_check load={load}"));
        command.arg("-serial").arg(format!("file:{}", folder.join("console").display()));
        let qmp = folder.join("qmp");
        command
            .arg("-chardev")
            .arg(format!("socket,id=q,path={},server=on,wait=off", qmp.display()));
        command.args(["-mon", "chardev=q,mode=control"]);
        let cache = json!({ "direct": true });
        let mut nodes = Vec::new();
        for (node, path) in [(DISK, bench.disk.path.as_path()), (FLEECING, fleecing)] {
            let below = format!("{node}-file");
            nodes.push(json!({ "driver": "file", "filename": path, "node-name": below,
                               "cache": cache, "aio": "native", "discard": "unmap" }));
            nodes.push(json!({ "driver": "raw", "file": below, "node-name": node,
                               "cache": cache, "discard": "unmap" }));
        }
        let mut drive = DISK;
        if mode.filter == Filter::C {
            nodes.push(json!({ "driver": "copy-before-write", "node-name": C_FILTER, "file": DISK,
                               "target": FLEECING, "on-cbw-error": "break-snapshot",
                               "cbw-timeout": 45 }));
            drive = C_FILTER;
        }
        for node in nodes {
            command.arg("-blockdev").arg(node.to_string());
        }
        command.arg("-device").arg(format!("virtio-blk-pci,drive={drive}"));
        command.stdin(Stdio::null()).kill_on_drop(true);
        command
    }
}

/// Waits for the load's line on the console.
async fn wait(console: &Path, qemu: &mut Child, limit: Duration) -> Result<Outcome> {
    let deadline = Instant::now() + limit;
    loop {
        // It may not be there yet.
        let text = std::fs::read(console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        if let Some(outcome) = parse(&text) {
            return Ok(outcome);
        }
        let last = || text.trim_end().lines().next_back().unwrap_or_default().to_owned();
        if text.contains("LOAD FAILED") {
            bail!("the load failed in the guest: {}", last());
        }
        if let Some(status) = qemu.try_wait()? {
            bail!("QEMU ended with {status}: {}", last());
        }
        if Instant::now() >= deadline {
            bail!("the guest said nothing within {} s: {}", limit.as_secs(), last());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The line of the load: requests, and in nanoseconds the duration and the latencies.
fn parse(console: &str) -> Option<Outcome> {
    let line = console
        .lines()
        .find_map(|line| line.strip_prefix("LOAD ")?.trim_end().strip_suffix(" END"))?;
    let numbers: Option<Vec<u64>> = line.split(' ').map(|word| word.parse().ok()).collect();
    let [ios, took, mean, p99, p999] = numbers?[..] else { return None };
    let us = |ns: u64| ns as f64 / 1000.0;
    Some(Outcome {
        ios,
        writes: ios,
        bytes: ios * 4096,
        written_bytes: ios * 4096,
        seconds: took as f64 / 1e9,
        mean_us: us(mean),
        p99_us: us(p99),
        p999_us: us(p999),
    })
}

async fn quit(session: &Session, qemu: &mut Child) -> Result<()> {
    // The connection may close before the reply.
    drop(session.execute_raw("quit", json!({}), Some(QUIT_WITHIN)).await);
    let Ok(status) = tokio::time::timeout(QUIT_WITHIN, qemu.wait()).await else {
        bail!("QEMU did not quit within {} s", QUIT_WITHIN.as_secs());
    };
    let status = status.context("cannot wait for QEMU")?;
    if !status.success() {
        bail!("QEMU ended with {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_has_the_result() {
        let outcome = parse("noise\r\nLOAD 10 2000000000 5000 6000 7000 END\r\n").unwrap();
        assert_eq!((outcome.ios, outcome.seconds, outcome.mean_us), (10, 2.0, 5.0));
        assert_eq!((outcome.p99_us, outcome.p999_us), (6.0, 7.0));
        assert_eq!(parse("LOAD 10 20000"), None);
        assert_eq!(parse("LOAD FAILED"), None);
    }
}
