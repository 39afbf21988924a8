// SPDX-License-Identifier: MIT OR Apache-2.0
//! The limits and choices of a setup, on the real storage daemon and the real emulator: what is
//! refused and that it changes nothing, what is accepted, and the numbers that a query shows.

#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(dead_code, reason = "shared with tests that use the rest of it")]
mod access_lab;

use access_lab::{DISK_BYTES, Lab, Setup};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Members that are out of range, for a device and for all of them, and what the error says.
fn out_of_range() -> Vec<(Value, String)> {
    let limits = |member: &str, value: u64, range: &str| {
        (json!({ member: value }), format!("{member} {value} is not between {range}"))
    };
    let (mib, most) = (1_048_576, i64::MAX);
    let fleecing = format!("{mib} and {most}");
    let metadata = format!("{mib} and {}", 64 * GIB);
    vec![
        limits("fleecing-limit", 0, &fleecing),
        limits("fleecing-limit", MIB - 1, &fleecing),
        limits("fleecing-limit", u64::MAX, &fleecing),
        limits("metadata-limit", 0, &metadata),
        limits("metadata-limit", MIB - 1, &metadata),
        limits("metadata-limit", 64 * GIB + 1, &metadata),
        limits("buffer-size", 64 * GIB + 1, "0 and 68719476736"),
        limits("reflink-size", 4095, "4096 and 1048576"),
        limits("reflink-size", MIB + 1, "4096 and 1048576"),
        limits("timeout", 0, "1 and 86400"),
        (json!({ "on-error": "pause-guest" }), "on-error".to_owned()),
    ]
}

fn merged(mut object: Value, members: &Value) -> Value {
    for (key, value) in members.as_object().unwrap() {
        object[key] = value.clone();
    }
    object
}

fn request(devices: &Value) -> Value {
    json!({ "target-id": "t", "devices": devices })
}

/// Adds a disk of 16 MiB that reads as zeroes.
async fn add_large_disk(lab: &Lab) {
    let disk = json!({ "driver": "null-co", "node-name": "large", "size": 16 * MIB,
                       "read-zeroes": true });
    lab.run("blockdev-add", disk).await;
}

/// Sets up, and shows the numbers of the first device before it tears down.
async fn accepted(lab: &Lab, request: Value) -> Value {
    lab.run("backup-access-setup", request).await;
    let status = lab.run("query-backup-access", json!({})).await;
    lab.teardown("t", false).await;
    status[0]["devices"][0].clone()
}

#[tokio::test]
async fn members_out_of_range_are_named_and_change_nothing() {
    let lab = Lab::start(Setup::default()).await;
    let before = lab.graph().await;
    let refused = async |request: Value, reasons: &[&str]| {
        let error = lab.try_run("backup-access-setup", request.clone()).await.unwrap_err();
        let text = error.to_string();
        for reason in reasons {
            assert!(text.contains(reason), "{request}\nwas refused with: {text}");
        }
        assert_eq!(lab.graph().await, before, "after {request}");
    };
    for (members, reason) in out_of_range() {
        // QEMU itself checks enums, and names the member only.
        let known = !reason.starts_with("on-error");
        let named = |device: &str| if known { format!("device '{device}'") } else { String::new() };
        let (first, second) = (json!({ "device": "disk0" }), json!({ "device": "disk1" }));
        let top = merged(request(&json!([first, second])), &members);
        refused(top, &[&named("disk0"), &reason]).await;
        let own = request(&json!([first, merged(second.clone(), &members)]));
        refused(own, &[&named("disk1"), &reason]).await;
    }
    let disk = json!([{ "device": "disk0" }]);
    let total = merged(request(&disk), &json!({ "buffer-total": 1024 * GIB + 1 }));
    refused(total, &["buffer-total 1099511627777 is not between 0 and 1099511627776"]).await;
    let own = request(&json!([{ "device": "disk0", "buffer-total": MIB }]));
    refused(own, &["buffer-total", "unexpected"]).await;
    assert_eq!(lab.run("query-backup-access", json!({})).await, json!([]));
    lab.quit().await;
}

#[tokio::test]
async fn values_of_a_device_take_precedence() {
    let lab = Lab::start(Setup::default()).await;
    let before = lab.graph().await;
    // Wrong for all, right for each: nothing is wrong.
    let wrong = json!({ "fleecing-limit": 1, "metadata-limit": 1, "timeout": 0 });
    let device = json!({ "device": "disk0", "fleecing-limit": MIB, "metadata-limit": 64 * GIB,
                         "timeout": 86400, "on-error": "break-guest-write" });
    accepted(&lab, merged(request(&json!([device])), &wrong)).await;
    let all = json!({ "fleecing-limit": i64::MAX, "metadata-limit": MIB, "buffer-total": 1024 * GIB,
                      "on-error": "break-snapshot" });
    let disks = json!([{ "device": "disk0" }, { "device": "disk1" }]);
    accepted(&lab, merged(request(&disks), &all)).await;
    assert_eq!(lab.graph().await, before);
    lab.quit().await;
}

#[tokio::test]
async fn with_a_limit_the_fleecing_image_may_be_smaller_than_the_disk() {
    let lab = Lab::start(Setup::default()).await;
    add_large_disk(&lab).await;
    let before = lab.graph().await;
    let large = json!({ "device": "large", "fleecing": "disk0-fleecing" });
    let tiny = json!({ "device": "large", "fleecing": "small" });
    let limit = json!({ "fleecing-limit": 2 * MIB });
    for (device, members, reason) in [
        (&large, json!({}), "use a larger image or a fleecing-limit"),
        (&tiny, limit.clone(), "with fleecing-limit it needs 1048576 bytes"),
    ] {
        let request = merged(request(&json!([device])), &members);
        let text = lab.try_run("backup-access-setup", request).await.unwrap_err().to_string();
        assert!(text.contains("device 'large'") && text.contains("is too small"), "{text}");
        assert!(text.contains(reason), "{text}");
        assert_eq!(lab.graph().await, before);
    }
    accepted(&lab, merged(request(&json!([large])), &limit)).await;
    accepted(&lab, request(&json!([merged(large, &limit)]))).await;
    // A small disk needs no more than its own size.
    let disk = json!({ "driver": "null-co", "node-name": "tiny", "size": MIB / 2 });
    lab.run("blockdev-add", disk).await;
    let request = request(&json!([{ "device": "tiny", "fleecing": "small" }]));
    accepted(&lab, merged(request, &limit)).await;
    lab.quit().await;
}

#[tokio::test]
async fn a_query_shows_every_counter() {
    let lab = Lab::start(Setup::default()).await;
    lab.guest_writes("disk0", 0x21, 0, DISK_BYTES).await;
    let device = json!({ "device": "disk0", "buffer-size": 0 });
    lab.setup("t", json!([device])).await;
    lab.guest_writes("disk0", 0x22, 0, MIB).await;
    let status = lab.run("query-backup-access", json!({})).await;
    let status = &status[0]["devices"][0];
    for member in [
        "written",
        "log-allocated",
        "discards-postponed",
        "delay-p50-ns",
        "delay-p99-ns",
        "delay-p999-ns",
    ] {
        assert!(status[member].is_u64(), "{member} in {status}");
    }
    let buckets = status["delay-histogram"].as_array().unwrap();
    let limits: Vec<u64> = buckets.iter().map(|b| b["le-ns"].as_u64().unwrap()).collect();
    assert!(limits.is_sorted(), "{limits:?}");
    assert!(buckets.iter().all(|bucket| bucket["count"].as_u64().unwrap() > 0), "{buckets:?}");
    lab.teardown("t", true).await;
    lab.quit().await;
}

#[tokio::test]
async fn nvme_devices_have_the_types_by_which_they_are_known() {
    // Their guests are promised zeroes after a discard, so it must not be postponed.
    let lab = Lab::start_emulator(&[
        "-device",
        "nvme,id=nvme-alone,serial=1,drive=alone",
        "-device",
        "nvme,id=controller,serial=2",
        "-device",
        "nvme-ns,id=nvme-ns-exported,bus=controller,drive=exported",
    ])
    .await;
    let blocks = lab.run("query-block", json!({})).await;
    for (node, id, kind) in
        [("alone", "nvme-alone", "nvme"), ("exported", "nvme-ns-exported", "nvme-ns")]
    {
        let is_ours = |block: &&Value| block["inserted"]["node-name"] == node;
        let block = blocks.as_array().unwrap().iter().find(is_ours).unwrap();
        let user = block["qdev"].as_str().unwrap();
        assert_eq!(user.rsplit('/').next(), Some(id));
        let path = format!("/machine/peripheral/{id}");
        let found = lab.run("qom-get", json!({ "path": path, "property": "type" })).await;
        assert_eq!(found, kind);
        let device = json!({ "device": node, "fleecing": "disk0-fleecing" });
        assert_eq!(accepted(&lab, request(&json!([device]))).await["state"], "active");
    }
    lab.quit().await;
}
