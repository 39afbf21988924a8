// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest boots, writes, notices damage, and a killed machine leaves its disks intact.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use system_tests::guest::GuestImage;
use system_tests::process::Stop;
use system_tests::qemu::{BOOT_WITHIN, DirectGuest};
use system_tests::records::check::check_pair;
use system_tests::records::disk::{Disk, create_pair};
use system_tests::turn::Turn;

const CHECK_WITHIN: Duration = Duration::from_secs(60);

#[test]
fn the_guest_writes_survives_a_kill_and_finds_a_damaged_record() {
    let (stop, dir) = (Stop::default(), tempfile::tempdir().unwrap());
    let _turn = Turn::wait(&stop).unwrap();
    let image = GuestImage::build(&stop).unwrap();
    let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
    create_pair([&a, &b], 32 << 20, 42).unwrap();

    // The disks are attached the wrong way round: the guest goes by their headers.
    let boot = || DirectGuest::boot(&image, &[&b, &a], dir.path(), "vzdump.rate=500").unwrap();
    let mut guest = boot();
    let line = guest.console.wait_for("CHECK OK", BOOT_WITHIN, &stop).unwrap();
    assert!(line.contains("last_a=0 last_b=0 in_flight=0"), "{line}");
    let seen = guest.console.wait_for_record(300, CHECK_WITHIN, &stop).unwrap();
    assert!(seen.longest_stall > Duration::ZERO);
    drop(guest);

    let open = || [&a, &b].map(|path| Disk::open(path, false).unwrap());
    let [disk_a, disk_b] = open();
    let report = check_pair(&disk_a, &disk_b, true).unwrap();
    assert!(report.problems.is_empty() && report.last_b >= seen.last, "{}", report.line());

    let place = disk_a.layout.place(200);
    let file = OpenOptions::new().write(true).open(&a).unwrap();
    file.write_all_at(b"damage", place.offset_bytes + 1000).unwrap();
    let mut guest = boot();
    let line = guest.console.wait_for("CHECK FAILED", BOOT_WITHIN, &stop).unwrap();
    assert!(line.contains("disk a: 1 wrong sectors"), "{line}");
    assert!(line.contains("must hold record 200 but holds record 200 with damaged data"), "{line}");
}
