// SPDX-License-Identifier: MIT OR Apache-2.0
//! The restore of a container's archive: the host reads the tar archive, or the files, where they are.

use std::path::{Path, PathBuf};

use provider_api::{
    BoxFuture, Call, Compression, ContainerData, ContainerRestore, Error, GuestKind, Result,
};

use crate::call::{check, corrupt, invalid};
use crate::deep;
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
        if tree.format == ContainerFormat::Tree {
            check_files(archive, &path, tree.entries, call)?;
        }
        Ok(Self { path, format: tree.format, _use: held })
    }
}

/// Finds out whether files are missing or too many, which no later reader can notice. What is in them is
/// verified on demand: to read all of them takes longer than the host waits.
fn check_files(archive: &str, path: &Path, expected: u64, call: &Call) -> Result<()> {
    if !files::is_directory(path) {
        return Err(corrupt(format!("The files of archive {archive} are no directory.")));
    }
    let found =
        deep::count(path, || check(call, "Counting an archive's files").map_err(Stop::Call));
    let found = found.map_err(|stop| match stop {
        Stop::Call(error) => error,
        Stop::Io(error) => {
            Error::io(format!("The files of archive {archive} cannot be read."), error)
        }
    })?;
    if found == expected {
        return Ok(());
    }
    Err(corrupt(format!(
        "Archive {archive} has {found} files and directories, its manifest says {expected}. A verification \
         names them."
    )))
}

/// Why a count has not come to its end.
enum Stop {
    Call(Error),
    Io(std::io::Error),
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
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
