// SPDX-License-Identifier: MIT OR Apache-2.0
//! Several targets at once on the same disks: each has its own point in time and its own bitmaps,
//! they come and go in any order, and what happens to one does not touch another.
//!
//! The random run has seeds: `TARGETS_SEEDS=n` runs n of them instead of 3, `TARGETS_SEED=s` only
//! that one.

#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(dead_code, reason = "shared with tests that use the rest of it")]
mod access_lab;
mod random_targets;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use access_lab::{Client, DISK_BYTES, Lab, Setup};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

const MIB: u64 = 1 << 20;
const KIB: u64 = 1 << 10;
const TARGETS: [&str; 3] = ["a", "b", "c"];
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

/// Fleecing images for three targets on two disks, beside those that are there for the first one.
async fn add_images(lab: &Lab) {
    for disk in ["disk0", "disk1"] {
        for target in ["b", "c"] {
            lab.add_disk(&format!("{disk}-{target}")).await;
        }
    }
}

/// A device of a request, with a fleecing image of the target's own.
fn device(target: &str, disk: &str, bitmap_mode: &str) -> Value {
    let image = if target == "a" { "fleecing" } else { target };
    json!({ "device": disk, "bitmap-mode": bitmap_mode, "fleecing": format!("{disk}-{image}") })
}

fn both(target: &str, bitmap_mode: &str) -> Value {
    json!(["disk0", "disk1"].map(|disk| device(target, disk, bitmap_mode)))
}

fn request(target: &str, devices: &Value) -> Value {
    json!({ "target-id": target, "devices": devices })
}

/// A setup that must be refused for this reason and change nothing.
async fn refused(lab: &Lab, target: &str, devices: Value, reason: &str) {
    let before = lab.graph().await;
    let request = request(target, &devices);
    let error = lab.try_run("backup-access-setup", request.clone()).await.unwrap_err();
    assert!(error.to_string().contains(reason), "{request}\nwas refused with: {error}");
    assert_eq!(lab.graph().await, before, "after {request}");
}

/// Two exported snapshots, and what they must show.
struct View {
    target: &'static str,
    exports: [String; 2],
    patterns: [u8; 2],
}

impl View {
    async fn open(lab: &Lab, target: &'static str, patterns: [u8; 2]) -> Self {
        let infos = lab.setup(target, both(target, "use")).await;
        let exports = [lab.export(&infos[0]).await, lab.export(&infos[1]).await];
        Self { target, exports, patterns }
    }

    async fn check(&self, lab: &Lab) {
        for (export, pattern) in self.exports.iter().zip(self.patterns) {
            lab.expect(export, pattern, 0, DISK_BYTES).await;
        }
    }
}

#[tokio::test]
async fn each_target_has_its_own_point_in_time_in_any_order() {
    for (iothread, order) in [false, true].into_iter().flat_map(|io| ORDERS.map(|o| (io, o))) {
        let lab = Lab::start(Setup { iothread, ..Setup::default() }).await;
        add_images(&lab).await;
        let before = lab.graph().await;
        let mut views = Vec::new();
        for (target, pattern) in TARGETS.into_iter().zip(0x10_u8..) {
            let patterns = [pattern, pattern + 0x40];
            for (disk, pattern) in ["disk0", "disk1"].iter().zip(patterns) {
                lab.guest_writes(disk, pattern, 0, DISK_BYTES).await;
            }
            views.push(View::open(&lab, target, patterns).await);
        }
        for (number, &index) in order.iter().enumerate() {
            // In between the disks change further, in parts of their own.
            let (offset, pattern) = (number as u64 * MIB, 0xe0 + number as u8);
            lab.guest_writes("disk0", pattern, offset, MIB).await;
            lab.guest_writes("disk1", pattern, offset, MIB).await;
            let gone = order[..number].iter().map(|&index| views[index].target);
            let gone: Vec<&str> = gone.collect();
            for view in views.iter().filter(|view| !gone.contains(&view.target)) {
                view.check(&lab).await;
            }
            assert_eq!(lab.teardown(views[index].target, true).await, json!({ "existed": true }));
        }
        assert_eq!(lab.graph().await, before, "order {order:?}");
        for (number, pattern) in (0..3).zip(0xe0_u8..) {
            lab.expect("disk0", pattern, number * MIB, MIB).await;
        }
        lab.quit().await;
    }
}

#[tokio::test]
async fn a_new_filter_is_directly_above_the_disk_and_links_stay_frozen() {
    let lab = Lab::start(Setup::default()).await;
    add_images(&lab).await;
    let mut filters = Vec::new();
    for target in TARGETS {
        let infos = lab.setup(target, json!([device(target, "disk0", "none")])).await;
        let snapshot = infos[0]["node-name"].as_str().unwrap().to_owned();
        filters.push(format!("{}0", &snapshot[..snapshot.len() - 1]));
    }
    let links = async || -> Vec<String> {
        let graph = lab.graph().await;
        let link = |above: &str, below: &str| {
            let (above, below) = (format!("'{above}' -\"file\"->"), format!("'{below}':"));
            graph.iter().any(|line| line.contains(&above) && line.contains(&below))
        };
        let mut chain = vec![filters[0].clone()];
        loop {
            let above = chain.last().unwrap();
            let mut below = filters.iter().map(String::as_str).chain(["disk0"]);
            match below.find(|name| link(above, name)) {
                Some(name) => chain.push(name.to_owned()),
                None => return chain,
            }
        }
    };
    let expected = [filters.as_slice(), &["disk0".to_owned()]].concat();
    assert_eq!(links().await, expected);
    // Nothing can be put between any two of them, before and after one has gone.
    for gone in [None, Some(1)] {
        for node in filters[1..].iter().map(String::as_str).chain(["disk0"]) {
            if gone.is_some_and(|gone| filters[gone] == node) {
                continue;
            }
            let job = json!({ "job-id": "j", "device": node, "target": "alone", "sync": "none" });
            let error = lab.try_run("blockdev-backup", job).await.unwrap_err();
            assert!(error.to_string().contains("Cannot change 'file' link"), "{node}: {error}");
        }
        if gone.is_none() {
            lab.teardown("b", true).await;
        }
    }
    assert_eq!(links().await, [&filters[0], &filters[2], "disk0"]);
    lab.teardown("c", true).await;
    assert_eq!(links().await, [&filters[0], "disk0"]);
    lab.teardown("a", true).await;
    let job = json!({ "job-id": "j", "device": "disk0", "target": "alone", "sync": "none" });
    lab.run("blockdev-backup", job).await;
    lab.quit().await;
}

#[tokio::test]
async fn a_second_target_needs_a_fleecing_image_of_its_own() {
    let lab = Lab::start(Setup::default()).await;
    add_images(&lab).await;
    let infos = lab.setup("a", both("a", "none")).await;
    let snapshot = &infos[0]["node-name"];
    for (devices, reason) in [
        (json!([{ "device": "disk0" }]), "'fleecing' must be given: target 'a' has"),
        (json!([{ "device": "disk0" }]), "with fleecing image 'disk0-fleecing'"),
        (
            json!([{ "device": "disk0", "fleecing": "disk0-fleecing" }]),
            "fleecing image 'disk0-fleecing' is in use by the backup access of target 'a'",
        ),
        (
            json!([{ "device": "disk0-fleecing", "fleecing": "disk0-b" }]),
            "is the fleecing image of device 'disk0' for target 'a'",
        ),
        (json!([{ "device": "alone", "fleecing": "disk0" }]), "in use by"),
        (json!([{ "device": "alone", "fleecing": snapshot }]), "in use by"),
        (json!([{ "device": snapshot, "fleecing": "disk0-b" }]), "part of a backup access"),
        // The second device is wrong.
        (
            json!([{ "device": "disk0", "fleecing": "disk0-b" }, { "device": "disk1" }]),
            "device 'disk1': 'fleecing' must be given",
        ),
    ] {
        refused(&lab, "b", devices, reason).await;
    }
    // The first one's filter stands for its disk.
    let filter = snapshot.as_str().unwrap().replace("-1", "-0");
    lab.setup("b", json!([{ "device": filter, "fleecing": "disk0-b" }])).await;
    for target in ["a", "b"] {
        lab.teardown(target, true).await;
    }
    // The name is free again.
    lab.setup("b", json!([{ "device": "disk0" }])).await;
    lab.quit().await;
}

#[tokio::test]
async fn bitmaps_of_targets_are_independent() {
    let lab = Lab::start(Setup::default()).await;
    add_images(&lab).await;
    let mode = |target: &str, generation: Option<&Value>| {
        let mut device = device(target, "disk0", "use");
        if let Some(generation) = generation {
            device["generation"] = generation.clone();
        }
        json!([device])
    };
    // A full backup of both at once, with a change between the two.
    let a = lab.setup("a", mode("a", None)).await;
    lab.guest_writes("disk0", 1, 0, 64 * KIB).await;
    let b = lab.setup("b", mode("b", None)).await;
    lab.guest_writes("disk0", 2, MIB, 64 * KIB).await;
    for infos in [&a, &b] {
        assert_eq!(infos[0]["bitmap-action"], "missing-recreated");
    }
    lab.teardown("a", true).await;
    lab.teardown("b", true).await;
    lab.guest_writes("disk0", 3, 2 * MIB, 64 * KIB).await;

    // The one saw three changes, the other two; the one's failure is not the other's.
    let next_b = lab.setup("b", mode("b", Some(&b[0]["generation"]))).await;
    let next_a = lab.setup("a", mode("a", Some(&a[0]["generation"]))).await;
    for (infos, dirty) in [(&next_a, 3 * 64 * KIB), (&next_b, 2 * 64 * KIB)] {
        assert_eq!(
            (&infos[0]["bitmap-action"], &infos[0]["dirty"]),
            (&json!("used"), &json!(dirty))
        );
        let export = lab.export(&infos[0]).await;
        let map = lab.dirty_map(&export, infos[0]["bitmap-name"].as_str().unwrap());
        let changes = [0, MIB, 2 * MIB].map(|at| at..at + 64 * KIB);
        let first = if dirty == 3 * 64 * KIB { 0 } else { 1 };
        assert_eq!(map, changes[first..]);
    }
    lab.guest_writes("disk0", 4, 3 * MIB, 64 * KIB).await;
    lab.teardown("b", false).await;
    lab.teardown("a", true).await;
    let last_a = lab.setup("a", mode("a", Some(&next_a[0]["generation"]))).await;
    let last_b = lab.setup("b", mode("b", Some(&b[0]["generation"]))).await;
    for (infos, dirty) in [(last_a, 64 * KIB), (last_b, 3 * 64 * KIB)] {
        assert_eq!(
            (&infos[0]["bitmap-action"], &infos[0]["dirty"]),
            (&json!("used"), &json!(dirty))
        );
    }
    // The first one's bitmaps are removed, the other one's stay.
    lab.teardown("a", true).await;
    lab.setup("a", json!([device("a", "disk0", "none")])).await;
    lab.teardown("a", true).await;
    lab.teardown("b", true).await;
    let mut bitmaps = lab.bitmaps("disk0").await;
    bitmaps.retain(|name| !name.ends_with("-guard"));
    assert_eq!(bitmaps.len(), 1, "{bitmaps:?}");
    lab.quit().await;
}

/// What a guest discarded while an older target needed it is discarded late, through the newer
/// target's filter, which needs it as well.
#[tokio::test]
async fn a_late_discard_of_an_older_target_is_postponed_by_a_newer_one() {
    for iothread in [false, true] {
        let lab = Lab::start(Setup { iothread, ..Setup::default() }).await;
        add_images(&lab).await;
        lab.guest_writes("disk0", 0x51, 0, DISK_BYTES).await;
        let a = lab.setup("a", json!([device("a", "disk0", "none")])).await;
        let a = lab.export(&a[0]).await;
        assert!(!lab.try_io("disk0", &[format!("discard {MIB} {MIB}")]).await.contains("failed"));
        let b = lab.setup("b", json!([device("b", "disk0", "none")])).await;
        let b = lab.export(&b[0]).await;
        let postponed = async || -> Vec<u64> {
            let status = lab.run("query-backup-access", json!({})).await;
            let of = |access: &Value| access["devices"][0]["discards-postponed"].as_u64().unwrap();
            status.as_array().unwrap().iter().map(of).collect()
        };
        assert_eq!(postponed().await, [MIB, 0]);
        // The older one lets go of half of it.
        assert!(!lab.try_io(&a, &[format!("discard {MIB} 512k")]).await.contains("failed"));
        assert_eq!(postponed().await, [MIB / 2, MIB / 2]);
        lab.expect(&b, 0x51, 0, DISK_BYTES).await;
        // A write makes a part of the discard void, for both.
        lab.guest_writes("disk0", 0x52, MIB + 256 * KIB, 512 * KIB).await;
        assert_eq!(postponed().await, [256 * KIB, 256 * KIB]);
        lab.teardown("a", true).await;
        assert_eq!(postponed().await, [512 * KIB]);
        lab.expect(&b, 0x51, 0, DISK_BYTES).await;
        lab.teardown("b", true).await;
        // Now it is done, and only where the guest has not written since.
        for (pattern, offset, len) in [
            (0x51, 0, MIB),
            (0, MIB, 256 * KIB),
            (0x52, MIB + 256 * KIB, 512 * KIB),
            (0, MIB + 768 * KIB, 256 * KIB),
            (0x51, 2 * MIB, 2 * MIB),
        ] {
            lab.expect("disk0", pattern, offset, len).await;
        }
        lab.quit().await;
    }
}

#[tokio::test]
async fn a_failure_of_a_second_setup_leaves_the_first_access_as_it_was() {
    // What happens at each point for the first target is over before; the second one's first and
    // second device are the third and fourth pass. A setup of two devices has 26 steps: 16 to
    // prepare them, 8 to switch them, 2 to tell of them.
    for (faults, reason) in [
        ("panic:filter_open:3", "device 'disk0': Could not open"),
        ("panic:filter_open:4", "device 'disk1': Could not open"),
        ("panic:snapshot_open:4", "device 'disk1': Could not open"),
        ("error:setup_step:42", "device 'disk1': injected"),
        ("panic:setup_step:45", "internal error"),
        ("error:setup_step:49", "device 'disk1': injected"),
        ("panic:setup_step:51", "internal error"),
    ] {
        let lab = Lab::start(Setup { faults, ..Setup::default() }).await;
        add_images(&lab).await;
        first_access_survives(&lab, both("b", "new"), reason).await;
        lab.quit().await;
    }
}

#[tokio::test]
async fn a_disk_that_cannot_be_switched_undoes_the_second_setup() {
    let lab = Lab::start(Setup::default()).await;
    add_images(&lab).await;
    // This node keeps everything from being put below it.
    let keeper = json!({ "driver": "copy-on-read", "node-name": "keeper", "file": "shared",
                         "bottom": "shared" });
    lab.run("blockdev-add", keeper).await;
    let mut devices = both("b", "new");
    devices.as_array_mut().unwrap().push(json!({ "device": "shared", "fleecing": "alone" }));
    first_access_survives(&lab, devices, "device 'shared': Cannot change 'file' link").await;
    lab.quit().await;
}

/// The first target's access to both disks survives a failing setup of a second one, unchanged; then
/// the second one's setup works.
async fn first_access_survives(lab: &Lab, devices: Value, reason: &str) {
    for disk in ["disk0", "disk1"] {
        lab.guest_writes(disk, 0x21, 0, DISK_BYTES).await;
    }
    let begin = lab.graph().await;
    let infos = lab.setup("a", both("a", "new")).await;
    let exports = [lab.export(&infos[0]).await, lab.export(&infos[1]).await];
    for disk in ["disk0", "disk1"] {
        lab.guest_writes(disk, 0x22, 0, 64 * KIB).await;
    }
    let bitmaps = [lab.bitmaps("disk0").await, lab.bitmaps("disk1").await];
    refused(lab, "b", devices, reason).await;
    assert_eq!([lab.bitmaps("disk0").await, lab.bitmaps("disk1").await], bitmaps);
    for (disk, export) in ["disk0", "disk1"].iter().zip(&exports) {
        let job = json!({ "job-id": "j", "device": disk, "target": "alone", "sync": "none" });
        let error = lab.try_run("blockdev-backup", job).await.unwrap_err();
        assert!(error.to_string().contains("Cannot change 'file' link"), "{error}");
        lab.guest_writes(disk, 0x23, MIB, 64 * KIB).await;
        lab.expect(export, 0x21, 0, DISK_BYTES).await;
    }
    // A retry works, and each has its own point in time.
    let second = lab.setup("b", both("b", "new")).await;
    lab.guest_writes("disk1", 0x24, 2 * MIB, 64 * KIB).await;
    let export = lab.export(&second[1]).await;
    lab.expect(&export, 0x22, 0, 64 * KIB).await;
    lab.expect(&export, 0x23, MIB, 64 * KIB).await;
    lab.expect(&export, 0x21, 2 * MIB, 2 * MIB).await;
    lab.expect(&exports[1], 0x21, 0, DISK_BYTES).await;
    for target in ["a", "b"] {
        assert_eq!(lab.teardown(target, true).await, json!({ "existed": true }));
    }
    assert_eq!(lab.graph().await, begin);
    // Both bitmaps recorded what the guest wrote since their point in time.
    for (target, generation, dirty) in [("a", &infos[1], 3), ("b", &second[1], 1)] {
        let mut device = device(target, "disk1", "use");
        device["generation"] = generation["generation"].clone();
        let next = lab.setup(target, json!([device])).await;
        assert_eq!(next[0]["bitmap-action"], "used");
        assert_eq!(next[0]["dirty"], dirty * 64 * KIB);
        lab.teardown(target, true).await;
    }
}

#[tokio::test]
async fn a_broken_snapshot_does_not_touch_another_targets() {
    let lab = Lab::start(Setup { slow_fleecing: true, ..Setup::default() }).await;
    add_images(&lab).await;
    lab.guest_writes("disk0", 0x61, 0, DISK_BYTES).await;
    let mut events = lab.session().events();
    let slow = json!({ "device": "disk0", "fleecing": "slow", "buffer-size": 0, "timeout": 1,
                       "bitmap-mode": "new" });
    for (first, second) in [("a", "b"), ("b", "a")] {
        // Once it is the older one that breaks, once the newer one.
        let mut exports = std::collections::HashMap::new();
        for target in [first, second] {
            let own = if target == "a" { slow.clone() } else { device("b", "disk0", "new") };
            let infos = lab.setup(target, json!([own])).await;
            exports.insert(target, lab.export(&infos[0]).await);
        }
        lab.guest_writes("disk0", 0x62, 0, 2 * MIB).await;
        let event = lab.next_event(&mut events, "BACKUP_ACCESS_BROKEN").await;
        assert_eq!(event["target-id"], "a");
        let status = lab.run("query-backup-access", json!({})).await;
        for access in status.as_array().unwrap() {
            let state = if access["target-id"] == "a" { "broken" } else { "active" };
            assert_eq!(access["devices"][0]["state"], state, "{status}");
        }
        lab.expect(&exports["b"], 0x61, 0, DISK_BYTES).await;
        assert!(lab.try_io(&exports["a"], &["read 0 4096"]).await.contains("failed"));
        assert_eq!(lab.teardown("b", true).await, json!({ "existed": true }));
        lab.until("the slow image has moved", async || {
            let arguments = json!({ "target-id": "a", "success": false });
            lab.try_run("backup-access-teardown", arguments).await.is_ok()
        })
        .await;
        lab.guest_writes("disk0", 0x61, 0, DISK_BYTES).await;
    }
    lab.quit().await;
}

#[tokio::test]
async fn qemu_quits_cleanly_with_several_accesses() {
    for (iothread, order) in [(false, [0, 1, 2]), (false, [2, 0, 1]), (true, [1, 2, 0])] {
        let lab = Lab::start(Setup { iothread, ..Setup::default() }).await;
        add_images(&lab).await;
        let mut clients = Vec::new();
        for index in order {
            let target = TARGETS[index];
            let infos = lab.setup(target, both(target, "use")).await;
            lab.guest_writes("disk0", 0x12, index as u64 * MIB, MIB).await;
            clients.push(Client::connect(&lab, &lab.export(&infos[0]).await));
        }
        lab.teardown(TARGETS[order[1]], true).await;
        lab.quit().await;
    }
}

#[tokio::test]
async fn each_access_of_an_emulator_blocks_migration() {
    let lab = Lab::start_emulator(&[]).await;
    lab.add_disk("b0").await;
    let before = lab.graph().await;
    lab.setup("a", json!([{ "device": "disk0", "bitmap-mode": "use" }])).await;
    let devices = json!([
        { "device": "guest-disk0", "fleecing": "b0", "bitmap-mode": "use" },
        { "device": "old" },
    ]);
    lab.setup("b", devices).await;
    for (target, other) in [("a", "b"), ("b", "a")] {
        lab.teardown(target, true).await;
        if target == "b" {
            continue;
        }
        let error = lab.try_run("migrate", json!({ "uri": "exec:cat >/dev/null" })).await;
        let text = error.unwrap_err().to_string();
        assert!(text.contains(&format!("backup access of target '{other}'")), "{text}");
    }
    assert_eq!(lab.graph().await, before);
    let again = json!([{ "device": "disk0", "bitmap-mode": "use" }]);
    lab.setup("a", again).await;
    lab.setup("b", json!([{ "device": "guest-disk0", "fleecing": "b0" }])).await;
    lab.quit().await;
}

#[test]
fn any_order_of_setups_teardowns_and_requests() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seeds = match number("TARGETS_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("TARGETS_SEEDS").unwrap_or(3),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for seed in seeds {
        let limit = std::time::Duration::from_secs(300);
        let run = async { tokio::time::timeout(limit, random_targets::run(seed)).await };
        match runtime.block_on(run) {
            Ok(Ok(counts)) => println!("seed {seed}: {counts:?}"),
            Ok(Err(error)) => panic!("{error:#}\nrepeat with TARGETS_SEED={seed}"),
            Err(_) => panic!("no end within {limit:?}\nrepeat with TARGETS_SEED={seed}"),
        }
    }
}

/// Backup clients cannot know when another target's disks are switched.
#[tokio::test]
async fn clients_connect_while_another_target_comes_and_goes() {
    for iothread in [false, true] {
        let lab = Arc::new(Lab::start(Setup { iothread, ..Setup::default() }).await);
        // Each drained section waits for a request of so many nanoseconds.
        let far = json!({ "driver": "null-co", "node-name": "far", "size": DISK_BYTES,
                          "latency-ns": 20_000_000, "read-zeroes": true });
        lab.run("blockdev-add", far).await;
        let mut guest = json!({ "type": "nbd", "id": "far", "name": "far", "node-name": "far",
                                "writable": true });
        if iothread {
            guest["iothread"] = json!("io0");
            guest["fixed-iothread"] = json!(true);
        }
        lab.run("block-export-add", guest).await;
        let device = |image: &str| json!([{ "device": "far", "fleecing": image }]);
        let infos = lab.setup("a", device("disk0-fleecing")).await;
        let export = lab.export(&infos[0]).await;
        let writer = lab.write_forever("far");
        let stop = Arc::new(AtomicBool::new(false));
        let client = async |path: PathBuf, export: String, stop: Arc<AtomicBool>| {
            let mut count = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let options = provider_nbd::Options::default();
                let client = provider_nbd::Client::connect_unix(&path, &export, options).await;
                let data = client.unwrap().read(count % 64 * 65536, 65536).await.unwrap();
                assert!(data.iter().all(|&byte| byte == 0));
                count += 1;
            }
            count
        };
        let clients: Vec<_> = (0..3)
            .map(|_| tokio::spawn(client(lab.path("nbd"), export.clone(), Arc::clone(&stop))))
            .collect();
        for _ in 0..20 {
            lab.setup("b", device("disk1-fleecing")).await;
            lab.teardown("b", true).await;
        }
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            assert!(client.await.unwrap() > 0);
        }
        assert!(writer.stop().await > 0);
        lab.teardown("a", true).await;
        Arc::into_inner(lab).expect("the writer has ended").quit().await;
    }
}

/// A client that has got as far as to ask for an export by its name.
async fn about_to_ask(socket: PathBuf) -> UnixStream {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    // "NBDMAGIC", "IHAVEOPT", flags; the client's flags: fixed newstyle, no zeroes.
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting[8..16], b"IHAVEOPT");
    stream.write_all(&3_u32.to_be_bytes()).await.unwrap();
    stream
}

/// NBD_OPT_GO, up to the server's last answer; no request comes after that.
async fn ask_for(stream: &mut UnixStream, export: &str) {
    let name = u32::try_from(export.len()).unwrap();
    let option = [&b"IHAVEOPT"[..], &7_u32.to_be_bytes(), &(name + 6).to_be_bytes()].concat();
    let data = [&name.to_be_bytes()[..], export.as_bytes(), &0_u16.to_be_bytes()].concat();
    stream.write_all(&[option, data].concat()).await.unwrap();
    loop {
        let mut reply = [0; 20];
        stream.read_exact(&mut reply).await.unwrap();
        let field = |at: usize| u32::from_be_bytes(reply[at..at + 4].try_into().unwrap());
        let mut rest = vec![0; field(16) as usize];
        stream.read_exact(&mut rest).await.unwrap();
        match field(12) {
            1 => return,
            3 => {}
            error => panic!("the server refuses {export}: {error:#x}"),
        }
    }
}

/// Everything is drained while the client's negotiation ends; QEMU's own server would wait for its
/// first request then, and the monitor and the guest with it.
#[tokio::test]
async fn an_idle_client_that_connects_in_a_drained_section_holds_nothing_up() {
    for iothread in [false, true] {
        let lab = Arc::new(Lab::start(Setup { iothread, ..Setup::default() }).await);
        add_images(&lab).await;
        let slow = json!({ "driver": "null-co", "node-name": "slow-disk", "size": DISK_BYTES,
                           "latency-ns": 2_000_000_000_u64, "read-zeroes": true });
        lab.run("blockdev-add", slow).await;
        lab.run(
            "block-export-add",
            json!({ "type": "nbd", "id": "slow-disk", "name": "slow-disk",
                                            "node-name": "slow-disk", "writable": true }),
        )
        .await;
        let mut client = about_to_ask(lab.path("nbd")).await;
        let guest = {
            let lab = Arc::clone(&lab);
            tokio::spawn(async move { lab.try_io("slow-disk", &["write 0 4k"]).await })
        };
        let later = std::time::Duration::from_millis(700);
        tokio::time::sleep(later).await;
        let (infos, ()) = tokio::join!(lab.setup("a", both("a", "new")), async {
            tokio::time::sleep(later).await;
            ask_for(&mut client, "disk1").await;
        });
        assert_eq!(infos.len(), 2);
        guest.await.unwrap();
        // The server listens to it.
        let read = [
            &0x2560_9513_u32.to_be_bytes()[..],
            &[0; 4],
            &7_u64.to_be_bytes(),
            &[0; 8],
            &512_u32.to_be_bytes(),
        ]
        .concat();
        client.write_all(&read).await.unwrap();
        let mut reply = [0; 16 + 512];
        client.read_exact(&mut reply).await.unwrap();
        assert_eq!((&reply[4..8], &reply[8..16]), (&[0; 4][..], &7_u64.to_be_bytes()[..]));
        lab.teardown("a", true).await;
        Arc::into_inner(lab).expect("the writer has ended").quit().await;
    }
}
