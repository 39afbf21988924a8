// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every failure and cancellation: nothing is left behind, and the bitmap is settled only by a
//! commit.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::sync::Notify;
use vzdump_core::job::report::GuestResult;

use crate::peer::Reaction;
use crate::provider::{Commit, Script};
use crate::world::{ID, World};

/// How many commands a backup without a fault sends.
async fn commands_of_a_backup() -> usize {
    let world = World::new();
    assert!(world.backup().await.is_success());
    world.peer.state().count
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_that_fails_is_undone_by_the_job_or_the_next_one() {
    for n in 1..=commands_of_a_backup().await {
        let world = World::new();
        world.peer.script(move |at, _| if at == n { Reaction::Refuse } else { Reaction::Answer });
        let report = world.backup().await;
        let what = format!("command {n} ({}) fails", world.peer.log()[n - 1]);
        world.assert_truthful(&what);
        assert_eq!(report.is_success(), world.provider.committed() == 1, "{what}: {report:?}");
        assert_eq!(report.is_success(), report.error.is_none(), "{what}: {report:?}");
        world.peer.unscript();
        if !report.is_success() {
            // Nothing on the way to the commit needs a second try.
            world.assert_clean(&what);
            assert_eq!(world.provider.count("abort"), 1, "{what}");
        }
        assert_eq!(world.provider.count("finish"), 1, "{what}");
        assert_eq!(world.recover().await, [], "{what}");
        world.assert_clean(&what);
        let again = world.backup().await;
        assert!(again.is_success(), "{what}: no backup afterwards: {again:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_of_the_provider_that_fails_is_undone() {
    for call in ["start_guest", "plan_volumes", "backup_vm", "commit"] {
        let world = World::with("", Script { fail: Some(call), ..Script::default() });
        let report = world.backup().await;
        assert_eq!(report.result, GuestResult::Failed, "{call}");
        let error = report.error.unwrap();
        assert!(error.contains(&format!("scripted failure of {call}")), "{call}: {error}");
        world.assert_clean(call);
        world.assert_truthful(call);
        let aborts = usize::from(call != "start_guest" && call != "commit");
        assert_eq!(world.provider.count("abort"), aborts, "{call}");
        assert_eq!(world.provider.count("finish"), 1, "{call}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_cleanup_does_not_hide_the_first_error() {
    let world = World::with("", Script { fail: Some("backup_vm"), ..Script::default() });
    world.peer.script(|_, name| {
        let is_undo = matches!(name, "nbd-server-stop" | "blockdev-del");
        if is_undo { Reaction::Refuse } else { Reaction::Answer }
    });
    let report = world.backup().await;
    assert!(report.error.unwrap().contains("scripted failure of backup_vm"));
    assert!(report.warnings.len() >= 2, "{:?}", report.warnings);
    assert_eq!(world.journals().len(), 1, "the journal must stay");
    world.peer.unscript();
    assert_eq!(world.recover().await, []);
    world.assert_clean("recovered");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_of_exports_that_do_not_end_is_not_stopped() {
    let world = World::new();
    // As when a read of a fleecing image hangs.
    world.peer.script(|_, name| {
        if name == "backup-access-teardown" { Reaction::Refuse } else { Reaction::Answer }
    });
    let report = world.backup().await;
    assert!(report.is_success(), "{report:?}");
    assert!(
        report
            .warnings
            .iter()
            .any(|warning| warning.contains("it still has exports: vzdump-scsi0")),
        "{report:?}"
    );
    let left = world.recover().await;
    assert!(left[0].reason.contains("end the backup access"), "{left:?}");
    assert!(!world.peer.log().iter().any(|line| line == "nbd-server-stop"));
    assert_eq!(world.journals().len(), 1, "the journal must stay");
    world.peer.unscript();
    assert_eq!(world.recover().await, []);
    world.assert_clean("recovered");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_stop_is_stopped_by_the_recovery() {
    let world = World::new();
    world.peer.script(
        |_, name| {
            if name == "nbd-server-stop" { Reaction::Refuse } else { Reaction::Answer }
        },
    );
    assert!(world.backup().await.is_success());
    assert_eq!(world.recover().await.len(), 1);
    world.peer.unscript();
    assert_eq!(world.recover().await, []);
    world.assert_clean("recovered");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nbd_server_of_somebody_else_is_left_alone() {
    let world = World::new();
    world.peer.state().server = true;
    let error = world.backup().await.error.unwrap();
    assert!(error.contains("already running"), "{error}");
    assert!(world.peer.state().server && world.peer.state().access.is_none());
    world.assert_no_files("somebody else's server");
    // The same for the recovery of a backup that died then.
    let child = world.spawn_child(Commit::Works);
    let pid = rustix::process::Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    world.peer.script(move |_, name| {
        if name == "nbd-server-start" {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            return Reaction::Silent;
        }
        Reaction::Answer
    });
    let mut child = child;
    tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
    world.peer.unscript();
    assert_eq!(world.journals().len(), 1);
    assert_eq!(world.recover().await, [], "{}", world.sink.text());
    assert!(world.peer.state().server && world.peer.state().access.is_none());
    world.assert_no_files("recovered");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_failed_commit_the_outcome_decides() {
    for (commit, result, success) in [
        (Commit::WorksButFails, GuestResult::Committed, true),
        (Commit::Fails, GuestResult::Failed, false),
        (Commit::StaysPending, GuestResult::Unknown, false),
        (Commit::Hangs, GuestResult::Failed, false),
    ] {
        let world = World::with("", Script { commit, ..Script::default() });
        let report = world.backup().await;
        assert_eq!(report.result, result, "{commit:?}: {}", world.sink.text());
        let teardown = format!("backup-access-teardown success={success}");
        assert!(world.peer.log().contains(&teardown), "{commit:?}");
        assert_eq!(world.provider.count("abort"), 0, "{commit:?}: consumed twice");
        let asked = if commit == Commit::StaysPending { 3 } else { 1 };
        assert_eq!(world.provider.count("commit_outcome"), asked, "{commit:?}");
        world.assert_clean(&format!("{commit:?}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_archive_name_is_refused() {
    let script = Script { archive_name: Some("../x".into()), ..Script::default() };
    let world = World::with("", script);
    let report = world.backup().await;
    assert!(report.error.unwrap().contains("'.' or '..' part"));
    assert_eq!(world.provider.count("abort"), 1);
    world.assert_clean("bad name");
}

/// A world whose provider waits in the middle of its copy.
fn holding() -> (World, Arc<(Notify, Notify)>) {
    let hold = Arc::new((Notify::new(), Notify::new()));
    (World::with("", Script { hold: Some(Arc::clone(&hold)), ..Script::default() }), hold)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_snapshot_fails_the_job_with_its_reason() {
    let (world, hold) = holding();
    let break_it = async {
        hold.0.notified().await;
        let event = |target: &str, state: &str| {
            json!({"event": "BACKUP_ACCESS_BROKEN", "timestamp": {"seconds": 1, "microseconds": 2},
                "data": {"target-id": target, "device": "drive-scsi0", "node-name": "n",
                    "state": state, "error": "fleecing image is full"}})
        };
        world.peer.send_event(event("vzdump:other", "broken"));
        world.peer.send_event(event("vzdump:store", "degraded"));
        world.peer.send_event(event("vzdump:store", "broken"));
    };
    let (report, ()) = tokio::join!(world.backup(), break_it);
    let error = report.error.unwrap();
    assert!(error.contains("drive-scsi0") && error.contains("fleecing image is full"), "{error}");
    assert!(world.sink.text().contains("WARN: the snapshot of 'drive-scsi0' is incomplete"));
    world.assert_clean("broken");
    world.assert_truthful("broken");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_access_has_a_lease_and_that_it_is_over_fails_the_job_with_its_reason() {
    let (world, hold) = holding();
    let end_it = async {
        hold.0.notified().await;
        let event = |target: &str| {
            json!({"event": "BACKUP_ACCESS_TORN_DOWN",
                "timestamp": {"seconds": 1, "microseconds": 2},
                "data": {"target-id": target, "success": false, "reason": "its lease ended"}})
        };
        // Of another target, and of an earlier access of ours: this one is still there.
        world.peer.send_event(event("vzdump:other"));
        world.peer.send_event(event("vzdump:store"));
        tokio::time::timeout(Duration::from_secs(20), async {
            while !world.peer.log().contains(&"query-backup-access".to_owned()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("the job asks whether its access is gone");
        let access = world.peer.state().access.take().unwrap();
        world.peer.state().exports.clear();
        assert_eq!(access.lease_s, Some(60));
        world.peer.send_event(event("vzdump:store"));
    };
    let (report, ()) = tokio::join!(world.backup(), end_it);
    let error = report.error.unwrap();
    assert!(error.contains("ended the backup access: its lease ended"), "{error}");
    world.assert_clean("lease");
    world.assert_truthful("lease");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_ends_fails_the_job_and_frees_the_files() {
    let (mut world, hold) = holding();
    let World { ctx, provider, options, sink, cancel, .. } = &world;
    let (ctx, provider, options) = (ctx.clone(), provider.clone(), options.clone());
    let (cancel, _) = (cancel.clone(), sink);
    let job = tokio::spawn(async move {
        let sink = vzdump_core::task_log::NoLog;
        vzdump_core::job::run_backup(&ctx, &[ID], &provider, &options, &sink, &cancel).await
    });
    hold.0.notified().await;
    world.kill_qemu();
    let report = tokio::time::timeout(Duration::from_secs(60), job).await.unwrap().unwrap();
    let guest = &report.guests[0];
    assert!(guest.error.as_ref().unwrap().contains("VM 100 ended"), "{guest:?}");
    assert_eq!(world.provider.count("abort"), 1);
    world.assert_no_files("QEMU ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn cancellation_at_every_command_is_orderly() {
    for n in 1..=commands_of_a_backup().await {
        for reaction in [Reaction::Answer, Reaction::Silent] {
            let world = World::new();
            let cancel = world.cancel.clone();
            let is_way_to_commit = n <= 10;
            if reaction == Reaction::Silent && !is_way_to_commit {
                // A silent undo only runs into its own time limit.
                continue;
            }
            world.peer.script(move |at, _| {
                if at == n {
                    cancel.cancel();
                    return reaction;
                }
                Reaction::Answer
            });
            let report = world.backup().await;
            let what = format!("cancelled at command {n}, {reaction:?}: {report:?}");
            world.assert_truthful(&what);
            assert_eq!(report.is_success(), world.provider.committed() == 1, "{what}");
            if is_way_to_commit {
                assert_eq!(report.error.as_deref(), Some("the job was cancelled"), "{what}");
            }
            // A setup that QEMU granted after we gave up is ended in the background.
            for _ in 0..200 {
                if world.peer.state().access.is_none() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            world.peer.unscript();
            assert_eq!(world.recover().await, [], "{what}");
            world.assert_clean(&what);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cancellation_while_the_provider_copies_is_orderly() {
    let (world, hold) = holding();
    let cancel = async {
        hold.0.notified().await;
        world.cancel.cancel();
    };
    let (report, ()) = tokio::join!(world.backup(), cancel);
    assert_eq!(report.error.as_deref(), Some("the job was cancelled"));
    assert_eq!(world.provider.count("abort"), 1);
    world.assert_clean("cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_backups_of_one_guest_do_not_meet() {
    let (world, hold) = holding();
    let log = world.ctx.layout.log_dir().join("qemu-100.log");
    let second = async {
        hold.0.notified().await;
        let before = std::fs::read_to_string(&log).unwrap();
        let report = world.backup().await;
        let after = std::fs::read_to_string(&log).unwrap();
        assert_eq!(before, after, "the log of the running backup was touched");
        assert_eq!(report.log_path, None);
        hold.1.notify_one();
        report
    };
    let (first, second) = tokio::join!(world.backup(), second);
    assert!(first.is_success(), "{first:?}");
    assert!(second.error.unwrap().contains("in use by another task"));
    world.assert_clean("two");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_may_take_longer_to_become_ready_than_for_a_call() {
    let mut world = World::new();
    world.provider.0.script.lock().unwrap().activation = Duration::from_millis(1500);
    world.ctx.limits.provider_call = Duration::from_secs(1);
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    world.ctx.limits.activate = Duration::from_millis(10);
    let World { ctx, provider, options, sink, cancel, .. } = &world;
    let report = vzdump_core::job::run_backup(ctx, &[ID], provider, options, sink, cancel).await;
    assert!(report.error.unwrap().contains("did not become ready within"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_stands_still_fails_the_job() {
    let (mut world, _hold) = holding();
    world.ctx.limits.transfer_stall = Duration::from_millis(100);
    let report = world.backup().await;
    assert!(report.error.unwrap().contains("no progress"), "{}", world.sink.text());
    world.assert_clean("stalled");
}

/// The NBD server of the scripted QEMU is none, so the old data cannot be dropped: that costs the guest
/// something, and the backup nothing.
#[tokio::test(flavor = "multi_thread")]
async fn old_data_that_cannot_be_dropped_before_a_slow_commit_is_a_warning() {
    for commit in [Commit::Works, Commit::Fails] {
        let world = World::with("", Script { is_slow: true, commit, ..Script::default() });
        let report = world.backup().await;
        let what = format!("{commit:?}");
        assert_eq!(report.is_success(), commit == Commit::Works, "{what}: {report:?}");
        let warning = report.warnings.iter().find(|text| text.contains("drop the old data"));
        assert!(warning.is_some_and(|text| text.contains("scsi0")), "{what}: {report:?}");
        assert_eq!((world.provider.count("commit"), world.provider.count("abort")), (1, 0));
        world.assert_truthful(&what);
        world.assert_clean(&what);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_commit_is_asked_for_until_it_is_known() {
    let commit = Commit::PendingFor(5);
    for (is_slow, result) in [(true, GuestResult::Committed), (false, GuestResult::Unknown)] {
        let world = World::with("", Script { is_slow, commit, ..Script::default() });
        let report = world.backup().await;
        assert_eq!(report.result, result, "{}", world.sink.text());
        let asked = if is_slow { 6 } else { 3 };
        assert_eq!(world.provider.count("commit_outcome"), asked);
    }
    // Neither for ever, nor for somebody who has no time.
    for is_cancelled in [false, true] {
        let script = Script { is_slow: true, commit: Commit::StaysPending, ..Script::default() };
        let mut world = World::with("", script);
        if !is_cancelled {
            world.ctx.limits.slow_commit = Duration::from_millis(1000);
        }
        let (provider, cancel) = (world.provider.clone(), world.cancel.clone());
        let watch = async {
            while is_cancelled && provider.count("commit_outcome") < 4 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            if is_cancelled {
                cancel.cancel();
            }
        };
        let (report, ()) = tokio::join!(world.backup(), watch);
        assert_eq!(report.result, GuestResult::Unknown, "{}", world.sink.text());
        assert!(world.provider.count("commit_outcome") > 3);
    }
    // It was cancelled before.
    let script = Script { is_slow: true, commit: Commit::StaysPending, ..Script::default() };
    let mut world = World::with("", script);
    world.ctx.limits.outcome_delay = Duration::from_millis(200);
    let (provider, cancel) = (world.provider.clone(), world.cancel.clone());
    let watch = async {
        while provider.count("commit_outcome") < 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        cancel.cancel();
    };
    let (report, ()) = tokio::join!(world.backup(), watch);
    assert_eq!(report.result, GuestResult::Unknown, "{}", world.sink.text());
    assert_eq!(world.provider.count("commit_outcome"), 3);
    assert!(!world.sink.text().contains("asked for until"), "{}", world.sink.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_provider_that_fails_before_its_commit_loses_nothing() {
    let script = Script { is_slow: true, fail: Some("backup_vm"), ..Script::default() };
    let world = World::with("", script);
    let report = world.backup().await;
    assert_eq!(report.result, GuestResult::Failed);
    assert!(report.warnings.is_empty(), "{report:?}");
    assert_eq!((world.provider.count("commit"), world.provider.count("abort")), (0, 1));
    world.assert_clean("a slow provider");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_that_a_vm_and_a_container_have_is_not_backed_up_as_one_of_them() {
    let world = World::new();
    let path = world.ctx.layout.ct_config_path(ID);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, "hostname: ct\n").unwrap();
    let report = world.backup().await;
    let error = report.error.as_deref().unwrap_or_default();
    assert!(error.contains("there are a VM and a container with the number 100"), "{report:?}");
    assert_eq!(world.provider.committed(), 0);
}
