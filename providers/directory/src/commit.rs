// SPDX-License-Identifier: MIT OR Apache-2.0
//! The commit, and what became of one.
//!
//! All of an archive's data is durable before its commit begins. The rest happens under the
//! storage's lock, each step durable before the next:
//!
//! ```text
//! .tmp-X, its manifest and note of the id  ─►  commits/<id> = "committing X"
//!     ─►  rename .tmp-X X  ─►  return
//! ```
//!
//! So for an id whose commit may have happened there is always a record, and the record names the
//! only place to look at. What is found, and what it means:
//!
//! | record | `X` | `.tmp-X` | outcome |
//! |---|---|---|---|
//! | committing X | there | | committed |
//! | committing X | | lock held | pending |
//! | committing X | | no lock | died before the rename: record becomes "not committed", then `.tmp-X` goes |
//! | committing X | | none | committed, and removed since |
//! | not committed | | | not committed |
//! | none | | one with this id, lock held | pending |
//! | none | | one with this id, no lock | as above |
//! | none | | none | record "not committed" is left, so that a slow committer finds it and fails |
//!
//! Without a record the manifests are asked before this table, so a record may be dropped after a
//! while: what changes is only the answer for an archive that was removed.

use std::fs;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use provider_api::{CommitOutcome, Committed, Error, Kind, Result, Uuid};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::call::{corrupt, invalid};
use crate::files;
use crate::kill_point::step;
use crate::limits::RECORD_BYTES_MAX;
use crate::manifest::{MANIFEST_FILE, Manifest, check_name};
use crate::storage::{Claim, Leftover, RunDirectory, Storage, StorageLock, is_merge};

/// What is known of a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
enum Record {
    /// The archive is about to be renamed, or is.
    Committing { archive: String },
    /// It did not happen, and whoever tries later must fail.
    NotCommitted,
}

/// Decides between a caller that gives a commit up and the thread that performs it.
#[derive(Debug, Default)]
pub(crate) struct Gate(AtomicU8);

impl Gate {
    const OPEN: u8 = 0;
    const PASSED: u8 = 1;
    const SHUT: u8 = 2;

    /// The caller no longer waits: a commit that has not passed yet will not happen. Whether it
    /// can still be stopped.
    pub(crate) fn shut(&self) -> bool {
        self.decide(Self::SHUT) || self.0.load(Ordering::Acquire) == Self::SHUT
    }

    fn pass(&self) -> bool {
        self.decide(Self::PASSED)
    }

    fn decide(&self, to: u8) -> bool {
        self.0.compare_exchange(Self::OPEN, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// Makes the archive in `run` a committed one. After an error before the gate was passed the caller
/// removes the directory; after one behind it, what must go is gone.
pub(crate) fn commit(
    storage: &Storage,
    run: &RunDirectory,
    manifest: Manifest,
    id: Uuid,
    gate: &Gate,
    lock: &StorageLock,
) -> Result<Committed> {
    match read_record(storage, id)? {
        None => {}
        Some(Record::NotCommitted) => {
            return Err(Error::new(
                Kind::Cancelled,
                format!("Commit {id} was declared not to have happened before it was reached."),
            ));
        }
        Some(Record::Committing { archive }) => {
            return Err(invalid(format!("Commit id {id} is that of archive {archive}.")));
        }
    }
    let size_bytes = write_manifest(storage, run, manifest, id)?;
    if !gate.pass() {
        return Err(Error::new(Kind::Cancelled, format!("Commit {id} was given up.")));
    }
    let archive = run.archive().to_owned();
    if let Err(error) = publish(storage, run, id) {
        // Removed only once the record says so: "committing" without a directory means that the
        // archive was committed and then removed.
        match write_record(storage, id, &Record::NotCommitted).and_then(|()| run.remove()) {
            Ok(()) => {}
            Err(second) => warn!("Archive {archive} is left to the next activation: {second}"),
        }
        return Err(error);
    }
    files::sync_directory(storage.path())?;
    step();
    remove_notes(storage, &archive, lock);
    step();
    Ok(Committed { archive, size_bytes })
}

/// What is left of them does no harm: nothing reads them in an archive.
fn remove_notes(storage: &Storage, archive: &str, lock: &StorageLock) {
    if let Err(error) = storage.remove_notes(archive, lock) {
        warn!("{error}");
    }
}

fn publish(storage: &Storage, run: &RunDirectory, id: Uuid) -> Result<()> {
    let archive = run.archive();
    // Without this a power cut could keep the record and lose the directory, which would read as
    // "committed, and removed since".
    files::sync_directory(storage.path())?;
    step();
    write_record(storage, id, &Record::Committing { archive: archive.to_owned() })?;
    step();
    fs::rename(run.path(), storage.archive_path(archive)).map_err(|e| {
        Error::io(format!("Cannot rename {} to {archive}.", run.path().display()), e)
    })?;
    step();
    Ok(())
}

fn write_manifest(
    storage: &Storage,
    run: &RunDirectory,
    mut manifest: Manifest,
    id: Uuid,
) -> Result<u64> {
    if storage.exists(run.archive())? {
        return Err(Error::new(Kind::Other, format!("Archive {} exists.", run.archive())));
    }
    let others = storage.manifests()?;
    let same_guest =
        others.iter().filter(|m| m.guest_id == manifest.guest_id && m.subtype == manifest.subtype);
    manifest.sequence = same_guest.map(|m| m.sequence).max().unwrap_or(0).saturating_add(1);
    manifest.commit_id = id;
    for base in manifest.disks.iter().filter_map(|disk| disk.base.as_ref()) {
        if !others.iter().any(|m| &m.archive == base && m.sequence < manifest.sequence) {
            return Err(corrupt(format!(
                "Archive {base}, which {} builds upon, was removed while the backup ran.",
                manifest.archive
            )));
        }
    }
    let text = manifest.to_text()?;
    files::write_new(&run.path().join(MANIFEST_FILE), &text)?;
    files::sync_directory(run.path())?;
    Ok(manifest.size_bytes().saturating_add(text.len() as u64))
}

/// What became of the commit `id`, and what a dead run left, for the caller to remove after it has
/// released the storage's lock.
pub(crate) fn outcome(
    storage: &Storage,
    id: Uuid,
    lock: &StorageLock,
) -> Result<(CommitOutcome, Option<Leftover>)> {
    match read_record(storage, id)? {
        Some(Record::NotCommitted) => Ok((CommitOutcome::NotCommitted, None)),
        Some(Record::Committing { archive }) => {
            if storage.exists(&archive)? {
                return committed(storage, archive, lock);
            }
            match storage.claim(&archive, lock)? {
                Some(claim) => not_committed_unless_alive(storage, id, claim, lock),
                None => Ok((CommitOutcome::Committed { archive }, None)),
            }
        }
        None => outcome_without_record(storage, id, lock),
    }
}

fn outcome_without_record(
    storage: &Storage,
    id: Uuid,
    lock: &StorageLock,
) -> Result<(CommitOutcome, Option<Leftover>)> {
    // Archives may have been copied here without the records.
    if let Some(manifest) = storage.manifests()?.into_iter().find(|m| m.commit_id == id) {
        return committed(storage, manifest.archive, lock);
    }
    for archive in storage.under_way()? {
        if storage.committing(&archive) == Some(id)
            && let Some(claim) = storage.claim(&archive, lock)?
        {
            return not_committed_unless_alive(storage, id, claim, lock);
        }
    }
    write_record(storage, id, &Record::NotCommitted)?;
    Ok((CommitOutcome::NotCommitted, None))
}

fn committed(
    storage: &Storage,
    archive: String,
    lock: &StorageLock,
) -> Result<(CommitOutcome, Option<Leftover>)> {
    // The committer may have died between the rename and its sync, or before it cleaned up.
    files::sync_directory(storage.path())?;
    remove_notes(storage, &archive, lock);
    Ok((CommitOutcome::Committed { archive }, None))
}

fn not_committed_unless_alive(
    storage: &Storage,
    id: Uuid,
    claim: Claim,
    lock: &StorageLock,
) -> Result<(CommitOutcome, Option<Leftover>)> {
    match claim {
        Claim::Alive => Ok((CommitOutcome::Pending, None)),
        Claim::Dead(run) => {
            // First the record: without it a crash here would read as "committed and removed".
            write_record(storage, id, &Record::NotCommitted)?;
            let leftover = run.retire(lock).unwrap_or_else(|error| {
                // The answer stands; the next activation tries again.
                warn!("{error}");
                None
            });
            Ok((CommitOutcome::NotCommitted, leftover))
        }
    }
}

/// What was found of dead runs.
#[derive(Debug)]
pub(crate) struct DeadRuns {
    /// For the caller to remove after it has released the storage's lock.
    pub(crate) leftovers: Vec<Leftover>,
    /// Why what a dead removal had begun could not be ended.
    pub(crate) unfinished: Option<Error>,
}

/// Takes over what dead runs left. Their commits are recorded as not having happened. What cannot be taken
/// over stays where it is, and keeps nothing else from being done.
pub(crate) fn look_for_dead_runs(storage: &Storage, lock: &StorageLock) -> Result<DeadRuns> {
    let mut dead = DeadRuns { leftovers: Vec::new(), unfinished: None };
    for name in storage.leftover_names()? {
        match storage.claim_leftover(&name, lock) {
            Ok(leftover) => dead.leftovers.extend(leftover),
            Err(error) => warn!("What an unfinished backup left is not removed: {error}"),
        }
    }
    for archive in storage.under_way()? {
        match take_dead_run(storage, &archive, lock) {
            Ok(leftover) => dead.leftovers.extend(leftover),
            Err(error) => {
                warn!("What an unfinished backup left is not removed: {error}");
                if is_merge(&archive) {
                    dead.unfinished.get_or_insert(error);
                }
            }
        }
    }
    Ok(dead)
}

fn take_dead_run(storage: &Storage, archive: &str, lock: &StorageLock) -> Result<Option<Leftover>> {
    let Some(Claim::Dead(run)) = storage.claim(archive, lock)? else { return Ok(None) };
    storage.end_replacement(&run, lock)?;
    // First the record, as above.
    record_death(storage, &run)?;
    run.retire(lock)
}

/// As [`look_for_dead_runs`], and an error if what a dead removal had begun could not be ended.
pub(crate) fn take_dead_runs(storage: &Storage, lock: &StorageLock) -> Result<Vec<Leftover>> {
    let dead = look_for_dead_runs(storage, lock)?;
    dead.unfinished.map_or(Ok(dead.leftovers), Err)
}

/// Records that the commit of a dead run, if it had begun one, has not happened.
fn record_death(storage: &Storage, run: &RunDirectory) -> Result<()> {
    if let Some(id) = storage.committing(run.archive()) {
        return match read_record(storage, id)? {
            Some(Record::NotCommitted) => Ok(()),
            Some(Record::Committing { archive }) if storage.exists(&archive)? => Ok(()),
            _ => write_record(storage, id, &Record::NotCommitted),
        };
    }
    // A record follows a manifest and a note of the id. With the one but not the other somebody
    // has damaged the note.
    if fs::symlink_metadata(run.path().join(MANIFEST_FILE)).is_err() {
        return Ok(());
    }
    for (id, record) in records(storage)? {
        if let Record::Committing { archive } = record
            && archive == run.archive()
            && !storage.exists(&archive)?
        {
            write_record(storage, id, &Record::NotCommitted)?;
        }
    }
    Ok(())
}

/// Drops records (and what interrupted writes of records left) that are so old that nobody asks
/// about them any more. Needs no lock: the answer without a record is the same, see above.
pub(crate) fn drop_old_records(storage: &Storage, keep: Duration) -> Result<()> {
    let path = storage.commits_path();
    let failed = |e| Error::io(format!("Cannot list {}.", path.display()), e);
    for entry in fs::read_dir(&path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let id = name.to_str().map(|name| name.strip_suffix(".next").unwrap_or(name));
        // One from the future has no age. One that cannot be looked at is gone already.
        let age = entry.metadata().and_then(|meta| meta.modified()).ok();
        let age = age.and_then(|time| time.elapsed().ok());
        if id.is_some_and(|id| id.parse::<Uuid>().is_ok()) && age.is_some_and(|age| age > keep) {
            files::remove_if_exists(&entry.path())?;
        }
    }
    Ok(())
}

fn record_path(storage: &Storage, id: Uuid) -> std::path::PathBuf {
    storage.commits_path().join(id.to_string())
}

fn read_record(storage: &Storage, id: Uuid) -> Result<Option<Record>> {
    let path = record_path(storage, id);
    let Some(text) = files::read_if_exists(&path, RECORD_BYTES_MAX)? else { return Ok(None) };
    let record: Record = serde_json::from_slice(&text)
        .map_err(|e| corrupt(format!("Commit record {} cannot be read: {e}.", path.display())))?;
    if let Record::Committing { archive } = &record {
        check_name(archive)?;
    }
    Ok(Some(record))
}

fn write_record(storage: &Storage, id: Uuid, record: &Record) -> Result<()> {
    let text = serde_json::to_vec(record)
        .map_err(|e| Error::with_source(Kind::Other, "Cannot write a commit record.", e))?;
    files::replace(&record_path(storage, id), &text)
}

/// All records that can be read.
fn records(storage: &Storage) -> Result<Vec<(Uuid, Record)>> {
    let path = storage.commits_path();
    let failed = |e| Error::io(format!("Cannot list {}.", path.display()), e);
    let mut found = Vec::new();
    for entry in fs::read_dir(&path).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let Some(id) = name.to_str().and_then(|text| text.parse::<Uuid>().ok()) else { continue };
        match read_record(storage, id) {
            Ok(Some(record)) => found.push((id, record)),
            Ok(None) => {}
            Err(error) => warn!("{error}"),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use provider_api::{CommitOutcome, GuestInfo, GuestKind, Uuid};

    use super::{
        Gate, Record, drop_old_records, outcome, read_record, record_path, take_dead_runs,
    };
    use super::{write_manifest, write_record};
    use crate::manifest::Manifest;
    use crate::storage::{Claim, Storage};

    const NAME: &str = "vzdump-qemu-1-2026_01_02-03_04_05";

    fn storage(folder: &tempfile::TempDir) -> Storage {
        let storage = Storage::new(folder.path().to_owned());
        storage.prepare().unwrap();
        storage
    }

    fn manifest() -> Manifest {
        let guest = GuestInfo { kind: GuestKind::Qemu, id: 1, name: None, start_time_s: 0 };
        Manifest::new(NAME.to_owned(), &guest)
    }

    fn committing() -> Record {
        Record::Committing { archive: NAME.to_owned() }
    }

    #[test]
    fn a_run_is_alive_and_known_by_its_id_up_to_the_rename() {
        let folder = tempfile::tempdir().unwrap();
        let storage = storage(&folder);
        let lock = storage.try_lock().unwrap().unwrap();
        let id = Uuid::new_v4();
        let run = storage.begin(NAME, &lock).unwrap();
        run.note_commit(id).unwrap();
        write_manifest(&storage, &run, manifest(), id).unwrap();
        write_record(&storage, id, &committing()).unwrap();
        assert!(matches!(storage.claim(NAME, &lock).unwrap(), Some(Claim::Alive)));
        assert_eq!(storage.committing(NAME), Some(id));
        assert!(take_dead_runs(&storage, &lock).unwrap().is_empty());
        assert_eq!(outcome(&storage, id, &lock).unwrap().0, CommitOutcome::Pending);
        drop(run);
        let (answer, leftover) = outcome(&storage, id, &lock).unwrap();
        assert_eq!(answer, CommitOutcome::NotCommitted);
        // Out of the way before the storage's lock is released.
        assert!(storage.claim(NAME, &lock).unwrap().is_none());
        leftover.expect("what the run left").remove().unwrap();
    }

    #[test]
    fn a_dead_run_is_recorded_by_its_note_or_without_it() {
        for note in [None, Some("damaged"), Some("good")] {
            let folder = tempfile::tempdir().unwrap();
            let storage = storage(&folder);
            let lock = storage.try_lock().unwrap().unwrap();
            let (id, other) = (Uuid::new_v4(), Uuid::new_v4());
            let run = storage.begin(NAME, &lock).unwrap();
            write_manifest(&storage, &run, manifest(), id).unwrap();
            if let Some(note) = note {
                let text = if note == "good" { id.to_string() } else { note.to_owned() };
                std::fs::write(run.path().join("committing"), text).unwrap();
            }
            write_record(&storage, id, &committing()).unwrap();
            // Of an archive of the same name, removed long ago: not looked at with a good note.
            write_record(&storage, other, &committing()).unwrap();
            drop(run);
            assert_eq!(take_dead_runs(&storage, &lock).unwrap().len(), 1);
            assert_eq!(read_record(&storage, id).unwrap(), Some(Record::NotCommitted));
            let expected = if note == Some("good") { committing() } else { Record::NotCommitted };
            assert_eq!(read_record(&storage, other).unwrap(), Some(expected));
        }
    }

    #[test]
    fn old_records_are_dropped_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let storage = storage(&folder);
        let keep = Duration::from_hours(90 * 24);
        let make = |name: String, age: Duration| {
            let path = storage.commits_path().join(name);
            let file = std::fs::File::create(&path).unwrap();
            file.set_modified(SystemTime::now() - age).unwrap();
            path
        };
        let (hour, id) = (Duration::from_hours(1), || Uuid::new_v4().to_string());
        let kept = [make(id(), keep - hour), make("other".to_owned(), keep + hour)];
        let old = [make(id(), keep + hour), make(format!("{}.next", id()), keep + hour)];
        let future = record_path(&storage, Uuid::new_v4());
        let file = std::fs::File::create(&future).unwrap();
        file.set_modified(SystemTime::now() + hour).unwrap();
        drop_old_records(&storage, keep).unwrap();
        assert!(kept.iter().chain([&future]).all(|path| path.exists()));
        assert!(!old.iter().any(|path| path.exists()));
    }

    #[test]
    fn a_commit_given_up_before_it_passed_does_not_pass() {
        let gate = Gate::default();
        assert!(gate.shut());
        assert!(gate.shut());
        assert!(!gate.pass());
        let gate = Gate::default();
        assert!(gate.pass());
        assert!(!gate.shut());
    }
}
