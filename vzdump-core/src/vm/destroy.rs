// SPDX-License-Identifier: MIT OR Apache-2.0
//! Removes a VM: its volumes first, its configuration last, so that what was interrupted can be done
//! again.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::PathBuf;

use provider_api::GuestKind;

use super::backup::free_volume;
use super::leftovers;
use super::runner::{self, LIVE_LOCK, RESTORE_LOCK, RunnerError, refuse_locked};
use crate::blocking;
use crate::config::parse_bool;
use crate::guest::GuestError;
use crate::job::{JobContext, backup_lock_path};
use crate::journal::JournalError;
use crate::journal::recover::{self, Leftover};
use crate::layout::{self, LayoutError};
use crate::lock::{FileLock, LockError};
use crate::storage::VolumeId;
use crate::task_log::TaskSink;
use crate::temp_tree;

/// Why a VM was not removed.
#[derive(Debug, thiserror::Error)]
pub enum DestroyError {
    /// It runs.
    #[error("The VM {id} is running (process {pid}); stop it first.")]
    Running {
        /// The number.
        id: u32,
        /// Its QEMU.
        pid: i32,
    },
    /// Its configuration forbids it.
    #[error("The VM {0} is protected; remove the key 'protection' from its configuration first.")]
    Protected(u32),
    /// What an earlier task left behind could not be removed.
    #[error("An earlier task of this guest is not cleaned up: {0}")]
    Leftover(String),
    /// Another task works on it.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Its configuration cannot be read, or its process not be found.
    #[error(transparent)]
    Runner(#[from] RunnerError),
    /// The journals of earlier tasks.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Not a guest number.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A volume cannot be removed; those before it are, and the configuration is still there.
    #[error(transparent)]
    Volume(#[from] GuestError),
    /// A file cannot be removed.
    #[error("Cannot remove '{path}'.")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A VM that was removed.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Destroyed {
    /// Its number.
    pub id: u32,
    /// Its volumes.
    pub volumes: Vec<String>,
}

/// Removes a VM that does not run, with all volumes of its own that its configuration names.
///
/// # Errors
/// [`DestroyError`]; doing it again goes on where it stopped.
pub async fn destroy(
    ctx: &JobContext,
    id: u32,
    sink: &dyn TaskSink,
) -> Result<Destroyed, DestroyError> {
    let layout = &ctx.layout;
    layout::check_guest_id(id)?;
    let _lock =
        FileLock::try_acquire(&backup_lock_path(layout, GuestKind::Qemu, id), &format!("VM {id}"))?;
    let config = runner::read_config(layout, id)?;
    match config.get("lock") {
        // To remove what is not complete is one way out.
        Some("create" | RESTORE_LOCK) => {}
        Some(LIVE_LOCK) if runner::find_process(layout, id)?.is_none() => {}
        // Stopped, one that is restored live would still not be complete.
        _ => refuse_locked(&config, id)?,
    }
    if config.get("protection").and_then(parse_bool) == Some(true) {
        return Err(DestroyError::Protected(id));
    }
    // Before its power state is locked, which the recovery does, too.
    let left = recover::recover_guest_down(ctx, GuestKind::Qemu, id, sink).await?;
    if let Some(Leftover { reason, .. }) = left.into_iter().next() {
        return Err(DestroyError::Leftover(reason));
    }
    // Nobody starts it meanwhile.
    let _power = FileLock::try_acquire(
        &layout.vm_power_lock_path(id),
        &format!("The power state of VM {id}"),
    )?;
    if let Some(process) = runner::find_process(layout, id)? {
        return Err(DestroyError::Running { id, pid: process.pid });
    }
    leftovers::remove_of_guest(ctx, id, sink).await;
    let owned = config.volumes().filter_map(|text| text.parse::<VolumeId>().ok());
    let owned: BTreeSet<String> =
        owned.filter(|volume| volume.guest_id() == id).map(|volume| volume.to_string()).collect();
    let mut volumes = Vec::new();
    for text in owned {
        if let Ok(volume) = text.parse() {
            free_volume(&ctx.storages, &volume).await?;
            volumes.push(text);
        }
    }
    // The configuration last: as long as it is there, this can be done again.
    for path in [layout.firewall_path(id), layout.vm_config_path(id)] {
        remove_file(path).await?;
    }
    // Logs of its last run; what stays is begun anew by another VM of this number.
    let logs = layout.vm_run_dir(id);
    let _ = blocking::run(move || temp_tree::remove(&logs)).await;
    Ok(Destroyed { id, volumes })
}

async fn remove_file(path: PathBuf) -> Result<(), DestroyError> {
    let file = path.clone();
    match blocking::run(move || fs::remove_file(file)).await {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(DestroyError::File { path, source })
        }
        _ => Ok(()),
    }
}
