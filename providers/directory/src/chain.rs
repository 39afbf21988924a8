// SPDX-License-Identifier: MIT OR Apache-2.0
//! The chain of images that makes up one disk of an archive, and the check of it.
//!
//! A qcow2 image can name any file of the host as its backing or data file, and the reader would
//! open it. So nothing is opened before every image of the chain was found to be what its manifest
//! says: regular file, size, virtual size, backing name, no encryption, no external data.

use std::fs::File;
use std::path::{Path, PathBuf};

use provider_api::{Error, Kind, Result};

use crate::call::corrupt;
use crate::files;
use crate::header::Header;
use crate::limits::CHAIN_ARCHIVES_MAX;
use crate::manifest::{Disk, Manifest, check_device};
use crate::storage::Storage;

/// One image of a chain.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) archive: String,
    pub(crate) path: PathBuf,
}

/// A checked chain: the archive's own image first, the full one last.
#[derive(Debug, Clone)]
pub(crate) struct Chain {
    links: Vec<Link>,
    size_bytes: u64,
}

impl Chain {
    /// Finds and checks the chain of a disk of a committed archive.
    pub(crate) fn load(storage: &Storage, top: &Manifest, device: &str) -> Result<Self> {
        check_device(device).map_err(crate::call::invalid)?;
        let mut manifest = top.clone();
        let mut links = Vec::new();
        let mut size_bytes = None;
        loop {
            let disk = manifest.disk(device).ok_or_else(|| {
                corrupt(format!("Archive {} has no disk {device}.", manifest.archive))
            })?;
            let expected = *size_bytes.get_or_insert(disk.size_bytes);
            if disk.size_bytes != expected {
                return Err(corrupt(format!(
                    "Disk {device} has {} bytes in archive {}, but {expected} in {}, which builds \
                     upon it.",
                    disk.size_bytes, manifest.archive, top.archive
                )));
            }
            if links.len() == CHAIN_ARCHIVES_MAX {
                return Err(corrupt(format!(
                    "Disk {device} of archive {} builds upon more than {CHAIN_ARCHIVES_MAX} \
                     archives.",
                    top.archive
                )));
            }
            let path = storage.archive_path(&manifest.archive).join(disk.image_file());
            check_image(&path, disk)?;
            links.push(Link { archive: manifest.archive.clone(), path });
            let Some(base) = disk.base.clone() else { break };
            manifest = load_base(storage, &manifest, &base)?;
        }
        Ok(Self { links, size_bytes: size_bytes.unwrap_or(0) })
    }

    /// The images, topmost first.
    pub(crate) fn links(&self) -> &[Link] {
        &self.links
    }

    /// What lies below the topmost image; none below a full one.
    pub(crate) fn below(&self) -> Option<Self> {
        let links = self.links.get(1..)?.to_vec();
        (!links.is_empty()).then_some(Self { links, size_bytes: self.size_bytes })
    }

    /// Name of the archive whose image is on top.
    pub(crate) fn top_archive(&self) -> &str {
        self.links.first().map_or("", |link| &link.archive)
    }

    /// Size of the disk.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
}

fn load_base(storage: &Storage, above: &Manifest, base: &str) -> Result<Manifest> {
    let manifest = storage.manifest(base).map_err(|e| {
        let kind = if e.kind == Kind::NotFound { Kind::Corrupt } else { e.kind };
        let text =
            format!("Archive {} builds upon {base}, which cannot be used: {e}", above.archive);
        Error { kind, message: text, ..e }
    })?;
    // The order also rules out circles.
    if manifest.guest_id != above.guest_id
        || manifest.subtype != above.subtype
        || manifest.sequence >= above.sequence
    {
        return Err(corrupt(format!(
            "Archive {} builds upon {base}, which is not an earlier backup of the same guest.",
            above.archive
        )));
    }
    Ok(manifest)
}

fn check_image(path: &Path, disk: &Disk) -> Result<()> {
    let failed = |e| Error::io(format!("Cannot read image {}.", path.display()), e);
    let mut file: File = files::open_regular(path)?;
    let length = file.metadata().map_err(failed)?.len();
    let fault = if length == disk.file_size_bytes {
        Header::read(&mut file)
            .map_err(failed)?
            .and_then(|h| h.check(disk.size_bytes, length, disk.backing_name().as_deref()))
            .err()
    } else {
        Some(format!("the file has {length} bytes, its manifest says {}", disk.file_size_bytes))
    };
    match fault {
        None => Ok(()),
        Some(fault) => Err(corrupt(format!("Image {} is refused: {fault}.", path.display()))),
    }
}
