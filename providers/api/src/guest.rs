// SPDX-License-Identifier: MIT OR Apache-2.0
//! One job and the backup of one guest within it.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    BoxFuture, Call, ContainerBackup, ContainerTransferred, DirtyRegions, Error, Kind, Result,
};

/// Kind of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestKind {
    /// A virtual machine.
    Qemu,
    /// A container.
    Lxc,
}

impl std::fmt::Display for GuestKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Qemu => "qemu",
            Self::Lxc => "lxc",
        })
    }
}

/// A job, when it begins.
#[derive(Debug, Clone)]
pub struct JobInfo {
    /// Start of the job, seconds since the epoch.
    pub start_time_s: i64,
}

/// A guest, when its backup begins.
#[derive(Debug, Clone)]
pub struct GuestInfo {
    /// Kind of the guest.
    pub kind: GuestKind,
    /// Number of the guest.
    pub id: u32,
    /// Its name, if it has one; untrusted text.
    pub name: Option<String>,
    /// Start of this guest's backup, seconds since the epoch.
    pub start_time_s: i64,
}

/// One running job.
pub trait Job: Send {
    /// Begins the backup of one guest. Guests of one job may be backed up at the same time. The
    /// archive's name is chosen here.
    fn start_guest<'a>(
        &'a mut self,
        guest: GuestInfo,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn GuestBackup>>>;

    /// Ends the job after its last guest; an error is only logged.
    fn finish<'a>(self: Box<Self>, call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a;
}

/// A disk, before access to it is set up.
#[derive(Debug, Clone)]
pub struct VolumeInfo {
    /// Device name, `scsi0` or the like.
    pub device: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// The disk's volume id on the host, such as `local:100/vm-100-disk-0.qcow2`; none if it is not in a
    /// storage. For people and logs: it may change without the disk being another one.
    pub volume_id: Option<String>,
}

/// What of a disk can be read when a bitmap says what changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Readable {
    /// What changed. The guest pays for nothing else.
    #[default]
    Dirty,
    /// All of it, so that the provider may still make a full backup, or compare. Costs the guest as
    /// much as a full backup.
    All,
}

/// Which dirty bitmap the provider wants for a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BitmapRequest {
    /// None: a full backup after which no increment is wanted. An existing bitmap is removed.
    None,
    /// Start a new one: a full backup that an increment may follow.
    New,
    /// Use the one that covers all changes since this generation; full if there is none.
    Use {
        /// Generation of the provider's last committed backup of the disk.
        generation: String,
        /// What must be readable.
        readable: Readable,
    },
}

/// What the provider finds when it backs up a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BitmapMode {
    /// No bitmap: all of the disk must be copied, no increment can follow.
    None,
    /// A new bitmap was started: all of the disk must be copied, an increment can follow.
    New,
    /// Only the areas the bitmap marks have changed since the requested generation.
    Reuse,
}

/// How the provider reads a disk.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Access {
    /// An NBD export on a Unix socket. Reads give the point in time, trims release what was
    /// stored; a read of a released area, or of one outside the bitmap, fails with `EPERM`.
    Nbd {
        /// Path of the socket.
        socket: PathBuf,
        /// Name of the export.
        export: String,
        /// Name of the dirty bitmap for the metadata context `qemu:dirty-bitmap:<name>`; present
        /// unless the mode is `None`.
        bitmap: Option<String>,
    },
    /// A file that reads as the point in time, of exactly the disk's size. A hole punched into it
    /// (`fallocate(FALLOC_FL_PUNCH_HOLE)`) releases what was stored; a read of a released area, or of one
    /// that `regions` does not name, fails. Open it with `O_DIRECT` (offsets, lengths and memory aligned
    /// to 4096 bytes), because the kernel's read-ahead would meet such areas. It is no regular file of a
    /// disk: it vanishes when the backup ends.
    File {
        /// Path of the file.
        path: PathBuf,
        /// What must be read: what changed, or the whole disk.
        regions: Arc<dyn DirtyRegions>,
    },
}

/// One disk of a VM under backup.
#[derive(Debug, Clone)]
pub struct Volume {
    /// Device name, `scsi0` or the like.
    pub device: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// How to read it.
    pub access: Access,
    /// What the bitmap means.
    pub bitmap_mode: BitmapMode,
    /// QEMU's own word for what it did with the bitmap, for logs.
    pub bitmap_action: String,
    /// Generation of this backup once it is committed: store it, and ask for it next time.
    pub generation: Option<String>,
    /// Bytes the bitmap marks; the provider must find exactly that many. It marks areas of a power of two
    /// from 4 KiB to 4 MiB, by default 64 KiB: perhaps less than a block of the provider's.
    pub dirty_bytes: Option<u64>,
}

/// All that belongs to the backup of one VM.
#[derive(Debug, Clone)]
pub struct VmBackup {
    /// The VM's configuration.
    pub config: Vec<u8>,
    /// Its firewall configuration, if there is one.
    pub firewall: Option<Vec<u8>>,
    /// Its disks, all from one point in time.
    pub volumes: Vec<Volume>,
}

/// Where a provider reports progress.
pub trait Progress: Send + Sync {
    /// Bytes of the disk read so far, of those to be read, and bytes found to be zero. May be
    /// called often and from any task; must be cheap.
    fn report(&self, device: &str, done_bytes: u64, total_bytes: u64, zero_bytes: u64);
    /// A line for the guest's task log.
    fn log(&self, line: &str);
}

/// What one guest's backup moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transferred {
    /// Bytes that had to be looked at: the disks' sizes, or what the bitmaps mark. The host refuses a
    /// backup that looked at less.
    pub total_bytes: u64,
    /// Bytes read from the disks; not what was known to be zero without that.
    pub read_bytes: u64,
    /// Bytes among `total_bytes` that were zero or holes.
    pub zero_bytes: u64,
    /// Bytes written to the storage, after compression, and without what was there already.
    pub written_bytes: u64,
}

/// A durable backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Name of the archive.
    pub archive: String,
    /// Bytes it takes in the storage, as [`crate::Archive::size_bytes`].
    pub size_bytes: u64,
}

/// The backup of one guest. Consumed by exactly one of `commit` or `abort`.
pub trait GuestBackup: Send {
    /// Name of the archive to be; see [`crate::check_archive_name`].
    fn archive_name(&self) -> &str;

    /// Says for each disk which bitmap to use, in the same order. Called once, before the point
    /// in time. An error fails this guest's backup.
    fn plan_volumes<'a>(
        &'a mut self,
        volumes: &'a [VolumeInfo],
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Vec<BitmapRequest>>>;

    /// Copies the disks. Called once, after the point in time; the guest runs on meanwhile. An
    /// error fails this guest's backup and is followed by `abort`.
    fn backup_vm<'a>(
        &'a mut self,
        backup: VmBackup,
        progress: &'a dyn Progress,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Transferred>>;

    /// Copies a container's file tree. Called once, after the point in time, instead of
    /// [`GuestBackup::plan_volumes`] and [`GuestBackup::backup_vm`]. An error fails this guest's backup and
    /// is followed by `abort`; so does an archive without entries from a tree that has some.
    ///
    /// Only called with [`crate::Capabilities::container`].
    fn backup_container<'a>(
        &'a mut self,
        backup: ContainerBackup,
        progress: &'a dyn Progress,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<ContainerTransferred>> {
        let _ = (backup, progress, call);
        let error = Error::new(Kind::Invalid, "This provider backs up no containers.");
        Box::pin(std::future::ready(Err(error)))
    }

    /// Makes the backup durable under the host's id, and only then returns. The next
    /// [`crate::Provider::commit_outcome`] of that id, from any process, must agree. No `abort` follows, also
    /// not after an error: what a failed commit stored is removed by the commit itself, or by the next
    /// [`crate::Provider::activate`].
    fn commit<'a>(self: Box<Self>, id: Uuid, call: &'a Call) -> BoxFuture<'a, Result<Committed>>
    where
        Self: 'a;

    /// Gives the backup up and removes what it stored; errors are only logged.
    fn abort<'a>(self: Box<Self>, why: &'a str, call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a;
}
