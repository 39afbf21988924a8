// SPDX-License-Identifier: MIT OR Apache-2.0
//! The storage's directory: names, locks, and directories of backups under way.
//!
//! ```text
//! <storage>/
//!     .vzdump/lock             flock: short steps that must not interleave
//!     .vzdump/commits/<id>     what is known of a commit, see `commit`
//!     .tmp-<archive>/          a backup under way; its file `lock` is held by the run it belongs to
//!     <archive>/               a committed archive
//! ```
//!
//! A run holds the flock of its directory until it ends; the kernel drops it when the process dies,
//! however it dies. A directory `.tmp-…` is made, and looked at by others, only under the storage's
//! lock, so one without a held lock belongs to nobody and may be removed.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use provider_api::{Call, Error, Kind, Result, Uuid};
use tracing::warn;

use crate::call::{check, corrupt};
use crate::files;
use crate::limits::{LOCK_RETRY, MANIFEST_BYTES_MAX, NAME_TRIES, RECORD_BYTES_MAX};
use crate::manifest::{MANIFEST_FILE, Manifest, check_name};

const OWN_DIRECTORY: &str = ".vzdump";
const TEMPORARY_PREFIX: &str = ".tmp-";
const LOCK_FILE: &str = "lock";
/// In a directory of a backup under way: the id of its commit, once that has begun.
const COMMITTING_FILE: &str = "committing";

/// The storage's directory.
#[derive(Debug, Clone)]
pub(crate) struct Storage {
    path: PathBuf,
}

/// The storage's lock, held.
#[derive(Debug)]
pub(crate) struct StorageLock {
    _file: File,
}

/// The directory of a backup under way, with its lock held.
#[derive(Debug)]
pub(crate) struct RunDirectory {
    path: PathBuf,
    archive: String,
    _lock: File,
}

/// What was found out about a directory of a backup under way.
#[derive(Debug)]
pub(crate) enum Claim {
    /// Its run lives.
    Alive,
    /// Its run is dead; the directory is ours now.
    Dead(RunDirectory),
}

impl Storage {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Directory of a committed archive; the name must have been checked.
    pub(crate) fn archive_path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn temporary_path(&self, name: &str) -> PathBuf {
        self.path.join(format!("{TEMPORARY_PREFIX}{name}"))
    }

    /// Directory of the commit records.
    pub(crate) fn commits_path(&self) -> PathBuf {
        self.path.join(OWN_DIRECTORY).join("commits")
    }

    /// Makes the directories this provider needs.
    pub(crate) fn prepare(&self) -> Result<()> {
        let is_new = !files::is_directory(&self.commits_path());
        files::ensure_directory(&self.commits_path())?;
        if is_new {
            files::sync_directory(&self.path.join(OWN_DIRECTORY))?;
            files::sync_directory(&self.path)?;
            if let Some(parent) = self.path.parent() {
                files::sync_directory(parent)?;
            }
        }
        Ok(())
    }

    /// Takes the storage's lock, waiting at most `wait`; `None` if it stayed taken.
    ///
    /// Waiting is trying again and again: a thread inside flock(2) could not be called back when
    /// the call is cancelled.
    pub(crate) async fn lock(&self, call: &Call, wait: Duration) -> Result<Option<StorageLock>> {
        let until = Instant::now() + wait;
        loop {
            check(call, "Waiting for the lock of the directory storage")?;
            if let Some(lock) = self.try_lock()? {
                return Ok(Some(lock));
            }
            if Instant::now() >= until {
                return Ok(None);
            }
            tokio::time::sleep(LOCK_RETRY).await;
        }
    }

    /// As [`Storage::lock`]; an error if it stays taken.
    pub(crate) async fn must_lock(&self, call: &Call, wait: Duration) -> Result<StorageLock> {
        self.lock(call, wait).await?.ok_or_else(|| {
            Error::new(
                Kind::Io,
                format!(
                    "Directory storage {} stays locked by another process; try again later.",
                    self.path.display()
                ),
            )
        })
    }

    pub(crate) fn try_lock(&self) -> Result<Option<StorageLock>> {
        let path = self.path.join(OWN_DIRECTORY).join(LOCK_FILE);
        Ok(try_flock(files::open_lock(&path)?, &path)?.map(|file| StorageLock { _file: file }))
    }

    /// Makes the directory of a new backup: chooses a free name that begins with `wanted` and
    /// reserves it.
    pub(crate) fn begin(&self, wanted: &str, _lock: &StorageLock) -> Result<RunDirectory> {
        for number in 1..=NAME_TRIES {
            let archive =
                if number == 1 { wanted.to_owned() } else { format!("{wanted}-{number}") };
            check_name(&archive)?;
            if fs::symlink_metadata(self.archive_path(&archive)).is_ok() {
                continue;
            }
            let path = self.temporary_path(&archive);
            match files::make_directory(&path) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
                Err(e) => {
                    return Err(Error::io(format!("Cannot make {}.", path.display()), e));
                }
            }
            let lock_path = path.join(LOCK_FILE);
            let lock = try_flock(files::open_lock(&lock_path)?, &lock_path)?.ok_or_else(|| {
                Error::new(Kind::Io, format!("{} is locked already.", lock_path.display()))
            })?;
            return Ok(RunDirectory { path, archive, _lock: lock });
        }
        Err(Error::new(
            Kind::Other,
            format!("{NAME_TRIES} archives called {wanted} exist; start the backup later."),
        ))
    }

    /// Finds out whether the run that makes `archive` lives; `None` if there is no such run.
    pub(crate) fn claim(&self, archive: &str, _lock: &StorageLock) -> Result<Option<Claim>> {
        let path = self.temporary_path(archive);
        if !files::is_directory(&path) {
            return Ok(None);
        }
        let lock_path = path.join(LOCK_FILE);
        Ok(Some(match try_flock(files::open_lock(&lock_path)?, &lock_path)? {
            None => Claim::Alive,
            Some(lock) => {
                Claim::Dead(RunDirectory { path, archive: archive.to_owned(), _lock: lock })
            }
        }))
    }

    /// Names of the archives being made.
    pub(crate) fn under_way(&self) -> Result<Vec<String>> {
        let names = self.entries()?;
        Ok(names
            .into_iter()
            .filter_map(|name| name.strip_prefix(TEMPORARY_PREFIX).map(str::to_owned))
            .filter(|name| check_name(name).is_ok())
            .collect())
    }

    /// The commit id of the archive being made, once its commit has begun.
    pub(crate) fn committing(&self, archive: &str) -> Option<Uuid> {
        let path = self.temporary_path(archive).join(COMMITTING_FILE);
        let text = files::read(&path, RECORD_BYTES_MAX).ok()?;
        std::str::from_utf8(&text).ok()?.trim().parse().ok()
    }

    /// Whether an archive of this name is there, whatever its state.
    pub(crate) fn exists(&self, name: &str) -> bool {
        files::is_directory(&self.archive_path(name))
    }

    /// The manifest of a committed archive.
    pub(crate) fn manifest(&self, name: &str) -> Result<Manifest> {
        check_name(name)?;
        let path = self.archive_path(name);
        if !files::is_directory(&path) {
            return Err(Error::new(
                Kind::NotFound,
                format!("There is no archive {name} in {}.", self.path.display()),
            ));
        }
        let text = files::read(&path.join(MANIFEST_FILE), MANIFEST_BYTES_MAX)?;
        Manifest::parse(name, &text)
    }

    /// The manifests of all committed archives. One that cannot be read is left out with a
    /// warning: it must not hide the others.
    pub(crate) fn manifests(&self) -> Result<Vec<Manifest>> {
        let mut found = Vec::new();
        for name in self.entries()? {
            if check_name(&name).is_err() || !self.exists(&name) {
                continue;
            }
            match self.manifest(&name) {
                Ok(manifest) => found.push(manifest),
                // Somebody's own directory, or an archive removed just now.
                Err(error) if error.kind == Kind::NotFound => {}
                Err(error) => warn!("Archive {name} is left out: {error}"),
            }
        }
        Ok(found)
    }

    fn entries(&self) -> Result<Vec<String>> {
        let failed =
            |e| Error::io(format!("Cannot list the directory storage {}.", self.path.display()), e);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            if let Ok(name) = entry.map_err(failed)?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }
}

impl RunDirectory {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Name of the archive to be.
    pub(crate) fn archive(&self) -> &str {
        &self.archive
    }

    /// Notes that the commit with this id has begun, so that others who ask for it wait.
    pub(crate) fn note_commit(&self, id: Uuid) -> Result<()> {
        files::write_new(&self.path.join(COMMITTING_FILE), id.to_string().as_bytes())
    }

    /// Removes what only a backup under way needs. From here to the rename the storage's lock
    /// keeps others from taking the directory for abandoned.
    pub(crate) fn remove_notes(&self, _lock: &StorageLock) -> Result<()> {
        files::remove_if_exists(&self.path.join(COMMITTING_FILE))?;
        files::remove_if_exists(&self.path.join(LOCK_FILE))
    }

    /// Removes the directory; the lock is held to the end.
    pub(crate) fn remove(&self) -> Result<()> {
        files::remove_tree(&self.path)
    }
}

fn try_flock(file: File, path: &Path) -> Result<Option<File>> {
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => Err(corrupt(format!(
            "The file system of {} has no locks; use another one for backups.",
            path.display()
        ))),
        Err(TryLockError::Error(e)) => {
            Err(Error::io(format!("Cannot lock {}.", path.display()), e))
        }
    }
}
