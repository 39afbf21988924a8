// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restores over a VM that is there, and of single disks: what stays, what goes, and that a kill -9
//! at any step leaves the old guest or the new one, never anything between.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Stdio;

use provider_api::{CancellationToken, GuestKind};
use vzdump_core::config::guest::VmConfig;
use vzdump_core::journal::recover::recover_guest;
use vzdump_core::restore::{DiskChoice, RestoreOptions, RestorePlan, plan_restore, restore_vm};
use vzdump_core::storage::ImageFormat;

use crate::provider::{ARCHIVE, FakeProvider, Script};
use crate::restore::{NEW_ID, assert_pairs, restore, stored, world};
use crate::world::{Lines, World, context, own_command};

/// Of the guest that is there: one disk that the archive has, one that it has not, one of a snapshot.
const OLD: &str = "name: old\nargs: -here\nscsi0: local:200/vm-200-disk-0.raw,size=512\n\
    scsi5: local:200/vm-200-disk-1.raw\n\n[snap]\nscsi0: local:200/vm-200-disk-2.raw\n";
const NEW: &str = "name: web\nscsi0: local:200/vm-200-disk-3.raw,iothread=1,size=1M\n\
    virtio1: local:200/vm-200-disk-4.qcow2,size=1536K\nide2: none,media=cdrom\n\
    unused0: local:200/vm-200-disk-1.raw\nunused1: local:200/vm-200-disk-2.raw\n";
const OLD_BYTE: u8 = 0x11;

fn config_text(world: &World) -> String {
    std::fs::read_to_string(world.ctx.layout.vm_config_path(NEW_ID)).unwrap()
}

fn rules(world: &World) -> Option<String> {
    std::fs::read_to_string(world.ctx.layout.firewall_path(NEW_ID)).ok()
}

/// The images of the guest, by name.
fn images(world: &World) -> BTreeSet<String> {
    let dir = world.root.join("state/storage/images/200");
    let Ok(entries) = std::fs::read_dir(dir) else { return BTreeSet::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn names(numbers: &[&str]) -> BTreeSet<String> {
    numbers.iter().map(|number| format!("vm-200-disk-{number}")).collect()
}

async fn occupied() -> World {
    let world = world(|_| {}, None);
    let storage = world.ctx.storages.images("local").unwrap();
    for n in 0..3 {
        let name = format!("vm-200-disk-{n}");
        let tools = &world.ctx.tools;
        let volume = storage.allocate(tools, NEW_ID, &name, ImageFormat::Raw, 512).await.unwrap();
        std::fs::write(storage.volume_path(&volume).unwrap(), [OLD_BYTE; 512]).unwrap();
    }
    std::fs::write(world.ctx.layout.vm_config_path(NEW_ID), OLD).unwrap();
    let path = world.ctx.layout.firewall_path(NEW_ID);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, "old rules\n").unwrap();
    world
}

fn assert_old_is_intact(world: &World, what: &str) {
    assert_eq!(config_text(world), OLD, "{what}");
    assert_eq!(rules(world).as_deref(), Some("old rules\n"), "{what}");
    assert_eq!(images(world), names(&["0.raw", "1.raw", "2.raw"]), "{what}");
    let dir = world.root.join("state/storage/images/200");
    for n in 0..3 {
        let data = std::fs::read(dir.join(format!("vm-200-disk-{n}.raw"))).unwrap();
        assert!(data.len() == 512 && data.iter().all(|byte| *byte == OLD_BYTE), "{what}: disk {n}");
    }
    assert_nothing_hidden(world, what);
}

fn assert_new_is_there(world: &World, what: &str) {
    assert_eq!(config_text(world), NEW, "{what}");
    assert_eq!(rules(world).as_deref(), Some("[OPTIONS]\n"), "{what}");
    assert_eq!(images(world), names(&["1.raw", "2.raw", "3.raw", "4.qcow2"]), "{what}");
    let disk = std::fs::read(world.root.join("state/storage/images/200/vm-200-disk-3.raw"));
    assert!(disk.unwrap()[4096..8192].iter().all(|byte| *byte == 0xa5), "{what}");
    assert_nothing_hidden(world, what);
}

/// No journal, no directory, nothing staged.
fn assert_nothing_hidden(world: &World, what: &str) {
    let layout = &world.ctx.layout;
    assert!(world.journals().is_empty(), "{what}: {:?}", world.journals());
    let rules = layout.firewall_path(NEW_ID);
    for dir in [layout.run(), &layout.vm_config_dir(), rules.parent().unwrap()] {
        let hidden = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let hidden: Vec<_> = hidden
            .filter(|name| {
                let name = name.to_string_lossy();
                name.starts_with("r-") || name.starts_with('.')
            })
            .collect();
        assert!(hidden.is_empty(), "{what}: {hidden:?} in {}", dir.display());
    }
}

fn force() -> RestoreOptions {
    RestoreOptions { force: true, ..RestoreOptions::default() }
}

fn in_place() -> RestoreOptions {
    RestoreOptions { in_place: true, ..force() }
}

fn one_disk() -> RestoreOptions {
    let choice = DiskChoice { device: "virtio1".into(), target: Some("scsi0".into()) };
    RestoreOptions { disks: vec![choice], ..RestoreOptions::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_replaced_only_when_that_is_asked_for() {
    let world = occupied().await;
    let report = restore(&world, &RestoreOptions::default()).await;
    assert!(report.error.unwrap().contains("--force"));
    assert_old_is_intact(&world, "without force");
    let report = restore(&world, &force()).await;
    assert!(report.is_success(), "{}", world.sink.text());
    assert_eq!(report.removed, ["local:200/vm-200-disk-0.raw"]);
    assert_new_is_there(&world, "with force");
    assert_pairs(&world, "with force");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_must_not_be_replaced_is_not() {
    for (line, words) in
        [("protection: 1", "protected"), ("lock: backup", "locked (backup)"), ("lock: restore", "")]
    {
        let world = occupied().await;
        let text = OLD.replacen("name: old\n", &format!("name: old\n{line}\n"), 1);
        std::fs::write(world.ctx.layout.vm_config_path(NEW_ID), &text).unwrap();
        let report = restore(&world, &force()).await;
        if words.is_empty() {
            // What a restore in place has left is what the next one is for.
            assert!(report.is_success(), "{report:?}");
            continue;
        }
        assert!(report.error.as_ref().unwrap().contains(words), "{report:?}");
        assert_eq!(config_text(&world), text);
        assert_eq!(images(&world).len(), 3);
    }
    let world = occupied().await;
    std::fs::create_dir_all(world.ctx.layout.vm_run_dir(NEW_ID)).unwrap();
    let _qemu = crate::world::start_qemu(&world.ctx.layout.pid_file(NEW_ID));
    for options in [force(), in_place(), one_disk()] {
        let report = restore(&world, &options).await;
        assert!(report.error.unwrap().contains("is running (process"));
        assert_old_is_intact(&world, "running");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_failure_leaves_the_old_guest_as_it_was() {
    for call in ["activate", "guest_config", "restore_vm_init", "volume_init"] {
        for options in [force(), in_place(), one_disk()] {
            let world = occupied().await;
            world.provider.0.script.lock().unwrap().fail = Some(call);
            let report = restore(&world, &options).await;
            assert!(report.error.unwrap().contains("scripted failure"), "{call}");
            assert_old_is_intact(&world, call);
            assert_pairs(&world, call);
        }
    }
    // A length that is not as announced is found before the old disks go.
    let world = occupied().await;
    let with_stored = |change: fn(&mut crate::provider::Stored)| {
        let mut script = world.provider.0.script.lock().unwrap();
        change(script.restore.as_mut().unwrap());
    };
    with_stored(|stored| stored.devices[1].size_bytes = 1 << 20);
    let report = restore(&world, &in_place()).await;
    let error = report.error.unwrap();
    assert!(error.contains("'virtio1'") && error.contains("announced 1048576"), "{error}");
    assert_old_is_intact(&world, "length");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_in_place_makes_room_first() {
    let world = occupied().await;
    let report = restore(&world, &in_place()).await;
    assert!(report.is_success(), "{}", world.sink.text());
    // The name of the disk that went was free again.
    let expected = NEW.replace("disk-3.raw", "disk-0.raw").replace("disk-4", "disk-3");
    assert_eq!(config_text(&world), expected);
    assert_eq!(images(&world), names(&["0.raw", "1.raw", "2.raw", "3.qcow2"]));
    assert_nothing_hidden(&world, "in place");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_disk_goes_to_a_drive_and_the_old_volume_stays() {
    let world = occupied().await;
    let report = restore(&world, &one_disk()).await;
    assert!(report.is_success(), "{}", world.sink.text());
    let expected = OLD
        .replacen("vm-200-disk-0.raw,size=512", "vm-200-disk-3.raw,size=1536K", 1)
        .replacen("disk-1.raw\n", "disk-1.raw\nunused0: local:200/vm-200-disk-0.raw\n", 1);
    assert_eq!(config_text(&world), expected);
    assert_eq!(images(&world), names(&["0.raw", "1.raw", "2.raw", "3.raw"]));
    assert_eq!(rules(&world).as_deref(), Some("old rules\n"), "the rules are not a disk's");
    // With force the volume that is replaced goes.
    let report = restore(&world, &RestoreOptions { force: true, ..one_disk() }).await;
    assert_eq!(report.removed, ["local:200/vm-200-disk-3.raw"]);
    assert_eq!(images(&world), names(&["0.raw", "1.raw", "2.raw", "4.raw"]));
    assert_nothing_hidden(&world, "single");
    // One that the archive has not is named, and nothing is begun.
    let choice = DiskChoice { device: "scsi9".into(), target: None };
    let report = restore(&world, &RestoreOptions { disks: vec![choice], ..one_disk() }).await;
    assert!(report.error.unwrap().contains("no disk 'scsi9'; it has scsi0, virtio1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_vm_has_an_identity_of_its_own_when_that_is_asked_for() {
    let net = "net0: virtio=BC:24:11:00:00:01,bridge=vmbr0\n";
    for unique in [false, true] {
        let world = world(|stored| stored.config.push_str(net), None);
        let report = restore(&world, &RestoreOptions { unique, ..<_>::default() }).await;
        assert!(report.is_success(), "{}", world.sink.text());
        assert_eq!(config_text(&world).contains("BC:24:11:00:00:01"), !unique);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_holds() {
    let world = world(
        |stored| {
            // Some data, so that it lasts: the first two requests come at once.
            let provider_api::VolumeSource::Path(path) = &stored.sources[0] else { unreachable!() };
            std::fs::write(path, vec![7; 16 << 20]).unwrap();
            stored.devices[0].size_bytes = 16 << 20;
        },
        None,
    );
    let options = RestoreOptions { limit_bytes_per_s: Some(8 << 20), ..<_>::default() };
    let started = std::time::Instant::now();
    let report = restore(&world, &options).await;
    assert!(report.is_success(), "{}", world.sink.text());
    assert!(started.elapsed().as_millis() >= 900, "{:?}", started.elapsed());
}

fn listing(world: &World) -> Vec<std::path::PathBuf> {
    let mut all = Vec::new();
    let mut dirs = vec![world.root.clone()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path.clone());
            }
            all.push(path);
        }
    }
    all.sort();
    all
}

async fn plan(world: &World, options: &RestoreOptions) -> Result<RestorePlan, String> {
    let World { ctx, provider, cancel, .. } = world;
    plan_restore(ctx, provider, ARCHIVE, NEW_ID, options, cancel).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_says_what_is_done_and_changes_nothing() {
    let world = occupied().await;
    let before = listing(&world);
    let shown = plan(&world, &force()).await.unwrap();
    assert_eq!(listing(&world), before);
    assert_old_is_intact(&world, "planned");
    assert!(shown.replaces && shown.firewall && shown.problem.is_none(), "{shown:?}");
    let disks: Vec<_> = shown.disks.iter().map(|disk| (disk.key.as_str(), disk.format)).collect();
    assert_eq!(disks, [("scsi0", ImageFormat::Raw), ("virtio1", ImageFormat::Qcow2)]);
    assert_eq!(shown.removed, ["local:200/vm-200-disk-0.raw"]);
    assert_eq!(shown.unused, ["local:200/vm-200-disk-1.raw", "local:200/vm-200-disk-2.raw"]);
    assert!(shown.config.contains("scsi0: local:200/(new),iothread=1,size=1M"), "{shown:?}");
    assert!(shown.warnings.iter().any(|warning| warning.contains("-evil")), "{shown:?}");
    let pool = &shown.space[0];
    assert_eq!((pool.needed_bytes, pool.freed_bytes), ((1 << 20) + (3 << 19), 0));
    assert_eq!(plan(&world, &in_place()).await.unwrap().space[0].freed_bytes, 4096);
    // It is refused as the restore is.
    assert!(plan(&world, &RestoreOptions::default()).await.unwrap_err().contains("--force"));
    let count = |name| world.provider.count(name);
    assert_eq!((count("restore_vm_init"), count("cleanup"), count("volume_init")), (2, 2, 0));
    // And what is planned is done.
    assert!(restore(&world, &force()).await.is_success());
    assert_new_is_there(&world, "done");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_refused_before_anything_is_made() {
    let world = world(
        |stored| {
            let provider_api::VolumeSource::Path(path) = &stored.sources[0] else { unreachable!() };
            let huge = 1 << 46;
            std::fs::File::create(path.with_extension("x")).unwrap();
            stored.devices[0].size_bytes = huge;
        },
        None,
    );
    let shown = plan(&world, &RestoreOptions::default()).await.unwrap();
    assert!(shown.problem.unwrap().contains("--overcommit"));
    let report = restore(&world, &RestoreOptions::default()).await;
    assert!(report.error.unwrap().contains("--overcommit"));
    assert_eq!(world.provider.count("volume_init"), 0);
    assert!(images(&world).is_empty());
}

/// The child of the matrix below.
pub fn restore_in_child(root: &Path) {
    let script = Script { restore: Some(stored(root)), ..Script::default() };
    let provider = FakeProvider::new(&root.join("provider"), script);
    let ctx = context(root, &provider);
    let options = match std::env::var("VZDUMP_TEST_RESTORE").unwrap().as_str() {
        "force" => force(),
        "in place" => in_place(),
        "disk" => one_disk(),
        _ => RestoreOptions::default(),
    };
    let (sink, cancel) = (Lines::default(), CancellationToken::new());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let job = restore_vm(&ctx, &provider, ARCHIVE, NEW_ID, &options, &sink, &cancel);
    let report = runtime.block_on(job);
    std::process::exit(i32::from(!report.is_success()));
}

async fn killed_at(world: &World, kind: &str, step: &str) {
    let mut command = own_command("restore_entry");
    command
        .env("VZDUMP_TEST_RESTORE_ROOT", world.root.canonicalize().unwrap())
        .env("VZDUMP_TEST_RESTORE", kind)
        .env("VZDUMP_TEST_KILL_AT", step)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let ended = tokio::task::spawn_blocking(move || command.status().unwrap()).await.unwrap();
    assert_eq!(ended.signal(), Some(9), "{kind}, {step}: {ended:?}");
    let left = recover_guest(&world.ctx, GuestKind::Qemu, NEW_ID, &world.sink).await.unwrap();
    assert_eq!(left, [], "{kind}, {step}: {}", world.sink.text());
}

/// The steps of every restore up to the switch, and those after it.
const BEFORE: [&str; 5] =
    ["entry:directory", "restore:offered", "entry:volume", "restore:allocated", "restore:filled"];
const AFTER: [&str; 3] = ["restore:switched", "entry:complete", "restore:finished"];

#[tokio::test(flavor = "multi_thread")]
async fn a_new_vm_killed_at_any_step_is_there_or_not() {
    for step in BEFORE.into_iter().chain(["entry:file"]) {
        let world = world(|_| {}, None);
        killed_at(&world, "new", step).await;
        assert!(!world.ctx.layout.vm_config_path(NEW_ID).exists(), "{step}");
        assert!(images(&world).is_empty() && rules(&world).is_none(), "{step}");
        assert!(restore(&world, &RestoreOptions::default()).await.is_success(), "{step}");
    }
    for step in ["entry:complete", "restore:finished"] {
        let world = world(|_| {}, None);
        killed_at(&world, "new", step).await;
        assert_eq!(images(&world), names(&["0.raw", "1.qcow2"]), "{step}");
        assert_nothing_hidden(&world, step);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_vm_killed_at_any_step_is_the_old_or_the_new_one() {
    for step in BEFORE.into_iter().chain(["entry:replace", "entry:switch"]) {
        let world = occupied().await;
        killed_at(&world, "force", step).await;
        assert_old_is_intact(&world, step);
        assert!(restore(&world, &force()).await.is_success(), "{step}");
        assert_new_is_there(&world, step);
    }
    for step in AFTER {
        let world = occupied().await;
        killed_at(&world, "force", step).await;
        assert_new_is_there(&world, step);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_disk_killed_at_any_step_is_the_old_or_the_new_one() {
    for step in BEFORE.into_iter().chain(["entry:replace", "entry:switch"]) {
        let world = occupied().await;
        killed_at(&world, "disk", step).await;
        assert_old_is_intact(&world, step);
    }
    for step in AFTER {
        let world = occupied().await;
        killed_at(&world, "disk", step).await;
        assert!(config_text(&world).contains("scsi0: local:200/vm-200-disk-3.raw"), "{step}");
        assert_eq!(images(&world), names(&["0.raw", "1.raw", "2.raw", "3.raw"]), "{step}");
        assert_nothing_hidden(&world, step);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_in_place_killed_at_any_step_can_be_done_again() {
    for step in ["entry:replace", "entry:directory", "restore:offered"] {
        let world = occupied().await;
        killed_at(&world, "in place", step).await;
        assert_old_is_intact(&world, step);
    }
    let gone = ["restore:locked", "restore:cleared", "entry:volume", "restore:filled"];
    for step in gone.into_iter().chain(["entry:switch"]) {
        let world = occupied().await;
        killed_at(&world, "in place", step).await;
        assert!(world.sink.text().contains("restore it again"), "{step}");
        let config = VmConfig::parse(&config_text(&world));
        assert_eq!(config.get("lock"), Some("restore"), "{step}");
        // What was not to be replaced is all there, and nothing else.
        assert_eq!(images(&world), names(&["1.raw", "2.raw"]), "{step}");
        assert!(
            images(&world).iter().all(|name| config.names_volume(&format!("local:200/{name}")))
        );
        assert_nothing_hidden(&world, step);
        let again = restore(&world, &in_place()).await;
        assert!(again.is_success(), "{step}: {}", world.sink.text());
        assert_eq!(VmConfig::parse(&config_text(&world)).get("lock"), None, "{step}");
    }
    for step in AFTER {
        let world = occupied().await;
        killed_at(&world, "in place", step).await;
        assert_eq!(images(&world), names(&["0.raw", "1.raw", "2.raw", "3.qcow2"]), "{step}");
        assert_eq!(rules(&world).as_deref(), Some("[OPTIONS]\n"), "{step}");
        assert_nothing_hidden(&world, step);
    }
}
