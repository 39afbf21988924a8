// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bitmaps outlive the process that kept them: stored by a qcow2 image at every clean end, taken
//! along by a live migration, and never trusted after a crash.

#![allow(clippy::unwrap_used, reason = "tests")]

use serde_json::{Value, json};
use system_tests::disk_form::DiskForm;
use system_tests::storage::{Storage, fill, folder, until};
use tempfile::TempDir;

const DISK_BYTES: u64 = 4 << 20;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const NAMES: [&str; 2] = ["disk0", "disk0-fleecing"];

/// Which program has the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    Daemon,
    /// With a virtio disk, which lets others write too.
    Emulator,
}

/// How the process that has the bitmap ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Success,
    Failure,
    /// Told to quit during the access.
    Quit,
    /// Killed during the access.
    Kill,
    /// Killed after the access.
    KillLater,
}

async fn start(program: Program, form: DiskForm, folder: TempDir) -> Storage {
    let storage = match program {
        Program::Daemon => Storage::start_in(folder).await.unwrap(),
        Program::Emulator => Storage::start_emulator_in(folder, &[]).await.unwrap(),
    };
    open(program, form, &storage).await;
    storage.export_disk("disk0", None).await.unwrap();
    storage
}

async fn open(program: Program, form: DiskForm, storage: &Storage) {
    form.open(storage, "disk0").await.unwrap();
    DiskForm::Raw.open(storage, "disk0-fleecing").await.unwrap();
    if program == Program::Emulator {
        let device = json!({ "driver": "virtio-blk-pci", "id": "guest-device", "drive": "disk0",
                             "share-rw": true });
        storage.run("device_add", device).await.unwrap();
    }
}

async fn write(storage: &Storage, pattern: u8, offset: u64, len: u64) {
    let guest = storage.client("disk0").await.unwrap();
    fill(&guest, pattern, offset, len).await.unwrap();
}

fn request(generation: Option<&str>) -> Value {
    let mut device = json!({ "device": "disk0", "bitmap-mode": "use" });
    if let Some(generation) = generation {
        device["generation"] = json!(generation);
    }
    json!([device])
}

fn generation(info: &Value) -> String {
    info["generation"].as_str().unwrap().to_owned()
}

/// One backup, a change, another backup that ends like this, a new start, and the next setup.
async fn outlives(program: Program, form: DiskForm, end: End) -> (Value, Vec<(u64, u64)>) {
    let folder = folder().unwrap();
    form.create(folder.path(), "disk0", DISK_BYTES).unwrap();
    DiskForm::Raw.create(folder.path(), "disk0-fleecing", DISK_BYTES).unwrap();
    let mut storage = start(program, form, folder).await;
    let first = storage.setup(request(None)).await.unwrap();
    assert_eq!(first[0]["bitmap-action"], "missing-recreated");
    storage.teardown(true).await.unwrap();
    // So that the image has stored it once.
    storage = start(program, form, storage.stop().await.unwrap()).await;
    write(&storage, 0x21, 0, 64 * KIB).await;
    let second = storage.setup(request(Some(&generation(&first[0])))).await.unwrap();
    assert_eq!((&second[0]["bitmap-action"], &second[0]["dirty"]), (&json!("used"), &json!(65536)));
    write(&storage, 0x22, MIB, 64 * KIB).await;
    let kept = if end == End::Success { &second } else { &first };
    let folder = match end {
        End::Quit => storage.stop().await.unwrap(),
        End::Kill => storage.kill().unwrap(),
        End::Success | End::Failure | End::KillLater => {
            let success = end == End::Success;
            let ended = storage.teardown(success).await.unwrap();
            assert_eq!(ended, json!({ "existed": true }));
            write(&storage, 0x23, 2 * MIB, 64 * KIB).await;
            match end {
                End::KillLater => storage.kill().unwrap(),
                _ => storage.stop().await.unwrap(),
            }
        }
    };
    let storage = start(program, form, folder).await;
    write(&storage, 0x24, 3 * MIB, 64 * KIB).await;
    let infos = storage.setup(request(Some(&generation(&kept[0])))).await.unwrap();
    let areas = storage.dirty_areas(&infos[0]).await.unwrap();
    storage.teardown(true).await.unwrap();
    storage.quit().await.unwrap();
    (infos[0].clone(), areas)
}

#[tokio::test]
async fn an_image_keeps_bitmaps_over_clean_ends_and_none_is_trusted_after_a_crash() {
    let area = |mib: u64| (mib * MIB, 64 * KIB);
    for form in [DiskForm::Qcow2, DiskForm::RawWithQcow2] {
        for program in [Program::Daemon, Program::Emulator] {
            for (end, wanted) in [
                (End::Success, Some(vec![area(1), area(2), area(3)])),
                (End::Failure, Some(vec![area(0), area(1), area(2), area(3)])),
                (End::Quit, Some(vec![area(0), area(1), area(3)])),
                (End::Kill, None),
                (End::KillLater, None),
            ] {
                let (info, areas) = outlives(program, form, end).await;
                let what = format!("{form:?} {program:?} {end:?}: {info}");
                match wanted {
                    Some(wanted) => {
                        assert_eq!(info["bitmap-action"], "used", "{what}");
                        assert_eq!(areas, wanted, "{what}");
                    }
                    None => {
                        // Between accesses the image has no copy yet of the latest bitmap.
                        let lost = match end {
                            End::Kill => "invalid",
                            _ => "missing-recreated",
                        };
                        assert_eq!(info["bitmap-action"], lost, "{what}");
                        assert_eq!(areas, [(0, DISK_BYTES)], "{what}");
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn without_an_image_that_stores_it_a_bitmap_ends_with_the_process() {
    for end in [End::Success, End::Quit, End::Kill] {
        let folder = folder().unwrap();
        for name in NAMES {
            DiskForm::Raw.create(folder.path(), name, DISK_BYTES).unwrap();
        }
        let storage = start(Program::Daemon, DiskForm::Raw, folder).await;
        let first = storage.setup(request(None)).await.unwrap();
        let folder = match end {
            End::Kill => storage.kill().unwrap(),
            End::Quit => storage.stop().await.unwrap(),
            _ => {
                storage.teardown(true).await.unwrap();
                storage.stop().await.unwrap()
            }
        };
        let storage = start(Program::Daemon, DiskForm::Raw, folder).await;
        let infos = storage.setup(request(Some(&generation(&first[0])))).await.unwrap();
        assert_eq!(infos[0]["bitmap-action"], "missing-recreated");
        storage.quit().await.unwrap();
    }
}

#[tokio::test]
async fn a_disk_that_was_smaller_meanwhile_has_an_invalid_bitmap() {
    for form in [DiskForm::Raw, DiskForm::Qcow2] {
        let folder = folder().unwrap();
        form.create(folder.path(), "disk0", DISK_BYTES).unwrap();
        DiskForm::Raw.create(folder.path(), "disk0-fleecing", 2 * DISK_BYTES).unwrap();
        let storage = Storage::start_in(folder).await.unwrap();
        open(Program::Daemon, form, &storage).await;
        for (sizes, wanted) in [
            (vec![DISK_BYTES - 512, DISK_BYTES], "invalid"),
            (vec![MIB, DISK_BYTES], "invalid"),
            (vec![DISK_BYTES + 512, DISK_BYTES], "used"),
            (vec![2 * DISK_BYTES], "invalid"),
        ] {
            let info = storage.setup(request(None)).await.unwrap();
            storage.teardown(true).await.unwrap();
            for size in &sizes {
                let arguments = json!({ "node-name": "disk0", "size": size });
                storage.run("block_resize", arguments).await.unwrap();
            }
            let infos = storage.setup(request(Some(&generation(&info[0])))).await.unwrap();
            assert_eq!(infos[0]["bitmap-action"], wanted, "{form:?} {sizes:?}");
            storage.teardown(false).await.unwrap();
        }
        storage.quit().await.unwrap();
    }
}

async fn wait_for_migration(storage: &Storage) {
    until("the migration is done", async || {
        let status = storage.run("query-migrate", json!({})).await?;
        let state = status["status"].as_str().unwrap_or("none").to_owned();
        anyhow::ensure!(state != "failed", "{status}");
        Ok(state == "completed")
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_live_migration_takes_the_bitmap_along() {
    for (form, longest) in [(DiskForm::Raw, false), (DiskForm::Raw, true), (DiskForm::Qcow2, false)]
    {
        let shared = folder().unwrap();
        form.create(shared.path(), "disk0", DISK_BYTES).unwrap();
        DiskForm::Raw.create(shared.path(), "disk0-fleecing", DISK_BYTES).unwrap();
        let there = folder().unwrap();
        for name in NAMES {
            std::os::unix::fs::symlink(shared.path().join(name), there.path().join(name)).unwrap();
        }
        let here = start(Program::Emulator, form, shared).await;
        let capabilities = json!({ "capabilities":
            [{ "capability": "dirty-bitmaps", "state": true }] });
        here.run("migrate-set-capabilities", capabilities.clone()).await.unwrap();
        let first = here.setup(request(None)).await.unwrap();
        here.teardown(true).await.unwrap();
        // With the longest name that a bitmap can have.
        for _ in 0..if longest { 20 } else { 0 } {
            here.setup(request(Some(&generation(&first[0])))).await.unwrap();
            here.teardown(false).await.unwrap();
        }
        write(&here, 0x31, MIB, 64 * KIB).await;

        let there = Storage::start_emulator_in(there, &["-incoming", "defer"]).await.unwrap();
        there.run("migrate-set-capabilities", capabilities).await.unwrap();
        open(Program::Emulator, form, &there).await;
        let uri = format!("unix:{}", there.path("migration").display());
        there.run("migrate-incoming", json!({ "uri": uri })).await.unwrap();
        let export = json!({ "id": "guest-disk0", "mode": "hard" });
        here.run("block-export-del", export).await.unwrap();
        until("the export is gone", async || {
            Ok(here.run("query-block-exports", json!({})).await? == json!([]))
        })
        .await
        .unwrap();
        here.run("migrate", json!({ "uri": uri })).await.unwrap();
        wait_for_migration(&here).await;
        wait_for_migration(&there).await;
        here.quit().await.unwrap();

        // Nodes become active when the machine goes on.
        there.run("cont", json!({})).await.unwrap();
        there.export_disk("disk0", None).await.unwrap();
        write(&there, 0x32, 2 * MIB, 64 * KIB).await;
        let infos = there.setup(request(Some(&generation(&first[0])))).await.unwrap();
        assert_eq!(infos[0]["bitmap-action"], "used", "{form:?}");
        let wanted = [(MIB, 64 * KIB), (2 * MIB, 64 * KIB)];
        assert_eq!(there.dirty_areas(&infos[0]).await.unwrap(), wanted, "{form:?}");
        there.teardown(true).await.unwrap();
        there.quit().await.unwrap();
    }
}
