// SPDX-License-Identifier: GPL-2.0-or-later
//! I/O on a node's children (`include/block/block_int-io.h`).

use core::ptr::NonNull;

use fleece::Errno;
use qemu_ext_sys as sys;

use super::coroutine::CoGraph;
use super::graph::Bds;
use super::iovec::{IoSlice, WriteVector};
use super::memory::Block;

/// A link from a node to one of its children.
///
/// # Invariants
/// It lives as long as the parent node is open.
#[derive(Debug, Clone, Copy)]
pub struct Child(NonNull<sys::BdrvChild>);

// SAFETY: I/O may be submitted from any AioContext's thread.
unsafe impl Send for Child {}
// SAFETY: as for `Send`.
unsafe impl Sync for Child {}

fn check(ret: i32) -> Result<(), Errno> {
    if ret < 0 { Err(Errno(-ret)) } else { Ok(()) }
}

impl Child {
    /// Wraps a pointer from QEMU; `None` for null.
    ///
    /// # Safety
    /// The link must live as long as the value is used.
    pub unsafe fn from_ptr(ptr: *mut sys::BdrvChild) -> Option<Self> {
        NonNull::new(ptr).map(Self)
    }

    /// The link, for a call into QEMU.
    pub(super) fn as_ptr(self) -> *mut sys::BdrvChild {
        self.0.as_ptr()
    }

    /// The node it leads to.
    pub fn node(self) -> Bds {
        // SAFETY: by type invariant; a link always has a node while its parent is open.
        let bs = unsafe { (*self.0.as_ptr()).bs };
        Bds::from_ptr(bs).expect("a child has a node")
    }

    /// Reads into `buf[at..at + len]`.
    pub fn read(
        self,
        _: &CoGraph<'_>,
        offset: u64,
        buf: &mut Block,
        at: usize,
        len: usize,
    ) -> Result<(), Errno> {
        let part = &mut buf.as_mut()[at..at + len];
        // SAFETY: coroutine and graph lock by the witness; the buffer is ours until the return.
        check(unsafe {
            sys::bdrv_co_pread(
                self.as_ptr(),
                offset as i64,
                len as i64,
                part.as_mut_ptr().cast(),
                0,
            )
        })
    }

    /// Reads `len` bytes into `buf` at `at`. Several may run on one buffer side by side, in parts
    /// of it that do not overlap.
    pub fn read_into(
        self,
        _: &CoGraph<'_>,
        offset: u64,
        len: usize,
        buf: &IoSlice,
        at: usize,
    ) -> Result<(), Errno> {
        let vector_offset = buf.vector_offset(at, len);
        // SAFETY: coroutine and graph lock by the witness; the vector has those bytes.
        check(unsafe {
            sys::bdrv_co_preadv_part(
                self.as_ptr(),
                offset as i64,
                len as i64,
                buf.as_ptr(),
                vector_offset,
                0,
            )
        })
    }

    /// Writes `parts` one after the other.
    pub fn write(self, _: &CoGraph<'_>, offset: u64, parts: &[&[u8]]) -> Result<(), Errno> {
        let mut vector = WriteVector::new(parts);
        let len = vector.byte_count() as i64;
        // SAFETY: coroutine and graph lock by the witness; the vector lives until the return.
        check(unsafe {
            sys::bdrv_co_pwritev(self.as_ptr(), offset as i64, len, vector.as_mut_ptr(), 0)
        })
    }

    /// Discards a range.
    pub fn discard(self, _: &CoGraph<'_>, offset: u64, len: u64) -> Result<(), Errno> {
        // SAFETY: coroutine and graph lock by the witness.
        check(unsafe { sys::bdrv_co_pdiscard(self.as_ptr(), offset as i64, len as i64) })
    }

    /// Whether the users above ask for writing: only then a discard of ours is allowed.
    pub fn may_write(self, _: &CoGraph<'_>) -> bool {
        // SAFETY: permissions change with the graph, which the witness keeps as it is.
        let perm = unsafe { (*self.as_ptr()).perm };
        perm & u64::from(sys::BLK_PERM_WRITE) != 0
    }

    /// Whether the node's content is known to be zero from `offset`, and for how many bytes the
    /// answer holds.
    pub fn is_zero(self, _: &CoGraph<'_>, offset: u64, len: u64) -> Result<(u64, bool), Errno> {
        let mut known = 0_i64;
        // SAFETY: coroutine and graph lock by the witness; null asks through the backing chain.
        let ret = unsafe {
            sys::bdrv_co_block_status_above(
                self.node().as_ptr(),
                core::ptr::null_mut(),
                offset as i64,
                len as i64,
                &raw mut known,
                core::ptr::null_mut(),
                core::ptr::null_mut(),
            )
        };
        check(ret)?;
        if known <= 0 {
            return Err(Errno::EIO);
        }
        Ok((known as u64, ret as u32 & sys::BDRV_BLOCK_ZERO != 0))
    }

    /// Size of the node in bytes; it cannot be resized while the filter is above it.
    pub fn size_bytes(self) -> u64 {
        // SAFETY: the node is alive while the link is.
        let sectors = unsafe { (*self.node().as_ptr()).total_sectors };
        sectors.max(0) as u64 * u64::from(sys::BDRV_SECTOR_SIZE)
    }

    /// The larger of both nodes' request alignments, in bytes.
    pub fn common_alignment(self, other: Self) -> u64 {
        let of = |child: Self| {
            // SAFETY: the node is alive while the link is.
            u64::from(unsafe { (*child.node().as_ptr()).bl.request_alignment })
        };
        of(self).max(of(other))
    }

    /// What the node can discard or zero as a whole, in bytes; 0 when it does not say.
    pub fn discard_unit(self) -> u64 {
        // SAFETY: the node is alive while the link is.
        let limits = unsafe { (*self.node().as_ptr()).bl };
        u64::from(limits.pdiscard_alignment.max(limits.pwrite_zeroes_alignment))
    }

    /// Cluster size of the node's image in bytes; 0 when it has none.
    pub fn cluster_bytes(self) -> u64 {
        let mut info = sys::BlockDriverInfo::default();
        // SAFETY: called in the main loop during setup; the node is alive.
        let ret = unsafe { sys::bdrv_get_info(self.node().as_ptr(), &raw mut info) };
        if ret < 0 { 0 } else { info.cluster_size.max(0) as u64 }
    }
}
