// SPDX-License-Identifier: MIT OR Apache-2.0
//! kill -9 of the program at every step; the next run cleans up.

use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::sync::{Arc, Mutex};

use vzdump_core::guest::BackupMode;

use crate::peer::Reaction;
use crate::provider::{Commit, Script};
use crate::world::{ID, World};

/// Waits for the child without blocking the peer's tasks.
async fn end_of(child: Arc<Mutex<Option<Child>>>) -> std::process::ExitStatus {
    tokio::task::spawn_blocking(move || {
        let mut child = loop {
            if let Some(child) = child.lock().unwrap().take() {
                break child;
            }
            std::thread::yield_now();
        };
        child.wait().unwrap()
    })
    .await
    .unwrap()
}

/// Runs a backup in a child that is killed at its `n`th command, after QEMU executed it. `None`
/// if it ended before.
async fn killed_at(n: usize) -> Option<World> {
    killed_in(BackupMode::Snapshot, n).await
}

/// The same in a mode of the backup.
pub async fn killed_in(mode: BackupMode, n: usize) -> Option<World> {
    let mut world = World::new();
    world.options.mode = mode;
    let child = Arc::new(Mutex::new(None::<Child>));
    let victim = Arc::clone(&child);
    let pid = Arc::new(Mutex::new(None));
    let known = Arc::clone(&pid);
    world.peer.script(move |at, _| {
        if at < n {
            return Reaction::Answer;
        }
        // The lock is only free once the test knows its child.
        let pid: u32 = loop {
            if let Some(pid) = *known.lock().unwrap() {
                break pid;
            }
            std::thread::yield_now();
        };
        let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
        // What was sent before the kill comes after it; the child may be gone by then.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        Reaction::Silent
    });
    let spawned = world.spawn_child(Commit::Works);
    *pid.lock().unwrap() = Some(spawned.id());
    *victim.lock().unwrap() = Some(spawned);
    let status = end_of(child).await;
    world.peer.unscript();
    (status.signal() == Some(9)).then_some(world)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_every_command_is_cleaned_up_by_the_next_run() {
    let mut killed = 0;
    for n in 1.. {
        let Some(world) = killed_at(n).await else { break };
        killed += 1;
        let what = format!("killed at command {n} ({:?})", world.peer.log().last());
        let is_committed = world.provider.committed() == 1;
        let torn_down_before =
            world.peer.log().iter().any(|line| line.starts_with("backup-access-teardown"));
        assert_eq!(world.journals().len(), 1, "{what}");
        assert_eq!(world.recover().await, [], "{what}: {}", world.sink.text());
        world.assert_clean(&what);
        world.assert_truthful(&what);
        if is_committed && !torn_down_before {
            // Else the next increment would be larger than need be.
            let settled = "backup-access-teardown success=true".to_owned();
            assert!(world.peer.log().contains(&settled), "{what}: {:#?}", world.peer.log());
        }
        // Again finds nothing to do, and a backup works.
        assert_eq!(world.recover().await, [], "{what}");
        assert!(world.backup().await.is_success(), "{what}");
    }
    assert!(killed >= 18, "only {killed} commands were seen");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_and_an_end_of_qemu_leave_only_files_to_remove() {
    for n in [3, 5, 6, 7, 9, 11, 14, 16] {
        let mut world = killed_at(n).await.unwrap();
        world.kill_qemu();
        assert_eq!(world.recover().await, [], "killed at {n}: {}", world.sink.text());
        world.assert_no_files(&format!("killed at {n}, QEMU dead"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_within_the_commit_is_settled_by_its_outcome() {
    for (commit, success) in [(Commit::DiesBefore, false), (Commit::DiesAfter, true)] {
        let world = World::new();
        let child = Arc::new(Mutex::new(Some(world.spawn_child(commit))));
        assert!(end_of(child).await.signal().is_some(), "{commit:?}");
        assert!(world.peer.state().access.is_some(), "{commit:?}");
        assert_eq!(world.recover().await, [], "{commit:?}");
        let teardown = format!("backup-access-teardown success={success}");
        assert!(world.peer.log().contains(&teardown), "{commit:?}: {:#?}", world.peer.log());
        world.assert_clean(&format!("{commit:?}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_torn_down_while_the_outcome_is_open() {
    let world = World::with("", Script { commit: Commit::StaysPending, ..Script::default() });
    let child = Arc::new(Mutex::new(Some(world.spawn_child(Commit::DiesAfter))));
    end_of(child).await;
    let left = world.recover().await;
    assert_eq!(left.len(), 1);
    assert!(left[0].reason.contains("is not known yet (it is pending)"), "{left:?}");
    assert!(world.peer.state().access.is_some(), "an open commit was decided");
    // A new backup says so too, and touches nothing.
    let report = world.backup().await;
    assert!(report.error.unwrap().contains("not cleaned up"));
    // Once it is known, all goes on.
    world.provider.0.script.lock().unwrap().commit = Commit::Works;
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    world.assert_clean("settled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_lives_on_without_the_lock_does_not_stop_the_recovery() {
    let world = killed_at(9).await.unwrap();
    let path = world.journals().remove(0);
    let mut begin = vzdump_core::journal::read(&path).unwrap().begin;
    // Some process that lives: the one that stands for QEMU.
    let text = std::fs::read_to_string(&path).unwrap();
    let (_, rest) = text.split_once('\n').unwrap();
    begin.owner = vzdump_core::journal::read(&path).unwrap().qemu.unwrap();
    assert!(begin.owner.is_alive());
    let first = serde_json::to_string(&vzdump_core::journal::Entry::Begin(begin)).unwrap();
    std::fs::write(&path, format!("{first}\n{rest}")).unwrap();
    assert_eq!(world.recover().await, [], "{}", world.sink.text());
    assert!(world.sink.text().contains("still runs, but no longer works on guest 100"));
    world.assert_clean("owner lives");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_cleans_up_too() {
    use vzdump_core::journal::recover::recover_all;
    let world = killed_at(9).await.unwrap();
    let recovered = recover_all(&world.ctx, &world.sink).await.unwrap();
    assert_eq!((recovered.cleared.len(), recovered.left.len()), (1, 0), "{recovered:?}");
    world.assert_clean("doctor");
    // A guest that is being worked on is left alone.
    let world = killed_at(9).await.unwrap();
    let path =
        vzdump_core::job::backup_lock_path(&world.ctx.layout, provider_api::GuestKind::Qemu, ID);
    let _held = vzdump_core::lock::FileLock::try_acquire(&path, "VM 100").unwrap();
    let recovered = recover_all(&world.ctx, &world.sink).await.unwrap();
    assert_eq!((recovered.cleared.len(), recovered.busy.len()), (0, 1), "{recovered:?}");
    assert!(world.peer.state().access.is_some());
}
