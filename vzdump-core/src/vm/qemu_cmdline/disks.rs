// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks, their controllers and their I/O threads.

use std::path::Path;

use serde_json::{Value, json};

use super::{Chipset, CmdlineError, CommandLine, DiskFile, Input, boot_index, path_text, words};
use crate::config::guest::{DiskEntry, VmConfig, split_numbered};
use crate::storage::ImageFormat;

/// Options of a disk that are understood.
const OPTIONS: [&str; 13] = [
    "aio",
    "backup",
    "cache",
    "detect_zeroes",
    "discard",
    "format",
    "iothread",
    "media",
    "replicate",
    "ro",
    "serial",
    "shared",
    "size",
];
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
    let mut unknown = Vec::new();
    let mut ahci = false;
    let mut scsi_rank = 0;
    for disk in &disks {
        unknown.extend(unknown_options(disk));
        let file = backend(disk, input, line)?;
        let iothread = iothread(disk, hardware, line);
        let place = match disk.bus {
            "virtio" => {
                let slot = 0x0a + disk.number;
                format!("bus={},addr={slot:#04x}{iothread}", chipset.bus())
            }
            "scsi" => {
                controller(hardware, chipset, scsi_rank, disk, &iothread, line);
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
        line.option("-device", device(disk, config, file, &place)?);
    }
    Ok(unknown)
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

fn unknown_options(disk: &Disk<'_>) -> Vec<String> {
    let names = disk.entry.options.named.iter().map(|(name, _)| name.as_str());
    names
        .filter(|name| !OPTIONS.contains(name) && *name != OPTION_SSD)
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
    let read_only = disk.entry.is_cdrom || options.flag("ro", false);
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
        "node-name": format!("drive-{key}"),
        "read-only": read_only,
        "discard": discard,
        "detect-zeroes": if read_only { "off" } else { detect_zeroes },
        "cache": cache_json,
        "file": below("file", &file.path)?,
    });
    if let Some(data) = &file.data {
        // Named here, so that QEMU does not open whatever the image's header says.
        node["data-file"] = below("data", data)?;
    }
    line.option("-blockdev", node.to_string());
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
    iothread: &str,
    line: &mut CommandLine,
) {
    let bus = chipset.bus();
    let device = match hardware {
        ScsiHardware::VirtioSingle => {
            // By rank, because a guest looks at a slot only if its function 0 is there.
            let (slot, function) = (0x1a + rank / 8, rank % 8);
            format!(
                "virtio-scsi-pci,id=virtioscsi{},bus={bus},addr={slot:#04x}.{function:#x},multifunction=on{iothread}",
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
    cache: Option<Cache>,
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
    if let Some(cache) = cache {
        text.push_str(&format!(",drive=drive-{key}"));
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
