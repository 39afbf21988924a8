// SPDX-License-Identifier: MIT OR Apache-2.0
//! Starts a VM whose disks are being filled from an archive.

use super::{
    Input, RunnerError, Started, VmConfig, VmProcess, find_file, find_process, launch, power_lock,
    qemu_cmdline,
};
use crate::config::guest::DiskEntry;
use crate::layout::Layout;
use crate::storage::{StorageError, StorageSet};
use crate::tools::Tools;
use crate::vm::qemu_cmdline::{DiskFile, LiveNode};

/// What a VM is locked with whose disks are not complete.
pub const LIVE_LOCK: &str = "live-restore";

/// What a VM is locked with whose disks a restore has removed, as Proxmox VE calls it.
pub const RESTORE_LOCK: &str = "restore";

/// What to do with such a VM, as a sentence of the message that refuses something else.
#[must_use]
pub fn live_advice(id: u32) -> String {
    format!(
        "VM {id} is being restored live and its disks are not complete; `vzdump restore --resume \
         {id}` goes on with it, `--give-up {id}` removes it"
    )
}

/// Starts a VM with these disks below their archive's content, and does not let the guest run yet. Its lock is
/// ignored: the caller is who set it.
///
/// # Errors
/// As [`super::start`].
pub async fn start_live(
    layout: &Layout,
    tools: &Tools,
    storages: &StorageSet,
    id: u32,
    config: &VmConfig,
    live: &[LiveNode],
) -> Result<Started, RunnerError> {
    let _lock = power_lock(layout, id).await?;
    if let Some(VmProcess { pid, .. }) = find_process(layout, id)? {
        return Err(RunnerError::AlreadyRunning { id, pid });
    }
    let find = |disk: &DiskEntry| find_file(storages, disk);
    let input = Input { layout, id, find: &find, paused: true, mark: None, live };
    let line = qemu_cmdline::build(config, &input)
        .map_err(|source| RunnerError::Cmdline { id, source })?;
    launch(layout, tools, id, line).await
}

/// Checks that a VM with this configuration could be started once its disks are there.
///
/// # Errors
/// [`RunnerError::Cmdline`].
pub fn check_config(layout: &Layout, id: u32, config: &VmConfig) -> Result<(), RunnerError> {
    let find = |_: &DiskEntry| -> Result<DiskFile, StorageError> {
        let path = "/nowhere".into();
        Ok(DiskFile {
            path,
            data: None,
            is_device: false,
            direct: true,
            is_aligned: true,
            size_bytes: None,
        })
    };
    let input = Input { layout, id, find: &find, paused: true, mark: None, live: &[] };
    let line = qemu_cmdline::build(config, &input);
    line.map(drop).map_err(|source| RunnerError::Cmdline { id, source })
}
