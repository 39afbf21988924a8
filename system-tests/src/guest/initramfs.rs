// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writes an initramfs: a cpio archive in the "newc" form that the Linux kernel unpacks.
//!
//! It is written by hand because device nodes need no root this way, and uncompressed because the
//! emulated guest would spend longer on decompressing it than on reading it.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_755;
const CONSOLE: u32 = 0o020_600;
const REGULAR: u32 = 0o100_000;

/// An archive under construction.
#[derive(Debug, Default)]
pub(super) struct Initramfs {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    inode: u32,
}

impl Initramfs {
    /// An archive with the device node that the first process gets as its console.
    pub(super) fn new() -> Self {
        let mut archive = Self::default();
        archive.parents("dev/console");
        archive.member("dev/console", CONSOLE, (5, 1), &[]);
        archive
    }

    /// Adds an empty directory.
    pub(super) fn directory(&mut self, path: &str) {
        self.parents(&format!("{path}/"));
    }

    /// Adds a file with this content.
    pub(super) fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.parents(path);
        self.member(path, REGULAR | permissions, (0, 0), content);
    }

    /// Adds a file of the host.
    pub(super) fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let content =
            std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let permissions = std::fs::metadata(from)?.permissions().mode() & 0o777;
        self.file(path, permissions, &content);
        Ok(())
    }

    /// Ends the archive and writes it to a file.
    pub(super) fn write(mut self, to: &Path) -> Result<()> {
        self.member("TRAILER!!!", 0, (0, 0), &[]);
        let mut file = std::fs::File::create_new(to)?;
        file.write_all(&self.bytes)
            .and_then(|()| file.sync_all())
            .with_context(|| format!("cannot write {}", to.display()))
    }

    fn parents(&mut self, path: &str) {
        for (at, _) in path.match_indices('/') {
            if self.directories.insert(path[..at].to_owned()) {
                self.member(&path[..at], DIRECTORY, (0, 0), &[]);
            }
        }
    }

    fn member(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let links = 1;
        let fields = [
            self.inode,
            mode,
            0,
            0,
            links,
            0,
            u32_len(content.len()),
            0,
            0,
            device.0,
            device.1,
            u32_len(path.len() + 1),
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            write!(self.bytes, "{field:08x}").expect("writing to memory cannot fail");
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn u32_len(len: usize) -> u32 {
    u32::try_from(len).expect("no file of the guest is as large as 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_lists_what_was_put_in() {
        let mut archive = Initramfs::new();
        archive.file("a/b/c", 0o755, b"hello");
        archive.directory("a/b");
        let dir = tempfile::tempdir().unwrap();
        archive.write(&dir.path().join("x.cpio")).unwrap();
        let input = std::fs::File::open(dir.path().join("x.cpio")).unwrap();
        let Ok(output) = Command::new("cpio").arg("-tv").stdin(Stdio::from(input)).output() else {
            eprintln!("skipped: cpio is not installed");
            return;
        };
        let listing = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = listing.lines().collect();
        assert_eq!(lines.len(), 5, "{listing}");
        assert!(lines[1].starts_with("crw-------") && lines[1].contains("5,   1"), "{listing}");
        assert!(lines[4].starts_with("-rwxr-xr-x") && lines[4].ends_with("a/b/c"), "{listing}");
    }
}
