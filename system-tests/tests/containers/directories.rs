// SPDX-License-Identifier: MIT OR Apache-2.0
//! Containers whose files are in an ordinary directory.

use std::path::Path;
use std::process::Command;

use provider_api::Identity;
use system_tests::loopfs::{Kind, LoopFs};
use vzdump_core::guest::BackupMode;
use vzdump_core::job::report::GuestResult;

use crate::backup::{
    assert_committed, assert_one_point_in_time, assert_writes_on, back_up, provider, start_writing,
};
use crate::scene::Scene;

fn run(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

/// A directory as the volume of an unprivileged container that writes.
fn in_directory(scene: &Scene, storage: &str, path: &Path) {
    let root = path.join("images/200/subvol-200-disk-0.subvol");
    std::fs::create_dir_all(&root).unwrap();
    run(Command::new("tar").arg("-xf").arg(&scene.template).arg("-C").arg(&root));
    run(Command::new("chown").args(["-R", "100000:100000"]).arg(&root));
    let config = scene.root.join("etc/lxc/200.conf");
    std::fs::create_dir_all(config.parent().unwrap()).unwrap();
    let volume = format!("{storage}:200/subvol-200-disk-0.subvol,size=0T");
    std::fs::write(config, format!("rootfs: {volume}\nunprivileged: 1\n")).unwrap();
    scene.expect(200);
    start_writing(scene, 200);
}

#[test]
fn directories_that_are_no_subvolumes_are_backed_up_in_every_mode() {
    let disk = LoopFs::new(Kind::Btrfs).unwrap();
    for storage in ["dir", "btrfs"] {
        let scene = Scene::new();
        let path = if storage == "btrfs" { disk.path() } else { scene.root.join("plain") };
        scene.add_storage(storage, "plain", &path);
        in_directory(&scene, "plain", &path);
        let provider = provider(&scene, Identity::MappedRoot);
        for mode in [BackupMode::Snapshot, BackupMode::Suspend, BackupMode::Stop] {
            let (report, log) = back_up(&scene, 200, mode, &provider);
            assert_committed(&report, &log);
            let falls_back = log.contains("it is a directory, and no subvolume");
            assert_eq!(falls_back, mode == BackupMode::Snapshot, "{log}");
            assert_writes_on(&scene, 200);
            assert_one_point_in_time(&provider.tar(&report.archive.unwrap()));
        }
        scene.run(&["ct", "stop", "200", "--now"]);
        let (report, log) = back_up(&scene, 200, BackupMode::Suspend, &provider);
        assert_committed(&report, &log);
    }
}

#[test]
fn a_volume_without_a_size_is_named_before_a_restore_makes_anything() {
    let scene = Scene::with_archives();
    scene.create(201, &[]);
    let config = scene.root.join("etc/lxc/201.conf");
    let unsized_root = scene.config(201).replace("size=64M", "size=0T");
    std::fs::write(config, unsized_root).unwrap();
    scene.run(&["backup", "201"]);
    let volid = scene.run(&["list"])["archives"][0]["volid"].as_str().unwrap().to_owned();
    let refused = scene.fail(&["restore", &volid, "300", "--dry-run"]);
    assert!(refused.contains("'rootfs' of the archive has no size"), "{refused}");
}

#[test]
fn a_root_that_is_a_directory_of_the_host_is_refused_before_the_stop() {
    let scene = Scene::new();
    let path = scene.root.join("plain");
    scene.add_storage("dir", "plain", &path);
    in_directory(&scene, "plain", &path);
    let config = scene.config(200).replace("plain:200", &format!("{}/images/200", path.display()));
    std::fs::write(scene.root.join("etc/lxc/200.conf"), config.replace(",size=0T", "")).unwrap();
    let provider = provider(&scene, Identity::MappedRoot);
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    assert_eq!(report.result, GuestResult::Failed, "{log}");
    assert!(report.error.unwrap().contains("The root file system of the container 200"), "{log}");
    assert!(log.contains("exclude 'rootfs' ('/'): it belongs to the host"), "{log}");
    assert_writes_on(&scene, 200);
}
