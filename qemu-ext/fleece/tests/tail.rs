// SPDX-License-Identifier: GPL-2.0-or-later
//! The odd tail of a disk has a place of its own in the log, wherever it comes in a batch.

#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::sync::{Mutex, MutexGuard};

use fleece::{ByteRange, Device, Engine, Errno, Fetch, Geometry, Io, OnError, Settings};

const GRANULE: usize = 4096;
/// Seven granules and a half.
const SIZE: usize = 7 * GRANULE + 2048;

/// One task, and disks in RAM.
struct Disks {
    source: Vec<u8>,
    image: Mutex<Vec<u8>>,
}

impl Disks {
    fn new() -> Self {
        let source = (0..SIZE).map(|at| 1 + (at / 512) as u8).collect();
        Self { source, image: Mutex::new(vec![0xCC; SIZE]) }
    }

    fn image(&self) -> MutexGuard<'_, Vec<u8>> {
        self.image.lock().unwrap()
    }
}

impl Io for Disks {
    type Task = ();
    type Block = Vec<u8>;
    type Buf = [u8];

    fn now_ns(&self) -> u64 {
        0
    }
    fn current(&self) {}
    fn park(&self) {
        unreachable!("nobody else is there");
    }
    fn unpark(&self, (): ()) {}
    fn spawn_flusher(&self) {}
    fn notify(&self) {}
    fn alloc(&self, len: usize) -> Option<Vec<u8>> {
        Some(vec![0; len])
    }
    fn read_source(
        &self,
        offset: u64,
        block: &mut Vec<u8>,
        at: usize,
        len: usize,
    ) -> Result<(), Errno> {
        block[at..at + len].copy_from_slice(&self.source[offset as usize..offset as usize + len]);
        Ok(())
    }
    fn fetch(&self, parts: &[Fetch], buf: &mut [u8]) -> Result<(), Errno> {
        for part in parts {
            let from = part.offset as usize..part.offset as usize + part.len;
            let to = &mut buf[part.at..part.at + part.len];
            match part.device {
                Device::Source => to.copy_from_slice(&self.source[from]),
                Device::Log => to.copy_from_slice(&self.image()[from]),
            }
        }
        Ok(())
    }
    fn source_is_zero(&self, _: u64, len: u64) -> Result<(u64, bool), Errno> {
        Ok((len, false))
    }
    fn discard_source(&self, _: u64, _: u64) {}
    fn write_log(&self, offset: u64, parts: &[&[u8]]) -> Result<(), Errno> {
        let data = parts.concat();
        self.image()[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
        Ok(())
    }
    fn share_source(&self, _: u64, _: u64, _: u64) -> Result<(), Errno> {
        Err(Errno::EIO)
    }
    fn discard_log(&self, _: u64, _: u64) {}
    fn copy_into(&self, buf: &mut [u8], at: usize, data: &[u8]) {
        buf[at..at + data.len()].copy_from_slice(data);
    }
    fn zero_into(&self, buf: &mut [u8], at: usize, len: usize) {
        buf[at..at + len].fill(0);
    }
}

fn engine() -> Engine<(), Vec<u8>> {
    let engine = Engine::new(Settings {
        geometry: Geometry::new(SIZE as u64, 512).unwrap(),
        buffer_bytes: 1 << 20,
        timeout_ns: u64::MAX,
        image_bytes: SIZE as u64,
        segment_bytes: 1 << 20,
        fleecing_limit_bytes: None,
        share_from_bytes: None,
        metadata_limit_bytes: u64::MAX,
        on_error: OnError::BreakSnapshot,
        group: None,
        need: None,
    });
    let engine = engine.unwrap();
    engine.activate();
    engine
}

/// Granules that the guest writes, one request after the other, up to the end of the disk if they go so far.
fn saved_after(writes: &[std::ops::Range<usize>]) {
    let (engine, disks) = (engine(), Disks::new());
    assert_eq!(engine.geometry().granule(), GRANULE as u64);
    let original = disks.source.clone();
    for write in writes {
        let range = ByteRange {
            start: (write.start * GRANULE) as u64,
            end: (write.end * GRANULE).min(SIZE) as u64,
        };
        assert_eq!(engine.before_write(&disks, range), Ok(()));
    }
    while let Some(batch) = engine.next_batch(&disks) {
        engine.flush(&disks, batch);
    }
    assert_eq!(engine.stats().ram_bytes, 0, "{writes:?}");
    // What the guest wrote.
    let disks = Disks { source: vec![0xEE; SIZE], ..disks };
    for write in writes {
        let range = write.start * GRANULE..(write.end * GRANULE).min(SIZE);
        let mut found = vec![0; range.len()];
        let bytes = ByteRange { start: range.start as u64, end: range.end as u64 };
        assert_eq!(engine.read(&disks, bytes, &mut found), Ok(()));
        assert_eq!(found, original[range], "{write:?} of {writes:?}");
    }
}

#[test]
fn it_does_not_shift_what_follows_it_in_a_batch() {
    // The second request captures the granules around the one of the first.
    saved_after(&[6..7, 5..8]);
    saved_after(&[6..7, 4..5, 3..8]);
    saved_after(&[7..8, 5..8]);
    saved_after(&[5..6, 6..7, 7..8]);
    for first in 0..8 {
        for second in 0..8 {
            saved_after(&[first..first + 1, second..8]);
        }
    }
}
