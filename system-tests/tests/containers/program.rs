// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backup and restore as a user does them, with the provider of this repository; and what is left when the
//! program is killed.

use std::path::{Path, PathBuf};

use system_tests::loopfs::{Kind, LoopFs};

use crate::scene::{LIMIT, Scene, wait_for};

/// A host with a storage for backups, and a container that writes to two volumes; on a storage of a type and with
/// volumes of a format that are given.
pub(crate) fn scene_with(disk: Option<(&str, &str, &Path)>) -> Scene {
    let scene = Scene::with_archives();
    let mut more = vec!["--hostname", "web", "--mount", "/srv:32M"];
    if let Some((kind, format, path)) = disk {
        scene.add_storage(kind, "fast", path);
        more.extend(["--storage", "fast", "--format", format]);
    }
    scene.create(200, &more);
    scene.run(&["ct", "start", "200"]);
    wait_for("both volumes are written", || scene.inside(200, "/srv/b").exists());
    scene
}

fn assert_runs(scene: &Scene, what: &str) {
    assert_eq!(scene.state(200), "running", "{what}");
    let read = || std::fs::read_to_string(scene.inside(200, "/root/a")).unwrap_or_default();
    let before = read();
    wait_for(what, || !read().is_empty() && read() != before);
}

#[test]
fn a_container_is_backed_up_listed_and_restored() {
    let scene = scene_with(None);
    for name in ["tmp/left-out", "srv/x.bak"] {
        std::fs::write(scene.inside(200, "/").join(name), "left out").unwrap();
    }
    let report = scene.run(&["backup", "200", "--mode", "stop", "--exclude-path", "*.bak"]);
    let guest = &report["guests"][0];
    assert_eq!(
        (&guest["result"], &guest["kind"]),
        (&"committed".into(), &"lxc".into()),
        "{report}"
    );
    assert!(guest["container"]["entries"].as_u64().unwrap() > 20, "{report}");
    assert_runs(&scene, "the container runs again");
    let listed = scene.run(&["list"]);
    let archive = &listed["archives"][0];
    assert_eq!(archive["subtype"], "lxc", "{listed}");
    let volid = archive["volid"].as_str().unwrap();
    let refused = scene.fail(&["restore", volid, "300", "--in-place", "--force"]);
    assert!(refused.contains("cannot be used when a container is restored"), "{refused}");
    scene.expect(300);
    scene.run(&["restore", volid, "300", "--start"]);
    assert_eq!(scene.state(300), "running");
    wait_for("the restored writer goes on", || scene.inside(300, "/srv/b").exists());
    assert!(scene.inside(200, "/srv/x.bak").exists() && scene.inside(300, "/tmp").exists());
    for name in ["/tmp/left-out", "/srv/x.bak"] {
        assert!(!scene.inside(300, name).exists(), "{name}");
    }
    for id in ["200", "300"] {
        scene.run(&["ct", "stop", id, "--now"]);
    }
    wait_for("nothing is left", || scene.leftovers().is_empty());
}

fn names(dir: PathBuf) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Kills the program at a step, cleans up, and looks at what is there.
fn kill_at(scene: &Scene, mode: &str, step: &str, images: &Path) {
    let arguments = ["backup", "200", "--mode", mode];
    let environment = [("VZDUMP_TEST_KILL_AT", step)];
    let killed = scene.vzdump.spawn_with(&arguments, &environment).unwrap();
    let killed = killed.finish(LIMIT, &system_tests::process::Stop::default()).unwrap();
    assert!(!killed.status.success(), "{step} was not reached: {}", killed.stdout);
    scene.run(&["doctor", "--fix"]);
    assert_runs(scene, &format!("the container runs after {mode} killed at {step}"));
    for dir in ["state/journal", "run/ct-backup", "state/tmp"] {
        assert_eq!(names(scene.root.join(dir)), [""; 0], "{mode} killed at {step}");
    }
    assert_eq!(names(images.join("200")).len(), 2, "{mode} killed at {step}: snapshots");
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains("ct-backup"), "{mounts}");
}

#[test]
fn a_program_that_is_killed_leaves_no_frozen_container_and_no_snapshot() {
    let disk = LoopFs::new(Kind::Xfs).unwrap();
    let scene = scene_with(Some(("dir", "raw", &disk.path())));
    let steps = [
        "entry:volume",
        "entry:freeze",
        "frozen",
        "entry:thawed",
        "OpenSource",
        "Transfer",
        "Commit",
        "Teardown",
        "Release",
        "Cleanup",
    ];
    for step in steps {
        kill_at(&scene, "snapshot", step, &disk.path().join("images"));
    }
    let report = scene.run(&["backup", "200"]);
    assert_eq!(report["guests"][0]["result"], "committed", "{report}");
}

#[test]
fn suspend_63_a_program_that_is_killed_leaves_no_frozen_container_and_no_copy() {
    let scene = scene_with(None);
    let steps = [
        "entry:temporary_tree",
        "first-copy",
        "entry:freeze",
        "frozen",
        "copied",
        "entry:thawed",
        "Transfer",
        "Cleanup",
    ];
    for step in steps {
        kill_at(&scene, "suspend", step, &scene.root.join("state/storage/images"));
    }
    let report = scene.run(&["backup", "200", "--mode", "suspend"]);
    assert_eq!(report["guests"][0]["result"], "committed", "{report}");
    assert_eq!(names(scene.root.join("state/tmp")), [""; 0]);
}

#[test]
fn a_program_that_is_killed_leaves_no_container_down() {
    let scene = scene_with(None);
    for step in ["entry:shut_down", "PointInTime", "Transfer", "Teardown", "LeaveMode"] {
        kill_at(&scene, "stop", step, &scene.root.join("state/storage/images"));
    }
}

/// Nobody waits for the end of a shutdown any more that goes on.
#[test]
fn a_program_that_is_killed_while_the_container_stops_leaves_it_running() {
    let scene = scene_with(None);
    let inittab = scene.inside(200, "/etc/inittab");
    let text = std::fs::read_to_string(&inittab).unwrap();
    std::fs::write(&inittab, text + "::shutdown:/bin/sh -c 'echo > /root/going; /bin/sleep 3'\n")
        .unwrap();
    scene.run(&["ct", "stop", "200"]);
    scene.run(&["ct", "start", "200"]);
    let going = scene.inside(200, "/root/going");
    assert!(!going.exists());
    let mut killed = scene.vzdump.spawn(&["backup", "200", "--mode", "stop"]).unwrap();
    wait_for("the container is about to stop", || going.exists());
    killed.process().signal(rustix::process::Signal::KILL).unwrap();
    killed.finish(LIMIT, &system_tests::process::Stop::default()).unwrap();
    scene.run(&["doctor", "--fix"]);
    std::thread::sleep(std::time::Duration::from_secs(4));
    assert_runs(&scene, "the container runs");
    assert_eq!(names(scene.root.join("state/journal")), [""; 0]);
    // What was started since is let alone.
    for commands in [&["start"][..], &["start", "stop"]] {
        let environment = [("VZDUMP_TEST_KILL_AT", "PointInTime")];
        let killed =
            scene.vzdump.spawn_with(&["backup", "200", "--mode", "stop"], &environment).unwrap();
        killed.finish(LIMIT, &system_tests::process::Stop::default()).unwrap();
        for command in commands {
            scene.run(&["ct", command, "200"]);
        }
        let before = scene.run(&["ct", "status", "200"]);
        scene.run(&["doctor", "--fix"]);
        assert_eq!(scene.run(&["ct", "status", "200"]), before, "{commands:?}");
    }
}

/// What is refused changes nothing, so the container still has to be started.
#[test]
fn a_refused_restore_leaves_the_start_of_the_container_to_the_next_recovery() {
    let scene = scene_with(None);
    scene.run(&["backup", "200"]);
    let volid = scene.run(&["list"])["archives"][0]["volid"].as_str().unwrap().to_owned();
    let environment = [("VZDUMP_TEST_KILL_AT", "PointInTime")];
    let killed =
        scene.vzdump.spawn_with(&["backup", "200", "--mode", "stop"], &environment).unwrap();
    killed.finish(LIMIT, &system_tests::process::Stop::default()).unwrap();
    assert_eq!(scene.state(200), "stopped");
    let refused = scene.fail(&["restore", &volid, "200"]);
    assert!(refused.contains("exists already"), "{refused}");
    scene.run(&["doctor", "--fix"]);
    assert_runs(&scene, "the container runs");
}
