// SPDX-License-Identifier: MIT OR Apache-2.0
//! Collects what a provider reports from any task, and turns it into progress about once a second.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use provider_api::Progress as Report;

use super::report::millis;
use crate::task_log::{DiskProgress, Progress, TaskSink, clean, rate};

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

/// What was counted, by the device's name.
type Devices = BTreeMap<String, Counts>;

/// Progress of one transfer.
pub(crate) struct Meter<'a> {
    guest_id: u32,
    /// Bytes that an earlier backup has.
    reused_bytes: u64,
    sink: &'a dyn TaskSink,
    started: Instant,
    devices: Mutex<Devices>,
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

impl Drop for Meter<'_> {
    fn drop(&mut self) {
        self.sink.transfer_ended(self.guest_id);
    }
}

impl<'a> Meter<'a> {
    pub(crate) fn new(guest_id: u32, reused_bytes: u64, sink: &'a dyn TaskSink) -> Self {
        Self {
            guest_id,
            reused_bytes,
            sink,
            started: Instant::now(),
            devices: Mutex::default(),
            beats: AtomicU64::new(0),
            lines: AtomicU64::new(0),
        }
    }

    /// Since when the transfer runs.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    fn devices(&self) -> Devices {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The progress, with the rates since `before`.
    fn progress(&self, now: &Devices, before: &Devices, since: Duration) -> Progress {
        let disk = |(device, counts): (&String, &Counts)| {
            let before = before.get(device).copied().unwrap_or_default();
            let read = counts.done_bytes.saturating_sub(before.done_bytes);
            let zero = counts.zero_bytes.saturating_sub(before.zero_bytes);
            DiskProgress {
                device: clean(device),
                done_bytes: counts.done_bytes,
                total_bytes: counts.total_bytes,
                zero_bytes: counts.zero_bytes,
                read_bytes_per_s: rate(read, since),
                write_bytes_per_s: rate(read.saturating_sub(zero), since),
            }
        };
        let disks: Vec<DiskProgress> = now.iter().map(disk).collect();
        let sum = |part: fn(&DiskProgress) -> u64| {
            disks.iter().fold(0, |sum: u64, disk| sum.saturating_add(part(disk)))
        };
        let (done_bytes, total_bytes) = (sum(|disk| disk.done_bytes), sum(|disk| disk.total_bytes));
        let elapsed = self.elapsed();
        Progress {
            guest_id: self.guest_id,
            done_bytes,
            total_bytes,
            zero_bytes: sum(|disk| disk.zero_bytes),
            reused_bytes: self.reused_bytes,
            elapsed_ms: millis(elapsed),
            left_ms: left_ms(done_bytes, total_bytes, elapsed),
            read_bytes_per_s: sum(|disk| disk.read_bytes_per_s),
            write_bytes_per_s: sum(|disk| disk.write_bytes_per_s),
            disks,
        }
    }

    /// Reports until nothing has moved for `stall`, and then ends.
    pub(crate) async fn run_until_stalled(&self, stall: Duration) {
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
    pub(crate) fn end(&self) {
        let progress = self.progress(&self.devices(), &Devices::new(), self.elapsed());
        if progress.total_bytes > 0 {
            self.sink.progress(&progress);
            self.sink.info(&progress.line());
        }
    }
}

/// The time left if all goes on as it did on average.
fn left_ms(done_bytes: u64, total_bytes: u64, elapsed: Duration) -> Option<u64> {
    let left = u128::from(total_bytes.saturating_sub(done_bytes));
    let ms = (left * u128::from(millis(elapsed))).checked_div(u128::from(done_bytes))?;
    Some(u64::try_from(ms).unwrap_or(u64::MAX))
}

struct Reporter {
    /// Counts and time of the last percent line.
    line: (Devices, Instant),
    percent: Option<u8>,
    /// Counts and time of the last progress.
    tick: (Devices, Instant),
}

impl Reporter {
    fn new() -> Self {
        let start = (Devices::new(), Instant::now());
        Self { line: start.clone(), percent: None, tick: start }
    }

    fn tick(&mut self, meter: &Meter<'_>) {
        let now = meter.devices();
        let progress = meter.progress(&now, &self.tick.0, self.tick.1.elapsed());
        if progress.total_bytes == 0 {
            return;
        }
        meter.sink.progress(&progress);
        self.tick = (now.clone(), Instant::now());
        let is_due = self.percent != Some(progress.percent())
            && progress.percent() < 100
            && (self.percent.is_none() || self.line.1.elapsed() >= LINE_INTERVAL);
        if is_due {
            let line = meter.progress(&now, &self.line.0, self.line.1.elapsed());
            meter.sink.info(&line.line());
            self.percent = Some(line.percent());
            self.line = (now, Instant::now());
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
        let meter = Meter::new(100, 7, &sink);
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
    fn each_disk_has_its_rates_and_the_time_left_is_that_of_all() {
        let sink = MemoryLog::default();
        let meter = Meter::new(100, 7, &sink);
        meter.report("scsi0", 100, 1000, 40);
        let before = meter.devices();
        meter.report("scsi0", 300, 1000, 40);
        meter.report("scsi1", 50, 100, 50);
        let progress = meter.progress(&meter.devices(), &before, Duration::from_secs(2));
        let rates: Vec<_> = progress
            .disks
            .iter()
            .map(|disk| (disk.device.as_str(), disk.read_bytes_per_s, disk.write_bytes_per_s))
            .collect();
        assert_eq!(rates, [("scsi0", 100, 100), ("scsi1", 25, 0)]);
        assert_eq!((progress.read_bytes_per_s, progress.write_bytes_per_s), (125, 100));
        assert_eq!((progress.done_bytes, progress.total_bytes), (350, 1100));
        assert_eq!((progress.sent_bytes(), progress.reused_bytes), (260, 7));
        assert_eq!(left_ms(250, 1000, Duration::from_secs(1)), Some(3000));
        assert_eq!(left_ms(0, 1000, Duration::from_secs(1)), None);
        assert_eq!(left_ms(9, 3, Duration::from_secs(1)), Some(0));
        assert_eq!(left_ms(1, u64::MAX, Duration::MAX), Some(u64::MAX));
    }

    #[test]
    fn a_talkative_provider_is_cut_off() {
        let sink = MemoryLog::default();
        let meter = Meter::new(100, 7, &sink);
        for _ in 0..PROVIDER_LINES_MAX + 100 {
            meter.log("line\n");
        }
        assert_eq!(sink.text().lines().count() as u64, PROVIDER_LINES_MAX + 1);
    }

    #[tokio::test]
    async fn a_transfer_that_stands_still_is_noticed() {
        let sink = MemoryLog::default();
        let meter = Meter::new(100, 7, &sink);
        meter.report("scsi0", 1, 2, 0);
        let stall = Duration::from_millis(1);
        // Ends at all.
        meter.run_until_stalled(stall).await;
    }
}
