// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's command line from a VM's configuration.
//!
//! A pure function, so that the result can be compared as text. Nothing is added by default
//! (`-nodefaults -no-user-config`): what the guest sees is what the configuration says, at PCI
//! addresses that depend on the device's own key only.
//!
//! ```text
//! PCI slot  02 vga   05 scsihw0   07 ahci0   08 virtio-serial   0a..19 virtio0..15
//!           1a..1d   controllers of virtio-scsi-single, eight per slot
//! ```
//!
//! Names in QEMU: the disk `scsi0` is the device `scsi0` on the node `drive-scsi0` (format) on the
//! node `file-scsi0` (file). EFI variables are the flash `pflash1` on the node `drive-efidisk0`.

mod disks;
mod firmware;
mod live;
mod tpm;
pub(crate) mod words;

use std::path::{Path, PathBuf};

use crate::config::guest::{DiskEntry, VmConfig, is_disk_key, split_numbered};
use crate::config::{ConfigError, OptionList, parse_bool};
use crate::layout::{Layout, Monitor};
use crate::storage::StorageError;
use crate::vm::ovmf::MissingFirmware;
use crate::vm::process::mark_argument;
use crate::vm::tpm::TpmState;

pub use live::LiveNode;

/// Keys that change the machine.
const USED_KEYS: [&str; 16] = [
    "agent", "args", "bios", "boot", "bootdisk", "cores", "cpu", "kvm", "machine", "memory",
    "name", "scsihw", "serial0", "smbios1", "sockets", "vga",
];
/// Keys that change nothing in QEMU, or only what this runner does not do (start order, weights).
const WITHOUT_EFFECT: [&str; 14] = [
    "balloon",
    "cpuunits",
    "description",
    "hotplug",
    "lock",
    "meta",
    "onboot",
    "ostype",
    "parent",
    "protection",
    "shares",
    "startup",
    "tablet",
    "tags",
];
/// More keys that change the machine, apart to keep the lines above sorted.
const USED_KEYS_TOO: [&str; 2] = ["template", "vmgenid"];

/// A guest that breaks out into QEMU cannot start programs or change its own limits.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// A machine without processors, memory and devices.
const NO_MACHINE: &str = "none";

/// Memory of a VM that does not say, in MiB.
const MEMORY_DEFAULT_MIB: u64 = 512;
/// Most memory that is believed, in MiB (16 TiB).
const MEMORY_MAX_MIB: u64 = 16 << 20;
/// Most processors of one kind that are believed; QEMU checks the product.
const CPUS_MAX: u32 = 1024;

/// Why a configuration gives no command line.
#[derive(Debug, thiserror::Error)]
pub enum CmdlineError {
    /// Keys or options this runner does not know. Leaving them out could hide a device.
    #[error(
        "The configuration has keys that are not supported: {}. Known keys: {}.",
        .unknown.join(", "), known_keys()
    )]
    Unknown {
        /// The keys, `net0`, or options of a disk, `scsi0 mbps`.
        unknown: Vec<String>,
    },
    /// A value makes no sense.
    #[error("The configuration's '{key}: {value}': {why}")]
    Value {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What is wrong with it.
        why: String,
    },
    /// A firmware of this host that is missing.
    #[error(transparent)]
    Firmware(#[from] MissingFirmware),
    /// A path that cannot be given to QEMU.
    #[error("The path '{0}' is not text (UTF-8), which QEMU's options need.")]
    Path(PathBuf),
    /// The configuration makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A volume of the configuration.
    #[error("The disk '{key}' cannot be used.")]
    Volume {
        /// The disk.
        key: String,
        /// Why.
        source: StorageError,
    },
}

/// The file or device of a disk, as it is on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFile {
    /// Its path.
    pub path: PathBuf,
    /// The raw file with its data, if that is not in the file of `path`.
    pub data: Option<PathBuf>,
    /// Whether it is a block device.
    pub is_device: bool,
    /// Whether it can be opened past the page cache.
    pub direct: bool,
    /// Whether its size is a multiple of every block size that requests past the page cache may need.
    pub is_aligned: bool,
    /// How large the disk in it is, where that had to be found out: of EFI variables.
    pub size_bytes: Option<u64>,
}

/// What the command line depends on beside the configuration.
pub struct Input<'a> {
    /// Where the sockets go.
    pub layout: &'a Layout,
    /// The VM's number.
    pub id: u32,
    /// Finds the file of a disk.
    pub find: &'a (dyn Fn(&DiskEntry) -> Result<DiskFile, StorageError> + Sync),
    /// Do not let the guest run yet.
    pub paused: bool,
    /// What the process is found by, see [`crate::vm::process::VmProcess::of_mark`].
    pub mark: Option<&'a str>,
    /// Disks that are filled from an archive while the guest runs.
    pub live: &'a [LiveNode],
}

/// A command line without the program.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// The arguments.
    pub args: Vec<String>,
    /// What the administrator should know about it, one sentence each.
    pub notices: Vec<String>,
    /// The TPM that must run before QEMU does.
    pub tpm: Option<TpmState>,
}

impl CommandLine {
    /// The same with more notices.
    pub(super) fn with_notices(mut self, notices: &[String]) -> Self {
        self.notices.extend_from_slice(notices);
        self
    }

    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.args.push(name.to_owned());
        self.args.push(value.into());
    }
}

/// All keys a VM can be started with.
#[must_use]
pub fn known_keys() -> String {
    let mut keys = [&USED_KEYS[..], &USED_KEYS_TOO, &WITHOUT_EFFECT].concat();
    keys.sort_unstable();
    format!("{}, efidisk0, tpmstate0, ideN, sataN, scsiN, virtioN, unusedN", keys.join(", "))
}

fn is_known(key: &str) -> bool {
    let plain = [&USED_KEYS[..], &USED_KEYS_TOO, &WITHOUT_EFFECT].iter().any(|k| k.contains(&key));
    let numbered = matches!(split_numbered(key), Some(("unused", _)));
    plain || numbered || is_disk_key(key)
}

pub(super) fn value_error(key: &str, value: &str, why: impl Into<String>) -> CmdlineError {
    CmdlineError::Value { key: key.to_owned(), value: value.to_owned(), why: why.into() }
}

/// The node of a disk.
pub(crate) fn drive_node(key: &str) -> String {
    format!("drive-{key}")
}

/// In QEMU's options a comma inside a value is doubled.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

pub(super) fn path_text(path: &Path) -> Result<&str, CmdlineError> {
    path.to_str().ok_or_else(|| CmdlineError::Path(path.to_owned()))
}

/// The machine's kind decides about buses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Chipset {
    Q35,
    I440fx,
}

impl Chipset {
    pub(super) const fn bus(self) -> &'static str {
        match self {
            Self::Q35 => "pcie.0",
            Self::I440fx => "pci.0",
        }
    }
}

/// Builds the command line of a VM.
///
/// # Errors
/// [`CmdlineError`].
pub fn build(config: &VmConfig, input: &Input<'_>) -> Result<CommandLine, CmdlineError> {
    let mut line = CommandLine::default();
    let mut unknown: Vec<String> =
        config.pairs().map(|(key, _)| key).filter(|key| !is_known(key)).map(Into::into).collect();
    unknown.extend(config.not_understood().map(|text| format!("'{text}'")));
    let chipset = machine(config, input, &mut line)?;
    processor_and_memory(config, &mut line)?;
    identity(config, &mut line)?;
    control(input, &mut line)?;
    console(config, input, chipset, &mut line)?;
    agent(config, input, chipset, &mut line)?;
    unknown.extend(disks::add(config, input, chipset, &mut line)?);
    unknown.extend(tpm::add(config, input, &mut line)?);
    if !unknown.is_empty() {
        return Err(CmdlineError::Unknown { unknown });
    }
    if input.paused {
        line.args.push("-S".into());
    }
    if let Some(args) = config.get("args") {
        line.args.extend(words::split(args).map_err(|why| value_error("args", args, why))?);
    }
    Ok(line)
}

/// Builds the command line of a QEMU that has these disks of a VM and no machine, in which no guest
/// can run: for backups of templates, and of VMs whose machine this runner cannot build.
///
/// # Errors
/// [`CmdlineError`], for one of the disks.
pub fn build_disks_only(
    config: &VmConfig,
    input: &Input<'_>,
    keys: &[String],
    read_only: bool,
) -> Result<CommandLine, CmdlineError> {
    let mut line = CommandLine::default();
    begin(config, input, &mut line);
    line.option("-machine", NO_MACHINE);
    control(input, &mut line)?;
    line.option("-display", "none");
    disks::add_nodes(config, input, keys, read_only, &mut line)?;
    line.args.push("-S".into());
    Ok(line)
}

/// Whether these are the arguments of a QEMU by [`build_disks_only`].
pub fn is_disks_only(arguments: &[String]) -> bool {
    arguments.windows(2).any(|pair| pair == ["-machine", NO_MACHINE])
}

fn begin(config: &VmConfig, input: &Input<'_>, line: &mut CommandLine) {
    line.args.extend(["-no-user-config", "-nodefaults"].map(Into::into));
    line.option("-sandbox", SANDBOX);
    let default_name = format!("vm{}", input.id);
    let name = config.name().unwrap_or(&default_name);
    line.option("-name", format!("guest={},debug-threads=on", escaped(name)));
    if let Some(mark) = input.mark {
        line.option("-chardev", mark_argument(mark));
    }
}

fn machine(
    config: &VmConfig,
    input: &Input<'_>,
    line: &mut CommandLine,
) -> Result<Chipset, CmdlineError> {
    begin(config, input, line);
    let text = config.get("machine").unwrap_or("q35");
    let list = OptionList::parse(text).map_err(|why| value_error("machine", text, why))?;
    let kind = list.first.as_deref().or_else(|| list.get("type")).unwrap_or("q35");
    let chipset = if kind == "q35" || kind.starts_with("pc-q35-") {
        Chipset::Q35
    } else if kind == "pc" || kind.starts_with("pc-i440fx-") {
        Chipset::I440fx
    } else {
        return Err(value_error("machine", text, "only 'q35' and 'pc' machines are supported."));
    };
    if let Some((name, _)) = list.named.iter().find(|(name, _)| name != "type") {
        return Err(value_error("machine", text, format!("'{name}' is not supported.")));
    }
    // The suffix is the host system's own revision of a machine, which QEMU does not know.
    let kind = kind.split_once('+').map_or(kind, |(kind, _)| kind);
    check_word("machine", kind)?;
    let firmware = firmware::add(config, input, chipset, line)?;
    line.option("-machine", format!("{kind}{firmware}"));
    line.option("-accel", if uses_kvm(config)? { "kvm" } else { EMULATED });
    if config.is_template() {
        let value = config.get("template").unwrap_or_default();
        return Err(value_error("template", value, "a template cannot be started."));
    }
    boot(config, line)?;
    Ok(chipset)
}

/// All emulated processors in one thread. With one thread for each, QEMU 10.0 lets what a processor writes to a device go to
/// another device while a second one changes the memory map, as it does all the time while a guest starts
/// (`iotlb_to_section` takes an index of the old map for one of the new map): QEMU aborts (`msix_table_mmio_write`), or
/// the guest waits for a timer that was never set.
const EMULATED: &str = "tcg,thread=single";

/// Only on request: the device node can exist and still not work.
fn uses_kvm(config: &VmConfig) -> Result<bool, CmdlineError> {
    let Some(value) = config.get("kvm") else { return Ok(false) };
    parse_bool(value).ok_or_else(|| value_error("kvm", value, "0 or 1 is expected."))
}

fn boot(config: &VmConfig, line: &mut CommandLine) -> Result<(), CmdlineError> {
    let Some(text) = config.get("boot") else { return Ok(()) };
    let list = OptionList::parse(text).map_err(|why| value_error("boot", text, why))?;
    let Some(letters) = list.first.as_deref().or_else(|| list.get("legacy")) else { return Ok(()) };
    if letters.is_empty() || !letters.bytes().all(|b| b"acdn".contains(&b)) {
        return Err(value_error(
            "boot",
            text,
            "'order=scsi0;…' or letters of 'acdn' are expected.",
        ));
    }
    line.option("-boot", format!("order={letters}"));
    Ok(())
}

/// The place of a device in `boot: order=…`, as QEMU counts it.
pub(super) fn boot_index(config: &VmConfig, key: &str) -> Option<usize> {
    let list = OptionList::parse(config.get("boot")?).ok()?;
    let order = list.get("order")?.split(';').position(|name| name.trim() == key);
    order.map(|index| 100 + index)
}

fn processor_and_memory(config: &VmConfig, line: &mut CommandLine) -> Result<(), CmdlineError> {
    let text = config.get("cpu").unwrap_or("max");
    let list = OptionList::parse(text).map_err(|why| value_error("cpu", text, why))?;
    let kind = list.first.as_deref().or_else(|| list.get("cputype")).unwrap_or("max");
    check_word("cpu", kind)?;
    if kind == "host" && !uses_kvm(config)? {
        return Err(value_error("cpu", text, "'host' needs 'kvm: 1'; use 'max' without it."));
    }
    let mut cpu = kind.to_owned();
    for (name, value) in list.named.iter().filter(|(name, _)| name != "cputype") {
        if name != "flags" {
            return Err(value_error("cpu", text, format!("'{name}' is not supported.")));
        }
        for flag in value.split(';').filter(|flag| !flag.is_empty()) {
            let (state, flag) = match flag.split_at_checked(1) {
                Some(("+", flag)) => ("on", flag),
                Some(("-", flag)) => ("off", flag),
                _ => return Err(value_error("cpu", text, "flags begin with + or -.")),
            };
            check_word("cpu", flag)?;
            cpu.push_str(&format!(",{flag}={state}"));
        }
    }
    line.option("-cpu", cpu);
    let sockets = number(config, "sockets", 1, CPUS_MAX.into())?;
    let cores = number(config, "cores", 1, CPUS_MAX.into())?;
    line.option("-smp", format!("{},sockets={sockets},cores={cores},threads=1", sockets * cores));
    line.option(
        "-m",
        format!("{}M", number(config, "memory", MEMORY_DEFAULT_MIB, MEMORY_MAX_MIB)?),
    );
    Ok(())
}

fn number(config: &VmConfig, key: &str, default: u64, max: u64) -> Result<u64, CmdlineError> {
    let Some(text) = config.get(key) else { return Ok(default) };
    let digits = text.strip_prefix("current=").unwrap_or(text);
    let number = digits.parse().ok().filter(|n| (1..=max).contains(n));
    number.ok_or_else(|| value_error(key, text, format!("a number from 1 to {max} is expected.")))
}

/// Words that become part of an option must not bring options of their own.
fn check_word(key: &str, word: &str) -> Result<(), CmdlineError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-+".contains(&b);
    if !word.is_empty() && word.bytes().all(plain) {
        Ok(())
    } else {
        Err(value_error(key, word, "it has characters that are not allowed."))
    }
}

fn identity(config: &VmConfig, line: &mut CommandLine) -> Result<(), CmdlineError> {
    if let Some(text) = config.get("smbios1") {
        let list = OptionList::parse(text).map_err(|why| value_error("smbios1", text, why))?;
        let is_encoded = list.flag("base64", false);
        let mut option = "type=1".to_owned();
        for (name, value) in list.named.iter().filter(|(name, _)| name != "base64") {
            check_word("smbios1", name)?;
            let value = if is_encoded && name != "uuid" {
                words::decode_base64(value).map_err(|why| value_error("smbios1", text, why))?
            } else {
                value.clone()
            };
            option.push_str(&format!(",{name}={}", escaped(&value)));
        }
        line.option("-smbios", option);
    }
    match config.get("vmgenid") {
        None | Some("0") => {}
        Some("1") => line.option("-device", "vmgenid,guid=auto,id=vmgenid"),
        Some(guid) => {
            check_word("vmgenid", guid)?;
            line.option("-device", format!("vmgenid,guid={guid},id=vmgenid"));
        }
    }
    Ok(())
}

/// Monitors and the pid file.
fn control(input: &Input<'_>, line: &mut CommandLine) -> Result<(), CmdlineError> {
    for monitor in Monitor::ALL {
        let path = input.layout.qmp_socket(input.id, monitor);
        let name = monitor.name();
        let path = escaped(path_text(&path)?);
        line.option("-chardev", format!("socket,id={name},path={path},server=on,wait=off"));
        line.option("-mon", format!("chardev={name},mode=control"));
    }
    line.option("-pidfile", path_text(&input.layout.pid_file(input.id))?);
    Ok(())
}

fn console(
    config: &VmConfig,
    input: &Input<'_>,
    chipset: Chipset,
    line: &mut CommandLine,
) -> Result<(), CmdlineError> {
    line.option("-display", "none");
    match config.get("vga").unwrap_or("none") {
        "none" | "serial0" => {}
        "std" => line.option("-device", format!("VGA,id=vga,bus={},addr=0x02", chipset.bus())),
        other => {
            return Err(value_error("vga", other, "'none', 'serial0' or 'std' is supported."));
        }
    }
    match config.get("serial0") {
        None => {}
        Some("socket") => {
            let socket = input.layout.serial_socket(input.id);
            let log = input.layout.console_log(input.id);
            let (socket, log) = (escaped(path_text(&socket)?), escaped(path_text(&log)?));
            line.option(
                "-chardev",
                format!(
                    "socket,id=serial0,path={socket},server=on,wait=off,logfile={log},logappend=off"
                ),
            );
            line.option("-device", "isa-serial,chardev=serial0");
        }
        Some(other) => return Err(value_error("serial0", other, "only 'socket' is supported.")),
    }
    Ok(())
}

fn agent(
    config: &VmConfig,
    input: &Input<'_>,
    chipset: Chipset,
    line: &mut CommandLine,
) -> Result<(), CmdlineError> {
    if !config.agent_enabled() {
        return Ok(());
    }
    let socket = input.layout.agent_socket(input.id);
    let socket = escaped(path_text(&socket)?);
    line.option("-chardev", format!("socket,id=agent,path={socket},server=on,wait=off"));
    line.option(
        "-device",
        format!("virtio-serial-pci,id=virtio-serial,bus={},addr=0x08", chipset.bus()),
    );
    line.option(
        "-device",
        "virtserialport,bus=virtio-serial.0,chardev=agent,name=org.qemu.guest_agent.0",
    );
    Ok(())
}

#[cfg(test)]
mod tests;
