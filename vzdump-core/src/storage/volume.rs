// SPDX-License-Identifier: MIT OR Apache-2.0
//! Names of images, and the formats they tell.

use std::fmt;
use std::str::FromStr;

use super::StorageError;
use crate::config::storage::is_storage_id;

/// Longest name of a snapshot; Proxmox VE allows as many.
const SNAPSHOT_NAME_MAX_BYTES: usize = 40;

/// Format of an image.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum ImageFormat {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's own format.
    Qcow2,
    /// The disk's bytes as they are in one file, and beside it a qcow2 image that holds no data: only the
    /// dirty bitmaps, so that they outlive QEMU.
    RawBitmaps,
    /// A subvolume of btrfs with the files of a container; no image, and without a size of its own.
    Subvol,
}

impl ImageFormat {
    /// All of them; those whose ending contains another one's come first.
    pub const ALL: [Self; 4] = [Self::RawBitmaps, Self::Raw, Self::Qcow2, Self::Subvol];
    /// Those of disks.
    pub const OF_DISKS: [Self; 3] = [Self::RawBitmaps, Self::Raw, Self::Qcow2];

    /// The name of its driver in QEMU.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            // Nothing in QEMU opens a subvolume: it is no file.
            Self::Raw | Self::Subvol => "raw",
            Self::Qcow2 | Self::RawBitmaps => "qcow2",
        }
    }

    /// The end of a volume's name, without the dot. Whoever does not know the third format takes it
    /// for qcow2, which is what its main file is.
    #[must_use]
    pub const fn ending(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::RawBitmaps => "raw.qcow2",
            Self::Subvol => "subvol",
        }
    }

    /// The driver of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Raw, Self::Qcow2].into_iter().find(|format| format.name() == name)
    }

    /// Takes the name of a file apart; of `a.raw.qcow2` the longest ending counts.
    pub(super) fn split(file: &str) -> Option<(&str, Self)> {
        Self::ALL.into_iter().find_map(|format| {
            let stem = file.strip_suffix(format.ending())?.strip_suffix('.')?;
            (!stem.is_empty()).then_some((stem, format))
        })
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::RawBitmaps => "raw+bitmaps",
            Self::Subvol => "subvol",
        })
    }
}

/// The name of an image, `local:100/vm-100-disk-0.raw`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeId {
    storage: String,
    guest_id: u32,
    file: String,
    format: ImageFormat,
}

impl VolumeId {
    /// The name of an image that may be made. `name` has no ending: `vm-100-disk-0`.
    ///
    /// # Errors
    /// [`StorageError::Name`].
    pub fn new(
        storage: &str,
        guest_id: u32,
        name: &str,
        format: ImageFormat,
    ) -> Result<Self, StorageError> {
        let text = format!("{storage}:{guest_id}/{name}.{}", format.ending());
        let volume: Self = text.parse()?;
        if volume.format != format {
            let why = "the name's end belongs to another format.";
            return Err(StorageError::Name { text, why });
        }
        Ok(volume)
    }

    /// The storage.
    #[must_use]
    pub fn storage(&self) -> &str {
        &self.storage
    }

    /// The guest it belongs to.
    #[must_use]
    pub fn guest_id(&self) -> u32 {
        self.guest_id
    }

    /// The format.
    #[must_use]
    pub fn format(&self) -> ImageFormat {
        self.format
    }

    /// The last part, `vm-100-disk-0.raw`.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The last part without its ending, `vm-100-disk-0`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.file[..self.file.len() - self.format.ending().len() - 1]
    }

    /// Whether it keeps old data of a backup: worthless once the backup has ended, and never a disk.
    #[must_use]
    pub fn is_fleecing(&self) -> bool {
        self.name().starts_with(&fleecing_prefix(self.guest_id))
    }
}

/// How the names of a guest's fleecing images begin.
pub(crate) fn fleecing_prefix(guest_id: u32) -> String {
    format!("vm-{guest_id}-fleece-")
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.storage, self.guest_id, self.file)
    }
}

impl FromStr for VolumeId {
    type Err = StorageError;

    fn from_str(text: &str) -> Result<Self, StorageError> {
        let fault = |why| StorageError::Name { text: text.to_owned(), why };
        let (storage, rest) =
            text.split_once(':').ok_or_else(|| fault("'<storage>:<id>/<file>' is expected."))?;
        if !is_storage_id(storage) {
            return Err(fault("the storage's name is not allowed."));
        }
        let (guest, file) = rest
            .split_once('/')
            .ok_or_else(|| fault("'<id>/<file>' is expected behind the colon."))?;
        let guest_id = parse_guest_id(guest);
        let guest_id = guest_id.ok_or_else(|| fault("the guest's number is not a number."))?;
        let plain = file.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b));
        let first = file.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if !plain || !first || file.len() > 200 || file.contains("..") {
            return Err(fault("the file's name has characters that are not allowed."));
        }
        let (_, format) = ImageFormat::split(file)
            .ok_or_else(|| fault("the file's name must end in .raw, .qcow2 or .subvol."))?;
        Ok(Self { storage: storage.to_owned(), guest_id, file: file.to_owned(), format })
    }
}

/// A guest's number as it is written: digits without leading zeroes.
pub(super) fn parse_guest_id(text: &str) -> Option<u32> {
    let is_plain = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    text.parse().ok().filter(|_| is_plain)
}

/// Checks the name of a snapshot: a letter, then letters, digits, `-` and `_`.
///
/// # Errors
/// [`StorageError::Name`].
pub fn check_snapshot_name(name: &str) -> Result<(), StorageError> {
    let is_plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
    let begins = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic());
    if is_plain && begins && name.len() <= SNAPSHOT_NAME_MAX_BYTES {
        return Ok(());
    }
    let why = "a snapshot has up to 40 letters, digits, '-' and '_', the first a letter.";
    Err(StorageError::Name { text: name.to_owned(), why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_the_directory() {
        let good: VolumeId = "local:100/vm-100-disk-0.raw".parse().unwrap();
        assert_eq!(good.to_string(), "local:100/vm-100-disk-0.raw");
        assert_eq!((good.guest_id(), good.format()), (100, ImageFormat::Raw));
        for bad in [
            "vm-100-disk-0.raw",
            "local:vm-100-disk-0.raw",
            "local:../x.raw",
            "local:100/../x.raw",
            "local:100/..raw",
            "local:100/a..raw",
            "local:100/.raw",
            "local:100/-x.raw",
            "local:100/a/b.raw",
            "local:100/a b.raw",
            "local:100/a,b.raw",
            "local:100/a@b.raw",
            "local:100/a.vmdk",
            "local:100/a.data",
            "local:100/a",
            "local:0100/a.raw",
            "local:+100/a.raw",
            "local:/a.raw",
            "../x:100/a.raw",
            ":100/a.raw",
            "local:99999999999/a.raw",
        ] {
            assert!(bad.parse::<VolumeId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_longest_ending_tells_the_format() {
        for (text, name, format) in [
            ("local:100/vm-100-disk-0.raw", "vm-100-disk-0", ImageFormat::Raw),
            ("local:100/vm-100-disk-0.qcow2", "vm-100-disk-0", ImageFormat::Qcow2),
            ("local:100/vm-100-disk-0.raw.qcow2", "vm-100-disk-0", ImageFormat::RawBitmaps),
            ("local:100/vm-100-disk-0.qcow2.raw", "vm-100-disk-0.qcow2", ImageFormat::Raw),
        ] {
            let volume: VolumeId = text.parse().unwrap();
            assert_eq!((volume.name(), volume.format()), (name, format), "{text}");
            assert_eq!(VolumeId::new("local", 100, name, format).unwrap(), volume);
        }
        let hidden = VolumeId::new("local", 100, "a.raw", ImageFormat::Qcow2);
        assert!(matches!(hidden, Err(StorageError::Name { .. })), "one name, two formats");
    }

    #[test]
    fn only_fleecing_images_of_the_guest_itself_are_taken_for_such() {
        let is = |text: &str| text.parse::<VolumeId>().unwrap().is_fleecing();
        assert!(is("local:100/vm-100-fleece-scsi0-12345678.raw"));
        assert!(is("local:100/vm-100-fleece-0.qcow2"));
        for disk in ["100/vm-100-disk-0.raw", "100/vm-10-fleece-0.raw", "10/vm-100-fleece-0.raw"] {
            assert!(!is(&format!("local:{disk}")), "{disk}");
        }
    }

    #[test]
    fn names_of_snapshots_are_plain() {
        for good in ["a", "before_update-1", "S2"] {
            check_snapshot_name(good).unwrap();
        }
        for bad in ["", "1a", "-a", "a b", "a/b", "..", "a@b", "a,b", &"a".repeat(41)] {
            assert!(check_snapshot_name(bad).is_err(), "{bad}");
        }
    }
}
