// SPDX-License-Identifier: MIT OR Apache-2.0
//! A whole Debian with systemd and a service that writes goes through backup, restore and start.

use std::path::Path;
use std::time::Duration;

use system_tests::debian::template;
use system_tests::loopfs::{Kind, LoopFs};
use system_tests::process::Stop;

use crate::scene::{Scene, wait_within};

/// For a system to start, on two busy cores.
const START_WITHIN: Duration = Duration::from_secs(90);
/// For four such systems.
const DISK_BYTES: u64 = 4 << 30;

fn last_number(path: &Path) -> u64 {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().last().and_then(|line| line.parse().ok()).unwrap_or(0)
}

/// Up to where the service was at the point in time every number is there once, in order: nothing is torn or missing.
fn assert_whole(path: &Path, up_to: u64) {
    let text = std::fs::read_to_string(path).unwrap();
    let count = usize::try_from(up_to).unwrap();
    let numbers = text.lines().take(count).map(|line| line.parse::<u64>().unwrap());
    assert!(numbers.eq(1..=up_to), "{} up to {up_to}", path.display());
}

/// Backs up in these modes, and restores and starts each archive.
fn round_trips(disk: Option<&Path>, is_privileged: bool, modes: &[&str]) {
    let template = template(&Stop::default()).unwrap();
    let scene = Scene::with_archives();
    let mut more = vec!["--size", "700M", "--mount", "/srv:64M", "--hostname", "debian"];
    if let Some(path) = disk {
        scene.add_storage("btrfs", "fast", path);
        more.extend(["--storage", "fast", "--format", "subvol"]);
    }
    let privileged: &[&str] = if is_privileged { &["--privileged"] } else { &[] };
    scene.create_from(&template, 200, &[&more[..], privileged].concat());
    scene.run(&["ct", "start", "200"]);
    let written = || last_number(&scene.inside(200, "/srv/b"));
    wait_within(START_WITHIN, "the service writes", || written() > 20);
    for (number, mode) in (300..).zip(modes) {
        let before = written();
        let report = scene.run(&["backup", "200", "--mode", mode]);
        let guest = &report["guests"][0];
        assert_eq!(guest["result"], "committed", "{report}");
        assert!(guest["container"]["entries"].as_u64().unwrap() > 5000, "{report}");
        let archive = format!("store:backup/{}", guest["archive"].as_str().unwrap());
        let id = number.to_string();
        scene.expect(number);
        scene.run(&[&["restore", &archive, &id, "--start"], privileged].concat());
        let found = scene.inside(number, "/root/found");
        // The file of the archive says what was found before.
        let own = || std::fs::read_to_string(&found).unwrap_or_default();
        wait_within(START_WITHIN, "the restored service writes", || {
            last_number(&scene.inside(number, "/srv/b")) > before && own().trim().contains(' ')
        });
        let text = own();
        let (a, b) = text.trim().split_once(' ').unwrap();
        let (a, b): (u64, u64) = (a.parse().unwrap(), b.parse().unwrap());
        assert!(b <= a && a <= b + 1 && b >= before, "{mode}: a {a}, b {b}, before {before}");
        assert_whole(&scene.inside(number, "/var/lib/writer/a"), a);
        assert_whole(&scene.inside(number, "/srv/b"), b);
        scene.run(&["ct", "stop", &id, "--now"]);
        assert_eq!(scene.state(200), "running", "{mode}");
    }
}

#[test]
fn a_debian_that_writes_comes_back_from_the_mode_suspend() {
    round_trips(None, false, &["suspend"]);
}

fn every_mode(is_privileged: bool) {
    let disk = LoopFs::with_size(Kind::Btrfs, DISK_BYTES).unwrap();
    round_trips(Some(&disk.path()), is_privileged, &["snapshot", "suspend", "stop"]);
}

#[test]
#[ignore = "takes minutes; in ./x full"]
fn an_unprivileged_debian_that_writes_comes_back_from_every_mode() {
    every_mode(false);
}

#[test]
#[ignore = "takes minutes; in ./x full"]
fn a_privileged_debian_that_writes_comes_back_from_every_mode() {
    every_mode(true);
}
