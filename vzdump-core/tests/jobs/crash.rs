// SPDX-License-Identifier: MIT OR Apache-2.0
//! kill -9 of the program at every step; the next run cleans up.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Child;
use std::sync::{Arc, Mutex};

use provider_api::GuestKind;
use vzdump_core::guest::BackupMode;
use vzdump_core::journal::recover::recover_guest_down;
use vzdump_core::journal::{Begin, Entry, Journal, Live, ProcessStamp, TaskKind};
use vzdump_core::restore::{DiskChoice, RestoreOptions, restore_vm};
use vzdump_core::vm::destroy::destroy;
use vzdump_core::vm::runner::{LIVE_LOCK, StopOptions, Stopped, stop};

use crate::peer::Reaction;
use crate::provider::{ARCHIVE, Commit, Script};
use crate::restore::stored;
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
async fn an_open_outcome_holds_up_nothing_once_the_access_is_gone() {
    for with_qemu in [true, false] {
        let mut world =
            World::with("", Script { commit: Commit::StaysPending, ..Script::default() });
        let child = Arc::new(Mutex::new(Some(world.spawn_child(Commit::DiesAfter))));
        end_of(child).await;
        if with_qemu {
            // As when its lease is over.
            world.peer.state().access = None;
            world.peer.state().exports.clear();
        } else {
            world.kill_qemu();
        }
        assert_eq!(world.recover().await, [], "{}", world.sink.text());
        let text = world.sink.text();
        assert!(text.contains("is not known (it is pending)"), "{text}");
        world.assert_no_files("open outcome");
    }
}

/// A VM without a QEMU whose backup was killed when it had shut it down, and that cannot be started.
async fn shut_down_and_killed(world: &mut World) -> PathBuf {
    world.kill_qemu();
    let layout = &world.ctx.layout;
    let begin = Begin::new(TaskKind::Backup, GuestKind::Qemu, ID, "store").unwrap();
    let journal = Journal::create(layout, begin).await.unwrap();
    let mut process = ProcessStamp::current().unwrap();
    process.process.start_time_ticks += 1;
    let dir = layout.run().join("b-0");
    std::fs::create_dir_all(&dir).unwrap();
    let entries =
        [Entry::Qemu { process }, Entry::ShutDown, Entry::Directory { path: dir.clone() }];
    for entry in entries {
        journal.append(entry).await.unwrap();
    }
    dir
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_cannot_be_started_again_does_not_keep_the_rest_from_being_undone() {
    let mut world = World::new();
    let dir = shut_down_and_killed(&mut world).await;
    let left = world.recover().await;
    assert!(left[0].reason.contains("start VM 100 again"), "{left:?}");
    assert!(left[0].reason.contains("start or stop the VM yourself"), "{left:?}");
    assert!(!dir.exists(), "the rest was not undone");
    // A stop by hand says that it need not run.
    let options = StopOptions::default();
    assert_eq!(stop(&world.ctx.layout, ID, options).await.unwrap(), Stopped::NotRunning);
    assert_eq!(world.recover().await, [], "{}", world.sink.text());
    world.assert_no_files("stopped by hand");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_replaces_or_removes_a_guest_does_not_start_it_first() {
    let mut world = World::new();
    shut_down_and_killed(&mut world).await;
    let left = recover_guest_down(&world.ctx, GuestKind::Qemu, ID, &world.sink).await.unwrap();
    assert_eq!(left, [], "{}", world.sink.text());
    assert!(world.sink.text().contains("is not started again"), "{}", world.sink.text());
    world.assert_no_files("stays down");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_refused_leaves_it_to_others_to_start_the_guest() {
    let force = || RestoreOptions { force: true, ..RestoreOptions::default() };
    let missing = DiskChoice { device: "scsi7".into(), target: None };
    let one_disk = RestoreOptions { disks: vec![missing], ..RestoreOptions::default() };
    for (lines, archive, options, words) in [
        ("", ARCHIVE, RestoreOptions::default(), "exists already"),
        ("", ARCHIVE, one_disk, "has no disk 'scsi7'"),
        ("protection: 1\n", ARCHIVE, force(), "is protected"),
        ("lock: backup\n", ARCHIVE, force(), "is locked (backup)"),
        ("", "bad/../name", force(), "name"),
        ("", "", force(), "configuration"),
    ] {
        let mut world = World::with(lines, Script::default());
        let stored = stored(&world.root.canonicalize().unwrap());
        {
            let mut script = world.provider.0.script.lock().unwrap();
            script.restore = Some(stored);
            // Which is not there.
            script.fail = archive.is_empty().then_some("guest_config");
        }
        let archive = if archive.is_empty() { ARCHIVE } else { archive };
        shut_down_and_killed(&mut world).await;
        let World { ctx, provider, sink, cancel, .. } = &world;
        let report = restore_vm(ctx, provider, archive, ID, &options, sink, cancel).await;
        let error = report.error.unwrap();
        assert!(error.contains(words), "{words}: {error}");
        assert!(!world.journals().is_empty(), "{words}");
        assert!(!world.sink.text().contains("is not started again"), "{}", world.sink.text());
        let left = world.recover().await;
        assert!(left[0].reason.contains("start VM 100 again"), "{words}: {left:?}");
        // One that is not refused does not start it.
        world.provider.0.script.lock().unwrap().fail = None;
        if words == "exists already" {
            let World { ctx, provider, sink, cancel, .. } = &world;
            let report = restore_vm(ctx, provider, ARCHIVE, ID, &force(), sink, cancel).await;
            assert!(report.is_success(), "{}", world.sink.text());
            assert!(world.sink.text().contains("is not started again"));
            assert!(world.journals().is_empty());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_a_live_restore_does_not_keep_its_number() {
    let mut world = World::with(&format!("lock: {LIVE_LOCK}\n"), Script::default());
    let stored = stored(&world.root.canonicalize().unwrap());
    world.provider.0.script.lock().unwrap().restore = Some(stored);
    died_live(&mut world).await;
    let World { ctx, provider, sink, cancel, .. } = &world;
    let options = RestoreOptions::default();
    let report = restore_vm(ctx, provider, ARCHIVE, ID, &options, sink, cancel).await;
    assert!(report.is_success(), "{}", world.sink.text());
    assert!(world.journals().is_empty());
}

/// A live restore died before its guest ran.
async fn died_live(world: &mut World) {
    world.kill_qemu();
    let layout = &world.ctx.layout;
    let begin = Begin::new(TaskKind::Restore, GuestKind::Qemu, ID, "store").unwrap();
    let journal = Journal::create(layout, begin).await.unwrap();
    let dir = layout.run().join("live-100");
    let live = Live { dir, limit_bytes_per_s: None, disks: Vec::new() };
    journal.append(Entry::Live(live)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_removed_whose_recovery_locks_its_power_state() {
    let mut world = World::with(&format!("lock: {LIVE_LOCK}\n"), Script::default());
    died_live(&mut world).await;
    destroy(&world.ctx, ID, &world.sink).await.unwrap();
    assert!(!world.ctx.layout.vm_config_path(ID).exists());
    world.assert_no_files("removed");
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
    let first = serde_json::to_string(&Entry::Begin(begin)).unwrap();
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
    let path = vzdump_core::job::backup_lock_path(&world.ctx.layout, GuestKind::Qemu, ID);
    let _held = vzdump_core::lock::FileLock::try_acquire(&path, "VM 100").unwrap();
    let recovered = recover_all(&world.ctx, &world.sink).await.unwrap();
    assert_eq!((recovered.cleared.len(), recovered.busy.len()), (0, 1), "{recovered:?}");
    assert!(world.peer.state().access.is_some());
}
