// SPDX-License-Identifier: MIT OR Apache-2.0
//! The TPM, which is another process on a socket.

use super::{CmdlineError, CommandLine, Input, escaped, path_text, value_error};
use crate::config::guest::VmConfig;
use crate::storage::{ImageFormat, VolumeId};
use crate::vm::tpm::{KEY, TpmState, is_version_2};

/// Options of its volume that are understood.
const OPTIONS: [&str; 5] = ["backup", "format", "replicate", "size", "version"];

/// Adds the TPM, if there is one; returns options that are not understood.
pub(super) fn add(
    config: &VmConfig,
    input: &Input<'_>,
    line: &mut CommandLine,
) -> Result<Vec<String>, CmdlineError> {
    let disks = config.disks()?;
    let Some(disk) = disks.iter().find(|disk| disk.key == KEY) else { return Ok(Vec::new()) };
    let fault = |why: String| value_error(KEY, &disk.to_value(), why);
    let is_version_2 = is_version_2(disk).map_err(fault)?;
    let format = disk.volume.parse::<VolumeId>().map_or(ImageFormat::Raw, |id| id.format());
    if format != ImageFormat::Raw || disk.options.get("format").is_some_and(|name| name != "raw") {
        return Err(fault("the state of a TPM must be a raw volume.".to_owned()));
    }
    let file = (input.find)(disk)
        .map_err(|source| CmdlineError::Volume { key: KEY.to_owned(), source })?;
    line.tpm = Some(TpmState { path: file.path, is_version_2 });
    let socket = input.layout.tpm_socket(input.id);
    line.option("-chardev", format!("socket,id=tpm,path={}", escaped(path_text(&socket)?)));
    line.option("-tpmdev", "emulator,id=tpmdev,chardev=tpm");
    line.option("-device", "tpm-tis,tpmdev=tpmdev");
    let names = disk.options.named.iter().map(|(name, _)| name.as_str());
    let unknown = names.filter(|name| !OPTIONS.contains(name));
    Ok(unknown.map(|name| format!("{KEY} {name}")).collect())
}
