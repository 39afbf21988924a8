// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backups and restores.

use std::time::Duration;

use vzdump_core::job::{self, BackupOptions};

use crate::{CancellationToken, Host, HostError, JobReport, TaskSink};

/// What to back up, and how.
#[derive(Debug, Clone)]
pub struct BackupRequest {
    /// The guests, one after the other.
    pub ids: Vec<u32>,
    /// The storage; by default `storage` of `vzdump.conf`, else the only one for backups.
    pub storage: Option<String>,
    /// Storage of the fleecing images; by default that of the disk.
    pub fleecing_storage: Option<String>,
    /// Whether the guest agent freezes the file systems.
    pub freeze: bool,
    /// RAM for old data per disk in bytes; by default QEMU's.
    pub buffer_size_bytes: Option<u64>,
    /// Granularity of new bitmaps in bytes; by default QEMU's.
    pub granularity_bytes: Option<u64>,
    /// How long a busy guest is waited for.
    pub lock_wait: Duration,
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
            fleecing_storage: request.fleecing_storage,
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
