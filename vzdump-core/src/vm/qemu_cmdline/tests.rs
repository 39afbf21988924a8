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
    Ok(DiskFile { is_device, direct: !path.starts_with("/tmpfs"), is_aligned, path, data })
}

fn build_text(text: &str, lenient: bool) -> Result<CommandLine, CmdlineError> {
    let layout = Layout::new(Some("/r".into()));
    let input = Input { layout: &layout, id: 100, find: &find, paused: true, lenient };
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
         virtio1: /dev/vg/lv,backup=0\nvmgenid: 1\n",
        false,
    )
    .unwrap();
    assert_eq!(line.notices, Vec::<String>::new());
    assert_eq!(line.args.join("\n"), include_str!("golden.txt").trim_end());
}

#[test]
fn unknown_keys_are_named_and_known_ones_listed() {
    let text = "net0: virtio\nscsi0: local:100/a.raw,mbps=1\nhostpci0: 1\nnonsense\n";
    let error = build_text(text, false).unwrap_err().to_string();
    assert!(error.contains("not supported: net0, hostpci0, 'nonsense', scsi0 mbps."), "{error}");
    assert!(error.contains("memory") && error.contains("virtioN"), "{error}");
    let line = build_text(text, true).unwrap();
    assert_eq!(line.notices.len(), 4);
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
        "bios: ovmf",
        "boot: x",
        "vga: cirrus",
        "scsi7: local:100/a.raw",
        "scsi0: local:100/a.raw,cache=x",
        "scsi0: ../a.raw",
        "scsi0: other:100/a.raw",
        "virtio0: none,media=cdrom",
        "args: 'a",
    ] {
        assert!(build_text(bad, true).is_err(), "{bad}");
    }
    let line = build_text("name: a,sandbox=off\nmemory: 64\n", false).unwrap();
    assert_eq!(values(&line, "-name"), ["guest=a,,sandbox=off,debug-threads=on"]);
}

#[test]
fn a_file_system_without_direct_io_gets_a_cache_unless_the_mode_is_given() {
    let line = build_text("virtio0: /tmpfs/a.raw\n", false).unwrap();
    assert!(values(&line, "-blockdev")[0].contains("\"direct\":false"));
    assert!(line.notices[0].contains("cache=writeback for virtio0"), "{:?}", line.notices);
    let line = build_text("virtio0: /tmpfs/a.raw,cache=none\n", false).unwrap();
    assert!(values(&line, "-blockdev")[0].contains("\"direct\":true"));
}

#[test]
fn a_raw_disk_of_an_odd_size_gets_a_cache_unless_the_mode_is_given() {
    let line = build_text("virtio0: local:100/odd.raw\nvirtio1: local:100/odd.qcow2\n", false);
    let line = line.unwrap();
    let nodes = values(&line, "-blockdev");
    assert!(nodes[0].contains("\"direct\":false") && nodes[1].contains("\"direct\":true"));
    let [notice] = line.notices.as_slice() else { panic!("{:?}", line.notices) };
    assert!(notice.contains("multiple of 4096") && notice.contains("virtio0"), "{notice}");
    let line = build_text("virtio0: local:100/odd.raw,cache=none\n", false).unwrap();
    assert!(values(&line, "-blockdev")[0].contains("\"direct\":true"));
}

#[test]
fn single_controllers_fill_their_slots_without_gaps() {
    let text: String = (0..31)
        .filter(|n| n % 2 == 1)
        .map(|n| format!("scsi{n}: local:100/vm-100-disk-{n}.raw\n"))
        .collect();
    let line = build_text(&format!("scsihw: virtio-scsi-single\n{text}"), false).unwrap();
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
        false,
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
    let line = build_text(text, false).unwrap();
    let node: serde_json::Value = serde_json::from_str(values(&line, "-blockdev")[0]).unwrap();
    assert_eq!(node["driver"], "qcow2");
    assert_eq!(node["file"]["filename"], "/store/images/100/a.raw.qcow2");
    let (file, data) = (&node["file"], &node["data-file"]);
    assert_eq!(data["filename"], "/store/images/100/a.raw.data");
    assert_eq!(data["node-name"], "data-scsi0");
    for option in ["driver", "cache", "aio", "discard", "read-only"] {
        assert_eq!(data[option], file[option], "{option}");
    }
    assert!(build_text("scsi0: local:100/a.raw.qcow2,format=raw\n", false).is_err());
}
