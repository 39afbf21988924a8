// SPDX-License-Identifier: MIT OR Apache-2.0
//! The restore of one VM: init and cleanup always in pairs.

use std::path::{Path, PathBuf};

use crate::{BoxFuture, Call, Result};

/// A disk in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreDevice {
    /// Device name, `scsi0` or the like.
    pub device: String,
    /// Size in bytes; what the source gives must match exactly.
    pub size_bytes: u64,
}

/// Where the host reads a disk's content from; always raw.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum VolumeSource {
    /// A regular file or block device, opened by the host.
    Path(PathBuf),
    /// An NBD export on a Unix socket inside the private directory.
    NbdUnix {
        /// Path of the socket.
        socket: PathBuf,
        /// Name of the export.
        export: String,
    },
}

/// The restore of one VM archive.
pub trait VmRestore: Send {
    /// The disks in the archive. Everything is untrusted input to the host.
    fn devices(&self) -> &[RestoreDevice];

    /// Offers one disk's content. `private_dir` exists, belongs to this restore alone, and is
    /// where a socket may be made. Followed by [`VmRestore::volume_cleanup`] on every path.
    fn volume_init<'a>(
        &'a mut self,
        device: &'a str,
        private_dir: &'a Path,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<VolumeSource>>;

    /// Withdraws what `volume_init` offered, also after it failed.
    fn volume_cleanup<'a>(
        &'a mut self,
        device: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<()>>;

    /// Ends the restore, after success and after failure.
    fn cleanup<'a>(self: Box<Self>, call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a;
}
