// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks, their controllers and their I/O threads.

use std::path::Path;

use serde_json::{Value, json};

use super::{
    Chipset, CmdlineError, CommandLine, DiskFile, Input, LiveNode, boot_index, drive_node,
    firmware, path_text, words,
};
use crate::config::guest::{DiskEntry, VmConfig, split_numbered};
use crate::storage::ImageFormat;
use crate::vm::ovmf;

/// Options of a disk that are understood, beside its limits.
const OPTIONS: [&str; 14] = [
    "aio",
    "backup",
    "cache",
    "detect_zeroes",
    "discard",
    "format",
    "iothread",
    "media",
    "queues",
    "replicate",
    "ro",
    "serial",
    "shared",
    "size",
];
/// Limits of a disk: the option, QEMU's name for it, and how many bytes one is.
const LIMITS: [(&str, &str, Option<f64>); 12] = [
    ("iops", "iops-total", None),
    ("iops_max", "iops-total-max", None),
    ("iops_rd", "iops-read", None),
    ("iops_rd_max", "iops-read-max", None),
    ("iops_wr", "iops-write", None),
    ("iops_wr_max", "iops-write-max", None),
    ("mbps", "bps-total", MIB),
    ("mbps_max", "bps-total-max", MIB),
    ("mbps_rd", "bps-read", MIB),
    ("mbps_rd_max", "bps-read-max", MIB),
    ("mbps_wr", "bps-write", MIB),
    ("mbps_wr_max", "bps-write-max", MIB),
];
const MIB: Option<f64> = Some(1_048_576.0);
/// The highest limit that QEMU takes.
const LIMIT_MAX: f64 = 1e15;
/// Most queues of a device that are believed.
const QUEUES_MAX: u32 = 256;
/// Also understood, for disks that are told to be an SSD.
const OPTION_SSD: &str = "ssd";

/// Which controllers serve the SCSI disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ScsiHardware {
    Lsi,
    Virtio,
    /// One controller per disk.
    VirtioSingle,
}

/// A disk under construction.
struct Disk<'a> {
    entry: &'a DiskEntry,
    bus: &'a str,
    number: u32,
}

impl Disk<'_> {
    fn key(&self) -> &str {
        &self.entry.key
    }

    fn error(&self, why: impl Into<String>) -> CmdlineError {
        super::value_error(self.key(), &self.entry.to_value(), why)
    }

    fn is_empty_drive(&self) -> bool {
        self.entry.is_cdrom && self.entry.volume == "none"
    }
}

/// Adds all disks; returns options that are not understood, as `scsi0 mbps`.
pub(super) fn add(
    config: &VmConfig,
    input: &Input<'_>,
    chipset: Chipset,
    line: &mut CommandLine,
) -> Result<Vec<String>, CmdlineError> {
    let entries = config.disks()?;
    let mut disks: Vec<Disk<'_>> = entries
        .iter()
        .filter_map(|entry| {
            let (bus, number) = split_numbered(&entry.key)?;
            matches!(bus, "ide" | "sata" | "scsi" | "virtio").then_some(Disk { entry, bus, number })
        })
        .collect();
    disks.sort_by_key(|disk| (disk.bus, disk.number));
    let hardware = scsi_hardware(config)?;
    let mut unknown: Vec<String> =
        entries.iter().filter(|entry| entry.key == "efidisk0").flat_map(unknown_of_vars).collect();
    let mut ahci = false;
    let mut scsi_rank = 0;
    for disk in &disks {
        unknown.extend(unknown_options(disk));
        let cache = backend(disk, input, false, line)?;
        let live = input.live.iter().find(|live| live.key == disk.key());
        let drive = throttle(disk, live, line)?;
        // QEMU may move a disk out of its thread when the guest is paused by an error. A job on the disk that has just
        // failed of the same error is not ready for that, which ends QEMU (an assertion in its `job.c`).
        let iothread = match live {
            None => iothread(disk, hardware, line),
            Some(_) => String::new(),
        };
        let queues = queues(disk, hardware, line)?;
        let place = match disk.bus {
            "virtio" => {
                let slot = 0x0a + disk.number;
                format!("bus={},addr={slot:#04x}{iothread}{queues}", chipset.bus())
            }
            "scsi" => {
                let options = format!("{iothread}{queues}");
                controller(hardware, chipset, scsi_rank, disk, &options, line);
                scsi_rank += 1;
                scsi_place(hardware, disk)?
            }
            "sata" => {
                if !ahci {
                    line.option(
                        "-device",
                        format!("ahci,id=ahci0,bus={},addr=0x07", chipset.bus()),
                    );
                    ahci = true;
                }
                format!("bus=ahci0.{}", disk.number)
            }
            _ => ide_place(chipset, disk.number),
        };
        let backend = cache.map(|cache| (cache, drive));
        let mut device = device(disk, config, backend, &place)?;
        if live.is_some() {
            // What cannot be read or written now can be later, and the guest must not notice.
            device.push_str(",rerror=stop,werror=stop");
        }
        line.option("-device", device);
    }
    Ok(unknown)
}

/// Adds the block nodes of these disks, and no devices.
pub(super) fn add_nodes(
    config: &VmConfig,
    input: &Input<'_>,
    keys: &[String],
    read_only: bool,
    line: &mut CommandLine,
) -> Result<(), CmdlineError> {
    for entry in config.disks()?.iter().filter(|entry| keys.contains(&entry.key)) {
        add_node(entry, input, read_only, line)?;
    }
    Ok(())
}

/// Adds the block node of a disk, and no device.
pub(super) fn add_node(
    entry: &DiskEntry,
    input: &Input<'_>,
    read_only: bool,
    line: &mut CommandLine,
) -> Result<(), CmdlineError> {
    if let Some((bus, number)) = split_numbered(&entry.key) {
        backend(&Disk { entry, bus, number }, input, read_only, line)?;
    }
    Ok(())
}

/// Adds the limits of a disk, above its nodes: a backup reads below them. Returns the node that the
/// device uses.
fn throttle(
    disk: &Disk<'_>,
    live: Option<&LiveNode>,
    line: &mut CommandLine,
) -> Result<String, CmdlineError> {
    let key = disk.key();
    let mut limits = serde_json::Map::new();
    for (option, name, unit_bytes) in LIMITS {
        let Some(text) = disk.entry.options.get(option) else { continue };
        let number: Option<f64> = text.parse().ok().map(|n: f64| n * unit_bytes.unwrap_or(1.0));
        let number = number.filter(|n| (0.0..=LIMIT_MAX).contains(n));
        let number = number.ok_or_else(|| {
            disk.error(format!("'{option}' is not a number from 0 up that QEMU can keep."))
        })?;
        if number > 0.0 {
            // At least one: zero would be no limit at all.
            limits.insert(name.to_owned(), json!((number as u64).max(1)));
        }
    }
    let node = live.map_or_else(|| drive_node(key), LiveNode::top);
    if limits.is_empty() || disk.entry.is_cdrom {
        return Ok(node);
    }
    let group = format!("limits-{key}");
    let object = json!({ "qom-type": "throttle-group", "id": group, "limits": limits });
    line.option("-object", object.to_string());
    let throttled = format!("throttle-{key}");
    let filter = json!({ "driver": "throttle", "node-name": throttled, "throttle-group": group,
                         "file": node });
    line.option("-blockdev", filter.to_string());
    Ok(throttled)
}

/// The option for several queues, of a virtio disk or its own controller.
fn queues(
    disk: &Disk<'_>,
    hardware: ScsiHardware,
    line: &mut CommandLine,
) -> Result<String, CmdlineError> {
    let Some(text) = disk.entry.options.get("queues") else { return Ok(String::new()) };
    let count = text.parse().ok().filter(|n| (1..=QUEUES_MAX).contains(n));
    let count = count
        .ok_or_else(|| disk.error(format!("'queues' is not a number from 1 to {QUEUES_MAX}.")))?;
    match (disk.bus, hardware) {
        ("virtio", _) => Ok(format!(",num-queues={count}")),
        ("scsi", ScsiHardware::VirtioSingle) => Ok(format!(",num_queues={count}")),
        _ => {
            line.notices.push(format!(
                "'queues' of {} has no effect: only virtio disks and scsihw virtio-scsi-single have queues",
                disk.key()
            ));
            Ok(String::new())
        }
    }
}

fn scsi_hardware(config: &VmConfig) -> Result<ScsiHardware, CmdlineError> {
    match config.get("scsihw") {
        None | Some("lsi") => Ok(ScsiHardware::Lsi),
        Some("virtio-scsi-pci") => Ok(ScsiHardware::Virtio),
        Some("virtio-scsi-single") => Ok(ScsiHardware::VirtioSingle),
        Some(other) => {
            let why = "'lsi', 'virtio-scsi-pci' or 'virtio-scsi-single' is supported.";
            Err(super::value_error("scsihw", other, why))
        }
    }
}

fn unknown_of_vars(entry: &DiskEntry) -> Vec<String> {
    let names = entry.options.named.iter().map(|(name, _)| name.as_str());
    names
        .filter(|name| !OPTIONS.contains(name) && !ovmf::OPTIONS.contains(name))
        .map(|name| format!("{} {name}", entry.key))
        .collect()
}

fn unknown_options(disk: &Disk<'_>) -> Vec<String> {
    let names = disk.entry.options.named.iter().map(|(name, _)| name.as_str());
    names
        .filter(|name| !OPTIONS.contains(name) && *name != OPTION_SSD)
        .filter(|name| !LIMITS.iter().any(|(limit, ..)| limit == name))
        .map(|name| format!("{} {name}", disk.key()))
        .collect()
}

/// Cache modes: past the page cache, ignore flushes, the guest sees a write cache.
struct Cache {
    direct: bool,
    no_flush: bool,
    write_cache: bool,
}

fn cache(
    disk: &Disk<'_>,
    file: &DiskFile,
    format: ImageFormat,
    line: &mut CommandLine,
) -> Result<Cache, CmdlineError> {
    let mode = disk.entry.options.get("cache");
    let (direct, no_flush, write_cache) = match mode.unwrap_or("none") {
        "none" => (true, false, true),
        "writeback" => (false, false, true),
        "writethrough" => (false, false, false),
        "directsync" => (true, false, false),
        "unsafe" => (false, true, true),
        _ => {
            return Err(disk.error(
                "'cache' is not one of none, writeback, writethrough, directsync, unsafe.",
            ));
        }
    };
    let obstacle = if !file.direct {
        Some("is on a file system without direct I/O")
    } else if format == ImageFormat::Raw && !file.is_aligned {
        // QEMU refuses it where it takes the file system's blocks for larger, with words about
        // permissions.
        Some("has a size that is no multiple of 4096 bytes, as direct I/O may need")
    } else {
        None
    };
    if let Some(obstacle) = obstacle.filter(|_| direct && mode.is_none()) {
        line.notices.push(format!(
            "'{}' {obstacle}; using cache=writeback for {}",
            file.path.display(),
            disk.key()
        ));
        return Ok(Cache { direct: false, no_flush, write_cache });
    }
    Ok(Cache { direct, no_flush, write_cache })
}

/// Adds the block nodes; returns the cache mode, or nothing for a drive without a medium.
fn backend(
    disk: &Disk<'_>,
    input: &Input<'_>,
    read_only: bool,
    line: &mut CommandLine,
) -> Result<Option<Cache>, CmdlineError> {
    if disk.is_empty_drive() {
        return Ok(None);
    }
    let key = disk.key();
    let file = (input.find)(disk.entry)
        .map_err(|source| CmdlineError::Volume { key: key.to_owned(), source })?;
    let options = &disk.entry.options;
    let ending = file.path.extension().and_then(|end| end.to_str());
    let format = match options.get("format") {
        Some(name) => ImageFormat::from_name(name)
            .ok_or_else(|| disk.error("'format' is not one of raw, qcow2."))?,
        None => ending.and_then(ImageFormat::from_name).unwrap_or(ImageFormat::Raw),
    };
    if file.data.is_some() && format != ImageFormat::Qcow2 {
        return Err(disk.error("'format' does not fit: the volume's main file is a qcow2 image."));
    }
    let cache = cache(disk, &file, format, line)?;
    let discard = match options.get("discard") {
        None | Some("ignore") => "ignore",
        Some("on") => "unmap",
        Some(_) => return Err(disk.error("'discard' is not one of on, ignore.")),
    };
    let detect_zeroes = match (options.flag("detect_zeroes", true), discard) {
        (false, _) => "off",
        (true, "unmap") => "unmap",
        (true, _) => "on",
    };
    let aio = match options.get("aio") {
        None => "threads",
        Some(aio @ ("threads" | "native" | "io_uring")) => aio,
        Some(_) => return Err(disk.error("'aio' is not one of threads, native, io_uring.")),
    };
    let read_only = read_only || disk.entry.is_cdrom || options.flag("ro", false);
    let cache_json = json!({ "direct": cache.direct, "no-flush": cache.no_flush });
    let below = |node: &str, path: &Path| -> Result<Value, CmdlineError> {
        Ok(json!({
            "driver": if file.is_device { "host_device" } else { "file" },
            "node-name": format!("{node}-{key}"),
            "filename": path_text(path)?,
            "read-only": read_only,
            "discard": discard,
            "cache": cache_json,
            "aio": aio,
        }))
    };
    let mut node: Value = json!({
        "driver": format.name(),
        "node-name": drive_node(key),
        "read-only": read_only,
        "discard": discard,
        "detect-zeroes": if read_only { "off" } else { detect_zeroes },
        "cache": cache_json,
        "file": below("file", &file.path)?,
    });
    if let Some(size_bytes) = firmware::shown_bytes(disk.entry, &file, format)? {
        node["size"] = size_bytes.into();
    }
    if let Some(data) = &file.data {
        // Named here, so that QEMU does not open whatever the image's header says.
        node["data-file"] = below("data", data)?;
    }
    let live = input.live.iter().find(|live| live.key == key);
    if let Some(live) = live {
        line.option("-blockdev", live.archive()?.to_string());
    }
    let overlay = live.map(|live| live.attach(&mut node)).transpose()?.flatten();
    line.option("-blockdev", node.to_string());
    if let Some(overlay) = overlay {
        line.option("-blockdev", overlay.to_string());
    }
    Ok(Some(cache))
}

/// Adds the I/O thread a disk asks for; returns the option for whatever device uses it.
fn iothread(disk: &Disk<'_>, hardware: ScsiHardware, line: &mut CommandLine) -> String {
    if !disk.entry.options.flag("iothread", false) {
        return String::new();
    }
    let key = disk.key();
    let can =
        disk.bus == "virtio" || (disk.bus == "scsi" && hardware == ScsiHardware::VirtioSingle);
    if !can {
        line.notices.push(format!(
            "'iothread' of {key} has no effect: only virtio disks and scsihw virtio-scsi-single have I/O threads"
        ));
        return String::new();
    }
    line.option("-object", format!("iothread,id=iothread-{key}"));
    format!(",iothread=iothread-{key}")
}

fn controller(
    hardware: ScsiHardware,
    chipset: Chipset,
    rank: u32,
    disk: &Disk<'_>,
    options: &str,
    line: &mut CommandLine,
) {
    let bus = chipset.bus();
    let device = match hardware {
        ScsiHardware::VirtioSingle => {
            // By rank, because a guest looks at a slot only if its function 0 is there.
            let (slot, function) = (0x1a + rank / 8, rank % 8);
            format!(
                "virtio-scsi-pci,id=virtioscsi{},bus={bus},addr={slot:#04x}.{function:#x},multifunction=on{options}",
                disk.number
            )
        }
        _ if rank > 0 => return,
        ScsiHardware::Lsi => format!("lsi,id=scsihw0,bus={bus},addr=0x05"),
        ScsiHardware::Virtio => format!("virtio-scsi-pci,id=scsihw0,bus={bus},addr=0x05"),
    };
    line.option("-device", device);
}

fn scsi_place(hardware: ScsiHardware, disk: &Disk<'_>) -> Result<String, CmdlineError> {
    let number = disk.number;
    match hardware {
        ScsiHardware::Lsi if number > 6 => {
            Err(disk
                .error("an lsi controller has scsi0 to scsi6; set 'scsihw: virtio-scsi-single'."))
        }
        ScsiHardware::Lsi => Ok(format!("bus=scsihw0.0,scsi-id={number}")),
        ScsiHardware::Virtio => Ok(format!("bus=scsihw0.0,channel=0,scsi-id=0,lun={number}")),
        ScsiHardware::VirtioSingle => {
            Ok(format!("bus=virtioscsi{number}.0,channel=0,scsi-id=0,lun={number}"))
        }
    }
}

fn ide_place(chipset: Chipset, number: u32) -> String {
    match chipset {
        Chipset::Q35 => format!("bus=ide.{number},unit=0"),
        Chipset::I440fx => format!("bus=ide.{},unit={}", number / 2, number % 2),
    }
}

fn device(
    disk: &Disk<'_>,
    config: &VmConfig,
    backend: Option<(Cache, String)>,
    place: &str,
) -> Result<String, CmdlineError> {
    let key = disk.key();
    let driver = match (disk.bus, disk.entry.is_cdrom) {
        ("virtio", false) => "virtio-blk-pci",
        ("virtio", true) => return Err(disk.error("a virtio disk cannot be a CD-ROM drive.")),
        ("scsi", false) => "scsi-hd",
        ("scsi", true) => "scsi-cd",
        (_, false) => "ide-hd",
        (_, true) => "ide-cd",
    };
    let mut text = format!("{driver},id={key},{place}");
    if let Some((cache, drive)) = backend {
        text.push_str(&format!(",drive={drive}"));
        if !disk.entry.is_cdrom {
            let state = if cache.write_cache { "on" } else { "off" };
            text.push_str(&format!(",write-cache={state}"));
        }
    }
    if let Some(index) = boot_index(config, key) {
        text.push_str(&format!(",bootindex={index}"));
    }
    if let Some(serial) = disk.entry.options.get("serial") {
        text.push_str(&format!(",serial={}", super::escaped(&words::decode_percent(serial))));
    }
    if disk.bus != "virtio" && !disk.entry.is_cdrom && disk.entry.options.flag(OPTION_SSD, false) {
        text.push_str(",rotation_rate=1");
    }
    Ok(text)
}
