// SPDX-License-Identifier: MIT OR Apache-2.0
//! Progress of a restore, over all disks that are copied at the same time.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::job::report::millis;
use crate::task_log::{DiskProgress, Progress, TaskSink, rate};

/// At least this much time lies between two progress lines.
const LINE_INTERVAL: Duration = Duration::from_secs(3);

/// Sums up what each copy says.
pub(super) struct Meter<'a> {
    sink: &'a dyn TaskSink,
    started: Instant,
    state: Mutex<State>,
}

struct State {
    progress: Progress,
    /// Percent and time of the last line.
    line: Option<(u8, Instant)>,
}

impl<'a> Meter<'a> {
    /// A meter for disks with these names and sizes.
    pub(super) fn new(
        guest_id: u32,
        disks: impl Iterator<Item = (String, u64)>,
        sink: &'a dyn TaskSink,
    ) -> Self {
        let disks: Vec<DiskProgress> = disks
            .map(|(device, total_bytes)| DiskProgress {
                device,
                total_bytes,
                ..DiskProgress::default()
            })
            .collect();
        let total_bytes = disks.iter().map(|disk| disk.total_bytes).sum();
        let progress = Progress { guest_id, total_bytes, disks, ..Progress::default() };
        let state = Mutex::new(State { progress, line: None });
        Self { sink, started: Instant::now(), state }
    }

    /// One disk is done up to here.
    pub(super) fn tell(&self, disk: usize, done_bytes: u64) {
        let elapsed = self.started.elapsed();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { progress, line } = &mut *state;
        if let Some(disk) = progress.disks.get_mut(disk) {
            disk.done_bytes = done_bytes;
            disk.read_bytes_per_s = rate(done_bytes, elapsed);
            disk.write_bytes_per_s = disk.read_bytes_per_s;
        }
        progress.done_bytes = progress.disks.iter().map(|disk| disk.done_bytes).sum();
        progress.elapsed_ms = millis(elapsed);
        progress.read_bytes_per_s = rate(progress.done_bytes, elapsed);
        progress.write_bytes_per_s = progress.read_bytes_per_s;
        self.sink.progress(progress);
        let percent = progress.percent();
        let is_due = line.is_none_or(|(_, at)| at.elapsed() >= LINE_INTERVAL);
        let is_new = line.is_none_or(|(shown, _)| shown != percent);
        if is_new && (is_due || percent == 100) && percent > 0 {
            self.sink.info(&progress.line());
            *line = Some((percent, Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task_log::Level;

    #[derive(Default)]
    struct Kept(Mutex<(Vec<String>, Vec<Progress>)>);

    impl TaskSink for Kept {
        fn line(&self, _level: Level, text: &str) {
            self.0.lock().unwrap().0.push(text.to_owned());
        }
        fn progress(&self, progress: &Progress) {
            self.0.lock().unwrap().1.push(progress.clone());
        }
    }

    #[test]
    fn the_disks_are_summed_up() {
        let kept = Kept::default();
        let disks = [("scsi0".to_owned(), 100), ("scsi1".to_owned(), 300)];
        let meter = Meter::new(100, disks.into_iter(), &kept);
        meter.tell(0, 100);
        meter.tell(1, 100);
        meter.tell(1, 300);
        let (lines, told) = &*kept.0.lock().unwrap();
        let done: Vec<_> = told.iter().map(|p| (p.done_bytes, p.total_bytes)).collect();
        assert_eq!(done, [(100, 400), (200, 400), (400, 400)]);
        assert_eq!(told[1].disks[1].done_bytes, 100);
        // The first and the last; those between come too soon.
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[1].starts_with("100% ("), "{lines:?}");
    }
}
