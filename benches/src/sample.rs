// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one run yields, and the numbers of it that are compared.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a load generator saw.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Requests.
    pub ios: u64,
    /// Requests that wrote.
    pub writes: u64,
    /// Bytes read and written.
    pub bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Duration.
    pub seconds: f64,
    /// Mean latency of the writes.
    pub mean_us: f64,
    /// 99 % of the writes were faster.
    pub p99_us: f64,
    /// 99.9 % of the writes were faster.
    pub p999_us: f64,
}

/// One run of one mode.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Sample {
    /// The guest's side; all zero where there is no guest.
    pub guest: Outcome,
    /// Bytes the daemon sent to disks per byte the guest wrote.
    pub write_amplification: Option<f64>,
    /// Bytes the daemon fetched from disks, without the backup client's, per byte the guest wrote.
    pub read_amplification: Option<f64>,
    /// Bytes that went, or are still to go, to the fleecing image.
    pub fleecing_bytes: Option<f64>,
    /// What the backup client read.
    pub reader_mb_s: Option<f64>,
    /// CPU time of the daemon per guest request, its share for the backup client included.
    pub cpu_us_per_io: Option<f64>,
    /// The daemon's memory at the end.
    pub resident_mb: f64,
    /// Its maximum.
    pub peak_mb: f64,
    /// `query-backup-access` at the end, of the device.
    pub access: Option<Value>,
}

/// A number of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Guest requests per second.
    Iops,
    /// Mean latency.
    Mean,
    /// 99th percentile of the latency.
    P99,
    /// 99.9th percentile of the latency.
    P999,
    /// Speed of the backup client.
    Reader,
    /// CPU time per guest request.
    Cpu,
    /// Bytes to the fleecing image per guest write.
    FleecingPerWrite,
}

impl Metric {
    /// Its value in a run.
    #[must_use]
    pub fn of(self, sample: &Sample) -> Option<f64> {
        let guest = &sample.guest;
        let guest_has = |value: f64| (guest.ios > 0).then_some(value);
        match self {
            Self::Iops => guest_has(guest.ios as f64 / guest.seconds),
            Self::Mean => guest_has(guest.mean_us),
            Self::P99 => guest_has(guest.p99_us),
            Self::P999 => guest_has(guest.p999_us),
            Self::Reader => sample.reader_mb_s,
            Self::Cpu => sample.cpu_us_per_io,
            Self::FleecingPerWrite => {
                Some(sample.fleecing_bytes? / Some(guest.writes).filter(|n| *n > 0)? as f64)
            }
        }
    }

    /// In reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Iops => "IOPS",
            Self::Mean => "mean latency",
            Self::P99 => "p99 latency",
            Self::P999 => "p99.9 latency",
            Self::Reader => "reader MB/s",
            Self::Cpu => "CPU per I/O",
            Self::FleecingPerWrite => "fleecing bytes per write",
        }
    }

    /// Whether less is better.
    #[must_use]
    pub fn less_is_better(self) -> bool {
        !matches!(self, Self::Iops | Self::Reader)
    }
}
