// SPDX-License-Identifier: MIT OR Apache-2.0
//! One builder at a time in the cache, over all checkouts.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Longer than any build.
const LIMIT: Duration = Duration::from_secs(2 * 3600);

/// Held until dropped.
pub(crate) struct Lock(#[expect(dead_code, reason = "the open file is the lock")] File);

/// Waits for the cache's lock.
pub(crate) fn take(cache: &Path) -> Result<Lock> {
    let path = cache.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| format!("{}: cannot open", path.display()))?;
    let deadline = Instant::now() + LIMIT;
    let mut told = false;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(Errno::WOULDBLOCK) => {}
            Err(error) => bail!("{}: cannot lock: {error}", path.display()),
        }
        if !told {
            let mut holder = String::new();
            file.rewind().and_then(|()| file.read_to_string(&mut holder)).ok();
            eprintln!("    waiting for another build (process {})", holder.trim());
            told = true;
        }
        if Instant::now() >= deadline {
            bail!("{}: locked by another build for {} s", path.display(), LIMIT.as_secs());
        }
        thread::sleep(Duration::from_millis(200));
    }
    let note = format!("{}\n", std::process::id());
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| file.write_all(note.as_bytes()))
        .with_context(|| format!("{}: cannot write", path.display()))?;
    Ok(Lock(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_builder_waits_for_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let first = take(dir.path()).unwrap();
        let path = dir.path().to_path_buf();
        let (sender, receiver) = std::sync::mpsc::channel();
        let second = thread::spawn(move || {
            let lock = take(&path).unwrap();
            sender.send(()).unwrap();
            drop(lock);
        });
        assert!(receiver.try_recv().is_err());
        drop(first);
        receiver.recv_timeout(Duration::from_secs(30)).unwrap();
        second.join().unwrap();
    }
}
