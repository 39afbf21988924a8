// SPDX-License-Identifier: MIT OR Apache-2.0
//! A panic in every callback of the extension, and allocations that fail, in a storage daemon made
//! for that (`target/qemu/faults`). Whatever happens, the guest's requests succeed and its data is
//! right, the snapshot is right or fails, everything is taken out again, and a new access works.

#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(dead_code, reason = "shared with tests that use the rest of it")]
mod access_lab;

use access_lab::{DISK_BYTES, Lab, Setup};
use qmp_client::EventStream;
use serde_json::{Value, json};
use system_tests::qemu::bin_dir;

const KIB: u64 = 1 << 10;
/// Content of the disk at the point in time, and what the guest writes later.
const OLD: u8 = 0x11;
const NEW: u8 = 0x22;
/// As small as it can be: flushers run, and guest requests wait for them.
const SMALL: Memory = Memory { buffer: 1024 * KIB, total: 1 << 30 };
/// Holds all that the guest overwrites: nothing is flushed, so the reader finds it in RAM.
const LARGE: Memory = Memory { buffer: 64 * 1024 * KIB, total: 1 << 30 };
/// So little RAM for all disks that the only one is told to write its data to the image.
const SHARED: Memory = Memory { buffer: 1024 * KIB, total: 256 * KIB };
/// The guest writes so often, 64 KiB of each 128 KiB.
const WRITES: u64 = 16;

/// RAM for the disk and for all disks, in bytes.
#[derive(Debug, Clone, Copy)]
struct Memory {
    buffer: u64,
    total: u64,
}

/// What a fault does to the snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Snapshot {
    /// Nothing, except that a request of the reader may fail, and QEMU's NBD server may end the
    /// connection then.
    Kept,
    /// It breaks, with this error.
    Broken(i64),
}

use Snapshot::{Broken, Kept};

const EIO: Snapshot = Broken(5);
const ENOMEM: Snapshot = Broken(12);

/// The guest: overlapping writes of the same data from two clients, so that one waits for the
/// other's captures, then long zeroes and a discard. Everything must succeed.
async fn guest_works(lab: &Lab) {
    let writes = |first: u64| -> Vec<String> {
        (0..WRITES)
            .map(|n| format!("aio_write -q -P {NEW:#x} {}k 64k", (first + n) % WRITES * 128))
            .chain(["aio_flush".to_owned()])
            .collect()
    };
    let (one, two) = (writes(0), writes(WRITES / 2));
    let (one, two) = tokio::join!(lab.try_io("disk0", &one), lab.try_io("disk0", &two));
    let rest = ["write -z 2m 1m", "discard 3m 512k", "flush"];
    let rest = lab.try_io("disk0", &rest).await;
    for text in [one, two, rest] {
        assert!(!text.contains("failed"), "the guest: {text}");
    }
}

/// Compares the guest's disk with what [`guest_works`] leaves. The discarded area has any content.
async fn guest_is_right(lab: &Lab) {
    let mut reads = vec!["read -P 0 2m 1m".to_owned(), format!("read -P {OLD:#x} 3584k 512k")];
    for at in (0..WRITES).map(|n| n * 128 * KIB) {
        reads.push(format!("read -P {NEW:#x} {at} 64k"));
        reads.push(format!("read -P {OLD:#x} {} 64k", at + 64 * KIB));
    }
    let text = lab.try_io("disk0", &reads).await;
    assert!(!text.contains("failed"), "the guest's disk: {text}");
}

/// What the reader does; how many of its requests failed.
async fn reader_works<C: AsRef<str>>(lab: &Lab, export: &str, commands: &[C]) -> usize {
    let text = lab.try_io(export, commands).await;
    assert!(!text.contains("verification"), "the snapshot is wrong: {text}");
    text.lines().filter(|line| line.contains("ailed")).count()
}

async fn state(lab: &Lab) -> Value {
    let status = lab.run("query-backup-access", json!({})).await;
    status[0]["devices"][0].clone()
}

fn device(change: &Value) -> Value {
    let mut device =
        json!({ "device": "disk0", "bitmap-mode": "use", "buffer-size": SMALL.buffer });
    for (key, value) in change.as_object().unwrap() {
        device[key] = value.clone();
    }
    device
}

/// An access to another disk: two drained sections while this one is active.
async fn another_access(lab: &Lab) {
    lab.setup("other", json!([{ "device": "disk1" }])).await;
    lab.teardown("other", true).await;
}

/// Everything that guest and reader do during an access; the reader's export, and how many of its
/// requests failed.
async fn work(lab: &Lab, infos: &[Value]) -> (String, usize) {
    let export = lab.export(&infos[0]).await;
    let mut commands: Vec<String> =
        (0..8).map(|n| format!("read -P {OLD:#x} {}k 512k", n * 512)).collect();
    commands.push("map".to_owned());
    let (mut failed, ()) = tokio::join!(reader_works(lab, &export, &commands), guest_works(lab));
    another_access(lab).await;
    // What the guest has overwritten is in RAM or in the log now.
    let read = format!("read -P {OLD:#x} 0 3m");
    failed += reader_works(lab, &export, &[&read]).await;
    // The guest's discard is done for the first part of it.
    failed += reader_works(lab, &export, &["discard 3m 256k"]).await;
    (export, failed)
}

/// The event about the broken snapshot, and what a query and the reader find.
async fn is_broken(lab: &Lab, events: &mut EventStream, export: &str, errno: i64) {
    let event = lab.next_event(events, "BACKUP_ACCESS_BROKEN").await;
    assert_eq!((&event["state"], &event["errno"]), (&json!("broken"), &json!(errno)), "{event}");
    let status = state(lab).await;
    assert_eq!((&status["state"], &status["errno"]), (&json!("broken"), &json!(errno)));
    assert_eq!(event["node-name"], status["node-name"]);
    let text = lab.try_io(export, &["read 0 64k"]).await;
    assert!(text.contains("read failed: Input/output error"), "{text}");
}

async fn start(faults: &'static str, iothread: bool) -> Lab {
    let lab = Lab::start(Setup { faults, iothread, ..Setup::default() }).await;
    lab.guest_writes("disk0", OLD, 0, DISK_BYTES).await;
    lab
}

/// An access to the disk with a fault to come: the graph before it, events, and the reader's export.
async fn begin(faults: &'static str, change: &Value) -> (Lab, Vec<String>, EventStream, String) {
    let lab = start(faults, true).await;
    let graph = lab.graph().await;
    let events = lab.session().events();
    let infos = lab.setup("t", json!([device(change)])).await;
    let export = lab.export(&infos[0]).await;
    (lab, graph, events, export)
}

/// After the fault: the access ends, the guest's data is right, another access works, and the
/// daemon ends well.
async fn ends_well(lab: Lab, graph: &[String]) {
    let points = faults_seen(&lab);
    assert_eq!(lab.teardown("t", false).await["existed"], true, "{points}");
    assert_eq!(lab.graph().await, graph, "{points}");
    guest_is_right(&lab).await;
    works_again(lab, graph).await;
}

async fn works_again(lab: Lab, graph: &[String]) {
    lab.guest_writes("disk0", OLD, 0, DISK_BYTES).await;
    let infos = lab.setup("t", json!([device(&json!({}))])).await;
    assert_eq!(work(&lab, &infos).await.1, 0, "the reader of the next access");
    assert_eq!(state(&lab).await["state"], "active");
    assert_eq!(lab.teardown("t", true).await, json!({ "existed": true }));
    assert_eq!(lab.graph().await, graph);
    guest_is_right(&lab).await;
    lab.setup("t", json!([device(&json!({}))])).await;
    lab.quit().await;
}

/// What the daemon has written about faults.
fn faults_seen(lab: &Lab) -> String {
    std::fs::read_to_string(lab.path("stderr")).unwrap()
}

/// Every fault of the list happened.
fn all_happened(lab: &Lab, faults: &str) {
    let seen = faults_seen(lab);
    for fault in faults.split(',') {
        let point = fault.split(':').nth(1).unwrap();
        let happened = seen.lines().any(|line| line.ends_with(&format!("injected at {point}")));
        assert!(happened, "{fault} did not happen: {seen}");
    }
}

/// Faults during the work of guest and reader.
async fn during_an_access(faults: &'static str, iothread: bool, memory: Memory, then: Snapshot) {
    println!("{faults}, iothread {iothread}");
    let lab = start(faults, iothread).await;
    let graph = lab.graph().await;
    let mut events = lab.session().events();
    let devices = json!([device(&json!({ "buffer-size": memory.buffer }))]);
    let request = json!({ "target-id": "t", "devices": devices, "buffer-total": memory.total });
    let infos = lab.run("backup-access-setup", request).await.as_array().unwrap().clone();
    let (export, failed) = work(&lab, &infos).await;
    match then {
        Kept => {
            println!("{failed} requests of the reader failed");
            let read = format!("read -P {OLD:#x} 0 3m");
            assert_eq!(reader_works(&lab, &export, &[&read]).await, 0);
            assert_eq!(state(&lab).await["state"], "active");
        }
        Broken(errno) => is_broken(&lab, &mut events, &export, errno).await,
    }
    all_happened(&lab, faults);
    ends_well(lab, &graph).await;
}

/// Runs a case for each entry, every other one with an iothread, and names those that failed.
async fn each_of<F>(faults: &[&'static str], case: impl Fn(&'static str, bool) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut failed = Vec::new();
    for (index, &faults) in faults.iter().enumerate() {
        if tokio::spawn(case(faults, index % 2 == 1)).await.is_err() {
            failed.push(faults);
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

async fn each(faults: &[(&'static str, Snapshot)]) {
    each_with(SMALL, faults).await;
}

async fn each_with(memory: Memory, faults: &[(&'static str, Snapshot)]) {
    let names: Vec<&'static str> = faults.iter().map(|&(name, _)| name).collect();
    let then = |name: &str| faults.iter().find(|(other, _)| *other == name).unwrap().1;
    each_of(&names, |name, iothread| during_an_access(name, iothread, memory, then(name))).await;
}

#[test]
fn the_programs_for_users_have_no_faults() {
    let contains = |program: &std::path::Path| {
        let bytes = std::fs::read(program).unwrap();
        let wanted = b"BACKUP_ACCESS_FAULTS";
        bytes.windows(wanted.len()).any(|window| window == wanted)
    };
    let bin = bin_dir().unwrap();
    for name in ["qemu-storage-daemon", "qemu-system-x86_64"] {
        assert!(!contains(&bin.join(name)), "{name}");
    }
    assert!(contains(&bin.with_file_name("faults").join("qemu-storage-daemon")));
}

#[tokio::test]
async fn a_panic_in_a_guest_request_breaks_the_snapshot() {
    each(&[
        ("panic:before_write:1", EIO),
        ("panic:before_write:4", EIO),
        ("panic:next_part:1", EIO),
        ("panic:before_zeroes:1", EIO),
        ("panic:next_discard:1", EIO),
        ("panic:read_source:1", EIO),
        ("panic:read_source:3", EIO),
        ("panic:source_is_zero:1", EIO),
        ("panic:spawn_flusher:1", EIO),
    ])
    .await;
}

#[tokio::test]
async fn a_panic_in_a_request_of_the_reader_fails_it_or_breaks_the_snapshot() {
    each(&[
        ("panic:snapshot_read:1", Kept),
        ("panic:snapshot_status:1", Kept),
        ("panic:snapshot_release:1", Kept),
        ("panic:snapshot_refresh_limits:1", Kept),
        ("panic:reader:1", EIO),
        ("panic:reader:6", EIO),
        ("panic:fetch:1", EIO),
        ("panic:fetch:9", EIO),
    ])
    .await;
}

#[tokio::test]
async fn a_panic_in_a_read_from_ram_breaks_the_snapshot() {
    each_with(LARGE, &[("panic:copy_into:1", EIO), ("panic:copy_into:7", EIO)]).await;
}

#[tokio::test]
async fn a_panic_in_background_work_breaks_the_snapshot() {
    each(&[
        ("panic:flusher:1", EIO),
        ("panic:write_log:1", EIO),
        ("panic:write_log:3", EIO),
        ("panic:discard_source:1", EIO),
    ])
    .await;
}

#[tokio::test]
async fn a_failed_allocation_breaks_the_snapshot_or_nothing() {
    each(&[
        ("alloc:block:1", ENOMEM),
        ("alloc:block:2", ENOMEM),
        ("alloc:run", Kept),
        ("alloc:mapping", Kept),
    ])
    .await;
}

/// Old data in the log piece by piece, so that one read has many parts.
#[tokio::test]
async fn a_panic_in_a_helper_of_a_read_fails_that_read() {
    let faults = "panic:read_helper:3,panic:read_part:4";
    let lab = start(faults, true).await;
    let graph = lab.graph().await;
    let infos = lab.setup("t", json!([device(&json!({ "buffer-size": 0 }))])).await;
    let writes: Vec<String> =
        (0..16).rev().map(|n| format!("write -q -P {NEW:#x} {}k 4k", n * 4)).collect();
    assert_eq!(lab.try_io("disk0", &writes).await, "");
    let export = lab.export(&infos[0]).await;
    let read = format!("read -P {OLD:#x} 0 64k");
    assert_eq!(reader_works(&lab, &export, &[&read]).await, 2, "the read and qemu-io");
    assert_eq!(reader_works(&lab, &export, &[&read]).await, 0);
    all_happened(&lab, faults);
    assert_eq!(state(&lab).await["state"], "active");
    guest_works(&lab).await;
    ends_well(lab, &graph).await;
}

#[tokio::test]
async fn a_panic_in_a_drain_breaks_the_snapshot() {
    each(&[
        ("panic:drain_begin_active:1", EIO),
        ("panic:drain_end_active:1", EIO),
        ("panic:drain_begin_active:2", EIO),
        ("panic:drain_end_active:2", EIO),
    ])
    .await;
}

/// Before the point in time: there is no snapshot that could break later.
#[tokio::test]
async fn a_panic_in_a_drain_fails_the_setup() {
    for faults in ["panic:drain_begin:4", "panic:drain_end:4"] {
        let lab = start(faults, false).await;
        let graph = lab.graph().await;
        let request = json!({ "target-id": "t", "devices": [device(&json!({}))] });
        let error = lab.try_run("backup-access-setup", request).await.unwrap_err();
        assert!(error.to_string().contains("internal error"), "{error}");
        all_happened(&lab, faults);
        assert_eq!(lab.graph().await, graph);
        works_again(lab, &graph).await;
    }
}

#[tokio::test]
async fn a_panic_in_a_task_for_the_shared_buffer_does_no_harm() {
    each_with(SHARED, &[("panic:task_in_polls:1", Kept), ("panic:task_in_polls:2", Kept)]).await;
}

/// A request that finds no RAM asks for the first flusher, after it has published itself as waiting.
#[tokio::test]
async fn a_panic_of_a_request_that_is_about_to_wait_breaks_the_snapshot() {
    for _ in 0..4 {
        each_with(SHARED, &[("panic:spawn_flusher:1", EIO), ("panic:spawn_flusher:2", EIO)]).await;
    }
}

/// The broken event comes although the first try to send it panics, and the watchdog lives on.
#[tokio::test]
async fn events_come_after_all() {
    each(&[
        ("panic:before_write:1,panic:notify:1", EIO),
        ("panic:before_write:1,panic:task:1", EIO),
        ("panic:before_write:1,panic:task:1,panic:timer:1", EIO),
        ("panic:before_write:1,panic:timer:1,panic:notify:1", EIO),
    ])
    .await;
}

/// Steps of a setup that can fail: for each device 8 to prepare it, then 4 to switch it, then one to
/// tell of it (`step` in the extension's `setup.rs`).
const STEPS: usize = 13;

/// The daemon's `n`-th setup fails at its `n`-th step, each of them.
fn at_each_step(kind: &str, devices: usize, passed_before: usize) -> &'static str {
    let mut pass = passed_before;
    let faults: Vec<String> = (1..=STEPS * devices)
        .map(|step| {
            pass += step;
            format!("{kind}:setup_step:{pass}")
        })
        .collect();
    faults.join(",").leak()
}

/// All that QEMU tells of a node's bitmaps.
async fn bitmaps_in_full(lab: &Lab, node: &str) -> Value {
    let nodes = lab.run("query-named-block-nodes", json!({ "flat": true })).await;
    let node = nodes.as_array().unwrap().iter().find(|entry| entry["node-name"] == node).unwrap();
    node["dirty-bitmaps"].clone()
}

/// Setups of three disks, the first of which has a bitmap to use: whichever step fails, everything is
/// as before, and the guest's writes between them are in the increment that comes at last.
async fn fails_at_each_step(kind: &'static str, iothread: bool) {
    let lab = start(at_each_step(kind, 3, STEPS), iothread).await;
    let first = lab.setup("t", json!([device(&json!({}))])).await;
    lab.teardown("t", true).await;
    let disks = json!([device(&json!({ "generation": first[0]["generation"] })),
                       { "device": "disk1", "bitmap-mode": "new" },
                       { "device": "shared", "fleecing": "alone" }]);
    let request = json!({ "target-id": "t", "devices": disks });
    let graph = lab.graph().await;
    let mut written = 0;
    loop {
        let before = [bitmaps_in_full(&lab, "disk0").await, bitmaps_in_full(&lab, "disk1").await];
        let error = match lab.try_run("backup-access-setup", request.clone()).await {
            Err(error) => error.to_string(),
            Ok(infos) => {
                assert_eq!(infos[0]["bitmap-action"], "used");
                assert_eq!(infos[0]["dirty"], written * 64 * KIB);
                break;
            }
        };
        written += 1;
        let step = format!("{kind}, step {written}: {error}");
        assert!(error.contains("injected") || error.contains("internal error"), "{step}");
        let after = [bitmaps_in_full(&lab, "disk0").await, bitmaps_in_full(&lab, "disk1").await];
        assert_eq!((lab.graph().await, after), (graph.clone(), before), "{step}");
        assert_eq!(lab.run("query-backup-access", json!({})).await, json!([]), "{step}");
        let offset = (written - 1) * 64 * KIB;
        lab.guest_writes("disk0", NEW, offset, 64 * KIB).await;
        lab.expect("disk0", NEW, offset, 64 * KIB).await;
    }
    assert_eq!(written, 3 * STEPS as u64, "the setup has more or fewer steps than this test knows");
    lab.teardown("t", true).await;
    assert_eq!(lab.graph().await, graph);
    lab.quit().await;
}

#[tokio::test]
async fn a_setup_that_fails_at_any_step_of_any_device_changes_nothing() {
    fails_at_each_step("error", false).await;
    fails_at_each_step("error", true).await;
}

#[tokio::test]
async fn a_setup_that_panics_at_any_step_of_any_device_changes_nothing() {
    fails_at_each_step("panic", false).await;
    fails_at_each_step("panic", true).await;
}

/// A setup of two disks that fails and changes nothing.
async fn during_a_setup(faults: &'static str, iothread: bool) {
    println!("{faults}, iothread {iothread}");
    let lab = start(faults, iothread).await;
    let infos = lab.setup("first", json!([device(&json!({}))])).await;
    assert_eq!(infos[0]["bitmap-action"], "missing-recreated");
    lab.teardown("first", true).await;
    let (graph, bitmaps) = (lab.graph().await, lab.bitmaps("disk0").await);
    let disks = json!([device(&json!({})), { "device": "disk1", "bitmap-mode": "new" }]);
    let request = json!({ "target-id": "t", "devices": disks });
    let error = lab.try_run("backup-access-setup", request).await.unwrap_err().to_string();
    assert!(error.contains("internal error") || error.contains("Could not open"), "{error}");
    all_happened(&lab, faults);
    assert_eq!((lab.graph().await, lab.bitmaps("disk0").await), (graph.clone(), bitmaps));
    assert_eq!(lab.run("query-backup-access", json!({})).await, json!([]));
    guest_works(&lab).await;
    guest_is_right(&lab).await;
    works_again(lab, &graph).await;
}

#[tokio::test]
async fn a_panic_in_a_setup_undoes_it() {
    let faults = ["panic:qmp_setup:2", "panic:filter_open:3", "panic:snapshot_open:2"];
    each_of(&faults, during_a_setup).await;
}

/// The access is over, although something went wrong at its end.
async fn nothing_is_left(lab: Lab, graph: &[String]) {
    assert_eq!(lab.run("query-backup-access", json!({})).await, json!([]));
    assert_eq!(lab.graph().await, graph);
    assert!(lab.bitmaps("disk0").await.len() <= 2, "one and its guard");
    guest_is_right(&lab).await;
    works_again(lab, graph).await;
}

/// A teardown that fails or says what went wrong; given again it finds no more than is left.
async fn during_a_teardown(faults: &'static str, iothread: bool) {
    println!("{faults}, iothread {iothread}");
    let lab = start(faults, iothread).await;
    let graph = lab.graph().await;
    let infos = lab.setup("t", json!([device(&json!({}))])).await;
    let export = lab.export(&infos[0]).await;
    guest_works(&lab).await;
    let read = format!("read -P {OLD:#x} 0 3m");
    assert_eq!(reader_works(&lab, &export, &[&read]).await, 0);
    drop(lab.try_run("query-backup-access", json!({})).await);
    let end = json!({ "target-id": "t", "success": true });
    let ended = lab.try_run("backup-access-teardown", end).await;
    all_happened(&lab, faults);
    println!("{ended:?}");
    lab.teardown("t", true).await;
    nothing_is_left(lab, &graph).await;
}

#[tokio::test]
async fn a_panic_in_a_teardown_leaves_nothing_behind() {
    let faults = [
        "panic:qmp_teardown:1",
        "panic:call_from_coroutine:1",
        "panic:call_from_coroutine:2",
        "panic:call_from_coroutine:3",
        "panic:teardown_removing:1",
        "panic:filter_close:1",
        "panic:postponed_discards:1",
        "panic:qmp_query:1",
    ];
    each_of(&faults, during_a_teardown).await;
}

/// A lease that is over although that panics somewhere.
async fn during_the_end_of_a_lease(faults: &'static str, iothread: bool) {
    println!("{faults}, iothread {iothread}");
    let lab = start(faults, iothread).await;
    let graph = lab.graph().await;
    let mut events = lab.session().events();
    let request = json!({ "target-id": "t", "devices": [device(&json!({}))], "lease": 2 });
    let infos = lab.run("backup-access-setup", request).await;
    lab.export(&infos[0]).await;
    guest_works(&lab).await;
    let event = lab.next_event(&mut events, "BACKUP_ACCESS_TORN_DOWN").await;
    assert_eq!((&event["target-id"], &event["success"]), (&json!("t"), &json!(false)), "{event}");
    all_happened(&lab, faults);
    nothing_is_left(lab, &graph).await;
}

#[tokio::test]
async fn a_panic_at_the_end_of_a_lease_delays_it() {
    let faults = [
        "panic:lease_tick:1",
        "panic:lease_tick:7",
        "panic:lease_end:1",
        "panic:lease_end:1,panic:lease_end:2",
        "panic:task:1",
        "panic:teardown_removing:1",
        "panic:filter_close:1",
    ];
    each_of(&faults, during_the_end_of_a_lease).await;
}

/// Fails at the first try and works at the next.
async fn fails_once(lab: &Lab, command: &str, arguments: Value) -> Value {
    let error = lab.try_run(command, arguments.clone()).await.unwrap_err().to_string();
    assert!(error.contains("internal error"), "{error}");
    lab.run(command, arguments).await
}

#[tokio::test]
async fn a_panic_in_a_renewal_does_not_end_the_access() {
    let faults = "panic:renew:1";
    let lab = start(faults, false).await;
    let graph = lab.graph().await;
    let request = json!({ "target-id": "t", "devices": [device(&json!({}))], "lease": 60 });
    lab.run("backup-access-setup", request).await;
    fails_once(&lab, "backup-access-renew", json!({ "target-id": "t" })).await;
    all_happened(&lab, faults);
    assert_eq!(state(&lab).await["state"], "active");
    guest_works(&lab).await;
    ends_well(lab, &graph).await;
}

#[tokio::test]
async fn a_panic_while_bitmaps_are_removed_leaves_whole_ones() {
    for faults in ["panic:qmp_bitmap_remove:1", "panic:bitmap_remove:2"] {
        let lab = start(faults, false).await;
        let graph = lab.graph().await;
        let new = json!({ "bitmap-mode": "new" });
        let disks = json!([device(&new), { "device": "disk1", "bitmap-mode": "new" }]);
        lab.setup("t", disks).await;
        lab.teardown("t", true).await;
        let removed =
            fails_once(&lab, "backup-access-bitmap-remove", json!({ "target-id": "t" })).await;
        all_happened(&lab, faults);
        // Two disks, with one and its guard on each.
        let left = if faults.contains("qmp") { 4 } else { 3 };
        assert_eq!(removed["removed"].as_array().unwrap().len(), left, "{removed}");
        for disk in ["disk0", "disk1"] {
            assert_eq!(lab.bitmaps(disk).await, [] as [String; 0]);
        }
        works_again(lab, &graph).await;
    }
}

#[tokio::test]
async fn a_panic_at_the_exit_does_not_change_how_it_ends() {
    for faults in ["panic:filter_close:1", "panic:settle_at_exit:1"] {
        for iothread in [false, true] {
            let lab = start(faults, iothread).await;
            let infos = lab.setup("t", json!([device(&json!({}))])).await;
            lab.export(&infos[0]).await;
            guest_works(&lab).await;
            lab.quit().await;
        }
    }
}

/// A bitmap file for a disk that nobody has written to.
fn load_request(lab: &Lab) -> Value {
    json!({ "device": "alone", "target-id": "t", "file": lab.path("bitmap") })
}

/// Whether the file says that it is sealed.
fn is_sealed(lab: &Lab) -> bool {
    std::fs::read(lab.path("bitmap")).unwrap()[12] == 1
}

#[tokio::test]
async fn a_panic_in_a_load_or_unload_changes_nothing() {
    let unload = json!({ "device": "alone", "target-id": "t" });
    for faults in ["panic:qmp_bitmap_load:1", "panic:sentinel_open:1", "panic:load_sentinel:1"] {
        let lab = start(faults, false).await;
        let graph = lab.graph().await;
        lab.try_run("backup-access-bitmap-load", load_request(&lab)).await.unwrap_err();
        all_happened(&lab, faults);
        assert_eq!(lab.graph().await, graph, "{faults}");
        assert!(!lab.path("bitmap").exists(), "{faults}");
        lab.run("backup-access-bitmap-load", load_request(&lab)).await;
        assert!(!is_sealed(&lab), "{faults}");
        lab.run("backup-access-bitmap-unload", unload.clone()).await;
        assert!(is_sealed(&lab), "{faults}");
        assert_eq!(lab.graph().await, graph, "{faults}");
        lab.quit().await;
    }
    for faults in ["panic:qmp_bitmap_unload:1", "panic:seal:1"] {
        let lab = start(faults, false).await;
        lab.run("backup-access-bitmap-load", load_request(&lab)).await;
        let graph = lab.graph().await;
        lab.try_run("backup-access-bitmap-unload", unload.clone()).await.unwrap_err();
        all_happened(&lab, faults);
        assert_eq!(lab.graph().await, graph, "{faults}");
        assert!(!is_sealed(&lab), "{faults}");
        lab.run("backup-access-bitmap-unload", unload.clone()).await;
        assert!(is_sealed(&lab), "{faults}");
        lab.quit().await;
    }
}

#[tokio::test]
async fn a_panic_while_a_disk_is_closed_leaves_its_bitmap_file_unsealed() {
    for (faults, sealed) in [("", true), ("panic:sentinel_close:1", false), ("panic:seal:1", false)]
    {
        let lab = start(faults, true).await;
        // The lab's own folder goes with it.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bitmap");
        let mut request = load_request(&lab);
        request["file"] = json!(path);
        lab.run("backup-access-bitmap-load", request).await;
        lab.quit().await;
        assert_eq!(std::fs::read(&path).unwrap()[12] == 1, sealed, "{faults}");
    }
}

/// Guest requests wait for room in a full buffer, or for their data to be written through to a slow
/// image, when a flusher panics.
#[tokio::test]
async fn waiting_guest_requests_go_on_when_a_flusher_panics() {
    for (faults, buffer_bytes) in
        [("panic:write_log:6", SMALL.buffer), ("panic:write_log:9", 0), ("panic:flusher:5", 0)]
    {
        println!("{faults}");
        let lab = Lab::start(Setup { faults, slow_fleecing: true, ..Setup::default() }).await;
        lab.guest_writes("disk0", OLD, 0, DISK_BYTES).await;
        let graph = lab.graph().await;
        let mut events = lab.session().events();
        let change = json!({ "fleecing": "slow", "buffer-size": buffer_bytes });
        let infos = lab.setup("t", json!([device(&change)])).await;
        let export = lab.export(&infos[0]).await;
        let mut writes: Vec<String> =
            (0..64).map(|n| format!("aio_write -q -P {NEW:#x} {}k 64k", n * 64)).collect();
        writes.push("aio_flush".to_owned());
        assert_eq!(lab.try_io("disk0", &writes).await, "");
        all_happened(&lab, faults);
        is_broken(&lab, &mut events, &export, 5).await;
        lab.expect("disk0", NEW, 0, DISK_BYTES).await;
        assert_eq!(lab.teardown("t", false).await["existed"], true);
        assert_eq!(lab.graph().await, graph);
        works_again(lab, &graph).await;
    }
}

/// The reader releases all of a segment of the log.
#[tokio::test]
async fn a_panic_while_space_is_given_back_breaks_the_snapshot() {
    let faults = "panic:discard_log:1";
    let (lab, graph, mut events, export) = begin(faults, &json!({ "buffer-size": 0 })).await;
    guest_works(&lab).await;
    assert_ne!(reader_works(&lab, &export, &["discard 0 3m"]).await, 0);
    all_happened(&lab, faults);
    is_broken(&lab, &mut events, &export, 5).await;
    ends_well(lab, &graph).await;
}

#[tokio::test]
async fn with_break_guest_write_a_failed_allocation_fails_the_write_only() {
    let lab = start("alloc:block:2", false).await;
    let graph = lab.graph().await;
    let change = json!({ "on-error": "break-guest-write" });
    let infos = lab.setup("t", json!([device(&change)])).await;
    let export = lab.export(&infos[0]).await;
    let write = |at: &str| format!("write -P {NEW:#x} {at} 64k");
    let text = lab.try_io("disk0", &[write("0"), write("128k"), write("256k")]).await;
    assert_eq!(text.matches("write failed: ").count(), 1, "{text}");
    lab.expect("disk0", OLD, 128 * KIB, 64 * KIB).await;
    let read = format!("read -P {OLD:#x} 0 3m");
    assert_eq!(reader_works(&lab, &export, &[&read]).await, 0);
    assert_eq!(state(&lab).await["state"], "active");
    guest_works(&lab).await;
    assert_eq!(reader_works(&lab, &export, &[&read]).await, 0);
    ends_well(lab, &graph).await;
}

/// A write makes an older discard void, also where it passes because of a panic.
#[tokio::test]
async fn a_panic_lets_no_older_discard_destroy_a_write() {
    for faults in ["panic:before_write:1", "panic:next_part:1"] {
        println!("{faults}");
        let (lab, graph, mut events, export) = begin(faults, &json!({})).await;
        let write = match faults.contains("next_part") {
            true => "write -z 3m 1m".to_owned(),
            false => format!("write -P {NEW:#x} 3m 1m"),
        };
        let text = lab.try_io("disk0", &["discard 3m 1m", &write]).await;
        assert!(!text.contains("failed"), "the guest: {text}");
        all_happened(&lab, faults);
        is_broken(&lab, &mut events, &export, 5).await;
        assert_eq!(lab.teardown("t", false).await["existed"], true);
        let new = if faults.contains("next_part") { 0 } else { NEW };
        lab.expect("disk0", new, 3 << 20, 1 << 20).await;
        works_again(lab, &graph).await;
    }
}

/// Of two late discards of one release the first one fails for good: the guest must not wait for the other.
#[tokio::test]
async fn a_panic_in_one_late_discard_leaves_no_other_closed() {
    let faults = "panic:discard_source:1";
    let (lab, graph, mut events, export) = begin(faults, &json!({})).await;
    let text = lab.try_io("disk0", &["discard 3m 64k", "discard 3200k 64k"]).await;
    assert!(!text.contains("failed"), "the guest: {text}");
    reader_works(&lab, &export, &["discard 3m 256k"]).await;
    all_happened(&lab, faults);
    is_broken(&lab, &mut events, &export, 5).await;
    let write = format!("write -P {NEW:#x} 3m 256k");
    let text = lab.try_io("disk0", &[write]).await;
    assert!(!text.contains("failed"), "the guest: {text}");
    assert_eq!(lab.teardown("t", false).await["existed"], true);
    lab.expect("disk0", NEW, 3 << 20, 256 * KIB).await;
    works_again(lab, &graph).await;
}
