// SPDX-License-Identifier: MIT OR Apache-2.0
//! The steps of one restore.

use std::collections::BTreeMap;
use std::future::{Future, ready};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use provider_api::{
    CancellationToken, GuestConfig, GuestKind, Provider, RestoreDevice, VmRestore, VolumeSource,
    check_archive_name,
};

use super::config::{self, Merge, NewVolume};
use super::copy::{self, Source};
use super::meter::Meter;
use super::plan::{self, Plan, PlannedDisk};
use super::replace::{self, beside};
use super::{
    PARALLEL_DISKS, PlannedVolume, RestoreOptions, RestorePlan, RestoreReport, RestoredVolume,
    live, old, space,
};
use crate::blocking;
use crate::config::guest::VmConfig;
use crate::config::write_atomically;
use crate::job::{JobContext, activate, backup_lock_path, call_within, chain};
use crate::journal::recover::{self, Leftover};
use crate::journal::volumes::NewVolumes;
use crate::journal::{Begin, Entry, Journal, TaskKind};
use crate::layout::{check_guest_id, check_socket_path, make_private_dir};
use crate::lock::FileLock;
use crate::storage::VolumeId;
use crate::task_log::{TaskSink, clean, size};
use crate::temp_tree;
use crate::vm::backup::short_id;
use crate::vm::{leftovers, runner};

/// Largest configuration taken from an archive.
const CONFIG_BYTES_MAX: usize = 1 << 20;

pub(super) struct Restore<'a> {
    pub(super) ctx: &'a JobContext,
    pub(super) provider: &'a dyn Provider,
    pub(super) archive: &'a str,
    pub(super) id: u32,
    pub(super) options: &'a RestoreOptions,
    pub(super) sink: &'a dyn TaskSink,
    pub(super) cancel: &'a CancellationToken,
}

/// What an archive says of its guest.
pub(super) struct Archived {
    pub(super) config: VmConfig,
    pub(super) firewall: Option<Vec<u8>>,
}

/// What was made so far.
pub(super) struct Made {
    pub(super) new: NewVolumes,
    pub(super) private_dir: PathBuf,
    firewall: Option<PathBuf>,
    /// Old disks are gone already.
    is_cleared: bool,
}

pub(super) type Step<T> = Result<T, String>;
pub(super) type Volumes = BTreeMap<String, NewVolume>;

/// What a report says of new volumes.
pub(super) fn reported(volumes: Volumes) -> Vec<RestoredVolume> {
    let volumes = volumes.into_iter();
    let volume =
        |(device, NewVolume { volume, size_bytes })| RestoredVolume { device, volume, size_bytes };
    volumes.map(volume).collect()
}

/// A step that tests kill the process at.
pub fn step(name: &str) {
    #[cfg(debug_assertions)]
    crate::job::kill_point::at(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

pub(super) fn words(error: impl std::error::Error + 'static) -> String {
    chain(&error)
}

impl Restore<'_> {
    pub(super) async fn run(&self, report: &mut RestoreReport) -> Step<()> {
        self.check_request()?;
        let lock_path = backup_lock_path(&self.ctx.layout, GuestKind::Qemu, self.id);
        let _lock = FileLock::try_acquire(&lock_path, &format!("VM {}", self.id)).map_err(words)?;
        // What is refused must not cost the journal that knows of a guest which has to run again.
        let known = old::check(self.ctx, self.id, self.options)?;
        let archived = self.open_archive().await?;
        let source = self.begin_source().await?;
        let (power, old) = match self.make_ready(source.devices(), &archived, known.as_ref()).await
        {
            Ok(ready) => ready,
            Err(error) => {
                self.end_source(source, report).await;
                return Err(error);
            }
        };
        if self.options.live {
            return self.run_live(source, &archived, power, report).await;
        }
        self.with_source(source, archived, old.as_ref(), report).await?;
        drop(power);
        if self.options.start {
            self.start(report).await;
        }
        Ok(())
    }

    /// Checks what needs no recovery, and then recovers. The power lock is held to the end, so that nobody starts a guest
    /// whose disks are being replaced.
    async fn make_ready(
        &self,
        devices: &[RestoreDevice],
        archived: &Archived,
        known: Option<&VmConfig>,
    ) -> Step<(FileLock, Option<VmConfig>)> {
        if known.is_some() {
            let (id, storages) = (self.id, &self.ctx.storages);
            plan::plan(id, &archived.config, known, devices, storages, self.options)?;
        }
        self.cancellable(self.recover()).await?;
        let power = self.power_lock()?;
        let old = old::find(self.ctx, self.id, self.options)?;
        Ok((power, old))
    }

    /// The checks alone.
    pub(super) async fn plan(&self) -> Step<RestorePlan> {
        self.check_request()?;
        let old = old::find(self.ctx, self.id, self.options)?;
        let archived = self.open_archive().await?;
        let source = self.begin_source().await?;
        let result = self.show_plan(source.devices(), &archived, old.as_ref()).await;
        let ended = self.cleanup(source).await;
        let mut plan = result?;
        plan.warnings.extend(ended.err());
        Ok(plan)
    }

    fn check_request(&self) -> Step<()> {
        check_archive_name(self.archive)?;
        check_guest_id(self.id).map_err(words)?;
        let options = self.options;
        if options.in_place && (!options.force || !options.disks.is_empty()) {
            return Err("--in-place is for a whole VM that is replaced with --force".to_owned());
        }
        if options.unique && !options.disks.is_empty() {
            return Err("--unique is for a whole VM".to_owned());
        }
        if options.live {
            self.check_live_request()?;
        }
        match options.limit_bytes_per_s {
            Some(0) => Err("a limit of 0 bytes per second would copy nothing".to_owned()),
            _ => Ok(()),
        }
    }

    pub(super) fn power_lock(&self) -> Step<FileLock> {
        let path = self.ctx.layout.vm_power_lock_path(self.id);
        FileLock::try_acquire(&path, &format!("The power state of VM {}", self.id)).map_err(words)
    }

    fn guest(&self) -> (GuestKind, u32) {
        (GuestKind::Qemu, self.id)
    }

    async fn recover(&self) -> Step<()> {
        let left = recover::recover_guest_down(self.ctx, GuestKind::Qemu, self.id, self.sink);
        if let Some(Leftover { reason, .. }) = left.await.map_err(words)?.first() {
            return Err(format!("an earlier task of this guest is not cleaned up: {reason}"));
        }
        leftovers::remove_of_guest(self.ctx, self.id, self.sink).await;
        Ok(())
    }

    /// Makes the provider's storage ready.
    pub(super) async fn activate(&self) -> Step<()> {
        self.cancellable(activate(self.provider, &self.ctx.limits, self.cancel)).await
    }

    pub(super) async fn open_archive(&self) -> Step<Archived> {
        self.activate().await?;
        let limit = self.ctx.limits.provider_call;
        self.cancellable(within(limit, "read the configuration", self.read_config())).await
    }

    async fn read_config(&self) -> Step<Archived> {
        let call = call_within(self.cancel, self.ctx.limits.provider_call);
        let GuestConfig { config, firewall } =
            self.provider.guest_config(self.archive, &call).await.map_err(words)?;
        let firewall_len = firewall.as_ref().map_or(0, Vec::len);
        if config.is_empty() {
            return Err("the archive has no configuration".to_owned());
        }
        if config.len() > CONFIG_BYTES_MAX || firewall_len > CONFIG_BYTES_MAX {
            return Err("the archive's configuration is too large to be one".to_owned());
        }
        let config = VmConfig::from_bytes(config).map_err(words)?;
        // Rules are the guest's, not a disk's.
        let firewall = firewall.filter(|_| self.options.disks.is_empty());
        Ok(Archived { config, firewall })
    }

    pub(super) async fn begin_source(&self) -> Step<Box<dyn VmRestore>> {
        let limit = self.ctx.limits.provider_call;
        let call = call_within(self.cancel, limit);
        self.cancellable(within(limit, "begin the restore", async {
            self.provider.restore_vm_init(self.archive, &call).await.map_err(words)
        }))
        .await
    }

    pub(super) async fn make_plan(
        &self,
        devices: &[RestoreDevice],
        archived: &Archived,
        old: Option<&VmConfig>,
    ) -> Step<(Plan, Vec<space::PlannedSpace>)> {
        let JobContext { storages, layout, limits, tools, .. } = self.ctx;
        let plan = plan::plan(self.id, &archived.config, old, devices, storages, self.options)?;
        tools.qemu_img().map_err(words)?;
        let mut disks = plan.disks.clone();
        if self.options.live {
            self.check_live(&plan, archived)?;
            disks.extend(live::overlays(&plan.disks));
        }
        let firewall = layout.firewall_path(self.id);
        if old.is_none() && archived.firewall.is_some() && firewall.exists() {
            return Err(format!("there are firewall rules already ('{}')", firewall.display()));
        }
        let (id, places) = (self.id, space::places(self.id, &plan.disks)?);
        let config_dir = layout.vm_config_dir();
        let can_write = blocking::run(move || {
            Ok(space::check_dir(&config_dir).and_then(|()| space::check_writable(id, &places)))
        });
        let freed = if self.options.in_place { plan.fates.frees.clone() } else { <_>::default() };
        let look = async {
            can_write.await.map_err(|error| error.to_string())??;
            let needs = disks.iter().map(|disk| (Arc::clone(&disk.storage), disk.size_bytes));
            Ok(space::measure(needs, &freed, storages).await)
        };
        let space = self.cancellable(within_storage(limits.undo, look)).await?;
        Ok((plan, space))
    }

    async fn show_plan(
        &self,
        devices: &[RestoreDevice],
        archived: &Archived,
        old: Option<&VmConfig>,
    ) -> Step<RestorePlan> {
        let (plan, space) = self.make_plan(devices, archived, old).await?;
        let disks: Vec<PlannedVolume> = plan.disks.iter().map(PlannedDisk::shown).collect();
        let volumes = disks.iter().map(|disk| {
            let volume = format!("{}:{}/(new)", disk.storage, self.id);
            (disk.key.clone(), NewVolume { volume, size_bytes: disk.size_bytes })
        });
        let (config, more) = self.new_config(&plan, archived, old, &volumes.collect())?;
        let problem = space::check(&space).err().filter(|_| !self.options.overcommit);
        Ok(RestorePlan {
            kind: GuestKind::Qemu,
            id: self.id,
            privileged: None,
            archive: self.archive.to_owned(),
            replaces: old.is_some(),
            live: self.options.live,
            disks,
            removed: plan.fates.frees.iter().map(ToString::to_string).collect(),
            stays: plan.fates.stays,
            unused: plan.fates.unused.into_iter().collect(),
            space,
            firewall: archived.firewall.is_some(),
            config: config.to_string(),
            warnings: plan.warnings.iter().chain(&more).map(|warning| clean(warning)).collect(),
            problem,
        })
    }

    pub(super) fn new_config(
        &self,
        plan: &Plan,
        archived: &Archived,
        old: Option<&VmConfig>,
        volumes: &Volumes,
    ) -> Step<(VmConfig, Vec<String>)> {
        if let (false, Some(old)) = (self.options.disks.is_empty(), old) {
            let pairs = plan.disks.iter().map(|disk| (disk.device.clone(), disk.key.clone()));
            let pairs: Vec<_> = pairs.collect();
            let config = config::attach(old, &archived.config, &pairs, volumes, &plan.fates);
            return Ok((config.map_err(words)?, Vec::new()));
        }
        let merge = Merge {
            volumes,
            allow_raw_config: self.options.allow_raw_config,
            unique: self.options.unique,
            old: old.map(|old| (old, &plan.fates)),
        };
        config::rewrite(&archived.config, merge).map_err(words)
    }

    async fn with_source(
        &self,
        mut source: Box<dyn VmRestore>,
        archived: Archived,
        old: Option<&VmConfig>,
        report: &mut RestoreReport,
    ) -> Step<()> {
        let begun = self.plan_and_begin(source.devices(), &archived, old, report).await;
        let (plan, mut made) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                self.end_source(source, report).await;
                return Err(error);
            }
        };
        let result = self.make(source.as_mut(), &plan, archived, old, &mut made, report).await;
        // Only then nothing of the provider's is in there any more.
        self.end_source(source, report).await;
        let dir_removed = remove_dir(made.private_dir.clone()).await;
        match result {
            Ok(()) => {
                self.complete(made, &plan, dir_removed, report).await;
                Ok(())
            }
            Err(error) => {
                let is_cleared = made.is_cleared;
                let problems = self.undo(made, dir_removed).await;
                self.warn(report, problems);
                Err(if is_cleared { in_place_failed(&error) } else { error })
            }
        }
    }

    /// Checks everything, and begins.
    pub(super) async fn plan_and_begin(
        &self,
        devices: &[RestoreDevice],
        archived: &Archived,
        old: Option<&VmConfig>,
        report: &mut RestoreReport,
    ) -> Step<(Plan, Made)> {
        let (plan, space) = self.make_plan(devices, archived, old).await?;
        if !self.options.overcommit {
            space::check(&space)?;
        }
        self.warn(report, plan.warnings.clone());
        let made = self.begin(&plan, old).await?;
        Ok((plan, made))
    }

    /// The journal and the private directory.
    async fn begin(&self, plan: &Plan, old: Option<&VmConfig>) -> Step<Made> {
        let storage = &self.options.source_storage;
        let begin = Begin::new(TaskKind::Restore, GuestKind::Qemu, self.id, storage)
            .map_err(|error| format!("cannot read /proc of this process: {error}"))?;
        // Short, because sockets are made in it.
        let private_dir = self.ctx.layout.run().join(format!("r-{}", short_id()));
        check_socket_path(&private_dir.join("socket-of-a-provider")).map_err(words)?;
        let journal = Journal::create(&self.ctx.layout, begin).await.map_err(words)?;
        let made =
            Made { new: NewVolumes::new(journal), private_dir, firewall: None, is_cleared: false };
        let result = self.begin_journal(&made, plan, old.is_some()).await;
        if let Err(error) = result {
            let problems = self.undo(made, Ok(())).await;
            problems.iter().for_each(|problem| self.sink.warn(problem));
            return Err(error);
        }
        Ok(made)
    }

    async fn begin_journal(&self, made: &Made, plan: &Plan, replaces: bool) -> Step<()> {
        let journal = &made.new.journal;
        if replaces {
            let frees = plan.fates.frees.iter().map(ToString::to_string).collect();
            let entry = Entry::Replace { frees, in_place: self.options.in_place };
            journal.append(entry).await.map_err(words)?;
        }
        let entry = Entry::Directory { path: made.private_dir.clone() };
        journal.append(entry).await.map_err(words)?;
        make_private_dir(&made.private_dir).map_err(words)
    }

    /// Offer, fill, withdraw, switch.
    async fn make(
        &self,
        source: &mut dyn VmRestore,
        plan: &Plan,
        archived: Archived,
        old: Option<&VmConfig>,
        made: &mut Made,
        report: &mut RestoreReport,
    ) -> Step<()> {
        let mut offered = Vec::new();
        let sources = self.offer(source, &plan.disks, &made.private_dir, &mut offered).await;
        let filled = match sources {
            Ok(sources) => {
                step("restore:offered");
                self.fill(sources, plan, old, made).await
            }
            Err(error) => Err(error),
        };
        for device in offered.into_iter().rev() {
            self.withdraw_one(source, &device, &mut report.warnings).await;
        }
        let volumes = filled?;
        let (config, warnings) = self.new_config(plan, &archived, old, &volumes)?;
        self.warn(report, warnings);
        if self.cancel.is_cancelled() {
            return Err("the restore was cancelled".to_owned());
        }
        report.volumes = reported(volumes);
        if let Some(old) = old {
            let stub = made.is_cleared.then(|| old::stub(old, &plan.fates)).transpose()?;
            let known = stub.as_ref().unwrap_or(old);
            replace::check_unchanged(&self.ctx.layout, self.guest(), known).await?;
            let journal = &made.new.journal;
            let layout = &self.ctx.layout;
            let guest = self.guest();
            return replace::switch(layout, guest, &config, archived.firewall, journal).await;
        }
        self.write_new(&config, archived.firewall, made).await
    }

    /// Has all disks offered, before anything is allocated for one of them. Notes for which ones the
    /// provider was asked.
    async fn offer(
        &self,
        source: &mut dyn VmRestore,
        disks: &[PlannedDisk],
        private_dir: &Path,
        offered: &mut Vec<String>,
    ) -> Step<Vec<Source>> {
        let mut sources = Vec::new();
        for PlannedDisk { device, size_bytes, .. } in disks {
            // Its cleanup is due also after it failed.
            offered.push(device.clone());
            let limit = self.ctx.limits.offer;
            let opened = self.offer_one(source, device, *size_bytes, private_dir, limit).await;
            sources.push(opened.map_err(|error| format!("the disk '{device}': {error}"))?);
        }
        Ok(sources)
    }

    /// Has one disk offered, and checks the offer. [`Restore::withdraw_one`] is due also after it failed.
    pub(super) async fn offer_one(
        &self,
        source: &mut dyn VmRestore,
        device: &str,
        size_bytes: u64,
        private_dir: &Path,
        limit: Duration,
    ) -> Step<Source> {
        let call = call_within(self.cancel, limit);
        let offer = within(limit, "offer the disk", async {
            source.volume_init(device, private_dir, &call).await.map_err(words)
        });
        let opened = async {
            let offer: VolumeSource = offer.await?;
            copy::open(&offer, private_dir, size_bytes).await
        };
        self.cancellable(opened).await
    }

    /// Withdraws an offer, whatever became of the restore; what goes wrong is a warning.
    pub(super) async fn withdraw_one(
        &self,
        source: &mut dyn VmRestore,
        device: &str,
        warnings: &mut Vec<String>,
    ) {
        // Not cancelled.
        let call = call_within(&CancellationToken::new(), self.ctx.limits.undo);
        let withdrawn = within(self.ctx.limits.undo, "withdraw the disk", async {
            source.volume_cleanup(device, &call).await.map_err(words)
        });
        if let Err(warning) = withdrawn.await {
            self.sink.warn(&warning);
            warnings.push(clean(&warning));
        }
    }

    async fn fill(
        &self,
        sources: Vec<Source>,
        plan: &Plan,
        old: Option<&VmConfig>,
        made: &mut Made,
    ) -> Step<Volumes> {
        if let (true, Some(old)) = (self.options.in_place, old) {
            self.clear(old, plan, made).await?;
        }
        let mut targets = Vec::new();
        for disk in &plan.disks {
            let PlannedDisk { storage, format, size_bytes, .. } = disk;
            let new = made.new.allocate(self.ctx, storage.as_ref(), self.id, *format, *size_bytes);
            let volume = self.cancellable(async { new.await.map_err(words) }).await?;
            let size = size(*size_bytes);
            self.sink.info(&format!("restoring '{}' to '{volume}' ({size})", disk.device));
            targets.push((disk, volume));
        }
        step("restore:allocated");
        self.cancellable(self.copy_all(sources, &targets)).await?;
        step("restore:filled");
        Ok(targets
            .into_iter()
            .map(|(disk, volume)| {
                let (volume, size_bytes) = (volume.to_string(), disk.size_bytes);
                (disk.key.clone(), NewVolume { volume, size_bytes })
            })
            .collect())
    }

    async fn copy_all(
        &self,
        sources: Vec<Source>,
        targets: &[(&PlannedDisk, VolumeId)],
    ) -> Step<()> {
        let shown = targets.iter().map(|(disk, _)| (disk.device.clone(), disk.size_bytes));
        let meter = &Meter::new(self.id, shown, self.sink);
        let copies = sources.into_iter().zip(targets).enumerate().map(
            |(index, (source, (disk, volume)))| async move {
                let told = |done| meter.tell(index, done);
                let copied = self.copy(source, disk, volume, told).await;
                copied.map_err(|error| format!("the disk '{}': {error}", disk.device))
            },
        );
        let at_once = self.disks_at_once();
        stream::iter(copies).buffer_unordered(at_once).try_for_each(|()| ready(Ok(()))).await
    }

    pub(super) fn disks_at_once(&self) -> usize {
        // A limit is one of all disks together.
        match self.options.limit_bytes_per_s {
            Some(_) => 1,
            None => self.options.parallel.unwrap_or(PARALLEL_DISKS).max(1).into(),
        }
    }

    pub(super) async fn copy(
        &self,
        source: Source,
        disk: &PlannedDisk,
        volume: &VolumeId,
        told: impl FnMut(u64),
    ) -> Step<()> {
        let path = disk.storage.volume_path(volume).map_err(words)?;
        let data = disk.storage.data_path(volume).map_err(words)?;
        let options = disk.storage.image_options(volume).map_err(words)?;
        let files: Vec<&Path> = [path.as_path()].into_iter().chain(data.as_deref()).collect();
        let target = copy::Target {
            options: &options,
            files: &files,
            size_bytes: disk.size_bytes,
            is_zero: true,
            limit_bytes_per_s: self.options.limit_bytes_per_s,
        };
        let stall = self.ctx.limits.transfer_stall;
        copy::copy(&self.ctx.tools, source, target, stall, told).await
    }

    /// Removes the old disks, as asked for: first the guest is one that cannot be started.
    async fn clear(&self, old: &VmConfig, plan: &Plan, made: &mut Made) -> Step<()> {
        if self.cancel.is_cancelled() {
            return Err("the restore was cancelled".to_owned());
        }
        let stub = old::stub(old, &plan.fates)?;
        replace::check_unchanged(&self.ctx.layout, self.guest(), old).await?;
        let path = self.ctx.layout.vm_config_path(self.id);
        beside(move || stub.write(&path)).await?;
        made.is_cleared = true;
        step("restore:locked");
        let frees: Vec<VolumeId> = plan.fates.frees.iter().cloned().collect();
        frees.iter().for_each(|volume| self.sink.info(&format!("removing '{volume}'")));
        let freed = replace::free_unnamed(self.ctx, (GuestKind::Qemu, self.id), &frees).await;
        freed.map_err(|problems| problems.join("; "))?;
        step("restore:cleared");
        Ok(())
    }

    /// Makes a new VM exist.
    pub(super) async fn write_new(
        &self,
        config: &VmConfig,
        firewall: Option<Vec<u8>>,
        made: &mut Made,
    ) -> Step<()> {
        if let Some(rules) = firewall {
            let path = self.ctx.layout.firewall_path(self.id);
            if path.exists() {
                return Err(format!("there are firewall rules already ('{}')", path.display()));
            }
            let entry = Entry::File { path: path.clone() };
            made.new.journal.append(entry).await.map_err(words)?;
            made.firewall = Some(path.clone());
            beside(move || write_atomically(&path, &rules, true)).await?;
        }
        let (config, path) = (config.clone(), self.ctx.layout.vm_config_path(self.id));
        beside(move || config.write_new(&path)).await
    }

    /// From here on the VM exists; what is left can only warn.
    async fn complete(
        &self,
        made: Made,
        plan: &Plan,
        dir_removed: Step<()>,
        report: &mut RestoreReport,
    ) {
        // Of new volumes none is among those that go: those of a restore in place are gone already.
        let (journal, frees) = (made.new.journal, &plan.fates.frees);
        let done = replace::finish(self.ctx, self.guest(), journal, frees, dir_removed).await;
        self.warn(report, done.problems);
        report.removed = done.removed;
    }

    /// Removes what was made; returns what could not be removed.
    pub(super) async fn undo(&self, mut made: Made, dir_removed: Step<()>) -> Vec<String> {
        let mut problems: Vec<String> = dir_removed.err().into_iter().collect();
        problems.extend(made.new.free(self.ctx).await);
        let guest = (GuestKind::Qemu, self.id);
        if problems.is_empty() {
            problems.extend(replace::unstage(&self.ctx.layout, guest).await.err());
        }
        if let Some(path) = made.firewall
            && let Err(error) = blocking::run(move || std::fs::remove_file(path)).await
            && error.kind() != std::io::ErrorKind::NotFound
        {
            problems.push(format!("cannot remove the firewall rules: {error}"));
        }
        // What is left is the recovery's.
        if problems.is_empty()
            && let Err(error) = made.new.journal.remove().await
        {
            problems.push(words(error));
        }
        problems
    }

    pub(super) async fn end_source(&self, source: Box<dyn VmRestore>, report: &mut RestoreReport) {
        let ended = self.cleanup(source).await;
        self.warn(report, ended.err());
    }

    /// Ends the provider's restore, whatever became of it.
    pub(super) async fn cleanup(&self, source: Box<dyn VmRestore>) -> Step<()> {
        let limit = self.ctx.limits.undo;
        let call = call_within(&CancellationToken::new(), limit);
        within(limit, "end the restore", async { source.cleanup(&call).await.map_err(words) }).await
    }

    pub(super) async fn start(&self, report: &mut RestoreReport) {
        let JobContext { layout, tools, storages, .. } = self.ctx;
        let options = runner::StartOptions::default();
        match runner::start(layout, tools, storages, self.id, options).await {
            Ok(started) => {
                report.started = true;
                self.warn(report, started.notices);
            }
            Err(error) => {
                self.warn(
                    report,
                    [format!("the VM is restored but not started: {}", chain(&error))],
                );
            }
        }
    }

    pub(super) fn warn(
        &self,
        report: &mut RestoreReport,
        warnings: impl IntoIterator<Item = String>,
    ) {
        for warning in warnings {
            self.sink.warn(&warning);
            report.warnings.push(clean(&warning));
        }
    }

    pub(super) async fn cancellable<T>(&self, step: impl Future<Output = Step<T>>) -> Step<T> {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err("the restore was cancelled".to_owned()),
            result = step => result,
        }
    }
}

impl PlannedDisk {
    pub(super) fn shown(&self) -> PlannedVolume {
        PlannedVolume {
            device: self.device.clone(),
            key: self.key.clone(),
            size_bytes: self.size_bytes,
            storage: self.storage.id().to_owned(),
            format: self.format,
        }
    }
}

fn in_place_failed(error: &str) -> String {
    format!(
        "{error}. The disks that were to be replaced are gone, as --in-place allows, and the VM is \
         locked; restore it again"
    )
}

pub(super) async fn within<T>(
    limit: Duration,
    doing: &str,
    step: impl Future<Output = Step<T>>,
) -> Step<T> {
    match tokio::time::timeout(limit, step).await {
        Ok(result) => result.map_err(|error| format!("the provider could not {doing}: {error}")),
        Err(_) => Err(format!("the provider did not {doing} within {} seconds", limit.as_secs())),
    }
}

/// Looks at storages, of which one may hang.
async fn within_storage<T>(limit: Duration, step: impl Future<Output = Step<T>>) -> Step<T> {
    let late = || format!("a storage did not answer within {} seconds", limit.as_secs());
    tokio::time::timeout(limit, step).await.unwrap_or_else(|_| Err(late()))
}

/// Removes a directory that a provider was told of, when its restore has ended: what is mounted in it stays.
pub(super) async fn remove_dir(dir: PathBuf) -> Step<()> {
    let shown = dir.display().to_string();
    let removed = blocking::run(move || temp_tree::remove(&dir)).await;
    removed.map_err(|error| format!("cannot remove the directory '{shown}': {error}"))
}
