// SPDX-License-Identifier: GPL-2.0-or-later
//! Counters of one engine, as plain numbers.

use crate::Errno;

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
    /// Written to the fleecing image so far.
    pub written_bytes: u64,
    /// Segments of the fleecing image that are not given back.
    pub log_allocated_bytes: u64,
    /// Old data that was zero.
    pub zero_bytes: u64,
    /// Released by the reader.
    pub released_bytes: u64,
    /// Guest discards that are postponed now.
    pub postponed_bytes: u64,
    /// RAM used for metadata.
    pub metadata_bytes: u64,
    /// Guest requests that waited for a capture.
    pub writes_delayed: u64,
    /// Their waiting time.
    pub delay_total_ns: u64,
    /// The longest wait.
    pub delay_max_ns: u64,
    /// The wait that half of them did not exceed: the upper bound of a bucket.
    pub delay_p50_ns: u64,
    /// The wait that 99 percent of them did not exceed.
    pub delay_p99_ns: u64,
    /// The wait that 99.9 percent of them did not exceed.
    pub delay_p999_ns: u64,
    /// Their waits by length: the upper bound of each bucket and how many are in it, ascending.
    pub delay_histogram: Vec<(u64, u64)>,
    /// How often a guest request found no room in RAM.
    pub overflows: u64,
}
