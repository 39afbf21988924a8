// SPDX-License-Identifier: MIT OR Apache-2.0
//! The manifest: the file that makes a directory an archive.
//!
//! ```text
//! <storage>/vzdump-qemu-100-2026_01_02-03_04_05/
//!     manifest.json          this file
//!     qemu-server.conf       the guest's configuration
//!     qemu-server.fw         its firewall configuration, if any
//!     scsi0.qcow2            a disk; in an increment backed by ../<base archive>/scsi0.qcow2
//!     scsi0.blake3           checksums of what scsi0.qcow2 adds, see `checksums`
//! <storage>/vzdump-lxc-101-2026_01_02-03_04_05/
//!     manifest.json          as above
//!     lxc.conf, lxc.fw       as above, of a container
//!     tree.tar.zst           its files; or, as a tree,
//!     tree/, tree.blake3     its files, and the list of them with checksums, see `container::listing`
//! ```
//!
//! A storage may be writable by others, so whatever is read from it is checked before use: names
//! are rebuilt from the device instead of believed, numbers are bounded.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::Path;

use provider_api::{Error, GuestKind, Kind, Result, Transferred, Uuid, check_archive_name};
use serde::{Deserialize, Serialize};

use crate::call::{corrupt, invalid};
use crate::limits::{BLOCK_BYTES, DISK_BYTES_MAX, DISKS_MAX};

/// Name of the manifest in an archive.
pub(crate) const MANIFEST_FILE: &str = "manifest.json";
/// Name of a container's files in an archive.
pub(crate) const TREE_FILE: &str = "tree.tar.zst";
/// Name of the directory of a container's files in an archive.
pub(crate) const TREE_DIRECTORY: &str = "tree";
/// Name of the list of what is in that directory.
pub(crate) const TREE_LIST_FILE: &str = "tree.blake3";

/// Whether a file has a name that it has in archives, and hardly elsewhere.
pub(crate) fn is_archive_file(name: &OsStr) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "blake3")
        || name == TREE_FILE
        || [GuestKind::Qemu, GuestKind::Lxc].into_iter().any(|kind| name == config_file(kind))
}

/// Name of the guest's configuration in an archive.
pub(crate) fn config_file(kind: GuestKind) -> &'static str {
    match kind {
        GuestKind::Qemu => "qemu-server.conf",
        GuestKind::Lxc => "lxc.conf",
    }
}

/// Name of the firewall configuration in an archive.
pub(crate) fn firewall_file(kind: GuestKind) -> &'static str {
    match kind {
        GuestKind::Qemu => "qemu-server.fw",
        GuestKind::Lxc => "lxc.fw",
    }
}

const FORMAT: &str = "vzdump-directory";
/// Of archives of VMs.
const VERSION: u32 = 1;
/// Of archives of containers, which older programs do not know.
const VERSION_WITH_TREE: u32 = 2;
/// Of archives of containers that are trees of files, which were not known when the others were.
const VERSION_WITH_FILES: u32 = 3;

/// How the files of a container are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerFormat {
    /// In one compressed tar archive.
    #[default]
    Tar,
    /// As files.
    Tree,
}

impl ContainerFormat {
    /// The format of this name, as it is in `storage.cfg`.
    ///
    /// # Errors
    /// There is none; the text says which there are.
    pub fn from_name(name: &str) -> std::result::Result<Self, String> {
        match name {
            "tar" => Ok(Self::Tar),
            "tree" => Ok(Self::Tree),
            _ => Err(format!("'{name}' is no format of containers; there are 'tar' and 'tree'")),
        }
    }

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
    fn is_tar(&self) -> bool {
        *self == Self::Tar
    }
}

/// One archive.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) format: String,
    pub(crate) version: u32,
    /// Name of the archive, equal to that of its directory.
    pub(crate) archive: String,
    pub(crate) subtype: GuestKind,
    pub(crate) guest_id: u32,
    pub(crate) guest_name: Option<String>,
    /// Start of the backup, seconds since the epoch.
    pub(crate) time_s: i64,
    /// Rank among the guest's archives in the order of their commits; a clock may jump, this
    /// may not.
    pub(crate) sequence: u64,
    pub(crate) commit_id: Uuid,
    pub(crate) config: SmallFile,
    pub(crate) firewall: Option<SmallFile>,
    pub(crate) disks: Vec<Disk>,
    /// The files of a container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tree: Option<Tree>,
    pub(crate) transferred: Transferred,
    /// Hash of the file as it would be without this line, see [`Manifest::to_text`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) blake3: Option<String>,
}

/// The files of a container, in one compressed tar archive or as files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tree {
    #[serde(default, skip_serializing_if = "ContainerFormat::is_tar")]
    pub(crate) format: ContainerFormat,
    /// Size of the tar archive, or of the list.
    pub(crate) file_size_bytes: u64,
    /// Hash of this file.
    pub(crate) blake3: String,
    /// How many entries it has.
    pub(crate) entries: u64,
    /// Bytes of data in them.
    pub(crate) data_bytes: u64,
}

/// A configuration file in an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SmallFile {
    pub(crate) size_bytes: u64,
    pub(crate) blake3: String,
}

impl Tree {
    /// The file whose size and hash are known.
    pub(crate) fn file(&self) -> &'static str {
        match self.format {
            ContainerFormat::Tar => TREE_FILE,
            ContainerFormat::Tree => TREE_LIST_FILE,
        }
    }

    /// Bytes it takes.
    pub(crate) fn size_bytes(&self) -> u64 {
        match self.format {
            ContainerFormat::Tar => self.file_size_bytes,
            ContainerFormat::Tree => self.file_size_bytes.saturating_add(self.data_bytes),
        }
    }

    fn version(&self) -> u32 {
        match self.format {
            ContainerFormat::Tar => VERSION_WITH_TREE,
            ContainerFormat::Tree => VERSION_WITH_FILES,
        }
    }
}

impl SmallFile {
    pub(crate) fn of(content: &[u8]) -> Self {
        Self {
            size_bytes: content.len() as u64,
            blake3: blake3::hash(content).to_hex().to_string(),
        }
    }
}

/// One disk in an archive.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Disk {
    pub(crate) device: String,
    /// Size of the disk.
    pub(crate) size_bytes: u64,
    /// Size of the image file.
    pub(crate) file_size_bytes: u64,
    /// Archive whose disk of the same name this one builds upon.
    pub(crate) base: Option<String>,
    /// What to ask a bitmap for in the next backup.
    pub(crate) generation: Option<String>,
    /// QEMU's word for what it did with the bitmap.
    pub(crate) bitmap_action: String,
    pub(crate) transferred: Transferred,
    pub(crate) checksums: Checksums,
}

/// The file of checksums that belongs to a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Checksums {
    pub(crate) block_size_bytes: u64,
    pub(crate) file_size_bytes: u64,
    /// Hash of the file of checksums itself.
    pub(crate) blake3: String,
}

impl Disk {
    /// Name of the image in its archive.
    pub(crate) fn image_file(&self) -> String {
        image_file(&self.device)
    }

    /// The backing file name that the image's header must have.
    pub(crate) fn backing_name(&self) -> Option<String> {
        self.base.as_ref().map(|base| backing_name(base, &self.device))
    }
}

/// Name of a device's image in an archive.
pub(crate) fn image_file(device: &str) -> String {
    format!("{device}.qcow2")
}

/// Name of a device's checksums in an archive.
pub(crate) fn checksums_file(device: &str) -> String {
    format!("{device}.blake3")
}

/// The backing file name of an increment: relative, so that a storage may be moved as a whole.
pub(crate) fn backing_name(base: &str, device: &str) -> String {
    format!("../{base}/{}", image_file(device))
}

/// Checks a device name, which becomes part of file names.
pub(crate) fn check_device(device: &str) -> std::result::Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if device.is_empty() || device.len() > 64 || device.starts_with('.') {
        return Err(format!("Device name {device:?} is empty, too long or begins with a dot."));
    }
    if !device.chars().all(plain) {
        return Err(format!("Device name {device:?} has characters other than A-Za-z0-9_.-"));
    }
    Ok(())
}

/// Checks the name of an archive of this storage: a plain directory name.
pub(crate) fn check_name(name: &str) -> Result<()> {
    check_archive_name(name).map_err(invalid)?;
    if name.contains('/') || name.starts_with('.') {
        return Err(invalid(format!(
            "Archive name {name:?} does not belong to a directory storage: it has a '/' or begins \
             with a dot."
        )));
    }
    Ok(())
}

impl Manifest {
    /// A manifest without disks. Sequence and commit id are set at the commit.
    pub(crate) fn new(archive: String, guest: &provider_api::GuestInfo) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: match guest.kind {
                GuestKind::Qemu => VERSION,
                GuestKind::Lxc => VERSION_WITH_TREE,
            },
            archive,
            subtype: guest.kind,
            guest_id: guest.id,
            guest_name: guest.name.clone(),
            time_s: guest.start_time_s,
            sequence: 0,
            commit_id: Uuid::nil(),
            config: SmallFile::of(b""),
            firewall: None,
            disks: Vec::new(),
            tree: None,
            transferred: Transferred::default(),
            blake3: None,
        }
    }

    /// Adds the files of a container.
    pub(crate) fn set_tree(&mut self, tree: Tree) {
        self.version = tree.version();
        self.tree = Some(tree);
    }

    /// The content of the file, with its own hash.
    pub(crate) fn to_text(&self) -> Result<Vec<u8>> {
        let bare = Self { blake3: None, ..self.clone() };
        let hash = blake3::hash(&bare.format()?).to_hex().to_string();
        Self { blake3: Some(hash), ..bare }.format()
    }

    fn format(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self)
            .map_err(|e| Error::with_source(Kind::Other, "Cannot write a manifest.", e))
    }

    /// Whether the file it was parsed from is, byte by byte, what was once written. A field that is
    /// added to the format must raise `VERSION`: else older programs would find damage here.
    pub(crate) fn is_as_written(&self, text: &[u8]) -> Result<bool> {
        // Archives of early versions have no hash; all that can be said is that nothing is odd.
        let expected = if self.blake3.is_some() { self.to_text()? } else { self.format()? };
        Ok(expected == text)
    }

    /// Parses and checks the manifest of the archive called `name`.
    pub(crate) fn parse(name: &str, text: &[u8]) -> Result<Self> {
        let manifest: Self = serde_json::from_slice(text)
            .map_err(|e| corrupt(format!("Manifest of {name} cannot be read: {e}.")))?;
        manifest.check(name).map_err(|fault| corrupt(format!("Manifest of {name}: {fault}")))?;
        Ok(manifest)
    }

    fn check(&self, name: &str) -> std::result::Result<(), String> {
        let version = match self.subtype {
            GuestKind::Qemu => VERSION,
            GuestKind::Lxc => self.tree.as_ref().map_or(VERSION_WITH_TREE, Tree::version),
        };
        if self.format != FORMAT || self.version != version {
            return Err(format!(
                "format {:?} version {} is not known to this program.",
                self.format, self.version
            ));
        }
        if self.archive != name {
            return Err(format!("it belongs to an archive called {:?}.", self.archive));
        }
        let is_container = self.subtype == GuestKind::Lxc;
        if self.tree.is_some() != is_container || (is_container && !self.disks.is_empty()) {
            return Err(format!("it has what no archive of kind {} has.", self.subtype));
        }
        if self.disks.len() > DISKS_MAX {
            return Err(format!("it has {} disks.", self.disks.len()));
        }
        let mut seen = HashSet::new();
        for disk in &self.disks {
            disk.check(name)?;
            if !seen.insert(&disk.device) {
                return Err(format!("disk {} is listed twice.", disk.device));
            }
        }
        Ok(())
    }

    /// The disk with this name.
    pub(crate) fn disk(&self, device: &str) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.device == device)
    }

    /// Bytes the archive takes.
    pub(crate) fn size_bytes(&self) -> u64 {
        let disks = self
            .disks
            .iter()
            .map(|d| d.file_size_bytes.saturating_add(d.checksums.file_size_bytes));
        let small = std::iter::once(&self.config).chain(&self.firewall).map(|f| f.size_bytes);
        let tree = self.tree.iter().map(Tree::size_bytes);
        disks.chain(small).chain(tree).fold(0, u64::saturating_add)
    }

    /// The archive this one builds upon; with several, the first disk's.
    pub(crate) fn base(&self) -> Option<&String> {
        self.disks.iter().find_map(|disk| disk.base.as_ref())
    }
}

impl Disk {
    fn check(&self, archive: &str) -> std::result::Result<(), String> {
        check_device(&self.device)?;
        if self.size_bytes > DISK_BYTES_MAX {
            return Err(format!("disk {} has {} bytes.", self.device, self.size_bytes));
        }
        if self.checksums.block_size_bytes != BLOCK_BYTES {
            return Err(format!("disk {} has an unknown checksum block size.", self.device));
        }
        if let Some(base) = &self.base {
            check_name(base).map_err(|e| e.message)?;
            if base == archive {
                return Err(format!("disk {} builds upon itself.", self.device));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{check_device, check_name};

    #[test]
    fn names_that_would_leave_their_directory_are_refused() {
        for bad in ["", ".", "..", "../x", "a/b", ".tmp-x", "a b", "x\0", "ü"] {
            assert!(check_device(bad).is_err(), "{bad:?}");
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_device("scsi0").is_ok());
        assert!(check_name("vzdump-qemu-100-2026_01_02-03_04_05-2").is_ok());
    }
}
