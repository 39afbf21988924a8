// SPDX-License-Identifier: MIT OR Apache-2.0
//! Unpacks what Debian's kernels and modules are packed with, by the programs made for it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::packages;
use crate::process::{Guarded, Stop, tail};

/// More than any unpacked kernel, less than would hurt.
pub(super) const LIMIT_BYTES: usize = 512 << 20;
const WITHIN: Duration = Duration::from_secs(60);

/// How a file is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    Gzip,
    Xz,
    Zstd,
}

impl Packing {
    /// The packing that the first bytes of a file stand for.
    pub(super) fn of(content: &[u8]) -> Option<Self> {
        const MAGIC: [(&[u8], Packing); 3] = [
            (&[0x1f, 0x8b, 8], Packing::Gzip),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Packing::Xz),
            (&[0x28, 0xb5, 0x2f, 0xfd], Packing::Zstd),
        ];
        MAGIC.iter().find(|(magic, _)| content.starts_with(magic)).map(|(_, packing)| *packing)
    }

    /// The program, and the Debian package that has it.
    fn program(self) -> (&'static str, &'static str) {
        match self {
            Self::Gzip => ("gzip", "gzip"),
            Self::Xz => ("xz", "xz-utils"),
            Self::Zstd => ("zstd", "zstd"),
        }
    }
}

/// Runs the programs, with a folder for their files.
#[derive(Debug)]
pub(super) struct Unpacker<'a> {
    scratch: &'a Path,
    stop: &'a Stop,
}

impl<'a> Unpacker<'a> {
    /// Uses the existing folder `scratch`, which the caller removes.
    pub(super) fn new(scratch: &'a Path, stop: &'a Stop) -> Self {
        Self { scratch, stop }
    }

    /// What was packed.
    pub(super) fn unpack(&self, packing: Packing, packed: &[u8]) -> Result<Vec<u8>> {
        let [from, to, said] = ["in", "out", "said"].map(|name| self.scratch.join(name));
        fs::write(&from, packed).with_context(|| format!("cannot write {}", from.display()))?;
        let program = self.program(packing)?;
        let mut command = Command::new(&program);
        command.arg("-dc").stdin(File::open(&from)?);
        command.stdout(File::create(&to)?).stderr(File::create(&said)?);
        let status = Guarded::spawn(&mut command)?.wait(WITHIN, self.stop)?;
        if !status.success() {
            let said = fs::read(&said).unwrap_or_default();
            let said = String::from_utf8_lossy(&said);
            bail!("{} failed ({status}): {}", program.display(), tail(&said));
        }
        let len_bytes = fs::metadata(&to)?.len();
        if len_bytes > LIMIT_BYTES as u64 {
            bail!("it unpacks to {len_bytes} bytes, which is too much");
        }
        fs::read(&to).with_context(|| format!("cannot read {}", to.display()))
    }

    /// The installed program; one that is not installed is fetched, like all of the guest.
    fn program(&self, packing: Packing) -> Result<PathBuf> {
        let (name, package) = packing.program();
        let path = std::env::var_os("PATH").unwrap_or_default();
        if std::env::split_paths(&path).any(|folder| folder.join(name).is_file()) {
            return Ok(name.into());
        }
        let root = self.scratch.join(package);
        let places = ["usr/bin", "bin"].map(|folder| root.join(folder).join(name));
        let found = || places.iter().find(|place| place.is_file()).cloned();
        if found().is_none() {
            packages::unpack(&[package], &self.scratch.join("debs"), &root, self.stop)
                .with_context(|| format!("{name} is missing: install the package {package}"))?;
        }
        found().with_context(|| format!("the package {package} has no program {name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_gzip_and_xz_pack_is_unpacked_and_damage_is_an_error() {
        let (stop, dir) = (Stop::default(), tempfile::tempdir().unwrap());
        let unpacker = Unpacker::new(dir.path(), &stop);
        let plain = dir.path().join("plain");
        fs::write(&plain, b"kernel ".repeat(1000)).unwrap();
        for (program, packing) in [("gzip", Packing::Gzip), ("xz", Packing::Xz)] {
            let output = Command::new(program).arg("-c").arg(&plain).output().unwrap();
            let mut packed = output.stdout;
            assert_eq!(Packing::of(&packed), Some(packing));
            let unpacked = unpacker.unpack(packing, &packed).unwrap();
            assert_eq!(unpacked, fs::read(&plain).unwrap());
            packed.truncate(packed.len() / 2);
            let error = unpacker.unpack(packing, &packed).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{program} failed")), "{error}");
        }
        assert_eq!(Packing::of(b"\x7fELF"), None);
        assert_eq!(Packing::of(b""), None);
    }
}
