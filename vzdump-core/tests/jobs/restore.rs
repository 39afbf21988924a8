// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restores: what is made, what is checked, what is left after a failure.

use std::path::Path;

use provider_api::{GuestKind, RestoreDevice, VolumeSource};
use vzdump_core::config::guest::VmConfig;
use vzdump_core::journal::recover::recover_guest;
use vzdump_core::journal::{Begin, Entry, Journal, TaskKind};
use vzdump_core::restore::{RestoreOptions, RestoreReport, restore_vm};
use vzdump_core::storage::ImageFormat;

use crate::provider::{ARCHIVE, Script, Stored, run};
use crate::world::World;

pub const NEW_ID: u32 = 200;

/// Two disks: one with data in it, one empty; the second was a qcow2 image.
pub fn stored(dir: &Path) -> Stored {
    let mut disk = vec![0_u8; 1 << 20];
    disk[4096..8192].fill(0xa5);
    let files = [dir.join("scsi0.raw"), dir.join("virtio1.raw")];
    std::fs::write(&files[0], &disk).unwrap();
    std::fs::File::create(&files[1]).unwrap().set_len(3 << 19).unwrap();
    Stored {
        config: "name: web\nargs: -evil\nscsi0: local:100/vm-100-disk-0.raw,iothread=1\n\
                 virtio1: local:100/vm-100-disk-1.qcow2\nide2: none,media=cdrom\n"
            .into(),
        firewall: Some("[OPTIONS]\n".into()),
        devices: vec![
            RestoreDevice { device: "scsi0".into(), size_bytes: 1 << 20 },
            RestoreDevice { device: "virtio1".into(), size_bytes: 3 << 19 },
        ],
        sources: files.map(VolumeSource::Path).to_vec(),
    }
}

pub fn world(change: impl FnOnce(&mut Stored), fail: Option<&'static str>) -> World {
    let world = World::new();
    let dir = world.root.canonicalize().unwrap();
    let mut stored = stored(&dir);
    change(&mut stored);
    let mut script = world.provider.0.script.lock().unwrap();
    *script = Script { fail, restore: Some(stored), ..Script::default() };
    drop(script);
    world
}

pub async fn restore(world: &World, options: &RestoreOptions) -> RestoreReport {
    let World { ctx, provider, sink, cancel, .. } = world;
    restore_vm(ctx, provider, ARCHIVE, NEW_ID, options, sink, cancel).await
}

fn assert_nothing_made(world: &World, what: &str) {
    let layout = &world.ctx.layout;
    assert!(!layout.vm_config_path(NEW_ID).exists(), "{what}: a configuration");
    assert!(!layout.firewall_path(NEW_ID).exists(), "{what}: firewall rules");
    assert!(!world.root.join("state/storage/images/200").exists(), "{what}: volumes");
    assert!(world.journals().is_empty(), "{what}: {:?}", world.journals());
    let private = std::fs::read_dir(layout.run()).unwrap();
    let private: Vec<_> = private
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.to_string_lossy().starts_with("r-"))
        .collect();
    assert!(private.is_empty(), "{what}: {private:?}");
}

pub fn assert_pairs(world: &World, what: &str) {
    let count = |name| world.provider.count(name);
    assert_eq!(
        count("volume_init"),
        count("volume_cleanup"),
        "{what}: {:?}",
        world.provider.calls()
    );
    let begun = usize::from(
        count("restore_vm_init") == 1
            && world.provider.0.script.lock().unwrap().fail != Some("restore_vm_init"),
    );
    assert_eq!(count("cleanup"), begun, "{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_becomes_a_new_vm() {
    let world = world(|_| {}, None);
    let report = restore(&world, &RestoreOptions::default()).await;
    assert!(report.is_success(), "{}", world.sink.text());
    let config = VmConfig::read(&world.ctx.layout.vm_config_path(NEW_ID)).unwrap().unwrap();
    assert_eq!(
        config.to_string(),
        "name: web\nscsi0: local:200/vm-200-disk-0.raw,iothread=1,size=1M\n\
         virtio1: local:200/vm-200-disk-1.qcow2,size=1536K\nide2: none,media=cdrom\n"
    );
    assert!(report.warnings.iter().any(|warning| warning.contains("args")), "{report:?}");
    let images = world.ctx.storages.images("local").unwrap();
    let first = images.volume_path(&report.volumes[0].volume.parse().unwrap()).unwrap();
    let disk = std::fs::read(&first).unwrap();
    assert_eq!(disk.len(), 1 << 20);
    assert!(disk[4096..8192].iter().all(|b| *b == 0xa5) && disk[8192..].iter().all(|b| *b == 0));
    // Holes stay holes.
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&first).unwrap());
    assert!(blocks * 512 <= 64 << 10, "{blocks} blocks");
    let second = report.volumes[1].volume.parse().unwrap();
    assert_eq!(images.volume_size(&second).unwrap(), 3 << 19);
    let rules = std::fs::read_to_string(world.ctx.layout.firewall_path(NEW_ID)).unwrap();
    assert_eq!(rules, "[OPTIONS]\n");
    assert_pairs(&world, "good");
    assert!(world.journals().is_empty());
    // A second one of that number is refused, and changes nothing.
    let again = restore(&world, &RestoreOptions::default()).await;
    assert!(again.error.unwrap().contains("VM 200 exists already"));
    assert!(first.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_format_can_be_chosen() {
    let world = world(|_| {}, None);
    let options = RestoreOptions { format: Some(ImageFormat::Qcow2), ..RestoreOptions::default() };
    let report = restore(&world, &options).await;
    assert!(report.volumes.iter().all(|volume| volume.volume.ends_with(".qcow2")), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_of_the_provider_that_fails_leaves_nothing() {
    for call in ["activate", "guest_config", "restore_vm_init", "volume_init"] {
        let world = world(|_| {}, Some(call));
        let report = restore(&world, &RestoreOptions::default()).await;
        let error = report.error.unwrap();
        assert!(error.contains(&format!("scripted failure of {call}")), "{error}");
        assert_nothing_made(&world, call);
        assert_pairs(&world, call);
    }
    // A failing withdrawal only warns.
    for call in ["volume_cleanup", "cleanup"] {
        let world = world(|_| {}, Some(call));
        let report = restore(&world, &RestoreOptions::default()).await;
        assert!(report.is_success() && !report.warnings.is_empty(), "{call}: {report:?}");
        assert_pairs(&world, call);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_archive_claims_is_checked() {
    type Change = fn(&mut Stored);
    let changes: [(&str, Change); 7] = [
        ("shorter", |stored| stored.devices[1].size_bytes = 2 << 20),
        ("longer", |stored| stored.devices[1].size_bytes = 512),
        ("missing data", |stored| drop(stored.devices.pop())),
        ("bad name", |stored| stored.devices[0].device = "../scsi0".into()),
        ("no configuration", |stored| stored.config.clear()),
        ("a missing file", |stored| {
            stored.sources[1] = VolumeSource::Path("/nonexistent/disk".into());
        }),
        ("a foreign socket", |stored| {
            stored.sources[1] =
                VolumeSource::NbdUnix { socket: "/run/x".into(), export: String::new() };
        }),
    ];
    for (what, change) in changes {
        let world = world(change, None);
        let report = restore(&world, &RestoreOptions::default()).await;
        assert!(report.error.is_some(), "{what}");
        assert_nothing_made(&world, what);
        assert_pairs(&world, what);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qcow2_image_offered_as_raw_is_data() {
    // Its backing file must never be opened.
    let world = world(
        |stored| {
            let VolumeSource::Path(path) = &stored.sources[0] else { unreachable!() };
            let mut fake = vec![0; 1 << 20];
            fake[..4].copy_from_slice(b"QFI\xfb");
            std::fs::write(path, fake).unwrap();
        },
        None,
    );
    let report = restore(&world, &RestoreOptions::default()).await;
    assert!(report.is_success(), "{report:?}");
    let images = world.ctx.storages.images("local").unwrap();
    let path = images.volume_path(&report.volumes[0].volume.parse().unwrap()).unwrap();
    assert_eq!(&std::fs::read(path).unwrap()[..4], b"QFI\xfb");
}

#[tokio::test(flavor = "multi_thread")]
async fn firewall_rules_of_somebody_else_are_kept() {
    let world = world(|_| {}, None);
    let path = world.ctx.layout.firewall_path(NEW_ID);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, "mine").unwrap();
    let report = restore(&world, &RestoreOptions::default()).await;
    assert!(report.error.unwrap().contains("firewall rules already"));
    assert_eq!(std::fs::read_to_string(path).unwrap(), "mine");
    assert!(!world.root.join("state/storage/images/200").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_restore_leaves_nothing() {
    let world = world(|_| {}, None);
    world.cancel.cancel();
    let report = restore(&world, &RestoreOptions::default()).await;
    assert!(report.error.unwrap().contains("cancelled"));
    assert_nothing_made(&world, "cancelled");
}

/// The journal of a restore that died, with its one volume and its private directory.
async fn died(world: &World, config: Option<&str>, complete: bool) -> std::path::PathBuf {
    let World { ctx, .. } = world;
    let begin = Begin::new(TaskKind::Restore, GuestKind::Qemu, NEW_ID, "store").unwrap();
    let journal = Journal::create(&ctx.layout, begin).await.unwrap();
    let private = ctx.layout.run().join("r-12345678");
    std::fs::create_dir_all(&private).unwrap();
    let volume = "local:200/vm-200-disk-0.raw".to_owned();
    let rules = ctx.layout.firewall_path(NEW_ID);
    journal.append(Entry::Directory { path: private }).await.unwrap();
    journal.append(Entry::Volume { volume: volume.clone() }).await.unwrap();
    journal.append(Entry::Volume { volume: "local:200/vm-200-disk-1.raw".into() }).await.unwrap();
    journal.append(Entry::Volume { volume: "local:200/foreign.raw".into() }).await.unwrap();
    journal.append(Entry::Forget { volume: "local:200/foreign.raw".into() }).await.unwrap();
    journal.append(Entry::File { path: rules.clone() }).await.unwrap();
    std::fs::create_dir_all(rules.parent().unwrap()).unwrap();
    std::fs::write(rules, "").unwrap();
    let images = ctx.storages.images("local").unwrap();
    for name in ["vm-200-disk-0", "foreign"] {
        images.allocate(&ctx.tools, NEW_ID, name, ImageFormat::Raw, 512).await.unwrap();
    }
    if let Some(config) = config {
        std::fs::write(ctx.layout.vm_config_path(NEW_ID), config).unwrap();
    }
    if complete {
        journal.append(Entry::Complete).await.unwrap();
    }
    images.volume_path(&volume.parse().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_died_is_removed_unless_its_vm_exists() {
    let mine = "scsi0: local:200/vm-200-disk-0.raw\n";
    for (what, config, complete, stays) in [
        ("before the switch", None, false, false),
        ("somebody else's VM", Some("scsi0: local:200/other.raw\n"), false, false),
        ("after the switch", Some(mine), false, true),
        ("at the end", Some(mine), true, true),
        // What the administrator did to the new VM since must not cost a disk.
        (
            "a disk was detached",
            Some("name: x\nunused0: local:200/vm-200-disk-0.raw\n"),
            false,
            true,
        ),
        (
            "a disk is in a snapshot",
            Some("name: x\n\n[s]\nide0: local:200/vm-200-disk-0.raw,size=1K\n"),
            false,
            true,
        ),
        ("a disk was removed", Some("scsi1: local:200/vm-200-disk-1.raw\n"), false, true),
    ] {
        let world = world(|_| {}, None);
        let disk = died(&world, config, complete).await;
        let left = recover_guest(&world.ctx, GuestKind::Qemu, NEW_ID, &world.sink).await.unwrap();
        assert_eq!(left, [], "{what}");
        assert_eq!(disk.exists(), stays, "{what}");
        // The rules belong to the VM of this number, whoever made it.
        assert_eq!(world.ctx.layout.firewall_path(NEW_ID).exists(), config.is_some(), "{what}");
        assert!(disk.with_file_name("foreign.raw").exists(), "{what}: not ours to remove");
        assert!(world.journals().is_empty() && !world.ctx.layout.run().join("r-12345678").exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_provider_has_mounted_is_not_removed() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    // Unmounted by the provider at its end, or never.
    for fail in [None, Some("cleanup")] {
        let world = world(|_| {}, fail);
        let store = world.root.join("store");
        std::fs::create_dir(&store).unwrap();
        std::fs::write(store.join("archive"), "kept").unwrap();
        world.provider.0.script.lock().unwrap().store = Some(store.clone());
        let report = restore(&world, &RestoreOptions::default()).await;
        assert!(report.is_success(), "{}", world.sink.text());
        assert_eq!(std::fs::read_to_string(store.join("archive")).unwrap(), "kept", "{fail:?}");
        assert!(world.ctx.layout.vm_config_path(NEW_ID).exists());
        if fail.is_some() {
            let warnings = report.warnings.join("\n");
            assert!(warnings.contains("something is mounted at 'store'"), "{warnings}");
            let entry = vzdump_core::journal::read(&world.journals()[0]).unwrap();
            run("umount", &[&entry.directories[0].join("store")]);
            let id = (GuestKind::Qemu, NEW_ID);
            let left = recover_guest(&world.ctx, id.0, id.1, &world.sink).await.unwrap();
            assert_eq!(left, [], "{}", world.sink.text());
        }
        assert!(world.journals().is_empty(), "{fail:?}");
        let left =
            std::fs::read_dir(world.ctx.layout.run()).unwrap().map(|e| e.unwrap().file_name());
        let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with("r-")).collect();
        assert!(left.is_empty(), "{fail:?}: {left:?}");
    }
}
