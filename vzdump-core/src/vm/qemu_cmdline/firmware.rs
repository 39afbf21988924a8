// SPDX-License-Identifier: MIT OR Apache-2.0
//! The machine's firmware: SeaBIOS, which QEMU brings along, or OVMF in two pieces of flash.

use serde_json::json;

use super::{Chipset, CmdlineError, CommandLine, DiskFile, Input, disks, path_text, value_error};
use crate::config::guest::{DiskEntry, VmConfig};
use crate::storage::ImageFormat;
use crate::vm::ovmf::EfiOptions;

/// The key of the EFI variables.
const VARS_KEY: &str = "efidisk0";
/// The node of the firmware's code.
const CODE_NODE: &str = "firmware";

/// Adds the firmware's nodes and settings; returns what the machine's option needs for them.
pub(super) fn add(
    config: &VmConfig,
    input: &Input<'_>,
    chipset: Chipset,
    line: &mut CommandLine,
) -> Result<String, CmdlineError> {
    let disks = config.disks()?;
    let vars = disks.iter().find(|disk| disk.key == VARS_KEY);
    match config.get("bios") {
        None | Some("seabios") => {
            if vars.is_some() {
                line.notices.push("'efidisk0' has no effect without 'bios: ovmf'".to_owned());
            }
            Ok(String::new())
        }
        Some("ovmf") => add_ovmf(vars, input, chipset, line),
        Some(other) => Err(value_error("bios", other, "'seabios' or 'ovmf' is supported.")),
    }
}

fn add_ovmf(
    vars: Option<&DiskEntry>,
    input: &Input<'_>,
    chipset: Chipset,
    line: &mut CommandLine,
) -> Result<String, CmdlineError> {
    let Some(vars) = vars else {
        let why = "it needs an 'efidisk0' for its variables.";
        return Err(value_error("bios", "ovmf", why));
    };
    let options = efi_options(vars)?;
    let code = options.code()?;
    let node = json!({
        "driver": "raw",
        "node-name": CODE_NODE,
        "read-only": true,
        "file": { "driver": "file", "filename": path_text(&code)?, "read-only": true },
    });
    line.option("-blockdev", node.to_string());
    disks::add_node(vars, input, false, line)?;
    let mut machine = format!(",pflash0={CODE_NODE},pflash1=drive-{VARS_KEY}");
    if options.has_keys {
        if chipset != Chipset::Q35 {
            let why = "keys of Secure Boot need a 'q35' machine.";
            return Err(value_error(VARS_KEY, &vars.to_value(), why));
        }
        // Only the firmware itself, in its system management mode, may change the variables then. Suspending
        // to RAM does not work with it.
        machine.push_str(",smm=on");
        line.option("-global", "driver=cfi.pflash01,property=secure,value=on");
        line.option("-global", "ICH9-LPC.disable_s3=1");
    }
    Ok(machine)
}

fn efi_options(disk: &DiskEntry) -> Result<EfiOptions, CmdlineError> {
    EfiOptions::parse(&disk.options).map_err(|why| value_error(&disk.key, &disk.to_value(), why))
}

/// How much of a volume is shown to QEMU, if that is not all of it: a storage may have made the variables'
/// volume larger than they are.
pub(super) fn shown_bytes(
    disk: &DiskEntry,
    file: &DiskFile,
    format: ImageFormat,
) -> Result<Option<u64>, CmdlineError> {
    let Some(found) = file.size_bytes.filter(|_| disk.key == VARS_KEY) else { return Ok(None) };
    let wanted = efi_options(disk)?.kind.vars_bytes();
    if found == wanted {
        return Ok(None);
    }
    if found > wanted && format == ImageFormat::Raw {
        return Ok(Some(wanted));
    }
    let why = format!("its volume has {found} bytes, and the firmware needs {wanted}.");
    Err(value_error(&disk.key, &disk.to_value(), why))
}
