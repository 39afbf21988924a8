// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether a container runs during and after its backup, also if it does not shut down or start, and what the hook
//! script is told of that.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use provider_api::Identity;
use vzdump_core::guest::BackupMode;
use vzdump_core::job::report::GuestResult;

use crate::backup::{
    assert_committed, assert_writes_on, back_up, back_up_with, provider, start_writing,
};
use crate::scene::{Scene, wait_for};

/// A container that writes, with raw volumes that cannot be snapshotted.
fn writing() -> Scene {
    let scene = Scene::new();
    scene.create(200, &["--mount", "/srv:32M"]);
    start_writing(&scene, 200);
    scene
}

fn change_config(scene: &Scene, line: &str) {
    let path = scene.root.join("etc/lxc/200.conf");
    std::fs::write(path, format!("{}{line}\n", scene.config(200))).unwrap();
}

fn journals(scene: &Scene) -> usize {
    std::fs::read_dir(scene.root.join("state/journal")).map_or(0, Iterator::count)
}

#[test]
fn stop_mode_64_a_container_that_could_not_be_started_again_is_not_stopped() {
    let scene = writing();
    let provider = provider(&scene, Identity::MappedRoot);
    let config = scene.config(200);
    for (line, why) in [
        ("net0: name=eth0,bridge=vzmissing0,type=veth", "The bridge 'vzmissing0'"),
        ("future: 1", "not known: future"),
    ] {
        change_config(&scene, line);
        let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
        assert_eq!(report.result, GuestResult::Failed, "{log}");
        let error = report.error.unwrap();
        assert!(error.contains("Cannot shut CT 200 down") && error.contains(why), "{error}");
        assert!(!log.contains("stopping the container"), "{log}");
        assert_writes_on(&scene, 200);
        std::fs::write(scene.root.join("etc/lxc/200.conf"), &config).unwrap();
    }
    assert_eq!(journals(&scene), 0);
}

/// Of volumes that are read as they are the archive is complete before that is found out.
#[test]
fn stop_mode_64_a_container_that_does_not_start_again_fails_its_backup() {
    let scene = writing();
    let provider = provider(&scene, Identity::MappedRoot);
    let config = scene.config(200);
    change_config(&scene, "lxc.init.cmd: /missing");
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    assert!(!report.is_success(), "{log}");
    assert_eq!(report.result, GuestResult::Committed, "{log}");
    let error = report.error.unwrap();
    assert!(error.contains("Cannot start the container 200"), "{error}");
    assert!(error.ends_with("the archive is complete and stays"), "{error}");
    assert_eq!((scene.state(200).as_str(), journals(&scene)), ("stopped", 1), "{log}");
    std::fs::write(scene.root.join("etc/lxc/200.conf"), config).unwrap();
    scene.run(&["doctor", "--fix"]);
    assert_eq!(journals(&scene), 0);
    assert_writes_on(&scene, 200);
}

#[test]
fn stop_mode_64_a_container_that_does_not_shut_down_is_not_killed() {
    let mut scene = writing();
    let inittab = scene.inside(200, "/etc/inittab");
    let text = std::fs::read_to_string(&inittab).unwrap();
    std::fs::write(&inittab, text + "::shutdown:/bin/sleep 1000\n").unwrap();
    scene.run(&["ct", "stop", "200", "--now"]);
    start_writing(&scene, 200);
    let provider = provider(&scene, Identity::MappedRoot);
    // It is waited for as long as for a step of undoing.
    scene.limits.undo = Duration::from_secs(5);
    let (report, log) = back_up_with(&scene, 200, &provider, |options| {
        options.mode = BackupMode::Stop;
        options.stop_wait = Duration::from_secs(1);
    });
    assert_eq!(report.result, GuestResult::Failed, "{log}");
    assert!(report.error.unwrap().contains("did not shut down within 1 seconds"), "{log}");
    assert!(log.contains("if it does shut down, it has to be started again"), "{log}");
    assert_eq!((journals(&scene), report.point_in_time.downtime_ms), (0, None), "{log}");
    assert_writes_on(&scene, 200);
    let stopped = scene.run(&["ct", "stop", "200", "--timeout", "1"]);
    assert_eq!((&stopped["ran"], &stopped["killed"]), (&true.into(), &true.into()), "{stopped}");
    assert_eq!(scene.state(200), "stopped");
}

/// A hook script that writes down its phases and the state of the container in them, and fails in one.
fn script(scene: &Scene, fails_in: &str) -> (PathBuf, PathBuf) {
    let (path, said) = (scene.root.join("hook"), scene.root.join("phases"));
    let text = format!(
        "#!/bin/sh\ncase $1 in pre-stop|pre-restart|post-restart) echo $1 $2 >> {};; esac\n\
         [ $1 != {fails_in} ]\n",
        said.display()
    );
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let _ = std::fs::remove_file(&said);
    (path, said)
}

#[test]
fn hooks_are_called_around_a_stop_and_a_freeze_and_fail_the_backup() {
    let scene = writing();
    let provider = provider(&scene, Identity::MappedRoot);
    for mode in [BackupMode::Suspend, BackupMode::Stop, BackupMode::Snapshot] {
        for fails_in in ["none", "pre-stop", "pre-restart", "post-restart"] {
            let (path, said) = script(&scene, fails_in);
            let (report, log) = back_up_with(&scene, 200, &provider, |options| {
                options.mode = mode;
                options.script = Some(path);
            });
            let phases = std::fs::read_to_string(said).unwrap();
            let expected: String = ["pre-stop", "pre-restart", "post-restart"]
                .iter()
                .map(|phase| format!("{phase} {mode}\n"))
                .take(if fails_in == "pre-stop" { 1 } else { 3 })
                .collect();
            assert_eq!(phases, expected, "{mode}, {fails_in}: {log}");
            assert_eq!(journals(&scene), 0, "{mode}, {fails_in}: {log}");
            assert_writes_on(&scene, 200);
            if fails_in == "none" {
                assert_committed(&report, &log);
                assert!(report.point_in_time.downtime_ms.is_some(), "{mode}: {log}");
            } else {
                assert!(!report.is_success(), "{mode}, {fails_in}: {log}");
                assert!(report.error.unwrap().contains(fails_in), "{mode}: {log}");
            }
        }
    }
    scene.run(&["ct", "stop", "200", "--now"]);
    wait_for("nothing is left", || scene.leftovers().is_empty());
}

#[test]
fn a_locked_container_is_not_started() {
    let scene = Scene::new();
    scene.create(200, &[]);
    change_config(&scene, "lock: backup");
    let refused = scene.fail(&["ct", "start", "200"]);
    assert!(refused.contains("locked (backup)"), "{refused}");
    assert_eq!(scene.state(200), "stopped");
}
