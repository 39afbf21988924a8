// SPDX-License-Identifier: MIT OR Apache-2.0
//! The restore of a container's archive: the host reads the tar archive, or the files, where they are.

use std::path::{Path, PathBuf};

use provider_api::{
    BoxFuture, Call, Compression, ContainerData, ContainerRestore, GuestKind, Result,
};

use crate::call::{corrupt, invalid};
use crate::files;
use crate::limits::LOCK_WAIT;
use crate::manifest::{ContainerFormat, TREE_DIRECTORY};
use crate::storage::Storage;
use crate::usage::{Guest, GuestLock};

/// The restore of one archive.
#[derive(Debug)]
pub(crate) struct DirectoryContainerRestore {
    path: PathBuf,
    format: ContainerFormat,
    /// Keeps what is read where it is.
    _use: GuestLock,
}

impl DirectoryContainerRestore {
    /// Reads the manifest, and checks that the tree is what it says, as far as can be told at once. What is
    /// damaged within it is noticed while it is unpacked, by its own checksum.
    pub(crate) fn begin(storage: &Storage, archive: &str, call: &Call) -> Result<Self> {
        let manifest = storage.manifest(archive)?;
        if manifest.subtype != GuestKind::Lxc {
            return Err(invalid(format!("Archive {archive} is not that of a container.")));
        }
        let guest = Guest::new(storage, manifest.subtype, manifest.guest_id);
        let held = guest.begin_use_blocking(call, LOCK_WAIT)?;
        // Again: before the lock it may have been removed.
        let manifest = storage.manifest(archive)?;
        let tree =
            manifest.tree.ok_or_else(|| corrupt(format!("Archive {archive} has no file tree.")))?;
        let directory = storage.archive_path(archive);
        let file = directory.join(tree.file());
        let length = files::open_regular(&file)?.metadata().map(|data| data.len()).unwrap_or(0);
        if length != tree.file_size_bytes {
            return Err(corrupt(format!(
                "{} of archive {archive} has {length} bytes, its manifest says {}.",
                tree.file(),
                tree.file_size_bytes
            )));
        }
        let path = match tree.format {
            ContainerFormat::Tar => file,
            ContainerFormat::Tree => directory.join(TREE_DIRECTORY),
        };
        if tree.format == ContainerFormat::Tree && !files::is_directory(&path) {
            return Err(corrupt(format!("The files of archive {archive} are no directory.")));
        }
        Ok(Self { path, format: tree.format, _use: held })
    }
}

impl ContainerRestore for DirectoryContainerRestore {
    fn data<'a>(
        &'a mut self,
        _private_dir: &'a Path,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<ContainerData>> {
        let path = self.path.clone();
        let data = match self.format {
            ContainerFormat::Tar => ContainerData::Tar { path, compression: Compression::Zst },
            ContainerFormat::Tree => ContainerData::Directory(path),
        };
        Box::pin(std::future::ready(Ok(data)))
    }

    fn cleanup<'a>(self: Box<Self>, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        Box::pin(std::future::ready(Ok(())))
    }
}
