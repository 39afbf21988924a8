// SPDX-License-Identifier: MIT OR Apache-2.0
//! The steps of one restore.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use provider_api::{
    Call, CancellationToken, ContainerData, GuestKind, Provider, check_archive_name,
};
use tokio::sync::mpsc;
use vzdump_core::config::container::CtConfig;
use vzdump_core::config::write_atomically;
use vzdump_core::job::{JobContext, backup_lock_path};
use vzdump_core::journal::recover::{self, Leftover};
use vzdump_core::journal::volumes::NewVolumes;
use vzdump_core::journal::{Begin, Entry, Journal, TaskKind};
use vzdump_core::layout::check_guest_id;
use vzdump_core::lock::FileLock;
use vzdump_core::restore::{RestorePlan, RestoreReport, RestoredVolume, replace, space, step};
use vzdump_core::storage::VolumeId;
use vzdump_core::task_log::{TaskSink, clean};

use super::merge::{self, Merge};
use super::plan::{self, Plan};
use super::{CtRestoreOptions, old, source};
use crate::CtError;
use crate::create::{NewMount, data_bytes_max, make_volumes, parts_of};
use crate::place::{Archive, Place, unpack};
use crate::runner::Runner;
use crate::runtime::beside;
use crate::unpack::{Bounds, Unpacked};

/// Largest configuration taken from an archive.
const CONFIG_BYTES_MAX: usize = 1 << 20;

pub(super) struct Restore<'a> {
    pub(super) ctx: &'a JobContext,
    pub(super) provider: &'a dyn Provider,
    pub(super) archive: &'a str,
    pub(super) id: u32,
    pub(super) options: &'a CtRestoreOptions,
    pub(super) sink: &'a dyn TaskSink,
    pub(super) cancel: &'a CancellationToken,
}

/// What an archive says of its container.
struct Archived {
    config: CtConfig,
    firewall: Option<Vec<u8>>,
}

/// What was made so far.
struct Made {
    new: NewVolumes,
    firewall: Option<PathBuf>,
}

/// The container that is restored over, and what becomes of it.
type Old<'a> = Option<&'a CtConfig>;

impl Restore<'_> {
    pub(super) async fn run(&self, report: &mut RestoreReport) -> Result<(), CtError> {
        self.check_request()?;
        let path = backup_lock_path(&self.ctx.layout, GuestKind::Lxc, self.id);
        let _lock = FileLock::try_acquire(&path, &format!("CT {}", self.id))?;
        // What is refused leaves it to the next recovery to start a container that its backup has stopped.
        old::find(self.ctx, self.id, self.options.force).await?;
        self.recover().await?;
        // Held to the end, so that nobody starts a container whose volumes are being replaced.
        let path = self.ctx.layout.ct_power_lock_path(self.id);
        let power = FileLock::try_acquire(&path, &format!("The power state of CT {}", self.id))?;
        let old = old::find(self.ctx, self.id, self.options.force).await?;
        let archived = self.read_archive().await?;
        let mut plan = self.make_plan(&archived, old.as_ref()).await?;
        if !self.options.overcommit {
            space::check(&plan.space).map_err(CtError::Invalid)?;
        }
        self.warn(report, plan.warnings.clone());
        let mut made = self.begin(&plan, old.is_some()).await?;
        match Box::pin(self.make(&mut plan, &archived, old.as_ref(), &mut made, report)).await {
            Ok(()) => self.complete(made, &plan, report).await,
            Err(error) => {
                let problems = self.undo(made).await;
                self.warn(report, problems);
                return Err(error);
            }
        }
        self.sink.info(&format!("CT {} is restored", self.id));
        drop(power);
        if self.options.start {
            self.start(report).await;
        }
        Ok(())
    }

    /// The checks alone.
    pub(super) async fn show_plan(&self) -> Result<RestorePlan, CtError> {
        self.check_request()?;
        let old = old::find(self.ctx, self.id, self.options.force).await?;
        let archived = self.read_archive().await?;
        let plan = self.make_plan(&archived, old.as_ref()).await?;
        let shown = plan.volumes.iter().map(|one| {
            let volume = format!("{}:{}/(new)", one.storage.id(), self.id);
            (one.mount.key.clone(), one.value(&volume))
        });
        let (config, more) = self.merge(&plan, &archived, old.as_ref(), &shown.collect())?;
        let problem = space::check(&plan.space).err().filter(|_| !self.options.overcommit);
        Ok(RestorePlan {
            kind: GuestKind::Lxc,
            id: self.id,
            archive: self.archive.to_owned(),
            privileged: Some(config.id_map()?.is_empty()),
            replaces: old.is_some(),
            live: false,
            disks: plan.volumes.iter().map(plan::Planned::shown).collect(),
            removed: plan.fates.frees.iter().map(ToString::to_string).collect(),
            stays: plan.fates.stays,
            unused: plan.fates.unused.into_iter().collect(),
            space: plan.space,
            firewall: archived.firewall.is_some(),
            config: config.to_string(),
            warnings: plan.warnings.iter().chain(&more).map(|warning| clean(warning)).collect(),
            problem,
        })
    }

    fn check_request(&self) -> Result<(), CtError> {
        check_archive_name(self.archive).map_err(CtError::Invalid)?;
        Ok(check_guest_id(self.id)?)
    }

    async fn recover(&self) -> Result<(), CtError> {
        let left =
            recover::recover_guest_down(self.ctx, GuestKind::Lxc, self.id, self.sink).await?;
        match left.into_iter().next() {
            None => Ok(()),
            Some(Leftover { reason, .. }) => Err(CtError::Invalid(format!(
                "An earlier task of this guest is not cleaned up: {reason}"
            ))),
        }
    }

    fn call(&self, limit: Duration) -> Call {
        Call { cancel: self.cancel.child_token(), deadline: Instant::now().checked_add(limit) }
    }

    async fn read_archive(&self) -> Result<Archived, CtError> {
        let limits = &self.ctx.limits;
        let late = || CtError::Invalid("The provider does not answer in time.".to_owned());
        let fault = CtError::at(format!("read the archive '{}'", self.archive));
        let call = self.call(limits.activate);
        let activated = tokio::time::timeout(limits.activate, self.provider.activate(&call)).await;
        activated.map_err(|_| late())?.map_err(CtError::at("make the provider ready"))?;
        let call = self.call(limits.provider_call);
        let read = self.provider.guest_config(self.archive, &call);
        let read = tokio::time::timeout(limits.provider_call, read).await.map_err(|_| late())?;
        let read = read.map_err(fault)?;
        let firewall_len = read.firewall.as_ref().map_or(0, Vec::len);
        if read.config.len() > CONFIG_BYTES_MAX || firewall_len > CONFIG_BYTES_MAX {
            let why = "The archive's configuration is too large to be one.";
            return Err(CtError::Invalid(why.to_owned()));
        }
        Ok(Archived { config: CtConfig::from_bytes(read.config)?, firewall: read.firewall })
    }

    async fn make_plan(&self, archived: &Archived, old: Old<'_>) -> Result<Plan, CtError> {
        let firewall = self.ctx.layout.firewall_path(self.id);
        if old.is_none() && archived.firewall.is_some() && firewall.exists() {
            let path = firewall.display();
            return Err(CtError::Invalid(format!("There are firewall rules already ('{path}').")));
        }
        let plan = plan::plan(self.ctx, self.id, &archived.config, old, self.options).await?;
        // That the configuration can be had, too, and whether it may: before anything is made.
        let shown =
            plan.volumes.iter().map(|one| (one.mount.key.clone(), one.value("any:1/x.raw")));
        self.merge(&plan, archived, old, &shown.collect())?;
        Ok(plan)
    }

    fn merge(
        &self,
        plan: &Plan,
        archived: &Archived,
        old: Old<'_>,
        volumes: &BTreeMap<String, String>,
    ) -> Result<(CtConfig, Vec<String>), CtError> {
        let old = old.map(|old| (old, &plan.fates));
        merge::rewrite(&archived.config, Merge { volumes, options: self.options, old })
    }

    async fn begin(&self, plan: &Plan, replaces: bool) -> Result<Made, CtError> {
        let storage = &self.options.source_storage;
        let begin = Begin::new(TaskKind::Restore, GuestKind::Lxc, self.id, storage)
            .map_err(CtError::at("read /proc of this process"))?;
        let new = NewVolumes::new(Journal::create(&self.ctx.layout, begin).await?);
        if replaces {
            let frees = plan.fates.frees.iter().map(ToString::to_string).collect();
            new.journal.append(Entry::Replace { frees, in_place: false }).await?;
        }
        Ok(Made { new, firewall: None })
    }

    /// Volumes, files, configuration.
    async fn make(
        &self,
        plan: &mut Plan,
        archived: &Archived,
        old: Old<'_>,
        made: &mut Made,
        report: &mut RestoreReport,
    ) -> Result<(), CtError> {
        let (config, _) = {
            let any =
                plan.volumes.iter().map(|one| (one.mount.key.clone(), one.value("any:1/x.raw")));
            self.merge(plan, archived, old, &any.collect())?
        };
        let ids = config.id_map()?;
        let (mut volumes, mut values) = (Vec::new(), BTreeMap::new());
        for one in &plan.volumes {
            let (mounts, storage) = (std::slice::from_ref(&one.mount), one.storage.id());
            let new = &mut made.new;
            let made = make_volumes(self.ctx, self.id, storage, one.format, mounts, &ids, new);
            let Some(volume) = made.await?.into_iter().next() else { continue };
            self.sink.info(&format!("new volume '{volume}' ({})", one.mount.key));
            values.insert(one.mount.key.clone(), one.value(&volume.to_string()));
            report.volumes.push(RestoredVolume {
                device: one.mount.key.clone(),
                volume: volume.to_string(),
                size_bytes: one.mount.size_bytes,
            });
            volumes.push(volume);
        }
        step("restore:allocated");
        let unpacked = self.fill(plan, &volumes, &ids, &made.new).await?;
        step("restore:filled");
        let left_out = unpacked.left_out.iter();
        self.warn(report, left_out.map(|(what, count)| format!("left out: {what} ({count})")));
        if let Some(old) = old {
            let without_files = (0..).zip(&plan.volumes);
            let without_files = without_files.filter(|(at, _)| !unpacked.filled.contains(at));
            let empty: Vec<&Path> = without_files.map(|(_, one)| one.mount_point()).collect();
            let kept = plan.fates.keep_without_files(self.id, old, &empty)?;
            let words = |kept: &VolumeId| {
                format!("the archive has no files of '{kept}', which stays as an unused volume")
            };
            self.warn(report, kept.iter().map(words));
        }
        let (config, warnings) = self.merge(plan, archived, old, &values)?;
        self.warn(report, warnings);
        if self.cancel.is_cancelled() {
            return Err(CtError::Cancelled);
        }
        let firewall = archived.firewall.clone();
        if let Some(old) = old {
            let (layout, guest) = (&self.ctx.layout, (GuestKind::Lxc, self.id));
            let unchanged = replace::check_unchanged(layout, guest, old.lines()).await;
            unchanged.map_err(CtError::Invalid)?;
            let journal = &made.new.journal;
            let switched = replace::switch(layout, guest, config.lines(), firewall, journal).await;
            return switched.map_err(CtError::Invalid);
        }
        self.write_new(&config, firewall, made).await
    }

    /// Mounts the new volumes and unpacks into them.
    async fn fill(
        &self,
        plan: &Plan,
        volumes: &[VolumeId],
        ids: &[provider_api::IdMapRange],
        new: &NewVolumes,
    ) -> Result<Unpacked, CtError> {
        let mounts: Vec<NewMount> = plan.volumes.iter().map(|one| one.mount.clone()).collect();
        let data_bytes = data_bytes_max(self.ctx, &mounts, volumes).await?;
        let bounds = Bounds { data_bytes, bytes_per_s: self.options.limit_bytes_per_s };
        let parts = parts_of(self.ctx, &mounts, volumes)?;
        let images: Vec<PathBuf> =
            parts.iter().filter(|part| part.is_image).map(|part| part.path.clone()).collect();
        let place = Place::make(self.ctx, self.id, new).await?;
        let (runner, lines) = match place.open(self.ctx, parts, ids).await {
            Ok(opened) => opened,
            Err(error) => {
                place.remove().await?;
                return Err(error);
            }
        };
        let mount_points = mounts.iter().map(|mount| mount.mount_point.clone()).collect();
        let unpacked = self.copy(&place, &runner, lines, mount_points, bounds).await;
        // Unmounted before anything is removed.
        let closed = beside(move || {
            crate::runner::close(runner)?;
            // What unmounting has written, too.
            let sync = |path: &PathBuf| std::fs::File::open(path)?.sync_all();
            images.iter().try_for_each(sync).map_err(CtError::at("write the volumes to disk"))
        })
        .await;
        place.remove().await?;
        let unpacked = unpacked.map_err(|error| plan.advise(error))?;
        closed?;
        if unpacked.filled.is_empty() {
            return Err(CtError::Invalid("The archive holds no files.".to_owned()));
        }
        Ok(unpacked)
    }

    /// Init and cleanup of the provider in a pair, the unpacking between them.
    async fn copy(
        &self,
        place: &Place,
        runner: &Arc<Runner>,
        lines: mpsc::Receiver<String>,
        mounts: Vec<PathBuf>,
        bounds: Bounds,
    ) -> Result<Unpacked, CtError> {
        let call = self.call(self.ctx.limits.offer);
        let at = || CtError::at(format!("restore from the archive '{}'", self.archive));
        let mut offer =
            self.provider.restore_container_init(self.archive, &call).await.map_err(at())?;
        let dir = place.for_provider()?;
        let unpacked = match offer.data(&dir, &call).await {
            Err(error) => Err(at()(error)),
            Ok(ContainerData::Tar { path, compression }) => match source::open(path).await {
                Err(error) => Err(error),
                Ok(file) => {
                    let archive = Archive {
                        what: "the archive",
                        file,
                        codec: source::codec_of(compression),
                        mounts,
                        bounds,
                    };
                    unpack(runner, lines, archive, self.sink, self.cancel).await
                }
            },
            Ok(ContainerData::Directory(path)) => {
                let files = source::Files { place, runner, lines, mounts, bounds };
                source::copy_directory(self.ctx, path, files, self.sink, self.cancel).await
            }
            Ok(_) => Err(CtError::Invalid(
                "The provider offers neither a tar archive nor a directory.".to_owned(),
            )),
        };
        let limit = self.ctx.limits.undo;
        let call = Call { cancel: CancellationToken::new(), deadline: None };
        match tokio::time::timeout(limit, offer.cleanup(&call)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.sink.warn(&format!("end of the restore: {error}")),
            Err(_) => self.sink.warn("end of the restore: the provider does not answer in time"),
        }
        unpacked
    }

    /// Makes a new container exist.
    async fn write_new(
        &self,
        config: &CtConfig,
        firewall: Option<Vec<u8>>,
        made: &mut Made,
    ) -> Result<(), CtError> {
        if let Some(rules) = firewall {
            let path = self.ctx.layout.firewall_path(self.id);
            made.new.journal.append(Entry::File { path: path.clone() }).await?;
            let to = path.clone();
            beside(move || Ok(write_atomically(&to, &rules, true)?)).await?;
            made.firewall = Some(path);
        }
        Ok(config.lines().write_new(&self.ctx.layout.ct_config_path(self.id))?)
    }

    /// From here on the container exists; what is left can only warn.
    async fn complete(&self, made: Made, plan: &Plan, report: &mut RestoreReport) {
        let guest = (GuestKind::Lxc, self.id);
        let done = replace::complete(self.ctx, guest, made.new.journal, &plan.fates.frees).await;
        self.warn(report, done.problems);
        report.removed = done.removed;
    }

    /// Removes what was made; returns what could not be removed.
    async fn undo(&self, mut made: Made) -> Vec<String> {
        let mut problems = made.new.free(self.ctx).await;
        let guest = (GuestKind::Lxc, self.id);
        if problems.is_empty() {
            problems.extend(replace::unstage(&self.ctx.layout, guest).await.err());
        }
        if let Some(path) = made.firewall {
            let removed = beside(move || match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(CtError::at("remove the firewall rules")(error))
                }
                _ => Ok(()),
            });
            problems.extend(removed.await.err().map(|error| error.words()));
        }
        // What is left is the recovery's.
        if problems.is_empty()
            && let Err(error) = made.new.journal.remove().await
        {
            problems.push(error.to_string());
        }
        problems
    }

    async fn start(&self, report: &mut RestoreReport) {
        let started = crate::runtime::start(&self.ctx.layout, &self.ctx.storages, self.id).await;
        match started {
            Ok(started) => {
                report.started = true;
                self.warn(report, started.notices);
            }
            Err(error) => {
                let why = error.words();
                self.warn(report, [format!("the container is restored but not started: {why}")]);
            }
        }
    }

    fn warn(&self, report: &mut RestoreReport, warnings: impl IntoIterator<Item = String>) {
        for warning in warnings {
            self.sink.warn(&warning);
            report.warnings.push(clean(&warning));
        }
    }
}
