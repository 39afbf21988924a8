// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line as text, for whole configurations.

use super::*;
use crate::storage::Storage as _;

fn find(disk: &DiskEntry) -> Result<DiskFile, StorageError> {
    let (path, data): (PathBuf, _) = if disk.volume.starts_with('/') {
        (disk.volume.clone().into(), None)
    } else {
        let volume: crate::storage::VolumeId = disk.volume.parse()?;
        let storage = crate::storage::DirStorage::new("local", "/store");
        (storage.volume_path(&volume)?, storage.data_path(&volume)?)
    };
    let is_device = path.starts_with("/dev");
    let is_aligned = !path.ends_with("odd.raw") && !path.ends_with("odd.qcow2");
    let direct = !path.starts_with("/tmpfs");
    let size_bytes = path.to_str().and_then(|path| path.split('-').find_map(|n| n.parse().ok()));
    Ok(DiskFile { is_device, direct, is_aligned, size_bytes, path, data })
}

fn build_text(text: &str) -> Result<CommandLine, CmdlineError> {
    let layout = Layout::new(Some("/r".into()));
    let input =
        Input { layout: &layout, id: 100, find: &find, paused: true, mark: None, live: &[] };
    build(&VmConfig::parse(text), &input)
}

/// The options of one name.
fn values<'a>(line: &'a CommandLine, name: &str) -> Vec<&'a str> {
    let pairs = line.args.windows(2).filter(|pair| pair[0] == name);
    pairs.map(|pair| pair[1].as_str()).collect()
}

#[test]
fn a_whole_configuration() {
    let line = build_text(
        "#a note\nagent: 1\nargs: -kernel /boot/vmlinux -append 'console=ttyS0 quiet'\n\
         boot: order=virtio1;scsi0\ncores: 2\ncpu: qemu64,flags=+aes;-pcid\nide2: none,media=cdrom\n\
         memory: 256\nname: a,b\nostype: l26\nscsi0: local:100/vm-100-disk-0.qcow2,cache=writeback,discard=on,iothread=1,serial=S%201,size=1G,ssd=1\n\
         scsihw: virtio-scsi-single\nserial0: socket\nsmbios1: uuid=11111111-2222-3333-4444-555555555555\n\
         virtio1: /dev/vg/lv,backup=0\nvmgenid: 1\n")
    .unwrap();
    assert_eq!(line.notices, Vec::<String>::new());
    assert_eq!(line.args.join("\n"), include_str!("golden.txt").trim_end());
}

#[test]
fn unknown_keys_are_named_and_known_ones_listed() {
    let text = "net0: virtio\nscsi0: local:100/a.raw,rerror=1\nhostpci0: 1\nnonsense\n";
    let error = build_text(text).unwrap_err().to_string();
    assert!(error.contains("not supported: net0, hostpci0, 'nonsense', scsi0 rerror."), "{error}");
    assert!(error.contains("memory") && error.contains("virtioN"), "{error}");
}

#[test]
fn a_qemu_with_nothing_but_disks_has_no_machine_and_no_devices() {
    let config = VmConfig::parse(
        "net0: virtio\nbios: ovmf\nefidisk0: local:100/e.raw\nscsi0: local:100/a.qcow2,mbps=1\n\
         virtio1: local:100/b.raw,backup=0\nide2: local:100/x.raw,media=cdrom\nargs: -kernel /x\n",
    );
    let layout = Layout::new(Some("/r".into()));
    let input =
        Input { layout: &layout, id: 100, find: &find, paused: true, mark: Some("m-1"), live: &[] };
    let keys = ["efidisk0", "scsi0"].map(str::to_owned);
    let line = build_disks_only(&config, &input, &keys, true).unwrap();
    assert!(is_disks_only(&line.args));
    assert!(values(&line, "-device").is_empty() && values(&line, "-kernel").is_empty());
    assert_eq!(values(&line, "-chardev")[0], "null,id=m-1");
    assert_eq!(line.args.last().map(String::as_str), Some("-S"));
    let nodes = values(&line, "-blockdev");
    assert_eq!(nodes.len(), 2, "{nodes:?}");
    for (node, name) in nodes.iter().zip(["drive-efidisk0", "drive-scsi0"]) {
        assert!(node.contains(name) && node.contains("\"read-only\":true"), "{node}");
    }
    let line = build_text("scsi0: local:100/a.raw\n").unwrap();
    assert!(!is_disks_only(&line.args));
}

#[test]
fn limits_are_above_the_node_that_is_backed_up() {
    let line = build_text(
        "scsihw: virtio-scsi-single\nscsi0: local:100/a.raw,mbps=0.5,iops_wr=100,iops_wr_max=0\n\
         virtio1: local:100/b.raw,mbps_rd_max=2,queues=4\n",
    )
    .unwrap();
    assert_eq!(
        values(&line, "-object"),
        [
            r#"{"id":"limits-scsi0","limits":{"bps-total":524288,"iops-write":100},"qom-type":"throttle-group"}"#,
            r#"{"id":"limits-virtio1","limits":{"bps-read-max":2097152},"qom-type":"throttle-group"}"#,
        ]
    );
    let nodes = values(&line, "-blockdev");
    assert_eq!(
        nodes[1],
        r#"{"driver":"throttle","file":"drive-scsi0","node-name":"throttle-scsi0","throttle-group":"limits-scsi0"}"#
    );
    let devices = values(&line, "-device");
    assert!(devices[1].contains("drive=throttle-scsi0"), "{devices:?}");
    assert!(devices[2].contains(",num-queues=4,drive=throttle-virtio1"), "{devices:?}");
    let line = build_text("scsihw: virtio-scsi-single\nscsi0: local:100/a.raw,queues=3\n").unwrap();
    assert!(values(&line, "-device")[0].ends_with(",num_queues=3"));
    let line = build_text("sata0: local:100/a.raw,queues=3\n").unwrap();
    assert!(line.notices[0].contains("'queues' of sata0 has no effect"), "{:?}", line.notices);
    for bad in ["mbps=-1", "mbps=x", "iops=NaN", "iops=1e20", "queues=0", "queues=x"] {
        assert!(build_text(&format!("virtio0: local:100/a.raw,{bad}\n")).is_err(), "{bad}");
    }
}

#[test]
fn values_cannot_bring_options() {
    for bad in [
        "machine: q35,x=1",
        "machine: q35;x",
        "machine: microvm",
        "cpu: max,flags=+a b",
        "cpu: host",
        "cpu: max,hidden=1",
        "memory: 0",
        "memory: 1,x",
        "cores: 99999999999999999999",
        "vmgenid: 1,x=2",
        "serial0: /dev/ttyS0",
        "template: 1",
        "bios: coreboot",
        "boot: x",
        "vga: cirrus",
        "scsi7: local:100/a.raw",
        "scsi0: local:100/a.raw,cache=x",
        "scsi0: ../a.raw",
        "scsi0: other:100/a.raw",
        "virtio0: none,media=cdrom",
        "args: 'a",
    ] {
        assert!(build_text(bad).is_err(), "{bad}");
    }
    let line = build_text("name: a,sandbox=off\nmemory: 64\n").unwrap();
    assert_eq!(values(&line, "-name"), ["guest=a,,sandbox=off,debug-threads=on"]);
}

#[test]
fn a_file_system_without_direct_io_gets_a_cache_unless_the_mode_is_given() {
    let line = build_text("virtio0: /tmpfs/a.raw\n").unwrap();
    assert!(values(&line, "-blockdev")[0].contains("\"direct\":false"));
    assert!(line.notices[0].contains("cache=writeback for virtio0"), "{:?}", line.notices);
    let line = build_text("virtio0: /tmpfs/a.raw,cache=none\n").unwrap();
    assert!(values(&line, "-blockdev")[0].contains("\"direct\":true"));
}

#[test]
fn a_raw_disk_of_an_odd_size_gets_a_cache_unless_the_mode_is_given() {
    let line = build_text("virtio0: local:100/odd.raw\nvirtio1: local:100/odd.qcow2\n");
    let line = line.unwrap();
    let nodes = values(&line, "-blockdev");
    assert!(nodes[0].contains("\"direct\":false") && nodes[1].contains("\"direct\":true"));
    let [notice] = line.notices.as_slice() else { panic!("{:?}", line.notices) };
    assert!(notice.contains("multiple of 4096") && notice.contains("virtio0"), "{notice}");
    let line = build_text("virtio0: local:100/odd.raw,cache=none\n").unwrap();
    assert!(values(&line, "-blockdev")[0].contains("\"direct\":true"));
}

#[test]
fn single_controllers_fill_their_slots_without_gaps() {
    let text: String = (0..31)
        .filter(|n| n % 2 == 1)
        .map(|n| format!("scsi{n}: local:100/vm-100-disk-{n}.raw\n"))
        .collect();
    let line = build_text(&format!("scsihw: virtio-scsi-single\n{text}")).unwrap();
    let controllers: Vec<_> =
        values(&line, "-device").into_iter().filter(|d| d.starts_with("virtio-scsi-pci")).collect();
    assert_eq!(controllers.len(), 15);
    assert!(controllers[0].starts_with("virtio-scsi-pci,id=virtioscsi1,bus=pcie.0,addr=0x1a.0x0"));
    assert!(controllers[8].contains("id=virtioscsi17,bus=pcie.0,addr=0x1b.0x0"));
}

#[test]
fn an_old_machine_has_other_buses() {
    let line = build_text(
        "machine: pc\nide3: local:100/a.raw\nsata1: local:100/b.raw\nscsi0: local:100/c.raw\n",
    )
    .unwrap();
    let devices = values(&line, "-device");
    assert!(devices[0].starts_with("ide-hd,id=ide3,bus=ide.1,unit=1,"), "{devices:?}");
    assert_eq!(devices[1], "ahci,id=ahci0,bus=pci.0,addr=0x07");
    assert!(devices[2].starts_with("ide-hd,id=sata1,bus=ahci0.1,"), "{devices:?}");
    assert_eq!(devices[3], "lsi,id=scsihw0,bus=pci.0,addr=0x05");
}

#[test]
fn raw_data_with_bitmaps_beside_it_is_opened_by_name() {
    let text = "scsi0: local:100/a.raw.qcow2,discard=on,aio=native\n";
    let line = build_text(text).unwrap();
    let node: serde_json::Value = serde_json::from_str(values(&line, "-blockdev")[0]).unwrap();
    assert_eq!(node["driver"], "qcow2");
    assert_eq!(node["file"]["filename"], "/store/images/100/a.raw.qcow2");
    let (file, data) = (&node["file"], &node["data-file"]);
    assert_eq!(data["filename"], "/store/images/100/a.raw.data");
    assert_eq!(data["node-name"], "data-scsi0");
    for option in ["driver", "cache", "aio", "discard", "read-only"] {
        assert_eq!(data[option], file[option], "{option}");
    }
    assert!(build_text("scsi0: local:100/a.raw.qcow2,format=raw\n").is_err());
}

#[test]
fn a_machine_with_efi_has_its_firmware_and_variables_in_flash() {
    let vars = "bios: ovmf\nefidisk0: local:100/vm-540672-disk-1.raw,efitype=4m";
    let line = build_text(&format!("{vars},pre-enrolled-keys=0,size=528K\n")).unwrap();
    assert_eq!(values(&line, "-machine"), ["q35,pflash0=firmware,pflash1=drive-efidisk0"]);
    let nodes = values(&line, "-blockdev");
    assert!(nodes[0].contains("OVMF_CODE_4M.fd") && nodes[0].contains("\"read-only\":true"));
    let node: serde_json::Value = serde_json::from_str(nodes[1]).unwrap();
    assert_eq!((&node["node-name"], &node["read-only"]), (&"drive-efidisk0".into(), &false.into()));
    assert_eq!(node["size"], serde_json::Value::Null);
    assert!(values(&line, "-device").is_empty() && values(&line, "-global").is_empty());

    let line = build_text(&format!("{vars},pre-enrolled-keys=1,ms-cert=2023\n")).unwrap();
    assert!(values(&line, "-machine")[0].ends_with(",smm=on"));
    assert!(values(&line, "-blockdev")[0].contains("OVMF_CODE_4M.secboot.fd"));
    assert!(values(&line, "-global")[0].contains("property=secure,value=on"));

    // A storage that rounds sizes up.
    let large = vars.replace("540672", "4194304");
    let line = build_text(&large).unwrap();
    assert!(values(&line, "-blockdev")[1].contains("\"size\":540672"));

    for (bad, why) in [
        (large.replace(".raw", ".qcow2"), "has 4194304 bytes, and the firmware needs 540672"),
        (vars.replace("540672", "4096"), "has 4096 bytes"),
        (vars.replace("4m", "8m"), "'efitype' is not one of"),
        (format!("machine: pc\n{vars},pre-enrolled-keys=1"), "need a 'q35' machine"),
        (format!("{vars},iops=1"), "not supported: efidisk0 iops."),
        ("bios: ovmf".to_owned(), "needs an 'efidisk0'"),
    ] {
        let error = build_text(&bad).unwrap_err().to_string();
        assert!(error.contains(why), "{bad}: {error}");
    }
    let line = build_text("efidisk0: local:100/vm-540672-disk-1.raw\n").unwrap();
    assert!(line.notices[0].contains("no effect without 'bios: ovmf'"), "{:?}", line.notices);
}

#[test]
fn a_disk_that_is_being_filled_waits_for_its_archive_and_has_no_thread() {
    let layout = Layout::new(Some("/r".into()));
    let key = "virtio0".to_owned();
    let live = [LiveNode {
        key,
        socket: "/r/run/live-100/virtio0".into(),
        export: "x".to_owned(),
        overlay: None,
    }];
    let config = VmConfig::parse(
        "virtio0: local:100/a.qcow2,iothread=1\nvirtio1: local:100/b.raw,iothread=1\n",
    );
    let input =
        Input { layout: &layout, id: 100, find: &find, paused: true, mark: None, live: &live };
    let line = build(&config, &input).unwrap();
    let devices = values(&line, "-device");
    let of = |id: &str| *devices.iter().find(|device| device.contains(id)).unwrap();
    assert!(
        of("id=virtio0").contains(",rerror=stop,werror=stop")
            && !of("id=virtio0").contains("iothread")
    );
    assert!(of("id=virtio1").contains("iothread=iothread-virtio1"));
    assert!(!of("id=virtio1").contains("rerror"));
    assert_eq!(values(&line, "-object").len(), 1);
}
