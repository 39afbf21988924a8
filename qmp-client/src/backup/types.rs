// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests and replies of the extension, with open enums and units in the names.

use crate::{Event, Result, generated, open_enum::open_enum};

open_enum! {
    /// How a dirty bitmap is used for one device.
    pub enum BitmapMode {
        /// No bitmap is used, and an existing one of this target is removed.
        None = "none",
        /// A new bitmap is started; an existing one of this target is removed.
        New = "new",
        /// The existing bitmap is used if it is valid for the generation, else a new one started.
        Use = "use",
    }
}

open_enum! {
    /// What was done with the bitmap of one device.
    pub enum BitmapAction {
        /// No bitmap is used and none existed.
        NotUsed = "not-used",
        /// No bitmap is used, an existing one was removed.
        NotUsedRemoved = "not-used-removed",
        /// A new bitmap was started as asked for; everything is dirty.
        New = "new",
        /// The existing bitmap is used: an incremental backup.
        Used = "used",
        /// The existing bitmap does not fit and was recreated; everything is dirty.
        Invalid = "invalid",
        /// There was no bitmap and one was started; everything is dirty.
        MissingRecreated = "missing-recreated",
    }
}

open_enum! {
    /// State of one device of an access.
    pub enum AccessState {
        /// The snapshot is complete.
        Active = "active",
        /// Some old data was lost to read errors; reads of it fail.
        Degraded = "degraded",
        /// The snapshot is lost; all reads fail.
        Broken = "broken",
        /// Teardown has begun.
        Closing = "closing",
    }
}

open_enum! {
    /// Which areas of a device the snapshot gives, when a bitmap is used.
    pub enum Readable {
        /// What the bitmap marks as dirty; reads of the rest fail.
        Dirty = "dirty",
        /// Everything; clean areas are saved like all others.
        All = "all",
    }
}

open_enum! {
    /// What an error does that is met before a guest write is acknowledged: a failed read of old
    /// data, or a failed write through to the fleecing image.
    pub enum OnError {
        /// The guest write goes on; the snapshot loses old data or breaks.
        BreakSnapshot = "break-snapshot",
        /// The guest write fails; the snapshot stays as it is.
        BreakGuestWrite = "break-guest-write",
    }
}

/// One device of a [`SetupRequest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Name of its backend, else of a node, else a qdev id.
    pub device: String,
    /// Node name of the fleecing image; by default `<device>-fleecing`.
    pub fleecing: Option<String>,
    /// Use of a dirty bitmap; by default none is used and an existing one stays as it is.
    pub bitmap_mode: Option<BitmapMode>,
    /// Generation of the last committed backup of this device.
    pub generation: Option<String>,
    /// Which areas can be read and released; QEMU's default is those that are dirty.
    pub readable: Option<Readable>,
    /// Overrides the request's.
    pub granularity_bytes: Option<u64>,
    /// Overrides the request's.
    pub buffer_size_bytes: Option<u64>,
    /// Overrides the request's.
    pub fleecing_limit_bytes: Option<u64>,
    /// Overrides the request's.
    pub metadata_limit_bytes: Option<u64>,
    /// Overrides the request's.
    pub reflink_size_bytes: Option<u64>,
    /// Overrides the request's.
    pub timeout_s: Option<u32>,
    /// Overrides the request's.
    pub on_error: Option<OnError>,
}

impl Device {
    /// A device with defaults for everything else.
    #[must_use]
    pub fn new(device: impl Into<String>) -> Self {
        Self {
            device: device.into(),
            fleecing: None,
            bitmap_mode: None,
            generation: None,
            readable: None,
            granularity_bytes: None,
            buffer_size_bytes: None,
            fleecing_limit_bytes: None,
            metadata_limit_bytes: None,
            reflink_size_bytes: None,
            timeout_s: None,
            on_error: None,
        }
    }

    fn to_wire(&self) -> generated::BackupAccessSourceDevice {
        generated::BackupAccessSourceDevice {
            device: self.device.clone(),
            fleecing: self.fleecing.clone(),
            bitmap_mode: self.bitmap_mode.clone(),
            generation: self.generation.clone(),
            readable: self.readable.clone(),
            granularity: self.granularity_bytes,
            buffer_size: self.buffer_size_bytes,
            fleecing_limit: self.fleecing_limit_bytes,
            metadata_limit: self.metadata_limit_bytes,
            reflink_size: self.reflink_size_bytes,
            timeout: self.timeout_s,
            on_error: self.on_error.clone(),
        }
    }
}

/// What to give access to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetupRequest {
    /// Identifies the backup target, 1 to 255 bytes; each target has its own bitmaps.
    pub target_id: String,
    /// The devices, at least one; all of them are frozen at one common point in time.
    pub devices: Vec<Device>,
    /// Granularity of new bitmaps; QEMU's default is 64 KiB.
    pub granularity_bytes: Option<u64>,
    /// RAM for old data per device; QEMU's default is 64 MiB, 0 writes through.
    pub buffer_size_bytes: Option<u64>,
    /// RAM for old data over all devices; by default only that per device is limited.
    pub buffer_total_bytes: Option<u64>,
    /// Space that old data may take in each fleecing image. At the limit the snapshot breaks, and
    /// the image may be smaller than the disk. By default it must not be.
    pub fleecing_limit_bytes: Option<u64>,
    /// RAM for the states and positions of old data per device; QEMU's default is 256 MiB.
    pub metadata_limit_bytes: Option<u64>,
    /// Old data of at least so many bytes in a row shares the disk's blocks instead of being copied,
    /// 4 KiB to 1 MiB; both must be raw files on one filesystem that can do that. By default all is
    /// copied.
    pub reflink_size_bytes: Option<u64>,
    /// Seconds without progress after which the snapshot breaks; QEMU's default is 45.
    pub timeout_s: Option<u32>,
    /// What an error before the end of a guest write does; QEMU's default is to break the snapshot.
    pub on_error: Option<OnError>,
    /// Seconds that the access lasts without [`super::renew`], at most 86400; 0 means without end.
    /// By default a bare [`super::setup`] has no lease, and [`super::BackupAccess`] one of
    /// [`super::DEFAULT_LEASE_S`], which it renews by itself.
    pub lease_s: Option<u32>,
}

impl SetupRequest {
    /// A request with QEMU's defaults.
    #[must_use]
    pub fn new(target_id: impl Into<String>, devices: Vec<Device>) -> Self {
        Self {
            target_id: target_id.into(),
            devices,
            granularity_bytes: None,
            buffer_size_bytes: None,
            buffer_total_bytes: None,
            fleecing_limit_bytes: None,
            metadata_limit_bytes: None,
            reflink_size_bytes: None,
            timeout_s: None,
            on_error: None,
            lease_s: None,
        }
    }

    /// The longest timeout of any device, if QEMU's default is not the longest.
    pub(super) fn longest_timeout_s(&self) -> u32 {
        let devices = self.devices.iter().filter_map(|device| device.timeout_s);
        devices.chain(self.timeout_s).max().unwrap_or(0).max(super::DEFAULT_ACCESS_TIMEOUT_S)
    }

    pub(super) fn to_wire(&self) -> generated::backup_access_setup {
        generated::backup_access_setup(generated::BackupAccessSetup {
            target_id: self.target_id.clone(),
            devices: self.devices.iter().map(Device::to_wire).collect(),
            granularity: self.granularity_bytes,
            buffer_size: self.buffer_size_bytes,
            buffer_total: self.buffer_total_bytes,
            fleecing_limit: self.fleecing_limit_bytes,
            metadata_limit: self.metadata_limit_bytes,
            reflink_size: self.reflink_size_bytes,
            timeout: self.timeout_s,
            on_error: self.on_error.clone(),
            lease: self.lease_s,
        })
    }
}

/// One device after setup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessInfo {
    /// Node with the content at the point in time, to be exported: reads give the old data,
    /// discards release it, writes fail.
    pub node_name: String,
    /// The device as named in the request.
    pub device: String,
    /// Its size.
    pub size_bytes: u64,
    /// Node that has the bitmap (only with a bitmap).
    pub bitmap_node_name: Option<String>,
    /// Disabled copy of the dirty bitmap, for export (only with a bitmap).
    pub bitmap_name: Option<String>,
    /// What was done with the bitmap.
    pub bitmap_action: BitmapAction,
    /// Generation of this backup once it is committed (only with a bitmap).
    pub generation: Option<String>,
    /// Bytes the bitmap marks as dirty (only with a bitmap).
    pub dirty_bytes: Option<u64>,
    /// How long all guest I/O was held; the same for all devices.
    pub drained_ns: u64,
}

impl From<generated::BackupAccessInfo> for AccessInfo {
    fn from(wire: generated::BackupAccessInfo) -> Self {
        Self {
            node_name: wire.node_name,
            device: wire.device,
            size_bytes: wire.size,
            bitmap_node_name: wire.bitmap_node_name,
            bitmap_name: wire.bitmap_name,
            bitmap_action: wire.bitmap_action,
            generation: wire.generation,
            dirty_bytes: wire.dirty,
            drained_ns: wire.drained_ns,
        }
    }
}

/// A raw disk whose bitmap is to be kept in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadBitmap {
    /// Name of its backend, else of a node, else a qdev id.
    pub device: String,
    /// The backup target, 1 to 255 bytes.
    pub target_id: String,
    /// Absolute path of the file, as QEMU sees it; it is created if it does not exist.
    pub file: String,
    /// States that nobody changed the disk since, where it is no regular file.
    pub trust_unmodified: bool,
}

impl LoadBitmap {
    pub(super) fn to_wire(&self) -> generated::backup_access_bitmap_load {
        generated::backup_access_bitmap_load {
            device: self.device.clone(),
            target_id: self.target_id.clone(),
            file: self.file.clone(),
            trust_unmodified: self.trust_unmodified.then_some(true),
        }
    }
}

/// Result of a teardown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TeardownResult {
    /// Whether there was an access of this target.
    pub existed: bool,
    /// What went wrong with it; without an access, why the last one of the target is gone although
    /// no command ended it, if that is known.
    pub reason: Option<String>,
}

impl From<generated::BackupAccessTeardownResult> for TeardownResult {
    fn from(wire: generated::BackupAccessTeardownResult) -> Self {
        Self { existed: wire.existed, reason: wire.reason }
    }
}

/// A dirty bitmap that was removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemovedBitmap {
    /// The node that had it.
    pub node_name: String,
    /// Its name.
    pub bitmap_name: String,
}

impl From<generated::BackupAccessRemovedBitmap> for RemovedBitmap {
    fn from(wire: generated::BackupAccessRemovedBitmap) -> Self {
        Self { node_name: wire.node_name, bitmap_name: wire.bitmap_name }
    }
}

/// Status of one access.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessStatus {
    /// The target.
    pub target_id: String,
    /// Point in time, milliseconds since the epoch.
    pub start_time_ms: u64,
    /// Seconds until it is torn down as a failure unless it is renewed; 0 if they are over and its
    /// teardown is tried (only with a lease).
    pub lease_left_s: Option<u32>,
    /// Its devices in the order of the setup.
    pub devices: Vec<DeviceStatus>,
}

impl From<generated::BackupAccessStatus> for AccessStatus {
    fn from(wire: generated::BackupAccessStatus) -> Self {
        Self {
            target_id: wire.target_id,
            start_time_ms: wire.start_time,
            lease_left_s: wire.lease_left,
            devices: wire.devices.into_iter().map(Into::into).collect(),
        }
    }
}

/// One bucket of a histogram of waiting times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DelayBucket {
    /// The longest wait counted here; longer than every wait of the bucket before.
    pub le_ns: u64,
    /// How many waits are counted here.
    pub count: u64,
}

impl From<generated::BackupAccessDelayBucket> for DelayBucket {
    fn from(wire: generated::BackupAccessDelayBucket) -> Self {
        Self { le_ns: wire.le_ns, count: wire.count }
    }
}

/// Status of one device of an access.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceStatus {
    /// The device as named in the request.
    pub device: String,
    /// The snapshot node.
    pub node_name: String,
    /// Size of the device.
    pub size_bytes: u64,
    /// Its state.
    pub state: AccessState,
    /// The first error, if any.
    pub error: Option<String>,
    /// The first error's errno value, if any.
    pub errno: Option<i64>,
    /// Old data saved so far.
    pub captured_bytes: u64,
    /// Old data held in RAM now.
    pub in_ram_bytes: u64,
    /// Old data held in the fleecing image now.
    pub in_log_bytes: u64,
    /// Written to the fleecing image so far.
    pub written_bytes: u64,
    /// Saved so far by sharing blocks of the disk with the fleecing image.
    pub shared_bytes: u64,
    /// Segments of the fleecing image that are in use and not given back.
    pub log_allocated_bytes: u64,
    /// Old data that was zero and needs no space.
    pub zero_bytes: u64,
    /// Released by discards of the reader.
    pub released_bytes: u64,
    /// Guest discards that are postponed now.
    pub discards_postponed_bytes: u64,
    /// RAM used for metadata.
    pub metadata_bytes: u64,
    /// Guest requests that had to wait for a capture.
    pub writes_delayed: u64,
    /// Their total waiting time.
    pub delay_total_ns: u64,
    /// The longest such wait.
    pub delay_max_ns: u64,
    /// The wait that half of them did not exceed: the upper bound of a bucket, 0 without any.
    pub delay_p50_ns: u64,
    /// The wait that 99 percent of them did not exceed.
    pub delay_p99_ns: u64,
    /// The wait that 99.9 percent of them did not exceed.
    pub delay_p999_ns: u64,
    /// How many of them waited for how long: the buckets that are not empty, shorter waits first.
    pub delay_histogram: Vec<DelayBucket>,
    /// How often a guest request waited for room in RAM.
    pub overflows: u64,
    /// What setup did with the bitmap.
    pub bitmap_action: BitmapAction,
    /// Bytes the bitmap marked as dirty at setup (only with a bitmap).
    pub dirty_bytes: Option<u64>,
}

impl From<generated::BackupAccessDeviceStatus> for DeviceStatus {
    fn from(wire: generated::BackupAccessDeviceStatus) -> Self {
        Self {
            device: wire.device,
            node_name: wire.node_name,
            size_bytes: wire.size,
            state: wire.state,
            error: wire.error,
            errno: wire.errno,
            captured_bytes: wire.captured,
            in_ram_bytes: wire.in_ram,
            in_log_bytes: wire.in_log,
            written_bytes: wire.written,
            shared_bytes: wire.shared,
            log_allocated_bytes: wire.log_allocated,
            zero_bytes: wire.zero,
            released_bytes: wire.released,
            discards_postponed_bytes: wire.discards_postponed,
            metadata_bytes: wire.metadata,
            writes_delayed: wire.writes_delayed,
            delay_total_ns: wire.delay_total_ns,
            delay_max_ns: wire.delay_max_ns,
            delay_p50_ns: wire.delay_p50_ns,
            delay_p99_ns: wire.delay_p99_ns,
            delay_p999_ns: wire.delay_p999_ns,
            delay_histogram: wire.delay_histogram.into_iter().map(Into::into).collect(),
            overflows: wire.overflows,
            bitmap_action: wire.bitmap_action,
            dirty_bytes: wire.dirty,
        }
    }
}

/// The snapshot of a device is lost or became incomplete (`BACKUP_ACCESS_BROKEN`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokenEvent {
    /// The target.
    pub target_id: String,
    /// The device as named in the request.
    pub device: String,
    /// The snapshot node.
    pub node_name: String,
    /// The new state.
    pub state: AccessState,
    /// The reason.
    pub error: String,
    /// The errno value of the reason, if there is one.
    pub errno: Option<i64>,
}

impl BrokenEvent {
    /// Reads an event; `None` if it is another one.
    ///
    /// # Errors
    /// [`crate::Error::Protocol`] if its members are not those of the contract.
    pub fn from_event(event: &Event) -> Result<Option<Self>> {
        let Some(wire) = event.read()? else { return Ok(None) };
        let generated::BACKUP_ACCESS_BROKEN { target_id, device, node_name, state, error, errno } =
            wire;
        Ok(Some(Self { target_id, device, node_name, state, error, errno }))
    }
}

/// An access has ended (`BACKUP_ACCESS_TORN_DOWN`): by a command, by the end of its lease, or
/// because QEMU exits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TornDownEvent {
    /// The target.
    pub target_id: String,
    /// Whether its bitmaps start again at its point in time.
    pub success: bool,
    /// Why it ended if no command ended it, and what went wrong with it, if anything did.
    pub reason: Option<String>,
}

impl TornDownEvent {
    /// Reads an event; `None` if it is another one.
    ///
    /// # Errors
    /// [`crate::Error::Protocol`] if its members are not those of the contract.
    pub fn from_event(event: &Event) -> Result<Option<Self>> {
        let Some(wire) = event.read()? else { return Ok(None) };
        let generated::BACKUP_ACCESS_TORN_DOWN { target_id, success, reason } = wire;
        Ok(Some(Self { target_id, success, reason }))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn every_enum_value_of_the_contract_is_known() {
        for (name, values) in generated::ENUM_VALUES {
            for &value in *values {
                let known = match *name {
                    "BackupAccessBitmapMode" => {
                        !matches!(BitmapMode::from(value), BitmapMode::Other(_))
                    }
                    "BackupAccessBitmapAction" => {
                        !matches!(BitmapAction::from(value), BitmapAction::Other(_))
                    }
                    "BackupAccessState" => {
                        !matches!(AccessState::from(value), AccessState::Other(_))
                    }
                    "BackupAccessReadable" => !matches!(Readable::from(value), Readable::Other(_)),
                    "BackupAccessOnError" => !matches!(OnError::from(value), OnError::Other(_)),
                    other => panic!("the contract has an enum the client does not: {other}"),
                };
                assert!(known, "{name} has {value}, the client does not");
            }
        }
        assert_eq!(generated::ENUM_VALUES.len(), 5);
    }

    #[test]
    fn only_members_that_are_set_are_sent() {
        let mut device = Device::new("drive0");
        device.bitmap_mode = Some(BitmapMode::Use);
        device.readable = Some(Readable::All);
        let request = SetupRequest::new("t", vec![device]);
        let expected = json!({"target-id": "t",
            "devices": [{"device": "drive0", "bitmap-mode": "use", "readable": "all"}]});
        assert_eq!(serde_json::to_value(request.to_wire()).unwrap(), expected);
    }

    #[test]
    fn unknown_values_and_members_of_a_reply_are_kept_or_skipped() {
        let wire = json!({"node-name": "n", "device": "d", "size": 1, "bitmap-action": "merged",
            "drained-ns": 5, "new-member": []});
        let wire: generated::BackupAccessInfo = serde_json::from_value(wire).unwrap();
        let info = AccessInfo::from(wire);
        assert_eq!(info.bitmap_action, BitmapAction::Other("merged".into()));
        assert_eq!(info.drained_ns, 5);
    }

    #[test]
    fn a_torn_down_event_is_read_and_others_are_passed_over() {
        let mut event = Event {
            name: "BACKUP_ACCESS_TORN_DOWN".into(),
            data: json!({"target-id": "t", "success": false, "reason": "QEMU exits", "new": 1}),
            timestamp: crate::Timestamp::default(),
        };
        let expected = TornDownEvent {
            target_id: "t".into(),
            success: false,
            reason: Some("QEMU exits".into()),
        };
        assert_eq!(TornDownEvent::from_event(&event).unwrap(), Some(expected));
        assert_eq!(BrokenEvent::from_event(&event).unwrap(), None);
        event.data = json!({"target-id": "t"});
        assert!(TornDownEvent::from_event(&event).is_err());
    }

    #[test]
    fn a_broken_event_is_read_and_others_are_passed_over() {
        let mut event = Event {
            name: "BACKUP_ACCESS_BROKEN".into(),
            data: json!({"target-id": "t", "device": "d", "node-name": "ba-1", "state": "broken",
                "error": "e"}),
            timestamp: crate::Timestamp::default(),
        };
        let broken = BrokenEvent::from_event(&event).unwrap().unwrap();
        assert_eq!(broken.state, AccessState::Broken);
        assert_eq!((broken.node_name.as_str(), broken.errno), ("ba-1", None));
        event.data = Value::Null;
        assert!(BrokenEvent::from_event(&event).is_err());
        event.name = "STOP".into();
        assert_eq!(BrokenEvent::from_event(&event).unwrap(), None);
    }
}
