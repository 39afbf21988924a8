// SPDX-License-Identifier: MIT OR Apache-2.0
//! 54: fleecing images that a crash left, with their journal or without it.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use system_tests::loopfs::{Kind, LoopFs};

use crate::place::{Place, SOON};

/// Ends `vzdump` by SIGKILL when its job reaches this action.
const KILL_AT: &str = "VZDUMP_TEST_KILL_AT";

/// A VM whose backup has died and left an image; with `forget` the journal is lost too.
fn left_behind(forget: bool) -> Place {
    let place = Place::new("");
    place.create(&["--disk", "1M"]);
    place.start();
    let killed = place.spawn_backup(&[], &[(KILL_AT, "PointInTime")]);
    let killed = killed.finish(SOON, &place.stop).unwrap();
    assert_eq!(killed.status.signal(), Some(9), "{}", killed.stderr);
    if forget {
        fs::remove_dir_all(place.path("state/journal")).unwrap();
    }
    assert_eq!(fleecing(&place), 1);
    assert_eq!(place.run(&["storage", "list", "local", "--unused"]), Value::Array(vec![]));
    place
}

fn fleecing(place: &Place) -> usize {
    let list = place.run(&["storage", "list", "local"]);
    list.as_array().unwrap().iter().filter(|image| image["used_as"] == "fleecing").count()
}

/// Nodes of fleecing images in QEMU.
async fn nodes(place: &Place) -> usize {
    let session = place.monitor().await;
    let nodes = session.execute_raw("query-named-block-nodes", Value::Null, None).await.unwrap();
    let name = |node: &Value| node["node-name"].as_str().unwrap().to_owned();
    nodes.as_array().unwrap().iter().filter(|node| name(node).starts_with("fleecing-")).count()
}

#[tokio::test]
async fn leftover_fleecing_images_54_are_removed_at_the_next_backup() {
    for forget in [false, true] {
        let place = left_behind(forget);
        assert_eq!(nodes(&place).await, 1);
        let ended = place.backup(&[]);
        assert_eq!(ended.guest["result"], "committed", "{}", ended.said);
        assert_eq!(ended.said.contains("that an earlier backup left"), forget, "{}", ended.said);
        assert_eq!((fleecing(&place), nodes(&place).await), (0, 0), "forget {forget}");
        place.assert_tidy();
    }
}

#[tokio::test]
async fn leftover_fleecing_images_54_are_removed_by_the_doctor() {
    for (forget, running) in [(false, true), (true, true), (true, false)] {
        let place = left_behind(forget);
        if !running {
            place.stop_vm();
        }
        let sick = place.vzdump.finish(&["doctor"], SOON).unwrap();
        assert!(!sick.status.success(), "{}", sick.stdout);
        place.run(&["doctor", "--fix"]);
        assert_eq!(fleecing(&place), 0, "forget {forget}, running {running}");
        if running {
            assert_eq!(nodes(&place).await, 0);
        }
        place.run(&["doctor"]);
    }
}

#[test]
fn leftover_fleecing_images_54_go_with_the_vm() {
    for forget in [false, true] {
        let place = left_behind(forget);
        let running = place.vzdump.finish(&["vm", "destroy", "100"], SOON).unwrap();
        assert!(!running.status.success(), "a VM that runs was removed");
        assert!(place.path("etc/qemu-server/100.conf").exists());
        place.stop_vm();
        let destroyed = place.run(&["vm", "destroy", "100"]);
        assert_eq!(destroyed["volumes"][0], "local:100/vm-100-disk-0.raw");
        assert!(!place.path("local/images/100").exists(), "forget {forget}");
        assert!(!place.path("etc/qemu-server/100.conf").exists());
    }
}

#[test]
fn leftover_fleecing_images_54_are_not_in_the_way_of_a_vm_of_the_same_number() {
    let place = left_behind(true);
    place.stop_vm();
    fs::remove_file(place.path("etc/qemu-server/100.conf")).unwrap();
    fs::remove_file(place.path("local/images/100/vm-100-disk-0.raw")).unwrap();
    place.create(&["--disk", "1M"]);
    assert_eq!(fleecing(&place), 0);
    place.assert_tidy();
}

/// The making of a VM killed at any moment: the doctor finds all of it.
#[test]
fn a_vm_whose_making_was_killed_leaves_nothing_on_a_btrfs() {
    let tree = LoopFs::new(Kind::Btrfs).unwrap();
    let place = Place::new(&format!("btrfs: tree\n\tpath {}\n", tree.path().display()));
    let (mut killed, mut half) = (0, 0);
    for step in 0..24 {
        let disks = ["--disk", "1M", "--disk", "2M", "--storage", "tree"];
        let formats = [["--format", "raw+bitmaps"], ["--format", "raw"], ["--format", "qcow2"]];
        let arguments = [&["vm", "create", "100"], &disks[..], &formats[step % 3]].concat();
        let mut create = place.vzdump.spawn(&arguments).unwrap();
        std::thread::sleep(Duration::from_millis(10 + 4 * step as u64));
        // It may have ended.
        let _ = create.process().signal(Signal::KILL);
        let status = create.finish(SOON, &place.stop).unwrap().status;
        killed += usize::from(status.signal() == Some(9));
        half += usize::from(tree.path().join("images/100").exists());
        let unused = place.run(&["storage", "list", "tree", "--unused"]);
        assert_eq!(unused, Value::Array(vec![]), "what a task has begun is not unused");
        place.run(&["doctor", "--fix"]);
        if place.path("etc/qemu-server/100.conf").exists() {
            place.run(&["vm", "destroy", "100"]);
        }
        let left = place.run(&["storage", "list", "tree"]);
        assert_eq!(left, Value::Array(vec![]), "killed after step {step}");
        let there = fs::read_dir(tree.path().join("images/100")).map(Iterator::collect::<Vec<_>>);
        assert!(there.is_err(), "killed after step {step}: {there:?}");
    }
    println!("{killed} of 24 were killed, {half} had made something");
    assert!(killed > 0 && half > 0);
}

#[test]
fn a_kill_after_the_commit_leaves_an_archive_that_gets_its_notes_and_protection() {
    let place = Place::new("");
    place.create(&["--disk", "4M"]);
    place.start();
    for step in ["RecordOutcome", "Teardown", "Describe", "CloseJournal"] {
        let options = ["--notes-template", "by {{vmid}}", "--protected"];
        let killed = place.spawn_backup(&options, &[(KILL_AT, step)]);
        let killed = killed.finish(SOON, &place.stop).unwrap();
        assert_eq!(killed.status.signal(), Some(9), "{step}: {}", killed.stdout);
        place.run(&["doctor", "--fix"]);
        place.assert_tidy();
        let list = place.run(&["list", "--storage", "backups"]);
        let newest = list["archives"]
            .as_array()
            .unwrap()
            .iter()
            .max_by_key(|a| a["time_s"].as_i64())
            .unwrap();
        assert_eq!(newest["notes"], "by 100", "{step}: {list}");
        assert_eq!(newest["protected"], true, "{step}: {list}");
        let name = newest["volid"].as_str().unwrap();
        place.run(&["unprotect", name]);
        place.run(&["remove", name]);
    }
}
