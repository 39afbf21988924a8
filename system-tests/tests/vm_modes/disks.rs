// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks of every kind, and which of them are backed up.

use crate::sector::Guest;
use crate::site::{Disk, Site};

const MIB: u64 = 1 << 20;
/// A rate at which no disk here would be read within the patience of these tests.
const SLOW: &str = ",mbps=0.001,iops_rd=1";

const fn disk(
    key: &'static str,
    format: &'static str,
    options: &'static str,
    size_bytes: u64,
) -> Disk {
    Disk { key, options, format, size_bytes }
}

#[test]
fn s42_disks_on_every_bus_of_every_size_with_every_option_are_restored_exactly() {
    let disks = [
        disk("virtio0", "raw", "", 4 * MIB),
        disk("virtio1", "raw", ",iothread=1,queues=4", 3 * MIB + 512),
        disk("virtio2", "qcow2", SLOW, 2 * MIB + 1536),
        disk("virtio3", "raw", ",ro=1", 5 * MIB / 2 + 512),
        disk("scsi0", "raw", ",iothread=1,queues=2,discard=on", MIB + 4096),
        disk("scsi1", "qcow2", ",ro=1,iothread=1", 2 * MIB + 1024),
        disk("scsi2", "raw", ",iothread=1,mbps=0.001", MIB + 512),
        disk("sata0", "raw", SLOW, MIB + 3 * 512),
        disk("sata5", "qcow2", "", 3 * MIB),
        disk("ide0", "raw", "", MIB - 512),
        disk("ide3", "qcow2", ",cache=writeback", 512),
        // Files that do not end with a sector.
        disk("virtio4", "raw", ",cache=writeback", MIB + 1),
        disk("scsi4", "raw", ",cache=writeback", 1023),
    ];
    let mut site = Site::with(Guest::Writes, "scsihw: virtio-scsi-single\n", &disks);
    let off = site.backup("snapshot");
    off.assert_good();
    site.assert_restores(&off);
    site.start();
    for mode in ["snapshot", "suspend", "stop"] {
        let report = site.backup(mode);
        report.assert_good();
        let volumes = report.guest["volumes"].as_array().unwrap();
        assert_eq!(volumes.len(), disks.len(), "{mode}");
        site.assert_restores(&report);
    }
    site.assert_tidy();
}

#[test]
fn an_increment_of_a_running_vm_with_limits_and_threads_is_one() {
    let disks = [
        disk("virtio0", "raw", "", 4 * MIB),
        disk("scsi0", "raw", ",iothread=1,mbps=100", 2 * MIB + 512),
    ];
    let mut site = Site::with(Guest::Writes, "scsihw: virtio-scsi-single\n", &disks);
    site.start();
    site.backup("snapshot").assert_good();
    let second = site.backup("suspend");
    second.assert_good();
    for volume in second.guest["volumes"].as_array().unwrap() {
        assert_eq!(volume["bitmap_action"], "used", "{volume}");
    }
    site.assert_restores(&second);
}

#[test]
fn s50_what_is_included_and_excluded_is_what_the_log_says() {
    let disks = [
        disk("virtio0", "raw", "", 2 * MIB),
        disk("virtio1", "raw", ",backup=0", MIB),
        disk("efidisk0", "raw", "", 128 << 10),
    ];
    let mut site = Site::with(Guest::Writes, "", &disks);
    let passed = site.path("passed");
    std::fs::write(&passed, vec![7; 1 << 20]).unwrap();
    let iso = site.path("local/images/100/x.raw");
    std::fs::write(iso, vec![8; 4096]).unwrap();
    site.add_to_config(&format!(
        "ide2: none,media=cdrom\nsata1: local:100/x.raw,media=cdrom\nunused0: local:100/gone.raw\n\
         sata2: {}\n",
        passed.display()
    ));
    site.contents.push(("sata2", vec![7; 1 << 20]));
    let report = site.backup("snapshot");
    report.assert_good();
    for line in [
        "INFO: include disk 'virtio0' 'local:100/vm-100-disk-0.raw' 2M",
        "INFO: exclude disk 'virtio1' 'local:100/vm-100-disk-1.raw' (backup=no)",
        "INFO: exclude disk 'efidisk0' 'local:100/vm-100-disk-2.raw' (efidisk but no OVMF BIOS)",
        "INFO: skip unused drive 'local:100/gone.raw' (not included into backup)",
    ] {
        report.assert_says(line);
    }
    report.assert_says(&format!("INFO: include disk 'sata2' '{}' 1M", passed.display()));
    assert!(
        !report.lines.contains("x.raw") && !report.lines.contains("'ide2'"),
        "{}",
        report.lines
    );
    let volumes = report.guest["volumes"].as_array().unwrap();
    let keys: Vec<_> = volumes.iter().map(|volume| volume["device"].as_str().unwrap()).collect();
    assert_eq!(keys, ["virtio0", "sata2"]);
}

#[test]
fn s51_snapshots_pending_and_special_sections_are_told_and_left_out() {
    let site = Site::new(Guest::Writes);
    site.add_to_config(
        "unused3: local:100/u.raw\n\n[PENDING]\nmemory: 64\n\n[special:cloudinit]\nx: 1\n\n[before]\nmemory: 16\n",
    );
    let report = site.backup("snapshot");
    report
        .assert_good()
        .assert_says("INFO: snapshots found (not included into backup)")
        .assert_says("INFO: pending configuration changes found (not included into backup)");
    let archive = format!("backups:backup/{}", report.guest["archive"].as_str().unwrap());
    let shown = site.vzdump.run(&["show-config", &archive], crate::site::SOON).unwrap().to_string();
    assert!(shown.contains("virtio0"), "{shown}");
    for left_out in ["PENDING", "special", "before", "unused3", "memory: 64"] {
        assert!(!shown.contains(left_out), "{left_out}: {shown}");
    }
}
