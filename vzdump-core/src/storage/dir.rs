// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images as files of a directory.
//!
//! The volume `local:100/vm-100-disk-0.qcow2` is the file `<path>/images/100/vm-100-disk-0.qcow2`.
//! `vm-100-disk-0.raw.qcow2` has its data beside it in `vm-100-disk-0.raw.data`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use provider_api::is_mount_point;

use super::image::{ImageFiles, image_size, qemu_img};
use super::images::Images;
use super::volume::parse_guest_id;
use super::{
    ImageFormat, StorageError, StorageStatus, StoredVolume, Unfinished, VolumeId, fs_status,
};
use crate::tools::Tools;

/// The kind of storage this module serves.
pub const DIR_KIND: &str = "dir";
/// How often a directory that another task has just removed is made again.
const ATTEMPTS: u32 = 20;
/// The most files of a storage that are looked at.
pub(super) const FILES_MAX: usize = 1_000_000;

/// A directory that holds images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirStorage {
    id: String,
    path: PathBuf,
    /// Where a file system must be mounted.
    mount_point: Option<PathBuf>,
}

impl DirStorage {
    /// A storage with this name at this absolute path.
    #[must_use]
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self { id: id.into(), path: path.into(), mount_point: None }
    }

    /// The same storage, used only while a file system is mounted there, if that is given: images made without it
    /// would fill the disk below, and those that are on it would count as gone.
    #[must_use]
    pub fn with_mount_point(self, mount_point: Option<PathBuf>) -> Self {
        Self { mount_point, ..self }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn images_dir(&self) -> PathBuf {
        self.path.join("images")
    }

    pub(super) fn guest_dir(&self, guest_id: u32) -> PathBuf {
        self.images_dir().join(guest_id.to_string())
    }

    /// That a volume is one of this storage.
    pub(super) fn check_own(&self, volume: &VolumeId) -> Result<(), StorageError> {
        if volume.storage() == self.id {
            return Ok(());
        }
        let why = format!("does not hold the volume '{volume}'.");
        Err(StorageError::Storage { id: self.id.clone(), why })
    }

    /// The directories of one guest or of all.
    pub(super) fn guest_dirs(
        &self,
        guest_id: Option<u32>,
    ) -> Result<Vec<(u32, PathBuf)>, StorageError> {
        if let Some(guest_id) = guest_id {
            return Ok(vec![(guest_id, self.guest_dir(guest_id))]);
        }
        let names = names_in(&self.images_dir())?;
        let ids = names.iter().filter_map(|name| parse_guest_id(name));
        Ok(ids.map(|id| (id, self.guest_dir(id))).collect())
    }

    fn change_snapshots(
        &self,
        tools: &Tools,
        volume: &VolumeId,
        change: &str,
        name: &str,
    ) -> Result<(), StorageError> {
        let files = self.existing(volume)?;
        check_can_snapshot(&self.id, DIR_KIND, volume)?;
        let mut command = Command::new(tools.qemu_img()?);
        command.args(["snapshot", "-q", change, name, "--"]).arg(&files.image);
        qemu_img(command, "change the snapshots of", &files.image).map(drop)
    }

    /// That qcow2 images have no snapshot of that name yet: qemu-img would make a second one.
    fn check_no_snapshot(
        &self,
        tools: &Tools,
        volume: &VolumeId,
        name: &str,
    ) -> Result<(), StorageError> {
        if self.snapshots_now(tools, volume)?.iter().any(|other| other == name) {
            return Err(StorageError::Exists { volume: format!("{volume}@{name}") });
        }
        Ok(())
    }
}

/// What a qcow2 image can do in itself, and nothing else can in a directory.
fn check_can_snapshot(id: &str, kind: &'static str, volume: &VolumeId) -> Result<(), StorageError> {
    if volume.format() == ImageFormat::Qcow2 {
        return Ok(());
    }
    Err(StorageError::NoSnapshots {
        id: id.to_owned(),
        kind,
        volume: volume.to_string(),
        format: volume.format(),
    })
}

/// Does something within a directory that another task may just be removing because it is empty.
pub(super) fn in_guest_dir(dir: &Path, mut work: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let mut attempt = 0;
    loop {
        fs::create_dir_all(dir)?;
        attempt += 1;
        match work() {
            Err(error) if error.kind() == io::ErrorKind::NotFound && attempt < ATTEMPTS => {}
            other => return other,
        }
    }
}

/// Makes a removal from a directory durable.
fn sync_removal(dir: &Path) -> Result<(), StorageError> {
    match File::open(dir).and_then(|dir| dir.sync_all()) {
        // Another task has removed the empty directory.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => {
            other.map_err(|source| StorageError::Io { what: "sync", path: dir.to_owned(), source })
        }
    }
}

/// The names in a directory that are text; none if it is not there.
pub(super) fn names_in(dir: &Path) -> Result<Vec<String>, StorageError> {
    let fault = |source| StorageError::Io { what: "look into", path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(fault)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.map_err(fault)?.file_name().into_string());
        if names.len() > FILES_MAX {
            return Err(fault(io::Error::other("it has more than a million entries")));
        }
    }
    names.sort();
    Ok(names)
}

pub(super) fn stored(volume: VolumeId, files: &ImageFiles) -> StoredVolume {
    let size_bytes = image_size(&files.image, files.format).ok();
    StoredVolume { volume, size_bytes, used_bytes: files.used_bytes() }
}

impl Images for DirStorage {
    const KIND: &'static str = DIR_KIND;

    fn storage_id(&self) -> &str {
        &self.id
    }

    fn check_mounted(&self) -> Result<(), StorageError> {
        let Some(path) = &self.mount_point else { return Ok(()) };
        match is_mount_point(path) {
            Ok(true) => Ok(()),
            Ok(false) => Err(StorageError::Storage {
                id: self.id.clone(),
                why: format!(
                    "cannot be used: nothing is mounted at '{}' ('is_mountpoint' in storage.cfg).",
                    path.display()
                ),
            }),
            Err(source) => {
                Err(StorageError::Io { what: "look at the mount", path: path.clone(), source })
            }
        }
    }

    fn files(&self, volume: &VolumeId) -> Result<ImageFiles, StorageError> {
        self.check_own(volume)?;
        Ok(ImageFiles::new(&self.guest_dir(volume.guest_id()), volume.name(), volume.format()))
    }

    fn allocate_now(
        &self,
        tools: &Tools,
        volume: &VolumeId,
        size_bytes: u64,
    ) -> Result<Unfinished, StorageError> {
        let files = self.files(volume)?;
        if volume.format() == ImageFormat::Subvol {
            let why = "has no subvolumes: a storage of the type btrfs has.".to_owned();
            return Err(StorageError::Storage { id: self.id.clone(), why });
        }
        let dir = self.guest_dir(volume.guest_id());
        in_guest_dir(&dir, || files.claim_image()).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => StorageError::Exists { volume: volume.to_string() },
            _ => StorageError::Io { what: "make the image", path: files.image.clone(), source },
        })?;
        if let Err(error) = files.claim_data() {
            // What is in its place is not ours to remove.
            let _ = fs::remove_file(&files.image);
            return Err(error);
        }
        let undo = files.clone();
        let guest_dir = dir.clone();
        let unfinished = Unfinished::new(move || {
            let _ = undo.remove();
            // Fails as long as there are other volumes, which is right.
            let _ = fs::remove_dir(guest_dir);
        });
        match files.fill(tools, size_bytes) {
            Ok(()) => Ok(unfinished),
            Err(error) => {
                unfinished.undo();
                Err(error)
            }
        }
    }

    fn free_now(&self, volume: &VolumeId) -> Result<bool, StorageError> {
        let was_there = self.files(volume)?.remove()?;
        let dir = self.guest_dir(volume.guest_id());
        if was_there {
            sync_removal(&dir)?;
        }
        let _ = fs::remove_dir(&dir);
        Ok(was_there)
    }

    fn list_now(&self, guest_id: Option<u32>) -> Result<Vec<StoredVolume>, StorageError> {
        let mut found = Vec::new();
        for (guest_id, dir) in self.guest_dirs(guest_id)? {
            for name in names_in(&dir)? {
                let volume = format!("{}:{guest_id}/{name}", self.id).parse::<VolumeId>();
                // What is no volume is somebody else's.
                let Ok(volume) = volume else { continue };
                let files = self.files(&volume)?;
                if !files.image.is_dir() {
                    found.push(stored(volume, &files));
                }
            }
        }
        Ok(found)
    }

    fn snapshot_now(
        &self,
        tools: &Tools,
        volume: &VolumeId,
        name: &str,
    ) -> Result<(), StorageError> {
        self.check_no_snapshot(tools, volume, name)?;
        self.change_snapshots(tools, volume, "-c", name)
    }

    fn delete_snapshot_now(
        &self,
        tools: &Tools,
        volume: &VolumeId,
        name: &str,
    ) -> Result<bool, StorageError> {
        let was_there = self.snapshots_now(tools, volume)?.iter().any(|other| other == name);
        if was_there {
            self.change_snapshots(tools, volume, "-d", name)?;
        }
        Ok(was_there)
    }

    fn snapshots_now(&self, tools: &Tools, volume: &VolumeId) -> Result<Vec<String>, StorageError> {
        let files = self.existing(volume)?;
        if volume.format() != ImageFormat::Qcow2 {
            return Ok(Vec::new());
        }
        let mut command = Command::new(tools.qemu_img()?);
        command.args(["info", "-U", "-f", "qcow2", "--output", "json", "--"]).arg(&files.image);
        let text = qemu_img(command, "look into", &files.image)?;
        let odd = |why: String| StorageError::QemuImg {
            doing: "look into",
            path: files.image.clone(),
            message: why,
        };
        let info: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| odd(error.to_string()))?;
        let snapshots = info["snapshots"].as_array().map(Vec::as_slice).unwrap_or_default();
        let names = snapshots.iter().map(|snapshot| snapshot["name"].as_str().map(str::to_owned));
        names.collect::<Option<_>>().ok_or_else(|| odd("a snapshot has no name".to_owned()))
    }

    fn status_now(&self) -> Result<StorageStatus, StorageError> {
        fs_status(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Storage as _;
    use super::*;

    fn storage() -> (tempfile::TempDir, DirStorage) {
        let dir = tempfile::tempdir().unwrap();
        let storage = DirStorage::new("local", dir.path());
        (dir, storage)
    }

    #[tokio::test]
    async fn a_failed_allocation_leaves_nothing() {
        let (dir, storage) = storage();
        let tools = Tools::in_dir("/nonexistent");
        for format in [ImageFormat::Qcow2, ImageFormat::RawBitmaps] {
            let failed = storage.allocate(&tools, 100, "vm-100-disk-0", format, 1 << 20).await;
            assert!(matches!(failed, Err(StorageError::Tool(_))), "{failed:?}");
            assert!(!dir.path().join("images/100").exists());
        }
    }

    #[tokio::test]
    async fn without_its_disk_nothing_is_made_and_nothing_counts_as_gone() {
        let dir = tempfile::tempdir().unwrap();
        let storage = |mount_point: &Path| {
            DirStorage::new("usb", dir.path()).with_mount_point(Some(mount_point.to_owned()))
        };
        let tools = Tools::in_dir("/nonexistent");
        let away = storage(dir.path());
        let volume = "usb:100/x.raw".parse().unwrap();
        let faults = [
            away.allocate(&tools, 100, "x", ImageFormat::Raw, 512).await.map(drop),
            away.free(&volume).await.map(drop),
            away.list(None).await.map(drop),
            away.status().await.map(drop),
        ];
        for fault in faults {
            let fault = fault.unwrap_err().to_string();
            assert!(fault.contains("'usb' cannot be used: nothing is mounted at"), "{fault}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let there = storage(Path::new("/proc"));
        there.allocate(&tools, 100, "x", ImageFormat::Raw, 512).await.unwrap();
        assert!(there.free(&volume).await.unwrap());
    }

    #[tokio::test]
    async fn data_that_lies_in_the_way_is_not_touched() {
        let (dir, storage) = storage();
        let images = dir.path().join("images/100");
        fs::create_dir_all(&images).unwrap();
        fs::write(images.join("x.raw.data"), "somebody's").unwrap();
        let tools = Tools::in_dir("/nonexistent");
        let failed = storage.allocate(&tools, 100, "x", ImageFormat::RawBitmaps, 512).await;
        assert!(matches!(failed, Err(StorageError::Io { .. })), "{failed:?}");
        assert_eq!(fs::read_to_string(images.join("x.raw.data")).unwrap(), "somebody's");
        assert_eq!(fs::read_dir(&images).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn an_image_that_nobody_waited_for_is_removed() {
        let (dir, storage) = storage();
        let path = dir.path().join("images/100/x.raw");
        let volume = "local:100/x.raw".parse().unwrap();
        let tools = Tools::in_dir("/nonexistent");
        drop(storage.allocate_now(&tools, &volume, 512).unwrap());
        let gone = async {
            while path.exists() {
                tokio::task::yield_now().await;
            }
        };
        let limit = std::time::Duration::from_secs(60);
        tokio::time::timeout(limit, gone).await.expect("the image stayed");
    }
}
