// SPDX-License-Identifier: MIT OR Apache-2.0
//! Takes a Debian kernel package apart: the bare kernel and the modules the guest loads.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::lz4;
use crate::process::{Guarded, Stop};

/// What the guest needs, in any order: disks, agent, power button, a small file system.
const MODULES: [&str; 8] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_scsi",
    "sd_mod",
    "loop",
    "evdev",
    "button",
];
const XZ_MAGIC: [u8; 6] = [0xfd, b'7', b'z', b'X', b'Z', 0];
const ELF_MAGIC: [u8; 4] = [0x7f, b'E', b'L', b'F'];
/// More than any unpacked kernel, less than would hurt.
const KERNEL_LIMIT_BYTES: usize = 512 << 20;
const XZ_WITHIN: std::time::Duration = std::time::Duration::from_secs(60);

/// Writes the kernel to `to/vmlinux` and its modules, numbered in loading order, to `to/modules`.
pub(super) fn take(root: &Path, to: &Path, stop: &Stop) -> Result<()> {
    let packed = only_file(&root.join("boot"), "vmlinuz-")?;
    let image = fs::read(&packed).with_context(|| format!("cannot read {}", packed.display()))?;
    let kernel = unpack_kernel(&image, to, stop)
        .with_context(|| format!("cannot unpack {}", packed.display()))?;
    fs::write(to.join("vmlinux"), kernel.as_deref().unwrap_or(&image))?;
    let modules = find_modules(root)?;
    fs::create_dir(to.join("modules"))?;
    for (index, name) in loading_order(&modules, to, stop)?.iter().enumerate() {
        let content = read_module(&modules[name.as_str()], to, stop)?;
        fs::write(to.join(format!("modules/{index:02}-{name}.ko")), content)?;
    }
    Ok(())
}

/// The bare kernel, which starts in half the time because the emulated CPU need not unpack it;
/// `None` when it is packed in a way not known here (the image itself also starts).
fn unpack_kernel(image: &[u8], scratch: &Path, stop: &Stop) -> Result<Option<Vec<u8>>> {
    let payload = payload(image).context("no x86 boot image")?;
    let kernel = if payload.starts_with(&lz4::MAGIC) {
        // The build appends the unpacked size to what the packer wrote.
        let size = payload.last_chunk::<4>().map_or(0, |size| u32::from_le_bytes(*size)) as usize;
        if size > KERNEL_LIMIT_BYTES {
            bail!("it claims to unpack to {size} bytes");
        }
        lz4::unpack(payload, size)?
    } else if payload.starts_with(&XZ_MAGIC) {
        unxz(payload, scratch, stop)?
    } else {
        return Ok(None);
    };
    if !kernel.starts_with(&ELF_MAGIC) {
        bail!("it unpacks to something that is no ELF file");
    }
    Ok(Some(kernel))
}

/// The packed kernel inside a boot image, found by the fields of the boot protocol's header.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let u32_at = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup = (usize::from(*image.get(0x1f1)?) + 1) * 512;
    let start = setup.checked_add(u32_at(0x248)?)?;
    image.get(start..start.checked_add(u32_at(0x24c)?)?)
}

fn unxz(packed: &[u8], scratch: &Path, stop: &Stop) -> Result<Vec<u8>> {
    let (from, to) = (scratch.join("xz.in"), scratch.join("xz.out"));
    fs::File::create(&from)?.write_all(packed)?;
    let mut command = Command::new("xz");
    command.args(["-dc", "--single-stream"]);
    command.stdin(Stdio::from(fs::File::open(&from)?));
    command.stdout(Stdio::from(fs::File::create(&to)?)).stderr(Stdio::null());
    // Bytes after the stream (the kernel's size) make xz end with an error after a good result,
    // which is checked by the caller.
    Guarded::spawn(&mut command)?.wait(XZ_WITHIN, stop)?;
    let unpacked = fs::read(&to)?;
    fs::remove_file(from)?;
    fs::remove_file(to)?;
    Ok(unpacked)
}

fn find_modules(root: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let base = [root.join("lib/modules"), root.join("usr/lib/modules")];
    let base = base.iter().find(|dir| dir.is_dir()).context("the kernel package has no modules")?;
    let mut found = BTreeMap::new();
    let mut folders = vec![base.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if let Some(module) =
                name.strip_suffix(".xz").unwrap_or(&name).strip_suffix(".ko")
            {
                found.insert(module.replace('-', "_"), entry.path());
            }
        }
    }
    Ok(found)
}

/// The modules wanted and those they need, each after those it needs.
fn loading_order(
    modules: &BTreeMap<String, PathBuf>,
    scratch: &Path,
    stop: &Stop,
) -> Result<Vec<String>> {
    let mut order: Vec<String> = Vec::new();
    let mut open: Vec<(String, bool)> =
        MODULES.iter().rev().map(|name| ((*name).to_owned(), false)).collect();
    while let Some((name, ready)) = open.pop() {
        if order.contains(&name) || (!ready && !modules.contains_key(&name)) {
            // What has no file is built into the kernel.
            continue;
        }
        if ready {
            order.push(name);
            continue;
        }
        let needed = needed_by(&read_module(&modules[&name], scratch, stop)?);
        open.push((name, true));
        open.extend(needed.into_iter().map(|name| (name, false)));
    }
    for name in ["virtio_pci", "virtio_blk"] {
        if !order.iter().any(|found| found == name) {
            bail!("the kernel package has no module {name}");
        }
    }
    Ok(order)
}

/// What a module says it needs, from its `depends=` text.
fn needed_by(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let text = module[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = text.split(|byte| *byte == b',').filter(|name| !name.is_empty());
    names.map(|name| String::from_utf8_lossy(name).replace('-', "_")).collect()
}

fn read_module(path: &Path, scratch: &Path, stop: &Stop) -> Result<Vec<u8>> {
    let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    if path.extension() == Some(OsStr::new("xz")) {
        return unxz(&content, scratch, stop);
    }
    Ok(content)
}

fn only_file(dir: &Path, prefix: &str) -> Result<PathBuf> {
    for entry in fs::read_dir(dir).with_context(|| format!("no folder {}", dir.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    bail!("no file {prefix}… in {}", dir.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_needs() {
        let module = b"xx\0license=GPL\0depends=virtio,virtio-ring\0name=y\0";
        assert_eq!(needed_by(module), ["virtio", "virtio_ring"]);
        assert!(needed_by(b"\0depends=\0").is_empty());
        assert!(needed_by(b"none").is_empty());
    }

    #[test]
    fn a_file_that_is_no_boot_image_has_no_payload() {
        assert!(payload(b"short").is_none());
        let mut image = vec![0; 0x260];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(payload(&image).is_none());
    }
}
