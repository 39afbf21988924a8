// SPDX-License-Identifier: GPL-2.0-or-later
//! Refusing commands of others on a node, with a sentence that says why.

use core::ptr::NonNull;

use qemu_ext_sys as sys;

use super::glib;
use super::graph::Bds;
use super::main_loop::MainLoop;

/// What is refused. A backup job is not: it changes nothing of its source.
const REFUSED: [sys::BlockOpType; 10] = [
    sys::BLOCK_OP_TYPE_BACKUP_TARGET,
    sys::BLOCK_OP_TYPE_COMMIT_SOURCE,
    sys::BLOCK_OP_TYPE_COMMIT_TARGET,
    sys::BLOCK_OP_TYPE_EXTERNAL_SNAPSHOT,
    sys::BLOCK_OP_TYPE_INTERNAL_SNAPSHOT,
    sys::BLOCK_OP_TYPE_MIRROR_SOURCE,
    sys::BLOCK_OP_TYPE_MIRROR_TARGET,
    sys::BLOCK_OP_TYPE_REPLACE,
    sys::BLOCK_OP_TYPE_RESIZE,
    sys::BLOCK_OP_TYPE_STREAM,
];

/// While it exists, block jobs, snapshots and a resize of the node are refused. It must be gone when
/// the node is deleted, and before its driver's `close` is called: QEMU asserts that nothing is
/// refused any more.
#[derive(Debug)]
pub struct OpBlocker {
    node: Bds,
    reason: NonNull<sys::Error>,
}

// SAFETY: only the main loop uses the pointers (see `drop`).
unsafe impl Send for OpBlocker {}
// SAFETY: as for `Send`.
unsafe impl Sync for OpBlocker {}

impl OpBlocker {
    /// Refuses for this reason, of which QEMU makes "Node 'x' is busy: reason".
    pub fn new(_: MainLoop, node: Bds, reason: &str) -> Self {
        let text = glib::c_string(reason);
        let mut error = core::ptr::null_mut();
        // SAFETY: main loop; the node is there, and the error lives as long as it is a reason.
        unsafe {
            sys::ba_error_setg(&raw mut error, text.as_ptr());
            for op in REFUSED {
                sys::bdrv_op_block(node.as_ptr(), op, error);
            }
        }
        Self { node, reason: NonNull::new(error).expect("an error was made") }
    }
}

impl Drop for OpBlocker {
    fn drop(&mut self) {
        // SAFETY: main loop, as all changes of the graph; the node is there, see above.
        unsafe {
            for op in REFUSED {
                sys::bdrv_op_unblock(self.node.as_ptr(), op, self.reason.as_ptr());
            }
            sys::error_free(self.reason.as_ptr());
        }
    }
}
