// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compares a pair of disks with what they must hold.

use super::content::{SECTOR_LEN, Side};
use super::disk::{AlignedBuffer, Disk};
use super::layout::{BIG_BYTES, Holds, SECTOR_BYTES};

const READ_BYTES: usize = 1 << 20;
/// How many wrong places are described; the others are only counted.
const DESCRIBED: usize = 5;

/// What the check of one disk found.
#[derive(Debug)]
pub struct DiskReport {
    /// The last record of the disk.
    pub last: u64,
    /// Sectors that hold something else than they must.
    pub wrong_sectors: u64,
    /// Sectors of a record that was being written when the machine died.
    pub in_flight_sectors: u64,
    /// The first wrong sectors in words.
    pub examples: Vec<String>,
}

/// What the check of a pair found.
#[derive(Debug)]
pub struct PairReport {
    /// Last record of disk A.
    pub last_a: u64,
    /// Last record of disk B.
    pub last_b: u64,
    /// Sectors half written when the machine died (only with a tolerant check).
    pub in_flight_sectors: u64,
    /// What is wrong; empty when all is well.
    pub problems: Vec<String>,
}

impl PairReport {
    /// The one line for machines.
    #[must_use]
    pub fn line(&self) -> String {
        let Self { last_a, last_b, in_flight_sectors, problems } = self;
        let numbers = format!("last_a={last_a} last_b={last_b} in_flight={in_flight_sectors}");
        if problems.is_empty() {
            format!("CHECK OK {numbers}")
        } else {
            format!("CHECK FAILED {numbers} problems={}", problems.join("; "))
        }
    }
}

/// Checks both disks and that they are from one point in time.
///
/// Record n is on disk A before it is written to disk B, and record n+1 follows when it is on
/// both, so in one point in time disk A has the same last record as B or one more.
/// With `allow_in_flight` the record after the last may be there in part, as after a crash.
///
/// # Errors
/// A disk cannot be read, or the two are no pair.
pub fn check_pair(a: &Disk, b: &Disk, allow_in_flight: bool) -> Result<PairReport, String> {
    if (a.header.side, b.header.side) != (Side::A, Side::B) || a.header.pair != b.header.pair {
        return Err(format!("{} and {} are no pair", a.path.display(), b.path.display()));
    }
    let (report_a, report_b) = std::thread::scope(|threads| {
        let other = threads.spawn(|| check_disk(b, allow_in_flight));
        let report_a = check_disk(a, allow_in_flight);
        (report_a, other.join().unwrap_or_else(|_| Err("the check of disk b crashed".into())))
    });
    let (report_a, report_b) = (report_a?, report_b?);
    let (last_a, last_b) = (report_a.last, report_b.last);
    let mut problems = Vec::new();
    if last_a != last_b && last_a != last_b + 1 {
        problems.push(format!(
            "the disks are from different points in time: disk a ends with record {last_a}, disk \
             b with {last_b}"
        ));
    }
    for (side, report) in [("a", &report_a), ("b", &report_b)] {
        if report.wrong_sectors > 0 {
            let examples = report.examples.join(", ");
            problems
                .push(format!("disk {side}: {} wrong sectors: {examples}", report.wrong_sectors));
        }
    }
    let in_flight_sectors = report_a.in_flight_sectors + report_b.in_flight_sectors;
    Ok(PairReport { last_a, last_b, in_flight_sectors, problems })
}

/// The last record that is completely on a disk, followed from the newest of the hot ring.
///
/// # Errors
/// The disk cannot be read.
pub fn find_last(disk: &Disk) -> Result<u64, String> {
    let mut buffer = AlignedBuffer::new(BIG_BYTES as usize);
    let mut newest = 0;
    for place in disk.layout.hot_places() {
        let block = &mut buffer.bytes()[..place.size_bytes as usize];
        disk.read(block, place.offset_bytes)?;
        let first = place.offset_bytes / SECTOR_BYTES;
        let number = disk.header.number_in(first, &block[..SECTOR_LEN]);
        newest = newest.max(number.unwrap_or(0));
    }
    let mut last = newest.saturating_sub(1);
    // The hot ring takes every eighth record, so more than two rounds would be a damaged disk.
    while last < newest.saturating_add(16) && is_complete(disk, last + 1, &mut buffer)? {
        last += 1;
    }
    Ok(last)
}

fn is_complete(disk: &Disk, number: u64, buffer: &mut AlignedBuffer) -> Result<bool, String> {
    let place = disk.layout.place(number);
    let bytes = &mut buffer.bytes()[..place.size_bytes as usize];
    disk.read(bytes, place.offset_bytes)?;
    let first = place.offset_bytes / SECTOR_BYTES;
    Ok(bytes
        .chunks_exact(SECTOR_LEN)
        .zip(first..)
        .all(|(sector, at)| disk.header.number_in(at, sector) == Some(number)))
}

fn check_disk(disk: &Disk, allow_in_flight: bool) -> Result<DiskReport, String> {
    let last = find_last(disk)?;
    let mut report =
        DiskReport { last, wrong_sectors: 0, in_flight_sectors: 0, examples: Vec::new() };
    let mut buffer = AlignedBuffer::new(READ_BYTES);
    let mut expected = [0; SECTOR_LEN];
    let mut offset = 0;
    while offset < disk.header.disk_bytes {
        let len = (READ_BYTES as u64).min(disk.header.disk_bytes - offset) as usize;
        let bytes = &mut buffer.bytes()[..len];
        disk.read(bytes, offset)?;
        for (sector, at) in bytes.chunks_exact(SECTOR_LEN).zip(offset / SECTOR_BYTES..) {
            let holds = disk.layout.holds(last, at);
            disk.fill_sector(holds, at, &mut expected);
            if sector == expected {
                continue;
            }
            let next = disk.layout.holds(last + 1, at);
            disk.fill_sector(next, at, &mut expected);
            if allow_in_flight && sector == expected {
                report.in_flight_sectors += 1;
            } else {
                report.add(disk, holds, at, sector);
            }
        }
        offset += len as u64;
    }
    Ok(report)
}

impl DiskReport {
    fn add(&mut self, disk: &Disk, holds: Holds, at: u64, found: &[u8]) {
        self.wrong_sectors += 1;
        if self.examples.len() < DESCRIBED {
            let found = disk.header.describe(at, found);
            self.examples.push(format!("sector {at} must hold {} but holds {found}", name(holds)));
        }
    }
}

fn name(holds: Holds) -> String {
    match holds {
        Holds::Header => "the header".into(),
        Holds::Zero => "zeroes".into(),
        Holds::Prefill => "its first filling".into(),
        Holds::Record(number) => format!("record {number}"),
    }
}
