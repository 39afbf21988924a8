// SPDX-License-Identifier: MIT OR Apache-2.0
//! The provider contract: what a backup product implements, and what it may rely on.
//!
//! ```text
//! Provider ── start_job ──► Job ── start_guest ──► GuestBackup
//!                                                    │ plan_volumes   which bitmaps, which generation
//!                                                    │ backup_vm      read the frozen disks, or
//!                                                    │ backup_container   the frozen file tree
//!                                                    ├─ commit(id)    durable before it returns
//!                                                    └─ abort(why)
//! ```
//!
//! The host makes the commit id and journals it before it calls [`GuestBackup::commit`]. When
//! that call fails, times out or the host dies, the outcome is unknown until
//! [`Provider::commit_outcome`] tells it. QEMU forgets the changes a backup covers only after the
//! outcome is `Committed`.
//!
//! The storage side, [`Provider::list`] to [`Provider::remove`], needs no job. Which archives are
//! removed is decided by the host alone; a provider only removes what it is told to.
//!
//! All calls are object-safe and cancellable: a [`Call`] carries a token and a deadline. Futures
//! may be dropped at any await point; what a call has begun must then be undone by `abort`, or by
//! the provider itself the next time it is activated.

#![forbid(unsafe_code)]

mod container;
mod error;
mod excludes;
mod guest;
mod mount;
mod regions;
mod restore;
mod selection;
mod verify;

pub use container::{
    CommandEnd, Compression, ContainerBackup, ContainerCommand, ContainerData, ContainerMount,
    ContainerRestore, ContainerRunner, ContainerTransferred, IGNORED_MAX, IdMapRange, Identity,
    IgnoredEntry, STDERR_TAIL_BYTES, StderrCopy,
};
pub use error::{Error, Kind, Result};
pub use excludes::{Excludes, Reached};
pub use guest::{
    Access, BitmapMode, BitmapRequest, Committed, GuestBackup, GuestInfo, GuestKind, Job, JobInfo,
    Progress, Readable, Transferred, VmBackup, Volume, VolumeInfo,
};
pub use mount::is_mount_point;
pub use regions::{DirtyRegions, NextRegions, Region, RegionPage, RegionReader};
pub use restore::{RestoreDevice, VmRestore, VolumeSource};
pub use selection::Selection;
pub use verify::{
    DAMAGE_MAX, Damage, DamagedArea, Verified, VerifyExtent, VerifyOptions, VerifyReport,
};

use std::future::Future;
use std::pin::Pin;
use std::time::Instant;

use serde::{Deserialize, Serialize};
pub use tokio_util::sync::CancellationToken;
pub use uuid::Uuid;

/// Version of this contract. A provider states the version it was written for.
///
/// A change that a provider of the version before need not know (a new method with a default, a new
/// capability, a new field that may be missing) raises it together with [`API_AGE`]; any other change
/// raises it and sets [`API_AGE`] to 0. What a host does not know of a newer provider it leaves
/// unused; what a provider does not know it never sees, because the capability for it is missing.
///
/// | version | age | what came |
/// |---|---|---|
/// | 1 | 0 | virtual machines over NBD, notes, protection, removal, verification |
/// | 2 | 1 | [`Access::File`], containers, [`Provider::properties`], logs, slow commits, late fulls |
pub const API_VERSION: u32 = 2;
/// How many versions back a host still accepts: `API_VERSION - API_AGE ..= API_VERSION`.
pub const API_AGE: u32 = 1;

/// Whether a host with this contract works with a provider written for `version`; see
/// [`API_VERSION`].
///
/// # Errors
/// A sentence that names both versions.
pub fn check_api_version(version: u32) -> std::result::Result<(), String> {
    let oldest = API_VERSION - API_AGE;
    if (oldest..=API_VERSION).contains(&version) {
        return Ok(());
    }
    Err(format!(
        "The provider was written for version {version} of the contract; this program knows \
         {oldest} to {API_VERSION}."
    ))
}

/// Longest log of a guest's backup that is kept with its archive, in bytes.
pub const LOG_BYTES_MAX: usize = 1 << 20;
/// Longest notes of an archive, in bytes.
pub const NOTES_BYTES_MAX: usize = 64 << 10;
/// What [`Archive::notes`] shows of their first line at most, in bytes.
pub const NOTES_LINE_BYTES_MAX: usize = 512;

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

/// Optional abilities of a provider; what it does not mention it cannot do.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// Backs up virtual machines over NBD.
    pub vm_nbd: bool,
    /// Restores virtual machines.
    pub vm_restore: bool,
    /// Makes incremental backups of virtual machines from dirty bitmaps.
    pub vm_incremental: bool,
    /// Keeps notes: [`Provider::notes`], [`Provider::set_notes`].
    pub notes: bool,
    /// Protects archives: [`Provider::set_protected`].
    pub protect: bool,
    /// Removes archives: [`Provider::remove`].
    pub remove: bool,
    /// Verifies archives: [`Provider::verify`].
    pub verify: bool,
    /// Backs up virtual machines from files: [`Access::File`]. With [`Capabilities::vm_nbd`], too, the
    /// host chooses NBD.
    pub vm_file: bool,
    /// Commits so slowly (uploads, tapes) that the guest must not pay for it meanwhile: when
    /// [`GuestBackup::backup_vm`] has returned, the host withdraws the disks and drops the old data
    /// that QEMU kept for them, before it calls [`GuestBackup::commit`]. Which changes count for
    /// the next increment is still decided by the commit.
    pub slow_commit: bool,
    /// Any part of a disk that is restored can be read at any time, in any order and again
    /// ([`VolumeSource`] as NBD): a guest may be started before it is restored.
    pub random_read: bool,
    /// Backs up containers: [`GuestBackup::backup_container`].
    pub container: bool,
    /// Restores containers: [`Provider::restore_container_init`].
    pub container_restore: bool,
    /// Keeps the log of a guest's backup with its archive: [`Provider::keep_log`], [`Provider::log`].
    pub log: bool,
}

/// Type of a property's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PropertyKind {
    /// Any text on one line.
    Text,
    /// An absolute path.
    Path,
    /// A whole number that is not negative.
    Number,
    /// `0` or `1`.
    Flag,
}

/// One property that a storage of this provider may have in `storage.cfg`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Property {
    /// Its name, `[a-z][a-z0-9-]{0,31}`.
    pub name: String,
    /// Type of its value.
    pub kind: PropertyKind,
    /// Whether a storage without it is refused.
    #[serde(default)]
    pub required: bool,
    /// Whether it is a secret: it is kept apart from `storage.cfg`, readable by root only, and never
    /// shown or logged.
    #[serde(default)]
    pub sensitive: bool,
    /// One sentence for people.
    #[serde(default)]
    pub description: String,
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
    /// Start of the backup, [`GuestInfo::start_time_s`], seconds since the epoch.
    pub time_s: i64,
    /// Bytes this archive takes in the storage, without the archives it builds upon and what it shares
    /// with others, as well as that can be told.
    pub size_bytes: u64,
    /// Name of the archive it builds upon, if it is incremental.
    pub base: Option<String>,
    /// The commit id it was committed with.
    pub commit_id: Option<Uuid>,
    /// Whether [`Provider::remove`] refuses to remove it.
    #[serde(default)]
    pub protected: bool,
    /// The first line of its notes, see [`notes_line`]; none without notes. A list may be long, so
    /// the rest is only in [`Provider::notes`].
    #[serde(default)]
    pub notes: Option<String>,
    /// The last verification that came to its end; none if there was none, or if the archive was
    /// written anew since.
    #[serde(default)]
    pub verified: Option<Verified>,
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

    /// The properties that its storages have in `storage.cfg`, besides those that every storage has
    /// (`content`, `disable`, `nodes`, `prune-backups`, `max-protected-backups`). Called often; must not
    /// block or do I/O.
    fn properties(&self) -> Vec<Property> {
        Vec::new()
    }

    /// Makes the storage ready, and removes what dead jobs and removals left in it. Called once per job,
    /// restore, prune, removal or verification before anything else, also while others are under way; must be
    /// idempotent. An error fails that task before any guest or archive is touched. May take minutes.
    fn activate<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<()>>;

    /// Space of the storage. Polled; must answer within a second.
    fn status<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Status>>;

    /// All committed archives, in no particular order. Unfinished ones are never listed, an archive
    /// that is being removed is until it is gone. Called often, at any time, also while jobs and
    /// removals run, and always before a prune decides. An error means that nothing is known: the host
    /// then removes nothing.
    fn list<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Vec<Archive>>>;

    /// All notes of an archive; empty without any. At any time, also while the archive is being
    /// read or built upon. [`Kind::NotFound`] without such an archive.
    ///
    /// Only called with [`Capabilities::notes`].
    fn notes<'a>(&'a self, archive: &'a str, call: &'a Call) -> BoxFuture<'a, Result<String>> {
        let _ = call;
        unsupported(archive, "has no notes")
    }

    /// Replaces the notes of an archive, in one step that a crash cannot split; empty ones are
    /// removed. Called after the commit when a job was asked for notes, and whenever somebody
    /// changes them, also while the archive is protected, read or built upon. The host has checked
    /// them by [`check_notes`]. After an error the notes are the old ones or the new ones.
    ///
    /// Only called with [`Capabilities::notes`].
    fn set_notes<'a>(
        &'a self,
        archive: &'a str,
        notes: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        let _ = (notes, call);
        unsupported(archive, "cannot have notes")
    }

    /// Protects an archive from [`Provider::remove`], or no longer; durable when it returns. Called
    /// after the commit when a job was asked for it, and whenever somebody changes it. Asking for
    /// what is so already is no error. How many archives may be protected is the host's to count.
    ///
    /// Only called with [`Capabilities::protect`].
    fn set_protected<'a>(
        &'a self,
        archive: &'a str,
        protected: bool,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        let _ = (protected, call);
        unsupported(archive, "cannot be protected")
    }

    /// Keeps the log of the backup that made an archive, and replaces an earlier one. Called once after
    /// the commit, with at most [`LOG_BYTES_MAX`] bytes of UTF-8 text; an error is only a warning. The
    /// log goes when the archive is removed.
    ///
    /// Only called with [`Capabilities::log`].
    fn keep_log<'a>(
        &'a self,
        archive: &'a str,
        log: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        let _ = (log, call);
        unsupported(archive, "cannot have a log")
    }

    /// The log that [`Provider::keep_log`] keeps for an archive; empty without one. At any time, as with
    /// notes. [`Kind::NotFound`] without such an archive.
    ///
    /// Only called with [`Capabilities::log`].
    fn log<'a>(&'a self, archive: &'a str, call: &'a Call) -> BoxFuture<'a, Result<String>> {
        let _ = call;
        unsupported(archive, "has no log")
    }

    /// Removes one archive, with its notes and log, and gives its space back. Other archives give the same
    /// bytes before, during and after it, whatever fails or crashes meanwhile: if others need this one
    /// (increments), what they need is kept for them (the provider merges it into them), or nothing
    /// is changed and the error is [`Kind::HasDependents`].
    ///
    /// Called when somebody removes an archive, and by the host's pruning: one call at a time for one
    /// guest, those archives first that were made last, so that a chain is merged from its small end.
    /// May take as long as copying the archive; the host's deadline is hours. When it is cancelled,
    /// runs into its deadline or fails, the archive is still there, or it is gone: never anything
    /// between. What a crash leaves is cleaned up by the next [`Provider::activate`].
    ///
    /// Refused with [`Kind::Protected`] for a protected archive (the host asks first, but somebody
    /// else may be faster), [`Kind::InUse`] while it is restored, verified or built upon, [`Kind::NotFound`]
    /// for one that is not there. The next backup of the guest must not be an increment on what is
    /// gone: a provider asks for the generation of an archive that it has, else for a new bitmap.
    ///
    /// Only called with [`Capabilities::remove`].
    fn remove<'a>(&'a self, archive: &'a str, call: &'a Call) -> BoxFuture<'a, Result<()>> {
        let _ = call;
        unsupported(archive, "cannot be removed by this provider")
    }

    /// Reads an archive again, and whatever it builds upon, and compares it with what was stored when it
    /// was made. Damage is no error: it is in the report, with the archive and the disk it was found in.
    /// It counts also where a later archive of the chain hides it. Missing and foreign files are damage
    /// too. The end of it is remembered durably with the archive, see [`Archive::verified`].
    ///
    /// Called when somebody asks for it, one archive of a storage after the other, those first that
    /// others build upon; backups and restores may run meanwhile. Progress is reported in bytes of each
    /// disk, which may be more than the disk has. Has no deadline: the host cancels it when nothing is
    /// reported for long. Memory must not grow with the archive.
    ///
    /// An error means that it came to no end and nothing is known: [`Kind::NotFound`] for an archive
    /// that is not there, or was removed before it could be kept, [`Kind::InUse`] while it is being
    /// replaced, [`Kind::Cancelled`], and [`Kind::Io`] when the storage itself cannot be reached. An
    /// archive that is being removed is never reported as damaged: a removal is refused with
    /// [`Kind::InUse`] as long as this runs, or the other way round.
    ///
    /// Only called with [`Capabilities::verify`].
    fn verify<'a>(
        &'a self,
        archive: &'a str,
        options: &'a VerifyOptions,
        progress: &'a dyn Progress,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<VerifyReport>> {
        let _ = (options, progress, call);
        unsupported(archive, "cannot be verified by this provider")
    }

    /// Names of archives that [`Provider::list`] leaves out, because too much of them is damaged to say
    /// what they are. Asked before all archives of a storage are verified: [`Provider::verify`] must
    /// take these names too. A provider that always lists everything has none.
    fn unreadable<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Vec<String>>> {
        let _ = call;
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// The configuration files in an archive. At any time; [`Kind::NotFound`] without such an archive.
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

    /// Begins the restore of a container's archive. [`ContainerRestore::cleanup`] is called exactly once
    /// on every path unless the host dies.
    ///
    /// Only called with [`Capabilities::container_restore`].
    fn restore_container_init<'a>(
        &'a self,
        archive: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn ContainerRestore>>> {
        let _ = call;
        unsupported(archive, "cannot be restored as a container by this provider")
    }
}

fn unsupported<'a, T: Send + 'a>(archive: &str, what: &str) -> BoxFuture<'a, Result<T>> {
    let error = Error::new(Kind::Invalid, format!("Archive {archive} {what}."));
    Box::pin(std::future::ready(Err(error)))
}

/// Checks notes: at most [`NOTES_BYTES_MAX`] bytes, no control characters but line breaks and tabs.
///
/// # Errors
/// A sentence that names the fault.
pub fn check_notes(notes: &str) -> std::result::Result<(), String> {
    if notes.len() > NOTES_BYTES_MAX {
        return Err(format!(
            "The notes have {} bytes; at most {NOTES_BYTES_MAX} are allowed.",
            notes.len()
        ));
    }
    match notes.chars().find(|c| c.is_control() && !"\n\t".contains(*c)) {
        Some(bad) => {
            Err(format!("The notes have the character {bad:?}, which cannot be in notes."))
        }
        None => Ok(()),
    }
}

/// What a list shows of notes: the first line that is not blank, at most [`NOTES_LINE_BYTES_MAX`]
/// bytes of it; none without such a line.
#[must_use]
pub fn notes_line(notes: &str) -> Option<String> {
    let line = notes.lines().map(str::trim).find(|line| !line.is_empty())?;
    Some(line[..line.floor_char_boundary(NOTES_LINE_BYTES_MAX)].to_owned())
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
    use super::{
        NOTES_BYTES_MAX, NOTES_LINE_BYTES_MAX, check_archive_name, check_notes, notes_line,
    };

    #[test]
    fn archive_names_are_checked() {
        assert!(check_archive_name("vzdump-qemu-100-2026_01_02-03_04_05").is_ok());
        assert!(check_archive_name("a/b:c+d=e.f").is_ok());
        for bad in ["", "a//b", "../x", "a/.", "a b", "ä", "/a", "a/"] {
            assert!(check_archive_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_archive_name(&"x".repeat(201)).is_err());
    }

    #[test]
    fn notes_are_checked_and_their_first_line_is_shown() {
        assert!(check_notes("before the update\n\tby \u{e9}\n").is_ok());
        assert!(check_notes("\u{1b}[2J").is_err());
        assert!(check_notes(&"x".repeat(NOTES_BYTES_MAX + 1)).is_err());
        assert_eq!(notes_line("\n  one \ntwo"), Some("one".to_owned()));
        assert_eq!(notes_line(" \n"), None);
        // Never in the middle of a character.
        let long = notes_line(&"\u{20ac}".repeat(NOTES_LINE_BYTES_MAX)).unwrap();
        assert!(long.len() <= NOTES_LINE_BYTES_MAX && long.len() > NOTES_LINE_BYTES_MAX - 4);
    }
}
