// SPDX-License-Identifier: MIT OR Apache-2.0
//! Old data that is saved by sharing blocks (`reflink-size`), on XFS and btrfs in loop files.

#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(dead_code, reason = "shared with tests that use the rest of it")]
mod access_lab;

use std::path::Path;
use std::sync::Arc;

use access_lab::{DISK_BYTES, Lab, Setup};
use serde_json::{Value, json};
use system_tests::loopfs::{Kind, LoopFs};

const KIB: u64 = 1 << 10;
const OLD: u8 = 0x11;
const NEW: u8 = 0x22;

fn device(reflink_bytes: u64) -> Value {
    json!([{ "device": "disk0", "reflink-size": reflink_bytes }])
}

async fn status(lab: &Lab) -> Value {
    lab.run("query-backup-access", json!({})).await[0]["devices"][0].clone()
}

async fn lab_on(folder: &Path, setup: Setup) -> Lab {
    let lab = Lab::start_in(folder, setup).await;
    lab.guest_writes("disk0", OLD, 0, DISK_BYTES).await;
    lab
}

/// Large writes are shared, small ones copied; the snapshot and the guest see their own data.
async fn shares(kind: Kind, iothread: bool) {
    let fs = LoopFs::new(kind).unwrap();
    let lab = lab_on(&fs.path(), Setup { iothread, ..Setup::default() }).await;
    let graph = lab.graph().await;
    let infos = lab.setup("t", device(64 * KIB)).await;
    let export = lab.export(&infos[0]).await;
    // 1 MiB across two pieces, 64 KiB, and less than that.
    let writes = [(512 * KIB, 1024 * KIB), (2048 * KIB, 64 * KIB), (3072 * KIB + 512, 16 * KIB)];
    for (offset, len) in writes {
        lab.guest_writes("disk0", NEW, offset, len).await;
    }
    lab.expect(&export, OLD, 0, DISK_BYTES).await;
    let state = status(&lab).await;
    assert_eq!(state["state"], "active", "{state}");
    assert_eq!(state["shared"], 1088 * KIB, "{state}");
    assert_eq!(state["captured"], (1088 + 20) * KIB, "{state}");
    assert_eq!((&state["in-log"], &state["written"]), (&json!(1088 * KIB), &json!(0)), "{state}");
    // Again over everything, with areas that are saved already in between.
    lab.guest_writes("disk0", NEW, 0, DISK_BYTES).await;
    lab.expect(&export, OLD, 0, DISK_BYTES).await;
    lab.expect("disk0", NEW, 0, DISK_BYTES).await;
    let text = lab.try_io(&export, &[format!("discard 0 {}k", 2048)]).await;
    assert!(!text.contains("failed"), "{text}");
    lab.expect(&export, OLD, 2048 * KIB, 2048 * KIB).await;
    lab.teardown("t", true).await;
    assert_eq!(lab.graph().await, graph);
    lab.expect("disk0", NEW, 0, DISK_BYTES).await;
    lab.quit().await;
}

#[tokio::test]
async fn large_writes_are_shared_on_xfs() {
    shares(Kind::Xfs, false).await;
}

#[tokio::test]
async fn large_writes_are_shared_on_btrfs() {
    shares(Kind::Btrfs, true).await;
}

/// The snapshot is read again and again while the guest overwrites the disk.
#[tokio::test]
async fn a_shared_snapshot_stays_right_under_writes() {
    for kind in [Kind::Xfs, Kind::Btrfs] {
        let fs = LoopFs::new(kind).unwrap();
        let lab = Arc::new(lab_on(&fs.path(), Setup::default()).await);
        let infos = lab.setup("t", device(4 * KIB)).await;
        let export = lab.export(&infos[0]).await;
        let writer = lab.write_forever("disk0");
        let read = format!("read -P {OLD:#x} 0 {DISK_BYTES}");
        let reads = vec![read; 30];
        let text = lab.try_io(&export, &reads).await;
        assert!(!text.contains("failed"), "{kind:?}: {text}");
        assert!(writer.stop().await > 0);
        let state = status(&lab).await;
        assert!(state["shared"].as_u64().unwrap() >= 64 * KIB, "{state}");
        lab.teardown("t", true).await;
    }
}

/// A file system that cannot share blocks: refused, and nothing has changed.
#[tokio::test]
async fn what_cannot_be_shared_is_refused() {
    let lab = lab_on(Path::new("/dev/shm"), Setup::default()).await;
    let graph = lab.graph().await;
    let request = json!({ "target-id": "t", "devices": device(64 * KIB) });
    let error = lab.try_run("backup-access-setup", request).await.unwrap_err().to_string();
    assert!(error.contains("device 'disk0'") && error.contains("reflink-size needs"), "{error}");
    assert_eq!(lab.graph().await, graph);
    lab.setup("t", json!([{ "device": "disk0" }])).await;
    lab.teardown("t", true).await;
}

/// A call that dies in its worker thread is one that failed: old data is copied.
#[tokio::test]
async fn without_sharing_old_data_is_copied() {
    let fs = LoopFs::new(Kind::Btrfs).unwrap();
    let lab = lab_on(&fs.path(), Setup { faults: "panic:worker:2", ..Setup::default() }).await;
    let infos = lab.setup("t", device(64 * KIB)).await;
    let export = lab.export(&infos[0]).await;
    for offset in [0, 512 * KIB, 1024 * KIB] {
        lab.guest_writes("disk0", NEW, offset, 128 * KIB).await;
    }
    lab.expect(&export, OLD, 0, DISK_BYTES).await;
    let state = status(&lab).await;
    assert_eq!((&state["state"], &state["shared"]), (&json!("active"), &json!(128 * KIB)));
    assert_eq!(state["captured"], 384 * KIB, "{state}");
    lab.teardown("t", true).await;
    lab.quit().await;
}

/// A panic in the guest's request itself breaks the snapshot, never the guest.
#[tokio::test]
async fn a_panic_while_sharing_breaks_the_snapshot() {
    let fs = LoopFs::new(Kind::Xfs).unwrap();
    let setup = Setup { faults: "panic:share_source:1", ..Setup::default() };
    let lab = lab_on(&fs.path(), setup).await;
    let infos = lab.setup("t", device(64 * KIB)).await;
    let export = lab.export(&infos[0]).await;
    lab.guest_writes("disk0", NEW, 0, 128 * KIB).await;
    let text = lab.try_io(&export, &["read 0 4k"]).await;
    assert!(text.contains("read failed: Input/output error"), "{text}");
    assert_eq!(status(&lab).await["state"], "broken");
    lab.expect("disk0", NEW, 0, 128 * KIB).await;
    lab.teardown("t", false).await;
    lab.quit().await;
}
