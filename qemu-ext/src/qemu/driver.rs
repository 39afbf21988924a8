// SPDX-License-Identifier: GPL-2.0-or-later
//! The block drivers of filter and snapshot as QEMU sees them (`include/block/block_int-common.h`):
//! C callbacks that convert their arguments, call the safe code, and convert the result.
//!
//! Every callback that runs code which could panic catches that. The guest's own payload is passed
//! on outside of that net, by one C call.

use core::ffi::{c_char, c_int};
use core::ptr::null_mut;
use std::sync::OnceLock;

use fleece::{ByteRange, Discard, Errno};
use qemu_ext_sys as sys;

use super::child::Child;
use super::coroutine::{Busy, CoGraph};
use super::graph::Bds;
use super::iovec::IoSlice;
use super::{guard, sentinel, try_guard};
use crate::fault;
use crate::filter::Filter;
use crate::snapshot;

const FILTER_NAME: &core::ffi::CStr = c"backup-fleecing";
const SNAPSHOT_NAME: &core::ffi::CStr = c"backup-snapshot";

/// A registered driver and what must live as long as it.
struct Registered<T: 'static>(&'static T);

// SAFETY: what is inside is only compared or read after registration.
unsafe impl<T> Send for Registered<T> {}
// SAFETY: as for `Send`.
unsafe impl<T> Sync for Registered<T> {}

static FILTER: OnceLock<usize> = OnceLock::new();
static STAYING_CHILD: OnceLock<Registered<sys::BdrvChildClass>> = OnceLock::new();

#[used]
#[unsafe(link_section = ".init_array")]
static REGISTER: extern "C" fn() = register_init;

/// What QEMU's `block_init()` macro expands to: `register` runs when the block layer starts.
extern "C" fn register_init() {
    // SAFETY: called by the C runtime before `main`, as QEMU's own constructors are.
    unsafe { sys::register_module_init(Some(register), sys::MODULE_INIT_BLOCK) };
}

unsafe extern "C" fn register() {
    guard((), || {
        std::panic::set_hook(Box::new(|info| {
            // One line: a backtrace through a coroutine's stack is not worth the risk.
            use std::io::Write;
            drop(writeln!(std::io::stderr(), "qemu-ext: {info}"));
        }));
        // A link like any other to a child, but one that stays at its node when the graph changes.
        // SAFETY: QEMU's own class, constant after start.
        let mut class = unsafe { core::ptr::read(&raw const sys::child_of_bds) };
        class.stay_at_node = true;
        drop(STAYING_CHILD.set(Registered(Box::leak(Box::new(class)))));

        let filter: *mut sys::BlockDriver = Box::leak(Box::new(filter_driver()));
        let _ = FILTER.set(filter as usize);
        // SAFETY: complete drivers that are never freed.
        unsafe { sys::bdrv_register(filter) };
        // SAFETY: as above.
        unsafe { sys::bdrv_register(Box::leak(Box::new(snapshot_driver()))) };
        // SAFETY: as above.
        unsafe { sys::bdrv_register(Box::leak(Box::new(sentinel::driver()))) };
    });
}

fn filter_driver() -> sys::BlockDriver {
    sys::BlockDriver {
        format_name: FILTER_NAME.as_ptr(),
        instance_size: size_of::<*mut Filter>() as c_int,
        is_filter: true,
        bdrv_open: Some(filter_open),
        bdrv_close: Some(filter_close),
        bdrv_child_perm: Some(filter_child_perm),
        bdrv_refresh_limits: Some(filter_refresh_limits),
        bdrv_refresh_filename: Some(filter_refresh_filename),
        bdrv_reopen_prepare: Some(reopen_prepare),
        bdrv_inactivate: Some(filter_inactivate),
        bdrv_drain_begin: Some(filter_drain_begin),
        bdrv_drain_end: Some(filter_drain_end),
        bdrv_co_preadv_part: Some(filter_co_preadv_part),
        bdrv_co_pwritev_part: Some(filter_co_pwritev_part),
        bdrv_co_pwrite_zeroes: Some(filter_co_pwrite_zeroes),
        bdrv_co_pdiscard: Some(filter_co_pdiscard),
        bdrv_co_flush: Some(filter_co_flush),
        bdrv_co_truncate: Some(filter_co_truncate),
        ..Default::default()
    }
}

fn snapshot_driver() -> sys::BlockDriver {
    sys::BlockDriver {
        format_name: SNAPSHOT_NAME.as_ptr(),
        bdrv_open: Some(snapshot_open),
        bdrv_close: Some(snapshot_close),
        bdrv_child_perm: Some(snapshot_child_perm),
        bdrv_refresh_limits: Some(snapshot_refresh_limits),
        bdrv_refresh_filename: Some(filter_refresh_filename),
        bdrv_reopen_prepare: Some(reopen_prepare),
        bdrv_inactivate: Some(snapshot_inactivate),
        bdrv_co_preadv_part: Some(snapshot_co_preadv_part),
        bdrv_co_pwritev_part: Some(snapshot_co_pwritev_part),
        bdrv_co_pwrite_zeroes: Some(snapshot_co_pwrite_zeroes),
        bdrv_co_pdiscard: Some(snapshot_co_pdiscard),
        bdrv_co_block_status: Some(snapshot_co_block_status),
        ..Default::default()
    }
}

/// The filter behind a node; none when the node has another driver.
pub fn filter_of(node: Bds) -> Option<&'static Filter> {
    let bs = node.as_ptr();
    // SAFETY: the node is alive: the caller is a callback of it, or the main loop that found it.
    let drv = unsafe { (*bs).drv };
    if FILTER.get().copied() != Some(drv as usize) {
        return None;
    }
    // SAFETY: a node of our driver; `opaque` holds one pointer.
    let slot = unsafe { (*bs).opaque.cast::<*mut Filter>() };
    // SAFETY: `filter_open` stored null or a leaked box there, which lives until `filter_close`.
    unsafe { (*slot).as_ref() }
}

/// Whether a link of this class is one of ours that stay: from a snapshot node or a sentinel.
pub(super) fn is_staying_link(class: *const sys::BdrvChildClass) -> bool {
    STAYING_CHILD.get().is_some_and(|ours| core::ptr::eq(ours.0, class))
}

/// The state in a callback of the filter itself.
///
/// # Safety
/// `bs` is an open node of the filter's driver.
unsafe fn state<'a>(bs: *mut sys::BlockDriverState) -> &'a Filter {
    // SAFETY: as stated; `filter_open` stored the pointer.
    unsafe { &**(*bs).opaque.cast::<*mut Filter>() }
}

fn errno<T>(result: Result<T, Errno>) -> c_int {
    match result {
        Ok(_) => 0,
        Err(Errno(errno)) => -errno,
    }
}

pub(super) const EINVAL: c_int = 22;
const EBUSY: c_int = 16;
const ENOTSUP: c_int = 95;

// ---- filter ----------------------------------------------------------------------------------

unsafe extern "C" fn filter_open(
    bs: *mut sys::BlockDriverState,
    options: *mut sys::QDict,
    _flags: c_int,
    errp: *mut *mut sys::Error,
) -> c_int {
    guard(-EINVAL, || {
        fault::point("filter_open");
        // SAFETY: arguments are passed on as QEMU gave them.
        unsafe { open_filter(bs, options, errp) }
    })
}

/// # Safety
/// As for the callback of a driver: the main loop opens the node.
unsafe fn open_filter(
    bs: *mut sys::BlockDriverState,
    options: *mut sys::QDict,
    errp: *mut *mut sys::Error,
) -> c_int {
    // SAFETY: the main loop opens the node; arguments are passed on as QEMU gave them.
    let ret = unsafe {
        sys::bdrv_open_file_child(core::ptr::null(), options, c"file".as_ptr(), bs, errp)
    };
    if ret < 0 {
        return ret;
    }
    // SAFETY: as above; the target is data of ours, not what the filter shows.
    let target = unsafe {
        sys::bdrv_open_child(
            core::ptr::null(),
            options,
            c"target".as_ptr(),
            bs,
            &raw const sys::child_of_bds,
            sys::BDRV_CHILD_DATA,
            false,
            errp,
        )
    };
    // SAFETY: links live as long as the node that they belong to.
    let (source, target) = unsafe { (Child::from_ptr((*bs).file), Child::from_ptr(target)) };
    let (Some(node), Some(source), Some(target)) = (Bds::from_ptr(bs), source, target) else {
        return -EINVAL;
    };
    // SAFETY: both nodes are open; this is the main loop.
    unsafe {
        let below = source.node().as_ptr();
        (*bs).total_sectors = (*below).total_sectors;
        // FUA may always be passed on: the block layer emulates it where it is missing.
        (*bs).supported_write_flags = sys::BDRV_REQ_WRITE_UNCHANGED | sys::BDRV_REQ_FUA;
        (*bs).supported_zero_flags = sys::BDRV_REQ_WRITE_UNCHANGED
            | ((sys::BDRV_REQ_FUA | sys::BDRV_REQ_MAY_UNMAP | sys::BDRV_REQ_NO_FALLBACK)
                & (*below).supported_zero_flags);
    }
    let filter = Box::into_raw(Box::new(Filter::new(node, source, target)));
    // SAFETY: QEMU allocated `instance_size` bytes for this pointer.
    unsafe { *(*bs).opaque.cast::<*mut Filter>() = filter };
    0
}

unsafe extern "C" fn filter_close(bs: *mut sys::BlockDriverState) {
    // SAFETY: an open node of ours, about to be closed: nothing of it is in flight.
    let filter = unsafe {
        let slot = (*bs).opaque.cast::<*mut Filter>();
        Box::from_raw(core::mem::replace(&mut *slot, null_mut()))
    };
    // QEMU aborts at its exit if bitmaps stay busy: once more after a panic. It does so too if links
    // stay frozen: these end with the filter.
    if try_guard(|| filter.closing()).is_none() {
        guard((), || filter.closing());
    }
    guard((), || drop(filter));
}

unsafe extern "C" fn filter_child_perm(
    bs: *mut sys::BlockDriverState,
    child: *mut sys::BdrvChild,
    role: sys::BdrvChildRole,
    queue: *mut sys::BlockReopenQueue,
    perm: u64,
    shared: u64,
    nperm: *mut u64,
    nshared: *mut u64,
) {
    let all = u64::from(sys::BLK_PERM_ALL);
    // SAFETY: out pointers of the caller; flags of a live node.
    unsafe {
        if role & sys::BDRV_CHILD_FILTERED == 0 {
            if (*bs).open_flags as u32 & sys::BDRV_O_INACTIVE != 0 {
                (*nperm, *nshared) = (0, all);
            } else {
                // The image's content is private: nobody else may read or change it.
                *nperm = u64::from(sys::BLK_PERM_CONSISTENT_READ | sys::BLK_PERM_WRITE);
                *nshared = 0;
            }
            return;
        }
        sys::bdrv_default_perms(bs, child, role, queue, perm, shared, nperm, nshared);
        // There is no state yet while the node is being opened.
        if Bds::from_ptr(bs).and_then(filter_of).is_some_and(Filter::is_active) {
            *nperm |= u64::from(sys::BLK_PERM_CONSISTENT_READ);
            // A write beside the filter would not be captured, a resize would cut the snapshot.
            *nshared &= !u64::from(sys::BLK_PERM_WRITE | sys::BLK_PERM_RESIZE);
        }
    }
}

unsafe extern "C" fn filter_refresh_limits(
    bs: *mut sys::BlockDriverState,
    _errp: *mut *mut sys::Error,
) {
    // SAFETY: a live node whose source is attached. The source's limits alone count: the fleecing
    // image must not change how guest requests are split.
    unsafe {
        (*bs).bl = (*(*(*bs).file).bs).bl;
        (*bs).bl.request_alignment = 1;
    }
}

pub(super) unsafe extern "C" fn filter_refresh_filename(bs: *mut sys::BlockDriverState) {
    // SAFETY: live nodes; both arrays have the same length and end in a zero.
    unsafe {
        let below: *const [c_char; 4096] = &raw const (*(*(*bs).file).bs).filename;
        (*bs).exact_filename = *below;
    }
}

pub(super) unsafe extern "C" fn reopen_prepare(
    _state: *mut sys::BDRVReopenState,
    _queue: *mut sys::BlockReopenQueue,
    _errp: *mut *mut sys::Error,
) -> c_int {
    0
}

/// The fleecing image must stay writable as long as old data is saved.
unsafe extern "C" fn filter_inactivate(bs: *mut sys::BlockDriverState) -> c_int {
    let active = Bds::from_ptr(bs).and_then(filter_of).is_some_and(Filter::is_active);
    if active { -EBUSY } else { 0 }
}

unsafe extern "C" fn filter_drain_begin(bs: *mut sys::BlockDriverState) {
    // Also called while the node is being opened, when there is no state yet.
    if let Some(filter) = Bds::from_ptr(bs).and_then(filter_of) {
        filter.or_break(Filter::drain_begin);
    }
}

unsafe extern "C" fn filter_drain_end(bs: *mut sys::BlockDriverState) {
    // Also called while the node is being opened, when there is no state yet.
    if let Some(filter) = Bds::from_ptr(bs).and_then(filter_of) {
        filter.or_break(Filter::drain_end);
    }
}

unsafe extern "C" fn filter_co_preadv_part(
    bs: *mut sys::BlockDriverState,
    offset: i64,
    bytes: i64,
    qiov: *mut sys::QEMUIOVector,
    qiov_offset: usize,
    flags: sys::BdrvRequestFlags,
) -> c_int {
    // SAFETY: the guest's own request, passed on unchanged.
    unsafe { sys::bdrv_co_preadv_part((*bs).file, offset, bytes, qiov, qiov_offset, flags) }
}

unsafe extern "C" fn filter_co_pwritev_part(
    bs: *mut sys::BlockDriverState,
    offset: i64,
    bytes: i64,
    qiov: *mut sys::QEMUIOVector,
    qiov_offset: usize,
    flags: sys::BdrvRequestFlags,
) -> c_int {
    if flags & sys::BDRV_REQ_WRITE_UNCHANGED == 0 {
        // SAFETY: a coroutine callback of an open node; the caller holds the graph lock.
        let (filter, graph) = unsafe { (state(bs), CoGraph::of_caller()) };
        if let Err(Errno(errno)) = filter.before_write(&graph, range(offset, bytes)) {
            return -errno;
        }
    }
    // SAFETY: the guest's own request, passed on unchanged.
    unsafe { sys::bdrv_co_pwritev_part((*bs).file, offset, bytes, qiov, qiov_offset, flags) }
}

/// Passes a write of zeroes on in parts: what needs no capture at once, the rest piece by piece,
/// each captured before.
///
/// # Safety
/// A coroutine callback of an open filter node; the caller holds the graph lock.
unsafe fn zeroes_in_parts(
    bs: *mut sys::BlockDriverState,
    request: ByteRange,
    mut submit: impl FnMut(ByteRange) -> c_int,
) -> c_int {
    // SAFETY: as stated.
    let (filter, graph) = unsafe { (state(bs), CoGraph::of_caller()) };
    let mut rest = request;
    while !rest.is_empty() {
        let (len, due) = filter.next_part(&graph, rest);
        let part = ByteRange::at(rest.start, len);
        if due && let Err(Errno(errno)) = filter.before_zeroes(&graph, part) {
            return -errno;
        }
        let ret = submit(part);
        if ret < 0 {
            return ret;
        }
        rest.start = part.end;
    }
    0
}

unsafe extern "C" fn filter_co_pwrite_zeroes(
    bs: *mut sys::BlockDriverState,
    offset: i64,
    bytes: i64,
    flags: sys::BdrvRequestFlags,
) -> c_int {
    let submit = |part: ByteRange| {
        // SAFETY: a part of the guest's own request, passed on unchanged.
        unsafe {
            sys::bdrv_co_pwrite_zeroes((*bs).file, part.start as i64, part.len() as i64, flags)
        }
    };
    let request = range(offset, bytes);
    if flags & sys::BDRV_REQ_WRITE_UNCHANGED != 0 {
        return submit(request);
    }
    // SAFETY: a coroutine callback of an open node; the caller holds the graph lock.
    unsafe { zeroes_in_parts(bs, request, submit) }
}

unsafe extern "C" fn filter_co_pdiscard(
    bs: *mut sys::BlockDriverState,
    offset: i64,
    bytes: i64,
) -> c_int {
    let submit = |part: ByteRange| {
        // SAFETY: a part of the guest's own request, passed on unchanged.
        unsafe { sys::bdrv_co_pdiscard((*bs).file, part.start as i64, part.len() as i64) }
    };
    // SAFETY: a coroutine callback of an open node; the caller holds the graph lock.
    let (filter, graph) = unsafe { (state(bs), CoGraph::of_caller()) };
    let request = range(offset, bytes);
    let mut rest = request;
    while !rest.is_empty() {
        let Some((len, what)) = filter.next_discard(&graph, rest, request.len()) else {
            // SAFETY: as above.
            return unsafe { zeroes_in_parts(bs, rest, submit) };
        };
        let part = ByteRange::at(rest.start, len);
        let ret = if what == Discard::Pass { submit(part) } else { 0 };
        if ret < 0 {
            return ret;
        }
        rest.start = part.end;
    }
    0
}

unsafe extern "C" fn filter_co_flush(bs: *mut sys::BlockDriverState) -> c_int {
    // SAFETY: the guest's own request. The fleecing image is never flushed: it is thrown away. With
    // nobody above, QEMU is closing the filter in a drained section: the disk's users flush it
    // themselves, and the guest must not wait for that here.
    unsafe {
        if !sys::ba_bs_has_parents(bs) {
            return 0;
        }
        sys::bdrv_co_flush((*(*bs).file).bs)
    }
}

unsafe extern "C" fn filter_co_truncate(
    _bs: *mut sys::BlockDriverState,
    _offset: i64,
    _exact: bool,
    _prealloc: sys::PreallocMode,
    _flags: sys::BdrvRequestFlags,
    errp: *mut *mut sys::Error,
) -> c_int {
    // SAFETY: a constant sentence; `errp` is the caller's.
    unsafe {
        sys::ba_error_setg(
            errp,
            c"The disk cannot be resized while a backup access is active".as_ptr(),
        );
    }
    -EBUSY
}

fn range(offset: i64, bytes: i64) -> ByteRange {
    ByteRange::at(offset.max(0) as u64, bytes.max(0) as u64)
}

// ---- snapshot --------------------------------------------------------------------------------

unsafe extern "C" fn snapshot_open(
    bs: *mut sys::BlockDriverState,
    options: *mut sys::QDict,
    _flags: c_int,
    errp: *mut *mut sys::Error,
) -> c_int {
    guard(-EINVAL, || {
        fault::point("snapshot_open");
        // SAFETY: arguments are passed on as QEMU gave them.
        unsafe { open_snapshot(bs, options, errp) }
    })
}

/// # Safety
/// As for the callback of a driver: the main loop opens the node.
unsafe fn open_snapshot(
    bs: *mut sys::BlockDriverState,
    options: *mut sys::QDict,
    errp: *mut *mut sys::Error,
) -> c_int {
    // SAFETY: as stated.
    let Some(child) = (unsafe { open_staying_child(bs, options, errp) }) else { return -EINVAL };
    let Some(filter) = filter_of(child.node()) else {
        // SAFETY: a constant sentence.
        unsafe {
            sys::ba_error_setg(
                errp,
                c"backup-snapshot works on a backup-fleecing node only".as_ptr(),
            );
        }
        return -EINVAL;
    };
    filter.snapshot_opened();
    0
}

unsafe extern "C" fn snapshot_close(bs: *mut sys::BlockDriverState) {
    guard((), || {
        // SAFETY: an open node whose link is still there; the main loop closes it.
        if let Some(filter) = unsafe { snapshot_filter(bs) } {
            filter.snapshot_closes();
        }
    });
}

/// A snapshot node that is inactive could not be told to release anything.
unsafe extern "C" fn snapshot_inactivate(_bs: *mut sys::BlockDriverState) -> c_int {
    -EBUSY
}

/// Opens the option `file` with a link that stays at its node, and takes the size over.
///
/// # Safety
/// As for the callback of a driver: the main loop opens the node.
pub(super) unsafe fn open_staying_child(
    bs: *mut sys::BlockDriverState,
    options: *mut sys::QDict,
    errp: *mut *mut sys::Error,
) -> Option<Child> {
    let class = STAYING_CHILD.get()?;
    // SAFETY: the main loop opens the node; the class is never freed; the link lives as long as the
    // node, and both nodes are open.
    unsafe {
        let child = Child::from_ptr(sys::bdrv_open_child(
            core::ptr::null(),
            options,
            c"file".as_ptr(),
            bs,
            class.0,
            sys::BDRV_CHILD_DATA | sys::BDRV_CHILD_PRIMARY,
            false,
            errp,
        ))?;
        (*bs).total_sectors = (*child.node().as_ptr()).total_sectors;
        Some(child)
    }
}

/// The permissions of a link that claims nothing and allows everything.
pub(super) unsafe extern "C" fn snapshot_child_perm(
    _bs: *mut sys::BlockDriverState,
    _child: *mut sys::BdrvChild,
    _role: sys::BdrvChildRole,
    _queue: *mut sys::BlockReopenQueue,
    _perm: u64,
    _shared: u64,
    nperm: *mut u64,
    nshared: *mut u64,
) {
    // The snapshot asks the filter directly, never through the link; the sentinel asks nobody.
    // SAFETY: out pointers of the caller.
    unsafe { (*nperm, *nshared) = (0, u64::from(sys::BLK_PERM_ALL)) };
}

unsafe extern "C" fn snapshot_refresh_limits(
    bs: *mut sys::BlockDriverState,
    _errp: *mut *mut sys::Error,
) {
    // SAFETY: a live node with its child attached.
    unsafe {
        (*bs).bl.request_alignment = snapshot::ALIGNMENT as u32;
        let granule = guard(None, || {
            fault::point("snapshot_refresh_limits");
            snapshot_filter(bs).and_then(Filter::granule_bytes)
        });
        (*bs).bl.pdiscard_alignment = granule.unwrap_or(fleece::MIN_GRANULE_BYTES) as u32;
        (*bs).bl.max_pdiscard = 0;
    }
}

/// The filter below a snapshot node.
///
/// # Safety
/// `bs` is an open snapshot node; the caller holds the graph lock or is the main loop.
unsafe fn snapshot_filter<'a>(bs: *mut sys::BlockDriverState) -> Option<&'a Filter> {
    // SAFETY: as stated; the link stays at its node.
    let child = unsafe { Child::from_ptr((*bs).file) }?;
    filter_of(child.node())
}

/// Runs a request on a snapshot node, counted on the filter so that draining it waits.
///
/// # Safety
/// A coroutine callback of an open snapshot node; the caller holds the graph lock.
unsafe fn on_snapshot<T>(
    point: &'static str,
    bs: *mut sys::BlockDriverState,
    f: impl FnOnce(&Filter, &CoGraph<'_>) -> Result<T, Errno>,
) -> Result<T, Errno> {
    let run = || {
        fault::point(point);
        // SAFETY: as stated.
        let filter = unsafe { snapshot_filter(bs) }.ok_or(Errno::EIO)?;
        // SAFETY: as stated.
        let graph = unsafe { CoGraph::of_caller() };
        let _busy = Busy::new(filter.node());
        f(filter, &graph)
    };
    try_guard(run).unwrap_or(Err(Errno::EIO))
}

unsafe extern "C" fn snapshot_co_preadv_part(
    bs: *mut sys::BlockDriverState,
    offset: i64,
    bytes: i64,
    qiov: *mut sys::QEMUIOVector,
    qiov_offset: usize,
    _flags: sys::BdrvRequestFlags,
) -> c_int {
    let range = range(offset, bytes);
    // SAFETY: the request's vector has that many bytes from that offset, and lives until the end
    // of the request; a coroutine callback under the graph lock.
    errno(unsafe {
        on_snapshot("snapshot_read", bs, |filter, graph| {
            let mut buf =
                IoSlice::new(qiov, qiov_offset, range.len() as usize).ok_or(Errno::EIO)?;
            snapshot::read(filter, graph, range, &mut buf)
        })
    })
}

unsafe extern "C" fn snapshot_co_pwritev_part(
    _bs: *mut sys::BlockDriverState,
    _offset: i64,
    _bytes: i64,
    _qiov: *mut sys::QEMUIOVector,
    _qiov_offset: usize,
    _flags: sys::BdrvRequestFlags,
) -> c_int {
    -ENOTSUP
}

unsafe extern "C" fn snapshot_co_pwrite_zeroes(
    _bs: *mut sys::BlockDriverState,
    _offset: i64,
    _bytes: i64,
    _flags: sys::BdrvRequestFlags,
) -> c_int {
    -ENOTSUP
}

unsafe extern "C" fn snapshot_co_pdiscard(
    bs: *mut sys::BlockDriverState,
    offset: i64,
    bytes: i64,
) -> c_int {
    // SAFETY: a coroutine callback under the graph lock.
    errno(unsafe {
        on_snapshot("snapshot_release", bs, |filter, graph| {
            snapshot::release(filter, graph, range(offset, bytes))
        })
    })
}

unsafe extern "C" fn snapshot_co_block_status(
    bs: *mut sys::BlockDriverState,
    _mode: sys::BlockStatusMode,
    offset: i64,
    bytes: i64,
    pnum: *mut i64,
    _map: *mut i64,
    _file: *mut *mut sys::BlockDriverState,
) -> c_int {
    // SAFETY: a coroutine callback under the graph lock.
    let status = unsafe {
        on_snapshot("snapshot_status", bs, |filter, graph| {
            snapshot::is_zero(filter, graph, range(offset, bytes))
        })
    };
    match status {
        Err(Errno(errno)) => -errno,
        Ok((len, zero)) => {
            // SAFETY: an out pointer of the caller.
            unsafe { *pnum = len as i64 };
            (if zero { sys::BDRV_BLOCK_ZERO } else { sys::BDRV_BLOCK_DATA }) as c_int
        }
    }
}
