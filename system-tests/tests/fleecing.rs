// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a snapshot shows while its guest goes on: old data whatever is written, denial outside the
//! dirty areas, release, odd sizes, several connections, disks and threads, and ends of all kinds.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use bytes::Bytes;
use provider_nbd::{Client, Errno, ZeroOptions, context};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};
use system_tests::storage::{Connection, LIMIT, Storage, expect, fill, raw_node, refused, until};
use tokio::task::JoinSet;

const DISK_BYTES: u64 = 4 << 20;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A storage daemon with `disk0`, its fleecing image and its export.
async fn one_disk(size_bytes: u64) -> (Storage, Client) {
    let storage = Storage::start().await.unwrap();
    storage.disk("disk0", size_bytes).await.unwrap();
    storage.disk("disk0-fleecing", size_bytes).await.unwrap();
    storage.export_disk("disk0", None).await.unwrap();
    let guest = storage.client("disk0").await.unwrap();
    (storage, guest)
}

/// A guest's disk in memory beside the real one.
struct Mirror {
    guest: Client,
    bytes: Vec<u8>,
}

impl Mirror {
    /// Every 512 bytes of the disk differ from their neighbours, and a third is zero.
    async fn filled(guest: Client) -> Self {
        let mut bytes = vec![0; guest.size_bytes() as usize];
        for (sector, piece) in bytes.chunks_mut(512).enumerate() {
            piece.fill(if sector / 100 % 3 == 2 { 0 } else { (sector % 251 + 1) as u8 });
        }
        guest.write(0, Bytes::from(bytes.clone()), false).await.unwrap();
        Self { guest, bytes }
    }

    async fn write(&mut self, pattern: u8, offset: u64, len: u64) {
        fill(&self.guest, pattern, offset, len).await.unwrap();
        self.bytes[offset as usize..(offset + len) as usize].fill(pattern);
    }

    async fn zero(&mut self, offset: u64, len: u64) {
        self.guest.write_zeroes(offset, len, ZeroOptions::default()).await.unwrap();
        self.bytes[offset as usize..(offset + len) as usize].fill(0);
    }

    async fn check(&self) {
        assert_same(&self.guest, &self.bytes).await;
    }
}

/// Compares everything, in pieces that are not those of the writes.
async fn assert_same(client: &Client, bytes: &[u8]) {
    const PIECE: usize = 300 * 512;
    assert_eq!(client.size_bytes(), bytes.len() as u64);
    for (index, wanted) in bytes.chunks(PIECE).enumerate() {
        let offset = index * PIECE;
        let found = client.read(offset as u64, wanted.len()).await.unwrap();
        let wrong = found.iter().zip(wanted).position(|(found, wanted)| found != wanted);
        assert_eq!(wrong.map(|at| offset + at), None, "first wrong byte");
    }
}

/// Overlapping guest writes whose ends are nowhere near a granule's.
const ODD_WRITES: [(u64, u64); 9] = [
    (0, 512),
    (512, 1024),
    (3 * KIB + 512, 1536),
    (60 * KIB + 512, 9 * KIB),
    (64 * KIB, 64 * KIB),
    (100 * KIB, 200 * KIB + 512),
    (MIB - 512, 1024),
    (2 * MIB + 3 * 512, 700 * KIB + 512),
    (DISK_BYTES - 512, 512),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_client_cannot_write_to_a_snapshot_22() {
    let (storage, guest) = one_disk(MIB).await;
    let disk = Mirror::filled(guest).await;
    let infos = storage.setup(json!([{ "device": "disk0" }])).await.unwrap();
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    for force in [false, true] {
        let written = snapshot.write(64 * KIB, Bytes::from(vec![0xee; 4096]), force).await;
        assert!(written.is_err(), "a write of a client was taken");
    }
    let options = ZeroOptions::default();
    assert!(snapshot.write_zeroes(0, 4096, options).await.is_err(), "zeroes were taken");
    assert_same(&snapshot, &disk.bytes).await;
    disk.check().await;
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn old_data_stays_readable_around_guest_writes_of_odd_sizes() {
    for (format, buffer_bytes) in [("raw", 64 * MIB), ("raw", 0), ("qcow2", 0)] {
        let (storage, guest) = one_disk(DISK_BYTES).await;
        let mut disk = Mirror::filled(guest).await;
        if format == "qcow2" {
            let create = json!({ "driver": "qcow2", "file": "disk0-fleecing-file",
                                 "size": DISK_BYTES });
            storage.run("blockdev-del", json!({ "node-name": "disk0-fleecing" })).await.unwrap();
            let create = json!({ "job-id": "create", "options": create });
            storage.run("blockdev-create", create).await.unwrap();
            until("the image is made", async || {
                let jobs = storage.run("query-jobs", json!({})).await?;
                Ok(jobs[0]["status"] == "concluded" && jobs[0].get("error").is_none())
            })
            .await
            .unwrap();
            storage.run("job-dismiss", json!({ "id": "create" })).await.unwrap();
            let mut node = raw_node("disk0-fleecing", "disk0-fleecing-file");
            node["driver"] = json!("qcow2");
            storage.node(node).await.unwrap();
        }
        let device = json!({ "device": "disk0", "buffer-size": buffer_bytes });
        let infos = storage.setup(json!([device])).await.unwrap();
        let old = disk.bytes.clone();
        let snapshot = storage.snapshot(&infos[0]).await.unwrap();
        assert_same(&snapshot, &old).await;
        for (number, (offset, len)) in ODD_WRITES.into_iter().enumerate() {
            disk.write(0xc0 + number as u8, offset, len).await;
            // Around what was written just now, and all of it.
            let start = offset.saturating_sub(512);
            let end = (offset + len + 512).min(DISK_BYTES);
            let found = snapshot.read(start, (end - start) as usize).await.unwrap();
            assert_eq!(found[..], old[start as usize..end as usize], "around {offset}+{len}");
        }
        disk.zero(3 * MIB + 512, 100 * KIB).await;
        disk.zero(200 * KIB, 64 * KIB).await;
        for (number, (offset, len)) in ODD_WRITES.into_iter().enumerate() {
            disk.write(0xd0 + number as u8, offset, len).await;
        }
        assert_same(&snapshot, &old).await;
        disk.check().await;
        storage.teardown(true).await.unwrap();
        disk.check().await;
        drop((snapshot, disk));
        storage.quit().await.unwrap();
    }
}

#[tokio::test]
async fn clean_areas_are_denied_but_have_a_status_and_cost_nothing() {
    let (storage, guest) = one_disk(DISK_BYTES).await;
    fill(&guest, 0x11, 0, DISK_BYTES).await.unwrap();
    let request = json!([{ "device": "disk0", "bitmap-mode": "use" }]);
    storage.setup(request.clone()).await.unwrap();
    storage.teardown(true).await.unwrap();
    // 64 KiB at 1 MiB are dirty, and the granularity makes 64 KiB of one byte at 2 MiB.
    fill(&guest, 0x22, MIB, 64 * KIB).await.unwrap();
    fill(&guest, 0x22, 2 * MIB + 512, 512).await.unwrap();
    let infos = storage.setup(request).await.unwrap();
    assert_eq!((&infos[0]["bitmap-action"], &infos[0]["dirty"]), (&json!("used"), &json!(131_072)));
    let name = storage.export_snapshot(&infos[0]).await.unwrap();
    let dirty = context::dirty_bitmap(infos[0]["bitmap-name"].as_str().unwrap());
    let contexts = [context::BASE_ALLOCATION, &dirty];
    let how = Connection { contexts: &contexts, timeout: LIMIT };
    let snapshot = storage.client_with(&name, how).await.unwrap();
    for (offset, len) in [(0, 4096), (MIB - 4096, 4096), (MIB + 64 * KIB, 512), (3 * MIB, MIB)] {
        refused(&snapshot, Errno::EPERM, offset, len).await.unwrap();
    }
    // A part that is clean spoils the whole request.
    refused(&snapshot, Errno::EPERM, MIB - 4096, 8192).await.unwrap();

    for context in [context::BASE_ALLOCATION, &dirty] {
        let mut extents = snapshot.extents(context, 0, DISK_BYTES);
        let (mut end, mut marked) = (0, 0);
        while let Some(extent) = extents.next().await.unwrap() {
            assert_eq!(extent.offset, end, "{context}");
            end = extent.end();
            // Both contexts would say so by this flag: a hole, or dirty.
            marked += if extent.flags & 1 != 0 { extent.len } else { 0 };
            assert!(context == dirty || extent.flags & context::ZERO == 0, "{extent:?}");
        }
        assert_eq!(end, DISK_BYTES);
        assert_eq!(marked, if context == dirty { 128 * KIB } else { 0 }, "{context}");
    }

    fill(&guest, 0x33, 3 * MIB, MIB).await.unwrap();
    assert_eq!(storage.count(0, "captured").await.unwrap(), 0, "clean areas are not saved");
    fill(&guest, 0x33, 0, 3 * MIB).await.unwrap();
    assert_eq!(storage.count(0, "captured").await.unwrap(), 128 * KIB);
    expect(&snapshot, 0x22, MIB, 64 * KIB).await.unwrap();
    expect(&snapshot, 0x22, 2 * MIB + 512, 512).await.unwrap();
    refused(&snapshot, Errno::EPERM, 3 * MIB, MIB).await.unwrap();
    assert_eq!(storage.status(0).await.unwrap()["state"], "active");
    storage.teardown(false).await.unwrap();
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn nothing_is_saved_after_its_release() {
    for buffer_bytes in [0, MIB] {
        let (storage, guest) = one_disk(DISK_BYTES).await;
        fill(&guest, 0x41, 0, DISK_BYTES).await.unwrap();
        let device = json!({ "device": "disk0", "buffer-size": buffer_bytes });
        let infos = storage.setup(json!([device])).await.unwrap();
        let snapshot = storage.snapshot(&infos[0]).await.unwrap();
        fill(&guest, 0x42, 0, MIB).await.unwrap();
        let before = storage.count(0, "captured").await.unwrap();
        assert_eq!(before, MIB);
        for start in (0..DISK_BYTES).step_by(256 << 10) {
            expect(&snapshot, 0x41, start, 256 * KIB).await.unwrap();
            snapshot.trim(start, 256 * KIB).await.unwrap();
            refused(&snapshot, Errno::EPERM, start, 256 * KIB).await.unwrap();
        }
        for pattern in [0x43, 0x44] {
            fill(&guest, pattern, 0, DISK_BYTES).await.unwrap();
        }
        guest.trim(0, DISK_BYTES).await.unwrap();
        let status = storage.status(0).await.unwrap();
        assert_eq!(
            (&status["captured"], &status["released"]),
            (&json!(before), &json!(DISK_BYTES))
        );
        assert_eq!((&status["in-ram"], &status["in-log"]), (&json!(0), &json!(0)), "{status}");
        storage.teardown(true).await.unwrap();
        storage.quit().await.unwrap();
    }
}

#[tokio::test]
async fn odd_ends_of_disks_are_saved_and_read() {
    for tail in [512, 4096 - 512, 4096 + 512, 64 * KIB - 512] {
        for (iothread, buffer_bytes) in [(false, MIB), (true, 0)] {
            let size_bytes = MIB + tail;
            let storage = Storage::start().await.unwrap();
            storage.iothread("io0").await.unwrap();
            storage.disk("disk0", size_bytes).await.unwrap();
            storage.disk("disk0-fleecing", size_bytes).await.unwrap();
            storage.export_disk("disk0", iothread.then_some("io0")).await.unwrap();
            let mut disk = Mirror::filled(storage.client("disk0").await.unwrap()).await;
            let device = json!({ "device": "disk0", "buffer-size": buffer_bytes });
            let infos = storage.setup(json!([device])).await.unwrap();
            assert_eq!(infos[0]["size"], size_bytes);
            let snapshot = storage.snapshot(&infos[0]).await.unwrap();
            let old = disk.bytes.clone();
            disk.write(0x51, size_bytes - 512, 512).await;
            assert_same(&snapshot, &old).await;
            disk.write(0x52, 0, size_bytes).await;
            assert_same(&snapshot, &old).await;
            let saved = storage.count(0, "captured").await.unwrap();
            let saved = saved + storage.count(0, "zero").await.unwrap();
            assert!((size_bytes..=size_bytes.next_multiple_of(4096)).contains(&saved), "{saved}");
            snapshot.trim(0, size_bytes).await.unwrap();
            refused(&snapshot, Errno::EPERM, size_bytes - 512, 512).await.unwrap();
            disk.check().await;
            storage.teardown(true).await.unwrap();
            storage.quit().await.unwrap();
        }
    }
}

#[tokio::test]
async fn overlapping_writes_of_several_connections_save_the_old_data_once() {
    for (iothread, buffer_bytes) in [(None, 0), (Some("io0"), 256 * KIB)] {
        let storage = Storage::start().await.unwrap();
        storage.iothread("io0").await.unwrap();
        storage.disk("disk0", DISK_BYTES).await.unwrap();
        storage.disk("disk0-fleecing", DISK_BYTES).await.unwrap();
        storage.export_disk("disk0", iothread).await.unwrap();
        let disk = Mirror::filled(storage.client("disk0").await.unwrap()).await;
        let device = json!({ "device": "disk0", "buffer-size": buffer_bytes });
        let infos = storage.setup(json!([device])).await.unwrap();
        let mut writers = JoinSet::new();
        for number in 0..6_u64 {
            let guest = storage.client("disk0").await.unwrap();
            writers.spawn(async move {
                let mut rng = StdRng::seed_from_u64(number);
                for _ in 0..150 {
                    let len = rng.random_range(1..200) * 512;
                    let offset = rng.random_range(0..(DISK_BYTES - len) / 512) * 512;
                    fill(&guest, 0x60 + number as u8, offset, len).await.unwrap();
                }
            });
        }
        let snapshot = storage.snapshot(&infos[0]).await.unwrap();
        while !writers.is_empty() {
            assert_same(&snapshot, &disk.bytes).await;
            while let Some(done) = writers.try_join_next() {
                done.unwrap();
            }
        }
        assert_same(&snapshot, &disk.bytes).await;
        let captured = storage.count(0, "captured").await.unwrap();
        assert!(captured <= DISK_BYTES, "{captured}");
        storage.teardown(true).await.unwrap();
        storage.quit().await.unwrap();
    }
}

/// Two disks in threads of their own, and their guests' connections.
async fn two_disks() -> (Storage, [Client; 2]) {
    let storage = Storage::start().await.unwrap();
    let mut guests = Vec::new();
    for (disk, iothread) in [("disk0", "io0"), ("disk1", "io1")] {
        storage.iothread(iothread).await.unwrap();
        storage.disk(disk, DISK_BYTES).await.unwrap();
        storage.disk(&format!("{disk}-fleecing"), DISK_BYTES).await.unwrap();
        storage.export_disk(disk, Some(iothread)).await.unwrap();
        guests.push(storage.client(disk).await.unwrap());
    }
    (storage, guests.try_into().unwrap())
}

#[tokio::test]
async fn one_access_serves_disks_in_two_threads() {
    let (storage, guests) = two_disks().await;
    let before = storage.graph().await.unwrap();
    for round in 1..=10 {
        for (guest, pattern) in guests.iter().zip([round, round + 0x80]) {
            fill(guest, pattern, 0, DISK_BYTES).await.unwrap();
        }
        let devices = json!([{ "device": "disk0", "buffer-size": 0 }, { "device": "disk1" }]);
        let infos = storage.setup(devices).await.unwrap();
        let readers = [&infos[0], &infos[1]];
        let snapshots = [
            storage.snapshot(readers[0]).await.unwrap(),
            storage.snapshot(readers[1]).await.unwrap(),
        ];
        let write = |guest: Client| async move {
            for offset in (0..DISK_BYTES).step_by(96 << 10) {
                let len = (96 * KIB).min(DISK_BYTES - offset);
                fill(&guest, 0xff, offset, len).await.unwrap();
            }
        };
        let writers = guests.clone().map(|guest| tokio::spawn(write(guest)));
        for _ in 0..2 {
            expect(&snapshots[0], round, 0, DISK_BYTES).await.unwrap();
            expect(&snapshots[1], round + 0x80, 0, DISK_BYTES).await.unwrap();
        }
        for writer in writers {
            writer.await.unwrap();
        }
        expect(&snapshots[0], round, 0, DISK_BYTES).await.unwrap();
        expect(&snapshots[1], round + 0x80, 0, DISK_BYTES).await.unwrap();
        storage.teardown(round % 2 == 0).await.unwrap();
        assert_eq!(storage.graph().await.unwrap(), before);
    }
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn the_snapshot_never_shows_the_second_write_without_the_first() {
    let (storage, [first, second]) = two_disks().await;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let writer = tokio::spawn(async move {
        let mut stopped = stopped;
        let mut number = 0_u64;
        while stopped.try_recv() == Err(tokio::sync::oneshot::error::TryRecvError::Empty) {
            number += 1;
            for guest in [&first, &second] {
                let mut sector = [0; 512];
                sector[..8].copy_from_slice(&number.to_le_bytes());
                guest.write(0, Bytes::copy_from_slice(&sector), false).await.unwrap();
            }
        }
        number
    });
    let mut last = 0;
    for _ in 0..50 {
        // The later disk first: a switch one by one would find it newer.
        let infos = storage.setup(json!([{ "device": "disk0" }, { "device": "disk1" }])).await;
        let infos = infos.unwrap();
        let mut numbers = Vec::new();
        for info in infos.iter().rev() {
            let snapshot = storage.snapshot(info).await.unwrap();
            let sector = snapshot.read(0, 512).await.unwrap();
            numbers.push(u64::from_le_bytes(sector[..8].try_into().unwrap()));
        }
        let (second, first) = (numbers[0], numbers[1]);
        assert!(second == first || second + 1 == first, "disks at {first} and {second}");
        assert!(first >= last, "{first} after {last}");
        last = first;
        storage.teardown(true).await.unwrap();
    }
    stop.send(()).unwrap();
    assert!(writer.await.unwrap() > 50);
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn the_thread_of_a_disk_may_change_and_its_export_end() {
    let (storage, guest) = one_disk(DISK_BYTES).await;
    for iothread in ["io0", "io1"] {
        storage.iothread(iothread).await.unwrap();
    }
    fill(&guest, 0x71, 0, DISK_BYTES).await.unwrap();
    drop(guest);
    let infos = storage.setup(json!([{ "device": "disk0" }])).await.unwrap();
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    let filter = storage.filter_of(&infos[0]).await.unwrap();
    for (round, iothread) in ["io0", "io1", "io0"].into_iter().enumerate() {
        storage
            .run("block-export-del", json!({ "id": "guest-disk0", "mode": "hard" }))
            .await
            .unwrap();
        until("the export is gone", async || {
            let exports = storage.run("query-block-exports", json!({})).await?;
            Ok(exports.as_array().is_some_and(|list| list.iter().all(|e| e["id"] != "guest-disk0")))
        })
        .await
        .unwrap();
        expect(&snapshot, 0x71, 0, MIB).await.unwrap();
        // A device that is plugged in again finds the filter at its place; the snapshot's export
        // moves to the new thread with it.
        let export = json!({ "type": "nbd", "id": "guest-disk0", "name": "disk0",
                             "node-name": filter, "writable": true, "iothread": iothread });
        storage.run("block-export-add", export).await.unwrap();
        let guest = storage.client("disk0").await.unwrap();
        fill(&guest, 0x72, round as u64 * MIB, MIB + 512).await.unwrap();
        expect(&snapshot, 0x71, 0, DISK_BYTES).await.unwrap();
    }
    storage.teardown(true).await.unwrap();
    storage.quit().await.unwrap();
}

/// Setup, a reader and a writer that are busy; how many guest writes are acknowledged so far.
async fn busy_access(storage: &Storage, device: Value) -> JoinSet<u64> {
    let infos = storage.setup(json!([device])).await.unwrap();
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    let guest = storage.client("disk0").await.unwrap();
    let mut tasks = JoinSet::new();
    let (started, running) = tokio::sync::oneshot::channel();
    tasks.spawn(async move {
        let (mut done, mut started) = (0, Some(started));
        while fill(&guest, 0x82, done % 64 * 64 * KIB, 64 * KIB).await.is_ok() {
            done += 1;
            if let Some(started) = started.take_if(|_| done == 3) {
                started.send(()).unwrap();
            }
        }
        done.min(64)
    });
    tasks.spawn(async move {
        while let Ok(data) = snapshot.read(0, MIB as usize).await {
            assert!(data.iter().all(|&byte| byte == 0x81));
        }
        0
    });
    running.await.unwrap();
    tasks
}

#[tokio::test]
async fn it_quits_and_is_killed_while_all_are_busy() {
    let device = json!({ "device": "disk0", "bitmap-mode": "use", "buffer-size": 256 * KIB });
    let (storage, guest) = one_disk(DISK_BYTES).await;
    fill(&guest, 0x81, 0, DISK_BYTES).await.unwrap();
    drop(guest);
    let tasks = busy_access(&storage, device.clone()).await;
    storage.quit().await.unwrap();
    tasks.join_all().await;

    let (storage, guest) = one_disk(DISK_BYTES).await;
    fill(&guest, 0x81, 0, DISK_BYTES).await.unwrap();
    drop(guest);
    let tasks = busy_access(&storage, device.clone()).await;
    let folder = storage.kill().unwrap();
    let written = tasks.join_all().await.into_iter().max().unwrap();
    // What the guest was told to be written is there, and the rest is whole.
    let disk = File::open(folder.path().join("disk0")).unwrap();
    let mut bytes = vec![0; DISK_BYTES as usize];
    disk.read_exact_at(&mut bytes, 0).unwrap();
    let (new, rest) = bytes.split_at((written * 64 * KIB) as usize);
    assert!(new.iter().all(|&byte| byte == 0x82));
    assert!(rest.iter().all(|&byte| byte == 0x82 || byte == 0x81));

    let storage = Storage::start_in(folder).await.unwrap();
    for name in ["disk0", "disk0-fleecing"] {
        let file = format!("{name}-file");
        storage.node(storage.file_node(&file, name)).await.unwrap();
        storage.node(raw_node(name, &file)).await.unwrap();
    }
    let infos = storage.setup(json!([device])).await.unwrap();
    assert_eq!(infos[0]["bitmap-action"], "missing-recreated");
    assert_eq!(infos[0]["dirty"], DISK_BYTES);
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    assert_same(&snapshot, &bytes).await;
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn the_disks_of_one_access_share_a_cap_on_ram() {
    const SIZE_BYTES: u64 = 8 * MIB;
    const CAP_BYTES: u64 = 3 * MIB;
    let storage = Storage::start().await.unwrap();
    let mut guests = Vec::new();
    for disk in ["disk0", "disk1"] {
        storage.disk(disk, SIZE_BYTES).await.unwrap();
        storage.disk(&format!("{disk}-fleecing"), SIZE_BYTES).await.unwrap();
        let thread = format!("thread-{disk}");
        storage.iothread(&thread).await.unwrap();
        storage.export_disk(disk, Some(&thread)).await.unwrap();
        let guest = storage.client(disk).await.unwrap();
        fill(&guest, 0x11, 0, SIZE_BYTES).await.unwrap();
        guests.push(guest);
    }
    let request = json!({ "target-id": "t", "buffer-total": CAP_BYTES,
                          "devices": [{ "device": "disk0" }, { "device": "disk1" }] });
    let infos = storage.run("backup-access-setup", request).await.unwrap();
    // The first disk takes all of it, then the second one needs some.
    for guest in &guests {
        for offset in (0..SIZE_BYTES).step_by(64 << 10) {
            fill(guest, 0x22, offset, 64 * KIB).await.unwrap();
            let mut held = 0;
            for device in 0..2 {
                held += storage.count(device, "in-ram").await.unwrap();
            }
            assert!(held <= CAP_BYTES, "{held} bytes are held at {offset}");
        }
    }
    for (device, guest) in guests.iter().enumerate() {
        assert_eq!(storage.status(device).await.unwrap()["state"], "active");
        assert!(storage.count(device, "written").await.unwrap() > SIZE_BYTES / 2);
        let snapshot = storage.snapshot(&infos[device]).await.unwrap();
        expect(&snapshot, 0x11, 0, SIZE_BYTES).await.unwrap();
        expect(guest, 0x22, 0, SIZE_BYTES).await.unwrap();
    }
    storage.teardown(true).await.unwrap();
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn ram_that_the_buffer_does_not_need_any_more_goes_back_to_the_system() {
    const SIZE_BYTES: u64 = 24 * MIB;
    let (storage, guest) = one_disk(SIZE_BYTES).await;
    fill(&guest, 0x11, 0, SIZE_BYTES).await.unwrap();
    let infos = storage.setup(json!([{ "device": "disk0" }])).await.unwrap();
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    // Twice: what was given back is used again.
    const HALF_BYTES: u64 = SIZE_BYTES / 2;
    for (start, new) in [(0, 0x22), (HALF_BYTES, 0x33)] {
        let before = storage.anonymous_bytes().unwrap();
        for offset in (start..start + HALF_BYTES).step_by(64 << 10) {
            fill(&guest, new, offset, 64 * KIB).await.unwrap();
        }
        assert_eq!(storage.count(0, "in-ram").await.unwrap() / MIB, HALF_BYTES / MIB);
        expect(&snapshot, 0x11, start, HALF_BYTES).await.unwrap();
        let full = storage.anonymous_bytes().unwrap();
        assert!(full >= before + HALF_BYTES - 2 * MIB, "from {before} to {full}");
        snapshot.trim(start, HALF_BYTES).await.unwrap();
        let is_back = async || Ok(storage.anonymous_bytes()? + HALF_BYTES - 4 * MIB <= full);
        until("the RAM is given back", is_back).await.unwrap();
        expect(&guest, new, start, HALF_BYTES).await.unwrap();
    }
    storage.teardown(true).await.unwrap();
    storage.quit().await.unwrap();
}
