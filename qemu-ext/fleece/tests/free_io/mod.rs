// SPDX-License-Identifier: GPL-2.0-or-later
//! An [`Io`] that costs nothing, so that what remains is the engine's own: for the benchmarks and
//! for the test of its memory. One task at a time, no disk behind it; the old data of all granules
//! is the same, and blocks come from a pool that is filled with it already.

use std::sync::{Mutex, MutexGuard, PoisonError};

use fleece::{Engine, Errno, Fetch, Geometry, Io, OnError, Settings};

/// An engine over [`FreeIo`].
pub(crate) type FreeEngine = Engine<(), Block>;

/// RAM for old data. Nobody is to be urged by it: there are no flushers but [`drain`].
const BUFFER_BYTES: u64 = 1 << 30;
const SEGMENT_BYTES: u64 = 1 << 20;

static DATA: Pool = Pool { fill: 0xA5, free: Mutex::new(Vec::new()) };
static ZERO: Pool = Pool { fill: 0, free: Mutex::new(Vec::new()) };

/// Blocks of any size that hold what the source holds.
#[derive(Debug)]
struct Pool {
    fill: u8,
    /// By size; there are few.
    free: Mutex<Vec<(usize, Vec<Vec<u8>>)>>,
}

impl Pool {
    fn free(&self) -> MutexGuard<'_, Vec<(usize, Vec<Vec<u8>>)>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&'static self, len: usize) -> Block {
        let free = self.free().iter_mut().find(|(size, _)| *size == len).and_then(|of| of.1.pop());
        Block { data: free.unwrap_or_else(|| vec![self.fill; len]), pool: self }
    }

    fn give_back(&self, data: Vec<u8>) {
        let mut free = self.free();
        match free.iter_mut().find(|(size, _)| *size == data.len()) {
            Some((_, of_size)) => of_size.push(data),
            None => free.push((data.len(), vec![data])),
        }
    }
}

/// A block of a pool; nobody writes to it.
#[derive(Debug)]
pub(crate) struct Block {
    data: Vec<u8>,
    pool: &'static Pool,
}

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl AsMut<[u8]> for Block {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.data
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.data));
    }
}

/// The world around an engine, without a disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FreeIo {
    pool: &'static Pool,
}

/// The source is not zero anywhere.
pub(crate) const FULL: FreeIo = FreeIo { pool: &DATA };
/// The source is zero everywhere, but that is only known once it was read.
pub(crate) const EMPTY: FreeIo = FreeIo { pool: &ZERO };

impl Io for FreeIo {
    type Task = ();
    type Block = Block;
    type Buf = ();

    fn now_ns(&self) -> u64 {
        0
    }
    fn current(&self) {}
    fn park(&self) {
        unreachable!("nobody waits where nothing takes time");
    }
    fn unpark(&self, (): ()) {}
    fn spawn_flusher(&self) {
        unreachable!("the buffer is never half full");
    }
    fn notify(&self) {}

    fn alloc(&self, len: usize) -> Option<Block> {
        Some(self.pool.take(len))
    }
    fn read_source(&self, _: u64, _: &mut Block, _: usize, _: usize) -> Result<(), Errno> {
        Ok(())
    }
    fn fetch(&self, _: &[Fetch], (): &mut ()) -> Result<(), Errno> {
        Ok(())
    }
    fn source_is_zero(&self, _: u64, len: u64) -> Result<(u64, bool), Errno> {
        Ok((len, false))
    }
    fn discard_source(&self, _: u64, _: u64) {}
    fn write_log(&self, _: u64, _: &[&[u8]]) -> Result<(), Errno> {
        Ok(())
    }
    fn share_source(&self, _: u64, _: u64, _: u64) -> Result<(), Errno> {
        Ok(())
    }
    fn discard_log(&self, _: u64, _: u64) {}
    fn copy_into(&self, (): &mut (), _: usize, _: &[u8]) {}
    fn zero_into(&self, (): &mut (), _: usize, _: usize) {}
}

/// An engine of a disk of `size` bytes with an image as large, not yet capturing.
pub(crate) fn engine(size: u64, metadata_limit_bytes: u64) -> FreeEngine {
    Engine::new(Settings {
        geometry: Geometry::new(size, 512).expect("a size that has a granule"),
        buffer_bytes: BUFFER_BYTES,
        timeout_ns: u64::MAX,
        image_bytes: size,
        segment_bytes: SEGMENT_BYTES,
        fleecing_limit_bytes: None,
        share_from_bytes: None,
        metadata_limit_bytes,
        on_error: OnError::BreakSnapshot,
        group: None,
        need: None,
    })
    .expect("memory for the engine")
}

/// Moves all old data from RAM to the log.
pub(crate) fn drain(engine: &FreeEngine) {
    while let Some(batch) = engine.next_batch(&FULL) {
        engine.flush(&FULL, batch);
    }
}
