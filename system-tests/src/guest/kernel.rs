// SPDX-License-Identifier: MIT OR Apache-2.0
//! Takes a Debian kernel package apart: the bare kernel and the modules the guest loads.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::lz4;
use super::unpack::{LIMIT_BYTES, Packing, Unpacker};
use crate::process::Stop;

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
const ELF_MAGIC: [u8; 4] = [0x7f, b'E', b'L', b'F'];

/// Writes the kernel to `to/vmlinux` and its modules, numbered in loading order, to `to/modules`.
pub(super) fn take(root: &Path, to: &Path, stop: &Stop) -> Result<()> {
    let scratch = tempfile::tempdir_in(to).context("cannot make a folder for unpacking")?;
    let unpacker = Unpacker::new(scratch.path(), stop);
    let packed = only_file(&root.join("boot"), "vmlinuz-")?;
    let image = fs::read(&packed).with_context(|| format!("cannot read {}", packed.display()))?;
    let kernel = unpack_kernel(&image, &unpacker)
        .with_context(|| format!("cannot unpack {}", packed.display()))?;
    fs::write(to.join("vmlinux"), kernel.as_deref().unwrap_or(&image))?;
    take_modules(root, to, &MODULES, &unpacker)
}

/// Writes the kernel as it is packaged, which UEFI can start, to `to/vmlinuz`, and these modules like
/// [`take`].
pub(super) fn take_packed(root: &Path, to: &Path, wanted: &[&str], stop: &Stop) -> Result<()> {
    let scratch = tempfile::tempdir_in(to).context("cannot make a folder for unpacking")?;
    let packed = only_file(&root.join("boot"), "vmlinuz-")?;
    fs::copy(&packed, to.join("vmlinuz"))
        .with_context(|| format!("cannot copy {}", packed.display()))?;
    take_modules(root, to, wanted, &Unpacker::new(scratch.path(), stop))
}

fn take_modules(root: &Path, to: &Path, wanted: &[&str], unpacker: &Unpacker<'_>) -> Result<()> {
    fs::create_dir(to.join("modules"))?;
    let modules = Modules::find(root)?;
    let read = |path: &Path| read_module(path, unpacker);
    for (index, (name, content)) in modules.loading_order(wanted, read)?.into_iter().enumerate() {
        fs::write(to.join(format!("modules/{index:02}-{name}.ko")), content)?;
    }
    Ok(())
}

/// The bare kernel, which starts in half the time because the emulated CPU need not unpack it;
/// `None` when it is packed in a way not known here (the image itself also starts).
fn unpack_kernel(image: &[u8], unpacker: &Unpacker<'_>) -> Result<Option<Vec<u8>>> {
    let payload = payload(image).context("no x86 boot image")?;
    // The build appends the unpacked size to what the packer wrote; gzip itself ends with it.
    let (packed, size) = payload.split_last_chunk::<4>().context("its payload is too short")?;
    let size = u32::from_le_bytes(*size) as usize;
    let kernel = if payload.starts_with(&lz4::MAGIC) {
        if size > LIMIT_BYTES {
            bail!("it claims to unpack to {size} bytes");
        }
        lz4::unpack(packed, size)?
    } else {
        match Packing::of(payload) {
            Some(Packing::Gzip) => unpacker.unpack(Packing::Gzip, payload)?,
            Some(packing) => unpacker.unpack(packing, packed)?,
            None => return Ok(None),
        }
    };
    if kernel.len() != size {
        bail!("it unpacks to {} bytes instead of {size}", kernel.len());
    }
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

/// What a kernel package has, by the names the kernel uses (with `_` for `-`).
#[derive(Debug, Default)]
struct Modules {
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
}

impl Modules {
    fn find(root: &Path) -> Result<Self> {
        let base = [root.join("lib/modules"), root.join("usr/lib/modules")];
        let base =
            base.iter().find(|dir| dir.is_dir()).context("the kernel package has no modules")?;
        let mut found = Self::default();
        let mut folders = vec![base.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                } else if name == "modules.builtin" {
                    let list = fs::read_to_string(entry.path()).context("odd modules.builtin")?;
                    found.built_in.extend(list.lines().filter_map(module_name));
                } else if let Some(module) = module_name(&name) {
                    found.files.insert(module, entry.path());
                }
            }
        }
        Ok(found)
    }

    /// The modules wanted and those they need, each after those it needs, with their content.
    ///
    /// Each module names what it needs; `modules.dep` is made only when a package is installed.
    fn loading_order(
        &self,
        wanted: &[&str],
        read: impl Fn(&Path) -> Result<Vec<u8>>,
    ) -> Result<Vec<(String, Vec<u8>)>> {
        let mut order: Vec<(String, Vec<u8>)> = Vec::new();
        // A module comes up twice: without content to be looked at, then, after all it needs, with
        // content to be put in.
        let mut open: Vec<(String, Option<Vec<u8>>)> =
            wanted.iter().rev().map(|name| ((*name).to_owned(), None)).collect();
        let mut seen = BTreeSet::new();
        while let Some((name, content)) = open.pop() {
            if let Some(content) = content {
                order.push((name, content));
                continue;
            }
            if self.built_in.contains(&name) || !seen.insert(name.clone()) {
                continue;
            }
            let Some(path) = self.files.get(&name) else {
                bail!("the kernel package has no module {name}, nor is it built in");
            };
            let content = read(path)?;
            let needed = needed_by(&content);
            open.push((name, Some(content)));
            open.extend(needed.into_iter().map(|name| (name, None)));
        }
        Ok(order)
    }
}

/// The module in a file of this name, which may have a folder and be packed.
fn module_name(path: &str) -> Option<String> {
    let name = path.rsplit('/').next()?;
    let plain = [".gz", ".xz", ".zst"].iter().find_map(|suffix| name.strip_suffix(suffix));
    Some(plain.unwrap_or(name).strip_suffix(".ko")?.replace('-', "_"))
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

fn read_module(path: &Path, unpacker: &Unpacker<'_>) -> Result<Vec<u8>> {
    let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let module = match Packing::of(&content) {
        Some(packing) => unpacker
            .unpack(packing, &content)
            .with_context(|| format!("cannot unpack {}", path.display()))?,
        None => content,
    };
    if !module.starts_with(&ELF_MAGIC) {
        bail!("{} is no ELF file, however it is packed", path.display());
    }
    Ok(module)
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
    fn a_module_is_found_however_it_is_named_and_packed() {
        for name in ["a-b.ko", "a_b.ko.xz", "a-b.ko.zst", "a-b.ko.gz", "kernel/x-y/a-b.ko"] {
            assert_eq!(module_name(name).as_deref(), Some("a_b"), "{name}");
        }
        for name in ["modules.order", "a.ko.bz2", "a.xz", ""] {
            assert_eq!(module_name(name), None, "{name}");
        }
    }

    #[test]
    fn modules_load_after_those_they_need_and_built_in_ones_need_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("usr/lib/modules/6.12");
        fs::create_dir_all(base.join("kernel")).unwrap();
        let built_in = ["virtio_pci", "virtio-console", "button", "evdev", "loop"]
            .map(|name| format!("kernel/drivers/{name}.ko\n"));
        fs::write(base.join("modules.builtin"), built_in.concat()).unwrap();
        let file = |name: &str, needs: &str| {
            let content = format!("\0depends={needs}\0");
            fs::write(base.join("kernel").join(name), content).unwrap();
        };
        file("virtio_blk.ko", "");
        file("virtio_scsi.ko", "scsi-mod,virtio_pci");
        file("sd_mod.ko", "scsi_mod,scsi_common");
        file("scsi_mod.ko", "scsi_common");
        file("unused.ko", "missing");
        let order = || {
            let read = |path: &Path| Ok(fs::read(path)?);
            Modules::find(dir.path()).unwrap().loading_order(&MODULES, read)
        };
        let error = order().unwrap_err().to_string();
        assert!(error.contains("no module scsi_common"), "{error}");
        file("scsi-common.ko", "");
        let names: Vec<String> = order().unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["virtio_blk", "scsi_common", "scsi_mod", "virtio_scsi", "sd_mod"]);
    }

    #[test]
    fn a_packed_kernel_is_unpacked_and_its_size_is_checked() {
        let (stop, dir) = (Stop::default(), tempfile::tempdir().unwrap());
        let unpacker = Unpacker::new(dir.path(), &stop);
        let kernel = [&ELF_MAGIC[..], &[7; 5000]].concat();
        let plain = dir.path().join("plain");
        fs::write(&plain, &kernel).unwrap();
        let packed = |program: &str| {
            let output = std::process::Command::new(program).arg("-c").arg(&plain).output();
            output.unwrap().stdout
        };
        let size = u32::try_from(kernel.len()).unwrap().to_le_bytes();
        for payload in [packed("gzip"), [&packed("xz")[..], &size].concat()] {
            let mut image = boot_image(&payload);
            assert_eq!(unpack_kernel(&image, &unpacker).unwrap().as_ref(), Some(&kernel));
            *image.last_mut().unwrap() ^= 1;
            assert!(unpack_kernel(&image, &unpacker).is_err());
        }
        let unknown = boot_image(b"packed in another way");
        assert!(unpack_kernel(&unknown, &unpacker).unwrap().is_none());
    }

    fn boot_image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend_from_slice(payload);
        image
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
