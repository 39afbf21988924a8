// SPDX-License-Identifier: MIT OR Apache-2.0
//! The checker of the records finds every kind of damage a bad backup could do.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use system_tests::records::check::{PairReport, check_pair};
use system_tests::records::content::SECTOR_LEN;
use system_tests::records::disk::{Disk, create_pair};
use system_tests::records::layout::{Holds, MIN_DISK_BYTES, SECTOR_BYTES};
use system_tests::records::writer::{WriterOptions, write_records};
use tempfile::TempDir;

const LAST: u64 = 2100;

struct Pair {
    dir: TempDir,
}

impl Pair {
    fn written_to(last: u64) -> Self {
        let pair = Self { dir: TempDir::new().unwrap() };
        create_pair([&pair.path("a"), &pair.path("b")], MIN_DISK_BYTES + 4096, 7).unwrap();
        pair.write_to(last);
        pair
    }

    fn write_to(&self, last: u64) {
        let options = WriterOptions { rate_per_s: 1_000_000, stop_after: last, flush: false };
        let [a, b] = self.open();
        assert_eq!(write_records(&a, &b, options, |_| ()).unwrap().last, last);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn open(&self) -> [Disk; 2] {
        ["a", "b"].map(|name| Disk::open(&self.path(name), true).unwrap())
    }

    fn check(&self, allow_in_flight: bool) -> PairReport {
        let [a, b] = self.open();
        check_pair(&a, &b, allow_in_flight).unwrap()
    }

    fn overwrite(&self, name: &str, bytes: &[u8], offset: u64) {
        let file = OpenOptions::new().write(true).open(self.path(name)).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }

    fn assert_failed(&self, reason: &str) {
        for tolerant in [false, true] {
            let line = self.check(tolerant).line();
            assert!(line.starts_with("CHECK FAILED") && line.contains(reason), "{line}");
        }
    }

    /// Puts record `number` there as far as `sectors` goes, as a torn write would.
    fn tear(&self, name: &str, number: u64, sectors: u64) {
        let disk = Disk::open(&self.path(name), true).unwrap();
        let first = disk.layout.place(number).offset_bytes / SECTOR_BYTES;
        let mut sector = [0; SECTOR_LEN];
        for at in first..first + sectors {
            disk.fill_sector(Holds::Record(number), at, &mut sector);
            self.overwrite(name, &sector, at * SECTOR_BYTES);
        }
    }
}

#[test]
fn an_untouched_pair_passes_and_so_does_one_written_in_two_goes() {
    let pair = Pair::written_to(1);
    assert_eq!(pair.check(false).problems, Vec::<String>::new());
    pair.write_to(37);
    pair.write_to(LAST);
    let report = pair.check(false);
    assert_eq!((report.last_a, report.last_b), (LAST, LAST));
    assert_eq!(report.line(), format!("CHECK OK last_a={LAST} last_b={LAST} in_flight=0"));
}

#[test]
fn a_flipped_bit_anywhere_is_found() {
    for offset in [100_u64, 600, 70_000, 330_000, 5 << 20, 9 << 20, MIN_DISK_BYTES + 4095] {
        let pair = Pair::written_to(LAST);
        let [a, _] = pair.open();
        let mut byte = [0];
        a.read(&mut byte, offset).unwrap();
        pair.overwrite("a", &[byte[0] ^ 4], offset);
        if offset < 512 {
            assert!(
                Disk::open(&pair.path("a"), false)
                    .is_ok_and(|_| pair.check(false).problems.len() == 1)
            );
        } else {
            pair.assert_failed("disk a: 1 wrong sectors");
        }
    }
}

#[test]
fn a_lost_record_is_found_wherever_it_belongs() {
    // A hot one, a small one in the middle, a big one, and the one before the last.
    for number in [LAST - 19, LAST - 300, 2048, LAST - 1] {
        let pair = Pair::written_to(LAST);
        let [_, b] = pair.open();
        let place = b.layout.place(number);
        let first = place.offset_bytes / SECTOR_BYTES;
        let mut sector = [0; SECTOR_LEN];
        for at in first..first + place.size_bytes / SECTOR_BYTES {
            b.fill_sector(b.layout.holds(number - 1, at), at, &mut sector);
            pair.overwrite("b", &sector, at * SECTOR_BYTES);
        }
        assert!(pair.check(false).line().starts_with("CHECK FAILED"), "record {number}");
    }
}

#[test]
fn disks_of_different_points_in_time_are_found() {
    let pair = Pair::written_to(100);
    std::fs::copy(pair.path("b"), pair.path("old")).unwrap();
    pair.write_to(102);
    std::fs::rename(pair.path("old"), pair.path("b")).unwrap();
    pair.assert_failed("different points in time: disk a ends with record 102, disk b with 100");
}

#[test]
fn disk_a_may_be_one_record_ahead_and_disk_b_may_not() {
    let pair = Pair::written_to(100);
    let copies = ["a", "b"].map(|name| {
        let copy = pair.path(&format!("{name}.old"));
        std::fs::copy(pair.path(name), &copy).unwrap();
        copy
    });
    pair.write_to(101);
    std::fs::rename(&copies[1], pair.path("b")).unwrap();
    let report = pair.check(false);
    assert_eq!((report.last_a, report.last_b, report.problems.len()), (101, 100, 0));
    pair.write_to(101);
    std::fs::rename(&copies[0], pair.path("a")).unwrap();
    pair.assert_failed("disk a ends with record 100, disk b with 101");
}

#[test]
fn a_torn_record_passes_only_after_a_crash_and_only_as_the_last() {
    let pair = Pair::written_to(2111);
    pair.tear("a", 2112, 50);
    let line = pair.check(true).line();
    assert!(line.starts_with("CHECK OK last_a=2111 last_b=2111 in_flight=50"), "{line}");
    assert!(pair.check(false).line().contains("disk a: 50 wrong sectors"));
    // Two records too far is no write in flight.
    let pair = Pair::written_to(2110);
    pair.tear("a", 2112, 50);
    pair.assert_failed("must hold");
}

#[test]
fn disks_of_two_pairs_and_swapped_disks_are_refused() {
    let (pair, other) = (Pair::written_to(3), Pair::written_to(3));
    let [a, b] = pair.open();
    assert!(check_pair(&b, &a, false).is_err());
    create_pair([&other.path("c"), &other.path("d")], MIN_DISK_BYTES, 8).unwrap();
    let stranger = Disk::open(&other.path("d"), false).unwrap();
    assert!(check_pair(&a, &stranger, false).is_err());
}
