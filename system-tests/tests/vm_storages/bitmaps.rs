// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks whose format keeps bitmaps: the chain of a guest's backups goes on after a stop of QEMU.

use std::os::unix::fs::FileExt as _;
use std::process::Command;

use serde_json::Value;
use system_tests::loopfs::{Kind, LoopFs};
use system_tests::qemu;

use crate::place::{MIB, Place, SOON, qemu_io, random_file, writes};

fn action(guest: &Value) -> &str {
    guest["volumes"][0]["bitmap_action"].as_str().unwrap()
}

fn moved(guest: &Value) -> u64 {
    guest["transferred"]["total_bytes"].as_u64().unwrap()
}

/// Full, increment, stop and start, increment, kill, full.
async fn chain_goes_on(format: &str) {
    let place = Place::new("");
    let source = place.path("source");
    let mut expected = random_file(&source, 4 * MIB);
    place.create(&["--format", format, "--disk-from", source.to_str().unwrap()]);
    place.start();
    let full = place.good_backup(&[]);
    assert_eq!((action(&full), moved(&full)), ("new", 4 * MIB));
    let mut write = |at: u64, pattern: u8| {
        expected[at as usize..][..64 << 10].fill(pattern);
        (at, expected.clone())
    };

    let session = place.monitor().await;
    let (at, _) = write(MIB, 1);
    writes(&session, 1, at, 64 << 10).await;
    qemu_io(&session, "flush").await;
    drop(session);
    place.stop_vm();
    place.start();
    let session = place.monitor().await;
    let (at, second_bytes) = write(2 * MIB, 2);
    writes(&session, 2, at, 64 << 10).await;
    let second = place.good_backup(&[]);
    // What was written before the stop, and after it.
    assert_eq!((action(&second), moved(&second)), ("used", 128 << 10), "{format}");

    drop(session);
    place.stop_vm();
    place.start();
    let clean = place.good_backup(&[]);
    assert_eq!((action(&clean), moved(&clean)), ("used", 0), "{format}");

    // Killed with what the image has stored in use.
    place.stop_vm();
    place.start();
    let session = place.monitor().await;
    let (at, last_bytes) = write(3 * MIB, 3);
    writes(&session, 3, at, 64 << 10).await;
    qemu_io(&session, "flush").await;
    drop(session);
    place.kill_qemu();
    let started = place.run(&["vm", "start", "100", "--paused"]);
    assert_eq!(started["notices"], Value::Array(vec![]), "{format}: QEMU's own writes");
    let after_kill = place.good_backup(&[]);
    assert_eq!((action(&after_kill), moved(&after_kill)), ("invalid", 4 * MIB), "{format}");
    assert_eq!(action(&place.good_backup(&[])), "used", "{format}");
    // Killed after a backup, whose bitmap the image has not stored yet.
    place.kill_qemu();
    place.start();
    let again = place.good_backup(&[]);
    assert_eq!((action(&again), moved(&again)), ("missing-recreated", 4 * MIB), "{format}");
    place.stop_vm();
    place.assert_tidy();
    assert!(place.restored(&second) == second_bytes, "{format}: another second backup");
    assert!(place.restored(&clean) == second_bytes, "{format}: another third backup");
    assert!(place.restored(&after_kill) == last_bytes, "{format}: another backup after the kill");
    if format == "raw+bitmaps" {
        let data = place.bytes("local:100/vm-100-disk-0.raw.qcow2");
        assert!(data == last_bytes, "the data file is not the disk");
    }
}

#[tokio::test]
async fn vm_power_cycle_32_a_chain_goes_on_for_raw_data_with_bitmaps() {
    chain_goes_on("raw+bitmaps").await;
}

/// Bytes of the data file are changed, or all of it comes from elsewhere with the times that it had there.
#[test]
fn a_disk_that_was_written_while_the_vm_was_off_is_read_as_a_whole() {
    let place = Place::new("");
    let source = place.path("source");
    let mut expected = random_file(&source, 4 * MIB);
    let from = source.to_str().unwrap();
    place.create(&["--format", "raw+bitmaps", "--disk-from", from]);
    let data = place.path("local/images/100/vm-100-disk-0.raw.data");
    place.good_backup(&[]);
    let clean = place.good_backup(&[]);
    assert_eq!((action(&clean), moved(&clean)), ("used", 0));
    for (is_replaced, by_start) in [(false, false), (false, true), (true, false)] {
        expected[4096..][..4096].fill(if by_start { 8 } else { 9 });
        if is_replaced {
            let old = std::fs::metadata(&data).unwrap().modified().unwrap();
            let new = place.path("new");
            std::fs::write(&new, &expected).unwrap();
            std::fs::File::open(&new).unwrap().set_modified(old).unwrap();
            std::fs::rename(&new, &data).unwrap();
        } else {
            let file = std::fs::File::options().write(true).open(&data).unwrap();
            file.write_all_at(&expected, 0).unwrap();
        }
        let said = if by_start {
            let started = place.vzdump.finish(&["vm", "start", "100", "--paused"], SOON).unwrap();
            started.stdout + &started.stderr
        } else {
            String::new()
        };
        let backup = place.backup(&[]);
        let said = said + &backup.said;
        assert!(
            said.contains("the data of the disk 'scsi0' was changed while its QEMU did not run"),
            "{said}"
        );
        let guest = &backup.guest;
        assert_eq!((action(guest), moved(guest)), ("missing-recreated", 4 * MIB), "{said}");
        assert!(place.restored(guest) == expected, "another content was backed up");
        if by_start {
            place.stop_vm();
        }
        let next = place.backup(&[]);
        assert!(!next.said.contains("was changed while"), "{}", next.said);
        assert_eq!((action(&next.guest), moved(&next.guest)), ("used", 0), "{}", next.said);
    }
    // Neither is QEMU's own write one of somebody else, nor a copy of both files.
    let image = place.path("local/images/100/vm-100-disk-0.raw.qcow2");
    for path in [&data, &image] {
        let copy = place.path("copy");
        std::fs::copy(path, &copy).unwrap();
        std::fs::rename(&copy, path).unwrap();
    }
    let copied = place.good_backup(&[]);
    assert_eq!((action(&copied), moved(&copied)), ("used", 0));
}

#[tokio::test]
async fn vm_power_cycle_32_a_chain_goes_on_for_qcow2() {
    chain_goes_on("qcow2").await;
}

#[tokio::test]
async fn vm_power_cycle_32_plain_raw_is_recreated_full() {
    let place = Place::new("");
    place.create(&["--disk", "4M"]);
    place.start();
    place.good_backup(&[]);
    place.stop_vm();
    place.start();
    let next = place.good_backup(&[]);
    assert_eq!((action(&next), moved(&next)), ("missing-recreated", 4 * MIB));
}

#[test]
fn a_restore_makes_a_disk_that_keeps_bitmaps() {
    let place = Place::new("");
    let source = place.path("source");
    // 42: no multiple of anything but a sector.
    let expected = random_file(&source, 3 * MIB + 512);
    place.create(&["--disk-from", source.to_str().unwrap()]);
    place.start();
    let full = place.good_backup(&[]);
    place.stop_vm();
    let archive = format!("backups:backup/{}", full["archive"].as_str().unwrap());
    let format = ["--format", "raw+bitmaps"];
    let restored = place.run(&[&["restore", archive.as_str(), "200"], &format[..]].concat());
    let volume = restored["volumes"][0]["volume"].as_str().unwrap();
    assert_eq!(volume, "local:200/vm-200-disk-0.raw.qcow2");
    assert!(place.bytes(volume)[..expected.len()] == expected, "other data was restored");
    let list = place.run(&["storage", "list", "local"]);
    let image = list.as_array().unwrap().iter().find(|image| image["volid"] == volume).unwrap();
    assert_eq!(image["size_bytes"], 3 * MIB + 512);
    // And the format is kept by the next restore of it.
    place.run(&["vm", "destroy", "100"]);
    place.run(&["restore", &archive, "100", "--format", "raw+bitmaps"]);
    place.start();
    let guest = place.good_backup(&[]);
    place.stop_vm();
    let again = format!("backups:backup/{}", guest["archive"].as_str().unwrap());
    let kept = place.run(&["restore", &again, "201"]);
    assert_eq!(kept["volumes"][0]["volume"], "local:201/vm-201-disk-0.raw.qcow2");
}

#[test]
fn disks_on_btrfs_of_every_format_are_backed_up_and_restored() {
    let fs = LoopFs::new(Kind::Btrfs).unwrap();
    let place = Place::new(&format!("btrfs: tree\n\tpath {}\n", fs.path().display()));
    let source = place.path("source");
    random_file(&source, 4 * MIB);
    let from = source.to_str().unwrap();
    for (format, file, driver) in [
        ("raw", "vm-200-disk-0/disk.raw", "raw"),
        ("qcow2", "vm-200-disk-0.qcow2", "qcow2"),
        ("raw+bitmaps", "vm-200-disk-0/disk.raw.data", "raw"),
    ] {
        place.create(&["--storage", "tree", "--format", format, "--disk-from", from]);
        place.start();
        let guest = place.good_backup(&[]);
        place.stop_vm();
        place.assert_tidy();
        // Where they were, and as they were.
        let archive = format!("backups:backup/{}", guest["archive"].as_str().unwrap());
        place.run(&["restore", &archive, "200"]);
        let restored = fs.path().join("images/200").join(file);
        let mut command = Command::new(qemu::bin_dir().unwrap().join("qemu-img"));
        command.args(["compare", "-f", "raw", "-F", driver]).arg(&source).arg(&restored);
        assert!(command.status().unwrap().success(), "{format}");
        for vm in ["100", "200"] {
            place.run(&["vm", "destroy", vm]);
        }
        let images = place.run(&["storage", "list", "tree"]);
        assert_eq!(images, Value::Array(vec![]), "{format}");
    }
}
