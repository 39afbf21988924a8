// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where a benchmark works, and until when: its folder for itself alone, QEMU's programs, signals.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::disk::TMPFS;
use crate::scratch;

/// What the kernel calls file systems.
const FILE_SYSTEMS: [(u32, &str); 6] = [
    (0xef53, "ext4"),
    (0x5846_5342, "XFS"),
    (0x9123_683e, "btrfs"),
    (0x2fc1_2fc1, "ZFS"),
    (0x0102_1994, "tmpfs"),
    (0x794c_7630, "overlay"),
];

fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// The folder for disks and sockets, by default `target/bench`. The lock keeps other runs away while
/// it is held. What killed runs have left there, and in RAM, is removed.
///
/// # Errors
/// It cannot be made, or another benchmark runs in it.
pub fn folder(given: Option<&Path>) -> Result<(PathBuf, File)> {
    let folder = given.map_or_else(|| checkout().join("target/bench"), Path::to_owned);
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let folder = folder.canonicalize()?;
    let lock = File::create(folder.join("lock")).context("cannot create a lock")?;
    if lock.try_lock().is_err() {
        bail!("another benchmark runs in {}; --folder names another one", folder.display());
    }
    scratch::sweep(&folder);
    scratch::sweep(Path::new(TMPFS));
    Ok((folder, lock))
}

/// The kind of a folder's file system, and what tells that from others of its kind.
///
/// # Errors
/// There is no such folder.
pub fn file_system(folder: &Path) -> Result<(String, String)> {
    let failed = || format!("cannot examine the file system of {}", folder.display());
    let number = rustix::fs::statfs(folder).with_context(failed)?.f_type as u32;
    let id = rustix::fs::statvfs(folder).with_context(failed)?.f_fsid;
    let known = FILE_SYSTEMS.iter().find(|(known, _)| *known == number);
    let kind = known.map_or_else(|| format!("{number:#x}"), |(_, name)| (*name).to_owned());
    Ok((kind, format!("{id:x}")))
}

/// The folder of the patched QEMU programs.
///
/// # Errors
/// There is none.
pub fn qemu(given: Option<&Path>) -> Result<PathBuf> {
    let bin = given.map_or_else(|| checkout().join("target/qemu/bin"), Path::to_owned);
    bin.canonicalize().with_context(|| format!("{}: run ./x qemu first", bin.display()))
}

/// The signals that end a benchmark.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Option<Signal>,
}

impl Signals {
    fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        let hangup = !hangup_is_ignored();
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: hangup.then(|| listen(SignalKind::hangup())).transpose()?,
        })
    }

    /// Waits for one of them; what happened.
    async fn next(&mut self) -> &'static str {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => "interrupted",
            _ = self.terminate.recv() => "terminated",
            _ = hangup => "the terminal is gone",
        }
    }
}

/// As `nohup` has it: to listen for the signal would undo that.
fn hangup_is_ignored() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // The first signal is the lowest bit.
    ignored
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 == 1)
}

/// Does the work unless SIGINT, SIGTERM or SIGHUP come first.
///
/// # Errors
/// Those of the work, or which signal came.
pub async fn until_stopped<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut signals = Signals::listen()?;
    tokio::select! {
        result = Box::pin(work) => result,
        what = signals.next() => bail!("{what}"),
    }
}

/// A request to end, for work that looks at it from time to time.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Fails once the work is to end.
    ///
    /// # Errors
    /// It is.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            bail!("asked to stop");
        }
        Ok(())
    }
}

/// Does work that blocks: when one of the signals comes it is asked to end, and waited for, so that it cleans
/// up behind itself.
///
/// # Errors
/// Those of the work, or which signal came before it was done.
pub async fn until_asked<T: Send + 'static>(
    work: impl FnOnce(&Stop) -> Result<T> + Send + 'static,
) -> Result<T> {
    let mut signals = Signals::listen()?;
    let stop = Stop::default();
    let asked = stop.clone();
    let mut work = tokio::task::spawn_blocking(move || work(&asked));
    let what = tokio::select! {
        done = &mut work => return done.context("the benchmark crashed")?,
        what = signals.next() => what,
    };
    stop.0.store(true, Ordering::Relaxed);
    // The terminal may be gone.
    let _ = writeln!(std::io::stderr(), "{what}; what is under way ends first");
    match work.await {
        Ok(Ok(done)) => Ok(done),
        // Its error comes of the signal.
        _ => bail!("{what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Signal, getpid, kill_process};
    use std::time::{Duration, Instant};

    #[tokio::test]
    async fn work_that_blocks_ends_after_a_signal_and_cleans_up() {
        struct Cleans(Arc<AtomicBool>);
        impl Drop for Cleans {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let is_clean = Arc::new(AtomicBool::new(false));
        let cleans = Cleans(Arc::clone(&is_clean));
        let work = move |stop: &Stop| -> Result<()> {
            let _cleans = cleans;
            kill_process(getpid(), Signal::TERM)?;
            let deadline = Instant::now() + Duration::from_secs(60);
            while Instant::now() < deadline {
                stop.check()?;
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        };
        let error = until_asked(work).await.unwrap_err();
        assert_eq!(error.to_string(), "terminated");
        assert!(is_clean.load(Ordering::Relaxed));
        assert_eq!(until_asked(|_| Ok(7)).await.unwrap(), 7);
    }

    #[test]
    fn file_systems_are_told_apart() {
        let [proc, devices] = ["/proc", "/dev"].map(|path| file_system(Path::new(path)).unwrap());
        assert_eq!(proc, file_system(Path::new("/proc/self")).unwrap());
        assert_ne!(proc, devices);
        assert!(file_system(Path::new("/nowhere")).is_err());
    }
}
