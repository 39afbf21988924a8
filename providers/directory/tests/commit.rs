// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commits, their outcomes, and what crashes leave.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::Instant;

use common::{
    Bench, GuestDisk, LIMIT, Process, Random, Recorder, copy, end_with_parent, provider, scribble,
    start, start_child, vm,
};
use provider_api::{Call, CommitOutcome, GuestBackup, Kind, Provider, Uuid};

/// Names the storage to the child process of a test, and what it does before it waits to be
/// killed.
const CHILD_STORAGE: &str = "DIRECTORY_TEST_STORAGE";
const CHILD_STEP: &str = "DIRECTORY_TEST_STEP";

/// Not a test of its own: what a child process runs.
#[tokio::test(flavor = "multi_thread")]
async fn child_process() {
    let Ok(path) = std::env::var(CHILD_STORAGE) else { return };
    end_with_parent();
    let step = std::env::var(CHILD_STEP).unwrap();
    let call = Call::default();
    let storage = provider(Path::new(&path));
    let mut guest = start(&storage, 1, &call).await;
    if step != "started" {
        guest.backup_vm(vm(vec![]), &Recorder::default(), &call).await.unwrap();
    }
    if let Some(id) = step.strip_prefix("committed:") {
        guest.commit(id.parse().unwrap(), &call).await.unwrap();
    } else if let Some(id) = step.strip_prefix("committing:") {
        // As a committer that has noted its id and waits for the storage's lock.
        let lock = std::fs::File::open(Path::new(&path).join(".vzdump/lock")).unwrap();
        lock.lock().unwrap();
        let id: Uuid = id.parse().unwrap();
        let noted = Path::new(&path).join(format!(".tmp-{}/committing", guest.archive_name()));
        let waiting = tokio::spawn(async move {
            let call = Call::default();
            guest.commit(id, &call).await.map(drop)
        });
        until_there(&noted).await;
        println!("READY");
        waiting.await.unwrap().unwrap();
    }
    println!("READY");
    std::future::pending::<()>().await;
}

/// A child process that has reached `step`.
fn child(storage: &Path, step: &str) -> Process {
    let environment = [(CHILD_STORAGE, storage.as_os_str()), (CHILD_STEP, step.as_ref())];
    let mut process = start_child(&environment);
    let output = BufReader::new(process.0.stdout.take().unwrap());
    let is_ready = output.lines().any(|line| line.unwrap().contains("READY"));
    assert!(is_ready, "the child process ended early");
    process
}

async fn until_there(path: &Path) {
    let until = Instant::now() + LIMIT;
    while !path.exists() {
        assert!(Instant::now() < until, "{} does not appear", path.display());
        tokio::task::yield_now().await;
    }
}

fn leftovers(bench: &Bench) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(bench.storage()).unwrap().map(|e| e.unwrap().path());
    entries
        .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(".tmp-"))
        .collect()
}

async fn complete(bench: &Bench) -> Box<dyn GuestBackup> {
    let mut guest = bench.start(1).await;
    guest.backup_vm(vm(vec![]), &Recorder::default(), &bench.call).await.unwrap();
    guest
}

async fn outcome(bench: &Bench, id: Uuid) -> CommitOutcome {
    // A new provider has no memory of what this process did.
    provider(&bench.storage()).commit_outcome(id, &bench.call).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_is_known_by_its_id() {
    let bench = Bench::new().await;
    let (one, two) = (Uuid::new_v4(), Uuid::new_v4());
    let committed = complete(&bench).await.commit(one, &bench.call).await.unwrap();
    let expected = CommitOutcome::Committed { archive: committed.archive.clone() };
    assert_eq!(outcome(&bench, one).await, expected);
    assert_eq!(outcome(&bench, two).await, CommitOutcome::NotCommitted);
    assert_eq!(bench.provider.list(&bench.call).await.unwrap()[0].commit_id, Some(one));
    assert!(leftovers(&bench).is_empty());
    let inside = std::fs::read_dir(bench.storage().join(&committed.archive)).unwrap();
    let mut names: Vec<_> = inside.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["manifest.json", "qemu-server.conf", "qemu-server.fw"]);

    // An id is used once.
    let error = complete(&bench).await.commit(one, &bench.call).await.unwrap_err();
    assert_eq!(error.kind, Kind::Invalid);
    assert_eq!(outcome(&bench, one).await, expected);
    // Archives copied to another storage bring their ids along.
    std::fs::remove_file(bench.storage().join(".vzdump/commits").join(one.to_string())).unwrap();
    assert_eq!(outcome(&bench, one).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_was_declared_not_to_have_happened_cannot_happen_later() {
    let bench = Bench::new().await;
    let id = Uuid::new_v4();
    let guest = complete(&bench).await;
    assert_eq!(outcome(&bench, id).await, CommitOutcome::NotCommitted);
    assert!(guest.commit(id, &bench.call).await.is_err());
    assert_eq!(outcome(&bench, id).await, CommitOutcome::NotCommitted);
    assert!(bench.names().await.is_empty());
    assert!(leftovers(&bench).is_empty(), "a failed commit removes what it made");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_dropped_without_commit_is_not_listed_and_goes() {
    let bench = Bench::new().await;
    let guest = complete(&bench).await;
    // While it lives nobody takes it away.
    provider(&bench.storage()).activate(&bench.call).await.unwrap();
    assert_eq!(leftovers(&bench).len(), 1);
    drop(guest);
    assert!(bench.names().await.is_empty());
    provider(&bench.storage()).activate(&bench.call).await.unwrap();
    assert!(leftovers(&bench).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leftover_that_cannot_be_taken_over_keeps_nothing_from_being_done() {
    let bench = Bench::new().await;
    let name = complete(&bench).await.commit(Uuid::new_v4(), &bench.call).await.unwrap().archive;
    let dead = bench.storage().join(format!(".tmp-dead-{}", Uuid::new_v4().simple()));
    for bad in [dead, bench.storage().join(".tmp-vzdump-qemu-1-2025_01_02-03_04_05")] {
        std::fs::create_dir_all(bad.join("lock")).unwrap();
    }
    drop(complete(&bench).await);
    assert_eq!(leftovers(&bench).len(), 3);
    let fresh = provider(&bench.storage());
    fresh.activate(&bench.call).await.unwrap();
    assert_eq!(leftovers(&bench).len(), 2, "all others are removed");
    drop(fresh.restore_vm_init(&name, &bench.call).await.unwrap());
    fresh.remove(&name, &bench.call).await.unwrap();
    assert!(bench.names().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_leaves_nothing_that_is_listed() {
    let bench = Bench::new().await;
    for step in ["started", "copied"] {
        let process = child(&bench.storage(), step);
        bench.provider.activate(&bench.call).await.unwrap();
        assert_eq!(leftovers(&bench).len(), 1, "a living run's directory must stay");
        drop(process);
        assert!(bench.names().await.is_empty());
        bench.provider.activate(&bench.call).await.unwrap();
        assert!(leftovers(&bench).is_empty());
    }
    let id = Uuid::new_v4();
    drop(child(&bench.storage(), &format!("committed:{id}")));
    bench.provider.activate(&bench.call).await.unwrap();
    let archive = bench.names().await.pop().unwrap();
    assert_eq!(outcome(&bench, id).await, CommitOutcome::Committed { archive });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_killed_in_its_commit_has_not_committed() {
    let bench = Bench::new().await;
    let id = Uuid::new_v4();
    let process = child(&bench.storage(), &format!("committing:{id}"));
    // The committer holds the storage's lock as well: nothing can be told yet.
    let hurry = Call {
        deadline: Some(Instant::now() + std::time::Duration::from_secs(1)),
        ..Call::default()
    };
    let answer = bench.provider.commit_outcome(id, &hurry).await.unwrap();
    assert_eq!(answer, CommitOutcome::Pending);
    drop(process);
    assert_eq!(outcome(&bench, id).await, CommitOutcome::NotCommitted);
    assert!(leftovers(&bench).is_empty());
    assert!(bench.names().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_begun_by_a_living_process_is_pending() {
    let bench = Bench::new().await;
    let id = Uuid::new_v4();
    let guest = complete(&bench).await;
    let noted = bench.storage().join(format!(".tmp-{}/committing", guest.archive_name()));
    std::fs::write(&noted, id.to_string()).unwrap();
    assert_eq!(outcome(&bench, id).await, CommitOutcome::Pending);
    drop(guest);
    assert_eq!(outcome(&bench, id).await, CommitOutcome::NotCommitted);
    assert!(leftovers(&bench).is_empty());
}

/// The states a crash can leave around the rename.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_around_the_rename_is_told_apart() {
    let bench = Bench::new().await;
    let record = |id: Uuid| bench.storage().join(".vzdump/commits").join(id.to_string());
    let name = "vzdump-qemu-1-2026_01_02-03_04_05";
    let committing = format!(r#"{{"state":"committing","archive":"{name}"}}"#);
    for by_activation in [false, true] {
        // Before the rename: record and temporary directory, whose lock nobody holds.
        let id = Uuid::new_v4();
        let directory = bench.storage().join(format!(".tmp-{name}"));
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("lock"), "").unwrap();
        std::fs::write(directory.join("committing"), id.to_string()).unwrap();
        std::fs::write(record(id), &committing).unwrap();
        if by_activation {
            bench.provider.activate(&bench.call).await.unwrap();
            assert!(leftovers(&bench).is_empty());
        }
        assert_eq!(outcome(&bench, id).await, CommitOutcome::NotCommitted);
        assert!(leftovers(&bench).is_empty());
        assert_eq!(outcome(&bench, id).await, CommitOutcome::NotCommitted);
    }
    // After the rename, but before the notes of the run are gone.
    let id = Uuid::new_v4();
    let archive = complete(&bench).await.commit(id, &bench.call).await.unwrap().archive;
    let notes = ["lock", "committing"].map(|note| bench.storage().join(&archive).join(note));
    notes.iter().for_each(|note| std::fs::write(note, id.to_string()).unwrap());
    assert_eq!(outcome(&bench, id).await, CommitOutcome::Committed { archive: archive.clone() });
    assert!(!notes.iter().any(|note| note.exists()));
    // After the archive was removed again.
    std::fs::remove_dir_all(bench.storage().join(&archive)).unwrap();
    assert_eq!(outcome(&bench, id).await, CommitOutcome::Committed { archive });
    // A damaged record is an error, not an answer.
    std::fs::write(record(id), "{").unwrap();
    let error = bench.provider.commit_outcome(id, &bench.call).await.unwrap_err();
    assert_eq!(error.kind, Kind::Corrupt);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_activation_drops_old_records_but_not_what_they_tell_of_archives() {
    let bench = Bench::new().await;
    let (old, new) = (Uuid::new_v4(), Uuid::new_v4());
    let record = |id: Uuid| bench.storage().join(".vzdump/commits").join(id.to_string());
    let archive = complete(&bench).await.commit(old, &bench.call).await.unwrap().archive;
    complete(&bench).await.commit(new, &bench.call).await.unwrap();
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_hours(91 * 24);
    let file = std::fs::File::options().write(true).open(record(old)).unwrap();
    file.set_modified(long_ago).unwrap();
    bench.provider.activate(&bench.call).await.unwrap();
    assert!(!record(old).exists() && record(new).exists());
    assert_eq!(outcome(&bench, old).await, CommitOutcome::Committed { archive });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_cancelled_while_it_waits_does_not_happen() {
    let bench = Bench::new().await;
    let guest = complete(&bench).await;
    let noted = bench.storage().join(format!(".tmp-{}/committing", guest.archive_name()));
    let lock = std::fs::File::open(bench.storage().join(".vzdump/lock")).unwrap();
    lock.lock().unwrap();
    let call = Call::default();
    let id = Uuid::new_v4();
    let cancel_when_begun = async {
        until_there(&noted).await;
        call.cancel.cancel();
    };
    let (result, ()) = tokio::join!(guest.commit(id, &call), cancel_when_begun);
    assert_eq!(result.unwrap_err().kind, Kind::Cancelled);
    drop(lock);
    assert_eq!(outcome(&bench, id).await, CommitOutcome::NotCommitted);
    assert!(leftovers(&bench).is_empty() && bench.names().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_removed_during_the_backup_fails_the_commit() {
    let bench = Bench::new().await;
    let disk = GuestDisk::create(bench.path(), "scsi0", 4 << 20, 65536);
    scribble(&disk, &mut Random::new(11), 20).await;
    let (base, _) = bench.back_up(1, &[&disk], "g1").await.unwrap();
    let mut guest = bench.start(1).await;
    copy(guest.as_mut(), &[&disk], "g2", &bench.call).await.unwrap();
    std::fs::remove_dir_all(bench.storage().join(&base)).unwrap();
    let error = guest.commit(Uuid::new_v4(), &bench.call).await.unwrap_err();
    assert!(error.message.contains(&base), "{error}");
    assert!(bench.names().await.is_empty() && leftovers(&bench).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_that_is_not_there_gives_no_outcome() {
    // "Not committed" would be a guess: its file system may just not be mounted.
    let folder = tempfile::tempdir().unwrap();
    let storage = provider(&folder.path().join("storage"));
    assert!(storage.commit_outcome(Uuid::new_v4(), &Call::default()).await.is_err());
    assert!(!folder.path().join("storage").exists());
}
