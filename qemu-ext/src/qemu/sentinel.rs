// SPDX-License-Identifier: GPL-2.0-or-later
//! The sentinel: a node beside the way of the disk's I/O, which only notices that the disk is about
//! to be closed. While it exists QEMU does not let the disk go.

use core::ffi::c_int;

use qemu_ext_sys as sys;

use super::driver::{
    EINVAL, filter_refresh_filename, open_staying_child, reopen_prepare, snapshot_child_perm,
};
use super::graph::Bds;
use super::guard;
use super::main_loop::MainLoop;
use crate::access;
use crate::fault;

/// Name of the sentinel's driver. Option at open: `file` (the disk's node name).
pub const SENTINEL_DRIVER: &str = "backup-sentinel";
const NAME: &core::ffi::CStr = c"backup-sentinel";

pub(super) fn driver() -> sys::BlockDriver {
    sys::BlockDriver {
        format_name: NAME.as_ptr(),
        bdrv_open: Some(open),
        bdrv_close: Some(close),
        bdrv_child_perm: Some(snapshot_child_perm),
        bdrv_refresh_filename: Some(filter_refresh_filename),
        bdrv_reopen_prepare: Some(reopen_prepare),
        ..Default::default()
    }
}

unsafe extern "C" fn open(
    bs: *mut sys::BlockDriverState,
    options: *mut sys::QDict,
    _flags: c_int,
    errp: *mut *mut sys::Error,
) -> c_int {
    guard(-EINVAL, || {
        fault::point("sentinel_open");
        // SAFETY: the main loop opens the node; arguments are passed on as QEMU gave them.
        let child = unsafe { open_staying_child(bs, options, errp) };
        child.map_or(-EINVAL, |_| 0)
    })
}

/// The disk is still there: the link to it is cut after this.
unsafe extern "C" fn close(bs: *mut sys::BlockDriverState) {
    guard((), || {
        fault::point("sentinel_close");
        if let (Some(main_loop), Some(node)) = (MainLoop::current(), Bds::from_ptr(bs)) {
            access::sentinel_closed(main_loop, &node.node_name(main_loop));
        }
    });
}
