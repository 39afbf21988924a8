// SPDX-License-Identifier: MIT OR Apache-2.0
//! Locks between processes: `flock` on a file, gone when the holder dies.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};

use crate::layout::{LayoutError, make_private_dir};

/// How often a busy lock is tried again; `flock` cannot wait with a limit.
const RETRY_MS: u64 = 50;

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else holds it.
    #[error("{what} is in use by another task{}.", holder(.pid))]
    Busy {
        /// What the lock protects, as the beginning of a sentence.
        what: String,
        /// The holder, as far as known.
        pid: Option<u32>,
    },
    /// The lock's directory could not be made.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The lock's file could not be opened or locked.
    #[error("Cannot lock the file '{path}'.")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn holder(pid: &Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

/// A lock that is held until it is dropped. The file stays: removing it would let two processes
/// lock two files of one name.
#[derive(Debug)]
pub struct FileLock {
    _file: File,
}

impl FileLock {
    /// Takes the lock at `path` now, or says who holds it. `what` names the protected thing.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn try_acquire(path: &Path, what: &str) -> Result<Self, LockError> {
        let fault = |source| LockError::Io { path: path.to_owned(), source };
        if let Some(parent) = path.parent() {
            make_private_dir(parent)?;
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            // What is written is for the lock's own file.
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(path)
            .map_err(fault)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                // The number is a hint for people, so a failed read only loses the hint.
                let pid = (&file).take(16).read_to_string(&mut text).ok();
                let pid = pid.and_then(|_| text.trim().parse().ok());
                return Err(LockError::Busy { what: what.to_owned(), pid });
            }
            Err(errno) => return Err(fault(errno.into())),
        }
        file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(fault)?;
        Ok(Self { _file: file })
    }

    /// Takes the lock at `path`, waiting up to `timeout` for its holder.
    ///
    /// # Errors
    /// [`LockError`].
    pub async fn acquire(path: &Path, what: &str, timeout: Duration) -> Result<Self, LockError> {
        let deadline = Instant::now() + timeout;
        loop {
            match Self::try_acquire(path, what) {
                Err(LockError::Busy { .. }) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(RETRY_MS)).await;
                }
                other => return other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let (other, path) = (dir.path().join("other"), dir.path().join("lock/a.lock"));
        std::fs::write(&other, "somebody's").unwrap();
        std::fs::create_dir(dir.path().join("lock")).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        let refused = FileLock::try_acquire(&path, "VM 100");
        assert!(matches!(refused, Err(LockError::Io { .. })), "{refused:?}");
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "somebody's");
    }

    #[tokio::test]
    async fn a_held_lock_names_its_holder_and_is_free_after_the_drop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock/a.lock");
        let held = FileLock::try_acquire(&path, "VM 100").unwrap();
        let error = FileLock::try_acquire(&path, "VM 100").unwrap_err().to_string();
        let own = std::process::id();
        assert_eq!(error, format!("VM 100 is in use by another task (process {own})."));
        drop(held);
        FileLock::acquire(&path, "VM 100", Duration::ZERO).await.unwrap();
    }
}
