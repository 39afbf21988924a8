// SPDX-License-Identifier: GPL-2.0-or-later
//! Counters of one engine: as plain numbers for the outside, as atomics inside.

use crate::Errno;
use crate::sync::AtomicU64;

/// State of the snapshot as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    /// Complete.
    #[default]
    Active,
    /// Some old data was lost to read errors; reads of it fail.
    Degraded,
    /// Lost; all reads fail and nothing is captured any more.
    Broken,
    /// Teardown has begun.
    Closing,
}

/// Counters; sizes in bytes, times in nanoseconds.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// State of the snapshot.
    pub state: State,
    /// First error: what happened, and its errno.
    pub error: Option<(String, Errno)>,
    /// Old data saved so far.
    pub captured_bytes: u64,
    /// Old data in RAM now.
    pub ram_bytes: u64,
    /// Old data in the fleecing image now.
    pub log_bytes: u64,
    /// Old data that was zero.
    pub zero_bytes: u64,
    /// Released by the reader.
    pub released_bytes: u64,
    /// RAM used for metadata.
    pub metadata_bytes: u64,
    /// Guest requests that waited for a capture.
    pub writes_delayed: u64,
    /// Their waiting time.
    pub delay_total_ns: u64,
    /// The longest wait.
    pub delay_max_ns: u64,
    /// Half of the waits were not longer.
    pub delay_p50_ns: u64,
    /// 99 % of the waits were not longer.
    pub delay_p99_ns: u64,
    /// 99.9 % of the waits were not longer.
    pub delay_p999_ns: u64,
    /// All waits: upper bound of a bucket, and how many are in it. Without empty ones.
    pub delay_histogram: Vec<(u64, u64)>,
    /// How often a guest request found no room in RAM.
    pub overflows: u64,
    /// Written to the fleecing image.
    pub written_bytes: u64,
    /// Saved by sharing blocks with the fleecing image.
    pub shared_bytes: u64,
    /// Space of the fleecing image that is not given back.
    pub log_allocated_bytes: u64,
    /// Guest discards that wait for the reader's release.
    pub postponed_bytes: u64,
}

/// What the engine counts itself, without a lock.
pub(crate) struct Counters {
    pub(crate) captured_bytes: AtomicU64,
    pub(crate) zero_bytes: AtomicU64,
    pub(crate) released_bytes: AtomicU64,
    pub(crate) delay_total_ns: AtomicU64,
    pub(crate) delay_max_ns: AtomicU64,
    pub(crate) overflows: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    pub(crate) shared_bytes: AtomicU64,
    pub(crate) postponed_granules: AtomicU64,
}

impl Counters {
    pub(crate) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            captured_bytes: zero(),
            zero_bytes: zero(),
            released_bytes: zero(),
            delay_total_ns: zero(),
            delay_max_ns: zero(),
            overflows: zero(),
            written_bytes: zero(),
            shared_bytes: zero(),
            postponed_granules: zero(),
        }
    }
}
