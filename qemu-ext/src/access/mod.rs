// SPDX-License-Identifier: GPL-2.0-or-later
//! Backup accesses: the commands over the fleecing filter.
//!
//! ```text
//!  request.rs   checks everything of a setup before anything is touched
//!  limits.rs    checks its numbers
//!  setup.rs     opens filters and snapshots, switches all disks in one drained section
//!  bitmaps.rs   the target's dirty bitmaps through setup, undo and teardown
//!  loaded.rs    bitmaps of raw disks that are kept in files
//!  bitmap_file.rs  those files, and what a disk's storage tells
//!  guard.rs     notices that a disk was smaller meanwhile
//!  teardown.rs  ends exports without draining, then takes the nodes out in one drained section
//!  lease.rs     ends an access whose client does not renew its lease
//!  registry.rs  which accesses exist: names, never pointers to nodes
//!  status.rs    query, the events, the watchdog
//! ```

mod bitmap_file;
mod bitmaps;
mod guard;
mod lease;
mod limits;
mod loaded;
mod registry;
mod request;
mod setup;
mod status;
mod teardown;

pub use bitmaps::remove_all as remove_bitmaps;
pub use lease::renew;
pub use loaded::{load as load_bitmap, sentinel_closed, unload as unload_bitmap};
pub use setup::setup;
pub use status::query;
pub use teardown::teardown;

use fleece::bitmap_name::{Action, Mode};
use fleece::{OnError, Stats};

/// Arguments of a setup.
#[derive(Debug)]
pub struct SetupRequest {
    /// The target.
    pub target_id: String,
    /// Its devices.
    pub devices: Vec<DeviceRequest>,
    /// What applies to devices that have no value of their own.
    pub defaults: Options,
    /// RAM for old data over all devices.
    pub buffer_total_bytes: Option<u64>,
    /// Seconds without a renewal after which the access ends; 0 is never.
    pub lease_s: u32,
}

/// Members that a setup has at its top level and per device.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Granularity of new bitmaps.
    pub granularity_bytes: Option<u64>,
    /// RAM for old data, per device.
    pub buffer_bytes: Option<u64>,
    /// Space for old data in the fleecing image.
    pub fleecing_limit_bytes: Option<u64>,
    /// RAM for the states and positions of old data.
    pub metadata_limit_bytes: Option<u64>,
    /// Captures of at least so many bytes share the disk's blocks.
    pub reflink_bytes: Option<u64>,
    /// Seconds without progress after which a snapshot breaks.
    pub timeout_s: Option<u32>,
    /// What an error before the end of a guest write does.
    pub on_error: Option<OnError>,
}

/// Which areas a snapshot gives, when a bitmap is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Readable {
    /// What the bitmap marks as dirty.
    #[default]
    Dirty,
    /// Everything.
    All,
}

/// One device of a setup.
#[derive(Debug)]
pub struct DeviceRequest {
    /// Its name.
    pub device: String,
    /// Node name of the fleecing image.
    pub fleecing: Option<String>,
    /// Use of a dirty bitmap.
    pub mode: Mode,
    /// Generation of the caller's last committed backup.
    pub generation: Option<String>,
    /// Which areas can be read and released.
    pub readable: Readable,
    /// Overrides members of the request.
    pub options: Options,
}

/// What a setup says of one device.
#[derive(Debug)]
pub struct DeviceInfo {
    /// The snapshot node.
    pub node_name: String,
    /// The device as named in the request.
    pub device: String,
    /// Size of the device.
    pub size_bytes: u64,
    /// What was done with the bitmap.
    pub action: Action,
    /// The bitmap, if there is one.
    pub bitmap: Option<BitmapInfo>,
    /// How long all guest I/O was held.
    pub drained_ns: u64,
}

/// The bitmap that a client gets.
#[derive(Debug)]
pub struct BitmapInfo {
    /// Its name on the snapshot node.
    pub name: String,
    /// Generation of this backup once it is committed.
    pub generation: String,
    /// What it marks as dirty.
    pub dirty_bytes: u64,
}

/// A bitmap file to load.
#[derive(Debug)]
pub struct LoadRequest {
    /// The disk.
    pub device: String,
    /// The target whose bitmap it is.
    pub target_id: String,
    /// The file's path.
    pub file: String,
    /// The caller states that nobody changed a disk which does not tell.
    pub trust_unmodified: bool,
}

/// Result of a teardown.
#[derive(Debug)]
pub struct TeardownOutcome {
    /// Whether there was such an access.
    pub existed: bool,
    /// What went wrong with it, or why it is gone.
    pub reason: Option<String>,
}

/// A bitmap that was removed.
#[derive(Debug)]
pub struct RemovedBitmap {
    /// The node that had it.
    pub node_name: String,
    /// Its name.
    pub bitmap_name: String,
}

/// Status of one access.
#[derive(Debug)]
pub struct TargetStatus {
    /// The target.
    pub target_id: String,
    /// Its point in time, milliseconds since the epoch.
    pub start_time_ms: u64,
    /// Whole seconds until its lease is over; none without a lease.
    pub lease_left_s: Option<u32>,
    /// Its devices.
    pub devices: Vec<DeviceStatus>,
}

/// Status of one device.
#[derive(Debug)]
pub struct DeviceStatus {
    /// The device as named in the request.
    pub device: String,
    /// The snapshot node.
    pub node_name: String,
    /// Size of the device.
    pub size_bytes: u64,
    /// The filter's counters.
    pub stats: Stats,
    /// What was done with the bitmap.
    pub action: Action,
    /// What the bitmap marked as dirty at setup.
    pub dirty_bytes: Option<u64>,
}
