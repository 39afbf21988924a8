// SPDX-License-Identifier: MIT OR Apache-2.0
//! `verify --boot` with a real guest: its archive boots, one of a guest that cannot does not, and
//! nothing is written or left, also after a kill.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use system_tests::lab::{Lab, LabOptions, PLAIN_VIRTIO, SOURCE_VM};
use system_tests::process::Stop;
use system_tests::turn::Turn;

const SOON: Duration = Duration::from_secs(180);

/// The files of a folder with their content.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                all.insert(path.clone(), std::fs::read(path).unwrap());
            }
        }
    }
    all
}

/// What is left of throw-away VMs: folders, and processes that have one in their command line.
fn left(root: &Path) -> (usize, usize) {
    let boot = root.join("state/boot");
    let folders = boot.read_dir().map_or(0, Iterator::count);
    let needle = boot.to_string_lossy().into_owned();
    let lines = Path::new("/proc").read_dir().unwrap().flatten().filter_map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        Some(String::from_utf8_lossy(&line).into_owned())
    });
    (folders, lines.filter(|line| line.contains(&needle)).count())
}

#[test]
fn an_archive_is_booted_without_network_and_without_a_trace() {
    let stop = Stop::default();
    let _turn = Turn::wait(&stop).unwrap();
    let dir = tempfile::Builder::new().prefix("vz-boot-").tempdir_in("/var/tmp").unwrap();
    let options = LabOptions {
        disk_bytes: 32 << 20,
        format: "qcow2",
        hardware: PLAIN_VIRTIO,
        rate_per_s: 100,
        show: true,
    };
    let mut lab = Lab::create(dir.path(), options, &stop).unwrap();
    let mut console = lab.start(SOURCE_VM).unwrap().console;
    console.wait_for_record(50, SOON, &stop).unwrap();
    let archive = lab.backup().unwrap().volume;
    lab.stop_vm(SOURCE_VM).unwrap();
    // Its locks are made by now.
    lab.vzdump.run(&["verify", &archive], SOON).unwrap();
    let before = content(&lab.backups_dir());
    let boot = ["verify", &archive, "--boot", "--allow-raw-config"];

    println!("it boots, and its agent answers");
    let report = lab.vzdump.run(&boot, SOON).unwrap();
    let ready_ms = report["archives"][0]["ready_ms"].as_u64().unwrap();
    assert!(report["success"] == true && ready_ms > 0, "{report}");
    // The guest has written records to its disks all the while, so this is worth something.
    assert!(content(&lab.backups_dir()) == before, "the archive was written to");
    assert_eq!(left(dir.path()), (0, 0));
    let listed =
        |lab: &Lab| lab.vzdump.run(&["list"], SOON).unwrap()["archives"][0]["booted"].clone();
    assert_eq!(listed(&lab)["ready_ms"], ready_ms);

    println!("its console says so, too");
    let by_console = [boot.as_slice(), &["--boot-console", "CHECK OK"]].concat();
    assert_eq!(lab.vzdump.run(&by_console, SOON).unwrap()["success"], true);

    println!("a guest that does not get ready is told");
    let never = ["--boot-console", "never said", "--boot-timeout", "3"];
    let finished = lab.vzdump.finish(&[boot.as_slice(), &never].concat(), SOON).unwrap();
    assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
    let last = finished.stdout.trim_end().lines().last().unwrap();
    let report: Value = serde_json::from_str(last).unwrap();
    let error = report["archives"][0]["error"].as_str().unwrap();
    assert!(error.contains("was not ready within 3 seconds"), "{error}");
    assert_eq!(listed(&lab)["ready_ms"], Value::Null);
    assert_eq!(left(dir.path()), (0, 0));

    println!("a kill leaves a VM, which the doctor ends");
    for signal in [Signal::TERM, Signal::KILL] {
        let mut running = lab.vzdump.spawn(&by_never(&archive)).unwrap();
        let started = "the QEMU of a test";
        lab.stop.wait_for(started, SOON, || Ok((left(dir.path()).1 >= 3).then_some(()))).unwrap();
        running.process().signal(signal).unwrap();
        running.finish(SOON, &lab.stop).unwrap();
        if signal == Signal::KILL {
            assert_eq!(left(dir.path()).0, 1);
            lab.vzdump.run(&["doctor", "--fix"], SOON).unwrap();
        }
        let gone = "the end of all processes";
        lab.stop.wait_for(gone, SOON, || Ok((left(dir.path()) == (0, 0)).then_some(()))).unwrap();
    }
    assert!(content(&lab.backups_dir()) == before, "the archive was written to");
    assert_eq!(lab.vzdump.run(&boot, SOON).unwrap()["success"], true);
}

fn by_never(archive: &str) -> [&str; 6] {
    ["verify", archive, "--boot", "--allow-raw-config", "--boot-console", "never said"]
}
