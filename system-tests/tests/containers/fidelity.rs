// SPDX-License-Identifier: MIT OR Apache-2.0
//! A tree of odd things comes back as it was, entry by entry, through the real program.

use std::path::{Path, PathBuf};
use std::process::Command;

use lxc_backend::restore::CtRestoreOptions;
use provider_api::Identity;
use system_tests::fidelity::{compare, make_odd_tree};

use crate::backup::provider;
use crate::restore::restore;
use crate::scene::{Scene, wait_for};

/// A raw image, mounted to be looked at.
pub(crate) struct Mounted(pub(crate) PathBuf);

impl Mounted {
    pub(crate) fn new(image: &Path, at: &Path) -> Self {
        std::fs::create_dir_all(at).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop,ro"]).arg(image).arg(at);
        assert!(mount.status().unwrap().success(), "{}", image.display());
        Self(at.to_owned())
    }

    fn of_memory(at: &Path) -> Self {
        std::fs::create_dir_all(at).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(at);
        assert!(mount.status().unwrap().success(), "{}", at.display());
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// As GNU tar packs it, which is no part of this repository.
fn pack(tree: &Path, archive: &Path) {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--format=posix", "--sparse", "--numeric-owner", "--acls", "--xattrs"]);
    tar.args(["--xattrs-include=*", "--file"]).arg(archive).arg("--directory").arg(tree).arg(".");
    assert!(tar.status().unwrap().success());
}

fn round_trip(privileged: bool, prepare: impl FnOnce(&Path)) {
    round_trip_of(Scene::with_archives(), privileged, prepare);
}

fn round_trip_of(scene: Scene, privileged: bool, prepare: impl FnOnce(&Path)) {
    let tree = scene.root.join("tree");
    std::fs::create_dir(&tree).unwrap();
    make_odd_tree(&tree).unwrap();
    prepare(&tree);
    let archive = scene.root.join("tree.tar");
    pack(&tree, &archive);
    let archive = archive.display().to_string();
    let mut create = vec!["ct", "create", "200", "--template", &archive, "--size", "96M"];
    create.extend(privileged.then_some("--privileged"));
    scene.run(&create);
    let report = scene.run(&["backup", "200"]);
    assert_eq!(report["guests"][0]["result"], "committed", "{report}");
    let volid = scene.run(&["list"])["archives"][0]["volid"].as_str().unwrap().to_owned();
    let mut restore = vec!["restore", volid.as_str(), "300"];
    restore.extend(privileged.then_some("--privileged"));
    let report = scene.run(&restore);
    assert_eq!(report["warnings"].as_array().map(Vec::len), Some(0), "{report}");
    wait_for("everything is unmounted", || scene.leftovers().is_empty());
    let images = scene.root.join("state/storage/images");
    let at = |id: u32| {
        let image = images.join(format!("{id}/vm-{id}-disk-0.raw"));
        Mounted::new(&image, &scene.root.join(format!("look-{id}")))
    };
    let (made, restored) = (at(200), at(300));
    let ids = if privileged { 0 } else { 100_000 };
    let differences = compare(&tree, &made.0, ids).unwrap();
    assert_eq!(differences, [""; 0], "unpacked from GNU tar's archive");
    let differences = compare(&made.0, &restored.0, 0).unwrap();
    assert_eq!(differences, [""; 0], "backed up and restored");
}

/// From a directory in place of an archive, with the container's ids.
#[test]
fn a_directory_comes_back_as_it_was_and_links_in_it_lead_nowhere() {
    let scene = Scene::new();
    let provider = provider(&scene, Identity::MappedRoot);
    let config = "rootfs: local:200/vm-200-disk-0.raw,size=96M\nunprivileged: 1\n";
    let tree = provider.plant_tree("directory", config);
    make_odd_tree(&tree).unwrap();
    let default = CtRestoreOptions::default();
    let (report, log) = restore(&scene, &provider, "directory", 300, &default);
    assert_eq!((report.error, report.warnings.len()), (None, 0), "{log}");
    wait_for("everything is unmounted", || scene.leftovers().is_empty());
    let image = scene.root.join("state/storage/images/300/vm-300-disk-0.raw");
    let restored = Mounted::new(&image, &scene.root.join("look"));
    assert_eq!(compare(&tree, &restored.0, 100_000).unwrap(), [""; 0], "{log}");
    drop(restored);
    // What the provider offers may not be a way to somewhere else, nor hold what a container must not have.
    std::os::unix::fs::symlink("/etc", provider.tree("link")).unwrap();
    std::fs::write(provider.dir.join("link.conf"), config).unwrap();
    let device = provider.plant_tree("device", config);
    let numbers = rustix::fs::makedev(7, 0);
    let (kind, mode) = (rustix::fs::FileType::BlockDevice, rustix::fs::Mode::from_raw_mode(0o666));
    rustix::fs::mknodat(rustix::fs::CWD, device.join("disk"), kind, mode, numbers).unwrap();
    provider.plant_tree("empty", config);
    // What is packed is not taken any more when it does not fit.
    std::fs::write(provider.plant_tree("large", config).join("file"), vec![7; 100 << 20]).unwrap();
    for (archive, why) in [
        ("link", "is no directory"),
        ("device", "must not have"),
        ("empty", "holds no files"),
        ("large", "bytes of data with './file'"),
    ] {
        let (report, log) = restore(&scene, &provider, archive, 301, &default);
        assert!(report.error.is_some_and(|error| error.contains(why)), "{archive}: {log}");
        assert!(!scene.root.join("etc/lxc/301.conf").exists(), "{archive}");
        assert_eq!(scene.leftovers(), [""; 0], "{archive}");
    }
}

/// A provider may put its directory together of several mounts; nothing of them is left out.
#[test]
fn a_directory_with_mounts_in_it_73_comes_back_whole() {
    let scene = Scene::new();
    let provider = provider(&scene, Identity::MappedRoot);
    let config = "rootfs: local:200/vm-200-disk-0.raw,size=96M\nunprivileged: 1\n";
    let tree = provider.plant_tree("nested", config);
    std::fs::write(tree.join("outer"), "outer").unwrap();
    let mut mounts = Vec::new();
    for place in ["srv", "srv/data"] {
        let at = tree.join(place);
        mounts.insert(0, Mounted::of_memory(&at));
        std::fs::write(at.join("file"), place).unwrap();
        std::fs::hard_link(at.join("file"), at.join("twin")).unwrap();
    }
    let (report, log) = restore(&scene, &provider, "nested", 300, &CtRestoreOptions::default());
    assert_eq!((report.error, report.warnings.len()), (None, 0), "{log}");
    wait_for("the image is free", || {
        !scene.leftovers().iter().any(|left| left.contains("vm-300-disk-0"))
    });
    let image = scene.root.join("state/storage/images/300/vm-300-disk-0.raw");
    let restored = Mounted::new(&image, &scene.root.join("look"));
    for place in ["srv", "srv/data"] {
        assert_eq!(std::fs::read_to_string(restored.0.join(place).join("twin")).unwrap(), place);
    }
    assert_eq!(compare(&tree, &restored.0, 100_000).unwrap(), [""; 0], "{log}");
    drop(restored);
    drop(mounts);
    assert_eq!(scene.leftovers(), [""; 0], "{log}");
}

#[test]
fn odd_things_of_an_unprivileged_container_come_back() {
    round_trip(false, |_| {});
}

#[test]
fn odd_things_of_a_privileged_container_come_back_with_its_devices() {
    round_trip(true, make_devices);
}

fn make_devices(tree: &Path) {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    let mode = Mode::from_raw_mode(0o666);
    for (name, kind, device) in [
        ("contents/null", FileType::CharacterDevice, makedev(1, 3)),
        ("contents/loop", FileType::BlockDevice, makedev(7, 0)),
    ] {
        mknodat(CWD, tree.join(name), kind, mode, device).unwrap();
    }
}

/// A host whose storage for backups keeps containers as files.
fn scene_with_trees() -> Scene {
    let scene = Scene::with_archives();
    let file = scene.root.join("etc/storage.cfg");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{text}\tcontainer-format tree\n")).unwrap();
    scene
}

#[test]
fn odd_things_of_an_unprivileged_container_come_back_from_a_tree_of_files() {
    round_trip_of(scene_with_trees(), false, |_| {});
}

#[test]
fn odd_things_of_a_privileged_container_come_back_from_a_tree_with_its_devices() {
    round_trip_of(scene_with_trees(), true, make_devices);
}
