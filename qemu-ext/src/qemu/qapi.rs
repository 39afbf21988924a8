// SPDX-License-Identifier: GPL-2.0-or-later
//! The QMP commands as QEMU's generated code calls them, and the events: C structures in, C
//! structures out.

use core::ffi::c_char;
use core::ptr;

use fleece::bitmap_name::{Action, Mode};
use fleece::{OnError, State, Stats};
use qemu_ext_sys as sys;

use super::error::Error;
use super::glib::{self, strdup};
use super::main_loop::MainLoop;
use super::try_guard;
use crate::access::{
    self, DeviceInfo, DeviceRequest, DeviceStatus, LoadRequest, Options, Readable, RemovedBitmap,
    SetupRequest, TargetStatus, TeardownOutcome,
};
use crate::fault;

/// What the client gets when our code panicked.
fn panicked() -> Error {
    Error::new("internal error in the backup access (see QEMU's log)")
}

/// Runs a command. Its value, or none when its error, or that it panicked, is handed to the caller.
///
/// # Safety
/// `errp` is what a C caller gave for its error.
unsafe fn answer<T>(
    errp: *mut *mut sys::Error,
    run: impl FnOnce() -> Result<T, Error>,
) -> Option<T> {
    let error = match try_guard(run) {
        Some(Ok(value)) => return Some(value),
        Some(Err(error)) => error,
        None => panicked(),
    };
    // SAFETY: as the caller says.
    unsafe { error.give(errp) };
    None
}

/// A C structure allocated the way QEMU's generated code frees it.
///
/// # Safety
/// All bytes zero are a valid `T`.
unsafe fn allocate<T>(value: T) -> *mut T {
    // SAFETY: GLib returns memory of this size or ends the process; it is aligned for every type.
    unsafe {
        let place = sys::g_malloc0(size_of::<T>() as sys::gsize).cast::<T>();
        place.write(value);
        place
    }
}

/// An optional string argument.
///
/// # Safety
/// The pointer is null or points to a C string.
unsafe fn optional(ptr: *const c_char) -> Option<String> {
    // SAFETY: as the caller says.
    (!ptr.is_null()).then(|| unsafe { glib::text(ptr) })
}

fn strdup_optional(text: Option<&str>) -> *mut c_char {
    text.map_or(ptr::null_mut(), strdup)
}

fn c_action(action: Action) -> sys::BackupAccessBitmapAction {
    match action {
        Action::NotUsed => sys::BACKUP_ACCESS_BITMAP_ACTION_NOT_USED,
        Action::NotUsedRemoved => sys::BACKUP_ACCESS_BITMAP_ACTION_NOT_USED_REMOVED,
        Action::New => sys::BACKUP_ACCESS_BITMAP_ACTION_NEW,
        Action::Used => sys::BACKUP_ACCESS_BITMAP_ACTION_USED,
        Action::Invalid => sys::BACKUP_ACCESS_BITMAP_ACTION_INVALID,
        Action::MissingRecreated => sys::BACKUP_ACCESS_BITMAP_ACTION_MISSING_RECREATED,
    }
}

fn c_state(state: State) -> sys::BackupAccessState {
    match state {
        State::Active => sys::BACKUP_ACCESS_STATE_ACTIVE,
        State::Degraded => sys::BACKUP_ACCESS_STATE_DEGRADED,
        State::Broken => sys::BACKUP_ACCESS_STATE_BROKEN,
        State::Closing => sys::BACKUP_ACCESS_STATE_CLOSING,
    }
}

/// The members that a whole request and each of its devices have: two structures of C, alike here.
macro_rules! options {
    ($raw:expr) => {
        Options {
            granularity_bytes: $raw.has_granularity.then_some($raw.granularity),
            buffer_bytes: $raw.has_buffer_size.then_some($raw.buffer_size),
            fleecing_limit_bytes: $raw.has_fleecing_limit.then_some($raw.fleecing_limit),
            metadata_limit_bytes: $raw.has_metadata_limit.then_some($raw.metadata_limit),
            reflink_bytes: $raw.has_reflink_size.then_some($raw.reflink_size),
            timeout_s: $raw.has_timeout.then_some($raw.timeout),
            on_error: $raw.has_on_error.then(|| on_error($raw.on_error)),
        }
    };
}

fn on_error(raw: sys::BackupAccessOnError) -> OnError {
    match raw {
        sys::BACKUP_ACCESS_ON_ERROR_BREAK_GUEST_WRITE => OnError::BreakGuestWrite,
        _ => OnError::BreakSnapshot,
    }
}

/// # Safety
/// The structure is one that QEMU's generated code read from a request.
unsafe fn device_request(raw: &sys::BackupAccessSourceDevice) -> DeviceRequest {
    let mode = match raw.bitmap_mode {
        _ if !raw.has_bitmap_mode => Mode::Omitted,
        sys::BACKUP_ACCESS_BITMAP_MODE_NONE => Mode::None,
        sys::BACKUP_ACCESS_BITMAP_MODE_NEW => Mode::New,
        _ => Mode::Use,
    };
    let readable = match raw.readable {
        sys::BACKUP_ACCESS_READABLE_ALL if raw.has_readable => Readable::All,
        _ => Readable::Dirty,
    };
    // SAFETY: the strings of such a structure are C strings or null.
    unsafe {
        DeviceRequest {
            device: glib::text(raw.device),
            fleecing: optional(raw.fleecing),
            mode,
            generation: optional(raw.generation),
            readable,
            options: options!(raw),
        }
    }
}

fn c_info(info: &DeviceInfo) -> sys::BackupAccessInfo {
    let bitmap = info.bitmap.as_ref();
    sys::BackupAccessInfo {
        node_name: strdup(&info.node_name),
        device: strdup(&info.device),
        size: info.size_bytes,
        bitmap_node_name: strdup_optional(bitmap.map(|_| info.node_name.as_str())),
        bitmap_name: strdup_optional(bitmap.map(|b| b.name.as_str())),
        bitmap_action: c_action(info.action),
        generation: strdup_optional(bitmap.map(|b| b.generation.as_str())),
        has_dirty: bitmap.is_some(),
        dirty: bitmap.map_or(0, |b| b.dirty_bytes),
        drained_ns: info.drained_ns,
    }
}

/// Empty buckets are left out.
fn c_histogram(buckets: &[(u64, u64)]) -> *mut sys::BackupAccessDelayBucketList {
    let filled = buckets.iter().filter(|&&(_, count)| count > 0);
    filled.rev().fold(ptr::null_mut(), |next, &(le_ns, count)| {
        // SAFETY: plain C structures.
        unsafe {
            let value = allocate(sys::BackupAccessDelayBucket { le_ns, count });
            allocate(sys::BackupAccessDelayBucketList { next, value })
        }
    })
}

fn c_status(status: &DeviceStatus) -> sys::BackupAccessDeviceStatus {
    let stats = &status.stats;
    let error = stats.error.as_ref();
    sys::BackupAccessDeviceStatus {
        device: strdup(&status.device),
        node_name: strdup(&status.node_name),
        size: status.size_bytes,
        state: c_state(stats.state),
        error: strdup_optional(error.map(|(text, _)| text.as_str())),
        has_q_errno: error.is_some(),
        q_errno: error.map_or(0, |(_, errno)| i64::from(errno.0)),
        captured: stats.captured_bytes,
        in_ram: stats.ram_bytes,
        in_log: stats.log_bytes,
        written: stats.written_bytes,
        shared: stats.shared_bytes,
        log_allocated: stats.log_allocated_bytes,
        zero: stats.zero_bytes,
        released: stats.released_bytes,
        discards_postponed: stats.postponed_bytes,
        metadata: stats.metadata_bytes,
        writes_delayed: stats.writes_delayed,
        delay_total_ns: stats.delay_total_ns,
        delay_max_ns: stats.delay_max_ns,
        delay_p50_ns: stats.delay_p50_ns,
        delay_p99_ns: stats.delay_p99_ns,
        delay_p999_ns: stats.delay_p999_ns,
        delay_histogram: c_histogram(&stats.delay_histogram),
        overflows: stats.overflows,
        bitmap_action: c_action(status.action),
        has_dirty: status.dirty_bytes.is_some(),
        dirty: status.dirty_bytes.unwrap_or(0),
    }
}

fn c_device_list(devices: &[DeviceStatus]) -> *mut sys::BackupAccessDeviceStatusList {
    devices.iter().rev().fold(ptr::null_mut(), |next, device| {
        // SAFETY: plain C structures.
        unsafe {
            let value = allocate(c_status(device));
            allocate(sys::BackupAccessDeviceStatusList { next, value })
        }
    })
}

fn c_target_list(targets: &[TargetStatus]) -> *mut sys::BackupAccessStatusList {
    targets.iter().rev().fold(ptr::null_mut(), |next, target| {
        // SAFETY: plain C structures.
        unsafe {
            let value = allocate(sys::BackupAccessStatus {
                target_id: strdup(&target.target_id),
                start_time: target.start_time_ms,
                has_lease_left: target.lease_left_s.is_some(),
                lease_left: target.lease_left_s.unwrap_or(0),
                devices: c_device_list(&target.devices),
            });
            allocate(sys::BackupAccessStatusList { next, value })
        }
    })
}

/// # Safety
/// The structure is one that QEMU's generated code read from a request.
unsafe fn setup_request(raw: &sys::BackupAccessSetup) -> SetupRequest {
    let mut devices = Vec::new();
    let mut entry = raw.devices;
    while !entry.is_null() {
        // SAFETY: entries of a list of the request have values.
        unsafe {
            devices.push(device_request(&*(*entry).value));
            entry = (*entry).next;
        }
    }
    SetupRequest {
        // SAFETY: a mandatory string of the request.
        target_id: unsafe { glib::text(raw.target_id) },
        devices,
        defaults: options!(raw),
        buffer_total_bytes: raw.has_buffer_total.then_some(raw.buffer_total),
        lease_s: if raw.has_lease { raw.lease } else { 0 },
    }
}

/// The command `backup-access-setup`.
///
/// # Safety
/// Called by QEMU's generated code, in the main loop.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qmp_backup_access_setup(
    arguments: *mut sys::BackupAccessSetup,
    errp: *mut *mut sys::Error,
) -> *mut sys::BackupAccessInfoList {
    let run = || {
        fault::point("qmp_setup");
        let main_loop = MainLoop::current().ok_or_else(panicked)?;
        // SAFETY: the generated code passes the request it read.
        let request = unsafe { setup_request(&*arguments) };
        access::setup(main_loop, &request)
    };
    // SAFETY: the caller's place for an error.
    let Some(infos) = (unsafe { answer(errp, run) }) else { return ptr::null_mut() };
    // SAFETY: plain C structures.
    infos.iter().rev().fold(ptr::null_mut(), |next, info| unsafe {
        let value = allocate(c_info(info));
        allocate(sys::BackupAccessInfoList { next, value })
    })
}

/// The command `backup-access-teardown`.
///
/// # Safety
/// Called by QEMU's generated code, in a coroutine of the main context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qmp_backup_access_teardown(
    target_id: *const c_char,
    success: bool,
    errp: *mut *mut sys::Error,
) -> *mut sys::BackupAccessTeardownResult {
    let run = || {
        fault::point("qmp_teardown");
        // SAFETY: a mandatory string of the request.
        let target_id = unsafe { glib::text(target_id) };
        access::teardown(&target_id, success)
    };
    // SAFETY: the caller's place for an error.
    let Some(TeardownOutcome { existed, reason }) = (unsafe { answer(errp, run) }) else {
        return ptr::null_mut();
    };
    let reason = strdup_optional(reason.as_deref());
    // SAFETY: a plain C structure.
    unsafe { allocate(sys::BackupAccessTeardownResult { existed, reason }) }
}

/// The command `backup-access-renew`.
///
/// # Safety
/// Called by QEMU's generated code, in the main loop or, out of band, in the monitor's thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qmp_backup_access_renew(
    target_id: *const c_char,
    errp: *mut *mut sys::Error,
) {
    let run = || {
        // SAFETY: a mandatory string of the request.
        access::renew(&unsafe { glib::text(target_id) })
    };
    // SAFETY: the caller's place for an error.
    let _ = unsafe { answer(errp, run) };
}

fn c_removed(removed: &[RemovedBitmap]) -> *mut sys::BackupAccessRemovedBitmapList {
    removed.iter().rev().fold(ptr::null_mut(), |next, bitmap| {
        // SAFETY: plain C structures.
        unsafe {
            let value = allocate(sys::BackupAccessRemovedBitmap {
                node_name: strdup(&bitmap.node_name),
                bitmap_name: strdup(&bitmap.bitmap_name),
            });
            allocate(sys::BackupAccessRemovedBitmapList { next, value })
        }
    })
}

/// The command `backup-access-bitmap-remove`.
///
/// # Safety
/// Called by QEMU's generated code, in the main loop.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qmp_backup_access_bitmap_remove(
    target_id: *const c_char,
    device: *const c_char,
    errp: *mut *mut sys::Error,
) -> *mut sys::BackupAccessBitmapRemoveResult {
    let run = || {
        fault::point("qmp_bitmap_remove");
        let main_loop = MainLoop::current().ok_or_else(panicked)?;
        // SAFETY: strings of the request; the second one may be null.
        let (target_id, device) = unsafe { (glib::text(target_id), optional(device)) };
        access::remove_bitmaps(main_loop, &target_id, device.as_deref())
    };
    // SAFETY: the caller's place for an error.
    let Some(removed) = (unsafe { answer(errp, run) }) else { return ptr::null_mut() };
    let removed = c_removed(&removed);
    // SAFETY: a plain C structure.
    unsafe { allocate(sys::BackupAccessBitmapRemoveResult { removed }) }
}

/// The command `backup-access-bitmap-load`.
///
/// # Safety
/// Called by QEMU's generated code, in the main loop.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qmp_backup_access_bitmap_load(
    device: *const c_char,
    target_id: *const c_char,
    file: *const c_char,
    has_trust_unmodified: bool,
    trust_unmodified: bool,
    errp: *mut *mut sys::Error,
) -> *mut sys::BackupAccessBitmapLoadResult {
    let run = || {
        fault::point("qmp_bitmap_load");
        let main_loop = MainLoop::current().ok_or_else(panicked)?;
        // SAFETY: mandatory strings of the request.
        let (device, target_id, file) =
            unsafe { (glib::text(device), glib::text(target_id), glib::text(file)) };
        let trust_unmodified = has_trust_unmodified && trust_unmodified;
        access::load_bitmap(main_loop, &LoadRequest { device, target_id, file, trust_unmodified })
    };
    // SAFETY: the caller's place for an error.
    let Some(loaded) = (unsafe { answer(errp, run) }) else { return ptr::null_mut() };
    // SAFETY: a plain C structure.
    unsafe { allocate(sys::BackupAccessBitmapLoadResult { loaded }) }
}

/// The command `backup-access-bitmap-unload`.
///
/// # Safety
/// Called by QEMU's generated code, in the main loop.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qmp_backup_access_bitmap_unload(
    device: *const c_char,
    target_id: *const c_char,
    errp: *mut *mut sys::Error,
) {
    let run = || {
        fault::point("qmp_bitmap_unload");
        let main_loop = MainLoop::current().ok_or_else(panicked)?;
        // SAFETY: mandatory strings of the request.
        let (device, target_id) = unsafe { (glib::text(device), glib::text(target_id)) };
        access::unload_bitmap(main_loop, &device, &target_id)
    };
    // SAFETY: the caller's place for an error.
    let _ = unsafe { answer(errp, run) };
}

/// The command `query-backup-access`.
///
/// # Safety
/// Called by QEMU's generated code, in the main loop.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qmp_query_backup_access(
    errp: *mut *mut sys::Error,
) -> *mut sys::BackupAccessStatusList {
    let run = || {
        fault::point("qmp_query");
        MainLoop::current().map(access::query).ok_or_else(panicked)
    };
    // SAFETY: the caller's place for an error.
    let Some(targets) = (unsafe { answer(errp, run) }) else { return ptr::null_mut() };
    c_target_list(&targets)
}

/// What the event `BACKUP_ACCESS_BROKEN` says.
#[derive(Debug)]
pub struct BrokenEvent<'a> {
    /// The target.
    pub target_id: &'a str,
    /// The device as named in the request.
    pub device: &'a str,
    /// The snapshot node.
    pub node_name: &'a str,
    /// The filter's counters with the new state and the error.
    pub stats: &'a Stats,
}

/// Emits the event `BACKUP_ACCESS_BROKEN`.
pub fn send_broken(_: MainLoop, event: &BrokenEvent<'_>) {
    let (target_id, device) = (glib::c_string(event.target_id), glib::c_string(event.device));
    let node_name = glib::c_string(event.node_name);
    let error = event.stats.error.as_ref();
    let text = glib::c_string(error.map_or("unknown error", |(text, _)| text.as_str()));
    // SAFETY: main loop; the strings live for the length of the call.
    unsafe {
        sys::qapi_event_send_backup_access_broken(
            target_id.as_ptr(),
            device.as_ptr(),
            node_name.as_ptr(),
            c_state(event.stats.state),
            text.as_ptr(),
            error.is_some(),
            error.map_or(0, |(_, errno)| i64::from(errno.0)),
        );
    }
}

/// What the event `BACKUP_ACCESS_TORN_DOWN` says.
#[derive(Debug)]
pub struct TornDownEvent<'a> {
    /// The target.
    pub target_id: &'a str,
    /// Whether its bitmaps start again at its point in time.
    pub success: bool,
    /// Why it ended without a command, and what went wrong with it.
    pub reason: Option<&'a str>,
}

/// Emits the event `BACKUP_ACCESS_TORN_DOWN`.
pub fn send_torn_down(_: MainLoop, event: &TornDownEvent<'_>) {
    let target_id = glib::c_string(event.target_id);
    let reason = event.reason.map(glib::c_string);
    let reason = reason.as_ref().map_or(ptr::null(), |text| text.as_ptr());
    // SAFETY: main loop; the strings live for the length of the call.
    unsafe {
        sys::qapi_event_send_backup_access_torn_down(target_id.as_ptr(), event.success, reason);
    }
}
