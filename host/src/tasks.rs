// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backups and restores.

use std::time::Duration;

use vzdump_core::job::{self, BackupOptions};
use vzdump_core::restore::{RestoreOptions, RestoreReport, restore_vm};
use vzdump_core::storage::ImageFormat;
use vzdump_core::vm::backup::FleecingOptions;

use crate::{CancellationToken, Host, HostError, JobReport, TaskSink};

/// What to back up, and how.
#[derive(Debug, Clone)]
pub struct BackupRequest {
    /// The guests, one after the other.
    pub ids: Vec<u32>,
    /// The storage; by default `storage` of `vzdump.conf`, else the only one for backups.
    pub storage: Option<String>,
    /// Where and how old data is kept.
    pub fleecing: FleecingOptions,
    /// Whether the guest agent freezes the file systems.
    pub freeze: bool,
    /// RAM for old data per disk in bytes; by default QEMU's.
    pub buffer_size_bytes: Option<u64>,
    /// Granularity of new bitmaps in bytes; by default QEMU's.
    pub granularity_bytes: Option<u64>,
    /// How long a busy guest is waited for.
    pub lock_wait: Duration,
}

/// What to restore, and how.
#[derive(Debug, Clone)]
pub struct RestoreRequest {
    /// The archive: its volume id, or a name that only one storage has.
    pub archive: String,
    /// Number of the new guest.
    pub new_id: u32,
    /// Storage of the new volumes; by default those of the archive's configuration.
    pub storage: Option<String>,
    /// Format of the new volumes; by default those of the archive's configuration.
    pub format: Option<ImageFormat>,
    /// Start the guest afterwards.
    pub start: bool,
    /// Keep lines of the configuration that run code or open files of this host.
    pub allow_raw_config: bool,
    /// Restore even if the disks could outgrow the storage.
    pub overcommit: bool,
}

impl Host {
    /// Backs up guests. What goes wrong with a guest is in the report. Must be awaited to its end;
    /// cancel it by the token.
    ///
    /// # Errors
    /// [`HostError::Storage`] when there is nowhere to store anything.
    pub async fn backup(
        &self,
        request: BackupRequest,
        sink: &dyn TaskSink,
        cancel: &CancellationToken,
    ) -> Result<JobReport, HostError> {
        let storage = match request.storage {
            Some(storage) => storage,
            None => self.default_backup_storage()?,
        };
        let provider = self.providers.get(&storage).map_err(HostError::Storage)?;
        let options = BackupOptions {
            storage,
            fleecing: request.fleecing,
            freeze: request.freeze,
            buffer_size_bytes: request.buffer_size_bytes,
            granularity_bytes: request.granularity_bytes,
            lock_wait: request.lock_wait,
        };
        let mut ids = Vec::new();
        for id in request.ids {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        let ctx = self.context()?;
        let job = job::run_backup(&ctx, &ids, provider.as_ref(), &options, sink, cancel);
        Ok(Box::pin(job).await)
    }

    /// Restores an archive as a new guest. What goes wrong with the guest is in the report. Must be
    /// awaited to its end; cancel it by the token.
    ///
    /// # Errors
    /// [`HostError::Archive`], [`HostError::Storage`] when there is nothing to restore.
    pub async fn restore(
        &self,
        request: RestoreRequest,
        sink: &dyn TaskSink,
        cancel: &CancellationToken,
    ) -> Result<RestoreReport, HostError> {
        let archive = self.resolve_archive(&request.archive).await?;
        let provider = self.providers.get(&archive.storage).map_err(HostError::Storage)?;
        let options = RestoreOptions {
            source_storage: archive.storage,
            storage: request.storage,
            format: request.format,
            start: request.start,
            allow_raw_config: request.allow_raw_config,
            overcommit: request.overcommit,
        };
        let ctx = self.context()?;
        let (provider, id) = (provider.as_ref(), request.new_id);
        let job = restore_vm(&ctx, provider, &archive.name, id, &options, sink, cancel);
        Ok(Box::pin(job).await)
    }

    fn default_backup_storage(&self) -> Result<String, HostError> {
        if let Some(storage) = &self.default_storage {
            return Ok(storage.clone());
        }
        match self.providers.backup_ids().as_slice() {
            [storage] => Ok(storage.clone()),
            [] => Err(HostError::Storage(
                "There is no storage for backups in storage.cfg; add a section such as \
                 'directory: backups' with a 'path'."
                    .to_owned(),
            )),
            several => Err(HostError::Storage(format!(
                "There are several storages for backups ({}); choose one with --storage, or set \
                 'storage' in vzdump.conf.",
                several.join(", ")
            ))),
        }
    }
}
