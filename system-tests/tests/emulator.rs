// SPDX-License-Identifier: MIT OR Apache-2.0
//! What happens to a guest while a backup access is active, on the real emulator: it is stopped,
//! goes on, is reset, loses its disk or a medium, quits or switches itself off; and its machine is
//! to be saved, its disks to be changed. A boot sector stands for the guest (`boot_sector`).

#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(dead_code, reason = "shared with tests that use the rest of it")]
mod access_lab;
mod boot_sector;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Command;

use access_lab::{Client, DISK_BYTES, Lab};
use serde_json::{Value, json};
use system_tests::qemu::bin_dir;

const MIB: u64 = 1 << 20;
const OLD: u8 = 0x77;
/// What QEMU says of a node with an access.
const BUSY: &str = "a backup access of target 't' is active";

/// A SCSI disk with a node of its own and one made by `-drive`: these can be unplugged at once.
const SCSI: [&str; 6] = [
    "-device",
    "virtio-scsi-pci,id=scsi,iothread=io0",
    "-device",
    "scsi-hd,id=plugged,bus=scsi.0,drive=alone",
    "-device",
    "scsi-hd,id=drive,bus=scsi.0,drive=legacy",
];

/// An emulator that can export, whose guest does not run yet.
async fn start(options: &[&str]) -> Lab {
    serve(Lab::start_emulator(options).await).await
}

async fn serve(lab: Lab) -> Lab {
    let address = json!({ "type": "unix", "data": { "path": lab.path("nbd") } });
    lab.run("nbd-server-start", json!({ "addr": address })).await;
    lab
}

fn fill(lab: &Lab, file: &str, pattern: u8) {
    let file = File::options().write(true).open(lab.path(file)).unwrap();
    file.write_all_at(&vec![pattern; usize::try_from(DISK_BYTES).unwrap()], 0).unwrap();
}

/// A copy of a disk's file, as it is now.
fn copy(lab: &Lab, file: &str) -> PathBuf {
    let to = lab.path(&format!("{file}.copy"));
    std::fs::copy(lab.path(file), &to).unwrap();
    to
}

fn byte(lab: &Lab, file: &str, offset: u64) -> u8 {
    let mut byte = [0];
    File::open(lab.path(file)).unwrap().read_exact_at(&mut byte, offset).unwrap();
    byte[0]
}

async fn monitor(lab: &Lab, command: &str) -> String {
    let said = lab.run("human-monitor-command", json!({ "command-line": command })).await;
    said.as_str().unwrap().to_owned()
}

/// Writes through the device of the guest.
async fn device_writes(lab: &Lab, device: &str, pattern: u8, offset: u64, len: u64) {
    let command = format!("qemu-io {device} \"write -P {pattern:#x} {offset} {len}\"");
    assert_eq!(monitor(lab, &command).await, "");
}

/// A setup of one device of the target `t`; its snapshot's node.
async fn set_up(lab: &Lab, device: &str, fleecing: &str) -> Value {
    let device = json!({ "device": device, "fleecing": fleecing, "bitmap-mode": "use" });
    lab.setup("t", json!([device])).await.remove(0)
}

async fn refused(lab: &Lab, command: &str, arguments: Value, reason: &str) {
    let before = lab.graph().await;
    match lab.try_run(command, arguments.clone()).await {
        Ok(value) => panic!("{command} {arguments} was accepted: {value}"),
        Err(error) => {
            assert!(error.to_string().contains(reason), "{command} {arguments}\nfailed: {error}");
        }
    }
    assert_eq!(lab.graph().await, before, "after {command} {arguments}");
}

#[tokio::test]
async fn stop_reset_and_power_off_of_a_guest_that_writes() {
    let lab = serve(Lab::start_emulator_without_cd(&[]).await).await;
    lab.add_disk("second").await;
    fill(&lab, "disk0", OLD);
    let disk = File::options().write(true).open(lab.path("disk0")).unwrap();
    disk.write_all_at(&boot_sector::sector(), 0).unwrap();
    disk.write_all_at(&[0], boot_sector::COUNTER).unwrap();
    let before = copy(&lab, "disk0");

    let info = set_up(&lab, "guest-disk0", "disk0-fleecing").await;
    let export = lab.export(&info).await;
    let mut client = Client::connect(&lab, &export);
    client.reads_at(OLD, 2 * MIB);
    // QEMU 10.0 aborts when it moves an export to another thread while a client disconnects.
    let clients = lab.sockets();
    let settled = async || {
        lab.until("other clients are gone", async || lab.sockets() == clients).await;
    };
    lab.run("cont", json!({})).await;
    let boots = async |count: u8| {
        let written = async || byte(&lab, "disk0", boot_sector::FILLED.end - 1) == count;
        lab.until(&format!("the guest writes, boot {count}"), written).await;
    };
    boots(1).await;
    lab.expect_file(&export, &before);
    for _ in 0..3 {
        lab.run("stop", json!({})).await;
        lab.expect_file(&export, &before);
        lab.run("cont", json!({})).await;
    }
    // Another target comes while the guest writes, and has a point in time of its own.
    let devices = json!([{ "device": "guest-disk0", "fleecing": "second" }]);
    let infos = lab.setup("u", devices).await;
    let second = lab.export(&infos[0]).await;
    let second_before = lab.path("second.copy");
    lab.save(&second, &second_before);

    settled().await;
    lab.run("system_reset", json!({})).await;
    boots(2).await;
    client.reads_at(OLD, 2 * MIB);
    lab.expect_file(&export, &before);
    lab.expect_file(&second, &second_before);
    let status = lab.run("query-backup-access", json!({})).await;
    for access in status.as_array().unwrap() {
        assert_eq!(access["devices"][0]["state"], "active");
    }
    settled().await;
    lab.teardown("t", true).await;
    lab.expect_file(&second, &second_before);
    set_up(&lab, "guest-disk0", "disk0-fleecing").await;

    // The third boot switches off, with two accesses and a client.
    drop(client);
    client = Client::connect(&lab, &second);
    client.reads_at(OLD, 2 * MIB);
    settled().await;
    lab.run("system_reset", json!({})).await;
    lab.ends().await;
}

#[tokio::test]
async fn a_disk_is_unplugged_during_an_access() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("legacy");
    File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
    let drive = format!("if=none,id=legacy,format=raw,file={}", path.display());
    let mut options = vec!["-drive", &drive];
    options.extend(SCSI);
    let lab = start(&options).await;
    fill(&lab, "alone", OLD);
    for (device, qdev) in [("alone", "plugged"), ("legacy", "drive")] {
        let info = set_up(&lab, device, "disk1-fleecing").await;
        let export = lab.export(&info).await;
        let old = if device == "alone" { OLD } else { 0 };
        if device == "alone" {
            device_writes(&lab, &format!("-d {qdev}"), 0x78, 0, MIB).await;
        } else {
            device_writes(&lab, device, 0x78, 0, MIB).await;
        }
        let mut client = Client::connect(&lab, &export);
        let mut events = lab.session().events();
        lab.run("device_del", json!({ "id": qdev })).await;
        let gone = lab.next_event(&mut events, "DEVICE_DELETED").await;
        assert_eq!(gone["device"], qdev);
        lab.expect(&export, old, 0, DISK_BYTES).await;
        client.reads_at(old, 0);
        // Nobody may plug it in again beside the filter, but above it.
        if device == "alone" {
            let plug = |drive: &str| {
                json!({ "driver": "scsi-hd", "id": "again", "bus": "scsi.0",
                                             "drive": drive })
            };
            refused(&lab, "device_add", plug("alone"), "alone").await;
            let filter = info["node-name"].as_str().unwrap().replace("-1", "-0");
            lab.run("device_add", plug(&filter)).await;
            device_writes(&lab, "-d again", 0x79, 0, MIB).await;
            lab.expect(&export, old, 0, DISK_BYTES).await;
        }
        assert_eq!(lab.teardown("t", true).await, json!({ "existed": true }));
        let graph = lab.graph().await;
        assert!(graph.iter().all(|line| !line.contains("'ba-")), "{graph:#?}");
    }
    assert_eq!(byte(&lab, "alone", 0), 0x79);
    let mut first = [0];
    File::open(&path).unwrap().read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [0x78]);
    lab.quit().await;
}

/// Puts a medium into the drive, in the place of any other.
async fn insert_medium(lab: &Lab, node: &str) {
    lab.run("blockdev-open-tray", json!({ "id": "cd", "force": true })).await;
    lab.run("blockdev-remove-medium", json!({ "id": "cd" })).await;
    lab.run("blockdev-insert-medium", json!({ "id": "cd", "node-name": node })).await;
    lab.run("blockdev-close-tray", json!({ "id": "cd" })).await;
}

#[tokio::test]
async fn a_medium_is_removed_during_an_access() {
    let lab = start(&[]).await;
    fill(&lab, "read-only", OLD);
    insert_medium(&lab, "read-only").await;
    let info = lab.setup("t", json!([{ "device": "cd", "fleecing": "disk1-fleecing" }])).await;
    let export = lab.export(&info[0]).await;
    insert_medium(&lab, "alone").await;
    lab.expect(&export, OLD, 0, DISK_BYTES).await;
    assert_eq!(lab.teardown("t", true).await, json!({ "existed": true }));
    let graph = lab.graph().await;
    assert!(graph.iter().all(|line| !line.contains("'ba-")), "{graph:#?}");
    lab.quit().await;
}

/// Makes a qcow2 image and its nodes: the storage and the disk.
async fn add_qcow2(lab: &Lab, name: &str) {
    let created = Command::new(bin_dir().unwrap().join("qemu-img"))
        .args(["create", "-q", "-f", "qcow2"])
        .arg(lab.path(name))
        .arg(DISK_BYTES.to_string())
        .status();
    assert!(created.unwrap().success());
    let file = format!("{name}-file");
    for node in [
        json!({ "driver": "file", "node-name": file, "filename": lab.path(name) }),
        json!({ "driver": "qcow2", "node-name": name, "file": file }),
    ] {
        lab.run("blockdev-add", node).await;
    }
}

/// Runs a snapshot job of the machine; its error.
async fn snapshot_job(lab: &Lab, command: &str, vmstate: &str, devices: &[&str]) -> Option<String> {
    let arguments = json!({ "job-id": "s", "tag": "saved", "vmstate": vmstate,
                            "devices": devices });
    lab.run(command, arguments).await;
    let ended = async || {
        let jobs = lab.run("query-jobs", json!({})).await;
        jobs.as_array().unwrap().iter().any(|job| job["status"] == "concluded")
    };
    lab.until("the job has ended", ended).await;
    let jobs = lab.run("query-jobs", json!({})).await;
    lab.run("job-dismiss", json!({ "id": "s" })).await;
    jobs[0]["error"].as_str().map(str::to_owned)
}

#[tokio::test]
async fn a_machine_is_neither_saved_nor_loaded_during_an_access() {
    let lab = start(&SCSI_WITHOUT_DRIVES).await;
    for name in ["disk", "state", "image"] {
        add_qcow2(&lab, name).await;
    }
    // A raw node above a format is reverted through it.
    let raw = json!({ "driver": "raw", "node-name": "above", "file": "disk" });
    lab.run("blockdev-add", raw).await;
    let plug = json!({ "driver": "scsi-hd", "id": "sd", "bus": "scsi.0", "drive": "above" });
    lab.run("device_add", plug).await;
    device_writes(&lab, "-d sd", 0x10, 0, MIB).await;
    assert_eq!(
        snapshot_job(&lab, "snapshot-save", "state", &["state", "disk", "image"]).await,
        None
    );
    device_writes(&lab, "-d sd", OLD, 0, MIB).await;
    let before = lab.graph().await;

    // Once without a bitmap of a target on the disk.
    let device = json!({ "device": "sd", "fleecing": "image", "buffer-size": 0 });
    let info = lab.setup("t", json!([device])).await;
    let export = lab.export(&info[0]).await;
    device_writes(&lab, "-d sd", 0x78, 0, MIB / 2).await;
    let said = monitor(&lab, "savevm again").await;
    assert!(said.contains("Error"), "{said}");
    let error = snapshot_job(&lab, "snapshot-save", "state", &["state"]).await.unwrap();
    assert!(error.contains(BUSY), "{error}");
    for devices in [["state", "disk"], ["state", "image"]] {
        let error = snapshot_job(&lab, "snapshot-load", "state", &devices).await.unwrap();
        assert!(error.contains("dirty bitmaps"), "{error}");
    }
    let error = snapshot_job(&lab, "snapshot-load", "state", &["state", "above"]).await.unwrap();
    assert!(error.contains("dirty bitmaps") || error.contains("does not exist"), "{error}");
    let said = monitor(&lab, "loadvm saved").await;
    assert!(said.contains("Error"), "{said}");
    lab.expect(&export, OLD, 0, MIB).await;
    lab.expect(&export, 0, MIB, DISK_BYTES - MIB).await;
    lab.teardown("t", true).await;
    assert_eq!(lab.graph().await, before);

    // Afterwards it can be loaded.
    assert_eq!(snapshot_job(&lab, "snapshot-load", "state", &["state", "disk"]).await, None);
    lab.setup("t", json!([{ "device": "sd", "fleecing": "image" }])).await;
    lab.quit().await;
}

/// A SCSI bus without disks.
const SCSI_WITHOUT_DRIVES: [&str; 2] = ["-device", "virtio-scsi-pci,id=scsi,iothread=io0"];

#[tokio::test]
async fn changes_of_a_drive_are_refused() {
    let lab = start(&[]).await;
    fill(&lab, "old", OLD);
    let info = set_up(&lab, "old", "old-fleecing").await;
    let export = lab.export(&info).await;
    device_writes(&lab, "old", 0x78, 0, MIB).await;
    let file = lab.path("new");
    for (command, arguments, reason) in [
        ("block_resize", json!({ "device": "old", "size": 2 * DISK_BYTES }), BUSY),
        ("blockdev-snapshot-sync", json!({ "device": "old", "snapshot-file": file }), BUSY),
        ("blockdev-snapshot-internal-sync", json!({ "device": "old", "name": "x" }), "root"),
        ("block-commit", json!({ "job-id": "j", "device": "old" }), "root"),
        ("drive-mirror", json!({ "device": "old", "target": file, "sync": "full" }), "root"),
        (
            "qom-set",
            json!({ "path": "/machine/peripheral/guest-disk0", "property": "drive",
                    "value": "old-fleecing" }),
            "",
        ),
    ] {
        refused(&lab, command, arguments, reason).await;
    }
    for (command, reason) in [
        ("savevm x", "Error"),
        ("snapshot_blkdev old /nowhere/new qcow2", BUSY),
        ("snapshot_blkdev_internal old x", "root"),
        ("block_resize old 8M", BUSY),
    ] {
        let said = monitor(&lab, command).await;
        assert!(said.contains(reason), "{command}: {said}");
    }
    // A backup job is no change.
    let job = json!({ "job-id": "j", "device": "old", "target": "alone", "sync": "full" });
    let mut events = lab.session().events();
    lab.run("blockdev-backup", job).await;
    let done = lab.next_event(&mut events, "BLOCK_JOB_COMPLETED").await;
    assert_eq!(done.get("error"), None, "{done}");
    device_writes(&lab, "old", 0x79, 0, MIB).await;
    assert_eq!((byte(&lab, "alone", 0), byte(&lab, "alone", MIB)), (0x78, OLD));
    lab.expect(&export, OLD, 0, DISK_BYTES).await;
    lab.teardown("t", true).await;
    assert_eq!(byte(&lab, "old", 0), 0x79);
    lab.quit().await;
}

#[tokio::test]
async fn a_devices_drive_is_exchanged_above_the_filter_only() {
    let lab = start(&[]).await;
    fill(&lab, "disk0", OLD);
    let info = set_up(&lab, "disk0", "disk0-fleecing").await;
    let export = lab.export(&info).await;
    let drive = |node: &str| {
        json!({ "path": "/machine/peripheral/guest-disk0/virtio-backend", "property": "drive",
                "value": node })
    };
    refused(&lab, "qom-set", drive("disk0"), "disk0").await;
    let filter = info["node-name"].as_str().unwrap().replace("-1", "-0");
    lab.run("object-add", json!({ "qom-type": "throttle-group", "id": "free" })).await;
    let top = json!({ "driver": "throttle", "node-name": "top", "throttle-group": "free",
                      "file": filter });
    lab.run("blockdev-add", top).await;
    lab.run("qom-set", drive("top")).await;
    device_writes(&lab, "-d guest-disk0/virtio-backend", 0x78, 0, MIB).await;
    lab.expect(&export, OLD, 0, DISK_BYTES).await;
    lab.teardown("t", true).await;
    device_writes(&lab, "-d guest-disk0/virtio-backend", 0x79, MIB, MIB).await;
    assert_eq!((byte(&lab, "disk0", 0), byte(&lab, "disk0", MIB)), (0x78, 0x79));
    lab.quit().await;
}
