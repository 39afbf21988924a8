// SPDX-License-Identifier: GPL-2.0-or-later
//! Nodes of QEMU's block graph: finding, opening, replacing and draining them.

use core::ptr::NonNull;

use qemu_ext_sys as sys;

/// A node of the block graph.
///
/// It is a plain pointer: whoever keeps one knows (by a reference, by a parent, or because the big
/// lock was not released since) that the node is still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bds(NonNull<sys::BlockDriverState>);

// SAFETY: the pointer itself may be passed between threads; what may be called with it, and where,
// is stated by each function that takes one.
unsafe impl Send for Bds {}
// SAFETY: as for `Send`.
unsafe impl Sync for Bds {}

impl Bds {
    /// Wraps a pointer from QEMU; `None` for null.
    pub fn from_ptr(ptr: *mut sys::BlockDriverState) -> Option<Self> {
        NonNull::new(ptr).map(Self)
    }

    /// The pointer, for a call into QEMU.
    pub fn as_ptr(self) -> *mut sys::BlockDriverState {
        self.0.as_ptr()
    }
}
