// SPDX-License-Identifier: MIT OR Apache-2.0
//! RAM for old data, shared out to all backups of a host.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use provider_api::Uuid;
use rustix::fs::{FlockOperation, flock};

use crate::blocking;
use crate::job::chain;
use crate::layout::Layout;
use crate::lock::FileLock;

/// How long another process may take to share out.
const WAIT: Duration = Duration::from_secs(10);
const PREFIX: &str = "ram-";

/// The RAM that all backups of a host may have for old data.
#[derive(Debug, Clone)]
pub struct HostRam {
    dir: PathBuf,
    total_bytes: u64,
}

/// A part of it; dropping it gives it back.
#[derive(Debug)]
pub struct RamShare {
    /// How much, in bytes.
    pub bytes: u64,
    path: PathBuf,
    /// Its lock says that the part is in use.
    _file: File,
}

impl Drop for RamShare {
    fn drop(&mut self) {
        // If it stays, whoever shares out next finds its lock gone, and removes it.
        let _ = fs::remove_file(&self.path);
    }
}

impl HostRam {
    /// So many bytes in all.
    #[must_use]
    pub fn new(layout: &Layout, total_bytes: u64) -> Self {
        Self { dir: layout.budget_dir(), total_bytes }
    }

    /// The total in bytes.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Takes what is wanted, or what is left: nobody is waited for.
    ///
    /// # Errors
    /// The directory of the shares cannot be used, or another process does not let go of its lock,
    /// in words.
    pub async fn take(&self, wanted_bytes: u64) -> Result<RamShare, String> {
        let path = self.dir.join("ram.lock");
        let lock = FileLock::acquire(&path, "The host's RAM budget", WAIT).await;
        let lock = lock.map_err(|error| chain(&error))?;
        let (dir, total) = (self.dir.clone(), self.total_bytes);
        let share = blocking::run(move || {
            let _lock = lock;
            let left = total.saturating_sub(in_use(&dir, total)?);
            make_share(&dir, wanted_bytes.min(left))
        });
        share.await.map_err(|error| format!("cannot use '{}': {error}", self.dir.display()))
    }
}

fn make_share(dir: &Path, bytes: u64) -> io::Result<RamShare> {
    let path = dir.join(format!("{PREFIX}{}", Uuid::new_v4().simple()));
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&path)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    write!(file, "{bytes}")?;
    Ok(RamShare { bytes, path, _file: file })
}

/// Sums up the parts in use, and removes those of the dead.
fn in_use(dir: &Path, total_bytes: u64) -> io::Result<u64> {
    let mut sum: u64 = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let file = match File::open(entry.path()) {
            // Given back meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
            match fs::remove_file(entry.path()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => continue,
            }
        }
        let mut text = String::new();
        file.take(32).read_to_string(&mut text)?;
        // One that says nothing may have everything.
        sum = sum.saturating_add(text.parse().unwrap_or(total_bytes));
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn shares_add_up_to_the_total_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let ram = HostRam::new(&Layout::new(Some(dir.path().to_owned())), 100);
        let first = ram.take(60).await.unwrap();
        let second = ram.take(60).await.unwrap();
        let third = ram.take(60).await.unwrap();
        assert_eq!([first.bytes, second.bytes, third.bytes], [60, 40, 0]);
        drop(second);
        assert_eq!(ram.take(10).await.unwrap().bytes, 10);
        assert_eq!(ram.take(60).await.unwrap().bytes, 40);
    }

    #[tokio::test]
    async fn the_shares_of_the_dead_are_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let ram = HostRam::new(&Layout::new(Some(dir.path().to_owned())), 100);
        drop(ram.take(1).await.unwrap());
        let dead = ram.dir.join(format!("{PREFIX}dead"));
        fs::write(&dead, "100").unwrap();
        assert_eq!(ram.take(70).await.unwrap().bytes, 70);
        assert!(!dead.exists());
        // One in use that makes no sense counts as all.
        let odd = ram.dir.join(format!("{PREFIX}odd"));
        fs::write(&odd, "x").unwrap();
        let held = File::open(&odd).unwrap();
        flock(&held, FlockOperation::NonBlockingLockExclusive).unwrap();
        assert_eq!(ram.take(70).await.unwrap().bytes, 0);
    }
}
