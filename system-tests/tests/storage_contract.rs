// SPDX-License-Identifier: MIT OR Apache-2.0
//! What any storage of images must keep, run for a directory and for a btrfs in a loop file. A new kind of
//! storage gets a line in [`each`].

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use system_tests::loopfs::{Kind, LoopFs};
use system_tests::qemu;
use tokio::task::JoinSet;
use vzdump_core::storage::{
    BtrfsStorage, DirStorage, ImageFormat, Storage, StorageError, VolumeId,
};
use vzdump_core::tools::Tools;

const ID: u32 = 100;
const MIB: u64 = 1 << 20;
/// No multiple of anything but a sector.
const ODD_BYTES: u64 = 3 * MIB + 512;

/// A storage that is empty, and where it is.
struct Place {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    tools: Tools,
    /// Goes last.
    _fs: Box<dyn std::fmt::Debug>,
}

fn dir() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let storage = Arc::new(DirStorage::new("store", &path));
    Place { storage, path, tools: tools(), _fs: Box::new(folder) }
}

fn btrfs(nocow: bool) -> Place {
    let fs = LoopFs::new(Kind::Btrfs).unwrap();
    let path = fs.path();
    let storage = Arc::new(BtrfsStorage::new("store", &path, nocow));
    Place { storage, path, tools: tools(), _fs: Box::new(fs) }
}

fn tools() -> Tools {
    Tools::in_dir(qemu::bin_dir().unwrap())
}

/// All of them.
fn each() -> Vec<Place> {
    vec![dir(), btrfs(false), btrfs(true)]
}

impl Place {
    async fn make(&self, name: &str, format: ImageFormat, size_bytes: u64) -> VolumeId {
        self.storage.allocate(&self.tools, ID, name, format, size_bytes).await.unwrap()
    }

    fn what(&self, format: ImageFormat) -> String {
        format!("{} {format}", self.storage.kind())
    }

    /// All names below the storage.
    fn names(&self) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        let mut todo = vec![self.path.clone()];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    todo.push(path.clone());
                }
                names.insert(path.strip_prefix(&self.path).unwrap().display().to_string());
            }
        }
        names
    }

    /// Runs `qemu-io` on a volume; what it said.
    fn io(&self, volume: &VolumeId, commands: &[&str]) -> String {
        let mut command = Command::new(qemu::bin_dir().unwrap().join("qemu-io"));
        for each in commands {
            command.args(["-c", each]);
        }
        command.arg("--image-opts").arg(self.storage.image_options(volume).unwrap());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && !said.contains("failed"), "{commands:?}: {output:?}");
        said
    }
}

/// QEMU makes a data file as long as whole clusters.
fn assert_data_size(bytes: &[u8], size_bytes: u64) {
    let len = bytes.len() as u64;
    assert!((size_bytes..=size_bytes.next_multiple_of(64 << 10)).contains(&len), "{len}");
    assert!(bytes[size_bytes as usize..].iter().all(|b| *b == 0), "something behind the disk");
}

#[tokio::test]
async fn a_volume_has_its_exact_size_is_thin_reads_as_zeroes_and_is_removed_without_a_trace() {
    for place in each() {
        let before = place.names();
        for format in ImageFormat::OF_DISKS {
            let what = place.what(format);
            let volume = place.make("vm-100-disk-0", format, ODD_BYTES).await;
            assert_eq!(place.storage.volume_size(&volume).unwrap(), ODD_BYTES, "{what}");
            let listed = place.storage.list(Some(ID)).await.unwrap();
            assert_eq!(listed.len(), 1, "{what}");
            assert_eq!((&listed[0].volume, listed[0].size_bytes), (&volume, Some(ODD_BYTES)));
            assert!(listed[0].used_bytes < MIB, "{what} takes {}", listed[0].used_bytes);
            assert_eq!(place.storage.list(None).await.unwrap(), listed, "{what}");
            assert_eq!(place.storage.list(Some(10)).await.unwrap(), [], "{what}");
            let last = format!("read -P 0 {} 512", ODD_BYTES - 512);
            place.io(&volume, &["read -P 0 0 1M", &last, "write -P 7 1M 64k", "read -P 7 1M 64k"]);
            if let Some(data) = place.storage.data_path(&volume).unwrap() {
                let bytes = fs::read(data).unwrap();
                assert_data_size(&bytes, ODD_BYTES);
                assert!(bytes[MIB as usize..][..64 << 10].iter().all(|b| *b == 7), "{what}");
            }
            assert!(place.storage.free(&volume).await.unwrap(), "{what}");
            assert!(!place.storage.free(&volume).await.unwrap(), "{what}");
            let gone = place.storage.volume_size(&volume);
            assert!(matches!(gone, Err(StorageError::NotFound { .. })), "{what}: {gone:?}");
            let mut after = place.names();
            after.remove("images");
            assert_eq!(after, before, "{what}");
        }
    }
}

#[tokio::test]
async fn large_volumes_cost_nothing() {
    for place in each() {
        for (name, format) in [("a", ImageFormat::Raw), ("b", ImageFormat::Qcow2)] {
            let volume = place.make(name, format, 1 << 40).await;
            let listed = place.storage.list(Some(ID)).await.unwrap();
            let used = listed.iter().find(|l| l.volume == volume).unwrap().used_bytes;
            assert!(used < MIB, "{}: {used}", place.what(format));
        }
    }
}

#[tokio::test]
async fn names_are_checked_and_belong_to_one_disk() {
    for place in each() {
        let (storage, tools) = (&place.storage, &place.tools);
        for bad in ["../x", "a/b", ".x", "-x", "a@b", "", "a b", "a.."] {
            let made = storage.allocate(tools, ID, bad, ImageFormat::Raw, 512).await;
            assert!(matches!(made, Err(StorageError::Name { .. })), "'{bad}': {made:?}");
        }
        for size in [0, 100, 513, 1 << 60, u64::MAX] {
            let made = storage.allocate(tools, ID, "x", ImageFormat::Raw, size).await;
            assert!(matches!(made, Err(StorageError::Size { .. })), "{size}: {made:?}");
        }
        assert_eq!(place.storage.list(None).await.unwrap(), []);
        for (number, format) in ImageFormat::OF_DISKS.into_iter().enumerate() {
            let name = storage.free_name(ID, ImageFormat::Raw).await.unwrap();
            assert_eq!(name, format!("vm-100-disk-{number}"), "whatever the format of others");
            let volume = place.make(&name, format, MIB).await;
            place.io(&volume, &["write -P 1 0 4k"]);
            let again = storage.allocate(tools, ID, &name, format, MIB).await;
            assert!(matches!(again, Err(StorageError::Exists { .. })), "{again:?}");
            place.io(&volume, &["read -P 1 0 4k"]);
        }
        let other: VolumeId = "other:100/vm-100-disk-0.raw".parse().unwrap();
        let refused = |result: Result<(), StorageError>| match result {
            Err(StorageError::Storage { id, why }) => {
                assert!(id == "store" && why.contains("other:100/vm-100-disk-0.raw"), "{why}");
            }
            other => panic!("the volume of another storage was taken: {other:?}"),
        };
        refused(storage.volume_path(&other).map(drop));
        refused(storage.data_path(&other).map(drop));
        refused(storage.free(&other).await.map(drop));
        refused(storage.resize(tools, &other, MIB).await);
        refused(storage.snapshot(tools, &other, "a").await);
        refused(storage.delete_snapshot(tools, &other, "a").await.map(drop));
        refused(storage.snapshots(tools, &other).await.map(drop));
        assert_eq!(storage.list(None).await.unwrap().len(), 3);
        // The right name with another ending is another volume, which is not there.
        let other: VolumeId = "store:100/vm-100-disk-1.qcow2".parse().unwrap();
        assert!(!storage.free(&other).await.unwrap());
        assert_eq!(storage.list(None).await.unwrap().len(), 3);
    }
}

#[tokio::test]
async fn a_disk_grows_and_keeps_its_data_and_never_shrinks() {
    for place in each() {
        for format in ImageFormat::OF_DISKS {
            let what = place.what(format);
            let volume = place.make("vm-100-disk-0", format, MIB).await;
            place.io(&volume, &["write -P 5 0 1M"]);
            place.storage.resize(&place.tools, &volume, ODD_BYTES).await.unwrap();
            assert_eq!(place.storage.volume_size(&volume).unwrap(), ODD_BYTES, "{what}");
            let rest = format!("read -P 0 1M {}", ODD_BYTES - MIB);
            place.io(&volume, &["read -P 5 0 1M", &rest]);
            if let Some(data) = place.storage.data_path(&volume).unwrap() {
                assert_data_size(&fs::read(data).unwrap(), ODD_BYTES);
            }
            place.storage.resize(&place.tools, &volume, ODD_BYTES).await.unwrap();
            let shrunk = place.storage.resize(&place.tools, &volume, MIB).await;
            assert!(matches!(shrunk, Err(StorageError::Shrink { .. })), "{what}: {shrunk:?}");
            let bad = place.storage.resize(&place.tools, &volume, ODD_BYTES + 1).await;
            assert!(matches!(bad, Err(StorageError::Size { .. })), "{what}: {bad:?}");
            place.io(&volume, &["read -P 5 0 1M"]);
            assert!(place.storage.free(&volume).await.unwrap(), "{what}");
            let gone = place.storage.resize(&place.tools, &volume, ODD_BYTES).await;
            assert!(matches!(gone, Err(StorageError::NotFound { .. })), "{what}: {gone:?}");
        }
    }
}

/// A snapshot can be taken, shows in the list, goes with the volume; or its absence is told by name.
#[tokio::test]
async fn snapshots_work_or_are_refused_by_name() {
    for place in each() {
        let (storage, tools) = (&place.storage, &place.tools);
        for format in ImageFormat::OF_DISKS {
            let what = place.what(format);
            let can = match storage.kind() {
                "dir" => format == ImageFormat::Qcow2,
                _ => format != ImageFormat::Qcow2,
            };
            let volume = place.make("vm-100-disk-0", format, MIB).await;
            place.io(&volume, &["write -P 1 0 64k"]);
            let taken = storage.snapshot(tools, &volume, "before").await;
            if !can {
                let error = taken.unwrap_err();
                assert!(matches!(error, StorageError::NoSnapshots { .. }), "{what}: {error}");
                let text = error.to_string();
                for word in ["'store'", storage.kind(), &volume.to_string(), &format.to_string()] {
                    assert!(text.contains(word), "{what}: {text}");
                }
                assert_eq!(storage.snapshots(tools, &volume).await.unwrap(), Vec::<String>::new());
                assert!(storage.free(&volume).await.unwrap());
                continue;
            }
            taken.unwrap();
            let again = storage.snapshot(tools, &volume, "before").await;
            assert!(matches!(again, Err(StorageError::Exists { .. })), "{what}: {again:?}");
            place.io(&volume, &["write -P 2 0 64k"]);
            storage.snapshot(tools, &volume, "after").await.unwrap();
            let mut names = storage.snapshots(tools, &volume).await.unwrap();
            names.sort();
            assert_eq!(names, ["after", "before"], "{what}");
            if storage.kind() == "btrfs" {
                let file = storage.data_path(&volume).unwrap();
                let file = file.unwrap_or(storage.volume_path(&volume).unwrap());
                let name = file.file_name().unwrap();
                let old = place.path.join("images/100/vm-100-disk-0@before").join(name);
                assert!(fs::read(old).unwrap()[..64 << 10].iter().all(|b| *b == 1), "{what}");
            }
            assert_eq!(storage.list(None).await.unwrap().len(), 1, "{what}");
            for bad in ["", "../x", "a/b", "1a", "a@b"] {
                let taken = storage.snapshot(tools, &volume, bad).await;
                assert!(matches!(taken, Err(StorageError::Name { .. })), "{what} '{bad}'");
            }
            assert!(storage.delete_snapshot(tools, &volume, "before").await.unwrap(), "{what}");
            assert!(!storage.delete_snapshot(tools, &volume, "before").await.unwrap(), "{what}");
            place.io(&volume, &["read -P 2 0 64k"]);
            assert!(storage.free(&volume).await.unwrap(), "{what}");
            assert!(!place.path.join("images/100").exists(), "{what}: {:?}", place.names());
            let gone = storage.snapshot(tools, &volume, "x").await;
            assert!(matches!(gone, Err(StorageError::NotFound { .. })), "{what}: {gone:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_at_once_one_gets_each_name_and_none_is_lost() {
    for place in each() {
        let mut tasks = JoinSet::new();
        for number in 0..24 {
            let (storage, tools) = (Arc::clone(&place.storage), place.tools.clone());
            let format = ImageFormat::OF_DISKS[number % 2];
            tasks.spawn(async move {
                let name = format!("vm-100-disk-{}", number / 6 * 2 + number % 2);
                storage.allocate(&tools, ID, &name, format, MIB).await
            });
        }
        let (mut made, mut refused) = (Vec::new(), 0);
        while let Some(result) = tasks.join_next().await {
            match result.unwrap() {
                Ok(volume) => made.push(volume),
                Err(StorageError::Exists { .. }) => refused += 1,
                Err(error) => panic!("{}: {error}", place.storage.kind()),
            }
        }
        assert_eq!((made.len(), refused), (8, 16), "{}", place.storage.kind());
        assert_eq!(place.storage.list(Some(ID)).await.unwrap().len(), 8);
        // And away with them while others are made in the same directory.
        for volume in made {
            let (storage, tools) = (Arc::clone(&place.storage), place.tools.clone());
            tasks.spawn(async move {
                assert!(storage.free(&volume).await.unwrap());
                let name = format!("{}-again", volume.name());
                storage.allocate(&tools, ID, &name, volume.format(), MIB).await
            });
        }
        while let Some(result) = tasks.join_next().await {
            result.unwrap().unwrap();
        }
        let listed = place.storage.list(Some(ID)).await.unwrap();
        assert_eq!(listed.len(), 8, "{}", place.storage.kind());
        for stored in listed {
            assert_eq!(stored.size_bytes, Some(MIB));
            assert!(place.storage.free(&stored.volume).await.unwrap());
        }
    }
}

/// What a process leaves that is killed in the middle, as it is on the disk then.
fn half_made(place: &Place) -> Vec<VolumeId> {
    let images = place.path.join("images/100");
    fs::create_dir_all(&images).unwrap();
    let touch = |path: PathBuf| fs::write(path, "").unwrap();
    let id = |text: &str| text.parse::<VolumeId>().unwrap();
    if place.storage.kind() == "dir" {
        touch(images.join("vm-100-disk-0.raw"));
        touch(images.join("vm-100-disk-1.qcow2"));
        touch(images.join("vm-100-disk-2.raw.qcow2"));
        touch(images.join("vm-100-disk-3.raw.qcow2"));
        touch(images.join("vm-100-disk-3.raw.data"));
    } else {
        for number in [0, 2, 3] {
            let path = images.join(format!("vm-100-disk-{number}"));
            let mut command = Command::new("btrfs");
            command.args(["-q", "subvolume", "create"]).arg(&path);
            assert!(command.status().unwrap().success());
        }
        touch(images.join("vm-100-disk-1.qcow2"));
        touch(images.join("vm-100-disk-2/disk.raw.qcow2"));
        touch(images.join("vm-100-disk-3/disk.raw.qcow2"));
        touch(images.join("vm-100-disk-3/disk.raw.data"));
    }
    vec![
        id("store:100/vm-100-disk-0.raw"),
        id("store:100/vm-100-disk-1.qcow2"),
        id("store:100/vm-100-disk-2.raw.qcow2"),
        id("store:100/vm-100-disk-3.raw.qcow2"),
    ]
}

#[tokio::test]
async fn what_a_crash_leaves_blocks_nothing_and_can_be_removed() {
    for place in each() {
        let left = half_made(&place);
        let kind = place.storage.kind();
        let name = place.storage.free_name(ID, ImageFormat::Raw).await.unwrap();
        assert_eq!(name, "vm-100-disk-4", "{kind}");
        let next = place.make(&name, ImageFormat::Raw, MIB).await;
        let listed = place.storage.list(Some(ID)).await.unwrap();
        assert_eq!(listed.len(), 5, "{kind}: {listed:?}");
        for volume in &left {
            let stored = listed.iter().find(|stored| stored.volume == *volume).unwrap();
            assert!(stored.size_bytes.is_none_or(|bytes| bytes == 0), "{kind}: {stored:?}");
            assert!(place.storage.free(volume).await.unwrap(), "{kind}: {volume}");
        }
        // Also what was half removed, which looks the same.
        let volume = place.make("x", ImageFormat::RawBitmaps, MIB).await;
        fs::remove_file(place.storage.data_path(&volume).unwrap().unwrap()).unwrap();
        assert!(place.storage.free(&volume).await.unwrap(), "{kind}");
        assert!(place.storage.free(&next).await.unwrap(), "{kind}");
        assert_eq!(place.storage.list(None).await.unwrap(), [], "{kind}");
        assert!(!place.path.join("images/100").exists(), "{kind}: {:?}", place.names());
    }
}

#[tokio::test]
async fn a_failure_and_a_task_that_does_not_wait_leave_nothing() {
    for place in each() {
        let none = Tools::in_dir("/nonexistent");
        for format in [ImageFormat::Qcow2, ImageFormat::RawBitmaps] {
            let failed = place.storage.allocate(&none, ID, "x", format, MIB).await;
            assert!(matches!(failed, Err(StorageError::Tool(_))), "{failed:?}");
        }
        let kind = place.storage.kind();
        assert!(!place.path.join("images/100").exists(), "{kind}: {:?}", place.names());
        for format in ImageFormat::OF_DISKS {
            let make = place.storage.allocate(&place.tools, ID, "x", format, MIB);
            let soon = std::time::Duration::from_micros(500);
            let _ = tokio::time::timeout(soon, make).await;
            let volume = VolumeId::new("store", ID, "x", format).unwrap();
            let gone = async {
                // It may be made yet when it is looked at first; or it was made in time.
                tokio::time::sleep(std::time::Duration::from_millis(700)).await;
                let _ = place.storage.free(&volume).await.unwrap();
                while place.path.join("images/100").exists() {
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
            };
            let limit = std::time::Duration::from_secs(30);
            tokio::time::timeout(limit, gone).await.expect("something stayed");
        }
    }
}

#[tokio::test]
async fn the_space_is_told() {
    for place in each() {
        let status = place.storage.status().await.unwrap();
        assert!(status.total_bytes > 0 && status.used_bytes <= status.total_bytes, "{status:?}");
        assert!(status.available_bytes <= status.total_bytes, "{status:?}");
        let volume = place.make("vm-100-disk-0", ImageFormat::Raw, 64 * MIB).await;
        if place.storage.kind() == "btrfs" {
            place.io(&volume, &["write -P 3 0 64M"]);
            let after = place.storage.status().await.unwrap();
            assert!(after.used_bytes >= status.used_bytes + 60 * MIB, "{status:?} {after:?}");
            assert_eq!(after.pool_id, status.pool_id);
        }
    }
}

/// Whether an NBD server tells the size of its export.
fn answers(socket: &Path) -> bool {
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let output = Command::new("nbdinfo").args(["--size", &uri]).output().unwrap();
    output.status.success()
}

#[tokio::test]
async fn a_disk_that_qemu_has_open_is_not_resized() {
    for place in each() {
        for format in ImageFormat::OF_DISKS {
            let volume = place.make("vm-100-disk-0", format, MIB).await;
            let mut command = Command::new(qemu::bin_dir().unwrap().join("qemu-nbd"));
            let socket = place.path.join("socket");
            command.arg("-tk").arg(&socket).arg("--image-opts");
            command.arg(place.storage.image_options(&volume).unwrap());
            let mut nbd = command.spawn().unwrap();
            // The socket is there before the image is open; an answer is not.
            while !answers(&socket) {
                assert!(nbd.try_wait().unwrap().is_none(), "qemu-nbd ended");
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            let refused = place.storage.resize(&place.tools, &volume, 2 * MIB).await;
            nbd.kill().unwrap();
            nbd.wait().unwrap();
            let text = refused.unwrap_err().to_string();
            assert!(text.contains("lock"), "{}: {text}", place.what(format));
            assert_eq!(place.storage.volume_size(&volume).unwrap(), MIB);
            let _ = fs::remove_file(socket);
            assert!(place.storage.free(&volume).await.unwrap());
        }
    }
}

/// Attributes of a file, as `lsattr` shows them.
fn attributes(path: &Path) -> String {
    let output = Command::new("lsattr").arg(path).output().unwrap();
    String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn images_on_btrfs_have_checksums_unless_the_storage_says_otherwise() {
    for nocow in [false, true] {
        let place = btrfs(nocow);
        for format in [ImageFormat::Raw, ImageFormat::RawBitmaps] {
            let volume = place.make(&format!("d{}", format.ending().len()), format, MIB).await;
            let paths = [place.storage.volume_path(&volume).unwrap()];
            let data = place.storage.data_path(&volume).unwrap();
            for path in paths.iter().chain(&data) {
                assert_eq!(attributes(path).contains('C'), nocow, "{}", path.display());
            }
        }
    }
}

#[tokio::test]
async fn a_btrfs_that_is_not_mounted_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let storage: Arc<dyn Storage> = Arc::new(BtrfsStorage::new("tree", folder.path(), false));
    let made = storage.allocate(&tools(), ID, "x", ImageFormat::Raw, MIB).await;
    let text = made.unwrap_err().to_string();
    assert!(text.contains("'tree'") && text.contains("is it mounted?"), "{text}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn somebody_elses_directory_on_btrfs_is_no_volume() {
    let place = btrfs(false);
    let foreign = place.path.join("images/100/subvol-100-disk-0");
    fs::create_dir_all(foreign.join("etc")).unwrap();
    assert_eq!(place.storage.list(None).await.unwrap(), []);
    let volume: VolumeId = "store:100/subvol-100-disk-0.raw".parse().unwrap();
    assert!(!place.storage.free(&volume).await.unwrap());
    assert!(foreign.join("etc").exists());
}
