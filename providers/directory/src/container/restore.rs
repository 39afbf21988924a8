// SPDX-License-Identifier: MIT OR Apache-2.0
//! The restore of a container's archive: the host reads the tar archive where it is.

use std::path::{Path, PathBuf};

use provider_api::{
    BoxFuture, Call, Compression, ContainerData, ContainerRestore, GuestKind, Result,
};

use crate::call::{corrupt, invalid};
use crate::files;
use crate::limits::LOCK_WAIT;
use crate::manifest::TREE_FILE;
use crate::storage::Storage;
use crate::usage::{Guest, GuestLock};

/// The restore of one archive.
#[derive(Debug)]
pub(crate) struct DirectoryContainerRestore {
    path: PathBuf,
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
        let path = storage.archive_path(archive).join(TREE_FILE);
        let length = files::open_regular(&path)?.metadata().map(|data| data.len()).unwrap_or(0);
        if length != tree.file_size_bytes {
            return Err(corrupt(format!(
                "The file tree of archive {archive} has {length} bytes, its manifest says {}.",
                tree.file_size_bytes
            )));
        }
        Ok(Self { path, _use: held })
    }
}

impl ContainerRestore for DirectoryContainerRestore {
    fn data<'a>(
        &'a mut self,
        _private_dir: &'a Path,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<ContainerData>> {
        let data = ContainerData::Tar { path: self.path.clone(), compression: Compression::Zst };
        Box::pin(std::future::ready(Ok(data)))
    }

    fn cleanup<'a>(self: Box<Self>, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        Box::pin(std::future::ready(Ok(())))
    }
}
