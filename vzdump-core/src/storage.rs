// SPDX-License-Identifier: MIT OR Apache-2.0
//! Storages of disk images, behind one trait.
//!
//! ```text
//! storage.cfg ─► StorageSet ─► dyn Storage ─┬► dir     files in a directory
//!                                           └► btrfs   one subvolume per image
//! ```
//!
//! What every storage must keep is a test that runs for each of them
//! (`system-tests/tests/storage_contract.rs`). A type that is not here is kept in `storage.cfg` as it is
//! and told as unsupported; a new one gets a line in [`KINDS`].
//!
//! Names are checked strictly, because they also come from configurations and archives.

mod btrfs;
mod dir;
mod foreign;
mod image;
mod images;
mod set;
mod volume;

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use provider_api::BoxFuture;

use crate::blocking;
use crate::tools::{MissingTool, Tools};

pub(crate) use btrfs::BTRFS_MAGIC;
pub use btrfs::{BTRFS_KIND, BtrfsStorage, nested_subvolumes};
pub use dir::{DIR_KIND, DirStorage};
pub(crate) use foreign::distrust_bitmaps;
pub use image::image_size;
pub use set::{DEFAULT_STORAGE, KINDS, StorageSet};
pub(crate) use volume::fleecing_prefix;
pub use volume::{ImageFormat, VolumeId, check_snapshot_name};

/// Disks of one guest; a bound for the search of a free name.
const DISKS_MAX: u32 = 1000;

/// A fault of a storage.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A volume's name is not allowed.
    #[error("'{text}' is not a volume: {why}")]
    Name {
        /// The name.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No such storage, or not one for images.
    #[error("The storage '{id}' {why}")]
    Storage {
        /// The storage.
        id: String,
        /// What is wrong with it.
        why: String,
    },
    /// The size is not allowed.
    #[error("{size_bytes} bytes is not a disk size: a multiple of 512 up to 1 PiB is needed.")]
    Size {
        /// The size.
        size_bytes: u64,
    },
    /// A disk would lose its end.
    #[error(
        "The volume '{volume}' has {now_bytes} bytes; making it {size_bytes} would cut off data."
    )]
    Shrink {
        /// The volume.
        volume: String,
        /// Its size.
        now_bytes: u64,
        /// The size asked for.
        size_bytes: u64,
    },
    /// The volume exists already.
    #[error("The volume '{volume}' exists already.")]
    Exists {
        /// The volume.
        volume: String,
    },
    /// The volume does not exist.
    #[error("The volume '{volume}' does not exist ('{path}').")]
    NotFound {
        /// The volume.
        volume: String,
        /// Its file.
        path: PathBuf,
    },
    /// An image has not the format its name says.
    #[error("The volume '{volume}' is not a valid {format} image: {why}")]
    Format {
        /// The volume.
        volume: String,
        /// The expected format.
        format: ImageFormat,
        /// What is wrong with it.
        why: String,
    },
    /// This kind of storage cannot snapshot this format.
    #[error(
        "The storage '{id}' (type {kind}) cannot take snapshots of '{volume}', whose format is {format}."
    )]
    NoSnapshots {
        /// The storage.
        id: String,
        /// Its type.
        kind: &'static str,
        /// The volume.
        volume: String,
        /// The volume's format.
        format: ImageFormat,
    },
    /// The program that makes images failed.
    #[error("qemu-img could not {doing} the image '{path}': {message}")]
    QemuImg {
        /// What was being done.
        doing: &'static str,
        /// The image.
        path: PathBuf,
        /// What it said.
        message: String,
    },
    /// The program for btrfs failed.
    #[error("`btrfs {doing}` failed for '{path}': {message}")]
    Btrfs {
        /// What was being done.
        doing: &'static str,
        /// The subvolume.
        path: PathBuf,
        /// What it said.
        message: String,
    },
    /// A program is missing.
    #[error(transparent)]
    Tool(#[from] MissingTool),
    /// Input or output failed.
    #[error("Cannot {what} '{path}'.")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A volume that a storage holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredVolume {
    /// Its name.
    pub volume: VolumeId,
    /// The size of its disk in bytes; none if the image is half made or damaged.
    pub size_bytes: Option<u64>,
    /// What it takes on the storage, in bytes.
    pub used_bytes: u64,
}

/// The space of a storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StorageStatus {
    /// All of it, in bytes.
    pub total_bytes: u64,
    /// What is in use, in bytes.
    pub used_bytes: u64,
    /// What can be used yet, in bytes; with reserves this is less than the difference.
    pub available_bytes: u64,
    /// Equal for storages that share their space.
    pub pool_id: u64,
}

/// A place for disk images.
///
/// Everything may take as long as the storage takes; the caller bounds it. Dropping a future leaves
/// nothing half made behind, but the end of that is not waited for: so whoever makes a volume journals its name
/// first. A process that is killed leaves at most a volume that [`Storage::list`] shows without a size,
/// that blocks no other name, and that [`Storage::free`] removes.
pub trait Storage: std::fmt::Debug + Send + Sync {
    /// Its name.
    fn id(&self) -> &str;

    /// Its type in `storage.cfg`.
    fn kind(&self) -> &'static str;

    /// The file or device of a volume that QEMU opens, whether it exists or not.
    ///
    /// # Errors
    /// [`StorageError::Storage`] for a volume of another storage.
    fn volume_path(&self, volume: &VolumeId) -> Result<PathBuf, StorageError>;

    /// The file of a volume's data, where that is not in the image.
    ///
    /// # Errors
    /// [`StorageError::Storage`] for a volume of another storage.
    fn data_path(&self, volume: &VolumeId) -> Result<Option<PathBuf>, StorageError>;

    /// Makes a thin volume that reads as zeroes and has exactly this size, durably. `name` has no
    /// ending: `vm-100-disk-0`.
    ///
    /// # Errors
    /// [`StorageError::Exists`] when there is one of that name; nothing is left behind by a failure.
    fn allocate<'a>(
        &'a self,
        tools: &'a Tools,
        guest_id: u32,
        name: &'a str,
        format: ImageFormat,
        size_bytes: u64,
    ) -> BoxFuture<'a, Result<VolumeId, StorageError>>;

    /// Makes the disk of a VM that does not run larger.
    ///
    /// # Errors
    /// [`StorageError::Shrink`]; QEMU has the disk open.
    fn resize<'a>(
        &'a self,
        tools: &'a Tools,
        volume: &'a VolumeId,
        size_bytes: u64,
    ) -> BoxFuture<'a, Result<(), StorageError>>;

    /// Removes a volume with its snapshots, durably; tells whether it was there.
    ///
    /// # Errors
    /// [`StorageError`].
    fn free<'a>(&'a self, volume: &'a VolumeId) -> BoxFuture<'a, Result<bool, StorageError>>;

    /// The volumes of one guest, or of all, in a fixed order. Fleecing images are among
    /// them ([`VolumeId::is_fleecing`]).
    ///
    /// # Errors
    /// [`StorageError`].
    fn list(&self, guest_id: Option<u32>)
    -> BoxFuture<'_, Result<Vec<StoredVolume>, StorageError>>;

    /// Takes a snapshot of a volume.
    ///
    /// # Errors
    /// [`StorageError::NoSnapshots`] where there cannot be any; [`StorageError::Exists`].
    fn snapshot<'a>(
        &'a self,
        tools: &'a Tools,
        volume: &'a VolumeId,
        name: &'a str,
    ) -> BoxFuture<'a, Result<(), StorageError>>;

    /// Removes a snapshot; tells whether it was there.
    ///
    /// # Errors
    /// [`StorageError`].
    fn delete_snapshot<'a>(
        &'a self,
        tools: &'a Tools,
        volume: &'a VolumeId,
        name: &'a str,
    ) -> BoxFuture<'a, Result<bool, StorageError>>;

    /// The names of a volume's snapshots.
    ///
    /// # Errors
    /// [`StorageError::NotFound`].
    fn snapshots<'a>(
        &'a self,
        tools: &'a Tools,
        volume: &'a VolumeId,
    ) -> BoxFuture<'a, Result<Vec<String>, StorageError>>;

    /// Its space.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    fn status(&self) -> BoxFuture<'_, Result<StorageStatus, StorageError>>;
}

impl dyn Storage + '_ {
    /// A name `vm-<id>-disk-<n>` that no disk has, whatever its format; for a subvolume
    /// `subvol-<id>-disk-<n>`.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn free_name(
        &self,
        guest_id: u32,
        format: ImageFormat,
    ) -> Result<String, StorageError> {
        let stored = self.list(Some(guest_id)).await?;
        let taken: HashSet<&str> = stored.iter().map(|stored| stored.volume.name()).collect();
        let prefix = if format == ImageFormat::Subvol { "subvol" } else { "vm" };
        let mut names = (0..DISKS_MAX).map(|n| format!("{prefix}-{guest_id}-disk-{n}"));
        names.find(|name| !taken.contains(name.as_str())).ok_or_else(|| StorageError::Storage {
            id: self.id().to_owned(),
            why: format!("has no free disk name for the guest {guest_id}."),
        })
    }

    /// What QEMU's tools take with `--image-opts` for a volume.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn image_options(&self, volume: &VolumeId) -> Result<String, StorageError> {
        let (image, data) = (self.volume_path(volume)?, self.data_path(volume)?);
        image::image_options(volume.format(), &image, data.as_deref())
    }

    /// The size of the disk in a volume.
    ///
    /// # Errors
    /// [`StorageError::NotFound`], [`StorageError::Format`].
    pub fn volume_size(&self, volume: &VolumeId) -> Result<u64, StorageError> {
        let path = self.volume_path(volume)?;
        image_size(&path, volume.format()).map_err(|error| match error {
            StorageError::NotFound { path, .. } => {
                StorageError::NotFound { volume: volume.to_string(), path }
            }
            other => other,
        })
    }
}

/// A volume that was begun. It is removed when this is dropped, also by the thread that made it for
/// a task that did not wait.
struct Unfinished {
    undo: Option<Box<dyn FnOnce() + Send>>,
}

impl Unfinished {
    fn new(undo: impl FnOnce() + Send + 'static) -> Self {
        Self { undo: Some(Box::new(undo)) }
    }

    /// Removes it before this returns.
    fn undo(mut self) {
        if let Some(undo) = self.undo.take() {
            undo();
        }
    }

    fn keep(mut self) {
        self.undo = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let Some(undo) = self.undo.take() else { return };
        // A task must not block; that nobody waits for the end is why the names are journalled.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(undo)),
            Err(_) => undo(),
        }
    }
}

/// Does something that may block beside the tasks.
async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, StorageError> {
    blocking::run(move || Ok(work())).await.unwrap_or_else(|source| {
        Err(StorageError::Io { what: "wait for the work on", path: "a storage".into(), source })
    })
}

/// The space of the file system at a path, or at its nearest parent that exists.
fn fs_status(path: &Path) -> Result<StorageStatus, StorageError> {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(path);
    let stat = rustix::fs::statvfs(existing).map_err(|errno| StorageError::Io {
        what: "ask for the space of",
        path: existing.to_owned(),
        source: errno.into(),
    })?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Ok(StorageStatus {
        total_bytes: bytes(stat.f_blocks),
        used_bytes: bytes(stat.f_blocks.saturating_sub(stat.f_bfree)),
        available_bytes: bytes(stat.f_bavail),
        pool_id: stat.f_fsid,
    })
}
