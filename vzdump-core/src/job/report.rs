// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a job hands back: one report per guest, with every number that was measured.

use std::path::PathBuf;
use std::time::Duration;

use provider_api::{ContainerTransferred, GuestKind, Transferred};
use serde::Serialize;

use super::guest_words;
use super::state::Verdict;
use crate::guest::{AccessStats, PointInTime, VolumeReport};
use crate::task_log::{TaskSink, clock};

/// Result of one job.
#[derive(Debug, Clone, Serialize)]
pub struct JobReport {
    /// Storage of the provider.
    pub storage: String,
    /// Start, seconds since the epoch.
    pub start_time_s: i64,
    /// Duration in milliseconds.
    pub duration_ms: u64,
    /// What failed before any guest was touched.
    pub error: Option<String>,
    /// One report per guest, in the order of the request.
    pub guests: Vec<GuestReport>,
}

impl JobReport {
    pub(super) fn new(storage: &str) -> Self {
        Self {
            storage: storage.to_owned(),
            start_time_s: super::now_s(),
            duration_ms: 0,
            error: None,
            guests: Vec::new(),
        }
    }

    /// Whether every guest's backup is durable, and nothing else failed.
    pub fn is_success(&self) -> bool {
        self.error.is_none() && self.guests.iter().all(GuestReport::is_success)
    }
}

/// How one guest's backup ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestResult {
    /// The archive is durable.
    Committed,
    /// There is no archive.
    Failed,
    /// The provider could not say whether there is an archive; the next backup is safe either way.
    Unknown,
}

impl From<Verdict> for GuestResult {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Committed => Self::Committed,
            Verdict::Failed => Self::Failed,
            Verdict::Unknown => Self::Unknown,
        }
    }
}

/// Report of one guest's backup.
#[derive(Debug, Clone, Serialize)]
pub struct GuestReport {
    /// Kind of the guest.
    pub kind: GuestKind,
    /// Number of the guest.
    pub id: u32,
    /// Its name.
    pub name: Option<String>,
    /// How it ended.
    pub result: GuestResult,
    /// What went wrong first.
    pub error: Option<String>,
    /// What was odd, or could not be undone.
    pub warnings: Vec<String>,
    /// Name of the archive, once the provider chose it.
    pub archive: Option<String>,
    /// Bytes the archive takes in the storage.
    pub archive_size_bytes: u64,
    /// Size of all disks together.
    pub disks_size_bytes: u64,
    /// What was moved.
    pub transferred: Transferred,
    /// What was moved of a container.
    pub container: Option<ContainerTransferred>,
    /// Bytes of the disks that an earlier backup has.
    pub reused_bytes: u64,
    /// Duration of the whole backup in milliseconds.
    pub duration_ms: u64,
    /// Duration of the copying alone in milliseconds.
    pub transfer_ms: u64,
    /// What the point in time cost the guest.
    pub point_in_time: PointInTime,
    /// What the backup cost the guest while it ran; none if it could not be read.
    pub access: Option<AccessStats>,
    /// The disks.
    pub volumes: Vec<VolumeReport>,
    /// The log file.
    pub log_path: Option<PathBuf>,
    /// Names of the archives that were removed afterwards, because no retention rule keeps them.
    pub pruned: Vec<String>,
}

impl GuestReport {
    pub(super) fn new(kind: GuestKind, id: u32) -> Self {
        Self {
            kind,
            id,
            name: None,
            result: GuestResult::Failed,
            error: None,
            warnings: Vec::new(),
            archive: None,
            archive_size_bytes: 0,
            disks_size_bytes: 0,
            transferred: Transferred::default(),
            container: None,
            reused_bytes: 0,
            duration_ms: 0,
            transfer_ms: 0,
            point_in_time: PointInTime::default(),
            access: None,
            volumes: Vec::new(),
            log_path: None,
            pruned: Vec::new(),
        }
    }

    /// Whether the archive is durable and nothing that came after it failed.
    pub fn is_success(&self) -> bool {
        self.result == GuestResult::Committed && self.error.is_none()
    }

    /// The last lines of the guest's log.
    pub(super) fn log_end(&self, sink: &dyn TaskSink) {
        let guest = guest_words(self.kind, self.id);
        if self.is_success() {
            let time = clock(Duration::from_millis(self.duration_ms));
            sink.info(&format!("Finished Backup of {guest} ({time})"));
        } else {
            let error = self.error.as_deref().unwrap_or("no reason is known");
            sink.error(&format!("Backup of {guest} failed - {error}"));
        }
        let end = jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S");
        let verb = if self.is_success() { "finished" } else { "failed" };
        sink.info(&format!("Backup {verb} at {end}"));
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
