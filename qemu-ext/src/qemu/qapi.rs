// SPDX-License-Identifier: GPL-2.0-or-later
//! The QMP commands as QEMU's generated code calls them, and the event: C structures in, C
//! structures out.

use core::ffi::c_char;
use core::ptr;

use fleece::State;
use fleece::bitmap_name::{Action, Mode};
use qemu_ext_sys as sys;

use super::error::Error;
use super::glib::{self, strdup};
use super::guard;
use super::main_loop::MainLoop;
use crate::access::{
    self, DeviceInfo, DeviceRequest, DeviceStatus, SetupRequest, TargetStatus, TeardownOutcome,
};

/// What the client gets when our code panicked.
fn panicked() -> Error {
    Error::new("internal error in the backup access (see QEMU's log)")
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

/// # Safety
/// The structure is one that QEMU's generated code read from a request.
unsafe fn device_request(raw: &sys::BackupAccessSourceDevice) -> DeviceRequest {
    let mode = match raw.bitmap_mode {
        _ if !raw.has_bitmap_mode => Mode::Omitted,
        sys::BACKUP_ACCESS_BITMAP_MODE_NONE => Mode::None,
        sys::BACKUP_ACCESS_BITMAP_MODE_NEW => Mode::New,
        _ => Mode::Use,
    };
    // SAFETY: the strings of such a structure are C strings or null.
    unsafe {
        DeviceRequest {
            device: glib::text(raw.device),
            fleecing: optional(raw.fleecing),
            mode,
            generation: optional(raw.generation),
            granularity_bytes: raw.has_granularity.then_some(raw.granularity),
            buffer_bytes: raw.has_buffer_size.then_some(raw.buffer_size),
            timeout_s: raw.has_timeout.then_some(raw.timeout),
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
        zero: stats.zero_bytes,
        released: stats.released_bytes,
        metadata: stats.metadata_bytes,
        writes_delayed: stats.writes_delayed,
        delay_total_ns: stats.delay_total_ns,
        delay_max_ns: stats.delay_max_ns,
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
                devices: c_device_list(&target.devices),
            });
            allocate(sys::BackupAccessStatusList { next, value })
        }
    })
}

/// The command `backup-access-setup`.
///
/// # Safety
/// Called by QEMU's generated code, in the main loop.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "QEMU's generated code decides")]
pub unsafe extern "C" fn qmp_backup_access_setup(
    target_id: *const c_char,
    devices: *mut sys::BackupAccessSourceDeviceList,
    has_granularity: bool,
    granularity: u64,
    has_buffer_size: bool,
    buffer_size: u64,
    has_timeout: bool,
    timeout: u32,
    errp: *mut *mut sys::Error,
) -> *mut sys::BackupAccessInfoList {
    let result = guard(Err(panicked()), || {
        let main_loop = MainLoop::current().ok_or_else(panicked)?;
        let mut request = SetupRequest {
            // SAFETY: a mandatory string of the request.
            target_id: unsafe { glib::text(target_id) },
            devices: Vec::new(),
            granularity_bytes: has_granularity.then_some(granularity),
            buffer_bytes: has_buffer_size.then_some(buffer_size),
            timeout_s: has_timeout.then_some(timeout),
        };
        let mut entry = devices;
        while !entry.is_null() {
            // SAFETY: a list of the request: entries have values.
            unsafe {
                request.devices.push(device_request(&*(*entry).value));
                entry = (*entry).next;
            }
        }
        access::setup(main_loop, &request)
    });
    match result {
        // SAFETY: plain C structures.
        Ok(infos) => infos.iter().rev().fold(ptr::null_mut(), |next, info| unsafe {
            let value = allocate(c_info(info));
            allocate(sys::BackupAccessInfoList { next, value })
        }),
        Err(error) => {
            // SAFETY: the caller's place for an error.
            unsafe { error.give(errp) };
            ptr::null_mut()
        }
    }
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
    let result = guard(Err(panicked()), || {
        // SAFETY: a mandatory string of the request.
        let target_id = unsafe { glib::text(target_id) };
        access::teardown(&target_id, success)
    });
    match result {
        Ok(TeardownOutcome { existed, reason }) => {
            let reason = strdup_optional(reason.as_deref());
            // SAFETY: a plain C structure.
            unsafe { allocate(sys::BackupAccessTeardownResult { existed, reason }) }
        }
        Err(error) => {
            // SAFETY: the caller's place for an error.
            unsafe { error.give(errp) };
            ptr::null_mut()
        }
    }
}

/// The command `query-backup-access`.
///
/// # Safety
/// Called by QEMU's generated code, in the main loop.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qmp_query_backup_access(
    errp: *mut *mut sys::Error,
) -> *mut sys::BackupAccessStatusList {
    let result =
        guard(Err(panicked()), || MainLoop::current().map(access::query).ok_or_else(panicked));
    match result {
        Ok(targets) => c_target_list(&targets),
        Err(error) => {
            // SAFETY: the caller's place for an error.
            unsafe { error.give(errp) };
            ptr::null_mut()
        }
    }
}

/// Emits the event `BACKUP_ACCESS_BROKEN`.
pub fn send_broken(_: MainLoop, target_id: &str, device: &str, state: State, error: &str) {
    let (target_id, device) = (glib::c_string(target_id), glib::c_string(device));
    let error = glib::c_string(error);
    // SAFETY: main loop; the strings live for the length of the call.
    unsafe {
        sys::qapi_event_send_backup_access_broken(
            target_id.as_ptr(),
            device.as_ptr(),
            c_state(state),
            error.as_ptr(),
        );
    }
}
