// SPDX-License-Identifier: MIT OR Apache-2.0
//! The mode `stop` of a running VM.

use crate::sector::Guest;
use crate::site::{Disk, SOON, Site};

#[test]
fn s48_stop_mode_shuts_the_guest_down_and_lets_it_run_right_after_the_point_in_time() {
    let mut site = Site::new(Guest::Writes);
    site.start();
    // Before anything is copied it runs again.
    let backup = site.backup_stopped_at("Transfer", "stop");
    site.wait_for_boot(2);
    let report = site.go_on(backup);
    report.assert_good();
    for line in
        ["INFO: status = running", "INFO: backup mode: stop", "INFO: stopping virtual guest"]
    {
        report.assert_says(line);
    }
    report.assert_says("INFO: resuming VM again after");
    assert!(report.downtime().is_some());
    assert_eq!(site.state(), "running");
    site.assert_writes();
    site.assert_tidy();
    // The point in time lies between the two boots.
    assert_eq!(site.archived_boots(&report), 1);
    site.assert_restores(&report);
    site.power_button();
    site.wait_for_state("off");
}

#[test]
fn s48_stop_mode_of_a_qemu_that_stays_by_itself_starts_a_new_one() {
    let disks = [Disk::raw("virtio0", 1 << 20)];
    let mut site = Site::with(Guest::Writes, "args: -no-shutdown\n", &disks);
    site.start();
    let before = site.vm(&["status", "100"])["pid"].clone();
    let report = site.backup("stop");
    report.assert_good();
    site.wait_for_boot(2);
    assert_ne!(site.vm(&["status", "100"])["pid"], before);
    assert_eq!(site.archived_boots(&report), 1);
}

#[test]
fn s48_after_a_failure_in_stop_mode_the_vm_is_running_again() {
    let site = Site::new(Guest::Writes);
    site.start();
    // No room for the fleecing image: its directory cannot be written.
    let backup = site.backup_stopped_at("Acquire", "stop");
    assert_eq!(site.state(), "prelaunch");
    let folder = site.path("local/images/100");
    let hidden = site.path("local/images/hidden");
    std::fs::rename(&folder, &hidden).unwrap();
    std::fs::write(&folder, "").unwrap();
    let report = site.go_on(backup);
    std::fs::remove_file(&folder).unwrap();
    std::fs::rename(&hidden, &folder).unwrap();
    assert!(report.error().contains("fleecing image"), "{}", report.error());
    site.wait_for_boot(2);
    site.doctor();

    // A QEMU that does not start: the running VM stays what it is.
    site.add_to_config("net0: virtio\n");
    let report = site.backup("stop");
    assert!(report.error().contains("because it could not be started again"), "{}", report.error());
    assert_eq!((site.state().as_str(), site.boots()), ("running", 2));
}

#[test]
fn s48_a_start_that_fails_after_the_shutdown_is_tried_once_more() {
    let site = Site::new(Guest::Writes);
    site.start();
    // Its QEMU is killed while it is started for the backup.
    let backup = site.backup_stopped_at("PlanVolumes", "stop");
    let status = site.vm(&["status", "100"]);
    let pid = i32::try_from(status["pid"].as_i64().unwrap()).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let report = site.go_on(backup);
    assert!(!report.error().is_empty());
    report.assert_says("INFO: guest is online again after");
    site.wait_for_boot(2);
    site.assert_tidy();
}

#[test]
fn s48_a_cancelled_stop_leaves_a_running_vm() {
    let site = Site::new(Guest::Writes);
    site.start();
    for step in ["entry:start", "Acquire", "PointInTime"] {
        let boots = site.boots();
        let mut backup = site.backup_stopped_at(step, "stop");
        backup.process().signal(rustix::process::Signal::TERM).unwrap();
        let report = site.go_on(backup);
        assert!(report.error().contains("cancelled"), "{step}: {}", report.error());
        site.wait_for_boot(boots + 1);
        assert_eq!(site.state(), "running");
        site.assert_tidy();
    }
}

#[test]
fn s48_a_guest_that_does_not_shut_down_is_left_alone() {
    let site = Site::new(Guest::IsDeaf);
    site.start();
    // It would be waited for ten minutes; a signal ends that.
    let mut backup = site.spawn_backup("stop", &[]);
    let is_asked = || {
        let log = std::fs::read_to_string(site.path("state/log/qemu-100.log")).unwrap_or_default();
        Ok(log.contains("stopping virtual guest").then_some(()))
    };
    site.stop.wait_for("the shutdown", SOON, is_asked).unwrap();
    backup.process().signal(rustix::process::Signal::TERM).unwrap();
    let report = site.finish(backup);
    assert!(report.error().contains("cancelled"), "{}", report.error());
    report.assert_says("WARN: VM 100 was asked to shut down for its backup and still runs");
    assert_eq!((site.state().as_str(), site.boots()), ("running", 1));
    site.assert_writes();
    site.assert_tidy();
}
