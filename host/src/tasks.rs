// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backups and restores.

use lxc_backend::restore::{CtRestoreOptions, plan_container_restore, restore_container};
use provider_api::{GuestKind, Provider};
use vzdump_core::job;
use vzdump_core::restore::{
    DiskChoice, DiskToFile, FileReport, RestoreOptions, RestorePlan, RestoreReport,
    give_up_restore, plan_restore, restore_to_files, restore_vm, resume_restore,
};
use vzdump_core::storage::ImageFormat;

use crate::{
    ArchiveName, BackupPlan, CancellationToken, Host, HostError, JobReport, TaskSink, ionice,
};

/// What to restore, and how.
#[derive(Debug, Clone, Default)]
pub struct RestoreRequest {
    /// The archive: its volume id, or a name that only one storage has.
    pub archive: String,
    /// Number of the guest.
    pub id: u32,
    /// Single disks, for a guest that is there; by default the whole guest.
    pub disks: Vec<DiskChoice>,
    /// Storage of the new volumes; by default those of the archive's configuration.
    pub storage: Option<String>,
    /// Format of the new volumes; by default those of the archive's configuration.
    pub format: Option<ImageFormat>,
    /// Replace the guest of this number; with single disks, remove what they replace.
    pub force: bool,
    /// Remove the disks that are replaced before the new ones are made.
    pub in_place: bool,
    /// Give the guest new network addresses and a new UUID.
    pub unique: bool,
    /// Disks that are copied at the same time.
    pub parallel: Option<u8>,
    /// Most KiB that are written per second; 0 is no limit.
    pub bwlimit_kib_per_s: Option<u64>,
    /// Start the guest afterwards.
    pub start: bool,
    /// Start the VM at once, and fill its disks while it runs.
    pub live: bool,
    /// Keep lines of the configuration that run code or open files of this host.
    pub allow_raw_config: bool,
    /// Restore even if the disks could outgrow the storage.
    pub overcommit: bool,
    /// Also a container whose root is root on the host.
    pub privileged: bool,
}

impl RestoreRequest {
    fn options(self, source_storage: String) -> Result<RestoreOptions, HostError> {
        refuse_subvolume(self.format)?;
        if self.privileged {
            let why = "'--privileged' cannot be used when a VM is restored.";
            return Err(HostError::Settings(why.to_owned()));
        }
        Ok(RestoreOptions {
            source_storage,
            disks: self.disks,
            storage: self.storage,
            format: self.format,
            force: self.force,
            in_place: self.in_place,
            unique: self.unique,
            parallel: self.parallel,
            limit_bytes_per_s: bytes_per_s(self.bwlimit_kib_per_s)?,
            start: self.start,
            live: self.live,
            allow_raw_config: self.allow_raw_config,
            overcommit: self.overcommit,
        })
    }
}

/// Disks to restore to files and block devices.
#[derive(Debug, Clone, Default)]
pub struct FileRestoreRequest {
    /// The archive: its volume id, or a name that only one storage has.
    pub archive: String,
    /// The disks and where they go.
    pub disks: Vec<DiskToFile>,
    /// Format of new files; by default raw.
    pub format: Option<ImageFormat>,
    /// Overwrite block devices.
    pub force: bool,
    /// Most KiB that are written per second; 0 is no limit.
    pub bwlimit_kib_per_s: Option<u64>,
}

impl RestoreRequest {
    /// What is asked of a container; what only VMs have is refused, not forgotten.
    fn container_options(self, source_storage: String) -> Result<CtRestoreOptions, HostError> {
        let only_vms = [
            ("--disk", !self.disks.is_empty()),
            ("--in-place", self.in_place),
            ("--live", self.live),
            ("--parallel", self.parallel.is_some()),
        ];
        if let Some((option, _)) = only_vms.iter().find(|(_, is_given)| *is_given) {
            return Err(HostError::Settings(format!(
                "'{option}' cannot be used when a container is restored."
            )));
        }
        Ok(CtRestoreOptions {
            source_storage,
            storage: self.storage,
            format: self.format,
            limit_bytes_per_s: bytes_per_s(self.bwlimit_kib_per_s)?,
            force: self.force,
            unique: self.unique,
            overcommit: self.overcommit,
            privileged: self.privileged,
            allow_raw_config: self.allow_raw_config,
            start: self.start,
        })
    }
}

fn refuse_subvolume(format: Option<ImageFormat>) -> Result<(), HostError> {
    if format == Some(ImageFormat::Subvol) {
        let why = "A disk cannot be a subvolume: restore it as raw, qcow2 or raw+bitmaps.";
        return Err(HostError::Settings(why.to_owned()));
    }
    Ok(())
}

/// A limit in bytes; none for 0.
fn bytes_per_s(kib_per_s: Option<u64>) -> Result<Option<u64>, HostError> {
    let Some(kib_per_s) = kib_per_s.filter(|limit| *limit > 0) else { return Ok(None) };
    let too_much = || HostError::Settings(format!("'bwlimit': {kib_per_s} KiB/s is too much."));
    // QEMU counts in 63 bits.
    let bytes = kib_per_s.checked_mul(1024).filter(|bytes| i64::try_from(*bytes).is_ok());
    bytes.map(Some).ok_or_else(too_much)
}

impl Host {
    /// Runs a backup job. What goes wrong with a guest is in the report. Must be awaited to its end;
    /// cancel it by the token.
    ///
    /// # Errors
    /// [`HostError::Storage`] when there is nowhere to store anything, or a setting of the storage
    /// makes no sense.
    pub async fn backup(
        &self,
        plan: &BackupPlan,
        sink: &dyn TaskSink,
        cancel: &CancellationToken,
    ) -> Result<JobReport, HostError> {
        let BackupPlan { ids, notices, options, ionice, .. } = plan;
        let provider = self.providers.get_for_task(&options.storage, cancel).await?;
        let ctx = self.context()?;
        notices.iter().for_each(|notice| sink.warn(notice));
        if let Err(why) = ionice::set(*ionice).await {
            sink.warn(&why);
        }
        let job = job::run_backup(&ctx, ids, provider.as_ref(), options, sink, cancel);
        Ok(Box::pin(job).await)
    }

    /// Restores an archive, or single disks of it. What goes wrong with the guest is in the report. Must be
    /// awaited to its end; cancel it by the token.
    ///
    /// # Errors
    /// [`HostError::Archive`], [`HostError::Storage`] when there is nothing to restore,
    /// [`HostError::Settings`].
    pub async fn restore(
        &self,
        request: RestoreRequest,
        sink: &dyn TaskSink,
        cancel: &CancellationToken,
    ) -> Result<RestoreReport, HostError> {
        let (archive, id) = (self.resolve_archive(&request.archive).await?, request.id);
        let provider = self.providers.get_for_task(&archive.storage, cancel).await?;
        if self.is_container(&archive, provider.as_ref()).await? {
            let options = request.container_options(archive.storage)?;
            let ctx = self.context()?;
            let provider = provider.as_ref();
            let job = restore_container(&ctx, provider, &archive.name, id, &options, sink, cancel);
            return Ok(Box::pin(job).await);
        }
        let options = request.options(archive.storage)?;
        let ctx = self.context()?;
        let provider = provider.as_ref();
        let job = restore_vm(&ctx, provider, &archive.name, id, &options, sink, cancel);
        Ok(Box::pin(job).await)
    }

    /// Goes on with a live restore that was interrupted. What goes wrong is in the report. Must be awaited to its
    /// end; cancel it by the token.
    ///
    /// # Errors
    /// [`HostError::Settings`].
    pub async fn resume_restore(
        &self,
        id: u32,
        bwlimit_kib_per_s: Option<u64>,
        sink: &dyn TaskSink,
        cancel: &CancellationToken,
    ) -> Result<RestoreReport, HostError> {
        let limit = match bwlimit_kib_per_s {
            // Not what the restore began with.
            Some(0) => Some(0),
            other => bytes_per_s(other)?,
        };
        let ctx = self.context()?;
        Ok(Box::pin(resume_restore(&ctx, id, limit, sink, cancel)).await)
    }

    /// Gives up a live restore that was interrupted: the VM is removed.
    ///
    /// # Errors
    /// [`HostError::Unfinished`].
    pub async fn give_up_restore(&self, id: u32, sink: &dyn TaskSink) -> Result<(), HostError> {
        let ctx = self.context()?;
        let given_up = Box::pin(give_up_restore(&ctx, id, sink)).await;
        given_up.map_err(|why| HostError::Unfinished { id, why })
    }

    /// What the provider says an archive is; its name does not count.
    async fn is_container(
        &self,
        archive: &ArchiveName,
        provider: &dyn Provider,
    ) -> Result<bool, HostError> {
        let capabilities = provider.describe().capabilities;
        if !capabilities.container && !capabilities.container_restore {
            return Ok(false);
        }
        let list = self.list(Some(&archive.storage)).await?;
        let volid = archive.to_string();
        let found = list.archives.iter().find(|info| info.volid == volid);
        Ok(found.is_some_and(|info| info.subtype == GuestKind::Lxc))
    }

    /// Finds out what [`Host::restore`] would do. Changes nothing.
    ///
    /// # Errors
    /// As [`Host::restore`], and [`HostError::Refused`] for what it would refuse.
    pub async fn plan_restore(
        &self,
        request: RestoreRequest,
        cancel: &CancellationToken,
    ) -> Result<RestorePlan, HostError> {
        let (archive, id) = (self.resolve_archive(&request.archive).await?, request.id);
        let provider = self.providers.get_for_task(&archive.storage, cancel).await?;
        if self.is_container(&archive, provider.as_ref()).await? {
            let options = request.container_options(archive.storage)?;
            let ctx = self.context()?;
            let (name, provider) = (&archive.name, provider.as_ref());
            let plan = plan_container_restore(&ctx, provider, name, id, &options, cancel);
            return Box::pin(plan).await.map_err(HostError::Refused);
        }
        let options = request.options(archive.storage)?;
        let ctx = self.context()?;
        let plan = plan_restore(&ctx, provider.as_ref(), &archive.name, id, &options, cancel);
        Box::pin(plan).await.map_err(HostError::Refused)
    }

    /// Restores disks to files and block devices. What goes wrong is in the report. Must be awaited to
    /// its end; cancel it by the token.
    ///
    /// # Errors
    /// As [`Host::restore`].
    pub async fn restore_to_files(
        &self,
        request: FileRestoreRequest,
        sink: &dyn TaskSink,
        cancel: &CancellationToken,
    ) -> Result<FileReport, HostError> {
        let archive = self.resolve_archive(&request.archive).await?;
        let provider = self.providers.get_for_task(&archive.storage, cancel).await?;
        refuse_subvolume(request.format)?;
        if request.format == Some(ImageFormat::RawBitmaps) {
            let why = "'raw+bitmaps' is two files; restore to a file as raw or qcow2.";
            return Err(HostError::Settings(why.to_owned()));
        }
        let options = RestoreOptions {
            source_storage: archive.storage,
            format: request.format,
            force: request.force,
            limit_bytes_per_s: bytes_per_s(request.bwlimit_kib_per_s)?,
            ..RestoreOptions::default()
        };
        let ctx = self.context()?;
        let (provider, disks) = (provider.as_ref(), &request.disks);
        let job = restore_to_files(&ctx, provider, &archive.name, disks, &options, sink, cancel);
        Ok(Box::pin(job).await)
    }

    pub(crate) fn default_backup_storage(&self) -> Result<String, HostError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_the_other_kind_of_guest_has_is_refused() {
        let storage = || "backups".to_owned();
        let plain = RestoreRequest::default;
        assert!(plain().options(storage()).is_ok() && plain().container_options(storage()).is_ok());
        let privileged = RestoreRequest { privileged: true, ..plain() };
        let error = privileged.clone().options(storage()).unwrap_err().to_string();
        assert!(error.contains("'--privileged' cannot be used when a VM"), "{error}");
        assert!(privileged.container_options(storage()).is_ok());
        let parallel = RestoreRequest { parallel: Some(4), ..plain() };
        let error = parallel.clone().container_options(storage()).unwrap_err().to_string();
        assert!(error.contains("'--parallel' cannot be used when a container"), "{error}");
        assert!(parallel.options(storage()).is_ok());
    }
}
