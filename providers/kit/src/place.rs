// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kit's temporary directory. It goes when the kit ends; what a killed kit leaves goes when the next one
//! begins: whoever is alive holds a lock in its directory.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

/// Short, because the path of a socket is limited to 107 bytes.
const PREFIX: &str = "vz-kit-";
const LOCK: &str = "lock";
/// Of a directory that is looked into for mounts.
const DEPTH_MAX: usize = 3;

/// The directory.
pub(crate) struct Place {
    path: PathBuf,
    _dir: TempDir,
    _lock: File,
}

impl Place {
    /// Makes one, and removes those of kits that are dead.
    pub(crate) fn make() -> io::Result<Self> {
        let parent = std::env::temp_dir();
        if let Err(error) = remove_left(&parent) {
            tracing::warn!("What earlier checks left in {} stays: {error}", parent.display());
        }
        Self::make_in(&parent)
    }

    fn make_in(parent: &Path) -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent)?;
        // The host opens nothing through symbolic links.
        let path = dir.path().canonicalize()?;
        let lock = File::create(path.join(LOCK))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { path, _dir: dir, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Removes directories of our user in which nobody holds the lock. One without a lock is just being made.
fn remove_left(parent: &Path) -> io::Result<()> {
    let us = rustix::process::geteuid().as_raw();
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let is_ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        // Another kit may have removed it a moment ago. Never through a link.
        let Ok(meta) = entry.metadata() else { continue };
        if !is_ours || !meta.is_dir() || meta.uid() != us {
            continue;
        }
        let Ok(lock) = File::open(entry.path().join(LOCK)) else { continue };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        unmount_below(&entry.path(), DEPTH_MAX);
        match fs::remove_dir_all(entry.path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Takes away the mounts of daemons that were killed. They are on files, and dead.
fn unmount_below(dir: &Path, depth: usize) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() && depth > 1 {
            unmount_below(&entry.path(), depth - 1);
        } else if kind.is_file() {
            // Fails for everything that is no mount.
            let _ = unmount(entry.path(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_dead_kits_left_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let alive = Place::make_in(parent.path()).unwrap();
        let dead = parent.path().join("vz-kit-dead");
        for (name, file) in [("vz-kit-dead/0", LOCK), ("vz-kit-begun", "x"), ("kit-other", LOCK)] {
            let dir = parent.path().join(name);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join(file), "").unwrap();
        }
        fs::write(dead.join(LOCK), "").unwrap();
        remove_left(parent.path()).unwrap();
        let mut left: Vec<_> =
            fs::read_dir(parent.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        left.sort();
        let names = ["kit-other", "vz-kit-begun"].map(|name| parent.path().join(name));
        let mut expected: Vec<_> = names.into_iter().chain([alive.path().to_owned()]).collect();
        expected.sort();
        assert_eq!(left, expected);
        drop(alive);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 2);
    }
}
