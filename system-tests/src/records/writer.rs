// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writes records at a fixed rate and measures how long the longest write took.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::check::find_last;
use super::content::SECTOR_LEN;
use super::disk::{AlignedBuffer, Disk};
use super::layout::{BIG_BYTES, Holds, SECTOR_BYTES};

/// How often the writer reports.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// A writer that fell behind (its machine was slow) does not catch up more than this.
const CATCH_UP: Duration = Duration::from_millis(500);

/// How to write.
#[derive(Debug, Clone, Copy)]
pub struct WriterOptions {
    /// Records per second.
    pub rate_per_s: u32,
    /// Stop after this record; 0 means never.
    pub stop_after: u64,
    /// Flush each write to stable storage (only tests of the format itself go without).
    pub flush: bool,
}

/// What the writer did since its last report.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// The last record that is on both disks.
    pub last: u64,
    /// The longest single write, with its flush, since the last report.
    pub stall: Duration,
    /// The longest single write since the start.
    pub longest_stall: Duration,
}

impl Progress {
    /// The line for the console.
    #[must_use]
    pub fn line(&self) -> String {
        format!(
            "RECORDS last={} stall_us={} STALL max_ms={}",
            self.last,
            self.stall.as_micros(),
            self.longest_stall.as_millis()
        )
    }
}

/// Writes records to both disks, first to A, then to B, going on where the disks end.
///
/// Each record is on stable storage of A before it is written to B.
///
/// # Errors
/// A write fails (the text names disk and record), or the disks do not fit together.
pub fn write_records(
    a: &Disk,
    b: &Disk,
    options: WriterOptions,
    mut report: impl FnMut(Progress),
) -> Result<Progress, String> {
    let (last_a, last_b) = (find_last(a)?, find_last(b)?);
    if last_a != last_b && last_a != last_b + 1 {
        return Err(format!("disk a ends with record {last_a}, disk b with {last_b}"));
    }
    let mut state = Progress { last: last_b, stall: Duration::ZERO, longest_stall: Duration::ZERO };
    let mut buffer = AlignedBuffer::new(BIG_BYTES as usize);
    let interval = Duration::from_secs(1) / options.rate_per_s.max(1);
    let (mut due, mut report_at) = (Instant::now(), Instant::now() + REPORT_EVERY);
    while options.stop_after == 0 || state.last < options.stop_after {
        let number = state.last + 1;
        for disk in [a, b] {
            let took = write_one(disk, number, options.flush, &mut buffer)?;
            state.stall = state.stall.max(took);
            state.longest_stall = state.longest_stall.max(took);
        }
        state.last = number;
        let now = Instant::now();
        if now >= report_at {
            report(state);
            state.stall = Duration::ZERO;
            report_at = now + REPORT_EVERY;
        }
        due = (due + interval).max(now.checked_sub(CATCH_UP).unwrap_or(now));
        if due > now {
            std::thread::sleep(due - now);
        }
    }
    report(state);
    Ok(state)
}

fn write_one(
    disk: &Disk,
    number: u64,
    flush: bool,
    buffer: &mut AlignedBuffer,
) -> Result<Duration, String> {
    let place = disk.layout.place(number);
    let bytes = &mut buffer.bytes()[..place.size_bytes as usize];
    let first = place.offset_bytes / SECTOR_BYTES;
    for (sector, at) in bytes.chunks_exact_mut(SECTOR_LEN).zip(first..) {
        disk.fill_sector(Holds::Record(number), at, sector);
    }
    let start = Instant::now();
    disk.file
        .write_all_at(bytes, place.offset_bytes)
        .and_then(|()| if flush { disk.file.sync_data() } else { Ok(()) })
        .map_err(|error| format!("disk {} record {number}: {error}", disk.header.side))?;
    Ok(start.elapsed())
}
