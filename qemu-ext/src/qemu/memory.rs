// SPDX-License-Identifier: GPL-2.0-or-later
//! Buffers for old data: from one mapping per disk, so that a guest request needs no allocator, or
//! from QEMU, aligned as a node's devices like them (`include/block/block-io.h`).

use core::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use fleece::Runs;
use qemu_ext_sys as sys;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::graph::Bds;
use crate::fault;

/// Slots of the mapping, in bytes; a page on every supported machine.
const SLOT_BYTES: usize = 4096;
const CHUNK_BYTES: usize = Runs::CHUNK_SLOTS * SLOT_BYTES;

/// The mapping of one disk's buffer. Pages exist once they are used.
///
/// # Invariants
/// `base` is a private mapping of `len` bytes, all of them initialised (anonymous memory is zero),
/// that only [`Block`]s of disjoint runs use.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    len: usize,
    runs: Mutex<Runs>,
}

// SAFETY: the memory belongs to the mapping, not to a thread; runs are handed out under a lock.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `Pool::new`; every block holds the mapping, so none is left. A failure
        // would leave address space behind, nothing else.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Where the blocks of one disk come from.
#[derive(Debug)]
pub struct Pool {
    node: Bds,
    /// None when the buffer has no size, or the devices want a larger alignment than a page.
    mapping: Option<Arc<Mapping>>,
}

impl Pool {
    /// A pool of `bytes` for I/O on `node` and its children. Main loop.
    pub fn new(node: Bds, bytes: u64) -> Self {
        // SAFETY: the node is alive, says the caller.
        let alignment = unsafe { sys::bdrv_opt_mem_align(node.as_ptr()) };
        let mapping = if alignment <= SLOT_BYTES { Self::map(bytes) } else { None };
        Self { node, mapping }
    }

    fn map(bytes: u64) -> Option<Arc<Mapping>> {
        if fault::alloc_fails("mapping") {
            return None;
        }
        let chunks = usize::try_from(bytes).ok()?.div_ceil(CHUNK_BYTES);
        let len = chunks.checked_mul(CHUNK_BYTES).filter(|&len| len > 0)?;
        let (protection, flags) =
            (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base =
            unsafe { rustix::mm::mmap_anonymous(core::ptr::null_mut(), len, protection, flags) };
        let base = NonNull::new(base.ok()?.cast::<u8>())?;
        // Guests' data has no place in a core dump; without that nothing else breaks.
        // SAFETY: the mapping that was just made.
        let _ = unsafe { rustix::mm::madvise(base.as_ptr().cast(), len, Advice::LinuxDontDump) };
        Some(Arc::new(Mapping { base, len, runs: Mutex::new(Runs::new(chunks)) }))
    }

    /// A block of `len` bytes with any content; none without memory.
    pub fn take(&self, len: usize) -> Option<Block> {
        if fault::alloc_fails("block") {
            return None;
        }
        self.take_mapped(len)
            .map(Block::Mapped)
            .or_else(|| AlignedBuf::new(self.node, len).map(Block::Heap))
    }

    fn take_mapped(&self, len: usize) -> Option<Run> {
        if fault::alloc_fails("run") {
            return None;
        }
        let mapping = self.mapping.as_ref()?;
        let slots = len.div_ceil(SLOT_BYTES);
        let (chunk, slot) = mapping.runs().take(slots)?;
        Some(Run { mapping: Arc::clone(mapping), chunk, slot, len })
    }

    /// Gives memory back to the system that was not used lately, until then: a buffer that was full once would keep what
    /// other disks may need. To be called every second or so. A piece of a MiB of which something is in use stays.
    pub fn give_back_idle(&self, until: Instant) {
        let Some(mapping) = &self.mapping else { return };
        mapping.runs().look_for_idle();
        let mut from = 0;
        while Instant::now() < until {
            // Not held while the kernel frees pages: guest requests take it.
            let Some(chunk) = mapping.runs().take_idle(from) else { return };
            mapping.discard(chunk);
            mapping.runs().emptied(chunk);
            from = chunk + 1;
        }
    }
}

impl Mapping {
    fn runs(&self) -> MutexGuard<'_, Runs> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops the content of a chunk that was taken and that no [`Run`] has. Without success its memory stays.
    fn discard(&self, chunk: usize) {
        // SAFETY: within the mapping; nothing refers to the chunk. It reads as zeroes then, so it stays initialised.
        let _ = unsafe {
            let start = self.base.as_ptr().add(chunk * CHUNK_BYTES);
            rustix::mm::madvise(start.cast(), CHUNK_BYTES, Advice::LinuxDontNeed)
        };
    }
}

/// Old data in RAM.
#[derive(Debug)]
pub enum Block {
    /// In the disk's mapping.
    Mapped(Run),
    /// The mapping has no room for it in one piece.
    Heap(AlignedBuf),
}

/// A run of slots.
///
/// # Invariants
/// The slots were taken from `mapping.runs` and are used by this value alone.
#[derive(Debug)]
pub struct Run {
    mapping: Arc<Mapping>,
    chunk: usize,
    slot: usize,
    len: usize,
}

impl Run {
    fn ptr(&self) -> *mut u8 {
        let offset = self.chunk * CHUNK_BYTES + self.slot * SLOT_BYTES;
        // SAFETY: by the invariants the run lies within the mapping.
        unsafe { self.mapping.base.as_ptr().add(offset) }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.mapping.runs().give_back(self.chunk, self.slot, self.len.div_ceil(SLOT_BYTES));
    }
}

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Heap(buf) => buf.as_ref(),
            // SAFETY: by the invariants: initialised, and nobody else writes.
            Self::Mapped(run) => unsafe { core::slice::from_raw_parts(run.ptr(), run.len) },
        }
    }
}

impl AsMut<[u8]> for Block {
    fn as_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Heap(buf) => buf.as_mut(),
            // SAFETY: by the invariants, and `&mut self` makes the access exclusive.
            Self::Mapped(run) => unsafe { core::slice::from_raw_parts_mut(run.ptr(), run.len) },
        }
    }
}

/// A buffer from `qemu_try_blockalign`, zeroed.
///
/// # Invariants
/// `ptr` points to `len` initialised bytes that this value alone owns.
#[derive(Debug)]
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its memory, like a `Box<[u8]>`.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// A buffer of `len` bytes for I/O on `node` and its children; none without memory.
    pub fn new(node: Bds, len: usize) -> Option<Self> {
        // SAFETY: `node` is alive while one of its requests or its driver runs, which is where
        // buffers are made.
        let ptr = unsafe { sys::qemu_try_blockalign(node.as_ptr(), len) };
        let ptr = NonNull::new(ptr.cast::<u8>())?;
        // SAFETY: the allocation is `len` bytes long; zeroing makes it initialised.
        unsafe { ptr.write_bytes(0, len) };
        Some(Self { ptr, len })
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: by type invariant.
        unsafe { core::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl AsMut<[u8]> for AlignedBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: by type invariant, and `&mut self` makes the access exclusive.
        unsafe { core::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `qemu_try_blockalign` and is given back once.
        unsafe { sys::qemu_vfree(self.ptr.as_ptr().cast()) };
    }
}
