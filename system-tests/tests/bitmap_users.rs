// SPDX-License-Identifier: MIT OR Apache-2.0
//! A bitmap that somebody uses is never taken, merged or removed: what is refused says by whom, and
//! changes nothing. And the command that removes a target's bitmaps.

#![allow(clippy::unwrap_used, reason = "tests")]

use serde_json::{Value, json};
use system_tests::disk_form::DiskForm;
use system_tests::storage::{Storage, fill, folder, until};

const DISK_BYTES: u64 = 4 << 20;

/// A daemon with `disk0` and `disk1`, each with a fleecing image and the bitmap of target `t`.
async fn two_disks(form: DiskForm) -> Storage {
    let folder = folder().unwrap();
    for disk in ["disk0", "disk1"] {
        form.create(folder.path(), disk, DISK_BYTES).unwrap();
        DiskForm::Raw.create(folder.path(), &format!("{disk}-fleecing"), DISK_BYTES).unwrap();
    }
    let storage = Storage::start_in(folder).await.unwrap();
    for disk in ["disk0", "disk1"] {
        form.open(&storage, disk).await.unwrap();
        DiskForm::Raw.open(&storage, &format!("{disk}-fleecing")).await.unwrap();
        storage.export_disk(disk, None).await.unwrap();
    }
    storage.setup(both("new")).await.unwrap();
    storage.teardown(true).await.unwrap();
    storage
}

fn both(mode: &str) -> Value {
    json!([{ "device": "disk0", "bitmap-mode": mode }, { "device": "disk1", "bitmap-mode": mode }])
}

/// What exists: nodes, links, and the bitmaps of both disks with all their properties.
async fn everything(storage: &Storage) -> (Vec<String>, Vec<Value>) {
    let nodes = storage.run("query-named-block-nodes", json!({ "flat": true })).await.unwrap();
    let nodes = nodes.as_array().unwrap().iter();
    let mut bitmaps: Vec<Value> =
        nodes.map(|node| json!([node["node-name"], node.get("dirty-bitmaps")])).collect();
    bitmaps.sort_by_key(Value::to_string);
    (storage.graph().await.unwrap(), bitmaps)
}

async fn refused(storage: &Storage, command: &str, arguments: Value) -> String {
    let before = everything(storage).await;
    let error = storage.try_run(command, arguments.clone()).await;
    let text = match error {
        Ok(reply) => panic!("{command} {arguments}: {reply}"),
        Err(error) => error.to_string(),
    };
    assert_eq!(everything(storage).await, before, "{command} {arguments} changed something");
    text
}

/// Removes bitmaps; which ones.
async fn removed(storage: &Storage, arguments: Value) -> Vec<Value> {
    let result = storage.run("backup-access-bitmap-remove", arguments).await.unwrap();
    result["removed"].as_array().unwrap().clone()
}

fn setup(mode: &str) -> Value {
    json!({ "target-id": "t", "devices": both(mode) })
}

/// The bitmap of the target on a disk; not its guard.
async fn bitmap(storage: &Storage, disk: &str) -> String {
    let names = storage.bitmaps(disk).await.unwrap();
    let mut names = names.into_iter().filter(|name| !name.ends_with("-guard"));
    names.next().expect("a bitmap")
}

#[tokio::test]
async fn an_exported_bitmap_is_left_alone_and_the_export_is_named() {
    let storage = two_disks(DiskForm::Raw).await;
    let name = bitmap(&storage, "disk1").await;
    let disable = json!({ "node": "disk1", "name": name });
    storage.run("block-dirty-bitmap-disable", disable).await.unwrap();
    let export = json!({ "type": "nbd", "id": "somebody", "node-name": "disk1",
                         "name": "somebody", "bitmaps": [name] });
    storage.run("block-export-add", export).await.unwrap();
    let remove = json!({ "target-id": "t" });
    for (command, arguments) in [
        ("backup-access-setup", setup("use")),
        ("backup-access-setup", setup("new")),
        ("backup-access-setup", setup("none")),
        ("backup-access-bitmap-remove", remove.clone()),
        ("backup-access-bitmap-remove", json!({ "target-id": "t", "device": "disk1" })),
    ] {
        let text = refused(&storage, command, arguments).await;
        assert!(text.contains("'disk1'") && text.contains(&name), "{text}");
        assert!(command.ends_with("setup") || text.contains("target 't'"), "{text}");
        assert!(text.contains("is in use by") && text.contains("export 'somebody'"), "{text}");
    }
    // Without the bitmap there is nothing against it.
    let devices = json!([{ "device": "disk0" }, { "device": "disk1" }]);
    storage.setup(devices).await.unwrap();
    storage.teardown(true).await.unwrap();
    storage.run("block-export-del", json!({ "id": "somebody" })).await.unwrap();
    storage.run("backup-access-bitmap-remove", remove).await.unwrap();
    assert_eq!(storage.bitmaps("disk1").await.unwrap(), [] as [String; 0]);
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn the_bitmap_of_a_block_job_is_left_alone_and_the_job_is_named() {
    let storage = two_disks(DiskForm::Raw).await;
    storage.disk("copy", DISK_BYTES).await.unwrap();
    let guest = storage.client("disk0").await.unwrap();
    fill(&guest, 0x41, 0, DISK_BYTES).await.unwrap();
    let name = bitmap(&storage, "disk0").await;
    let job = json!({ "job-id": "slow", "device": "disk0", "target": "copy", "speed": 1,
                      "sync": "incremental", "bitmap": name });
    storage.run("blockdev-backup", job).await.unwrap();
    let text = refused(&storage, "backup-access-bitmap-remove", json!({ "target-id": "t" })).await;
    assert!(text.contains("node 'disk0'") && text.contains("backup job 'slow'"), "{text}");
    refused(&storage, "backup-access-setup", setup("use")).await;
    storage.run("block-job-cancel", json!({ "device": "slow", "force": true })).await.unwrap();
    until("the job is gone", async || {
        Ok(storage.run("query-block-jobs", json!({})).await? == json!([]))
    })
    .await
    .unwrap();
    let infos = storage.setup(both("use")).await.unwrap();
    assert_eq!(infos[0]["bitmap-action"], "used");
    storage.teardown(true).await.unwrap();
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn the_bitmaps_of_an_access_are_left_alone_until_it_ends() {
    let storage = two_disks(DiskForm::Raw).await;
    let old = bitmap(&storage, "disk0").await;
    storage.setup(both("use")).await.unwrap();
    let text = refused(&storage, "backup-access-bitmap-remove", json!({ "target-id": "t" })).await;
    assert!(text.contains("in use by the backup access of target 't'"), "{text}");
    let on_disk = |name: &str| json!({ "node": "disk0", "name": name });
    let new = storage.bitmaps("disk0").await.unwrap();
    let new = new.iter().find(|name| **name != old && !name.ends_with("-guard")).unwrap();
    for name in [&old, new] {
        for command in
            ["block-dirty-bitmap-remove", "block-dirty-bitmap-clear", "block-dirty-bitmap-enable"]
        {
            let text = refused(&storage, command, on_disk(name)).await;
            assert!(text.contains("in use"), "{text}");
        }
        let export = json!({ "type": "nbd", "id": "e", "node-name": "disk0", "name": "e",
                             "bitmaps": [name] });
        refused(&storage, "block-export-add", export).await;
    }
    // Nobody uses the other target's: it has none.
    assert_eq!(removed(&storage, json!({ "target-id": "u" })).await, [] as [Value; 0]);
    // The guard may be exported meanwhile: it does not change.
    let names = storage.bitmaps("disk0").await.unwrap();
    let guard = names.iter().find(|name| name.ends_with("-guard")).unwrap();
    let export = json!({ "type": "nbd", "id": "e", "node-name": "disk0", "name": "e",
                         "bitmaps": [guard] });
    storage.run("block-export-add", export).await.unwrap();
    assert_eq!(storage.teardown(true).await.unwrap(), json!({ "existed": true }));
    let text = refused(&storage, "backup-access-setup", setup("use")).await;
    assert!(text.contains(guard) && text.contains("export 'e'"), "{text}");
    storage.run("block-export-del", json!({ "id": "e" })).await.unwrap();
    until("the export is gone", async || {
        let exports = storage.run("query-block-exports", json!({})).await?;
        Ok(exports.as_array().is_some_and(|exports| exports.len() == 2))
    })
    .await
    .unwrap();
    let infos = storage.setup(both("use")).await.unwrap();
    assert_eq!(infos[0]["bitmap-action"], "used");
    storage.teardown(true).await.unwrap();
    storage.run("backup-access-bitmap-remove", json!({ "target-id": "t" })).await.unwrap();
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn bitmaps_that_an_access_does_not_use_are_removed_beside_it() {
    let storage = two_disks(DiskForm::Raw).await;
    storage.setup(json!([{ "device": "disk0" }])).await.unwrap();
    assert_eq!(removed(&storage, json!({ "target-id": "t" })).await.len(), 4);
    assert_eq!(storage.teardown(true).await.unwrap(), json!({ "existed": true }));
    storage.setup(json!([{ "device": "disk1", "bitmap-mode": "use" }])).await.unwrap();
    let other = json!({ "target-id": "t", "device": "disk0" });
    assert_eq!(removed(&storage, other).await, [] as [Value; 0]);
    storage.teardown(true).await.unwrap();
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn bitmaps_are_removed_by_target_and_device_also_from_images() {
    for form in DiskForm::ALL {
        let storage = two_disks(form).await;
        storage.setup_of("u", both("new")).await.unwrap();
        storage.teardown_of("u", true).await.unwrap();
        assert_eq!(storage.bitmaps("disk0").await.unwrap().len(), 4, "two targets, two guards");
        let one = json!({ "target-id": "t", "device": "disk0" });
        let names = storage.bitmaps("disk0").await.unwrap();
        for count in [2, 0] {
            let removed = removed(&storage, one.clone()).await;
            assert_eq!(removed.len(), count, "one and its guard, then nothing: {removed:?}");
            for bitmap in removed {
                assert_eq!(bitmap["node-name"], "disk0");
                assert!(names.contains(&bitmap["bitmap-name"].as_str().unwrap().to_owned()));
            }
            assert_eq!(storage.bitmaps("disk0").await.unwrap().len(), 2);
            assert_eq!(storage.bitmaps("disk1").await.unwrap().len(), 4);
        }
        for (arguments, reason) in [
            (json!({ "target-id": "" }), "1 to 255 bytes"),
            (json!({ "target-id": "t", "device": "nothing" }), "device 'nothing'"),
        ] {
            let text = refused(&storage, "backup-access-bitmap-remove", arguments).await;
            assert!(text.contains(reason), "{text}");
        }
        // Those that the image has stored and loaded again, too.
        let storage = Storage::start_in(storage.stop().await.unwrap()).await.unwrap();
        form.open(&storage, "disk0").await.unwrap();
        form.open(&storage, "disk1").await.unwrap();
        if form.stores_bitmaps() {
            assert_eq!(storage.bitmaps("disk1").await.unwrap().len(), 4);
        }
        for target in ["t", "u"] {
            let all = json!({ "target-id": target });
            storage.run("backup-access-bitmap-remove", all).await.unwrap();
        }
        let storage = Storage::start_in(storage.stop().await.unwrap()).await.unwrap();
        for disk in ["disk0", "disk1"] {
            form.open(&storage, disk).await.unwrap();
            assert_eq!(storage.bitmaps(disk).await.unwrap(), [] as [String; 0], "{form:?}");
        }
        storage.quit().await.unwrap();
    }
}
