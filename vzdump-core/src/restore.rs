// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restores a VM from an archive: as a new VM, in the place of one that is there, or single disks of it, those to
//! files, too (`file.rs`).
//!
//! ```text
//!  plan      configuration, devices and sizes, names, storages, rights, space: nothing is made yet
//!  offer     the provider offers each disk; its length is checked
//!  make      volumes journalled and allocated, several filled at a time
//!  switch    firewall rules, then the configuration, which makes the VM exist
//!  remove    of a guest that was replaced, the volumes that nothing names any more
//! ```
//!
//! A failure or cancellation before the switch removes all that was made, and a guest that was to be
//! replaced is as it was; a crash leaves that to the journal. The provider's `init` and `cleanup`
//! calls always come in pairs.

mod boot;
mod config;
mod copy;
mod file;
pub mod identity;
mod live;
mod meter;
mod old;
mod plan;
pub mod replace;
mod screenshot;
pub mod space;
mod task;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use provider_api::{CancellationToken, GuestKind, Provider};
use serde::Serialize;

pub use self::boot::{BootOptions, BootReport, boot_archive, sweep as sweep_boots};
pub use self::file::{DiskToFile, FileReport, RestoredFile, restore_to_files};
pub use self::live::{give_up_restore, resume_restore};
pub(crate) use self::live::{recover as recover_live, refuse_recovery};
pub use self::old::add_unused;
pub use self::space::PlannedSpace;
use self::task::Restore;
pub use self::task::step;
use crate::job::JobContext;
use crate::job::report::millis;
use crate::storage::ImageFormat;
use crate::task_log::{NoLog, TaskSink, clean, clock};

/// Disks that are copied at the same time unless said otherwise.
pub const PARALLEL_DISKS: u8 = 4;

/// One disk of an archive that is to be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskChoice {
    /// Its name in the archive.
    pub device: String,
    /// The drive that gets it, by its key or by the volume it has; by default that of the same name.
    pub target: Option<String>,
}

/// What a restore is asked to do.
#[derive(Debug, Clone, Default)]
pub struct RestoreOptions {
    /// Name of the provider's storage.
    pub source_storage: String,
    /// Single disks, for a VM that is there; by default the whole VM.
    pub disks: Vec<DiskChoice>,
    /// Storage of the new volumes; by default those of the archive's configuration.
    pub storage: Option<String>,
    /// Format of the new volumes; by default those of the archive's configuration.
    pub format: Option<ImageFormat>,
    /// Replace the VM of this number; with single disks, remove what they replace.
    pub force: bool,
    /// Remove the disks that are replaced before the new ones are made.
    pub in_place: bool,
    /// Give the VM new network addresses and a new UUID.
    pub unique: bool,
    /// Disks that are copied at the same time, [`PARALLEL_DISKS`] by default; one with a limit.
    pub parallel: Option<u8>,
    /// Most bytes that are written per second.
    pub limit_bytes_per_s: Option<u64>,
    /// Start the VM afterwards.
    pub start: bool,
    /// Start the VM at once, and fill its disks while it runs.
    pub live: bool,
    /// Keep lines of the configuration that reach the host.
    pub allow_raw_config: bool,
    /// Restore even if the disks could outgrow the storage.
    pub overcommit: bool,
}

/// A disk that is to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedVolume {
    /// Its name in the archive.
    pub device: String,
    /// Its key in the configuration.
    pub key: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Where it is made.
    pub storage: String,
    /// In which format.
    pub format: ImageFormat,
}

/// What a restore would do.
#[derive(Debug, Clone, Serialize)]
pub struct RestorePlan {
    /// Kind of the guest.
    pub kind: GuestKind,
    /// Number of the guest.
    pub id: u32,
    /// The archive.
    pub archive: String,
    /// Whether the guest's root is root on the host; only of containers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub privileged: Option<bool>,
    /// Whether there is a guest of this number.
    pub replaces: bool,
    /// Whether the VM is started at once and its disks are filled while it runs.
    pub live: bool,
    /// The disks that are made.
    pub disks: Vec<PlannedVolume>,
    /// Volumes of the VM that is there that are removed.
    pub removed: Vec<String>,
    /// Drives of it that stay as they are: key and value.
    pub stays: BTreeMap<String, String>,
    /// Volumes of it that are kept as unused disks.
    pub unused: Vec<String>,
    /// The space of the storages.
    pub space: Vec<PlannedSpace>,
    /// Whether firewall rules are restored.
    pub firewall: bool,
    /// The configuration, with names of volumes that only show where they will be.
    pub config: String,
    /// What will be changed or is odd.
    pub warnings: Vec<String>,
    /// Why it would not be done although it could: space.
    pub problem: Option<String>,
}

/// A restored disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RestoredVolume {
    /// Key in the configuration.
    pub device: String,
    /// Volume id.
    pub volume: String,
    /// Size in bytes.
    pub size_bytes: u64,
}

/// Result of a restore.
#[derive(Debug, Clone, Serialize)]
pub struct RestoreReport {
    /// Number of the VM.
    pub id: u32,
    /// The archive.
    pub archive: String,
    /// What went wrong; none if the VM is there.
    pub error: Option<String>,
    /// What was changed or is odd.
    pub warnings: Vec<String>,
    /// The new volumes.
    pub volumes: Vec<RestoredVolume>,
    /// Volumes that were removed, of a VM that was there.
    pub removed: Vec<String>,
    /// The configuration.
    pub config_path: PathBuf,
    /// Whether the VM was started.
    pub started: bool,
    /// Duration in milliseconds.
    pub duration_ms: u64,
}

impl RestoreReport {
    /// The report of a restore that begins.
    #[must_use]
    pub fn new(id: u32, archive: &str, config_path: PathBuf) -> Self {
        Self {
            id,
            archive: archive.to_owned(),
            error: None,
            warnings: Vec::new(),
            volumes: Vec::new(),
            removed: Vec::new(),
            config_path,
            started: false,
            duration_ms: 0,
        }
    }

    /// Whether the VM is there.
    pub fn is_success(&self) -> bool {
        self.error.is_none()
    }
}

/// Restores an archive of a VM as the VM `id`.
///
/// Never panics or fails otherwise than in its report. Ends in bounded time after `cancel`, and
/// must be awaited to its end: dropping the future leaves what was made to the recovery.
pub async fn restore_vm(
    ctx: &JobContext,
    provider: &dyn Provider,
    archive: &str,
    id: u32,
    options: &RestoreOptions,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> RestoreReport {
    let started = Instant::now();
    let mut report = RestoreReport::new(id, archive, ctx.layout.vm_config_path(id));
    sink.info(&format!("restore of '{}' as VM {id}", clean(archive)));
    let task = Restore { ctx, provider, archive, id, options, sink, cancel };
    let result = Box::pin(task.run(&mut report)).await;
    end_report(report, result, started, sink)
}

fn end_report(
    mut report: RestoreReport,
    result: Result<(), String>,
    started: Instant,
    sink: &dyn TaskSink,
) -> RestoreReport {
    let id = report.id;
    match result {
        Ok(()) => {
            let time = clock(started.elapsed());
            sink.info(&format!("restore of VM {id} finished ({time})"));
        }
        Err(error) => {
            sink.error(&format!("restore of VM {id} failed - {error}"));
            report.volumes.clear();
            report.error = Some(error);
        }
    }
    report.duration_ms = millis(started.elapsed());
    report
}

/// Finds out what [`restore_vm`] would do, and whether it would be refused. Changes nothing.
///
/// # Errors
/// In words: why it would be refused.
pub async fn plan_restore(
    ctx: &JobContext,
    provider: &dyn Provider,
    archive: &str,
    id: u32,
    options: &RestoreOptions,
    cancel: &CancellationToken,
) -> Result<RestorePlan, String> {
    let task = Restore { ctx, provider, archive, id, options, sink: &NoLog, cancel };
    Box::pin(task.plan()).await
}
