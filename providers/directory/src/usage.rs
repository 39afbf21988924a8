// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who works with a guest's archives: two locks per guest, dropped by the kernel when their
//! holder dies.
//!
//! ```text
//! .vzdump/guests/<kind>-<id>.use       shared: a backup, a restore or a verification has archives open
//!                                      exclusive: an archive is taken away or replaced now
//! .vzdump/guests/<kind>-<id>.change    exclusive: an archive is being removed, which may take hours
//! ```
//!
//! A removal holds `change` from its beginning to its end, and `use` only for the moment in which
//! directories change their names: while it copies, those may begin. Both are taken
//! before the storage's lock, never while it is held.

use std::fs::{File, TryLockError};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use provider_api::{Call, Error, GuestKind, Kind, Result};

use crate::call::check;
use crate::files;
use crate::limits::LOCK_RETRY;
use crate::storage::Storage;

/// Which lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Use,
    Exclusive,
    Change,
}

/// A guest of a storage.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    storage: Storage,
    kind: GuestKind,
    id: u32,
}

/// A lock of a guest, held.
#[derive(Debug)]
pub(crate) struct GuestLock {
    _file: File,
}

impl Guest {
    pub(crate) fn new(storage: &Storage, kind: GuestKind, id: u32) -> Self {
        Self { storage: storage.clone(), kind, id }
    }

    /// Keeps the guest's archives where they are, waiting at most `wait` for a removal's last step.
    pub(crate) async fn begin_use(&self, call: &Call, wait: Duration) -> Result<GuestLock> {
        let until = Instant::now() + wait;
        loop {
            if let Some(lock) = self.attempt(Mode::Use, call, until)? {
                return Ok(lock);
            }
            tokio::time::sleep(LOCK_RETRY).await;
        }
    }

    /// As [`Guest::begin_use`], on a blocking thread.
    pub(crate) fn begin_use_blocking(&self, call: &Call, wait: Duration) -> Result<GuestLock> {
        self.wait(Mode::Use, call, wait)
    }

    /// Takes the right to take archives away or replace them; refused while one is used.
    pub(crate) fn exclusive(&self, call: &Call, wait: Duration) -> Result<GuestLock> {
        self.wait(Mode::Exclusive, call, wait)
    }

    /// Takes the right to remove archives of the guest.
    pub(crate) fn begin_change(&self, call: &Call, wait: Duration) -> Result<GuestLock> {
        self.wait(Mode::Change, call, wait)
    }

    fn wait(&self, mode: Mode, call: &Call, wait: Duration) -> Result<GuestLock> {
        let until = Instant::now() + wait;
        loop {
            if let Some(lock) = self.attempt(mode, call, until)? {
                return Ok(lock);
            }
            std::thread::sleep(LOCK_RETRY);
        }
    }

    fn attempt(&self, mode: Mode, call: &Call, until: Instant) -> Result<Option<GuestLock>> {
        check(call, "Waiting for other work on the guest's archives")?;
        let path = self.path(mode)?;
        let file = files::open_lock(&path)?;
        let taken = if mode == Mode::Use { file.try_lock_shared() } else { file.try_lock() };
        match taken {
            Ok(()) => Ok(Some(GuestLock { _file: file })),
            Err(TryLockError::WouldBlock) if Instant::now() < until => Ok(None),
            Err(TryLockError::WouldBlock) => Err(self.busy(mode)),
            Err(TryLockError::Error(e)) => {
                Err(Error::io(format!("Cannot lock {}.", path.display()), e))
            }
        }
    }

    fn path(&self, mode: Mode) -> Result<PathBuf> {
        let directory = self.storage.guests_path();
        if !files::is_directory(&directory) {
            files::ensure_directory(&directory)?;
        }
        let suffix = if mode == Mode::Change { "change" } else { "use" };
        Ok(directory.join(format!("{}-{}.{suffix}", self.kind, self.id)))
    }

    fn busy(&self, mode: Mode) -> Error {
        let what = match mode {
            Mode::Use => "are just being replaced",
            Mode::Exclusive => "are being restored or verified, or a backup builds upon them",
            Mode::Change => "are being removed by another task",
        };
        let (kind, id) = (self.kind, self.id);
        Error::new(Kind::InUse, format!("Archives of {kind} {id} {what}; try again later."))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use provider_api::{Call, GuestKind, Kind};

    use super::Guest;
    use crate::storage::Storage;

    #[test]
    fn a_use_keeps_removals_off_and_other_guests_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::new(folder.path().to_owned());
        storage.prepare().unwrap();
        let (call, soon) = (Call::default(), Duration::from_millis(30));
        let guest = Guest::new(&storage, GuestKind::Qemu, 1);
        let other = Guest::new(&storage, GuestKind::Lxc, 1);
        let one = guest.begin_use_blocking(&call, soon).unwrap();
        let two = guest.begin_use_blocking(&call, soon).unwrap();
        let _change = guest.begin_change(&call, soon).unwrap();
        assert_eq!(guest.begin_change(&call, soon).unwrap_err().kind, Kind::InUse);
        other.exclusive(&call, soon).unwrap();
        drop(one);
        assert_eq!(guest.exclusive(&call, soon).unwrap_err().kind, Kind::InUse);
        drop(two);
        let exclusive = guest.exclusive(&call, soon).unwrap();
        assert_eq!(guest.begin_use_blocking(&call, soon).unwrap_err().kind, Kind::InUse);
        drop(exclusive);
        guest.begin_use_blocking(&call, soon).unwrap();
        call.cancel.cancel();
        assert_eq!(guest.exclusive(&call, soon).unwrap_err().kind, Kind::Cancelled);
    }
}
