// SPDX-License-Identifier: MIT OR Apache-2.0
//! Does what `docs/restore-in-an-emergency.md` says, as it stands there, with an increment of a real guest.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::process::Command;
use std::time::Duration;

use system_tests::lab::{Lab, LabOptions, SOURCE_VM, VIRTIO_WITH_THREADS};
use system_tests::process::{Stop, run};
use system_tests::qemu;
use system_tests::records::check::check_pair;
use system_tests::records::disk::Disk;
use system_tests::turn::Turn;

const SOON: Duration = Duration::from_secs(180);
/// The archive of the document.
const SAMPLE: &str = "vzdump-qemu-100-2026_01_02-03_04_05";

/// The commands of the document as one script, with other values of what it names at the top.
fn script(store: &str, out: &str, archive: &str) -> String {
    let document = qemu::workspace().join("docs/restore-in-an-emergency.md");
    let text = std::fs::read_to_string(document).unwrap();
    let blocks: Vec<&str> =
        text.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(blocks.len() >= 6, "{blocks:?}");
    let script = blocks.concat();
    for needed in ["STORE=/mnt/backups ", "OUT=/mnt/rescue ", SAMPLE, " restore ", "qemu-img"] {
        assert!(script.contains(needed), "the document has no {needed:?} any more");
    }
    script
        .replace("STORE=/mnt/backups ", &format!("STORE={store} "))
        .replace("OUT=/mnt/rescue ", &format!("OUT={out} "))
        .replace(SAMPLE, archive)
}

#[test]
fn the_document_for_emergencies_brings_the_disks_back() {
    let stop = Stop::default();
    let _turn = Turn::wait(&stop).unwrap();
    let dir = tempfile::Builder::new().prefix("vz-sos-").tempdir_in("/var/tmp").unwrap();
    let options = LabOptions {
        disk_bytes: 32 << 20,
        format: "qcow2",
        hardware: VIRTIO_WITH_THREADS,
        rate_per_s: 300,
        show: true,
    };
    let mut lab = Lab::create(dir.path(), options, &stop).unwrap();
    let mut console = lab.start(SOURCE_VM).unwrap().console;
    console.wait_for_record(100, SOON, &stop).unwrap();
    lab.backup().unwrap();
    console.wait_for_record(300, SOON, &stop).unwrap();
    let newest = lab.backup().unwrap();
    assert!(newest.is_increment());
    lab.stop_vm(SOURCE_VM).unwrap();
    // The host is gone: all but the storage.
    let store = dir.path().join("saved");
    std::fs::rename(lab.backups_dir(), &store).unwrap();
    let out = tempfile::Builder::new().prefix("vz-out-").tempdir_in("/var/tmp").unwrap();

    let (_, archive) = newest.volume.split_once('/').unwrap();
    let script = script(store.to_str().unwrap(), out.path().to_str().unwrap(), archive);
    let programs = std::env::current_exe().unwrap();
    let programs = programs.parent().and_then(|deps| deps.parent()).unwrap();
    let mut paths = vec![programs.to_owned(), qemu::bin_dir().unwrap()];
    paths.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
    let mut command = Command::new("bash");
    command.args(["-euxo", "pipefail", "-c", &script]);
    command.env("PATH", std::env::join_paths(paths).unwrap());
    println!("{:?}", run(&mut command, SOON, &stop).unwrap());

    // Both disks are of one point in time, whichever way they came back.
    let image = out.path().join("virtio1.qcow2");
    let raw = out.path().join("virtio1.raw");
    let mut convert = Command::new(qemu::bin_dir().unwrap().join("qemu-img"));
    convert.args(["convert", "-f", "qcow2", "-O", "raw"]).arg(image).arg(&raw);
    run(&mut convert, SOON, &stop).unwrap();
    let second = Disk::open(&raw, false).unwrap();
    for first in ["virtio0.raw", "virtio0-by-hand.raw"] {
        let first = Disk::open(&out.path().join(first), false).unwrap();
        let report = check_pair(&first, &second, false).unwrap();
        assert!(report.problems.is_empty() && report.last_b >= 250, "{}", report.line());
    }
    assert!(!out.path().join("virtio0.raw.partial").exists());
}
