// SPDX-License-Identifier: MIT OR Apache-2.0
//! Faults of QEMU's own filter, or of the commands that were built on it, which ours must not
//! have. The read in flight while a snapshot breaks is in `fleecing_faults.rs`, the common point in
//! time of two disks in `fleecing.rs`.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::Write as _;
use std::time::Instant;

use provider_nbd::{Client, Errno};
use serde_json::{Value, json};
use system_tests::storage::{
    Storage, expect, fill, next_event, raw_node, refused, space_bytes, until,
};

const DISK_BYTES: u64 = 4 << 20;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const OLD: u8 = 0x11;
const NEW: u8 = 0x22;

/// A storage daemon whose disk is full of [`OLD`].
async fn one_disk() -> (Storage, Client) {
    let storage = Storage::start().await.unwrap();
    storage.disk("disk0", DISK_BYTES).await.unwrap();
    storage.disk("disk0-fleecing", DISK_BYTES).await.unwrap();
    storage.export_disk("disk0", None).await.unwrap();
    let guest = storage.client("disk0").await.unwrap();
    fill(&guest, OLD, 0, DISK_BYTES).await.unwrap();
    (storage, guest)
}

#[tokio::test]
async fn a_disk_whose_bitmap_is_exported_is_not_resized() {
    let (storage, guest) = one_disk().await;
    let infos = storage.setup(json!([{ "device": "disk0", "bitmap-mode": "new" }])).await.unwrap();
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    let filter = storage.filter_of(&infos[0]).await.unwrap();
    let snapshot_node = infos[0]["node-name"].as_str().unwrap();
    for node in ["disk0", &filter, snapshot_node] {
        for size in [2 * DISK_BYTES, DISK_BYTES / 2, DISK_BYTES - 512, 0] {
            let arguments = json!({ "node-name": node, "size": size });
            let result = storage.try_run("block_resize", arguments).await;
            assert!(result.is_err(), "{node} to {size}");
        }
    }
    assert_eq!(std::fs::metadata(storage.path("disk0")).unwrap().len(), DISK_BYTES);
    fill(&guest, NEW, DISK_BYTES - MIB, MIB).await.unwrap();
    expect(&snapshot, OLD, DISK_BYTES - MIB, MIB).await.unwrap();
    storage.teardown(true).await.unwrap();
    // Afterwards it may be, and the bitmap notices.
    let larger = json!({ "node-name": "disk0", "size": 2 * DISK_BYTES });
    storage.run("block-export-del", json!({ "id": "guest-disk0", "mode": "hard" })).await.unwrap();
    until("the disk is resized", async || {
        Ok(storage.try_run("block_resize", larger.clone()).await.is_ok())
    })
    .await
    .unwrap();
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn discards_of_the_guest_reach_the_disk() {
    for released in [true, false] {
        let (storage, guest) = one_disk().await;
        let disk = storage.path("disk0");
        let full = space_bytes(&disk).unwrap();
        assert!(full >= DISK_BYTES);
        let infos = storage.setup(json!([{ "device": "disk0" }])).await.unwrap();
        let snapshot = storage.snapshot(&infos[0]).await.unwrap();
        // What is saved need not be saved again: the discard passes at once.
        fill(&guest, NEW, 0, MIB).await.unwrap();
        guest.trim(0, MIB).await.unwrap();
        until("a hole", async || Ok(space_bytes(&disk)? <= full - MIB)).await.unwrap();
        // The rest may wait until the reader has taken it.
        guest.trim(2 * MIB, 2 * MIB).await.unwrap();
        expect(&snapshot, OLD, 0, DISK_BYTES).await.unwrap();
        if released {
            snapshot.trim(0, DISK_BYTES).await.unwrap();
            guest.trim(MIB, MIB).await.unwrap();
        }
        storage.teardown(true).await.unwrap();
        let left = if released { 0 } else { MIB };
        until("holes", async || Ok(space_bytes(&disk)? <= left)).await.unwrap();
        storage.quit().await.unwrap();
    }
}

#[tokio::test]
async fn a_discard_that_waits_never_hits_what_was_written_after_it() {
    let (storage, guest) = one_disk().await;
    let infos = storage.setup(json!([{ "device": "disk0" }])).await.unwrap();
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    guest.trim(0, DISK_BYTES).await.unwrap();
    for offset in (0..DISK_BYTES).step_by(128 << 10) {
        fill(&guest, NEW, offset + 512, 9 * KIB).await.unwrap();
    }
    expect(&snapshot, OLD, 0, DISK_BYTES).await.unwrap();
    snapshot.trim(0, DISK_BYTES / 2).await.unwrap();
    for offset in (0..DISK_BYTES).step_by(128 << 10) {
        expect(&guest, NEW, offset + 512, 9 * KIB).await.unwrap();
    }
    storage.teardown(true).await.unwrap();
    for offset in (0..DISK_BYTES).step_by(128 << 10) {
        expect(&guest, NEW, offset + 512, 9 * KIB).await.unwrap();
    }
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn trims_of_single_granules_free_memory_and_spare_the_guest() {
    for buffer_bytes in [0, 64 * MIB] {
        let (storage, guest) = one_disk().await;
        let device = json!({ "device": "disk0", "buffer-size": buffer_bytes });
        let infos = storage.setup(json!([device])).await.unwrap();
        let snapshot = storage.snapshot(&infos[0]).await.unwrap();
        // Not yet saved: it need not be any more.
        for number in 0..16 {
            snapshot.trim(number * 64 * KIB, 4096).await.unwrap();
            assert_eq!(storage.count(0, "released").await.unwrap(), (number + 1) * 4096);
        }
        for number in 0..16 {
            fill(&guest, NEW, number * 64 * KIB, 4096).await.unwrap();
            refused(&snapshot, Errno::EPERM, number * 64 * KIB, 512).await.unwrap();
            expect(&snapshot, OLD, number * 64 * KIB + 4096, 60 * KIB).await.unwrap();
        }
        assert_eq!(storage.count(0, "captured").await.unwrap(), 0);
        // Saved: it is dropped.
        fill(&guest, NEW, 2 * MIB, 64 * KIB).await.unwrap();
        for number in 0..16 {
            snapshot.trim(2 * MIB + number * 4096, 4096).await.unwrap();
        }
        let status = storage.status(0).await.unwrap();
        assert_eq!((&status["in-ram"], &status["in-log"]), (&json!(0), &json!(0)), "{status}");
        assert_eq!(status["captured"], 64 * KIB);
        storage.teardown(true).await.unwrap();
        storage.quit().await.unwrap();
    }
}

#[tokio::test]
async fn trims_that_cover_a_granule_together_release_it() {
    for (step, order) in [(512, [0, 2, 4, 6, 7, 5, 3, 1].as_slice()), (2048, &[1, 0])] {
        let (storage, guest) = one_disk().await;
        let infos = storage.setup(json!([{ "device": "disk0" }])).await.unwrap();
        let snapshot = storage.snapshot(&infos[0]).await.unwrap();
        for granule in [4096, MIB] {
            for (number, part) in order.iter().enumerate() {
                if number == order.len() - 1 {
                    // One part is missing: all is there, saved or not.
                    expect(&snapshot, OLD, granule, 4096).await.unwrap();
                }
                snapshot.trim(granule + part * step, step).await.unwrap();
            }
            refused(&snapshot, Errno::EPERM, granule, 512).await.unwrap();
            fill(&guest, NEW, granule, 4096).await.unwrap();
        }
        // One trim that begins and ends within granules, then what it left of them.
        snapshot.trim(2 * MIB + 512, 12 * KIB).await.unwrap();
        assert_eq!(storage.count(0, "released").await.unwrap(), 4 * 4096);
        snapshot.trim(2 * MIB, 512).await.unwrap();
        snapshot.trim(2 * MIB + 12 * KIB + 512, 4096 - 512).await.unwrap();
        assert_eq!(storage.count(0, "released").await.unwrap(), 6 * 4096);
        assert_eq!(storage.count(0, "captured").await.unwrap(), 0);
        storage.teardown(true).await.unwrap();
        storage.quit().await.unwrap();
    }
}

#[tokio::test]
async fn a_write_of_4_kib_moves_4_kib() {
    const WRITES: u64 = 256;
    for buffer_bytes in [0, 64 * MIB] {
        let storage = Storage::start().await.unwrap();
        let size_bytes = WRITES * 64 * KIB;
        storage.disk("disk0", size_bytes).await.unwrap();
        storage.disk("disk0-fleecing", size_bytes).await.unwrap();
        storage.export_disk("disk0", None).await.unwrap();
        let guest = storage.client("disk0").await.unwrap();
        fill(&guest, OLD, 0, size_bytes).await.unwrap();
        let device = json!({ "device": "disk0", "buffer-size": buffer_bytes });
        let infos = storage.setup(json!([device])).await.unwrap();
        let snapshot = storage.snapshot(&infos[0]).await.unwrap();
        for number in 0..WRITES {
            // Not in order, and each in a cluster of its own.
            let cluster = number * 77 % WRITES;
            fill(&guest, NEW, cluster * 64 * KIB + 8 * KIB, 4096).await.unwrap();
        }
        assert_eq!(storage.count(0, "captured").await.unwrap(), WRITES * 4096);
        let image = space_bytes(&storage.path("disk0-fleecing")).unwrap();
        assert!(image <= WRITES * 4096 * 3 / 2, "{image} bytes in the fleecing image");
        expect(&snapshot, OLD, 0, size_bytes).await.unwrap();
        storage.teardown(true).await.unwrap();
        storage.quit().await.unwrap();
    }
}

#[tokio::test]
async fn a_setup_that_fails_at_the_last_disk_leaves_nothing() {
    let (storage, guest) = one_disk().await;
    for (disk, iothread) in [("disk1", Some("io1")), ("disk2", None)] {
        storage.iothread(&format!("{disk}-thread")).await.unwrap();
        storage.disk(disk, DISK_BYTES).await.unwrap();
        storage.disk(&format!("{disk}-fleecing"), DISK_BYTES).await.unwrap();
        let thread = iothread.map(|_| format!("{disk}-thread"));
        storage.export_disk(disk, thread.as_deref()).await.unwrap();
    }
    storage.disk("mirror", DISK_BYTES).await.unwrap();
    let other = storage.client("disk1").await.unwrap();
    let job = json!({ "job-id": "job", "device": "disk2", "target": "mirror", "sync": "none" });
    storage.run("blockdev-mirror", job).await.unwrap();
    let before = storage.graph().await.unwrap();
    let error = storage.setup(json!([])).await.unwrap_err();
    assert!(format!("{error:#}").contains("empty"), "{error:#}");
    for last in [
        // QEMU refuses the switch of a disk that a job writes to as well.
        json!({ "device": "disk2" }),
        json!({ "device": "nothing" }),
        json!({ "device": "disk2", "fleecing": "disk0-fleecing" }),
        json!({ "device": "disk0", "fleecing": "disk2-fleecing" }),
    ] {
        let devices = json!([
            { "device": "disk0", "bitmap-mode": "new" },
            { "device": "disk1", "bitmap-mode": "use" },
            last,
        ]);
        assert!(storage.setup(devices.clone()).await.is_err(), "{devices}");
        assert_eq!(storage.graph().await.unwrap(), before, "after {devices}");
        for disk in ["disk0", "disk1", "disk2"] {
            assert_eq!(storage.bitmaps(disk).await.unwrap(), [] as [String; 0]);
        }
        assert_eq!(storage.run("query-backup-access", json!({})).await.unwrap(), json!([]));
        fill(&guest, OLD, 0, DISK_BYTES).await.unwrap();
        fill(&other, OLD, 0, DISK_BYTES).await.unwrap();
    }
    let again = json!([{ "device": "disk0", "bitmap-mode": "use" }, { "device": "disk1" }]);
    let infos = storage.setup(again).await.unwrap();
    assert_eq!(infos[0]["bitmap-action"], "missing-recreated");
    storage.teardown(true).await.unwrap();
    storage.quit().await.unwrap();
}

/// A disk of 4 GiB of which 1 GiB holds data.
fn sparse_disk(path: &std::path::Path) {
    let mut file = std::fs::File::create(path).unwrap();
    let piece = vec![OLD; MIB as usize];
    for _ in 0..GIB / MIB {
        file.write_all(&piece).unwrap();
    }
    file.set_len(4 * GIB).unwrap();
}

#[tokio::test]
async fn a_discard_of_the_whole_disk_does_not_copy_it() {
    let storage = Storage::start().await.unwrap();
    sparse_disk(&storage.path("disk0"));
    storage.node(storage.file_node("disk0-file", "disk0")).await.unwrap();
    storage.node(raw_node("disk0", "disk0-file")).await.unwrap();
    storage.disk("disk0-fleecing", 4 * GIB).await.unwrap();
    storage.export_disk("disk0", None).await.unwrap();
    let guest = storage.client("disk0").await.unwrap();
    let infos = storage.setup(json!([{ "device": "disk0" }])).await.unwrap();
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    let mut longest = std::time::Duration::ZERO;
    let start = Instant::now();
    for offset in (0..4 * GIB).step_by(GIB as usize / 2) {
        let start = Instant::now();
        guest.trim(offset, GIB / 2).await.unwrap();
        longest = longest.max(start.elapsed());
    }
    println!("4 GiB discarded in {:?}, one request at most {longest:?}", start.elapsed());
    let status = storage.status(0).await.unwrap();
    println!("{status}");
    assert!(status["captured"].as_u64().unwrap() < GIB / 16, "{status}");
    for offset in [0, GIB / 2 - MIB, GIB - MIB] {
        expect(&snapshot, OLD, offset, MIB).await.unwrap();
    }
    expect(&snapshot, 0, 3 * GIB, MIB).await.unwrap();
    snapshot.trim(0, 4 * GIB).await.unwrap();
    storage.teardown(true).await.unwrap();
    let disk = storage.path("disk0");
    until("the disk is empty", async || Ok(space_bytes(&disk)? < 64 * MIB)).await.unwrap();
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn a_broken_snapshot_says_so_in_event_and_query_with_an_error_clients_understand() {
    let (storage, guest) = one_disk().await;
    storage.disk("image", DISK_BYTES).await.unwrap();
    let rule = json!({ "event": "none", "iotype": "write", "errno": 5, "once": false });
    let node = json!({ "driver": "blkdebug", "node-name": "bad-image", "image": "image",
                       "inject-error": [rule] });
    storage.node(node).await.unwrap();
    let mut events = storage.session().events();
    let device: Value = json!({ "device": "disk0", "fleecing": "bad-image", "buffer-size": 0,
                                "timeout": 1 });
    let infos = storage.setup(json!([device])).await.unwrap();
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    fill(&guest, NEW, 0, 4096).await.unwrap();
    let event = next_event(&mut events, "BACKUP_ACCESS_BROKEN").await.unwrap();
    let status = storage.status(0).await.unwrap();
    assert_eq!(event["error"], status["error"]);
    // Not the error of a request that makes no sense.
    refused(&snapshot, Errno::EIO, MIB, 4096).await.unwrap();
    storage.teardown(false).await.unwrap();
    storage.quit().await.unwrap();
}
