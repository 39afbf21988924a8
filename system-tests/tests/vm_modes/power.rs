// SPDX-License-Identifier: MIT OR Apache-2.0
//! VMs that are off, paused, or change their state while they are backed up.

use crate::sector::Guest;
use crate::site::{Disk, Site, VM};

#[test]
fn s46_a_stopped_vm_is_started_paused_and_stopped_afterwards() {
    let mut site = Site::new(Guest::Writes);
    for mode in ["snapshot", "suspend", "stop"] {
        let backup = site.backup_stopped_at("Transfer", mode);
        assert_eq!(site.state(), "prelaunch", "{mode}");
        let report = site.go_on(backup);
        report.assert_good();
        for line in [
            "INFO: status = stopped",
            "INFO: backup mode: stop",
            "INFO: starting kvm to execute backup task",
            "INFO: skipping guest-agent 'fs-freeze'",
            "INFO: stopping kvm after backup task",
        ] {
            report.assert_says(line);
        }
        assert_eq!(report.downtime(), None, "it did not run before either");
        assert_eq!(site.state(), "off", "{mode}");
        assert_eq!(site.boots(), 0, "its guest ran");
        site.assert_tidy();
        site.assert_restores(&report);
    }
}

#[test]
fn s46_a_user_who_starts_the_vm_meanwhile_keeps_his_running_vm() {
    let mut site = Site::new(Guest::Writes);
    let backup = site.backup_stopped_at("Transfer", "snapshot");
    let started = site.vm(&["start", "100"]);
    assert!(started["notices"][0].as_str().unwrap().contains("had been started before"));
    site.wait_for_boot(1);
    let report = site.go_on(backup);
    report
        .assert_good()
        .assert_says("kvm status changed after backup ('running') - keep VM running");
    assert_eq!(site.state(), "running");
    site.assert_writes();
    // The point in time was before the guest ran.
    assert_eq!(site.archived_boots(&report), 0);
    // It ends with its guest again.
    site.power_button();
    site.wait_for_state("off");
}

#[test]
fn s46_a_user_who_lets_the_vm_run_by_hand_keeps_it_too_and_one_who_stops_it_ends_the_backup() {
    let site = Site::new(Guest::Writes);
    let backup = site.backup_stopped_at("Transfer", "snapshot");
    site.qmp("cont");
    site.wait_for_boot(1);
    site.go_on(backup).assert_good();
    assert_eq!(site.state(), "running");
    site.power_button();
    site.wait_for_state("off");

    let backup = site.backup_stopped_at("Transfer", "snapshot");
    assert_eq!(site.vm(&["stop", "100"])["stopped"], "quit");
    let report = site.go_on(backup);
    assert!(
        report.error().contains("VM 100 ended while it was being backed up"),
        "{}",
        report.error()
    );
    assert_eq!(site.state(), "off");
    site.assert_tidy();
}

#[test]
fn s46_a_user_who_starts_the_vm_before_the_point_in_time_is_told_what_the_backup_is() {
    let mut site = Site::new(Guest::Writes);
    let backup = site.backup_stopped_at("PointInTime", "snapshot");
    site.start();
    let report = site.go_on(backup);
    report.assert_says("WARN: the guest was started before the point in time");
    assert_eq!((site.state().as_str(), site.archived_boots(&report)), ("running", 1));
}

#[test]
fn s47_a_guest_that_switches_off_is_backed_up_to_the_end_and_ends_then() {
    let mut site = Site::new(Guest::Writes);
    site.start();
    let backup = site.backup_stopped_at("Transfer", "snapshot");
    site.power_button();
    site.wait_for_state("shutdown");
    let report = site.go_on(backup);
    report.assert_good().assert_says("the guest has switched off during its backup; QEMU is ended");
    assert_eq!(site.state(), "off");
    site.assert_tidy();
    site.assert_restores(&report);
    // The same for a VM that was off, and was started by its user meanwhile.
    let backup = site.backup_stopped_at("Transfer", "snapshot");
    site.start();
    site.power_button();
    site.wait_for_state("shutdown");
    site.go_on(backup).assert_good();
    assert_eq!(site.state(), "off");
}

#[test]
fn s47_a_user_can_stop_and_start_the_guest_while_it_is_backed_up() {
    let mut site = Site::new(Guest::Writes);
    site.start();
    let backup = site.backup_stopped_at("Transfer", "snapshot");
    assert_eq!(site.vm(&["stop", "100"])["stopped"], "shutdown_in_backup");
    assert_eq!(site.state(), "shutdown");
    assert_eq!(site.vm(&["stop", "100"])["stopped"], "shutdown_in_backup", "once more");
    site.start();
    assert_eq!(site.boots(), 2);
    let report = site.go_on(backup);
    report.assert_good();
    assert_eq!(site.state(), "running");
    site.assert_writes();
    assert_eq!(site.archived_boots(&report), 1);
}

#[test]
fn s47_a_reset_during_the_backup_works() {
    let mut site = Site::new(Guest::Writes);
    site.start();
    let backup = site.backup_stopped_at("Transfer", "snapshot");
    site.qmp("system_reset");
    site.wait_for_boot(2);
    let report = site.go_on(backup);
    report.assert_good();
    assert_eq!((site.state().as_str(), site.archived_boots(&report)), ("running", 1));
    site.assert_restores(&report);
}

#[test]
fn s47_a_qemu_that_its_administrator_has_stay_stays() {
    let site = Site::with(Guest::Writes, "args: -no-shutdown\n", &[Disk::raw("virtio0", 1 << 20)]);
    site.start();
    let backup = site.backup_stopped_at("Transfer", "snapshot");
    site.power_button();
    site.wait_for_state("shutdown");
    site.go_on(backup).assert_good();
    assert_eq!(site.state(), "shutdown");
    // Without a backup there is nothing to wait for.
    assert_eq!(site.vm(&["stop", "100"])["stopped"], "shutdown");
    assert_eq!(site.state(), "off");
}

#[test]
fn s45_a_paused_vm_stays_paused_and_a_suspended_one_suspended() {
    let mut site = Site::new(Guest::Writes);
    site.start();
    site.qmp("stop");
    for mode in ["snapshot", "suspend", "stop"] {
        let report = site.backup(mode);
        report.assert_good();
        assert_eq!((site.state().as_str(), report.downtime()), ("paused", None), "{mode}");
        if mode == "stop" {
            report.assert_says("WARN: the guest is not running (paused), so it cannot shut down");
        }
    }
    let report = site.backup("snapshot");
    site.qmp("cont");
    site.assert_writes();
    site.assert_restores(&report);
    drop(site);

    let site = Site::new(Guest::Sleeps);
    site.vm(&["start", "100"]);
    site.wait_for_state("suspended");
    for mode in ["snapshot", "suspend", "stop"] {
        site.backup(mode).assert_good();
        assert_eq!(site.state(), "suspended", "{mode}");
    }
    site.assert_tidy();
}

#[test]
fn s45_a_vm_that_was_started_paused_by_its_user_is_not_stopped() {
    let site = Site::new(Guest::Writes);
    site.vm(&["start", "100", "--paused"]);
    site.backup("snapshot").assert_good();
    assert_eq!(site.state(), "prelaunch");
}

#[test]
fn suspend_pauses_the_guest_for_a_moment_only() {
    let mut site = Site::new(Guest::Writes);
    site.start();
    let backup = site.backup_stopped_at("Resume", "suspend");
    assert_eq!(site.state(), "paused");
    let report = site.go_on(backup);
    report
        .assert_good()
        .assert_says("INFO: suspending guest")
        .assert_says("INFO: resuming VM again");
    assert!(report.downtime().is_some());
    assert_eq!(site.state(), "running");
    site.assert_writes();
    site.assert_restores(&report);
}

#[test]
fn s52_a_template_is_backed_up_and_never_runs() {
    let disks = [
        Disk::raw("sata0", 1 << 20),
        Disk { key: "scsi3", options: "", format: "qcow2", size_bytes: 1 << 20 },
    ];
    let mut site = Site::with(Guest::Writes, "template: 1\n", &disks);
    for number in ["0.raw", "1.qcow2"] {
        let path = site.path(&format!("local/images/100/vm-100-disk-{number}"));
        let mut rights = std::fs::metadata(&path).unwrap().permissions();
        rights.set_readonly(true);
        std::fs::set_permissions(&path, rights).unwrap();
    }
    let backup = site.backup_stopped_at("Transfer", "snapshot");
    let nodes = site.qmp("query-named-block-nodes");
    let is_writable = |node: &&serde_json::Value| {
        let name = node["node-name"].as_str().unwrap_or_default();
        ["drive-sata0", "drive-scsi3"].contains(&name) && node["ro"] == false
    };
    assert_eq!(nodes.as_array().unwrap().iter().filter(is_writable).count(), 0, "{nodes}");
    let refused = site.try_vm(&["start", "100"]);
    assert!(refused.stderr.contains("nothing but its disks"), "{}", refused.stderr);
    let report = site.go_on(backup);
    report.assert_good();
    assert_eq!(site.state(), "off");
    site.assert_restores(&report);
    assert!(!site.try_vm(&["start", "100"]).status.success(), "a template was started");
}

#[test]
fn s53_a_vm_without_disks_gives_an_archive_with_its_configuration_and_no_qemu() {
    let site = Site::with(Guest::Writes, "ide2: none,media=cdrom\n", &[]);
    for mode in ["snapshot", "stop"] {
        let report = site.backup(mode);
        report.assert_good().assert_says("only its configuration is kept");
        let archive = format!("backups:backup/{}", report.guest["archive"].as_str().unwrap());
        let shown = site.vzdump.run(&["show-config", &archive], crate::site::SOON).unwrap();
        assert!(shown.to_string().contains("name: sector"), "{shown}");
        assert!(!report.lines.contains("starting kvm"), "{}", report.lines);
    }
    assert!(!site.path(&format!("run/vm/{VM}/qemu.log")).exists(), "QEMU was started");
}

#[test]
fn a_stopped_vm_with_unknown_keys_is_backed_up_and_its_guest_cannot_run_meanwhile() {
    let site = Site::with(
        Guest::Writes,
        "net0: virtio=AA:BB:CC:DD:EE:FF,bridge=vmbr0\nbios: ovmf\nmachine: virt\n",
        &[Disk::raw("virtio0", 1 << 20), Disk::raw("efidisk0", 540_672)],
    );
    let backup = site.backup_stopped_at("Transfer", "snapshot");
    let refused = site.try_vm(&["start", "100"]);
    assert!(refused.stderr.contains("nothing but its disks"), "{}", refused.stderr);
    let report = site.go_on(backup);
    report.assert_good().assert_says("starting QEMU with nothing but the disks");
    assert_eq!(site.state(), "off");
    assert_eq!(report.guest["volumes"].as_array().unwrap().len(), 2);
    site.assert_tidy();
}
