// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that boots through UEFI and has a TPM: the kernel as it is packaged, which is an EFI program, and an
//! initramfs with the program of [`crate::secrets`].

use std::fs;

use anyhow::{Context, Result};

use super::cache::Cache;
use super::initramfs::Initramfs;
use super::program::{Program, compile};
use super::{
    GuestImage, KERNEL_META, busybox_entry, clean, kernel, listed, package_entry, packages,
};
use crate::process::Stop;

const INIT: &str = include_str!("secrets.sh");
const PROGRAM: Program = Program {
    name: "guest-secrets",
    module: "secrets",
    sources: &[("mod.rs", include_str!("../secrets.rs"))],
    call: "secrets::run(&arguments)",
};
/// What the kernel has as modules.
const MODULES: [&str; 1] = ["efivarfs"];

/// Builds the guest, or finds it in the cache.
///
/// # Errors
/// A package cannot be fetched, or a tool is missing; the text says what to install.
pub fn build(stop: &Stop) -> Result<GuestImage> {
    let cache = Cache::open(stop)?;
    let package = || packages::dependency(KERNEL_META, "linux-image-", stop);
    let kernel = package_entry(&cache, "efi-kernel", package, stop, |package, to| {
        let root = to.join("root");
        packages::unpack(&[package], &to.join("debs"), &root, stop)?;
        kernel::take_packed(&root, to, &MODULES, stop)?;
        clean(to)
    });
    let kernel = kernel.context("cannot prepare the guest's kernel")?;
    let busybox = busybox_entry(&cache, stop).context("cannot prepare busybox")?;
    let program = compile(&PROGRAM, &cache, stop).context("cannot build guest-secrets")?;
    let mut key = blake3::Hasher::new();
    for part in [&kernel, &busybox, &program] {
        key.update(part.as_os_str().as_encoded_bytes()).update(b"\0");
    }
    key.update(INIT.as_bytes());
    let key = &key.finalize().to_hex()[..16];
    let image = cache.entry("efi-initrd", key, |to| {
        let mut archive = Initramfs::new();
        for folder in ["proc", "sys", "run", "tmp"] {
            archive.directory(folder);
        }
        archive.file("init", 0o755, INIT.as_bytes());
        archive.copy("bin/busybox", &busybox.join("busybox"))?;
        archive.copy("sbin/guest-secrets", &program.join(PROGRAM.name))?;
        for (name, path) in listed(&kernel.join("modules"))? {
            archive.copy(&format!("modules/{name}"), &path)?;
        }
        archive.write(&to.join("initrd"))
    });
    let initrd = image.context("cannot make the guest's initramfs")?.join("initrd");
    let kernel = kernel.join("vmlinuz");
    fs::metadata(&kernel).with_context(|| format!("no {}", kernel.display()))?;
    Ok(GuestImage { kernel, initrd })
}
