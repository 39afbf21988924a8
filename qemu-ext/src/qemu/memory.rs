// SPDX-License-Identifier: GPL-2.0-or-later
//! Buffers aligned as a node's devices like them (`include/block/block-io.h`).

use core::ptr::NonNull;

use qemu_ext_sys as sys;

use super::graph::Bds;

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
