// SPDX-License-Identifier: MIT OR Apache-2.0
//! What may change about a committed archive: its notes, its protection, its last verification, and the
//! log of the backup that made it.
//!
//! Each is a file in the archive's directory, so they are copied and removed with it: `notes` holds
//! the text, `protected` is empty and counts by being there, `verified` is JSON, `log` is text. They are written, and
//! looked at before a removal, under the storage's lock.

use std::fs;
use std::path::Path;

use provider_api::{
    Error, Kind, LOG_BYTES_MAX, NOTES_BYTES_MAX, Result, Verified, check_notes, notes_line,
};

use crate::call::{corrupt, invalid};
use crate::files;
use crate::limits::RECORD_BYTES_MAX;
use crate::storage::{Storage, StorageLock};

const NOTES_FILE: &str = "notes";
const PROTECTED_FILE: &str = "protected";
const VERIFIED_FILE: &str = "verified";
const LOG_FILE: &str = "log";

/// All notes of an archive, whose name has been checked; empty without any.
pub(crate) fn notes(storage: &Storage, archive: &str) -> Result<String> {
    let path = storage.archive_path(archive).join(NOTES_FILE);
    let bytes = files::read_if_exists(&path, NOTES_BYTES_MAX as u64)?.unwrap_or_default();
    let text = String::from_utf8(bytes)
        .map_err(|_| corrupt(format!("The notes of archive {archive} are not text.")))?;
    check_notes(&text).map_err(|fault| corrupt(format!("Archive {archive}: {fault}")))?;
    Ok(text)
}

/// What a list shows of the notes. Damaged ones must not hide the archive.
pub(crate) fn shown_notes(storage: &Storage, archive: &str) -> Option<String> {
    notes(storage, archive).ok().as_deref().and_then(notes_line)
}

/// Replaces the notes.
pub(crate) fn set_notes(
    storage: &Storage,
    archive: &str,
    notes: &str,
    _lock: &StorageLock,
) -> Result<()> {
    check_notes(notes).map_err(invalid)?;
    storage.manifest(archive)?;
    let directory = storage.archive_path(archive);
    if notes.is_empty() {
        files::remove_if_exists(&directory.join(NOTES_FILE))?;
        return files::sync_directory(&directory);
    }
    files::replace(&directory.join(NOTES_FILE), notes.as_bytes())
}

/// Whether the archive is protected.
pub(crate) fn is_protected(storage: &Storage, archive: &str) -> bool {
    // Whatever is there counts: when in doubt the archive stays.
    fs::symlink_metadata(storage.archive_path(archive).join(PROTECTED_FILE)).is_ok()
}

/// Protects the archive, or no longer.
pub(crate) fn set_protected(
    storage: &Storage,
    archive: &str,
    protected: bool,
    _lock: &StorageLock,
) -> Result<()> {
    if let Err(error) = storage.manifest(archive) {
        // One that cannot be read any more must not be protected for ever.
        if protected || storage.look(archive).is_none() {
            return Err(error);
        }
    }
    let directory = storage.archive_path(archive);
    if !protected {
        files::remove_if_exists(&directory.join(PROTECTED_FILE))?;
    } else if !is_protected(storage, archive) {
        files::write_new(&directory.join(PROTECTED_FILE), b"")?;
    }
    files::sync_directory(&directory)
}

/// The last verification that came to its end. What cannot be read is as good as none.
pub(crate) fn verified(storage: &Storage, archive: &str) -> Option<Verified> {
    let path = storage.archive_path(archive).join(VERIFIED_FILE);
    let text = files::read_if_exists(&path, RECORD_BYTES_MAX).ok()??;
    serde_json::from_slice(&text).ok()
}

/// Remembers a verification. The archive must be kept from being replaced.
pub(crate) fn set_verified(
    storage: &Storage,
    archive: &str,
    verified: &Verified,
    _lock: &StorageLock,
) -> Result<()> {
    let text = serde_json::to_vec(verified)
        .map_err(|e| Error::with_source(Kind::Other, "Cannot write a verification.", e))?;
    files::replace(&storage.archive_path(archive).join(VERIFIED_FILE), &text)
}

/// The log of an archive's backup; empty without one.
pub(crate) fn log(storage: &Storage, archive: &str) -> Result<String> {
    let path = storage.archive_path(archive).join(LOG_FILE);
    let bytes = files::read_if_exists(&path, LOG_BYTES_MAX as u64)?.unwrap_or_default();
    String::from_utf8(bytes)
        .map_err(|_| corrupt(format!("The log of archive {archive} is not text.")))
}

/// Keeps the log of an archive's backup.
pub(crate) fn set_log(
    storage: &Storage,
    archive: &str,
    log: &str,
    _lock: &StorageLock,
) -> Result<()> {
    if log.len() > LOG_BYTES_MAX {
        return Err(invalid(format!(
            "A log of {} bytes is longer than {LOG_BYTES_MAX}.",
            log.len()
        )));
    }
    storage.manifest(archive)?;
    files::replace(&storage.archive_path(archive).join(LOG_FILE), log.as_bytes())
}

/// Takes notes, protection and log over into a directory that will replace the archive's. It holds other
/// files, which nobody has verified.
pub(crate) fn copy(
    storage: &Storage,
    archive: &str,
    target: &Path,
    _lock: &StorageLock,
) -> Result<()> {
    let path = storage.archive_path(archive).join(NOTES_FILE);
    if let Some(notes) = files::read_if_exists(&path, NOTES_BYTES_MAX as u64)? {
        files::write_new(&target.join(NOTES_FILE), &notes)?;
    }
    let path = storage.archive_path(archive).join(LOG_FILE);
    if let Some(log) = files::read_if_exists(&path, LOG_BYTES_MAX as u64)? {
        files::write_new(&target.join(LOG_FILE), &log)?;
    }
    if is_protected(storage, archive) {
        files::write_new(&target.join(PROTECTED_FILE), b"")?;
    }
    Ok(())
}
