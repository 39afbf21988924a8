// SPDX-License-Identifier: MIT OR Apache-2.0
//! The commands of backup accesses, on the real storage daemon and the real emulator: what is
//! refused and that it changes nothing, what setup and teardown leave behind, and which bitmap a
//! later setup finds.

#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(dead_code, reason = "shared with tests that use the rest of it")]
mod access_lab;

use std::sync::Arc;

use access_lab::{Change, Client, DISK_BYTES, Lab, Setup};
use serde_json::{Value, json};
use system_tests::qemu::bin_dir;

const MIB: u64 = 1 << 20;

/// A request for `disk0` that is acceptable, with some members replaced.
fn request(target: &str, change: Value) -> Value {
    let mut request = json!({ "target-id": target, "devices": [{ "device": "disk0" }] });
    for (key, value) in change.as_object().unwrap() {
        request[key] = value.clone();
    }
    request
}

/// Requests that must be refused, and a part of the sentence that says why.
fn bad_requests() -> Vec<(Value, &'static str)> {
    let device = |change: Value| {
        let mut device = json!({ "device": "disk0" });
        for (key, value) in change.as_object().unwrap() {
            device[key] = value.clone();
        }
        json!({ "devices": [device] })
    };
    let both = |second: Value| json!({ "devices": [{ "device": "disk0" }, second] });
    vec![
        (request("", json!({})), "1 to 255 bytes"),
        (request(&"x".repeat(256), json!({})), "1 to 255 bytes"),
        (request("t", json!({ "devices": [] })), "list of devices is empty"),
        (request("t", json!({ "granularity": 4095 })), "granularity 4095"),
        (request("t", json!({ "granularity": 2048 })), "granularity 2048"),
        (request("t", json!({ "granularity": 8 * MIB })), "granularity 8388608"),
        (request("t", json!({ "granularity": 0 })), "granularity 0"),
        (request("t", json!({ "timeout": 0 })), "timeout 0"),
        (request("t", json!({ "timeout": 86401 })), "timeout 86401"),
        (request("t", json!({ "buffer-size": 1_u64 << 50 })), "buffer-size"),
        (request("t", json!({ "lease": 86401 })), "lease 86401 is not between 0 and 86400"),
        (request("t", device(json!({ "granularity": 12345 }))), "device 'disk0': granularity"),
        (request("t", device(json!({ "device": "nothing" }))), "device 'nothing'"),
        (request("t", device(json!({ "device": "alone" }))), "'alone-fleecing' does not exist"),
        (request("t", device(json!({ "fleecing": "nothing" }))), "'nothing' does not exist"),
        (request("t", device(json!({ "fleecing": "read-only" }))), "is read-only"),
        (request("t", device(json!({ "fleecing": "small" }))), "too small: it has 524288 bytes"),
        (request("t", device(json!({ "fleecing": "disk0" }))), "is the device itself"),
        (request("t", device(json!({ "fleecing": "disk0-file" }))), "is in use by"),
        (request("t", device(json!({ "fleecing": "exported" }))), "is in use by"),
        (
            request("t", both(json!({ "device": "disk0", "fleecing": "disk1-fleecing" }))),
            "same disk",
        ),
        (
            request("t", both(json!({ "device": "disk1", "fleecing": "disk0-fleecing" }))),
            "for device",
        ),
        (request("t", both(json!({ "device": "disk1", "fleecing": "nothing" }))), "'disk1'"),
        (request("t", both(json!({ "device": "alone", "fleecing": "read-only" }))), "'alone'"),
        (request("t", device(json!({ "device": "a-name-of-23-characters" }))), "must be given"),
    ]
}

#[tokio::test]
async fn bad_requests_are_refused_and_change_nothing() {
    let lab = Lab::start(Setup::default()).await;
    let before = lab.graph().await;
    for (request, reason) in bad_requests() {
        let error = lab.try_run("backup-access-setup", request.clone()).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains(reason), "{request}\nwas refused with: {text}");
        assert_eq!(error.is_device_not_found(), reason == "device 'nothing'");
        assert_eq!(lab.graph().await, before, "after {request}");
    }
    assert_eq!(lab.run("query-backup-access", json!({})).await, json!([]));
    lab.setup("t", json!([{ "device": "disk0" }])).await;
    for (target, devices, reason) in [
        ("t", json!([{ "device": "disk1" }]), "target 't' already has a backup access"),
        ("u", json!([{ "device": "disk0" }]), "'fleecing' must be given: target 't'"),
        ("u", json!([{ "device": "disk1", "fleecing": "disk0-fleecing" }]), "in use by"),
    ] {
        let before = lab.graph().await;
        let request = json!({ "target-id": target, "devices": devices });
        let error = lab.try_run("backup-access-setup", request).await.unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
        assert_eq!(lab.graph().await, before);
    }
    lab.teardown("t", false).await;
    assert_eq!(lab.graph().await, before);
    lab.quit().await;
}

#[tokio::test]
async fn the_storage_of_a_growing_image_is_refused() {
    // QEMU truncates the bitmaps of a file that grows, and aborts if one of them is busy.
    let lab = Lab::start(Setup::default()).await;
    let path = lab.path("growing");
    let created = std::process::Command::new(bin_dir().unwrap().join("qemu-img"))
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg("1M")
        .status();
    assert!(created.unwrap().success());
    for node in [
        json!({ "driver": "file", "node-name": "growing-file", "filename": path }),
        json!({ "driver": "qcow2", "node-name": "growing", "file": "growing-file" }),
    ] {
        lab.run("blockdev-add", node).await;
    }
    let export =
        json!({ "type": "nbd", "id": "growing", "node-name": "growing", "writable": true });
    lab.run("block-export-add", export).await;
    let before = lab.graph().await;
    let request = request(
        "t",
        json!({ "devices": [{
            "device": "growing-file", "fleecing": "disk0-fleecing", "bitmap-mode": "new"
        }] }),
    );
    let error = lab.try_run("backup-access-setup", request).await.unwrap_err().to_string();
    assert!(error.contains("may grow") && error.contains("growing"), "{error}");
    assert_eq!(lab.graph().await, before);
    lab.quit().await;
}

#[tokio::test]
async fn a_snapshot_shows_the_point_in_time_again_and_again() {
    for iothread in [false, true] {
        let lab = Lab::start(Setup { iothread, ..Setup::default() }).await;
        let before = lab.graph().await;
        for round in 0x10..0x13_u8 {
            lab.guest_writes("disk0", round, 0, DISK_BYTES).await;
            lab.guest_writes("disk1", round + 0x80, 0, DISK_BYTES).await;
            let infos = lab.setup("t", json!([{ "device": "disk0" }, { "device": "disk1" }])).await;
            assert_eq!(infos[0]["bitmap-action"], "not-used");
            assert_eq!(infos[0]["size"], DISK_BYTES);
            assert_eq!(infos[0]["drained-ns"], infos[1]["drained-ns"]);
            assert_eq!(infos[0].get("bitmap-name"), None);
            lab.guest_writes("disk0", 0xee, 65536 + 512, MIB).await;
            lab.guest_writes("disk1", 0xdd, 0, MIB).await;
            for (info, pattern) in infos.iter().zip([round, round + 0x80]) {
                let name = lab.export(info).await;
                lab.expect(&name, pattern, 0, DISK_BYTES).await;
            }
            let status = lab.run("query-backup-access", json!({})).await;
            assert_eq!(status[0]["target-id"], "t");
            assert_eq!(status[0]["devices"][0]["state"], "active");
            assert!(status[0]["devices"][0]["captured"].as_u64().unwrap() >= MIB);
            assert_eq!(lab.teardown("t", true).await, json!({ "existed": true }));
            assert_eq!(lab.graph().await, before);
        }
        lab.expect("disk0", 0xee, 65536 + 512, MIB).await;
        lab.quit().await;
    }
}

#[tokio::test]
async fn a_teardown_of_an_unknown_target_is_no_error() {
    let lab = Lab::start(Setup::default()).await;
    assert_eq!(lab.teardown("nobody", true).await, json!({ "existed": false }));
    lab.setup("t", json!([{ "device": "disk0" }])).await;
    assert_eq!(lab.teardown("t", false).await, json!({ "existed": true }));
    assert_eq!(lab.teardown("t", false).await, json!({ "existed": false }));
    lab.quit().await;
}

#[tokio::test]
async fn a_teardown_disconnects_clients() {
    for iothread in [false, true] {
        let lab = Lab::start(Setup { iothread, ..Setup::default() }).await;
        let before = lab.graph().await;
        lab.guest_writes("disk0", 0x42, 0, DISK_BYTES).await;
        let infos = lab.setup("t", json!([{ "device": "disk0" }])).await;
        let name = lab.export(&infos[0]).await;
        let mut clients = [Client::connect(&lab, &name), Client::connect(&lab, &name)];
        for client in &mut clients {
            client.reads(0x42);
        }
        assert_eq!(lab.teardown("t", true).await["existed"], true);
        assert_eq!(lab.graph().await, before);
        let exports = lab.run("query-block-exports", json!({})).await;
        assert!(exports.as_array().unwrap().iter().all(|export| export["id"] != json!(name)));
        lab.quit().await;
    }
}

#[tokio::test]
async fn foreign_users_of_a_snapshot_keep_it() {
    let lab = Lab::start(Setup::default()).await;
    lab.guest_writes("disk0", 0x31, 0, DISK_BYTES).await;
    let infos = lab.setup("t", json!([{ "device": "disk0", "bitmap-mode": "new" }])).await;
    let node = infos[0]["node-name"].as_str().unwrap();
    let above = json!({ "driver": "raw", "node-name": "above", "file": node, "read-only": true });
    lab.run("blockdev-add", above).await;
    let refused =
        lab.try_run("backup-access-teardown", json!({ "target-id": "t", "success": true })).await;
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("above") && text.contains(node), "{text}");
    let status = lab.run("query-backup-access", json!({})).await;
    assert_eq!(status[0]["devices"][0]["state"], "active");
    lab.guest_writes("disk0", 0x32, 0, DISK_BYTES).await;
    let name = lab.export(&infos[0]).await;
    lab.expect(&name, 0x31, 0, DISK_BYTES).await;

    let filter = format!("{}0", &node[..node.len() - 1]);
    let overlay = |node: &str| {
        json!({ "node-name": node, "snapshot-node-name": "overlay",
                "snapshot-file": lab.path("overlay") })
    };
    let job =
        |node: &str| json!({ "job-id": "j", "device": node, "target": "alone", "sync": "full" });
    for (command, arguments) in [
        ("blockdev-del", json!({ "node-name": node })),
        ("blockdev-del", json!({ "node-name": "disk0" })),
        ("blockdev-del", json!({ "node-name": "disk0-fleecing" })),
        ("blockdev-snapshot-sync", overlay("disk0")),
        ("blockdev-snapshot-sync", overlay(&filter)),
        ("blockdev-backup", job("disk0")),
        ("blockdev-mirror", job("disk0")),
        ("blockdev-mirror", job(&filter)),
        ("block_resize", json!({ "node-name": "disk0", "size": DISK_BYTES * 2 })),
        (
            "block-dirty-bitmap-remove",
            json!({ "node": "disk0", "name": lab.bitmaps("disk0").await[0] }),
        ),
        (
            "block-dirty-bitmap-clear",
            json!({ "node": "disk0", "name": lab.bitmaps("disk0").await[0] }),
        ),
    ] {
        assert!(lab.try_run(command, arguments.clone()).await.is_err(), "{command} {arguments}");
    }
    lab.run("blockdev-del", json!({ "node-name": "above" })).await;
    assert_eq!(lab.teardown("t", true).await["existed"], true);
    lab.quit().await;
}

/// One access: changes of the guest since the last one, and what must come of it.
async fn backup(lab: &Lab, request: Value, change: Option<Change>, success: bool) -> Value {
    let mut device = request;
    device["device"] = json!("disk0");
    let infos = lab.setup("t", json!([device])).await;
    if let Some(change) = change {
        lab.guest_writes("disk0", change.pattern, change.offset, change.len).await;
    }
    if infos[0].get("bitmap-name").is_some() {
        let name = lab.export(&infos[0]).await;
        let map = lab.dirty_map(&name, infos[0]["bitmap-name"].as_str().unwrap());
        let sum: u64 = map.iter().map(|area| area.end - area.start).sum();
        assert_eq!(infos[0]["dirty"], sum, "{map:?}");
    }
    assert_eq!(lab.teardown("t", success).await, json!({ "existed": true }));
    infos[0].clone()
}

fn at(offset: u64) -> Option<Change> {
    Some(Change { pattern: 0x77, offset, len: 4096 })
}

#[tokio::test]
async fn generations_decide_which_bitmap_is_used() {
    let lab = Lab::start(Setup::default()).await;
    let generation = |info: &Value| info["generation"].as_str().unwrap().to_owned();
    let reuse = |g: &str| json!({ "bitmap-mode": "use", "generation": g });
    let any = json!({ "bitmap-mode": "use" });

    // A full backup, committed; then one change while it runs and one after it.
    let full = backup(&lab, any.clone(), at(0), true).await;
    assert_eq!(
        (&full["bitmap-action"], &full["dirty"]),
        (&json!("missing-recreated"), &json!(DISK_BYTES))
    );
    lab.guest_writes("disk0", 0x55, 2 * MIB, 1).await;
    let first = backup(&lab, reuse(&generation(&full)), at(3 * MIB), true).await;
    assert_eq!((&first["bitmap-action"], &first["dirty"]), (&json!("used"), &json!(131_072)));
    let second = backup(&lab, any.clone(), None, true).await;
    assert_eq!((&second["bitmap-action"], &second["dirty"]), (&json!("used"), &json!(65536)));

    // The client's last backup is another one: everything is dirty.
    let wrong = backup(&lab, reuse(&generation(&first)), at(0), false).await;
    assert_eq!((&wrong["bitmap-action"], &wrong["dirty"]), (&json!("invalid"), &json!(DISK_BYTES)));
    // That backup failed, or was committed and nobody said so: the client knows.
    let unknown = backup(&lab, any.clone(), None, false).await;
    assert_eq!(unknown["bitmap-action"], "invalid");
    let recovered = backup(&lab, reuse(&generation(&unknown)), at(MIB), false).await;
    assert_eq!((&recovered["bitmap-action"], &recovered["dirty"]), (&json!("used"), &json!(0)));
    // Both generations since are served, with all changes since the older one.
    let again = backup(&lab, reuse(&generation(&unknown)), at(2 * MIB), false).await;
    assert_eq!((&again["bitmap-action"], &again["dirty"]), (&json!("used"), &json!(65536)));
    let later = backup(&lab, reuse(&generation(&recovered)), None, true).await;
    assert_eq!((&later["bitmap-action"], &later["dirty"]), (&json!("used"), &json!(131_072)));

    // Without a mode the bitmap stays and goes on recording.
    let omitted = backup(&lab, json!({}), at(0), false).await;
    assert_eq!((&omitted["bitmap-action"], omitted.get("generation")), (&json!("not-used"), None));
    let kept = backup(&lab, reuse(&generation(&later)), None, true).await;
    assert_eq!((&kept["bitmap-action"], &kept["dirty"]), (&json!("used"), &json!(65536)));
    let fresh =
        backup(&lab, json!({ "bitmap-mode": "new", "granularity": 4096 }), None, true).await;
    assert_eq!((&fresh["bitmap-action"], &fresh["dirty"]), (&json!("new"), &json!(DISK_BYTES)));
    lab.guest_writes("disk0", 0x56, MIB, 1).await;
    let fine = backup(&lab, any.clone(), None, true).await;
    assert_eq!((&fine["bitmap-action"], &fine["dirty"]), (&json!("used"), &json!(4096)));
    let bitmaps = lab.bitmaps("disk0").await;
    assert_eq!(bitmaps.len(), 2, "one and its guard: {bitmaps:?}");
    let removed = backup(&lab, json!({ "bitmap-mode": "none" }), None, true).await;
    assert_eq!(removed["bitmap-action"], "not-used-removed");
    assert_eq!(lab.bitmaps("disk0").await, [] as [String; 0]);
    let none = backup(&lab, json!({ "bitmap-mode": "none" }), None, true).await;
    assert_eq!(none["bitmap-action"], "not-used");
    lab.quit().await;
}

#[tokio::test]
async fn a_bitmap_in_use_is_left_alone() {
    let lab = Lab::start(Setup::default()).await;
    backup(&lab, json!({ "bitmap-mode": "new" }), None, true).await;
    let bitmaps = lab.bitmaps("disk0").await;
    let export = json!({ "type": "nbd", "id": "own", "node-name": "disk0", "name": "own",
                         "bitmaps": [bitmaps[0]] });
    lab.run("block-dirty-bitmap-disable", json!({ "node": "disk0", "name": bitmaps[0] })).await;
    lab.run("block-export-add", export).await;
    for mode in ["use", "new", "none"] {
        let device = json!([{ "device": "disk0", "bitmap-mode": mode }]);
        let request = json!({ "target-id": "t", "devices": device });
        let error = lab.try_run("backup-access-setup", request).await.unwrap_err();
        assert!(
            error.to_string().contains("is in use by export 'guest-disk0' or export 'own'"),
            "{error}"
        );
    }
    assert_eq!(lab.bitmaps("disk0").await, bitmaps);
    lab.run("block-export-del", json!({ "id": "own" })).await;
    // It has not recorded all the time, so it cannot be used any more.
    let info = backup(&lab, json!({ "bitmap-mode": "use" }), None, true).await;
    assert_eq!(info["bitmap-action"], "invalid");
    lab.quit().await;
}

#[tokio::test]
async fn the_daemon_quits_cleanly_with_an_access() {
    for (iothread, with_client) in [(false, false), (false, true), (true, true)] {
        let lab = Lab::start(Setup { iothread, ..Setup::default() }).await;
        let device = |name: &str| json!({ "device": name, "bitmap-mode": "use" });
        backup(&lab, json!({ "bitmap-mode": "new" }), None, true).await;
        let infos = lab.setup("t", json!([device("disk0"), device("disk1")])).await;
        lab.guest_writes("disk0", 0x12, 0, MIB).await;
        let name = lab.export(&infos[0]).await;
        let client = with_client.then(|| Client::connect(&lab, &name));
        lab.quit().await;
        drop(client);
    }
}

#[tokio::test]
async fn a_failure_at_the_last_device_undoes_all() {
    let lab = Lab::start(Setup::default()).await;
    backup(&lab, json!({ "bitmap-mode": "new" }), None, true).await;
    let before = lab.graph().await;
    let bitmaps = lab.bitmaps("disk0").await;
    // A writer beside the filter: QEMU refuses the switch of this disk, after the first one's.
    let second = json!({ "device": "shared", "fleecing": "disk1-fleecing" });
    let devices = json!([{ "device": "disk0", "bitmap-mode": "use" }, second]);
    let request = json!({ "target-id": "t", "devices": devices });
    lab.run(
        "blockdev-mirror",
        json!({ "job-id": "job", "device": "shared", "target": "alone",
        "sync": "none" }),
    )
    .await;
    let with_job = lab.graph().await;
    let error = lab.try_run("backup-access-setup", request).await.unwrap_err();
    assert!(error.to_string().contains("device 'shared'"), "{error}");
    assert_eq!(lab.graph().await, with_job);
    assert_eq!(lab.bitmaps("disk0").await, bitmaps);
    lab.run("block-job-cancel", json!({ "device": "job", "force": true })).await;
    lab.until("the job is gone", async || {
        lab.run("query-block-jobs", json!({})).await == json!([])
    })
    .await;
    assert_eq!(lab.graph().await, before);
    lab.guest_writes("disk0", 0x13, 0, 1).await;
    let info = backup(&lab, json!({ "bitmap-mode": "use" }), None, true).await;
    assert_eq!((&info["bitmap-action"], &info["dirty"]), (&json!("used"), &json!(65536)));
    lab.quit().await;
}

#[tokio::test]
async fn a_stuck_fleecing_image_fails_the_teardown_until_it_moves() {
    let lab = Lab::start(Setup { slow_fleecing: true, ..Setup::default() }).await;
    lab.guest_writes("disk0", 0x61, 0, DISK_BYTES).await;
    let mut events = lab.session().events();
    let device = json!({ "device": "disk0", "fleecing": "slow", "bitmap-mode": "new",
                         "buffer-size": 0, "timeout": 1 });
    let infos = lab.setup("t", json!([device])).await;
    // The guest's write waits for the image, until the snapshot gives up.
    lab.guest_writes("disk0", 0x62, 0, DISK_BYTES).await;
    let event = lab.next_event(&mut events, "BACKUP_ACCESS_BROKEN").await;
    assert_eq!((&event["target-id"], &event["state"]), (&json!("t"), &json!("broken")));
    assert_eq!(event["node-name"], infos[0]["node-name"]);
    assert!(event["errno"].as_i64().is_some_and(|errno| errno > 0), "{event}");
    let status = lab.run("query-backup-access", json!({})).await;
    assert_eq!(status[0]["devices"][0]["state"], "broken");
    let arguments = json!({ "target-id": "t", "success": false });
    let error = lab.try_run("backup-access-teardown", arguments.clone()).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("'slow'") && text.contains("in flight"), "{text}");
    // The guest goes on all the time.
    lab.guest_writes("disk0", 0x63, 2 * MIB, MIB).await;
    lab.until("the image has moved", async || {
        let status = lab.run("query-backup-access", json!({})).await;
        assert_eq!(status[0]["devices"][0]["state"], "closing");
        lab.try_run("backup-access-teardown", arguments.clone()).await.is_ok()
    })
    .await;
    assert_eq!(lab.run("query-backup-access", json!({})).await, json!([]));
    lab.expect("disk0", 0x62, 0, MIB).await;
    lab.quit().await;
}

#[tokio::test]
async fn the_emulator_knows_devices_and_refuses_migration() {
    let lab = Lab::start_emulator(&[]).await;
    let before = lab.graph().await;
    for device in ["disk0", "guest-disk0"] {
        lab.setup("t", json!([{ "device": device, "fleecing": "disk0-fleecing" }])).await;
        let error = lab.try_run("migrate", json!({ "uri": "exec:cat >/dev/null" })).await;
        let text = error.unwrap_err().to_string();
        assert!(text.contains("backup access of target 't'"), "{text}");
        lab.teardown("t", true).await;
        assert_eq!(lab.graph().await, before);
    }
    for _ in 0..2 {
        lab.setup("t", json!([{ "device": "old" }])).await;
        lab.teardown("t", true).await;
        assert_eq!(lab.graph().await, before);
    }
    for device in ["empty", "cd"] {
        let devices = json!([{ "device": device, "fleecing": "disk1-fleecing" }]);
        let request = json!({ "target-id": "t", "devices": devices });
        let error = lab.try_run("backup-access-setup", request).await.unwrap_err();
        assert!(error.to_string().contains("no medium"), "{error}");
    }
    // The device called `disk1` is on the other disk.
    let request = json!({ "target-id": "t", "devices": [{ "device": "disk1" }] });
    let error = lab.try_run("backup-access-setup", request).await.unwrap_err();
    assert!(error.to_string().contains("ambiguous"), "{error}");
    lab.setup("t", json!([{ "device": "disk0", "bitmap-mode": "use" }])).await;
    lab.quit().await;
}

#[tokio::test]
async fn an_always_migratable_emulator_has_no_accesses() {
    let lab = Lab::start_emulator(&["-only-migratable"]).await;
    let before = lab.graph().await;
    let request = json!({ "target-id": "t", "devices": [{ "device": "disk0" }] });
    let error = lab.try_run("backup-access-setup", request).await.unwrap_err();
    assert!(error.to_string().contains("only-migratable"), "{error}");
    assert_eq!(lab.graph().await, before);
    lab.quit().await;
}

#[tokio::test]
async fn setups_and_teardowns_under_guest_writes() {
    for iothread in [false, true] {
        let lab = Arc::new(Lab::start(Setup { iothread, ..Setup::default() }).await);
        let writer = lab.write_forever("disk0");
        for round in 0..20 {
            let devices =
                json!([{ "device": "disk0", "bitmap-mode": "use" }, { "device": "disk1" }]);
            let infos = lab.setup("t", devices).await;
            let names = [lab.export(&infos[0]).await, lab.export(&infos[1]).await];
            if round % 2 == 0 {
                lab.read_all(&names[1]).await;
            }
            assert_eq!(lab.teardown("t", round % 3 != 0).await["existed"], true);
        }
        assert!(writer.stop().await > 0);
        Arc::into_inner(lab).expect("the writer has ended").quit().await;
    }
}

#[tokio::test]
async fn a_teardown_ends_reads_in_flight() {
    for iothread in [false, true] {
        let lab = Lab::start(Setup { iothread, ..Setup::default() }).await;
        lab.guest_writes("disk0", 0x42, 0, DISK_BYTES).await;
        let before = lab.graph().await;
        for round in 0..10 {
            let infos = lab.setup("t", json!([{ "device": "disk0" }])).await;
            let name = lab.export(&infos[0]).await;
            let mut readers = Vec::new();
            for _ in 0..4 {
                let options = provider_nbd::Options { whole_reads: true, ..Default::default() };
                let path = lab.path("nbd");
                let client =
                    provider_nbd::Client::connect_unix(path, &name, options).await.unwrap();
                readers.push(tokio::spawn(async move {
                    let mut count = 0_u64;
                    // Until it is told that there is nothing to read any more.
                    while let Ok(data) = client.read(count % 4 * MIB, MIB as usize).await {
                        assert!(data.iter().all(|&byte| byte == 0x42));
                        count += 1;
                    }
                    count
                }));
            }
            tokio::time::sleep(std::time::Duration::from_millis(round)).await;
            assert_eq!(lab.teardown("t", true).await, json!({ "existed": true }));
            for reader in readers {
                let ended = tokio::time::timeout(std::time::Duration::from_secs(60), reader).await;
                ended.expect("the reader ends").unwrap();
            }
            assert_eq!(lab.graph().await, before);
        }
        lab.quit().await;
    }
}

#[tokio::test]
async fn success_counts_although_the_snapshot_broke() {
    let lab = Lab::start(Setup::default()).await;
    let any = json!({ "bitmap-mode": "use" });
    backup(&lab, any, None, true).await;
    lab.guest_writes("disk0", 0x10, 0, DISK_BYTES).await;
    for success in [false, true] {
        let device = json!({ "device": "disk0", "bitmap-mode": "use", "buffer-size": 0,
                             "fleecing-limit": MIB });
        // An earlier one that failed can be continued only by its generation.
        let infos = lab.setup("t", json!([device])).await;
        lab.guest_writes("disk0", 0x11, 0, 2 * MIB).await;
        let status = lab.run("query-backup-access", json!({})).await;
        assert_eq!(status[0]["devices"][0]["state"], "broken");
        let result = lab.teardown("t", success).await;
        assert_eq!(result["existed"], true);
        let reason = result["reason"].as_str().unwrap();
        assert!(reason.contains("device 'disk0': the fleecing image has reached"), "{reason}");
        let reuse = json!({ "bitmap-mode": "use", "generation": infos[0]["generation"] });
        let next = backup(&lab, reuse, None, true).await;
        let dirty = if success { 2 * MIB } else { DISK_BYTES };
        assert_eq!((&next["bitmap-action"], &next["dirty"]), (&json!("used"), &json!(dirty)));
        lab.guest_writes("disk0", 0x10, 0, DISK_BYTES).await;
    }
    lab.quit().await;
}
