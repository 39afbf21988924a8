// SPDX-License-Identifier: MIT OR Apache-2.0
//! A file system in a file, mounted through a loop device: for what only some file systems can. And a
//! loop device itself. Needs root, or sudo without a password.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// Sparse; btrfs needs 109 MiB at least, XFS 300 MiB.
const IMAGE_BYTES: u64 = 512 << 20;

/// A file system that can share blocks between files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
}

impl Kind {
    fn mkfs(self) -> &'static str {
        match self {
            Self::Xfs => "mkfs.xfs",
            Self::Btrfs => "mkfs.btrfs",
        }
    }
}

/// A mounted file system; unmounted and deleted when dropped.
#[derive(Debug)]
pub struct LoopFs {
    folder: tempfile::TempDir,
}

impl LoopFs {
    /// Makes and mounts one.
    ///
    /// # Errors
    /// A tool is missing or fails, for example without root.
    pub fn new(kind: Kind) -> Result<Self> {
        Self::with_size(kind, IMAGE_BYTES)
    }

    /// The same with more room; the file is sparse.
    ///
    /// # Errors
    /// A tool is missing or fails, for example without root.
    pub fn with_size(kind: Kind, size_bytes: u64) -> Result<Self> {
        let folder = tempfile::tempdir().context("Cannot create a folder")?;
        let image = folder.path().join("image");
        std::fs::File::create(&image)?.set_len(size_bytes)?;
        run(as_root(kind.mkfs()).arg("-q").arg(&image))?;
        let this = Self { folder };
        std::fs::create_dir(this.path())?;
        run(as_root("mount").args(["-o", "loop"]).arg(&image).arg(this.path()))?;
        let user = rustix::process::geteuid().as_raw().to_string();
        run(as_root("chown").arg(user).arg(this.path()))?;
        Ok(this)
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("mounted")
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        // Lazily: a process of a failed test may still be there. The loop device goes with it.
        drop(run(as_root("umount").arg("--lazy").arg(self.path())));
    }
}

/// A block device that is a file; detached when dropped.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Attaches a file.
    ///
    /// # Errors
    /// There is no loop device to be had, for example without root.
    pub fn new(file: &Path) -> Result<Self> {
        let text = run(as_root("losetup").args(["--find", "--show"]).arg(file))?;
        let this = Self { path: PathBuf::from(text.trim()) };
        let user = rustix::process::geteuid().as_raw().to_string();
        run(as_root("chown").arg(user).arg(this.path()))?;
        Ok(this)
    }

    /// The device.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        drop(run(as_root("losetup").arg("--detach").arg(&self.path)));
    }
}

fn as_root(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.args(["--non-interactive", program]);
    command
}

/// Runs it; what it says.
fn run(command: &mut Command) -> Result<String> {
    let program = Path::new(command.get_program()).display().to_string();
    let output = command.output().with_context(|| format!("Cannot run {program}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} failed (root is needed): {}", text.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
