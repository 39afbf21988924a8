// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshots of a container's volumes: by the storage where it can, by a copy that shares its blocks where
//! the file system of a raw image can.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ioctl_ficlone};
use vzdump_core::job::JobContext;
use vzdump_core::journal::Entry;
use vzdump_core::storage::{BTRFS_KIND, ImageFormat, StorageSet, VolumeId};

use crate::lxc::Lxc;
use crate::runtime::{COVERED, Found};
use crate::{CtError, runtime::beside};

/// `BTRFS_SUPER_MAGIC` of the kernel.
const BTRFS_SUPER_MAGIC: u64 = 0x9123_683e;
/// The number of the directory that each subvolume begins with.
const SUBVOLUME_INO: u64 = 256;

/// The snapshot of one volume, planned or taken.
#[derive(Debug, Clone)]
pub(crate) enum Snapshot {
    /// Of a storage that has such.
    OfStorage { volume: VolumeId, name: String, path: PathBuf },
    /// A file beside the image that shares its blocks.
    Clone { source: PathBuf, volume: VolumeId, path: PathBuf },
}

impl Snapshot {
    /// Chooses names; makes nothing.
    pub(crate) fn plan(ctx: &JobContext, found: &Found, id: u32) -> Result<Self, CtError> {
        let volume: VolumeId = found.entry.volume.parse()?;
        let storage = ctx.storages.images(volume.storage())?;
        let unique = &uuid::Uuid::new_v4().simple().to_string()[..8];
        if storage.kind() == BTRFS_KIND {
            let name = format!("vzdump-{unique}");
            let path = snapshot_path(&found.path, volume.format(), &name);
            return Ok(Self::OfStorage { volume, name, path });
        }
        let name = format!("vm-{id}-snap-{unique}");
        let clone = VolumeId::new(volume.storage(), id, &name, ImageFormat::Raw)?;
        let path = storage.volume_path(&clone)?;
        Ok(Self::Clone { source: found.path.clone(), volume: clone, path })
    }

    /// What the journal keeps of it.
    pub(crate) fn entry(&self) -> Entry {
        match self {
            Self::OfStorage { volume, name, .. } => {
                Entry::Snapshot { volume: volume.to_string(), name: name.clone() }
            }
            Self::Clone { volume, .. } => Entry::Volume { volume: volume.to_string() },
        }
    }

    /// Where its files, or its image, are.
    pub(crate) fn path(&self) -> &PathBuf {
        match self {
            Self::OfStorage { path, .. } | Self::Clone { path, .. } => path,
        }
    }

    pub(crate) async fn take(&self, ctx: &JobContext) -> Result<(), CtError> {
        match self.clone() {
            Self::OfStorage { volume, name, .. } => {
                let storage = ctx.storages.images(volume.storage())?;
                Ok(storage.snapshot(&ctx.tools, &volume, &name).await?)
            }
            Self::Clone { source, path, .. } => {
                beside(move || {
                    let doing =
                        format!("make a copy of '{}' that shares its blocks", source.display());
                    clone_file(&source, &path).map_err(CtError::at(doing))
                })
                .await
            }
        }
    }
}

fn clone_file(source: &Path, target: &Path) -> io::Result<()> {
    let source = File::open(source)?;
    let target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(target)?;
    Ok(ioctl_ficlone(target, source)?)
}

/// As [`vzdump_core::storage::BtrfsStorage`] names them.
fn snapshot_path(volume: &Path, format: ImageFormat, name: &str) -> PathBuf {
    let renamed = |dir: &Path| {
        let mut file = dir.file_name().unwrap_or_default().to_owned();
        file.push(format!("@{name}"));
        dir.with_file_name(file)
    };
    match (format, volume.parent(), volume.file_name()) {
        (ImageFormat::Raw, Some(dir), Some(file)) => renamed(dir).join(file),
        _ => renamed(volume),
    }
}

/// Whether a directory is a subvolume of a btrfs, and not just a directory. May block.
pub(crate) fn is_subvolume(path: &Path) -> bool {
    is_on_btrfs(path) && fs::metadata(path).is_ok_and(|meta| meta.ino() == SUBVOLUME_INO)
}

/// Whether a directory is on a btrfs. May block.
pub(crate) fn is_on_btrfs(path: &Path) -> bool {
    let stat = rustix::fs::statfs(path);
    stat.is_ok_and(|stat| stat.f_type as u64 & 0xffff_ffff == BTRFS_SUPER_MAGIC)
}

/// Whether a volume can be snapshotted while it is in use; else why not. May block.
pub(crate) fn can_snapshot(found: &Found, storages: &StorageSet) -> Result<(), String> {
    if found.format == Some(ImageFormat::Subvol) {
        let volume = found.entry.volume.parse::<VolumeId>();
        let is_of_btrfs = volume.is_ok_and(|volume| {
            storages.images(volume.storage()).is_ok_and(|storage| storage.kind() == BTRFS_KIND)
        });
        if is_of_btrfs && is_subvolume(&found.path) {
            return Ok(());
        }
        return Err(format!(
            "'{}' ({}) cannot be snapshotted: it is a directory, and no subvolume of a storage of the type btrfs",
            found.entry.volume, found.entry.key
        ));
    }
    let try_it = || -> io::Result<()> {
        let source = File::open(&found.path)?;
        let dir = found.path.parent().unwrap_or(Path::new("/"));
        // A file without a name: there is nothing to remove.
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        let target = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)?;
        Ok(ioctl_ficlone(target, source)?)
    };
    try_it().map_err(|error| {
        format!(
            "'{}' ({}) cannot be snapshotted: its file system cannot share blocks ({error})",
            found.entry.volume, found.entry.key
        )
    })
}

/// Where a raw image is mounted for a container that runs: in the namespace of LXC's monitor, at a place that
/// the container neither sees nor chooses.
pub(crate) fn monitored_mount(lxc: &Lxc, key: &str) -> Result<PathBuf, CtError> {
    let gone = || CtError::Invalid(format!("The container {} has stopped meanwhile.", lxc.name));
    let init = lxc.init_pid()?.ok_or_else(gone)?;
    let stat = fs::read_to_string(format!("/proc/{init}/stat")).map_err(|_| gone())?;
    // The name before it, in parentheses, may contain anything; the parent is the second field after.
    let (_, fields) = stat.rsplit_once(')').ok_or_else(gone)?;
    let monitor: u32 = fields
        .split_ascii_whitespace()
        .nth(1)
        .and_then(|field| field.parse().ok())
        .filter(|pid| *pid > 1)
        .ok_or_else(gone)?;
    let covered = COVERED.trim_start_matches('/');
    let path = PathBuf::from(format!("/proc/{monitor}/root/{covered}/volumes/{key}"));
    if path.exists() {
        return Ok(path);
    }
    Err(CtError::Invalid(format!(
        "The container {} was not started by `vzdump ct start`: its volumes cannot be reached \
         while it runs. Use --mode stop.",
        lxc.name
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_are_where_the_storage_makes_them() {
        let path = |volume: &str, format| snapshot_path(Path::new(volume), format, "s");
        assert_eq!(
            path("/t/images/200/vm-200-disk-0/disk.raw", ImageFormat::Raw),
            Path::new("/t/images/200/vm-200-disk-0@s/disk.raw")
        );
        assert_eq!(
            path("/t/images/200/subvol-200-disk-0.subvol", ImageFormat::Subvol),
            Path::new("/t/images/200/subvol-200-disk-0.subvol@s")
        );
    }
}
