// SPDX-License-Identifier: MIT OR Apache-2.0
//! Faults below a snapshot: errors and stalls of the fleecing image, read errors of the disk. The
//! guest is never harmed, the reader gets old data or an error, and somebody is told.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::{Command, Stdio};

use provider_nbd::{Client, Errno};
use serde_json::{Value, json};
use system_tests::process::Guarded;
use system_tests::storage::{Storage, expect, fill, next_event, raw_node, refused, until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

const DISK_BYTES: u64 = 4 << 20;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const EIO: u64 = 5;
const ENOSPC: u64 = 28;
const OLD: u8 = 0x11;
const NEW: u8 = 0x22;

/// The guest of a disk, which it has filled with [`OLD`].
async fn guest_of(storage: &Storage, disk: &str) -> Client {
    storage.export_disk(disk, None).await.unwrap();
    let guest = storage.client(disk).await.unwrap();
    fill(&guest, OLD, 0, DISK_BYTES).await.unwrap();
    guest
}

/// A storage daemon whose `disk0` is full of [`OLD`]; `errors` are injected into `bad-image`, its
/// fleecing image.
async fn bad_image(errors: Value) -> (Storage, Client) {
    let storage = Storage::start().await.unwrap();
    storage.disk("disk0", DISK_BYTES).await.unwrap();
    storage.disk("image", DISK_BYTES).await.unwrap();
    let node = json!({ "driver": "blkdebug", "node-name": "bad-image", "image": "image",
                       "discard": "unmap", "inject-error": errors });
    storage.node(node).await.unwrap();
    let guest = guest_of(&storage, "disk0").await;
    (storage, guest)
}

fn on_bad_image(buffer_bytes: u64) -> Value {
    json!([{ "device": "disk0", "fleecing": "bad-image", "buffer-size": buffer_bytes,
             "timeout": 2 }])
}

/// A rule for every request of a kind.
fn fails(iotype: &str, errno: u64, once: bool) -> Value {
    json!({ "event": "none", "iotype": iotype, "errno": errno, "once": once })
}

#[tokio::test]
async fn an_image_that_fails_once_is_tried_again() {
    for buffer_bytes in [0, MIB] {
        let (storage, guest) = bad_image(json!([fails("write", EIO, true)])).await;
        let infos = storage.setup(on_bad_image(buffer_bytes)).await.unwrap();
        let snapshot = storage.snapshot(&infos[0]).await.unwrap();
        for offset in (0..DISK_BYTES).step_by(128 << 10) {
            fill(&guest, NEW, offset, 100 * KIB).await.unwrap();
        }
        until("old data is in the image", async || Ok(storage.count(0, "in-log").await? > 0))
            .await
            .unwrap();
        let status = storage.status(0).await.unwrap();
        assert_eq!(status["state"], "active", "{status}");
        expect(&snapshot, OLD, 0, DISK_BYTES).await.unwrap();
        storage.teardown(true).await.unwrap();
        storage.quit().await.unwrap();
    }
}

/// What is true once a snapshot is broken, and stays so up to the end.
async fn assert_broken(storage: Storage, guest: &Client, snapshot: &Client, errno: u64) {
    let status = storage.status(0).await.unwrap();
    assert_eq!((&status["state"], &status["errno"]), (&json!("broken"), &json!(errno)), "{status}");
    assert!(status["error"].as_str().is_some_and(|text| !text.is_empty()), "{status}");
    // Also what was never written, and what was saved before.
    for (offset, len) in [(0, 4096), (MIB, MIB), (DISK_BYTES - 512, 512)] {
        refused(snapshot, Errno::EIO, offset, len).await.unwrap();
    }
    let captured = storage.count(0, "captured").await.unwrap();
    fill(guest, NEW, 0, DISK_BYTES).await.unwrap();
    expect(guest, NEW, 0, DISK_BYTES).await.unwrap();
    refused(snapshot, Errno::EIO, 0, DISK_BYTES).await.unwrap();
    let status = storage.status(0).await.unwrap();
    assert_eq!(status["captured"], captured, "nothing is saved any more");
    assert_eq!((&status["in-ram"], &status["in-log"]), (&json!(0), &json!(0)), "{status}");
    let result = storage.teardown(false).await.unwrap();
    assert!(result["reason"].is_string(), "{result}");
    expect(guest, NEW, 0, DISK_BYTES).await.unwrap();
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn an_image_that_always_fails_breaks_the_snapshot_and_not_the_guest() {
    for (buffer_bytes, errno) in [(0, EIO), (MIB, EIO), (MIB, ENOSPC)] {
        let (storage, guest) = bad_image(json!([fails("write", errno, false)])).await;
        let mut events = storage.session().events();
        let infos = storage.setup(on_bad_image(buffer_bytes)).await.unwrap();
        let snapshot = storage.snapshot(&infos[0]).await.unwrap();
        expect(&snapshot, OLD, 0, DISK_BYTES).await.unwrap();
        for offset in (0..DISK_BYTES).step_by(256 << 10) {
            fill(&guest, NEW, offset, 200 * KIB).await.unwrap();
        }
        let event = next_event(&mut events, "BACKUP_ACCESS_BROKEN").await.unwrap();
        assert_eq!(
            (&event["target-id"], &event["device"], &event["state"]),
            (&json!("t"), &json!("disk0"), &json!("broken"))
        );
        assert_broken(storage, &guest, &snapshot, errno).await;
    }
}

#[tokio::test]
async fn saved_data_that_cannot_be_read_back_is_an_error_and_the_rest_is_there() {
    let (storage, guest) = bad_image(json!([fails("read", EIO, false)])).await;
    let infos = storage.setup(on_bad_image(0)).await.unwrap();
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    fill(&guest, NEW, MIB, 64 * KIB).await.unwrap();
    until("old data is in the image", async || Ok(storage.count(0, "in-ram").await? == 0))
        .await
        .unwrap();
    expect(&snapshot, OLD, 0, MIB).await.unwrap();
    refused(&snapshot, Errno::EIO, MIB, 64 * KIB).await.unwrap();
    fill(&guest, NEW, 2 * MIB, 64 * KIB).await.unwrap();
    expect(&guest, NEW, MIB, 64 * KIB).await.unwrap();
    storage.teardown(false).await.unwrap();
    storage.quit().await.unwrap();
}

/// A storage daemon whose `bad-disk` cannot read its sector at 1 MiB + 16 KiB.
async fn bad_disk() -> (Storage, Client) {
    let storage = Storage::start().await.unwrap();
    std::fs::File::create(storage.path("disk0")).unwrap().set_len(DISK_BYTES).unwrap();
    // Past the page cache: no reader finds the data without a request that can fail.
    let mut file = storage.file_node("disk0", "disk0");
    file["cache"] = json!({ "direct": true });
    storage.node(file).await.unwrap();
    storage.disk("image", DISK_BYTES).await.unwrap();
    let mut error = fails("read", EIO, false);
    error["sector"] = json!((MIB + 16 * KIB) / 512);
    let node = json!({ "driver": "blkdebug", "node-name": "faulty", "image": "disk0",
                       "discard": "unmap", "inject-error": [error] });
    storage.node(node).await.unwrap();
    // Our filter goes below other filters: what it shall meet must be below a format.
    storage.node(raw_node("bad-disk", "faulty")).await.unwrap();
    let guest = guest_of(&storage, "bad-disk").await;
    (storage, guest)
}

#[tokio::test]
async fn one_granule_that_cannot_be_read_is_lost_alone() {
    for buffer_bytes in [0, MIB] {
        let (storage, guest) = bad_disk().await;
        let mut events = storage.session().events();
        let device = json!({ "device": "bad-disk", "fleecing": "image",
                             "buffer-size": buffer_bytes });
        let infos = storage.setup(json!([device])).await.unwrap();
        let snapshot = storage.snapshot(&infos[0]).await.unwrap();
        let bad = MIB + 16 * KIB;
        // A read error of the reader harms nobody.
        refused(&snapshot, Errno::EIO, bad, 4096).await.unwrap();
        assert_eq!(storage.status(0).await.unwrap()["state"], "active");
        // One write over many granules: its old data is read at once, and again without the bad one.
        fill(&guest, NEW, MIB, 64 * KIB).await.unwrap();
        let event = next_event(&mut events, "BACKUP_ACCESS_BROKEN").await.unwrap();
        assert_eq!(
            (&event["device"], &event["state"]),
            (&json!("bad-disk"), &json!("degraded")),
            "{event}"
        );
        let status = storage.status(0).await.unwrap();
        assert_eq!(
            (&status["state"], &status["errno"], &status["captured"]),
            (&json!("degraded"), &json!(EIO), &json!(60 * KIB)),
            "{status}"
        );
        expect(&snapshot, OLD, 0, bad).await.unwrap();
        refused(&snapshot, Errno::EIO, bad, 4096).await.unwrap();
        refused(&snapshot, Errno::EIO, bad + 4096 - 512, 512).await.unwrap();
        expect(&snapshot, OLD, bad + 4096, DISK_BYTES - bad - 4096).await.unwrap();
        // It is still a snapshot: what else is written is saved.
        fill(&guest, NEW, 2 * MIB, MIB).await.unwrap();
        expect(&snapshot, OLD, 2 * MIB, MIB).await.unwrap();
        expect(&guest, NEW, 2 * MIB, MIB).await.unwrap();
        expect(&guest, NEW, MIB, 16 * KIB).await.unwrap();
        storage.teardown(false).await.unwrap();
        storage.quit().await.unwrap();
    }
}

#[tokio::test]
async fn on_request_a_write_fails_rather_than_the_snapshot() {
    let (storage, guest) = bad_disk().await;
    let device = json!({ "device": "bad-disk", "fleecing": "image",
                         "on-error": "break-guest-write" });
    let infos = storage.setup(json!([device])).await.unwrap();
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    assert!(fill(&guest, NEW, MIB + 16 * KIB, 4096).await.is_err(), "the write is refused");
    fill(&guest, NEW, 2 * MIB, MIB).await.unwrap();
    assert_eq!(storage.status(0).await.unwrap()["state"], "active");
    expect(&snapshot, OLD, 0, MIB).await.unwrap();
    expect(&snapshot, OLD, 2 * MIB, MIB).await.unwrap();
    storage.teardown(true).await.unwrap();
    // What was refused was not written.
    expect(&storage_below(&storage).await, OLD, MIB + 16 * KIB, 4096).await.unwrap();
    storage.quit().await.unwrap();
}

/// The disk without its fault, through a node of its own.
async fn storage_below(storage: &Storage) -> Client {
    let mut file = storage.file_node("plain-file", "disk0");
    file["read-only"] = json!(true);
    file["locking"] = json!("off");
    storage.node(file).await.unwrap();
    let mut raw = raw_node("plain", "plain-file");
    raw["read-only"] = json!(true);
    storage.node(raw).await.unwrap();
    let export = json!({ "type": "nbd", "id": "plain", "node-name": "plain" });
    storage.run("block-export-add", export).await.unwrap();
    storage.client("plain").await.unwrap()
}

#[tokio::test]
async fn a_full_image_breaks_the_snapshot_unless_the_reader_keeps_up() {
    for keeps_up in [true, false] {
        let storage = Storage::start().await.unwrap();
        storage.disk("disk0", DISK_BYTES).await.unwrap();
        storage.disk("image", 2 * MIB).await.unwrap();
        let guest = guest_of(&storage, "disk0").await;
        let device = json!({ "device": "disk0", "fleecing": "image", "buffer-size": 0,
                             "fleecing-limit": 2 * MIB, "timeout": 2 });
        let infos = storage.setup(json!([device])).await.unwrap();
        let snapshot = storage.snapshot(&infos[0]).await.unwrap();
        if keeps_up {
            expect(&snapshot, OLD, 0, 3 * MIB).await.unwrap();
            snapshot.trim(0, 3 * MIB).await.unwrap();
        }
        for offset in (0..DISK_BYTES).step_by(256 << 10) {
            fill(&guest, NEW, offset, 256 * KIB).await.unwrap();
        }
        if keeps_up {
            assert_eq!(storage.status(0).await.unwrap()["state"], "active");
            expect(&snapshot, OLD, 3 * MIB, MIB).await.unwrap();
        } else {
            assert_eq!(storage.status(0).await.unwrap()["state"], "broken");
            refused(&snapshot, Errno::EIO, 0, 4096).await.unwrap();
        }
        expect(&guest, NEW, 0, DISK_BYTES).await.unwrap();
        storage.teardown(false).await.unwrap();
        storage.quit().await.unwrap();
    }
}

#[tokio::test]
async fn a_read_in_flight_when_the_snapshot_breaks_never_returns_new_data() {
    const PIECE: u64 = 16 << 10;
    let (storage, guest) = bad_image(json!([fails("write", EIO, false)])).await;
    drop(guest);
    // Reads of the disk wait in line, writes pass.
    let group = json!({ "qom-type": "throttle-group", "id": "brake",
                        "limits": { "bps-read": 4 * PIECE } });
    storage.run("object-add", group).await.unwrap();
    storage.run("block-export-del", json!({ "id": "guest-disk0" })).await.unwrap();
    let slow = json!({ "driver": "throttle", "node-name": "throttled", "file": "disk0",
                       "throttle-group": "brake" });
    until("its export is gone", async || {
        Ok(storage.try_run("blockdev-add", slow.clone()).await.is_ok())
    })
    .await
    .unwrap();
    storage.node(raw_node("slow", "throttled")).await.unwrap();
    storage.export_disk("slow", None).await.unwrap();
    let guest = storage.client("slow").await.unwrap();
    let device = json!({ "device": "slow", "fleecing": "bad-image", "buffer-size": 0,
                         "timeout": 1 });
    let infos = storage.setup(json!([device])).await.unwrap();
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    let mut reads = JoinSet::new();
    let mut start_read = |number: u64| {
        let snapshot = snapshot.clone();
        let offset = MIB + number * PIECE;
        reads.spawn(async move { snapshot.read(offset, PIECE as usize).await });
    };
    // The guest's write waits for its own read in the middle of the line, then breaks the snapshot.
    (0..3).for_each(&mut start_read);
    let breaking = {
        let guest = guest.clone();
        tokio::spawn(async move { fill(&guest, NEW, 0, 4096).await })
    };
    (3..14).for_each(&mut start_read);
    breaking.await.unwrap().unwrap();
    assert_eq!(storage.status(0).await.unwrap()["state"], "broken");
    fill(&guest, NEW, MIB, 14 * PIECE).await.unwrap();
    let mut lost = 0;
    while let Some(read) = reads.join_next().await {
        match read.unwrap() {
            Ok(data) => assert!(data.iter().all(|&byte| byte == OLD), "new data with success"),
            Err(error) => {
                assert_eq!(error.errno(), Some(Errno::EIO), "{error}");
                lost += 1;
            }
        }
    }
    assert!(lost > 0, "no read was in flight any more");
    storage.teardown(false).await.unwrap();
    storage.quit().await.unwrap();
}

/// A fleecing image in another process that can be stopped and moved on.
struct Stallable {
    process: Guarded,
    control: UnixStream,
}

impl Stallable {
    async fn start(storage: &Storage) -> Self {
        let [socket, control] = ["image.nbd", "image.control"].map(|name| storage.path(name));
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&socket);
        command.args(["--filter=pause", "memory", &DISK_BYTES.to_string()]);
        command.arg(format!("pause-control={}", control.display())).stdin(Stdio::null());
        let process = Guarded::spawn(&mut command).unwrap();
        until("nbdkit listens", async || Ok(socket.exists() && control.exists())).await.unwrap();
        let server = json!({ "type": "unix", "path": socket });
        storage
            .node(json!({ "driver": "nbd", "node-name": "far-image", "server": server }))
            .await
            .unwrap();
        Self { process, control: UnixStream::connect(control).await.unwrap() }
    }

    async fn command(&mut self, command: u8) {
        self.control.write_all(&[command]).await.unwrap();
        assert_eq!(self.control.read_u8().await.unwrap(), command.to_ascii_uppercase());
    }
}

#[tokio::test]
async fn a_stalled_image_breaks_the_snapshot_in_time_and_can_be_torn_down() {
    for (buffer_bytes, moves_on) in [(0, true), (256 * KIB, false)] {
        let storage = Storage::start().await.unwrap();
        storage.disk("disk0", DISK_BYTES).await.unwrap();
        let guest = guest_of(&storage, "disk0").await;
        let before = storage.graph().await.unwrap();
        let mut image = Stallable::start(&storage).await;
        let mut events = storage.session().events();
        let device = json!({ "device": "disk0", "fleecing": "far-image", "timeout": 1,
                             "buffer-size": buffer_bytes });
        let infos = storage.setup(json!([device])).await.unwrap();
        let snapshot = storage.snapshot(&infos[0]).await.unwrap();
        fill(&guest, NEW, 0, MIB).await.unwrap();
        expect(&snapshot, OLD, 0, MIB).await.unwrap();
        image.command(b'p').await;
        // A read of saved data hangs in the image as well.
        let hanging = tokio::spawn({
            let snapshot = snapshot.clone();
            async move { snapshot.read(0, 64 << 10).await }
        });
        fill(&guest, NEW, MIB, 2 * MIB).await.unwrap();
        let event = next_event(&mut events, "BACKUP_ACCESS_BROKEN").await.unwrap();
        assert_eq!(event["state"], "broken");
        fill(&guest, NEW, 3 * MIB, MIB).await.unwrap();
        let arguments = json!({ "target-id": "t", "success": false });
        let error = storage.try_run("backup-access-teardown", arguments.clone()).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("far-image"), "{error}");
        assert_eq!(storage.status(0).await.unwrap()["state"], "closing");
        // Guest and monitor go on.
        fill(&guest, NEW, 0, DISK_BYTES).await.unwrap();
        if moves_on {
            image.command(b'r').await;
        } else {
            image.process.signal(rustix::process::Signal::KILL).unwrap();
        }
        until("the teardown succeeds", async || {
            Ok(storage.try_run("backup-access-teardown", arguments.clone()).await.is_ok())
        })
        .await
        .unwrap();
        if let Ok(data) = hanging.await.unwrap() {
            assert!(data.iter().all(|&byte| byte == OLD), "new data with success");
        }
        storage.run("blockdev-del", json!({ "node-name": "far-image" })).await.unwrap();
        assert_eq!(storage.graph().await.unwrap(), before);
        expect(&guest, NEW, 0, DISK_BYTES).await.unwrap();
        storage.quit().await.unwrap();
    }
}

/// What drains waits for every image. So no command of ours begins to drain while one is stalled.
#[tokio::test]
async fn a_stalled_image_of_one_target_holds_up_no_command_for_another() {
    let storage = Storage::start().await.unwrap();
    for name in ["disk0", "disk1", "own-image", "third-image"] {
        storage.disk(name, DISK_BYTES).await.unwrap();
    }
    let guest = guest_of(&storage, "disk0").await;
    let before = storage.graph().await.unwrap();
    let mut image = Stallable::start(&storage).await;
    let mut events = storage.session().events();
    let far = json!({ "device": "disk0", "fleecing": "far-image", "timeout": 1, "buffer-size": 0 });
    storage.setup(json!([far])).await.unwrap();
    let request = |target: &str, device: &str, image: &str| {
        let device = json!({ "device": device, "fleecing": image, "timeout": 1 });
        json!({ "target-id": target, "devices": [device] })
    };
    let infos =
        storage.run("backup-access-setup", request("u", "disk0", "own-image")).await.unwrap();
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    image.command(b'p').await;
    fill(&guest, NEW, 0, MIB).await.unwrap();
    let event = next_event(&mut events, "BACKUP_ACCESS_BROKEN").await.unwrap();
    assert_eq!(event["target-id"], "t");

    let teardown = json!({ "target-id": "u", "success": true });
    let why = "target 't' has had a request to its fleecing image 'far-image'";
    for _ in 0..2 {
        let error = storage.try_run("backup-access-teardown", teardown.clone()).await.unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
        let third = request("v", "disk1", "third-image");
        let error = storage.try_run("backup-access-setup", third).await.unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
        fill(&guest, NEW, 0, DISK_BYTES).await.unwrap();
    }
    drop(snapshot);
    image.command(b'r').await;
    for target in ["u", "t"] {
        let teardown = json!({ "target-id": target, "success": false });
        until("the teardown succeeds", async || {
            Ok(storage.try_run("backup-access-teardown", teardown.clone()).await.is_ok())
        })
        .await
        .unwrap();
    }
    storage.run("blockdev-del", json!({ "node-name": "far-image" })).await.unwrap();
    assert_eq!(storage.graph().await.unwrap(), before);
    expect(&guest, NEW, 0, DISK_BYTES).await.unwrap();
    storage.quit().await.unwrap();
}
