// SPDX-License-Identifier: MIT OR Apache-2.0
//! Chains of increments through what happens to a VM and its disks between two backups.

use std::fs;
use std::process::Command;
use std::time::Duration;

use qmp_client::Session;
use serde_json::{Value, json};
use system_tests::qemu;

use crate::place::{MIB, Place, qemu_io, random_file, writes};

const DISK_BYTES: u64 = 8 * MIB;
const PIECE_BYTES: u64 = 64 << 10;

fn action(guest: &Value) -> &str {
    guest["volumes"][0]["bitmap_action"].as_str().unwrap()
}

fn moved(guest: &Value) -> u64 {
    guest["transferred"]["total_bytes"].as_u64().unwrap()
}

/// A VM with one disk, running; what is on it.
fn running_vm(more: &str, format: &str) -> (Place, Vec<u8>) {
    let place = Place::new(more);
    let source = place.path("source");
    let bytes = random_file(&source, DISK_BYTES);
    place.create(&["--format", format, "--disk-from", source.to_str().unwrap()]);
    place.start();
    (place, bytes)
}

/// The guest writes a piece, and the test knows it.
async fn write(session: &Session, disk: &mut [u8], pattern: u8, offset: u64, len: u64) {
    writes(session, pattern, offset, len).await;
    disk[offset as usize..][..len as usize].fill(pattern);
}

#[tokio::test]
async fn thirty_increments_38_each_restores_to_its_point_in_time() {
    let (place, mut disk) = running_vm("", "raw");
    let session = place.monitor().await;
    let mut chain = vec![(place.good_backup(&[]), disk.clone())];
    let mut random: u64 = 0x5eed_0038;
    for number in 1..=30_u8 {
        // Some sectors here and there, at times across pieces of the bitmap, at times none.
        for _ in 0..u64::from(number) % 4 {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let len = 512 * (1 + (random >> 33) % 300);
            let offset = 512 * ((random >> 13) % ((DISK_BYTES - len) / 512));
            write(&session, &mut disk, number, offset, len).await;
        }
        let next = place.good_backup(&[]);
        assert_eq!(action(&next), "used", "increment {number}");
        assert!(moved(&next) < DISK_BYTES, "increment {number}: {next}");
        assert!(number % 4 != 0 || moved(&next) == 0, "increment {number}: {next}");
        chain.push((next, disk.clone()));
    }
    for (number, (archive, expected)) in chain.iter().enumerate() {
        assert!(
            place.restored(archive) == *expected,
            "archive {number} is not of its point in time"
        );
    }
    place.assert_tidy();
}

#[tokio::test]
async fn two_targets_alternating_31_have_independent_chains() {
    let (place, mut disk) = running_vm("", "raw");
    let path = place.path("other");
    let storages = place.path("etc/storage.cfg");
    let text = fs::read_to_string(&storages).unwrap();
    fs::write(&storages, format!("{text}directory: other\n\tpath {}\n", path.display())).unwrap();
    let session = place.monitor().await;
    let to = |storage: &str| {
        let words = ["backup", "100", "--storage", storage];
        let report = place.run(&words);
        let guest = report["guests"][0].clone();
        let archive = format!("{storage}:backup/{}", guest["archive"].as_str().unwrap());
        (archive, guest)
    };
    let restored = |archive: &str| {
        let report =
            place.run(&["restore", archive, "200", "--storage", "local", "--format", "raw"]);
        let bytes = place.bytes(report["volumes"][0]["volume"].as_str().unwrap());
        place.run(&["vm", "destroy", "200"]);
        bytes
    };
    let mut archives = Vec::new();
    for round in 0..3_u8 {
        for (number, storage) in (0..).zip(["backups", "other"]) {
            let pattern = 10 * round + number;
            let offset = u64::from(pattern) * 2 * PIECE_BYTES;
            write(&session, &mut disk, pattern, offset, PIECE_BYTES).await;
            let (archive, guest) = to(storage);
            if round > 0 {
                // What was written since the last backup there: one piece before the other's, one after.
                assert_eq!((action(&guest), moved(&guest)), ("used", 2 * PIECE_BYTES), "{archive}");
            }
            archives.push((archive, disk.clone()));
        }
    }
    for (archive, expected) in archives {
        assert!(restored(&archive) == expected, "{archive} is not of its point in time");
    }
}

#[tokio::test]
async fn guest_reboot_33_keeps_the_bitmap() {
    let (place, mut disk) = running_vm("", "raw");
    let session = place.monitor().await;
    place.good_backup(&[]);
    write(&session, &mut disk, 1, 0, PIECE_BYTES).await;
    session.execute_raw("system_reset", Value::Null, None).await.unwrap();
    write(&session, &mut disk, 2, 2 * PIECE_BYTES, PIECE_BYTES).await;
    let next = place.good_backup(&[]);
    assert_eq!((action(&next), moved(&next)), ("used", 2 * PIECE_BYTES));
    assert!(place.restored(&next) == disk);
}

/// The disk goes, and another one takes its place and its name.
async fn exchange_disk(session: &Session, path: &std::path::Path) {
    let run = async |command: &str, arguments: Value| {
        session.execute_raw(command, arguments, None).await.unwrap()
    };
    let nodes = run("query-named-block-nodes", Value::Null).await;
    let names: Vec<String> = nodes
        .as_array()
        .unwrap()
        .iter()
        .map(|node| node["node-name"].as_str().unwrap().to_owned())
        .filter(|name| name.ends_with("scsi0"))
        .collect();
    run("device_del", json!({ "id": "scsi0" })).await;
    for name in &names {
        // Its users are above it and go first; the guest must not have let go of the device yet.
        for _ in 0..100 {
            let arguments = json!({ "node-name": name });
            if session.execute_raw("blockdev-del", arguments, None).await.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let top = names.iter().find(|name| name.starts_with("drive-")).unwrap();
    let file = json!({ "driver": "file", "filename": path });
    run("blockdev-add", json!({ "driver": "raw", "node-name": top, "file": file })).await;
    let bus = json!({ "driver": "scsi-hd", "id": "scsi0", "drive": top, "share-rw": false });
    run("device_add", bus).await;
}

#[tokio::test]
async fn other_disk_in_the_same_slot_34_is_copied_whole() {
    let (place, mut disk) = running_vm("", "raw");
    place.good_backup(&[]);
    let session = place.monitor().await;
    let other = place.path("local/images/100/vm-100-disk-9.raw");
    // Of the same size, so that only the bitmap can tell.
    disk.reverse();
    fs::write(&other, &disk).unwrap();
    exchange_disk(&session, &other).await;
    let config = place.path("etc/qemu-server/100.conf");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("vm-100-disk-0.raw", "vm-100-disk-9.raw")).unwrap();
    let next = place.good_backup(&[]);
    assert_eq!((action(&next), moved(&next)), ("missing-recreated", DISK_BYTES));
    assert!(place.restored(&next) == disk, "the other disk is not in the archive");
}

#[tokio::test]
async fn live_resize_35_is_copied_whole_with_the_new_area() {
    for format in ["raw", "qcow2"] {
        let (place, mut disk) = running_vm("", format);
        place.good_backup(&[]);
        let session = place.monitor().await;
        let size = DISK_BYTES + 3 * MIB + 512;
        let node = "drive-scsi0";
        let arguments = json!({ "node-name": node, "size": size });
        session.execute_raw("block_resize", arguments, None).await.unwrap();
        disk.resize(size as usize, 0);
        write(&session, &mut disk, 5, size - 1536, 1536).await;
        let next = place.good_backup(&[]);
        assert_eq!(next["volumes"][0]["size_bytes"], size, "{format}");
        // The provider asks for no bitmap of a disk that had another size.
        assert_eq!((action(&next), moved(&next)), ("new", size), "{format}");
        assert!(
            place.restored(&next)[..size as usize] == disk,
            "{format}: other data was restored"
        );
        // And it goes on from there.
        write(&session, &mut disk, 6, DISK_BYTES, 512).await;
        let last = place.good_backup(&[]);
        assert_eq!(action(&last), "used", "{format}");
        assert!(
            place.restored(&last)[..size as usize] == disk,
            "{format}: other data was restored"
        );
    }
}

/// QEMU's own programs refuse to go back behind a bitmap; whoever removes the bitmaps to do so gets a
/// full backup.
#[tokio::test]
async fn snapshot_rollback_37_never_reuses_the_bitmap() {
    let (place, disk) = running_vm("", "qcow2");
    let image = place.path("local/images/100/vm-100-disk-0.qcow2");
    place.stop_vm();
    let qemu_img = || Command::new(qemu::bin_dir().unwrap().join("qemu-img"));
    let snapshot =
        |how: &str| qemu_img().args(["snapshot", how, "before"]).arg(&image).output().unwrap();
    assert!(snapshot("-c").status.success());
    place.start();
    place.good_backup(&[]);
    let session = place.monitor().await;
    writes(&session, 1, 0, PIECE_BYTES).await;
    qemu_io(&session, "flush").await;
    place.good_backup(&[]);
    drop(session);
    place.stop_vm();

    let refused = snapshot("-a");
    let why = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && why.contains("bitmap"), "{why}");
    let info = qemu_img().args(["info", "--output", "json"]).arg(&image).output().unwrap();
    let info: Value = serde_json::from_slice(&info.stdout).unwrap();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().unwrap();
    assert!(!bitmaps.is_empty(), "{info}");
    for bitmap in bitmaps {
        let name = bitmap["name"].as_str().unwrap();
        let removed =
            qemu_img().args(["bitmap", "--remove"]).arg(&image).arg(name).status().unwrap();
        assert!(removed.success());
    }
    assert!(snapshot("-a").status.success());
    place.start();
    let next = place.good_backup(&[]);
    assert_eq!((action(&next), moved(&next)), ("missing-recreated", DISK_BYTES));
    assert!(place.restored(&next) == disk, "the backup is not what was gone back to");
}
