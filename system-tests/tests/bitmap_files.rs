// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bitmaps of raw disks in files: what is loaded again after a clean end covers all changes, and
//! whatever else may have happened to the disk or the file is refused, by name and with a reason.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::PathBuf;

use serde_json::{Value, json};
use system_tests::disk_form::DiskForm;
use system_tests::loopfs::LoopDevice;
use system_tests::storage::{Storage, fill, folder, until};
use tempfile::TempDir;

const DISK_BYTES: u64 = 4 << 20;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const LOAD: &str = "backup-access-bitmap-load";
const UNLOAD: &str = "backup-access-bitmap-unload";
const FULL_BACKUP: &str = "a full backup is needed";

fn new_folder() -> TempDir {
    let folder = folder().unwrap();
    for name in ["disk0", "disk0-fleecing", "disk1"] {
        DiskForm::Raw.create(folder.path(), name, DISK_BYTES).unwrap();
    }
    folder
}

async fn open(storage: &Storage) {
    for name in ["disk0", "disk0-fleecing", "disk1"] {
        DiskForm::Raw.open(storage, name).await.unwrap();
    }
}

async fn start(folder: TempDir) -> Storage {
    let storage = Storage::start_in(folder).await.unwrap();
    open(&storage).await;
    storage
}

/// A daemon with the disk, its file loaded, and the guest's export.
async fn start_loaded(folder: TempDir) -> (Storage, bool) {
    let storage = start(folder).await;
    let loaded = load(&storage).await;
    storage.export_disk("disk0", None).await.unwrap();
    (storage, loaded)
}

fn file(storage: &Storage) -> PathBuf {
    storage.path("bitmap")
}

fn load_request(storage: &Storage) -> Value {
    json!({ "device": "disk0", "target-id": "t", "file": file(storage) })
}

async fn load(storage: &Storage) -> bool {
    let result = storage.run(LOAD, load_request(storage)).await.unwrap();
    result["loaded"].as_bool().unwrap()
}

/// A command that must fail and change neither the graph nor the file; what it says.
async fn refused(storage: &Storage, command: &str, arguments: Value) -> String {
    let before = (storage.graph().await.unwrap(), fs::read(file(storage)).ok());
    let result = storage.try_run(command, arguments.clone()).await;
    let text = match result {
        Ok(reply) => panic!("{command} {arguments}: {reply}"),
        Err(error) => error.to_string(),
    };
    let after = (storage.graph().await.unwrap(), fs::read(file(storage)).ok());
    assert!(before == after, "{command} {arguments} changed something: {text}");
    text
}

async fn load_refused(storage: &Storage) -> String {
    let text = refused(storage, LOAD, load_request(storage)).await;
    assert!(text.contains("device 'disk0'"), "{text}");
    text
}

async fn write(storage: &Storage, pattern: u8, offset: u64, len: u64) {
    let guest = storage.client("disk0").await.unwrap();
    fill(&guest, pattern, offset, len).await.unwrap();
}

fn request(generation: Option<&Value>) -> Value {
    let mut device = json!({ "device": "disk0", "bitmap-mode": "use", "granularity": 4096 });
    if let Some(generation) = generation {
        device["generation"] = generation.clone();
    }
    json!([device])
}

/// A folder whose disk has a sealed bitmap file of a full backup with this generation.
async fn sealed() -> (TempDir, Value) {
    let (storage, _) = start_loaded(new_folder()).await;
    let infos = storage.setup(request(None)).await.unwrap();
    storage.teardown(true).await.unwrap();
    write(&storage, 0x10, 0, 4096).await;
    (storage.stop().await.unwrap(), infos[0]["generation"].clone())
}

#[tokio::test]
async fn a_bitmap_outlives_every_clean_end() {
    let (storage, loaded) = start_loaded(new_folder()).await;
    assert!(!loaded, "there was no file");
    let full = storage.setup(request(None)).await.unwrap();
    assert_eq!(full[0]["bitmap-action"], "missing-recreated");
    write(&storage, 0x11, 0, 4096).await;
    storage.teardown(true).await.unwrap();
    let mut generation = full[0]["generation"].clone();
    let mut folder = storage.stop().await.unwrap();
    for round in 1..=3 {
        let (storage, loaded) = start_loaded(folder).await;
        assert!(loaded);
        write(&storage, 0x12, round * MIB, 4096).await;
        let infos = storage.setup(request(Some(&generation))).await.unwrap();
        assert_eq!(infos[0]["bitmap-action"], "used");
        let last = if round == 1 { 0 } else { (round - 1) * MIB + 8 * KIB };
        let wanted = [(last, 4096), (round * MIB, 4096)];
        assert_eq!(storage.dirty_areas(&infos[0]).await.unwrap(), wanted);
        generation = infos[0]["generation"].clone();
        storage.teardown(true).await.unwrap();
        write(&storage, 0x13, round * MIB + 8 * KIB, 4096).await;
        folder = storage.stop().await.unwrap();
    }
}

#[tokio::test]
async fn a_clean_end_during_an_access_keeps_old_and_new_changes() {
    for (emulator, iothread) in [(false, false), (false, true), (true, false)] {
        let (folder, generation) = sealed().await;
        let storage = if emulator {
            Storage::start_emulator_in(folder, &[]).await.unwrap()
        } else {
            Storage::start_in(folder).await.unwrap()
        };
        storage.iothread("io0").await.unwrap();
        open(&storage).await;
        let device = json!({ "driver": "virtio-blk-pci", "id": "guest-device", "drive": "disk0",
                             "share-rw": true });
        // The end of the device comes before that of the sentinel, then after it.
        if emulator {
            storage.run("device_add", device).await.unwrap();
        }
        assert!(load(&storage).await);
        storage.export_disk("disk0", iothread.then_some("io0")).await.unwrap();
        storage.setup(request(Some(&generation))).await.unwrap();
        write(&storage, 0x21, MIB, 4096).await;
        let storage = start(storage.stop().await.unwrap()).await;
        assert!(load(&storage).await, "sealed after the access was settled");
        let infos = storage.setup(request(Some(&generation))).await.unwrap();
        assert_eq!(infos[0]["bitmap-action"], "used");
        assert_eq!(storage.dirty_areas(&infos[0]).await.unwrap(), [(0, 4096), (MIB, 4096)]);
        storage.quit().await.unwrap();
    }
}

#[tokio::test]
async fn after_a_crash_the_file_is_refused() {
    for during_access in [false, true] {
        let (folder, generation) = sealed().await;
        let (storage, loaded) = start_loaded(folder).await;
        assert!(loaded);
        if during_access {
            storage.setup(request(Some(&generation))).await.unwrap();
        }
        let storage = start(storage.kill().unwrap()).await;
        let text = load_refused(&storage).await;
        assert!(
            text.contains("was in use when QEMU ended") && text.contains(FULL_BACKUP),
            "{text}"
        );
        assert!(text.contains(&file(&storage).display().to_string()), "{text}");
        fs::remove_file(file(&storage)).unwrap();
        assert!(!load(&storage).await);
        let infos = storage.setup(request(Some(&generation))).await.unwrap();
        assert_eq!(infos[0]["bitmap-action"], "missing-recreated");
        storage.quit().await.unwrap();
    }
}

#[tokio::test]
async fn a_disk_that_was_changed_meanwhile_is_refused() {
    type Change = fn(&std::path::Path);
    let changes: [(&str, Change); 4] = [
        ("a write", |disk| {
            let file = File::options().write(true).open(disk).unwrap();
            file.write_all_at(b"changed", MIB).unwrap();
        }),
        ("a write whose time was set back", |disk| {
            let file = File::options().write(true).open(disk).unwrap();
            let modified = file.metadata().unwrap().modified().unwrap();
            file.write_all_at(b"changed", MIB).unwrap();
            file.set_modified(modified).unwrap();
        }),
        ("other rights", |disk| {
            fs::set_permissions(disk, fs::Permissions::from_mode(0o600)).unwrap();
        }),
        ("another file", |disk| {
            let copy = disk.with_file_name("copy");
            fs::copy(disk, &copy).unwrap();
            fs::rename(copy, disk).unwrap();
        }),
    ];
    for (what, change) in changes {
        let (folder, _) = sealed().await;
        change(&folder.path().join("disk0"));
        let storage = start(folder).await;
        let text = load_refused(&storage).await;
        assert!(text.contains("was changed or replaced") && text.contains(FULL_BACKUP), "{text}");
        storage.quit().await.unwrap_or_else(|error| panic!("{what}: {error}"));
    }
    let (folder, _) = sealed().await;
    File::options().write(true).open(folder.path().join("disk0")).unwrap().set_len(MIB).unwrap();
    let storage = start(folder).await;
    let text = load_refused(&storage).await;
    assert!(text.contains("4194304 bytes, this one has 1048576"), "{text}");
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn a_changed_truncated_or_foreign_file_is_refused() {
    let (folder, generation) = sealed().await;
    let good = fs::read(folder.path().join("bitmap")).unwrap();
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x40;
        bytes
    };
    let storage = start(folder).await;
    for (bytes, reason) in [
        (flipped(0), "is no bitmap file"),
        (flipped(8), "unknown version"),
        (flipped(12), "checksum"),
        (flipped(60), "checksum"),
        (flipped(good.len() / 2), "checksum"),
        (flipped(good.len() - 1), "checksum"),
        (good[..good.len() - 1].to_vec(), "checksum"),
        (good[..50].to_vec(), "truncated"),
        (Vec::new(), "is no bitmap file"),
        (vec![0; 1 << 20], "too long"),
    ] {
        fs::write(file(&storage), bytes).unwrap();
        let text = load_refused(&storage).await;
        assert!(text.contains(reason), "not {reason}: {text}");
    }
    fs::remove_file(file(&storage)).unwrap();
    fs::create_dir(file(&storage)).unwrap();
    let result = storage.try_run(LOAD, load_request(&storage)).await;
    let text = result.unwrap_err().to_string();
    assert!(text.contains("is no regular file"), "{text}");
    fs::remove_dir(file(&storage)).unwrap();

    fs::write(file(&storage), &good).unwrap();
    let other = json!({ "device": "disk0", "target-id": "u", "file": file(&storage) });
    let text = refused(&storage, LOAD, other).await;
    assert!(text.contains("belongs to another target"), "{text}");
    assert!(load(&storage).await, "the file itself is good");
    let infos = storage.setup(request(Some(&generation))).await.unwrap();
    assert_eq!(infos[0]["bitmap-action"], "used");
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn a_file_is_loaded_before_everything_else_only() {
    let (folder, generation) = sealed().await;
    let storage = start(folder).await;
    let with = |change: Value| {
        let mut request = load_request(&storage);
        for (key, value) in change.as_object().unwrap() {
            request[key] = value.clone();
        }
        request
    };
    for (arguments, reason) in [
        (with(json!({ "device": "nothing" })), "device 'nothing'"),
        (with(json!({ "target-id": "" })), "1 to 255 bytes"),
        (with(json!({ "file": "bitmap" })), "absolute path"),
        (with(json!({ "file": "/" })), "absolute path"),
        (with(json!({ "file": "/nowhere/bitmap" })), "'/nowhere/bitmap': cannot be written"),
    ] {
        let text = refused(&storage, LOAD, arguments).await;
        assert!(text.contains(reason), "not {reason}: {text}");
    }
    storage.setup_of("u", json!([{ "device": "disk0" }])).await.unwrap();
    let text = load_refused(&storage).await;
    assert!(text.contains("access of target 'u' is active"), "{text}");
    storage.teardown_of("u", true).await.unwrap();

    assert!(load(&storage).await);
    let text = load_refused(&storage).await;
    assert!(text.contains("is loaded already"), "{text}");
    let text = refused(&storage, LOAD, with(json!({ "device": "disk1" }))).await;
    assert!(text.contains("is loaded for node 'disk0'"), "{text}");
    let other = json!({ "device": "disk0", "target-id": "u", "file": storage.path("other") });
    storage.run(LOAD, other).await.unwrap();
    // The bitmap of the first one is there, in spite of the second one's.
    let infos = storage.setup(request(Some(&generation))).await.unwrap();
    assert_eq!(infos[0]["bitmap-action"], "used");
    storage.teardown(true).await.unwrap();

    // The guest's first write.
    storage.export_disk("disk1", None).await.unwrap();
    let guest = storage.client("disk1").await.unwrap();
    fill(&guest, 0x31, 0, 512).await.unwrap();
    let late = json!({ "device": "disk1", "target-id": "t", "file": storage.path("late") });
    let text = refused(&storage, LOAD, late).await;
    assert!(text.contains("was written to since it was opened"), "{text}");
    assert!(!storage.path("late").exists());
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn an_image_that_stores_bitmaps_needs_no_file() {
    let folder = new_folder();
    for form in [DiskForm::Qcow2, DiskForm::RawWithQcow2] {
        form.create(folder.path(), &format!("{form:?}"), DISK_BYTES).unwrap();
    }
    let storage = start(folder).await;
    for form in [DiskForm::Qcow2, DiskForm::RawWithQcow2] {
        let name = format!("{form:?}");
        form.open(&storage, &name).await.unwrap();
        let wanted = json!({ "device": name, "target-id": "t", "file": file(&storage) });
        let text = refused(&storage, LOAD, wanted).await;
        assert!(text.contains("stores bitmaps itself"), "{text}");
    }
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn a_loaded_disk_is_deleted_after_unload_only() {
    let (folder, generation) = sealed().await;
    let (storage, _) = start_loaded(folder).await;
    let delete = json!({ "node-name": "disk0" });
    let unload = json!({ "device": "disk0", "target-id": "t" });
    write(&storage, 0x41, MIB, 4096).await;
    let text = refused(&storage, UNLOAD, unload.clone()).await;
    assert!(text.contains("may still be written to"), "{text}");
    storage.run("block-export-del", json!({ "id": "guest-disk0" })).await.unwrap();
    until("the export is gone", async || {
        Ok(storage.run("query-block-exports", json!({})).await? == json!([]))
    })
    .await
    .unwrap();
    let text = refused(&storage, "blockdev-del", delete.clone()).await;
    assert!(text.contains("disk0 is in use"), "{text}");
    storage.setup(request(Some(&generation))).await.unwrap();
    let text = refused(&storage, UNLOAD, unload.clone()).await;
    assert!(text.contains("access of target 't' is active"), "{text}");
    storage.teardown(false).await.unwrap();
    for (arguments, reason) in [
        (json!({ "device": "disk0", "target-id": "u" }), "no bitmap file of target 'u'"),
        (json!({ "device": "disk1", "target-id": "t" }), "no bitmap file of target 't'"),
    ] {
        let text = refused(&storage, UNLOAD, arguments).await;
        assert!(text.contains(reason), "{text}");
    }
    storage.run(UNLOAD, unload.clone()).await.unwrap();
    assert_eq!(storage.bitmaps("disk0").await.unwrap(), [] as [String; 0]);
    let text = refused(&storage, UNLOAD, unload).await;
    assert!(text.contains("no bitmap file of target 't' is loaded"), "{text}");
    storage.run("blockdev-del", delete).await.unwrap();

    // And back again.
    storage.node(system_tests::storage::raw_node("disk0", "disk0-file")).await.unwrap();
    assert!(load(&storage).await);
    let infos = storage.setup(request(Some(&generation))).await.unwrap();
    assert_eq!(infos[0]["bitmap-action"], "used");
    assert_eq!(storage.dirty_areas(&infos[0]).await.unwrap(), [(0, 4096), (MIB, 4096)]);
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn a_disk_that_does_not_tell_is_trusted_on_request_only() {
    let mut folder = new_folder();
    for round in 0..3 {
        let storage = Storage::start_in(folder).await.unwrap();
        let disk = json!({ "driver": "null-co", "node-name": "disk0", "size": DISK_BYTES,
                           "read-zeroes": true });
        storage.node(disk).await.unwrap();
        DiskForm::Raw.open(&storage, "disk0-fleecing").await.unwrap();
        if round > 0 {
            let text = load_refused(&storage).await;
            assert!(text.contains("trust-unmodified") && text.contains(FULL_BACKUP), "{text}");
        }
        let mut trusting = load_request(&storage);
        trusting["trust-unmodified"] = json!(true);
        let result = storage.run(LOAD, trusting).await.unwrap();
        assert_eq!(result["loaded"], round > 0);
        let infos = storage.setup(request(None)).await.unwrap();
        let action = if round > 0 { "used" } else { "missing-recreated" };
        assert_eq!(infos[0]["bitmap-action"], action);
        storage.teardown(true).await.unwrap();
        folder = storage.stop().await.unwrap();
    }
}

#[tokio::test]
async fn a_block_device_is_trusted_on_request_and_a_file_never() {
    let (mut folder, _) = sealed().await;
    let mut device = LoopDevice::new(&folder.path().join("disk0")).unwrap();
    for round in 0..3 {
        let storage = Storage::start_in(folder).await.unwrap();
        let node = json!({ "driver": "host_device", "node-name": "disk0-file",
                           "filename": device.path() });
        storage.node(node).await.unwrap();
        storage.node(system_tests::storage::raw_node("disk0", "disk0-file")).await.unwrap();
        DiskForm::Raw.open(&storage, "disk0-fleecing").await.unwrap();
        let mut trusting = load_request(&storage);
        trusting["trust-unmodified"] = json!(true);
        match round {
            0 => {
                // Sealed with the file that the device stands for.
                let text = refused(&storage, LOAD, trusting.clone()).await;
                assert!(text.contains("stored in another way"), "{text}");
                fs::remove_file(file(&storage)).unwrap();
            }
            _ => {
                let text = load_refused(&storage).await;
                assert!(text.contains("trust-unmodified"), "{text}");
            }
        }
        let result = storage.run(LOAD, trusting).await.unwrap();
        assert_eq!(result["loaded"], round > 0);
        let infos = storage.setup(request(None)).await.unwrap();
        assert_eq!(infos[0]["bitmap-action"] == "used", round > 0);
        storage.teardown(true).await.unwrap();
        folder = storage.stop().await.unwrap();
        // Another device of the same content.
        drop(device);
        device = LoopDevice::new(&folder.path().join("disk0")).unwrap();
    }
    // Trust is not for files, which tell.
    let (folder, _) = sealed().await;
    fs::set_permissions(folder.path().join("disk0"), fs::Permissions::from_mode(0o600)).unwrap();
    let storage = start(folder).await;
    let mut trusting = load_request(&storage);
    trusting["trust-unmodified"] = json!(true);
    let text = refused(&storage, LOAD, trusting).await;
    assert!(text.contains("was changed or replaced"), "{text}");
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn a_guest_that_runs_has_had_its_chance() {
    let (folder, _) = sealed().await;
    let storage = Storage::start_emulator_in(folder, &[]).await.unwrap();
    open(&storage).await;
    let device = |disk: &str| json!({ "driver": "virtio-blk-pci", "drive": disk });
    storage.run("device_add", device("disk1")).await.unwrap();
    storage.run("cont", json!({})).await.unwrap();
    let late = json!({ "device": "disk1", "target-id": "t", "file": storage.path("late") });
    let text = refused(&storage, LOAD, late).await;
    assert!(text.contains("the guest has run"), "{text}");
    // A disk that is about to be plugged in.
    assert!(load(&storage).await);
    storage.run("device_add", device("disk0")).await.unwrap();
    storage.quit().await.unwrap();
}

#[tokio::test]
async fn the_file_of_a_disk_that_has_moved_stays_unsealed() {
    let (folder, _) = sealed().await;
    let storage = Storage::start_emulator_in(folder, &[]).await.unwrap();
    open(&storage).await;
    assert!(load(&storage).await);
    let migration = storage.path("migration");
    let uri = format!("exec:cat > {}", migration.display());
    storage.run("migrate", json!({ "uri": uri })).await.unwrap();
    until("the migration is done", async || {
        let status = storage.run("query-migrate", json!({})).await?;
        anyhow::ensure!(status["status"] != "failed", "{status}");
        Ok(status["status"] == "completed")
    })
    .await
    .unwrap();
    // The other side writes from here on; with a block device nobody would notice.
    let storage = start(storage.stop().await.unwrap()).await;
    let text = load_refused(&storage).await;
    assert!(text.contains("was in use when QEMU ended"), "{text}");
    storage.quit().await.unwrap();
}
