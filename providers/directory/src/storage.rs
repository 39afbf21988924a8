// SPDX-License-Identifier: MIT OR Apache-2.0
//! The storage's directory: names, locks, and directories of backups under way.
//!
//! ```text
//! <storage>/
//!     .vzdump/lock             flock: short steps that must not interleave
//!     .vzdump/commits/<id>     what is known of a commit, see `commit`
//!     .vzdump/guests/          locks of guests, see `usage`
//!     .tmp-<archive>/          a backup under way; its file `lock` is held by the run it belongs to
//!     .tmp-merge-<uuid>/       as such one: what will replace an archive, see `remove`
//!     .tmp-dead-<uuid>/        what a run left, being removed
//!     <archive>/               a committed archive
//! ```
//!
//! A run holds the flock of its directory until it ends; the kernel drops it when the process dies,
//! however it dies. A directory `.tmp-<archive>` is made, and looked at by others, only under the
//! storage's lock, so one without a held lock belongs to nobody and may be removed.
//!
//! Removing takes long and happens without the storage's lock, while the next backup of the guest
//! may want the same name. So whatever is removed is first renamed to a name of its own that is
//! never used again. Others rename only under the storage's lock and in the same breath as they
//! find the run dead; the run itself may rename at any time, because it holds its lock.
//!
//! Who removes holds the lock up to the last two names, `lock` and the directory's own. These go when the
//! lock is closed: an open file that is removed gets another name on NFS, in this directory, which then stays.

use std::collections::HashSet;
use std::ffi::CStr;
use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use provider_api::{Call, Error, Kind, Result, Uuid};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use tracing::warn;

use crate::call::{check, corrupt};
use crate::kill_point::{is_without_exchange, step};
use crate::limits::{LOCK_RETRY, MANIFEST_BYTES_MAX, NAME_TRIES, RECORD_BYTES_MAX};
use crate::manifest::{MANIFEST_FILE, Manifest, check_name, is_archive_file};
use crate::{deep, files};

const OWN_DIRECTORY: &str = ".vzdump";
const TEMPORARY_PREFIX: &str = ".tmp-";
/// In place of an archive's name: a directory that waits for its removal.
const DEAD_PREFIX: &str = "dead-";
const LOCK_FILE: &str = "lock";
const LOCK_NAME: &CStr = c"lock";
/// In a directory of a backup under way: the id of its commit, once that has begun. It stays until
/// the directory has its final name: it leads from a dead run to the record of its commit.
const COMMITTING_FILE: &str = "committing";
/// Begins the name of a run that will replace an archive by one with the same name.
const MERGE_PREFIX: &str = "merge-";
/// In such a directory: it is complete, and its archive is replaced in two steps.
const REPLACES_FILE: &str = "replaces";

/// The storage's directory.
#[derive(Debug, Clone)]
pub(crate) struct Storage {
    path: PathBuf,
    place: Place,
    /// Archives that cannot be read, of which that has been told.
    told: Arc<Mutex<HashSet<String>>>,
}

/// What must be there before a storage is used.
#[derive(Debug, Clone, Default)]
pub(crate) struct Place {
    /// Where a file system must be mounted.
    pub(crate) mount_point: Option<PathBuf>,
    /// Whether the storage's directory itself is never made.
    pub(crate) must_exist: bool,
}

impl Place {
    /// Without this, data meant for a disk that is not mounted would fill the one below, and be hidden by the
    /// next mount.
    fn check(&self, storage: &Path) -> Result<()> {
        let missing = |text: String| Err(Error::new(Kind::Io, text));
        if let Some(path) = &self.mount_point
            && !provider_api::is_mount_point(path).map_err(|error| {
                Error::io(format!("Cannot look whether {} is mounted.", path.display()), error)
            })?
        {
            return missing(format!(
                "Nothing is mounted at {}, where storage.cfg says that the file system of the directory \
                 storage {} is ('is_mountpoint').",
                path.display(),
                storage.display()
            ));
        }
        if self.must_exist && !storage.is_dir() {
            return missing(format!(
                "The directory storage {} does not exist, and storage.cfg says that it is not made ('mkdir' or \
                 'create-base-path').",
                storage.display()
            ));
        }
        Ok(())
    }
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
    lock: RunLock,
}

/// The lock of a run's directory; missing if the run died before it made one.
#[derive(Debug, Default)]
struct RunLock(Mutex<Option<File>>);

/// What a dead run left, under a name that nobody else will ever use.
#[derive(Debug)]
pub(crate) struct Leftover {
    path: PathBuf,
    /// Tells other processes that somebody is removing it already.
    lock: RunLock,
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
        Self { path, place: Place::default(), told: Arc::default() }
    }

    /// The same storage, used only when this is there.
    pub(crate) fn in_place(self, place: Place) -> Self {
        Self { place, ..self }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses a storage whose file system is not there.
    pub(crate) fn check_place(&self) -> Result<()> {
        self.place.check(&self.path)
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

    /// Directory of the guests' locks.
    pub(crate) fn guests_path(&self) -> PathBuf {
        self.path.join(OWN_DIRECTORY).join("guests")
    }

    /// Makes the directories this provider needs.
    pub(crate) fn prepare(&self) -> Result<()> {
        self.check_place()?;
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
        self.lock(call, wait).await?.ok_or_else(|| self.locked())
    }

    /// As [`Storage::must_lock`], on a blocking thread.
    pub(crate) fn must_lock_blocking(&self, call: &Call, wait: Duration) -> Result<StorageLock> {
        let until = Instant::now() + wait;
        loop {
            check(call, "Waiting for the lock of the directory storage")?;
            if let Some(lock) = self.try_lock()? {
                return Ok(lock);
            }
            if Instant::now() >= until {
                return Err(self.locked());
            }
            std::thread::sleep(LOCK_RETRY);
        }
    }

    fn locked(&self) -> Error {
        Error::new(
            Kind::Io,
            format!(
                "Directory storage {} stays locked by another process; try again later.",
                self.path.display()
            ),
        )
    }

    pub(crate) fn try_lock(&self) -> Result<Option<StorageLock>> {
        self.check_place()?;
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
            return match make_lock(&path) {
                Ok(lock) => Ok(RunDirectory { path, archive, lock: RunLock::new(Some(lock)) }),
                Err(error) => {
                    // Others are kept off by the storage's lock.
                    let _ = files::remove_tree(&path);
                    Err(error)
                }
            };
        }
        Err(Error::new(
            Kind::Other,
            format!("{NAME_TRIES} archives called {wanted} exist; start the backup later."),
        ))
    }

    /// Makes the directory of what will replace an archive.
    pub(crate) fn begin_merge(&self, lock: &StorageLock) -> Result<RunDirectory> {
        self.begin(&format!("{MERGE_PREFIX}{}", Uuid::new_v4().simple()), lock)
    }

    /// Finds out whether the run that makes `archive` lives; `None` if there is no such run.
    ///
    /// A dead run's directory is ours for as long as the storage's lock is held.
    pub(crate) fn claim(&self, archive: &str, _lock: &StorageLock) -> Result<Option<Claim>> {
        let path = self.temporary_path(archive);
        if !files::has_directory(&path)? {
            return Ok(None);
        }
        let lock_path = path.join(LOCK_FILE);
        let lock = match files::open_lock_if_exists(&lock_path)? {
            Some(file) => match try_flock(file, &lock_path)? {
                Some(lock) => Some(lock),
                None => return Ok(Some(Claim::Alive)),
            },
            // Directory and lock are made under the storage's lock: the run died in between. Or it
            // lives and has just renamed the directory; then there is nothing left to take.
            None => None,
        };
        let lock = RunLock::new(lock);
        Ok(Some(Claim::Dead(RunDirectory { path, archive: archive.to_owned(), lock })))
    }

    /// Names of the archives being made.
    pub(crate) fn under_way(&self) -> Result<Vec<String>> {
        let mut names = self.temporary_names()?;
        names.retain(|name| check_name(name).is_ok() && !is_dead_name(name));
        Ok(names)
    }

    /// Names of what dead runs left.
    pub(crate) fn leftover_names(&self) -> Result<Vec<String>> {
        let mut names = self.temporary_names()?;
        names.retain(|name| is_dead_name(name));
        Ok(names)
    }

    /// One of them, if nobody is removing it at the moment.
    pub(crate) fn claim_leftover(
        &self,
        name: &str,
        lock: &StorageLock,
    ) -> Result<Option<Leftover>> {
        let Some(Claim::Dead(run)) = self.claim(name, lock)? else { return Ok(None) };
        let leftover = Leftover { path: run.path, lock: run.lock };
        self.tidy_after(&leftover, lock)?;
        Ok(Some(leftover))
    }

    fn temporary_names(&self) -> Result<Vec<String>> {
        let names = self.entries()?.into_iter();
        Ok(names
            .filter_map(|name| name.strip_prefix(TEMPORARY_PREFIX).map(str::to_owned))
            .collect())
    }

    /// Removes from a committed archive what only its backup needed.
    pub(crate) fn remove_notes(&self, archive: &str, _lock: &StorageLock) -> Result<()> {
        let path = self.archive_path(archive);
        files::remove_if_exists(&path.join(COMMITTING_FILE))?;
        files::remove_if_exists(&path.join(REPLACES_FILE))?;
        files::remove_if_exists(&path.join(LOCK_FILE))
    }

    /// Takes a committed archive away, for a removal without the storage's lock; `None` if it is
    /// gone.
    pub(crate) fn take_away(&self, archive: &str, _lock: &StorageLock) -> Result<Option<Leftover>> {
        let taken = move_away(&self.archive_path(archive), false)?;
        Ok(taken.map(|path| Leftover { path, lock: RunLock::default() }))
    }

    /// Removes from a committed archive what a process left there that died right after it had
    /// replaced what is now `leftover`.
    fn tidy_after(&self, leftover: &Leftover, lock: &StorageLock) -> Result<()> {
        let manifest = files::read(&leftover.path.join(MANIFEST_FILE), MANIFEST_BYTES_MAX);
        match manifest.ok().and_then(|text| archive_in(&text)) {
            Some(archive) => self.remove_notes(&archive, lock),
            None => Ok(()),
        }
    }

    /// Ends what a process began that died while it replaced an archive by a merged one, see
    /// [`RunDirectory::replace`]; other dead runs are left alone.
    pub(crate) fn end_replacement(&self, run: &RunDirectory, lock: &StorageLock) -> Result<()> {
        if !is_merge(&run.archive) {
            return Ok(());
        }
        // Before and after an exchange both manifests name the archive.
        let is_replacing = fs::symlink_metadata(run.path.join(REPLACES_FILE)).is_ok();
        let path = run.path.join(MANIFEST_FILE);
        let archive = files::read(&path, MANIFEST_BYTES_MAX).and_then(|text| {
            archive_in(&text).ok_or_else(|| corrupt(format!("{} is damaged.", path.display())))
        });
        let archive = match archive {
            Ok(archive) => archive,
            // Nothing else may be left of the archive.
            Err(error) if is_replacing => return Err(error),
            Err(_) => return Ok(()),
        };
        let target = self.archive_path(&archive);
        if is_replacing && fs::symlink_metadata(&target).is_err() {
            fs::rename(&run.path, &target)
                .map_err(|e| Error::io(format!("Cannot put archive {archive} back."), e))?;
            files::sync_directory(&self.path)?;
        }
        self.remove_notes(&archive, lock)
    }

    /// The commit id of the archive being made, once its commit has begun.
    pub(crate) fn committing(&self, archive: &str) -> Option<Uuid> {
        let path = self.temporary_path(archive).join(COMMITTING_FILE);
        let text = files::read(&path, RECORD_BYTES_MAX).ok()?;
        std::str::from_utf8(&text).ok()?.trim().parse().ok()
    }

    /// Whether an archive of this name is there, whatever its state.
    pub(crate) fn exists(&self, name: &str) -> Result<bool> {
        files::has_directory(&self.archive_path(name))
    }

    /// The manifest of a committed archive.
    pub(crate) fn manifest(&self, name: &str) -> Result<Manifest> {
        check_name(name)?;
        let path = self.archive_path(name);
        if !self.exists(name)? {
            return Err(Error::new(
                Kind::NotFound,
                format!("There is no archive {name} in {}.", self.path.display()),
            ));
        }
        let text = files::read(&path.join(MANIFEST_FILE), MANIFEST_BYTES_MAX)?;
        Manifest::parse(name, &text)
    }

    /// The manifests of all committed archives. One that cannot be read is left out with a
    /// warning, the first time: it must not hide the others.
    pub(crate) fn manifests(&self) -> Result<Vec<Manifest>> {
        let read = self.read_manifests()?.into_iter();
        Ok(read
            .filter_map(|(name, manifest)| match manifest {
                Ok(manifest) => Some(manifest),
                Err(error) => {
                    if self.told.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone())
                    {
                        warn!("Archive {name} is left out: {error}");
                    }
                    None
                }
            })
            .collect())
    }

    /// Names of the archives whose manifests cannot be read.
    pub(crate) fn unreadable(&self) -> Result<Vec<String>> {
        let read = self.read_manifests()?.into_iter();
        Ok(read.filter(|(_, manifest)| manifest.is_err()).map(|(name, _)| name).collect())
    }

    /// The manifests of all committed archives, or why one cannot be read.
    pub(crate) fn read_manifests(&self) -> Result<Vec<(String, Result<Manifest>)>> {
        let names = self.entries()?.into_iter();
        Ok(names.filter_map(|name| Some((name.clone(), self.look(&name)?))).collect())
    }

    /// The manifest of an archive, or why it cannot be read; none for what is no archive.
    pub(crate) fn look(&self, name: &str) -> Option<Result<Manifest>> {
        check_name(name).ok()?;
        match self.manifest(name) {
            Err(error) if error.kind == Kind::NotFound => match self.was_archive(name) {
                Ok(true) => Some(Err(error)),
                // Somebody's own file or directory, or an archive removed just now.
                Ok(false) => None,
                Err(error) => Some(Err(error)),
            },
            manifest => Some(manifest),
        }
    }

    /// Whether a directory without manifest holds what only archives have.
    fn was_archive(&self, name: &str) -> Result<bool> {
        let path = self.archive_path(name);
        let failed = |e| Error::io(format!("Cannot list {}.", path.display()), e);
        let files = match fs::read_dir(&path) {
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(false);
            }
            files => files.map_err(failed)?,
        };
        for entry in files {
            if is_archive_file(&entry.map_err(failed)?.file_name()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn entries(&self) -> Result<Vec<String>> {
        self.check_place()?;
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

    /// Gives the directory of a dead run a name of its own, for a removal without the storage's
    /// lock; `None` if it is gone. The outcome of its commit must have been recorded before.
    pub(crate) fn retire(self, _lock: &StorageLock) -> Result<Option<Leftover>> {
        Ok(move_away(&self.path, true)?.map(|path| Leftover { path, lock: self.lock }))
    }

    /// Replaces a committed archive by this directory, which must be complete and durable. What it
    /// was before is in this directory afterwards, or in a leftover, and no longer needed.
    ///
    /// In one step where the file system can exchange two names. Else (NFS) in two, so that a moment
    /// without the archive passes; if this process dies in it, the note that is written first lets
    /// the next activation take the second step.
    pub(crate) fn replace(
        &self,
        storage: &Storage,
        archive: &str,
        lock: &StorageLock,
    ) -> Result<Option<Leftover>> {
        let target = storage.archive_path(archive);
        let failed = |e| Error::io(format!("Cannot replace archive {archive}."), e);
        let exchanged = if is_without_exchange() {
            Err(Errno::INVAL)
        } else {
            renameat_with(CWD, &self.path, CWD, &target, RenameFlags::EXCHANGE)
        };
        let old = match exchanged {
            Ok(()) => None,
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                files::write_new(&self.path.join(REPLACES_FILE), b"")?;
                files::sync_directory(&self.path)?;
                step();
                let old = storage.take_away(archive, lock)?.ok_or_else(|| {
                    Error::new(Kind::NotFound, format!("There is no archive {archive}."))
                })?;
                step();
                if let Err(e) = fs::rename(&self.path, &target) {
                    // If this fails too, the next activation does the one or the other.
                    fs::rename(&old.path, &target).map_err(failed)?;
                    return Err(failed(e));
                }
                Some(old)
            }
            Err(e) => return Err(failed(e.into())),
        };
        step();
        files::sync_directory(storage.path())?;
        step();
        storage.remove_notes(archive, lock)?;
        Ok(old)
    }

    /// Removes the directory of a living run, if it is still there.
    pub(crate) fn remove(&self) -> Result<()> {
        match move_away(&self.path, true)? {
            Some(path) => self.lock.remove_with(&path),
            None => Ok(()),
        }
    }
}

impl RunLock {
    fn new(file: Option<File>) -> Self {
        Self(Mutex::new(file))
    }

    /// Removes the directory of this lock, whose name is never used again. The lock is held until almost
    /// nothing is left; who finds the rest without one may remove it, too.
    fn remove_with(&self, path: &Path) -> Result<()> {
        let mut lock = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lock.is_some() {
            // What this cannot remove is told of below.
            let _ = deep::empty(path, LOCK_NAME);
            *lock = None;
        }
        files::remove_tree(path)
    }
}

impl Leftover {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it. Two processes that do so at the same time do not disturb each other.
    pub(crate) fn remove(&self) -> Result<()> {
        self.lock.remove_with(&self.path)
    }
}

/// The archive's name in a manifest.
fn archive_in(manifest: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Named {
        archive: String,
    }
    let Named { archive } = serde_json::from_slice(manifest).ok()?;
    check_name(&archive).is_ok().then_some(archive)
}

/// Whether a run makes what will replace an archive.
pub(crate) fn is_merge(archive: &str) -> bool {
    archive.starts_with(MERGE_PREFIX)
}

fn is_dead_name(name: &str) -> bool {
    name.strip_prefix(DEAD_PREFIX).is_some_and(|id| id.parse::<Uuid>().is_ok())
}

/// Renames a directory to a name that is never used again; `None` if it is gone. If there is no
/// space for that, its files are removed first if that `may_be_emptied`.
fn move_away(path: &Path, may_be_emptied: bool) -> Result<Option<PathBuf>> {
    let name = format!("{TEMPORARY_PREFIX}{DEAD_PREFIX}{}", Uuid::new_v4().simple());
    let target = path.with_file_name(name);
    let mut result = fs::rename(path, &target);
    if let Err(e) = &result
        && may_be_emptied
        && matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
    {
        // Some file systems need space for a rename, and a full one is a usual reason to be here.
        files::empty_directory(path, LOCK_FILE)?;
        result = fs::rename(path, &target);
    }
    match result {
        Ok(()) => Ok(Some(target)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(format!("Cannot rename {} for removal.", path.display()), e)),
    }
}

/// Makes and takes the lock of a new directory.
fn make_lock(directory: &Path) -> Result<File> {
    let path = directory.join(LOCK_FILE);
    try_flock(files::create(&path)?, &path)?
        .ok_or_else(|| Error::new(Kind::Io, format!("{} is locked already.", path.display())))
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

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::path::Path;

    use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

    use super::{Claim, Storage, StorageLock};

    const NAME: &str = "vzdump-qemu-1-2026_01_02-03_04_05";

    fn storage(folder: &Path) -> Storage {
        let storage = Storage::new(folder.to_owned());
        storage.prepare().unwrap();
        storage
    }

    fn lock(storage: &Storage) -> StorageLock {
        storage.try_lock().unwrap().expect("nobody else has it")
    }

    #[test]
    fn a_claim_makes_no_lock_file() {
        let folder = tempfile::tempdir().unwrap();
        let storage = storage(folder.path());
        let lock = lock(&storage);
        let path = storage.temporary_path(NAME);
        std::fs::create_dir(&path).unwrap();
        let claim = storage.claim(NAME, &lock).unwrap();
        assert!(matches!(claim, Some(Claim::Dead(_))), "{claim:?}");
        assert!(std::fs::read_dir(&path).unwrap().next().is_none());
        let run = storage.begin("other", &lock).unwrap();
        assert!(matches!(storage.claim("other", &lock).unwrap(), Some(Claim::Alive)));
        drop(run);
    }

    /// A run found dead, whose directory is gone when somebody begins to remove it, while another
    /// run has taken its name.
    #[test]
    fn a_removal_does_not_hit_the_next_run_of_the_same_name() {
        let folder = tempfile::tempdir().unwrap();
        let storage = storage(folder.path());
        let path = storage.temporary_path(NAME);
        drop(storage.begin(NAME, &lock(&storage)).unwrap());
        let leftovers = crate::commit::take_dead_runs(&storage, &lock(&storage)).unwrap();
        assert_eq!(leftovers.len(), 1);
        assert!(leftovers[0].path().exists() && !path.exists());
        // It is found again only when whoever removes it has died.
        assert!(crate::commit::take_dead_runs(&storage, &lock(&storage)).unwrap().is_empty());

        let next = storage.begin(NAME, &lock(&storage)).unwrap();
        assert_eq!(next.path(), path);
        for leftover in &leftovers {
            leftover.remove().unwrap();
            leftover.remove().unwrap();
            assert!(!leftover.path().exists());
        }
        assert!(path.exists());
        next.remove().unwrap();
        assert!(!path.exists());
        next.remove().unwrap();
    }

    #[test]
    fn an_interrupted_removal_is_continued() {
        let folder = tempfile::tempdir().unwrap();
        let storage = storage(folder.path());
        for with_lock_file in [false, true] {
            drop(storage.begin(NAME, &lock(&storage)).unwrap());
            let leftovers = crate::commit::take_dead_runs(&storage, &lock(&storage)).unwrap();
            let path = leftovers[0].path().to_owned();
            drop(leftovers);
            if !with_lock_file {
                std::fs::remove_file(path.join(super::LOCK_FILE)).unwrap();
            }
            let leftovers = crate::commit::take_dead_runs(&storage, &lock(&storage)).unwrap();
            assert_eq!(leftovers.len(), 1);
            assert_eq!(leftovers[0].path(), path);
            leftovers[0].remove().unwrap();
        }
    }

    /// On NFS an open file that is removed stays in its directory under another name.
    #[test]
    fn a_lock_is_closed_before_its_name_goes_and_after_everything_else_has_gone() {
        let folder = tempfile::tempdir().unwrap();
        let storage = storage(folder.path());
        let make = || {
            let run = storage.begin(NAME, &lock(&storage)).unwrap();
            std::fs::create_dir(run.path().join("tree")).unwrap();
            std::fs::write(run.path().join("tree/file"), "x").unwrap();
            std::fs::write(run.path().join("zz"), "x").unwrap();
            let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
            let wanted = WatchFlags::DELETE | WatchFlags::CLOSE_WRITE;
            inotify::add_watch(&watch, run.path(), wanted).unwrap();
            (run, watch)
        };
        let check = |watch: &OwnedFd| {
            let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
            let mut events = inotify::Reader::new(watch, &mut buffer);
            let mut seen = Vec::new();
            while let Ok(event) = events.next() {
                let name = event.file_name().map(|name| name.to_str().unwrap().to_owned());
                seen.extend(name.map(|name| (name, event.events().contains(ReadFlags::DELETE))));
            }
            let ends = [("lock".to_owned(), false), ("lock".to_owned(), true)];
            assert_eq!(seen.len(), 4, "{seen:?}");
            assert_eq!(seen[2..], ends, "{seen:?}");
        };
        let (run, watch) = make();
        run.remove().unwrap();
        check(&watch);
        let (run, watch) = make();
        let leftover = run.retire(&lock(&storage)).unwrap().unwrap();
        leftover.remove().unwrap();
        check(&watch);
        assert!(!leftover.path().exists());
    }

    /// The run gives up on its own while somebody has just opened its lock.
    #[test]
    fn a_directory_that_its_run_has_moved_away_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let storage = storage(folder.path());
        let lock = lock(&storage);
        drop(storage.begin(NAME, &lock).unwrap());
        let Some(Claim::Dead(run)) = storage.claim(NAME, &lock).unwrap() else {
            panic!("nobody holds its lock");
        };
        super::move_away(run.path(), true).unwrap().expect("it was there");
        assert!(run.retire(&lock).unwrap().is_none());
    }
}
