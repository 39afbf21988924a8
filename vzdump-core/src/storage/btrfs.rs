// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images on a btrfs, each in a subvolume of its own, so that it can be snapshotted, as in Proxmox VE.
//!
//! ```text
//! tree:100/vm-100-disk-0.raw         images/100/vm-100-disk-0/disk.raw
//! tree:100/vm-100-disk-1.raw.qcow2   images/100/vm-100-disk-1/disk.raw.qcow2, disk.raw.data
//! tree:100/vm-100-disk-2.qcow2       images/100/vm-100-disk-2.qcow2, as in a directory
//! a snapshot                         images/100/vm-100-disk-0@name, read-only
//! tree:100/subvol-100-disk-0.subvol  images/100/subvol-100-disk-0.subvol, a container's files
//! ```
//!
//! Images are copied on write and have checksums unless the storage says `nocow 1`
//! (`docs/design/0017-images-on-btrfs.md`).

mod nested;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use nested::delete_whole;

use super::dir::{in_guest_dir, names_in, stored};
use super::image::{ImageFiles, run};
use super::images::Images;
use super::{
    DirStorage, ImageFormat, StorageError, StorageStatus, StoredVolume, Unfinished, VolumeId,
    fs_status,
};
use crate::tools::Tools;

/// The kind of storage this module serves.
pub const BTRFS_KIND: &str = "btrfs";
/// `BTRFS_SUPER_MAGIC` of the kernel.
pub(crate) const BTRFS_MAGIC: u64 = 0x9123_683e;
/// What the files in a subvolume are called, before their endings.
const STEM: &str = "disk";
/// What the program says of a directory that is not there.
const NOT_FOUND: &str = "No such file or directory";
/// The program, of the package btrfs-progs.
const BTRFS: &str = "btrfs";

/// A directory on a btrfs that holds images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BtrfsStorage {
    /// What is no subvolume, and what both have in common.
    plain: DirStorage,
    nocow: bool,
}

impl BtrfsStorage {
    /// A storage with this name at this absolute path. `nocow` switches checksums and copying on write
    /// off for new images.
    #[must_use]
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>, nocow: bool) -> Self {
        Self { plain: DirStorage::new(id, path), nocow }
    }

    /// As [`DirStorage::with_mount_point`].
    #[must_use]
    pub fn with_mount_point(self, mount_point: Option<PathBuf>) -> Self {
        Self { plain: self.plain.with_mount_point(mount_point), ..self }
    }

    fn subvolume(&self, volume: &VolumeId) -> PathBuf {
        self.plain.guest_dir(volume.guest_id()).join(subvolume_name(volume))
    }

    fn snapshot_path(&self, volume: &VolumeId, name: &str) -> PathBuf {
        self.plain.guest_dir(volume.guest_id()).join(format!("{}@{name}", subvolume_name(volume)))
    }

    /// That the path, or where it will be made, is on a btrfs: on anything else this would only look as
    /// if it worked, and what is there would look as if it was gone.
    fn check_file_system(&self) -> Result<(), StorageError> {
        let path = self.plain.path();
        let existing = path.ancestors().find(|path| path.exists()).unwrap_or(path);
        let stat = rustix::fs::statfs(existing).map_err(|errno| StorageError::Io {
            what: "look at",
            path: existing.to_owned(),
            source: errno.into(),
        })?;
        if stat.f_type as u64 & 0xffff_ffff == BTRFS_MAGIC {
            return Ok(());
        }
        let why = format!(
            "has the type btrfs, but there is no btrfs at '{}': is it mounted?",
            path.display()
        );
        Err(StorageError::Storage { id: self.plain.storage_id().to_owned(), why })
    }

    fn fill(&self, tools: &Tools, volume: &VolumeId, size_bytes: u64) -> Result<(), StorageError> {
        let files = self.files(volume)?;
        files.claim_image().map_err(|source| StorageError::Io {
            what: "make the image",
            path: files.image.clone(),
            source,
        })?;
        files.claim_data()?;
        if self.nocow {
            for path in files.all() {
                // Possible only while the file is empty.
                let mut command = Command::new("chattr");
                command.args(["+C", "--"]).arg(path);
                run(command).map_err(|message| StorageError::Io {
                    what: "switch copying on write off (chattr +C) for",
                    path: path.clone(),
                    source: io::Error::other(message),
                })?;
            }
        }
        files.fill(tools, size_bytes)
    }

    fn snapshot_names(&self, volume: &VolumeId) -> Result<Vec<String>, StorageError> {
        let prefix = format!("{}@", subvolume_name(volume));
        let names = names_in(&self.plain.guest_dir(volume.guest_id()))?;
        Ok(names.iter().filter_map(|name| name.strip_prefix(&prefix)).map(str::to_owned).collect())
    }
}

impl Images for BtrfsStorage {
    const KIND: &'static str = BTRFS_KIND;

    fn storage_id(&self) -> &str {
        self.plain.storage_id()
    }

    fn check_mounted(&self) -> Result<(), StorageError> {
        self.plain.check_mounted()
    }

    fn files(&self, volume: &VolumeId) -> Result<ImageFiles, StorageError> {
        if is_plain(volume) {
            return self.plain.files(volume);
        }
        self.plain.check_own(volume)?;
        if volume.format() == ImageFormat::Subvol {
            return self.plain.files(volume);
        }
        Ok(ImageFiles::new(&self.subvolume(volume), STEM, volume.format()))
    }

    fn existing(&self, volume: &VolumeId) -> Result<ImageFiles, StorageError> {
        let files = self.files(volume)?;
        let is_there = match volume.format() {
            ImageFormat::Subvol => files.image.is_dir(),
            _ => files.all().all(|path| path.is_file()),
        };
        if is_there {
            return Ok(files);
        }
        let missing = files.all().find(|path| !path.is_file()).unwrap_or(&files.image);
        Err(StorageError::NotFound { volume: volume.to_string(), path: missing.clone() })
    }

    fn allocate_now(
        &self,
        tools: &Tools,
        volume: &VolumeId,
        size_bytes: u64,
    ) -> Result<Unfinished, StorageError> {
        self.plain.check_own(volume)?;
        self.check_file_system()?;
        if is_plain(volume) {
            if self.subvolume(volume).exists() {
                return Err(StorageError::Exists { volume: volume.to_string() });
            }
            return self.plain.allocate_now(tools, volume, size_bytes);
        }
        let path = self.subvolume(volume);
        let guest_dir = self.plain.guest_dir(volume.guest_id());
        let mut made = Ok(());
        let claimed = in_guest_dir(&guest_dir, || {
            made = create_subvolume(&path, volume);
            match &made {
                // Removed by another task between two steps: once more.
                Err(StorageError::Btrfs { message, .. }) if message.contains(NOT_FOUND) => {
                    Err(io::ErrorKind::NotFound.into())
                }
                _ => Ok(()),
            }
        });
        made?;
        claimed.map_err(|source| StorageError::Io {
            what: "make a subvolume in",
            path: guest_dir.clone(),
            source,
        })?;
        let undo = path.clone();
        let unfinished = Unfinished::new(move || {
            let _ = delete_whole(&undo);
            let _ = fs::remove_dir(guest_dir);
        });
        if volume.format() == ImageFormat::Subvol {
            return Ok(unfinished);
        }
        match self.fill(tools, volume, size_bytes) {
            Ok(()) => Ok(unfinished),
            Err(error) => {
                unfinished.undo();
                Err(error)
            }
        }
    }

    /// Snapshots first, the subvolume last: as long as it is there nobody else gets its name.
    fn free_now(&self, volume: &VolumeId) -> Result<bool, StorageError> {
        let files = self.files(volume)?;
        self.check_file_system()?;
        if is_plain(volume) {
            return self.plain.free_now(volume);
        }
        let path = self.subvolume(volume);
        // One without an image is half made; whatever else is in there is somebody else's.
        let is_ours = is_there(&path)? && (is_there(&files.image)? || is_empty(&path)?);
        if is_ours {
            for name in self.snapshot_names(volume)? {
                delete_whole(&self.snapshot_path(volume, &name))?;
            }
            delete_whole(&path)?;
        }
        // Fails as long as there are other volumes, which is right.
        let _ = fs::remove_dir(self.plain.guest_dir(volume.guest_id()));
        Ok(is_ours)
    }

    fn list_now(&self, guest_id: Option<u32>) -> Result<Vec<StoredVolume>, StorageError> {
        self.check_file_system()?;
        let id = self.plain.storage_id();
        // Files as in a directory.
        let mut found = self.plain.list_now(guest_id)?;
        found.retain(|stored| is_plain(&stored.volume));
        for (guest_id, dir) in self.plain.guest_dirs(guest_id)? {
            for name in names_in(&dir)? {
                let path = dir.join(&name);
                if !path.is_dir() {
                    continue;
                }
                if let Ok(volume) = format!("{id}:{guest_id}/{name}").parse::<VolumeId>()
                    && volume.format() == ImageFormat::Subvol
                {
                    found.push(StoredVolume { volume, size_bytes: Some(0), used_bytes: 0 });
                    continue;
                }
                let format = ImageFormat::ALL
                    .into_iter()
                    .find(|format| path.join(format!("{STEM}.{}", format.ending())).exists());
                // A half-made one has no image yet; freeing any format of it removes it.
                let format = match format {
                    Some(format) => format,
                    None if is_empty(&path)? => ImageFormat::Raw,
                    None => continue,
                };
                let Ok(volume) = VolumeId::new(id, guest_id, &name, format) else { continue };
                let files = self.files(&volume)?;
                found.push(stored(volume, &files));
            }
        }
        found.sort_by(|a, b| {
            let key = |stored: &StoredVolume| (stored.volume.guest_id(), stored.volume.to_string());
            key(a).cmp(&key(b))
        });
        Ok(found)
    }

    fn snapshot_now(&self, _: &Tools, volume: &VolumeId, name: &str) -> Result<(), StorageError> {
        self.existing(volume)?;
        if is_plain(volume) {
            return Err(StorageError::NoSnapshots {
                id: self.plain.storage_id().to_owned(),
                kind: BTRFS_KIND,
                volume: volume.to_string(),
                format: volume.format(),
            });
        }
        let path = self.snapshot_path(volume, name);
        // Else the snapshot would be made within the one that is there.
        if path.exists() {
            return Err(StorageError::Exists { volume: format!("{volume}@{name}") });
        }
        let mut command = Command::new(BTRFS);
        command.args(["subvolume", "snapshot", "-r", "--"]).arg(self.subvolume(volume)).arg(&path);
        btrfs(command, "subvolume snapshot", &path)
    }

    fn delete_snapshot_now(
        &self,
        _: &Tools,
        volume: &VolumeId,
        name: &str,
    ) -> Result<bool, StorageError> {
        self.existing(volume)?;
        let path = self.snapshot_path(volume, name);
        if is_plain(volume) || !path.exists() {
            return Ok(false);
        }
        delete_whole(&path).map(|()| true)
    }

    fn snapshots_now(&self, _: &Tools, volume: &VolumeId) -> Result<Vec<String>, StorageError> {
        self.existing(volume)?;
        if is_plain(volume) { Ok(Vec::new()) } else { self.snapshot_names(volume) }
    }

    fn status_now(&self) -> Result<StorageStatus, StorageError> {
        self.check_file_system()?;
        fs_status(self.plain.path())
    }
}

/// Where Proxmox VE has it, too: a subvolume with an image has the image's name without the ending.
fn subvolume_name(volume: &VolumeId) -> &str {
    if volume.format() == ImageFormat::Subvol { volume.file() } else { volume.name() }
}

/// Whether a volume is a file without a subvolume.
fn is_plain(volume: &VolumeId) -> bool {
    volume.format() == ImageFormat::Qcow2
}

fn is_there(path: &Path) -> Result<bool, StorageError> {
    let fault = |source| StorageError::Io { what: "look at", path: path.to_owned(), source };
    path.try_exists().map_err(fault)
}

fn is_empty(dir: &Path) -> Result<bool, StorageError> {
    Ok(names_in(dir)?.is_empty())
}

fn create_subvolume(path: &Path, volume: &VolumeId) -> Result<(), StorageError> {
    let mut command = Command::new(BTRFS);
    command.args(["subvolume", "create", "--"]).arg(path);
    btrfs(command, "subvolume create", path).map_err(|error| match error {
        // The program looks first and then makes it; both ends say so in other words.
        StorageError::Btrfs { ref message, .. } if message.contains("exist") && path.exists() => {
            StorageError::Exists { volume: volume.to_string() }
        }
        other => other,
    })
}

/// The subvolumes directly below one, relative to it: in a snapshot there is an empty directory in the place of each.
/// May block.
///
/// # Errors
/// [`StorageError::Btrfs`].
pub fn nested_subvolumes(path: &Path) -> Result<Vec<PathBuf>, StorageError> {
    let mut command = Command::new(BTRFS);
    command.args(["subvolume", "list", "-o", "--"]).arg(path);
    let said = btrfs_says(command, "subvolume list", path)?;
    let name = path.file_name().unwrap_or_default();
    Ok(said.lines().filter_map(|line| nested_path(line, name)).collect())
}

/// Of a line such as `ID 259 gen 12 top level 257 path images/200/NAME/srv/a`, what comes after the name.
fn nested_path(line: &str, name: &OsStr) -> Option<PathBuf> {
    let mut components = Path::new(line.split_once(" path ")?.1).components();
    components.find(|component| component.as_os_str() == name)?;
    Some(components.as_path().to_owned()).filter(|path| !path.as_os_str().is_empty())
}

fn btrfs(command: Command, doing: &'static str, path: &Path) -> Result<(), StorageError> {
    btrfs_says(command, doing, path).map(drop)
}

fn btrfs_says(command: Command, doing: &'static str, path: &Path) -> Result<String, StorageError> {
    run(command).map_err(|message| StorageError::Btrfs {
        doing,
        path: path.to_owned(),
        message: message.lines().last().unwrap_or_default().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nested_subvolume_is_named_from_the_one_around_it() {
        let name = OsStr::new("subvol-200-disk-0.subvol");
        let line = "ID 259 gen 12 top level 257 path images/200/subvol-200-disk-0.subvol/srv/a b";
        assert_eq!(nested_path(line, name), Some("srv/a b".into()));
        assert_eq!(nested_path("ID 257 gen 9 top level 5 path elsewhere/srv", name), None);
        assert_eq!(nested_path("", name), None);
    }
}
