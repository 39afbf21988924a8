// SPDX-License-Identifier: MIT OR Apache-2.0
//! What cannot be frozen at once, with the old cgroups and with pure cgroup2.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use provider_api::Identity;
use vzdump_core::guest::BackupMode;
use vzdump_core::job::report::GuestResult;

use crate::backup::{assert_committed, assert_writes_on, back_up, provider, start_writing};
use crate::scene::{Scene, wait_for};

/// Each starts programs one after the other, as a shell of Debian does: by `vfork`, in which the parent waits. The
/// controller `freezer` forgets some of those parents: with sixteen, most times.
const BUSY: &str = "for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do\n\
    /bin/busybox yes | /bin/busybox xargs -n 1 /bin/sleep 0.00 2> /dev/null &\n\
    done\n";

/// A host with the container 200 that writes, and backups that freeze it for so long at most.
fn writing(freeze: Duration) -> Scene {
    let mut scene = Scene::new();
    scene.limits.freeze.freeze = freeze;
    scene.create(200, &["--mount", "/srv:32M"]);
    start_writing(&scene, 200);
    scene
}

#[test]
fn processes_that_start_others_are_frozen_at_once() {
    let scene = writing(Duration::from_secs(10));
    let busy = scene.inside(200, "/root/busy");
    std::fs::write(&busy, BUSY).unwrap();
    let mut attach = Command::new("lxc-attach");
    attach.arg("-P").arg(scene.root.join("run/lxc")).args([
        "-n",
        "200",
        "--",
        "/bin/sh",
        "/root/busy",
    ]);
    assert!(attach.status().unwrap().success());
    let provider = provider(&scene, Identity::MappedRoot);
    for _ in 0..5 {
        let (report, log) = back_up(&scene, 200, BackupMode::Suspend, &provider);
        assert_committed(&report, &log);
        assert_writes_on(&scene, 200);
    }
}

/// Its file system is frozen, which a disk that does not answer is like: with cgroup2 a process that writes there
/// cannot be frozen.
#[test]
fn a_process_that_waits_for_a_disk_does_not_keep_the_container_from_going_on() {
    let scene = writing(Duration::from_secs(2));
    let srv = scene.inside(200, "/srv");
    let change = |change| Command::new("fsfreeze").arg(change).arg(&srv).status().unwrap();
    assert!(change("-f").success());
    let provider = provider(&scene, Identity::MappedRoot);
    let (report, log) = back_up(&scene, 200, BackupMode::Suspend, &provider);
    assert!(change("-u").success());
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        assert_eq!(report.result, GuestResult::Failed, "{log}");
        let error = report.error.unwrap();
        assert!(error.contains("freeze the container 200: some of its processes"), "{error}");
    }
    assert_writes_on(&scene, 200);
    wait_for("nothing is left", || {
        scene.leftovers().iter().all(|left| !left.contains("state/tmp"))
    });
    let (report, log) = back_up(&scene, 200, BackupMode::Suspend, &provider);
    assert_committed(&report, &log);
}
