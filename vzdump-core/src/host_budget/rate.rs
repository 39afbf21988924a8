// SPDX-License-Identifier: MIT OR Apache-2.0
//! One rate for all processes of a host: a file in which each books when its next bytes may pass.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::time::{ClockId, clock_gettime};

use crate::bandwidth::Ledger;
use crate::layout::{Layout, make_private_dir};

/// How often a file is asked for that another process has, and how long it is waited for. It has it
/// for some microseconds, unless it was stopped in them.
const RETRY: Duration = Duration::from_millis(1);
const WAIT: Duration = Duration::from_secs(1);
/// What is booked further ahead than this was not booked by this program.
const AHEAD_MAX: Duration = Duration::from_secs(3600);

/// The rate of a host.
#[derive(Debug)]
pub struct HostRate {
    rate_bytes_per_s: u64,
    path: PathBuf,
    /// Locked, because `flock` tells processes apart, not tasks.
    file: tokio::sync::Mutex<File>,
}

impl HostRate {
    /// Opens the host's account for this rate, in bytes per second.
    ///
    /// # Errors
    /// The account cannot be opened, in words.
    pub fn open(layout: &Layout, rate_bytes_per_s: u64) -> Result<Self, String> {
        let dir = layout.budget_dir();
        make_private_dir(&dir).map_err(|error| crate::job::chain(&error))?;
        // The clock starts anew with each boot.
        let boot = "/proc/sys/kernel/random/boot_id";
        let boot = std::fs::read_to_string(boot).map_err(|error| format!("{boot}: {error}"))?;
        let path = dir.join(format!("bandwidth-{}", boot.trim()));
        let file = open_file(&path)
            .map_err(|error| format!("cannot open '{}': {error}", path.display()))?;
        Ok(Self { rate_bytes_per_s, path, file: tokio::sync::Mutex::new(file) })
    }

    /// The rate in bytes per second.
    #[must_use]
    pub fn rate_bytes_per_s(&self) -> u64 {
        self.rate_bytes_per_s
    }

    /// Books bytes, and says how long they must wait.
    ///
    /// # Errors
    /// The account cannot be read or written, or another process does not give it back.
    pub(crate) async fn book(&self, bytes: u64) -> Result<Duration, String> {
        let file = self.file.lock().await;
        let fault = |error: io::Error| format!("cannot use '{}': {error}", self.path.display());
        let begin = tokio::time::Instant::now();
        while let Err(errno) = flock(&*file, FlockOperation::NonBlockingLockExclusive) {
            if errno != rustix::io::Errno::WOULDBLOCK || begin.elapsed() > WAIT {
                return Err(fault(errno.into()));
            }
            tokio::time::sleep(RETRY).await;
        }
        let wait = self.book_locked(&file, bytes).map_err(fault);
        // Cannot fail for a lock that is held.
        let _ = flock(&*file, FlockOperation::Unlock);
        wait
    }

    fn book_locked(&self, file: &File, bytes: u64) -> io::Result<Duration> {
        let now = since_boot();
        let mut stored = [0; 8];
        // Shorter when it is new.
        let length = file.read_at(&mut stored, 0)?;
        let booked = Duration::from_nanos(u64::from_le_bytes(stored));
        let is_sound = length == stored.len() && booked <= now + AHEAD_MAX;
        let booked = if is_sound { booked } else { Duration::ZERO };
        let mut ledger = Ledger::new(self.rate_bytes_per_s, booked);
        let until = ledger.book(now, bytes).min(now + AHEAD_MAX);
        let ns = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX);
        file.write_all_at(&ns.to_le_bytes(), 0)?;
        Ok(until.saturating_sub(now))
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// A clock that is the same in all processes.
fn since_boot() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: u64 = 1 << 20;

    fn layout(dir: &tempfile::TempDir) -> Layout {
        Layout::new(Some(dir.path().to_owned()))
    }

    /// Two openings of the file are to `flock` what two processes are.
    #[tokio::test]
    async fn processes_book_in_one_account() {
        let dir = tempfile::tempdir().unwrap();
        let one = HostRate::open(&layout(&dir), RATE).unwrap();
        let two = HostRate::open(&layout(&dir), RATE).unwrap();
        let mut last = Duration::ZERO;
        for rate in [&one, &two, &one, &two] {
            last = rate.book(10 * RATE).await.unwrap();
        }
        // 40 s of it are booked; what was not used in the last 100 ms, and the time this took, is off.
        assert!(last > Duration::from_secs(38) && last <= Duration::from_secs(40), "{last:?}");
    }

    #[tokio::test]
    async fn nonsense_in_the_account_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let rate = HostRate::open(&layout(&dir), RATE).unwrap();
        for nonsense in [&[0xff; 8][..], &[1, 2, 3]] {
            std::fs::write(&rate.path, nonsense).unwrap();
            let wait = rate.book(RATE).await.unwrap();
            assert!(wait <= Duration::from_secs(1), "{wait:?}");
        }
        // Nor do more bytes than can pass in an hour.
        assert!(rate.book(u64::MAX).await.unwrap() <= AHEAD_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn an_account_that_is_not_given_back_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let rate = HostRate::open(&layout(&dir), RATE).unwrap();
        let other = open_file(&rate.path).unwrap();
        flock(&other, FlockOperation::LockExclusive).unwrap();
        let error = rate.book(1).await.unwrap_err();
        assert!(error.contains("bandwidth-"), "{error}");
        drop(other);
        rate.book(1).await.unwrap();
    }
}
