// SPDX-License-Identifier: MIT OR Apache-2.0
//! What happens to the guest in the modes of a backup, whatever fails; with a running VM. VMs that are
//! off, or are shut down, need a real QEMU: `system-tests/tests/vm_modes`.

use std::os::unix::net::UnixListener;
use std::time::Duration;

use vzdump_core::guest::BackupMode;
use vzdump_core::layout::Monitor;
use vzdump_core::tools::Tools;
use vzdump_core::vm::runner::{self, RunnerError};

use crate::crash::killed_in;
use crate::peer::{Peer, Reaction};
use crate::provider::Script;
use crate::world::{DISKS, ID, World};

fn suspending() -> World {
    let mut world = World::with("agent: 1\n", Script::default());
    world.options.mode = BackupMode::Suspend;
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_guest_is_paused_for_the_setup_alone() {
    let world = suspending();
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    let log = world.peer.log();
    let at = |name: &str| log.iter().position(|line| line.starts_with(name)).unwrap();
    assert_eq!(at("backup-access-setup"), at("stop") + 1, "{log:#?}");
    // The state is asked for between.
    assert_eq!(at("cont"), at("backup-access-setup") + 2, "{log:#?}");
    assert!(report.point_in_time.downtime_ms.is_some());
    assert_eq!(report.point_in_time.freeze, "not frozen: the guest was paused");
    let text = world.sink.text();
    for line in ["INFO: backup mode: suspend", "INFO: suspending guest", "INFO: resuming VM again"]
    {
        assert!(text.contains(line), "{line:?} is missing in\n{text}");
    }
    world.assert_clean("suspend");
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_the_guest_goes_on_before_anything_else_is_undone() {
    let commands = {
        let world = suspending();
        assert!(world.backup().await.is_success());
        world.peer.state().count
    };
    for n in 1..=commands {
        let world = suspending();
        world.peer.script(move |at, _| if at == n { Reaction::Refuse } else { Reaction::Answer });
        let report = world.backup().await;
        let log = world.peer.log();
        let what = format!("command {n} ({}) fails: {log:#?}", log[n - 1]);
        let at = |name: &str| log.iter().position(|line| line.starts_with(name));
        if let (Some(_), Some(cont), Some(undo)) =
            (at("stop"), at("cont"), at("backup-access-teardown"))
        {
            assert!(cont < undo, "{what}");
        }
        world.peer.unscript();
        if !report.is_success() {
            world.assert_clean(&what);
        }
        assert_eq!(world.recover().await, [], "{what}");
        world.assert_clean(&what);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_backup_lets_the_guest_go_on() {
    for step in ["stop", "backup-access-setup", "cont"] {
        let world = suspending();
        let cancel = world.cancel.clone();
        world.peer.script(move |_, name| {
            if name == step {
                cancel.cancel();
            }
            Reaction::Answer
        });
        let report = world.backup().await;
        assert_eq!(report.error.as_deref(), Some("the job was cancelled"), "{step}");
        assert_eq!(world.peer.state().state, "running", "{step}");
        world.peer.unscript();
        assert_eq!(world.recover().await, [], "{step}");
        world.assert_clean(step);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_every_command_of_a_suspend_is_undone_by_the_next_run() {
    let (mut killed, mut were_paused) = (0, 0);
    for n in 1.. {
        let Some(world) = killed_in(BackupMode::Suspend, n).await else { break };
        killed += 1;
        were_paused += usize::from(world.peer.state().state == "paused");
        let what = format!("killed at command {n} ({:?})", world.peer.log().last());
        assert_eq!(world.recover().await, [], "{what}: {}", world.sink.text());
        assert_eq!(world.peer.state().state, "running", "{what}");
        world.assert_clean(&what);
    }
    // Of the kill at the command itself it is open what comes first.
    assert!(killed >= 22 && were_paused >= 1, "{killed} kills, {were_paused} while paused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_guest_stays_as_it_is_in_every_mode() {
    for state in ["paused", "suspended", "io-error", "prelaunch", "shutdown"] {
        for mode in [BackupMode::Snapshot, BackupMode::Suspend, BackupMode::Stop] {
            let what = format!("{state}, {mode}");
            let mut world = suspending();
            world.options.mode = mode;
            world.peer.state().state = state;
            world.peer.script(|_, name| {
                assert!(!["stop", "cont", "system_powerdown"].contains(&name), "{name}");
                Reaction::Answer
            });
            let report = world.backup().await;
            assert!(report.is_success(), "{what}: {}", world.sink.text());
            assert_eq!(world.peer.state().state, state, "{what}");
            assert_eq!(report.point_in_time.downtime_ms, None, "{what}");
            if mode == BackupMode::Stop {
                let text = world.sink.text();
                assert!(
                    text.contains(&format!("WARN: the guest is not running ({state})")),
                    "{text}"
                );
            }
        }
    }
}

pub fn make_disks(world: &World) {
    let dir = world.root.join("state/storage/images/100");
    std::fs::create_dir_all(&dir).unwrap();
    for name in ["vm-100-disk-0.raw", "vm-100-disk-1.raw", "x.raw"] {
        std::fs::write(dir.join(name), "").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_cannot_be_started_again_is_not_shut_down() {
    // Its configuration was changed since it was started.
    let mut world = World::with("net0: virtio\n", Script::default());
    make_disks(&world);
    world.options.mode = BackupMode::Stop;
    let error = world.backup().await.error.unwrap();
    assert!(error.contains("because it could not be started again"), "{error}");
    assert!(error.contains("net0"), "{error}");
    let log = world.peer.log();
    assert_eq!(log, ["query-status"], "something was done to the VM");
    world.assert_clean("not startable");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_monitor_is_waited_for_and_not_taken_for_a_guest_that_runs_on() {
    let world = World::new();
    let socket = world.ctx.layout.qmp_socket(ID, Monitor::Runner);
    // It belongs to somebody else, who does not let go.
    let busy = UnixListener::bind(&socket).unwrap();
    let limit = Duration::from_millis(100);
    let error = runner::shut_down(&world.ctx.layout, ID, limit).await.unwrap_err();
    assert!(matches!(error, RunnerError::Qmp { .. }), "{error}");
    let free = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        drop(busy);
        let peer = Peer::start(&socket, &DISKS);
        peer.state().state = "shutdown";
        peer
    };
    let limit = Duration::from_secs(30);
    let (is_down, _peer) = tokio::join!(runner::shut_down(&world.ctx.layout, ID, limit), free);
    assert!(is_down.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_off_vm_without_a_qemu_to_start_fails_and_leaves_nothing() {
    let mut world = World::new();
    world.kill_qemu();
    world.ctx.tools = Tools::in_dir(&world.root);
    make_disks(&world);
    let report = world.backup().await;
    let error = report.error.unwrap();
    assert!(error.contains("start VM 100 for its backup"), "{error}");
    assert!(error.contains("qemu-system-x86_64"), "{error}");
    assert_eq!(world.provider.count("abort"), 1);
    world.assert_no_files("no QEMU");
    let text = world.sink.text();
    assert!(
        text.contains("INFO: status = stopped") && text.contains("backup mode: stop"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn s56_an_old_qemu_is_named_with_what_to_do() {
    let world = World::new();
    world.peer.state().lacks_access = true;
    let error = world.backup().await.error.unwrap();
    assert!(error.contains("restart the VM with the patched QEMU"), "{error}");
    assert_eq!(world.provider.count("plan_volumes"), 0);
    world.assert_clean("old QEMU");
}
