// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restores a container's archive, as a new container or in the place of one that is there.
//!
//! Everything in the archive is untrusted. What of the configuration reaches the host is dropped, the ids are
//! those of every unprivileged container, and the files are unpacked by a process that sees nothing but the new
//! volumes.
//!
//! ```text
//!  plan      configuration, volumes, what becomes of old ones, space, rights: nothing is made yet
//!  make      new volumes, journalled before they are made, under free names
//!  unpack    in a sandbox; synced
//!  switch    rules, then the configuration, in one step (`vzdump_core::restore::replace`)
//!  remove    of a container that was replaced, the volumes whose files came back
//! ```
//!
//! A failure before the switch removes what was made, and the old container is as it was; a crash leaves that
//! to the journal.

mod merge;
mod old;
mod plan;
mod source;
mod task;

use std::time::Instant;

use provider_api::{CancellationToken, Provider};
use vzdump_core::job::JobContext;
use vzdump_core::restore::{RestorePlan, RestoreReport};
use vzdump_core::storage::ImageFormat;
use vzdump_core::task_log::{NoLog, TaskSink};

use self::task::Restore;

/// How a container is restored.
#[derive(Debug, Clone, Default)]
pub struct CtRestoreOptions {
    /// Name of the provider's storage.
    pub source_storage: String,
    /// Storage of the new volumes; by default those of the archive's configuration.
    pub storage: Option<String>,
    /// Format of the new volumes, [`ImageFormat::Raw`] or [`ImageFormat::Subvol`]; by default as in the archive's
    /// configuration where the storage has it.
    pub format: Option<ImageFormat>,
    /// Most bytes of the archive, uncompressed, that are unpacked per second.
    pub limit_bytes_per_s: Option<u64>,
    /// Replace the container of this number.
    pub force: bool,
    /// Give the container new network addresses.
    pub unique: bool,
    /// Restore even if the volumes could outgrow the storage.
    pub overcommit: bool,
    /// Also a container whose root is root on the host.
    pub privileged: bool,
    /// Keep lines of the configuration that reach the host.
    pub allow_raw_config: bool,
    /// Start the container afterwards.
    pub start: bool,
}

/// Restores an archive as the container `id`. What goes wrong is in the report. Must be awaited to its
/// end; cancel it by the token.
pub async fn restore_container(
    ctx: &JobContext,
    provider: &dyn Provider,
    archive: &str,
    id: u32,
    options: &CtRestoreOptions,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> RestoreReport {
    let started = Instant::now();
    let mut report = RestoreReport::new(id, archive, ctx.layout.ct_config_path(id));
    let job = Restore { ctx, provider, archive, id, options, sink, cancel };
    if let Err(error) = Box::pin(job.run(&mut report)).await {
        let words = error.words();
        sink.error(&format!("Restore of CT {id} failed - {words}"));
        report.volumes.clear();
        report.error = Some(words);
    }
    report.duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    report
}

/// Finds out what [`restore_container`] would do, and whether it would be refused. Changes nothing.
///
/// # Errors
/// In words: why it would be refused.
pub async fn plan_container_restore(
    ctx: &JobContext,
    provider: &dyn Provider,
    archive: &str,
    id: u32,
    options: &CtRestoreOptions,
    cancel: &CancellationToken,
) -> Result<RestorePlan, String> {
    let job = Restore { ctx, provider, archive, id, options, sink: &NoLog, cancel };
    Box::pin(job.show_plan()).await.map_err(|error| error.words())
}
