// SPDX-License-Identifier: MIT OR Apache-2.0
//! kill -9 of the program at every step that has to do with the VM's power; `doctor --fix` restores it.

use crate::sector::Guest;
use crate::site::Site;

/// Every line of the journal and every action of a backup, in their order.
const STEPS: [&str; 24] = [
    "entry:archive",
    "Prepare",
    "EnterMode",
    "entry:shut_down",
    "entry:start",
    "entry:qemu",
    "entry:keep_alive",
    "PlanVolumes",
    "Acquire",
    "entry:fleecing",
    "PointInTime",
    "entry:access",
    "Resume",
    "entry:resumed",
    "OpenSource",
    "entry:nbd_server",
    "Transfer",
    "entry:committing",
    "entry:outcome",
    "Teardown",
    "CloseSource",
    "Release",
    "LeaveMode",
    "Cleanup",
];

/// Steps that a backup does not have if its VM was off.
const OF_STOP_ONLY: [&str; 2] = ["entry:shut_down", "entry:resumed"];

#[test]
fn a_kill_at_every_step_of_a_stopped_vm_leaves_it_off() {
    let site = Site::new(Guest::Writes);
    for step in STEPS.into_iter().filter(|step| !OF_STOP_ONLY.contains(step)) {
        println!("killed at {step}");
        site.backup_killed_at(step, "snapshot");
        site.doctor();
        assert_eq!(site.state(), "off", "{step}");
    }
    assert_eq!(site.boots(), 0, "its guest ran");
    site.backup("snapshot").assert_good();
}

#[test]
fn a_kill_at_every_step_of_a_stop_leaves_the_vm_running() {
    let site = Site::new(Guest::Writes);
    site.start();
    for step in STEPS {
        println!("killed at {step}");
        site.backup_killed_at(step, "stop");
        site.doctor();
        site.wait_for_state("running");
        site.assert_writes();
    }
    let boots = site.boots();
    site.backup("stop").assert_good();
    site.wait_for_boot(boots + 1);
    site.power_button();
    site.wait_for_state("off");
}

#[test]
fn a_user_who_runs_the_vm_before_the_recovery_keeps_it() {
    let site = Site::new(Guest::Writes);
    site.backup_killed_at("Transfer", "snapshot");
    assert_eq!(site.state(), "prelaunch");
    site.start();
    site.doctor();
    assert_eq!(site.state(), "running");
    site.power_button();
    site.wait_for_state("off");
}

#[test]
fn a_user_who_starts_and_stops_the_vm_before_the_recovery_has_it_off() {
    let site = Site::new(Guest::Writes);
    site.start();
    site.backup_killed_at("Acquire", "stop");
    assert_eq!(site.state(), "prelaunch");
    site.start();
    site.vm(&["stop", "100"]);
    assert_eq!(site.state(), "off");
    site.doctor();
    assert_eq!(site.state(), "off", "its backup started it again");
}

#[test]
fn a_vm_that_its_backup_shut_down_is_removed_without_a_start() {
    let site = Site::new(Guest::Writes);
    site.start();
    site.backup_killed_at("Acquire", "stop");
    assert_eq!(site.state(), "prelaunch");
    // A QEMU whose guest runs would be in the way.
    site.vm(&["destroy", "100"]);
    assert!(!site.config_path(100).exists());
}

#[test]
fn a_guest_that_switched_off_after_a_kill_is_ended_by_the_next_backup() {
    let site = Site::new(Guest::Writes);
    site.start();
    site.backup_killed_at("Transfer", "snapshot");
    site.power_button();
    site.wait_for_state("shutdown");
    // Either by a stop, because no backup is under way, …
    assert_eq!(site.vm(&["stop", "100"])["stopped"], "shutdown");
    assert_eq!(site.state(), "off");
    site.doctor();
    site.start();
    site.backup_killed_at("Transfer", "snapshot");
    site.power_button();
    site.wait_for_state("shutdown");
    // … or by the recovery, after which the VM is off.
    site.backup("snapshot").assert_good().assert_says("INFO: status = stopped");
    assert_eq!(site.state(), "off");
    site.assert_tidy();
}

#[test]
fn a_kill_while_the_guest_is_paused_is_undone() {
    let site = Site::new(Guest::Writes);
    site.start();
    for step in ["entry:pause", "Resume", "entry:resumed"] {
        site.backup_killed_at(step, "suspend");
        let state = site.state();
        assert_eq!(state == "paused", step == "Resume", "{step}: {state}");
        site.doctor();
        assert_eq!(site.state(), "running", "{step}");
        site.assert_writes();
    }
}
