// SPDX-License-Identifier: MIT OR Apache-2.0
//! A file that is written to the disk while it grows, so that little is left to wait for at its end.

use std::fs::File;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::Hashing;
use crate::limits::FLUSH_BYTES;

/// A file that is hashed on its way, too.
pub(super) struct Durable {
    file: Hashing,
    /// From where on nothing is being written to the disk yet.
    flushed_bytes: u64,
    flusher: Flusher,
}

impl Durable {
    pub(super) fn new(file: File) -> io::Result<Self> {
        let flusher = Flusher::start(file.try_clone()?)?;
        Ok(Self { file: Hashing::new(file), flushed_bytes: 0, flusher })
    }

    /// Returns when all of it is on the disk: its hash, and how much it was.
    pub(super) fn finish(self) -> io::Result<(String, u64)> {
        let (file, hash, size_bytes) = self.file.finish();
        // Its error first: the kernel tells it once only.
        self.flusher.end()?;
        file.sync_all()?;
        Ok((hash, size_bytes))
    }
}

impl Write for Durable {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        if self.file.size_bytes - self.flushed_bytes >= FLUSH_BYTES {
            self.flushed_bytes = self.file.size_bytes;
            self.flusher.go_on();
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A thread that waits for the disk.
#[derive(Debug)]
struct Flusher {
    wake: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Flusher {
    fn start(file: File) -> io::Result<Self> {
        let (wake, woken) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("flush".to_owned())
            .spawn(move || flush(&file, &woken))?;
        Ok(Self { wake, thread })
    }

    /// Also if the disk is slow: what is not taken now is taken with the next piece.
    fn go_on(&self) {
        let _ = self.wake.try_send(());
    }

    fn end(self) -> io::Result<()> {
        drop(self.wake);
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the writing thread crashed")))
    }
}

fn flush(file: &File, woken: &Receiver<()>) -> io::Result<()> {
    while woken.recv().is_ok() {
        file.sync_data()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_it_is_there_with_its_hash() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut file = Durable::new(File::create_new(&path).unwrap()).unwrap();
        let piece: Vec<u8> = (0..1 << 20).map(|n: u32| (n >> 7) as u8).collect();
        let count = FLUSH_BYTES * 2 / piece.len() as u64 + 1;
        (0..count).for_each(|_| file.write_all(&piece).unwrap());
        let (hash, size_bytes) = file.finish().unwrap();
        let content = std::fs::read(&path).unwrap();
        assert_eq!(size_bytes, content.len() as u64);
        assert_eq!(hash, blake3::hash(&content).to_hex().as_str());
    }

    #[test]
    fn what_the_disk_refuses_is_an_error() {
        // Takes no data.
        let mut file =
            Durable::new(File::options().write(true).open("/dev/full").unwrap()).unwrap();
        assert!(file.write_all(b"x").is_err());
        // Cannot be written to the disk.
        let (_reader, writer) = io::pipe().unwrap();
        let file = Durable::new(File::from(std::os::fd::OwnedFd::from(writer))).unwrap();
        assert!(file.finish().is_err());
    }
}
