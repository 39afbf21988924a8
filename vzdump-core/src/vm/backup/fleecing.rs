// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where old data is kept during a backup: what the administrator says about it, and the images.
//!
//! An image is named after the guest and its disk, with a random part that makes it one backup's
//! alone: `vm-100-fleece-scsi0-1f2e3d4c.raw`, in QEMU `fleecing-scsi0-1f2e3d4c`. It is journalled before it
//! is made, thin, and exactly as large as the disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, IFlags, StatxFlags};

use super::disks::Disk;
use super::{VmDriver, free_volume, ops, short_id};
use crate::blocking;
use crate::config::guest::is_disk_key;
use crate::config::storage::is_storage_id;
use crate::config::{OptionList, parse_bool};
use crate::guest::{GuestError, Task};
use crate::job::chain;
use crate::journal::{Entry, FleecingImage};
use crate::storage::{
    BTRFS_MAGIC, DEFAULT_STORAGE, ImageFormat, Storage, VolumeId, fleecing_prefix,
};
use crate::task_log::size_config;
use crate::vm::create::parse_size;

/// QEMU's bounds of these options.
const LIMIT_MIN_BYTES: u64 = 1 << 20;
const REFLINK_BYTES: std::ops::RangeInclusive<u64> = 4096..=1 << 20;
/// What is given back to see whether a storage can do that.
const HOLE_BYTES: u64 = 64 << 10;
/// `XFS_SUPER_MAGIC` of the kernel.
const XFS_MAGIC: u64 = 0x5846_5342;
/// File systems that share blocks between files.
const REFLINK_FILE_SYSTEMS: [u64; 2] = [BTRFS_MAGIC, XFS_MAGIC];

/// The property string `fleecing`: `storage=fast,limit=20G,reflink=64K,scsi1=big`, with vzdump's
/// `enabled=1` in front of it or not.
///
/// ```
/// use vzdump_core::vm::backup::FleecingOptions;
/// let options: FleecingOptions = "enabled=1,storage=fast,limit=20G,scsi1=big".parse().unwrap();
/// assert_eq!(options.storage.as_deref(), Some("fast"));
/// assert_eq!(options.limit_bytes, Some(20 << 30));
/// assert_eq!(options.disks["scsi1"], "big");
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FleecingOptions {
    /// `enabled=0` was said. The guest's old data has to go somewhere all the same: it is kept on the
    /// storage of each disk then, and the log says so.
    pub is_refused: bool,
    /// The storage of the images; by default that of each disk.
    pub storage: Option<String>,
    /// How much old data may take per disk, in bytes; the backup fails beyond it.
    pub limit_bytes: Option<u64>,
    /// Old data of at least so many bytes in a row shares the disk's blocks instead of being copied,
    /// where disk and image are on one btrfs or XFS.
    pub reflink_bytes: Option<u64>,
    /// The storage for some disks, by their keys; those a guest does not have mean nothing to it.
    pub disks: BTreeMap<String, String>,
}

impl FleecingOptions {
    /// The storage for the image of a disk.
    fn storage_of(&self, disk: &Disk) -> String {
        let chosen = self.disks.get(&disk.key).or(self.storage.as_ref());
        if let Some(storage) = chosen.filter(|_| !self.is_refused) {
            return storage.clone();
        }
        let own = disk.volume.parse::<VolumeId>().map(|volume| volume.storage().to_owned());
        own.unwrap_or_else(|_| DEFAULT_STORAGE.to_owned())
    }
}

impl FromStr for FleecingOptions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault = |why: String| format!("'{text}' is no description of fleecing: {why}");
        let list = OptionList::parse(text).map_err(&fault)?;
        let mut options = Self::default();
        let mut seen = BTreeSet::new();
        let first = list.first.map(|value| ("enabled".to_owned(), value));
        for (key, value) in first.into_iter().chain(list.named) {
            if !seen.insert(key.clone()) {
                return Err(fault(format!("'{key}' is there twice.")));
            }
            let id = || match is_storage_id(&value) {
                true => Ok(value.clone()),
                false => Err(fault(format!("'{value}' is not the name of a storage."))),
            };
            match key.as_str() {
                "enabled" => match parse_bool(&value) {
                    Some(is_enabled) => options.is_refused = !is_enabled,
                    None => return Err(fault(format!("'{value}' is neither 0 nor 1."))),
                },
                "storage" => options.storage = Some(id()?),
                "limit" => {
                    let bytes = parse_size(&value).map_err(&fault)?;
                    if bytes < LIMIT_MIN_BYTES {
                        return Err(fault(format!("the limit {value} is less than 1M.")));
                    }
                    options.limit_bytes = Some(bytes);
                }
                "reflink" => {
                    let bytes = parse_size(&value).map_err(&fault)?;
                    if !REFLINK_BYTES.contains(&bytes) {
                        return Err(fault(format!("'reflink={value}' is not from 4K to 1M.")));
                    }
                    options.reflink_bytes = Some(bytes);
                }
                disk if is_disk_key(disk) => drop(options.disks.insert(key.clone(), id()?)),
                _ => {
                    return Err(fault(format!(
                        "'{key}' is none of enabled, storage, limit, reflink, or a disk such as \
                         scsi0."
                    )));
                }
            }
        }
        Ok(options)
    }
}

impl fmt::Display for FleecingOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut list = OptionList::default();
        let mut set = |key: &str, value: String| list.named.push((key.to_owned(), value));
        if self.is_refused {
            set("enabled", "0".to_owned());
        }
        if let Some(storage) = &self.storage {
            set("storage", storage.clone());
        }
        if let Some(bytes) = self.limit_bytes {
            set("limit", size_config(bytes));
        }
        if let Some(bytes) = self.reflink_bytes {
            set("reflink", size_config(bytes));
        }
        for (key, storage) in &self.disks {
            set(key, storage.clone());
        }
        list.fmt(f)
    }
}

/// Whether an image is named as ours are: those of another program may be in use.
pub(crate) fn is_ours(volume: &VolumeId) -> bool {
    let unique = volume.name().strip_prefix(&fleecing_prefix(volume.guest_id()));
    unique.and_then(|unique| unique.split_once('-')).is_some_and(|(key, random)| {
        is_disk_key(key) && random.len() == 8 && random.bytes().all(|b| b.is_ascii_hexdigit())
    })
}

/// A fleecing image that was begun.
#[derive(Debug)]
pub(super) struct Fleecing {
    pub(super) node: String,
    pub(super) volume: VolumeId,
    /// Old data of so many bytes in a row is shared with the disk.
    pub(super) reflink_bytes: Option<u64>,
}

impl VmDriver {
    pub(super) async fn do_acquire(&mut self, task: Task<'_>) -> Result<(), GuestError> {
        self.take_ram(task.sink).await?;
        let mut warned = BTreeSet::new();
        if self.options.fleecing.is_refused && !self.disks.is_empty() {
            task.sink.warn(
                "fleecing cannot be switched off: old data is kept on the storage of each disk",
            );
        }
        for disk in self.disks.clone() {
            let storage = self.options.fleecing.storage_of(&disk);
            let images = self.storages.images(&storage).map_err(|error| {
                GuestError::Refused(format!(
                    "There is no place for the old data of '{}': {} Choose another with --fleecing \
                     storage=ID.",
                    disk.key,
                    chain(&error)
                ))
            })?;
            let path = self.make_image(&disk, &images, task).await?;
            let can_give_back = blocking::run({
                let path = path.clone();
                move || can_punch(&path)
            });
            let can_give_back = can_give_back
                .await
                .map_err(GuestError::at(format!("try out the storage '{storage}'")))?;
            if !can_give_back && warned.insert(storage.clone()) {
                task.sink.warn(&format!(
                    "the storage '{storage}' cannot give back space of an image (no discard): old \
                     data takes its space there up to the end of the backup"
                ));
            }
            self.choose_reflink(&disk, &path, task).await?;
        }
        Ok(())
    }

    /// Makes and attaches the image of one disk; returns its path.
    async fn make_image(
        &mut self,
        disk: &Disk,
        images: &Arc<dyn Storage>,
        task: Task<'_>,
    ) -> Result<std::path::PathBuf, GuestError> {
        let session = self.session()?.clone();
        // The random part makes it ours alone: a recovery frees what has this name.
        let unique = format!("{}-{}", disk.key, short_id());
        let name = format!("{}{unique}", fleecing_prefix(self.id));
        let node = format!("fleecing-{unique}");
        let volume = VolumeId::new(images.id(), self.id, &name, ImageFormat::Raw)
            .map_err(GuestError::at("name a fleecing image"))?;
        let entry = FleecingImage { node: node.clone(), volume: volume.to_string() };
        task.journal.append(Entry::Fleecing(entry)).await?;
        self.fleecing.push(Fleecing {
            node: node.clone(),
            volume: volume.clone(),
            reflink_bytes: None,
        });
        let doing = || GuestError::at(format!("make the fleecing image '{volume}'"));
        images
            .allocate(&self.tools, self.id, &name, ImageFormat::Raw, disk.size_bytes)
            .await
            .map_err(doing())?;
        let path = images.volume_path(&volume).map_err(doing())?;
        let text = path.to_str().ok_or_else(|| {
            GuestError::Refused(format!("'{}' is not UTF-8, as QMP needs.", path.display()))
        })?;
        ops::add_fleecing_node(&session, &node, text)
            .await
            .map_err(GuestError::at(format!("attach the fleecing image '{volume}'")))?;
        Ok(path)
    }

    /// Whether the newest image shares blocks with its disk.
    async fn choose_reflink(
        &mut self,
        disk: &Disk,
        image: &Path,
        task: Task<'_>,
    ) -> Result<(), GuestError> {
        let Some(bytes) = self.options.fleecing.reflink_bytes else { return Ok(()) };
        let is_raw = match disk.volume.parse::<VolumeId>() {
            Ok(volume) => volume.format() == ImageFormat::Raw,
            Err(_) => true,
        };
        let can = match self.storages.resolve(&disk.volume) {
            Ok(source) if is_raw => {
                let image = image.to_owned();
                blocking::run(move || can_share(&source, &image))
                    .await
                    .map_err(GuestError::at(format!("look at the disk '{}'", disk.key)))?
            }
            _ => false,
        };
        if !can {
            task.sink.info(&format!(
                "{}: old data is copied, not shared: the disk and its fleecing image are not raw \
                 files on one btrfs or XFS",
                disk.key
            ));
        } else if let Some(newest) = self.fleecing.last_mut() {
            newest.reflink_bytes = Some(bytes);
        }
        Ok(())
    }

    pub(super) async fn do_release(&mut self, task: Task<'_>) -> Result<(), GuestError> {
        self.ram = None;
        let mut first = None;
        while let Some(image) = self.fleecing.pop() {
            if let Err(error) = self.release_image(&image).await {
                match first {
                    None => first = Some(error),
                    Some(_) => task.sink.warn(&chain(&error)),
                }
            }
        }
        first.map_or(Ok(()), Err)
    }

    async fn release_image(&mut self, image: &Fleecing) -> Result<(), GuestError> {
        let volume = &image.volume;
        if let Some(session) = self.session_if_alive().await? {
            // A file that QEMU still writes to is not removed.
            match ops::remove_node(&session, &image.node).await {
                Err(qmp_client::Error::Disconnected) if self.is_ending().await => {}
                other => {
                    let doing = format!("detach the fleecing image '{volume}'");
                    other.map_err(GuestError::at(doing))?;
                }
            }
        }
        free_volume(&self.storages, volume).await
    }
}

/// Whether space of a file can be given back. The image is empty yet, so nothing is lost.
fn can_punch(path: &Path) -> std::io::Result<bool> {
    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(&file, flags, 0, HOLE_BYTES) {
        Ok(()) => Ok(true),
        Err(errno) if [rustix::io::Errno::OPNOTSUPP, rustix::io::Errno::NOSYS].contains(&errno) => {
            Ok(false)
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Whether two files may share blocks: QEMU tries it out. The device number does not tell, because
/// every subvolume has another one; and a file without checksums shares with its like only.
fn can_share(a: &Path, b: &Path) -> std::io::Result<bool> {
    let mut kinds = BTreeSet::new();
    for path in [a, b] {
        let file_system = rustix::fs::statfs(path)?.f_type as u64 & 0xffff_ffff;
        if !path.is_file() || !REFLINK_FILE_SYSTEMS.contains(&file_system) {
            return Ok(false);
        }
        let stat = rustix::fs::statx(
            rustix::fs::CWD,
            path,
            rustix::fs::AtFlags::empty(),
            StatxFlags::MNT_ID,
        )?;
        let flags = rustix::fs::ioctl_getflags(std::fs::File::open(path)?)?;
        kinds.insert((stat.stx_mnt_id, flags.contains(IFlags::NOCOW)));
    }
    Ok(kinds.len() == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_is_read_and_written() {
        let text = "storage=fast,limit=20G,reflink=64K,scsi1=big,virtio0=local";
        let options: FleecingOptions = text.parse().unwrap();
        assert_eq!(options.to_string(), text);
        assert_eq!(options.limit_bytes, Some(20 << 30));
        assert_eq!(options.reflink_bytes, Some(64 << 10));
        for same in ["enabled=1,storage=fast", "1,storage=fast", "storage=fast"] {
            let expected =
                FleecingOptions { storage: Some("fast".into()), ..FleecingOptions::default() };
            assert_eq!(same.parse(), Ok(expected), "{same}");
        }
        assert_eq!("".parse(), Ok(FleecingOptions::default()));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (bad, why) in [
            ("enabled=maybe", "neither 0 nor 1"),
            ("storage=../x", "not the name of a storage"),
            ("limit=1X", "not a size"),
            ("limit=512K", "less than 1M"),
            ("reflink=2M", "not from 4K to 1M"),
            ("scsi99=fast", "'scsi99' is none of"),
            ("storage=a1,storage=b1", "twice"),
            ("storage=fast,fast", "no name"),
        ] {
            let error = bad.parse::<FleecingOptions>().unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }

    #[test]
    fn a_disk_can_have_another_storage() {
        let disk = |key: &str, volume: &str| Disk {
            key: key.into(),
            volume: volume.into(),
            size_bytes: 512,
        };
        let options: FleecingOptions = "storage=fast,scsi1=big".parse().unwrap();
        assert_eq!(options.storage_of(&disk("scsi0", "local:100/a.raw")), "fast");
        assert_eq!(options.storage_of(&disk("scsi1", "local:100/a.raw")), "big");
        let refused: FleecingOptions = "0,storage=fast,scsi0=big".parse().unwrap();
        assert_eq!(refused.to_string(), "enabled=0,storage=fast,scsi0=big");
        assert_eq!(refused.storage_of(&disk("scsi0", "local:100/a.raw")), "local");
        let options = FleecingOptions::default();
        assert_eq!(options.storage_of(&disk("scsi0", "tree:100/a.raw")), "tree");
        assert_eq!(options.storage_of(&disk("scsi0", "/dev/sdx")), DEFAULT_STORAGE);
    }

    #[test]
    fn images_of_other_programs_are_left_alone() {
        let is = |name: &str| is_ours(&format!("local:100/{name}").parse().unwrap());
        assert!(is("vm-100-fleece-scsi0-1f2e3d4c.raw"));
        assert!(is(&format!("vm-100-fleece-virtio15-{}.raw", short_id())));
        for other in ["vm-100-fleece-0.qcow2", "vm-100-fleece-x-12345678.raw", "vm-100-disk-0.raw"]
        {
            assert!(!is(other), "{other}");
        }
    }

    #[test]
    fn node_names_fit_into_qemu() {
        let node = format!("fleecing-virtio15-{}", short_id());
        assert!(node.len() <= 31, "{node}");
    }
}
