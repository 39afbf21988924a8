// SPDX-License-Identifier: MIT OR Apache-2.0
//! The provider contract: what a backup product implements, and what it may rely on.
//!
//! ```text
//! Provider ── start_job ──► Job ── start_guest ──► GuestBackup
//!                                                    │ plan_volumes   which bitmaps, which generation
//!                                                    │ backup_vm      read the frozen disks
//!                                                    ├─ commit(id)    durable before it returns
//!                                                    └─ abort(why)
//! ```
//!
//! The host makes the commit id and journals it before it calls [`GuestBackup::commit`]. When
//! that call fails, times out or the host dies, the outcome is unknown until
//! [`Provider::commit_outcome`] tells it. QEMU forgets the changes a backup covers only after the
//! outcome is `Committed`.
//!
//! All calls are object-safe and cancellable: a [`Call`] carries a token and a deadline. Futures
//! may be dropped at any await point; what a call has begun must then be undone by `abort`, or by
//! the provider itself the next time it is activated.

#![forbid(unsafe_code)]

mod error;
mod guest;
mod restore;

pub use error::{Error, Kind, Result};
pub use guest::{
    Access, BitmapMode, BitmapRequest, Committed, GuestBackup, GuestInfo, GuestKind, Job, JobInfo,
    Progress, Transferred, VmBackup, Volume, VolumeInfo,
};
pub use restore::{RestoreDevice, VmRestore, VolumeSource};

use std::future::Future;
use std::pin::Pin;
use std::time::Instant;

use serde::{Deserialize, Serialize};
pub use tokio_util::sync::CancellationToken;
pub use uuid::Uuid;

/// Version of this contract. A provider states the version it was written for.
pub const API_VERSION: u32 = 1;
/// How many versions back a host still accepts: `API_VERSION - API_AGE ..= API_VERSION`.
pub const API_AGE: u32 = 0;

/// A future that a trait object can return.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Limits of one call.
#[derive(Debug, Clone, Default)]
pub struct Call {
    /// Cancelled when the job is aborted: stop soon and return [`Kind::Cancelled`].
    pub cancel: CancellationToken,
    /// When the caller stops waiting; none means the call may take as long as it makes progress.
    pub deadline: Option<Instant>,
}

/// What a provider is and can do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Description {
    /// Name of the product, for log lines.
    pub name: String,
    /// The contract version it was written for, see [`API_VERSION`].
    pub api_version: u32,
    /// What it can do.
    pub capabilities: Capabilities,
}

/// Optional abilities of a provider.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Capabilities {
    /// Backs up virtual machines over NBD.
    pub vm_nbd: bool,
    /// Restores virtual machines.
    pub vm_restore: bool,
    /// Makes incremental backups of virtual machines from dirty bitmaps.
    pub vm_incremental: bool,
}

/// Space of the storage behind a provider.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Status {
    /// Size of the storage in bytes.
    pub total_bytes: u64,
    /// Used part of it in bytes.
    pub used_bytes: u64,
}

/// One archive, as [`Provider::list`] reports it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Archive {
    /// Name within the storage; the volume id is `<storage>:backup/<name>`.
    pub name: String,
    /// Kind of the guest; authoritative, whatever the name looks like.
    pub subtype: GuestKind,
    /// Number of the guest.
    pub guest_id: u32,
    /// Start of the backup, seconds since the epoch.
    pub time_s: i64,
    /// Bytes this archive takes in the storage (without the archives it builds upon).
    pub size_bytes: u64,
    /// Name of the archive it builds upon, if it is incremental.
    pub base: Option<String>,
    /// The commit id it was committed with.
    pub commit_id: Option<Uuid>,
}

/// What became of a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum CommitOutcome {
    /// It is durable.
    Committed {
        /// Name of the archive.
        archive: String,
    },
    /// It did not happen and never will.
    NotCommitted,
    /// It may still happen; ask again.
    Pending,
}

/// Configuration files kept in an archive, as they were when the backup was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestConfig {
    /// The guest's configuration.
    pub config: Vec<u8>,
    /// Its firewall configuration, if it had one.
    pub firewall: Option<Vec<u8>>,
}

/// A backup product.
///
/// One value serves all jobs of one storage for the life of the process; calls may come from
/// several tasks at once.
pub trait Provider: Send + Sync {
    /// Says what this provider is. Called often; must not block or do I/O.
    fn describe(&self) -> Description;

    /// Makes the storage ready. Called once per job before anything else; must be idempotent.
    /// An error fails the job before any guest is touched.
    fn activate<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<()>>;

    /// Space of the storage. Polled; must answer within a second.
    fn status<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Status>>;

    /// All committed archives, in no particular order. Unfinished ones are never listed.
    fn list<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Vec<Archive>>>;

    /// The configuration files in an archive.
    fn guest_config<'a>(
        &'a self,
        archive: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<GuestConfig>>;

    /// What became of the commit with this id. Asked after an error, a time-out or a crash, from
    /// any later process; must not depend on memory of the one that committed. An id that was
    /// never seen is [`CommitOutcome::NotCommitted`], and then stays so.
    fn commit_outcome<'a>(
        &'a self,
        id: Uuid,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<CommitOutcome>>;

    /// Begins a job. [`Job::finish`] is called exactly once on every path unless the host dies.
    fn start_job<'a>(&'a self, job: JobInfo, call: &'a Call)
    -> BoxFuture<'a, Result<Box<dyn Job>>>;

    /// Begins the restore of a VM archive. [`VmRestore::cleanup`] is called exactly once on every
    /// path unless the host dies.
    fn restore_vm_init<'a>(
        &'a self,
        archive: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn VmRestore>>>;
}

/// Checks an archive name as a provider chose it: `[A-Za-z0-9.+=_/:-]{1,200}`, no empty, `.` or
/// `..` part.
///
/// # Errors
/// A sentence that names the fault.
pub fn check_archive_name(name: &str) -> std::result::Result<(), String> {
    if name.is_empty() || name.len() > 200 {
        return Err(format!("Archive name has {} bytes; 1 to 200 are allowed.", name.len()));
    }
    if let Some(bad) = name.chars().find(|c| !(c.is_ascii_alphanumeric() || ".+=_/:-".contains(*c)))
    {
        return Err(format!(
            "Archive name {name:?} has the character {bad:?}, which is not allowed."
        ));
    }
    if name.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(format!("Archive name {name:?} has an empty, '.' or '..' part."));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check_archive_name;

    #[test]
    fn archive_names_are_checked() {
        assert!(check_archive_name("vzdump-qemu-100-2026_01_02-03_04_05").is_ok());
        assert!(check_archive_name("a/b:c+d=e.f").is_ok());
        for bad in ["", "a//b", "../x", "a/.", "a b", "ä", "/a", "a/"] {
            assert!(check_archive_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_archive_name(&"x".repeat(201)).is_err());
    }
}
