// SPDX-License-Identifier: MIT OR Apache-2.0
//! The modes with pure cgroup2, whatever the host has: tests of this program run once more in a mount namespace in
//! which nothing else is to be seen. The host's own, often with the old controllers beside, is what all others use.

use std::process::Command;

const SCRIPT: &str = "umount -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && \
    exec \"$0\" --exact \"$1\" --nocapture";

fn with_cgroup2(test: &str) {
    let own = std::env::current_exe().unwrap();
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--propagation", "private", "sh", "-c", SCRIPT]).arg(own).arg(test);
    let output = unshare.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{test}: {said}\n{error}");
}

#[test]
fn suspend_works_with_pure_cgroup2() {
    with_cgroup2("backup::storage_without_snapshots_62_falls_back_to_suspend_with_a_warning");
}

#[test]
fn snapshots_work_with_pure_cgroup2() {
    with_cgroup2("backup::two_volumes_61_on_xfs_are_of_one_point_in_time");
}

#[test]
fn a_container_that_does_not_freeze_goes_on_with_pure_cgroup2() {
    with_cgroup2(
        "freezing::a_process_that_waits_for_a_disk_does_not_keep_the_container_from_going_on",
    );
}
