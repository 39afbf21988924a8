// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which areas of an increment can be read and released, and what programs of others make of it:
//! `nbdinfo` and `nbdcopy` of libnbd.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::process::{Output, Stdio};

use provider_nbd::Errno;
use serde_json::{Value, json};
use system_tests::storage::{LIMIT, Storage, expect, fill, refused};

const DISK_BYTES: u64 = 4 << 20;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A disk full of 0x11 with 64 KiB of 0x22 at 1 MiB, written since its last backup.
async fn changed_disk() -> (Storage, provider_nbd::Client) {
    let storage = Storage::start().await.unwrap();
    storage.disk("disk0", DISK_BYTES).await.unwrap();
    storage.disk("disk0-fleecing", DISK_BYTES).await.unwrap();
    storage.export_disk("disk0", None).await.unwrap();
    let guest = storage.client("disk0").await.unwrap();
    fill(&guest, 0x11, 0, DISK_BYTES).await.unwrap();
    storage.setup(increment("dirty")).await.unwrap();
    storage.teardown(true).await.unwrap();
    fill(&guest, 0x22, MIB, 64 * KIB).await.unwrap();
    (storage, guest)
}

fn increment(readable: &str) -> Value {
    json!([{ "device": "disk0", "bitmap-mode": "use", "readable": readable }])
}

async fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(LIMIT, command.output()).await.expect("in time");
    output.unwrap_or_else(|error| panic!("{program} (package libnbd-bin): {error}"))
}

/// The areas of a context as `nbdinfo` lists them: start, length, type.
async fn map(uri: &str, option: &str) -> Vec<(u64, u64, u64)> {
    let output = run("nbdinfo", &["--json", option, uri]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let areas: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let number = |area: &Value, member: &str| area[member].as_u64().unwrap();
    areas
        .iter()
        .map(|area| (number(area, "offset"), number(area, "length"), number(area, "type")))
        .collect()
}

fn uri(storage: &Storage, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", storage.path("nbd").display())
}

async fn copy(uri: &str, to: &Path) -> Output {
    run("nbdcopy", &[uri, to.to_str().unwrap()]).await
}

#[tokio::test]
async fn programs_of_others_can_list_an_increment_and_copy_it_where_all_is_readable() {
    const ALLOCATED: u64 = 0;
    const DIRTY: u64 = 1;
    for readable in ["dirty", "all"] {
        let (storage, guest) = changed_disk().await;
        let infos = storage.setup(increment(readable)).await.unwrap();
        assert_eq!(
            (&infos[0]["bitmap-action"], &infos[0]["dirty"]),
            (&json!("used"), &json!(65536))
        );
        let uri = uri(&storage, &storage.export_snapshot(&infos[0]).await.unwrap());
        // The point in time is over.
        fill(&guest, 0x33, 0, DISK_BYTES).await.unwrap();

        assert_eq!(map(&uri, "--map").await, [(0, DISK_BYTES, ALLOCATED)], "{readable}");
        let bitmap = infos[0]["bitmap-name"].as_str().unwrap();
        let dirty = map(&uri, &format!("--map=qemu:dirty-bitmap:{bitmap}")).await;
        let rest = MIB + 64 * KIB;
        let wanted = [(0, MIB, 0), (MIB, 64 * KIB, DIRTY), (rest, DISK_BYTES - rest, 0)];
        assert_eq!(dirty, wanted, "{readable}");

        let file = storage.path("copy");
        let copied = copy(&uri, &file).await;
        let text = String::from_utf8_lossy(&copied.stderr).into_owned();
        if readable == "all" {
            assert!(copied.status.success(), "{text}");
            let mut wanted = vec![0x11; DISK_BYTES as usize];
            wanted[MIB as usize..rest as usize].fill(0x22);
            assert!(std::fs::read(&file).unwrap() == wanted, "nbdcopy copied other data");
        } else {
            // Never zeroes in place of what it may not read. (QEMU's server ends the connection.)
            assert!(!copied.status.success() && text.contains("read at offset"), "{text}");
        }
        storage.teardown(true).await.unwrap();
        storage.quit().await.unwrap();
    }
}

#[tokio::test]
async fn clean_areas_are_saved_read_and_released_where_all_is_readable() {
    let (storage, guest) = changed_disk().await;
    let infos = storage.setup(increment("all")).await.unwrap();
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    fill(&guest, 0x33, 0, 2 * MIB).await.unwrap();
    assert_eq!(storage.count(0, "captured").await.unwrap(), 2 * MIB);
    expect(&snapshot, 0x11, 0, MIB).await.unwrap();
    expect(&snapshot, 0x22, MIB, 64 * KIB).await.unwrap();
    expect(&snapshot, 0x11, 3 * MIB, MIB).await.unwrap();
    snapshot.trim(3 * MIB, MIB).await.unwrap();
    refused(&snapshot, Errno::EPERM, 3 * MIB, 4096).await.unwrap();
    assert_eq!(storage.count(0, "released").await.unwrap(), MIB);
    fill(&guest, 0x44, 3 * MIB, MIB).await.unwrap();
    assert_eq!(storage.count(0, "captured").await.unwrap(), 2 * MIB);
    storage.teardown(true).await.unwrap();
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn a_release_of_clean_areas_does_nothing() {
    let (storage, _guest) = changed_disk().await;
    let infos = storage.setup(increment("dirty")).await.unwrap();
    let snapshot = storage.snapshot(&infos[0]).await.unwrap();
    snapshot.trim(2 * MIB, MIB).await.unwrap();
    assert_eq!(storage.count(0, "released").await.unwrap(), 0);
    refused(&snapshot, Errno::EPERM, 2 * MIB, 4096).await.unwrap();
    // Over a border: what is dirty goes, the rest never was there.
    snapshot.trim(MIB - 64 * KIB, 128 * KIB).await.unwrap();
    assert_eq!(storage.count(0, "released").await.unwrap(), 64 * KIB);
    refused(&snapshot, Errno::EPERM, MIB, 4096).await.unwrap();
    storage.teardown(true).await.unwrap();
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn without_an_old_bitmap_all_is_readable() {
    let (storage, _guest) = changed_disk().await;
    for device in [
        json!({ "device": "disk0", "readable": "dirty" }),
        json!({ "device": "disk0", "bitmap-mode": "new", "readable": "dirty" }),
    ] {
        let infos = storage.setup(json!([device])).await.unwrap();
        let snapshot = storage.snapshot(&infos[0]).await.unwrap();
        expect(&snapshot, 0x11, 2 * MIB, MIB).await.unwrap();
        storage.teardown(false).await.unwrap();
    }
    storage.quit().await.unwrap();
}
