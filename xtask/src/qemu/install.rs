// SPDX-License-Identifier: MIT OR Apache-2.0
//! Puts the built programs and their firmware into the checkout, runnable as they are.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::PROGRAMS;
use super::tree::Tree;
use crate::paths::Paths;
use crate::run::output;

/// Firmware of the x86 machines, and where Debian's packages have it. QEMU looks for it in
/// `../share/qemu` of its own folder.
const FIRMWARE_FROM: &[&str] = &["/usr/share/seabios", "/usr/share/qemu"];
const FIRMWARE: &[&str] = &[
    "bios.bin",
    "bios-256k.bin",
    "kvmvapic.bin",
    "linuxboot.bin",
    "linuxboot_dma.bin",
    "multiboot.bin",
    "multiboot_dma.bin",
    "pvh.bin",
    "vgabios.bin",
    "vgabios-stdvga.bin",
    "vgabios-bochs-display.bin",
    "vgabios-ramfb.bin",
    "vgabios-virtio.bin",
];

/// Tells qemu-ext/sys which tree to bind to.
pub(crate) fn write_build_env(paths: &Paths, tree: &Tree) -> Result<()> {
    let text =
        format!("QEMU_SRC={}\nQEMU_BUILD={}\n", tree.src().display(), tree.build().display());
    let file = paths.qemu().join("build-env");
    if fs::read_to_string(&file).is_ok_and(|old| old == text) {
        return Ok(());
    }
    create_dir(paths.qemu())?;
    fs::write(&file, text).with_context(|| format!("{}: cannot write", file.display()))
}

/// Copies programs that changed, and firmware that is missing.
pub(crate) fn install(paths: &Paths, tree: &Tree) -> Result<()> {
    let bin = paths.qemu_bin();
    create_dir(&bin)?;
    let notes = paths.qemu().join("installed");
    create_dir(&notes)?;
    for target in PROGRAMS {
        let built = tree.build().join(target);
        let name = built.file_name().unwrap_or_default().to_owned();
        let note = notes.join(&name);
        let identity = identity(&built, &tree.name())?;
        let installed = bin.join(&name);
        if installed.is_file() && fs::read_to_string(&note).is_ok_and(|old| old == identity) {
            continue;
        }
        copy_stripped(&built, &installed)?;
        fs::write(&note, identity).with_context(|| format!("{}: cannot write", note.display()))?;
    }
    install_firmware(&paths.qemu().join("share/qemu"))
}

/// Changes whenever ninja has linked the program again.
pub(crate) fn identity(built: &Path, tree: &str) -> Result<String> {
    let meta = fs::metadata(built)
        .with_context(|| format!("{}: ninja did not build it", built.display()))?;
    Ok(format!("{tree} {} {}.{:09}\n", meta.len(), meta.mtime(), meta.mtime_nsec()))
}

/// Without debug information, with function names. A running program keeps its old file.
pub(crate) fn copy_stripped(from: &Path, to: &Path) -> Result<()> {
    let new = to.with_extension("new");
    output(Command::new("strip").args(["--strip-debug", "-o"]).arg(&new).arg(from))
        .with_context(|| format!("{}: cannot strip", from.display()))?;
    fs::rename(&new, to).with_context(|| format!("{}: cannot replace", to.display()))
}

fn install_firmware(target: &Path) -> Result<()> {
    create_dir(target)?;
    for name in FIRMWARE {
        let copy = target.join(name);
        if copy.is_file() {
            continue;
        }
        let from: Option<PathBuf> =
            FIRMWARE_FROM.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.is_file());
        let Some(from) = from else {
            bail!(
                "firmware {name}: not in {}; run `cargo xtask setup`",
                FIRMWARE_FROM.join(" or ")
            );
        };
        fs::copy(&from, &copy).with_context(|| format!("{}: cannot copy", from.display()))?;
    }
    Ok(())
}

pub(crate) fn create_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("{}: cannot create", dir.display()))
}
