// SPDX-License-Identifier: MIT OR Apache-2.0
//! Collects what a provider reports from any task, and turns it into progress about once a second.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use provider_api::Progress as Report;

use super::report::millis;
use crate::task_log::{Progress, TaskSink, clean, rate};

/// How often progress is looked at.
const TICK: Duration = Duration::from_millis(1000);
/// At least this much time lies between two percent lines.
const LINE_INTERVAL: Duration = Duration::from_secs(3);
/// The most lines a provider may add to one task's log.
const PROVIDER_LINES_MAX: u64 = 10_000;
/// The most devices that are counted; a VM has at most about 80 disks.
const DEVICES_MAX: usize = 128;

#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    done_bytes: u64,
    total_bytes: u64,
    zero_bytes: u64,
}

/// Progress of one transfer.
pub(super) struct Meter<'a> {
    guest_id: u32,
    sink: &'a dyn TaskSink,
    started: Instant,
    devices: Mutex<BTreeMap<String, Counts>>,
    /// Counts signs of life.
    beats: AtomicU64,
    lines: AtomicU64,
}

impl Report for Meter<'_> {
    fn report(&self, device: &str, done_bytes: u64, total_bytes: u64, zero_bytes: u64) {
        let counts = Counts { done_bytes, total_bytes, zero_bytes };
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = devices.get_mut(device) {
            if known.done_bytes != done_bytes {
                self.beats.fetch_add(1, Ordering::Relaxed);
            }
            *known = counts;
        } else if devices.len() < DEVICES_MAX {
            devices.insert(device.to_owned(), counts);
            self.beats.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn log(&self, line: &str) {
        let before = self.lines.fetch_add(1, Ordering::Relaxed);
        if before < PROVIDER_LINES_MAX {
            self.beats.fetch_add(1, Ordering::Relaxed);
            self.sink.info(&clean(line));
        } else if before == PROVIDER_LINES_MAX {
            self.sink.warn("the provider writes too many lines; the others are left out");
        }
    }
}

impl<'a> Meter<'a> {
    pub(super) fn new(guest_id: u32, sink: &'a dyn TaskSink) -> Self {
        Self {
            guest_id,
            sink,
            started: Instant::now(),
            devices: Mutex::default(),
            beats: AtomicU64::new(0),
            lines: AtomicU64::new(0),
        }
    }

    /// Since when the transfer runs.
    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    fn total(&self) -> Counts {
        let devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices.values().fold(Counts::default(), |sum, counts| Counts {
            done_bytes: sum.done_bytes.saturating_add(counts.done_bytes),
            total_bytes: sum.total_bytes.saturating_add(counts.total_bytes),
            zero_bytes: sum.zero_bytes.saturating_add(counts.zero_bytes),
        })
    }

    fn progress(&self, before: Counts, since: Duration) -> Progress {
        let now = self.total();
        let read = now.done_bytes.saturating_sub(before.done_bytes);
        let zero = now.zero_bytes.saturating_sub(before.zero_bytes);
        Progress {
            guest_id: self.guest_id,
            done_bytes: now.done_bytes,
            total_bytes: now.total_bytes,
            zero_bytes: now.zero_bytes,
            elapsed_ms: millis(self.elapsed()),
            read_bytes_per_s: rate(read, since),
            write_bytes_per_s: rate(read.saturating_sub(zero), since),
        }
    }

    /// Reports until nothing has moved for `stall`, and then ends.
    pub(super) async fn run_until_stalled(&self, stall: Duration) {
        let mut reporter = Reporter::new();
        let (mut beats, mut last_beat) = (0, Instant::now());
        loop {
            tokio::time::sleep(TICK.min(stall)).await;
            reporter.tick(self);
            let now = self.beats.load(Ordering::Relaxed);
            if now != beats {
                (beats, last_beat) = (now, Instant::now());
            } else if last_beat.elapsed() >= stall {
                return;
            }
        }
    }

    /// The last line, with the average rates.
    pub(super) fn end(&self) {
        let progress = self.progress(Counts::default(), self.elapsed());
        if progress.total_bytes > 0 {
            self.sink.progress(&progress);
            self.sink.info(&progress.line());
        }
    }
}

struct Reporter {
    /// Counts and time of the last percent line.
    line: (Counts, Instant),
    percent: Option<u8>,
    /// Counts and time of the last progress.
    tick: (Counts, Instant),
}

impl Reporter {
    fn new() -> Self {
        let start = (Counts::default(), Instant::now());
        Self { line: start, percent: None, tick: start }
    }

    fn tick(&mut self, meter: &Meter<'_>) {
        let counts = meter.total();
        if counts.total_bytes == 0 {
            return;
        }
        let progress = meter.progress(self.tick.0, self.tick.1.elapsed());
        meter.sink.progress(&progress);
        self.tick = (counts, Instant::now());
        let is_due = self.percent != Some(progress.percent())
            && progress.percent() < 100
            && (self.percent.is_none() || self.line.1.elapsed() >= LINE_INTERVAL);
        if is_due {
            let line = meter.progress(self.line.0, self.line.1.elapsed());
            meter.sink.info(&line.line());
            self.percent = Some(line.percent());
            self.line = (counts, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task_log::testing::MemoryLog;

    #[test]
    fn devices_are_added_up_and_percent_lines_are_few() {
        let sink = MemoryLog::default();
        let meter = Meter::new(100, &sink);
        let mut reporter = Reporter::new();
        reporter.tick(&meter);
        assert_eq!(sink.text(), "", "nothing is known yet");
        meter.report("scsi0", 25, 100, 5);
        meter.report("scsi1", 0, 100, 0);
        meter.report("scsi1", 25, 100, 0);
        for _ in 0..5 {
            reporter.tick(&meter);
        }
        let text = sink.text();
        assert!(text.starts_with("INFO:  25% (50.0 B of 200.0 B) in 0s, read: "), "{text}");
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn a_talkative_provider_is_cut_off() {
        let sink = MemoryLog::default();
        let meter = Meter::new(100, &sink);
        for _ in 0..PROVIDER_LINES_MAX + 100 {
            meter.log("line\n");
        }
        assert_eq!(sink.text().lines().count() as u64, PROVIDER_LINES_MAX + 1);
    }

    #[tokio::test]
    async fn a_transfer_that_stands_still_is_noticed() {
        let sink = MemoryLog::default();
        let meter = Meter::new(100, &sink);
        meter.report("scsi0", 1, 2, 0);
        let stall = Duration::from_millis(1);
        // Ends at all.
        meter.run_until_stalled(stall).await;
    }
}
