// SPDX-License-Identifier: MIT OR Apache-2.0
//! The backup of one container, for the job engine.
//!
//! | mode | running container |
//! |---|---|
//! | snapshot | frozen for the moment in which all of its volumes are snapshotted; else as suspend |
//! | suspend | copied while it runs, frozen while what has changed is copied again |
//! | stop | stopped; starts again as soon as there are snapshots, else when the archive is complete |
//!
//! Volumes that cannot be snapshotted are read as they are while the container is down.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use provider_api::{
    BitmapRequest, BoxFuture, ContainerBackup, ContainerMount, GuestKind, IdMapRange, IgnoredEntry,
    VolumeInfo,
};
use tokio::sync::mpsc;
use vzdump_core::bandwidth::Budget;
use vzdump_core::config::container::{CtConfig, MountEntry, ROOTFS};
use vzdump_core::guest::{
    AccessStats, BackupMode, Containers, GuestDriver, GuestError, GuestSource, PointInTime, Task,
    VolumeReport,
};
use vzdump_core::job::{BackupOptions, JobContext};
use vzdump_core::journal::volumes::free_within;
use vzdump_core::journal::{Entry, ProcessStamp, Record};
use vzdump_core::layout::make_private_dir;
use vzdump_core::lock::FileLock;
use vzdump_core::storage::{ImageFormat, nested_subvolumes};
use vzdump_core::task_log::TaskSink;
use vzdump_core::temp_tree;

use crate::CtError;
use crate::attach::{nearest_above, open_place};
use crate::devices::Devices;
use crate::guard::{Frozen, Owed, Target};
use crate::lxc::{Lxc, State};
use crate::opening::{Opening, Wanted};
use crate::power::{POWER_WAIT, first_process, start_again};
use crate::runner::Runner;
use crate::runtime::{
    Busy, Found, beside, check_startable, find_volumes, read_config, refuse_locked, shut_down_now,
};
use crate::sandbox::{LISTS, TREE};
use crate::snapshot::{Snapshot, can_snapshot, is_on_btrfs, is_subvolume, monitored_mount};
use crate::suspend::{Suspension, warn_of_foreign};
use crate::view::{Origin, Part, ViewOptions, wait_until_unmounted};

/// How many subvolumes within a container are named.
const NESTED_MAX: usize = 100;
/// Lines of commands that wait for the log.
const LOG_LINES: usize = 1000;

/// The containers of this host.
#[derive(Debug, Clone, Copy, Default)]
pub struct LxcContainers;

impl Containers for LxcContainers {
    fn open(
        &self,
        ctx: &JobContext,
        id: u32,
        options: &BackupOptions,
    ) -> Result<Box<dyn GuestDriver>, GuestError> {
        let config = read_config(&ctx.layout, id)?;
        refuse_locked(&config, id)?;
        Ok(Box::new(CtDriver {
            ids: config.id_map().map_err(CtError::from)?,
            lxc: Lxc::new(&ctx.layout.lxc_path(), id),
            ctx: ctx.clone(),
            id,
            options: options.clone(),
            config,
            archived: String::new(),
            volumes: Vec::new(),
            no_snapshot: None,
            way: Way::Direct,
            ran: false,
            before: None,
            down_since: None,
            is_unread: false,
            is_stop_told: false,
            stopping: Busy::default(),
            snapshotting: Busy::default(),
            owed: Owed::default(),
            is_restart_told: false,
            power: None,
            snapshots: Vec::new(),
            origin: Origin::Volume,
            suspension: None,
            frozen_ms: None,
            dir: None,
            opening: Opening::default(),
            runner: None,
            lines: None,
        }))
    }

    fn run_again<'a>(
        &'a self,
        ctx: &'a JobContext,
        record: &'a Record,
        sink: &'a dyn TaskSink,
    ) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            crate::power::run_again(ctx, record, sink).await.map_err(|error| error.words())
        })
    }
}

/// What the archive is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The volumes of a container that is down.
    Direct,
    /// Snapshots of the volumes.
    Snapshots,
    /// Copies of the volumes.
    Copies,
}

/// What takes snapshots, in a thread that goes on when nobody waits for it any more.
struct Taking {
    ctx: JobContext,
    snapshots: Vec<Snapshot>,
    is_over: Arc<AtomicBool>,
    runtime: tokio::runtime::Handle,
}

/// Ends what nobody waits for.
struct EndOnDrop(Arc<AtomicBool>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Taking {
    fn end_on_drop(&self) -> EndOnDrop {
        EndOnDrop(Arc::clone(&self.is_over))
    }

    fn take(&self) -> Result<(), CtError> {
        for snapshot in &self.snapshots {
            if self.is_over.load(Ordering::Relaxed) {
                return Err(CtError::Cancelled);
            }
            self.runtime.block_on(snapshot.take(&self.ctx))?;
        }
        Ok(())
    }
}

struct CtDriver {
    ctx: JobContext,
    id: u32,
    options: BackupOptions,
    config: CtConfig,
    ids: Vec<IdMapRange>,
    lxc: Lxc,
    /// The configuration that the archive gets.
    archived: String,
    /// Those that are in the backup.
    volumes: Vec<Found>,
    /// Why the volumes cannot be snapshotted, if so.
    no_snapshot: Option<String>,
    way: Way,
    /// It ran when the backup began.
    ran: bool,
    /// Its first process when it was stopped.
    before: Option<ProcessStamp>,
    /// It was stopped for the backup and does not run again yet.
    down_since: Option<Instant>,
    /// Its volumes are yet to be read as they are, so it stays down.
    is_unread: bool,
    /// While it is being stopped, which goes on when the task is cancelled.
    stopping: Busy,
    /// While it is frozen and snapshots are taken; that, too.
    snapshotting: Busy,
    owed: Owed,
    /// The hook script knows that it is about to be frozen for the second copy.
    is_stop_told: bool,
    /// The hook script knows that it is about to go on.
    is_restart_told: bool,
    /// Held while volumes are read that could change.
    power: Option<FileLock>,
    snapshots: Vec<Snapshot>,
    /// What the images are that are read.
    origin: Origin,
    suspension: Option<Suspension>,
    /// How long the container was frozen for the second copy.
    frozen_ms: Option<u64>,
    dir: Option<PathBuf>,
    opening: Opening,
    runner: Option<Arc<Runner>>,
    lines: Option<mpsc::Receiver<String>>,
}

impl CtDriver {
    async fn prepare_now(&mut self, task: Task<'_>) -> Result<bool, CtError> {
        if self.ids.is_empty() {
            task.sink.warn(
                "the container is privileged: its archive can only be restored as such, by \
                            somebody who trusts it",
            );
        }
        let (config, storages) = (self.config.clone(), self.ctx.storages.clone());
        let found = beside(move || find_volumes(&config, &storages)).await?;
        for volume in &found {
            let entry = &volume.entry;
            let place = entry.mount_point.display();
            match self.why_not(volume) {
                None => {
                    let text = format!("include '{}' ('{place}', {})", entry.key, entry.volume);
                    task.sink.info(&text);
                }
                Some(why) => task.sink.info(&format!("exclude '{}' ('{place}'): {why}", entry.key)),
            }
        }
        self.volumes = found.into_iter().filter(|volume| self.why_not(volume).is_none()).collect();
        self.archived = archived_config(&self.config, &self.volumes)?;
        self.check_root()?;
        let (volumes, lxc) = (self.volumes.clone(), self.lxc.clone());
        let storages = self.ctx.storages.clone();
        self.no_snapshot = beside(move || {
            check_places(&volumes, &lxc)?;
            Ok(volumes.iter().find_map(|v| can_snapshot(v, &storages).err()))
        })
        .await?;
        Ok(true)
    }

    /// A tree without its root is none.
    fn check_root(&self) -> Result<(), CtError> {
        if self.volumes.iter().any(|volume| volume.entry.key == ROOTFS) {
            return Ok(());
        }
        Err(CtError::Invalid(format!(
            "The root file system of the container {} is not in the backup, as the log says; without it there is \
             nothing to back up. A directory of the host can be moved into a volume.",
            self.id
        )))
    }

    /// Why a volume is not in the backup, if so.
    fn why_not(&self, volume: &Found) -> Option<&'static str> {
        let entry = &volume.entry;
        if entry.is_bind() {
            return Some("it belongs to the host");
        }
        if !entry.backup() {
            return Some("no 'backup=1'");
        }
        let is_left_out = self.options.exclude.directory(&entry.mount_point).is_none();
        is_left_out.then_some("a pattern leaves it out")
    }

    /// Decides what the archive is made from, now that nobody starts or stops the container.
    fn choose_way(&mut self, task: Task<'_>) {
        let runs_on = self.ran && self.options.mode != BackupMode::Stop;
        self.way = match (&self.no_snapshot, self.options.mode) {
            (_, BackupMode::Suspend) if runs_on => Way::Copies,
            (Some(reason), _) if runs_on => {
                task.sink.warn(&format!("mode snapshot is not possible: {reason}"));
                task.sink.info("mode suspend is used instead");
                Way::Copies
            }
            (None, _) => Way::Snapshots,
            (Some(_), _) => Way::Direct,
        };
    }

    /// Tells which subvolumes within the volumes are not read.
    async fn look_for_nested(&self, task: Task<'_>) -> Result<(), CtError> {
        let (volumes, exclude) = (self.volumes.clone(), self.options.exclude.clone());
        let found = beside(move || {
            let (mut found, mut unknown) = (Vec::new(), Vec::new());
            let is_nesting =
                |v: &&Found| v.format == Some(ImageFormat::Subvol) && is_on_btrfs(&v.path);
            for volume in volumes.iter().filter(is_nesting) {
                match nested_subvolumes(&volume.path) {
                    Ok(nested) => {
                        found.extend(nested.iter().map(|path| volume.entry.mount_point.join(path)));
                    }
                    // Not every version looks below what is no subvolume itself.
                    Err(_) if !is_subvolume(&volume.path) => unknown.push(volume.entry.key.clone()),
                    Err(error) => return Err(error.into()),
                }
            }
            found.retain(|path| exclude.directory(path).is_some());
            Ok((found, unknown))
        })
        .await?;
        let (found, unknown) = found;
        for key in unknown {
            task.sink.warn(&format!(
                "whether '{key}' has subvolumes within it is not known: they would be empty in the backup"
            ));
        }
        found.iter().take(NESTED_MAX).for_each(|path| warn_of_foreign(path, task));
        if found.len() > NESTED_MAX {
            let rest = found.len() - NESTED_MAX;
            task.sink.warn(&format!("{rest} more subvolumes are empty in the backup"));
        }
        Ok(())
    }

    /// The first copy, while the container runs.
    async fn copy_running(&mut self, task: Task<'_>) -> Result<(), CtError> {
        let (ctx, options, id) = (self.ctx.clone(), self.options.clone(), self.id);
        let owed = self.owed.clone();
        let suspension = beside(move || Suspension::plan(&ctx, &options, id, &owed)).await?;
        task.journal.append(suspension.entry()).await?;
        let suspension = self.suspension.insert(suspension);
        let of = (&self.lxc, self.volumes.as_slice(), self.ids.as_slice());
        suspension.first(&self.ctx, &self.options, of, task).await
    }

    /// Makes sure that nobody starts a container whose volumes are read, or stops one.
    async fn hold_power(&mut self) -> Result<(), CtError> {
        let path = self.ctx.layout.ct_power_lock_path(self.id);
        let what = format!("CT {}", self.id);
        self.power = Some(FileLock::acquire(&path, &what, POWER_WAIT).await?);
        Ok(())
    }

    async fn enter_mode_now(&mut self, task: Task<'_>) -> Result<Vec<VolumeInfo>, GuestError> {
        self.hold_power().await?;
        let lxc = self.lxc.clone();
        self.ran = beside(move || Ok(lxc.state()? != State::Stopped)).await?;
        if self.ran && self.options.mode == BackupMode::Stop {
            self.shut_down(task).await?;
        }
        self.choose_way(task);
        if self.way == Way::Copies {
            self.copy_running(task).await?;
            // Here, where it has time.
            task.hooks.pre_stop(task.sink).await?;
            self.is_stop_told = true;
        } else {
            self.look_for_nested(task).await?;
        }
        let infos = self.volumes.iter().map(|volume| VolumeInfo {
            device: volume.entry.key.clone(),
            size_bytes: size_bytes(volume),
            volume_id: Some(volume.entry.volume.clone()),
        });
        Ok(infos.collect())
    }

    async fn shut_down(&mut self, task: Task<'_>) -> Result<(), GuestError> {
        let (layout, storages, id) = (self.ctx.layout.clone(), self.ctx.storages.clone(), self.id);
        beside(move || check_startable(&layout, &storages, id)).await.map_err(GuestError::at(
            format!("shut CT {id} down, because it could not be started again"),
        ))?;
        task.hooks.pre_stop(task.sink).await?;
        let lxc = self.lxc.clone();
        self.before = beside(move || first_process(&lxc)).await?;
        if let Some(process) = self.before.clone() {
            task.journal.append(Entry::Qemu { process }).await?;
        }
        task.journal.append(Entry::ShutDown).await?;
        self.down_since = Some(Instant::now());
        task.sink.info("stopping the container");
        let (lxc, wait) = (self.lxc.clone(), self.options.stop_wait);
        if self.stopping.beside(move || shut_down_now(&lxc, wait)).await? {
            return Ok(());
        }
        Err(GuestError::Refused(format!(
            "CT {id} did not shut down within {} seconds; it may still do so.",
            wait.as_secs().max(1)
        )))
    }

    async fn snapshot_all(&mut self, task: Task<'_>) -> Result<(), GuestError> {
        let is_running = self.ran && self.down_since.is_none();
        // Named and written down before anything is frozen.
        for volume in &self.volumes {
            let snapshot = Snapshot::plan(&self.ctx, volume, self.id)?;
            task.journal.append(snapshot.entry()).await?;
            self.snapshots.push(snapshot);
        }
        let mut target = Target {
            lxc: self.lxc.clone(),
            with_processes: is_running && self.volumes.len() > 1,
            file_systems: Vec::new(),
        };
        if is_running {
            let (lxc, volumes) = (self.lxc.clone(), self.volumes.clone());
            target.file_systems = beside(move || {
                let images = volumes.iter().filter(|v| v.format == Some(ImageFormat::Raw));
                images.map(|volume| monitored_mount(&lxc, &volume.entry.key)).collect()
            })
            .await?;
        }
        let freezes = target.with_processes || !target.file_systems.is_empty();
        self.origin = if freezes { Origin::FrozenCopy } else { Origin::Copy };
        let taking = Taking {
            ctx: self.ctx.clone(),
            snapshots: self.snapshots.clone(),
            is_over: Arc::default(),
            runtime: tokio::runtime::Handle::current(),
        };
        let _ends = taking.end_on_drop();
        if !freezes {
            self.wait_until_unmounted().await?;
            return Ok(self.snapshotting.beside(move || taking.take()).await?);
        }
        task.journal.append(Entry::Freeze).await?;
        let limits = self.ctx.limits.freeze;
        let program = self.ctx.guard.program.clone();
        let owed = self.owed.clone();
        let work = self.snapshotting.beside(move || {
            let frozen = Frozen::freeze(&program, target, limits.freeze, limits.hold, &owed)?;
            #[cfg(debug_assertions)]
            vzdump_core::job::kill_point::at("frozen");
            let taken = taking.take();
            let thawed = frozen.thaw();
            taken.and(thawed)
        });
        work.await?;
        task.journal.append(Entry::Thawed).await?;
        Ok(())
    }

    /// LXC says that a container has stopped before its volumes are unmounted and written out.
    async fn wait_until_unmounted(&self) -> Result<(), CtError> {
        let images = self.volumes.iter().filter(|volume| volume.format == Some(ImageFormat::Raw));
        let images: Vec<_> = images.map(|volume| volume.path.clone()).collect();
        beside(move || wait_until_unmounted(&images)).await
    }

    async fn point_in_time_now(&mut self, task: Task<'_>) -> Result<PointInTime, GuestError> {
        let started = Instant::now();
        if let Some(suspension) = &self.suspension {
            let is_told = &mut self.is_restart_told;
            let goes_on = async {
                *is_told = true;
                task.hooks.pre_restart(task.sink).await
            };
            let frozen = suspension.second(&self.ctx, &self.options, &self.lxc, goes_on, task);
            self.frozen_ms = Some(frozen.await?);
        } else if self.way == Way::Snapshots {
            self.snapshot_all(task).await?;
            task.sink.info(&format!(
                "snapshots of {} volumes in {} ms",
                self.snapshots.len(),
                started.elapsed().as_millis()
            ));
        }
        self.is_unread = self.way == Way::Direct;
        Ok(PointInTime::default())
    }

    /// Tells the hook script that the container, which was frozen for the second copy, goes on.
    async fn tell_goes_on(&mut self, task: Task<'_>) -> Result<(), GuestError> {
        if !std::mem::take(&mut self.is_stop_told) {
            return Ok(());
        }
        let is_told = std::mem::replace(&mut self.is_restart_told, true);
        let before = if is_told { Ok(()) } else { task.hooks.pre_restart(task.sink).await };
        let after = task.hooks.post_restart(task.sink).await;
        before.and(after)
    }

    /// Starts the container again that was stopped for the backup.
    async fn start_again(&mut self, task: Task<'_>) -> Result<Option<u64>, GuestError> {
        let Some(since) = self.down_since else { return Ok(None) };
        // Once: the next try must start it.
        let is_told = std::mem::replace(&mut self.is_restart_told, true);
        let before = if is_told { Ok(()) } else { task.hooks.pre_restart(task.sink).await };
        // A task that was cancelled has not ended the stop, and what runs still is no container that runs on.
        self.stopping.settle().await;
        let of = (&self.lxc, self.id);
        let is_started = start_again(&self.ctx, of, self.before.as_ref(), task.sink).await?;
        self.down_since = None;
        task.journal.append(Entry::Resumed).await?;
        if !is_started {
            return before.map(|()| None);
        }
        let after = task.hooks.post_restart(task.sink).await;
        let down_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        task.sink.info(&format!("the container runs again after {down_ms} ms"));
        before.and(after)?;
        Ok(Some(down_ms))
    }

    async fn open_view(&mut self, task: Task<'_>) -> Result<(), GuestError> {
        let id = uuid::Uuid::new_v4().simple();
        let parent = self.ctx.layout.run().join("ct-backup");
        make_private_dir(&parent).map_err(CtError::from)?;
        let private = parent.join(format!("{}-{id}", self.id));
        task.journal.append(Entry::Directory { path: private.clone() }).await?;
        self.dir = Some(private.clone());
        let part = |(index, volume): (usize, &Found)| Part {
            key: volume.entry.key.clone(),
            mount_point: volume.entry.mount_point.clone(),
            path: match &self.suspension {
                Some(suspension) => suspension.path(&volume.entry.key),
                None => self.snapshots.get(index).map_or(&volume.path, |s| s.path()).clone(),
            },
            is_image: self.suspension.is_none() && volume.format == Some(ImageFormat::Raw),
        };
        let lists = private.join("lists");
        let wanted = Wanted {
            dir: private.join("view"),
            private,
            lists: lists.clone(),
            parts: self.volumes.iter().enumerate().map(part).collect(),
            ids: self.ids.clone(),
            options: ViewOptions { writable: false, origin: self.origin, is_plain: false },
            excludes: self.options.exclude.clone(),
        };
        let opened = self.opening.open(wanted, self.ctx.limits.provider_call).await?;
        let (view, selection, devices) = opened;
        warn_of_devices(&devices, task);
        let copied = self.suspension.as_ref().map_or(0, Suspension::excluded);
        let excluded = selection.excluded.max(copied);
        task.sink.info(&format!("{excluded} files and directories are left out by patterns"));
        let (log, lines) = mpsc::channel(LOG_LINES);
        self.lines = Some(lines);
        self.runner = Some(Arc::new(Runner {
            lists: Some(lists),
            share: self.options.bandwidth.as_ref().map(|budget| budget.guest().disk()),
            ..Runner::new(Arc::new(view), self.ctx.guard.program.clone(), log)
        }));
        Ok(())
    }

    /// Ends the view; the provider may still hold the runner, whose commands are ended then.
    async fn close_view(&mut self, task: Task<'_>) -> Result<(), GuestError> {
        if let Some(lines) = &mut self.lines {
            while let Ok(line) = lines.try_recv() {
                task.sink.info(&line);
            }
        }
        self.lines = None;
        let Some(runner) = self.runner.take() else { return Ok(self.opening.close().await?) };
        if beside(move || crate::runner::close(runner)).await? {
            return Ok(());
        }
        let why = "The provider still holds the container's files after the end of the backup.";
        Err(GuestError::Refused(why.to_owned()))
    }

    async fn release_now(&mut self) -> Result<(), GuestError> {
        self.snapshotting.settle().await;
        let mut first = Ok(());
        for snapshot in std::mem::take(&mut self.snapshots).iter().rev() {
            let removed = match snapshot {
                Snapshot::OfStorage { volume, name, .. } => {
                    let storage =
                        self.ctx.storages.images(volume.storage()).map_err(CtError::from)?;
                    let removed = storage.delete_snapshot(&self.ctx.tools, volume, name).await;
                    removed.map(drop).map_err(|error| GuestError::from(CtError::from(error)))
                }
                Snapshot::Clone { volume, .. } => {
                    let freed = free_within(&self.ctx, volume, self.ctx.limits.undo).await;
                    freed.map_err(GuestError::Refused)
                }
            };
            first = first.and(removed);
        }
        first
    }
}

/// The configuration for the archive, which says of volumes that patterns left out that they are not in it: a restore
/// would take an empty one for all that there was.
fn archived_config(config: &CtConfig, included: &[Found]) -> Result<String, CtError> {
    let mut lines = config.lines().for_backup();
    for mut entry in config.mounts()?.into_iter().filter(MountEntry::backup) {
        if !included.iter().any(|volume| volume.entry.key == entry.key) {
            entry.options.set("backup", "0");
            lines.set(&entry.key, &entry.to_value())?;
        }
    }
    Ok(lines.to_string())
}

/// Looks whether the view will find the places of the volumes, before anything is done for it. What cannot be
/// looked at now, as in an image that is not mounted, is found out then. May block.
fn check_places(volumes: &[Found], lxc: &Lxc) -> Result<(), CtError> {
    for volume in volumes {
        let (key, place) = (&volume.entry.key, volume.entry.mount_point.as_path());
        let above = nearest_above(volumes, |one| one.entry.mount_point.as_path(), place);
        let Some(above) = above else { continue };
        let around = (above.entry.key.as_str(), above.entry.mount_point.as_path());
        let Some(root) = open_now(above, lxc) else { continue };
        open_place(root.as_fd(), around, place)
            .map_err(CtError::at(format!("show '{key}' at '{}'", place.display())))?;
    }
    Ok(())
}

/// A volume as it is now, without what is mounted in it.
fn open_now(volume: &Found, lxc: &Lxc) -> Option<File> {
    let path = match volume.format {
        Some(ImageFormat::Raw) => monitored_mount(lxc, &volume.entry.key).ok()?,
        _ => volume.path.clone(),
    };
    File::open(path).ok()
}

fn warn_of_devices(devices: &Devices, task: Task<'_>) {
    for path in &devices.named {
        task.sink.warn(&format!(
            "'{}' is a device file, which an unprivileged container must not have: with it the archive cannot be \
             restored (--exclude-path leaves it out)",
            path.display()
        ));
    }
    let rest = devices.count.saturating_sub(devices.named.len() as u64);
    if rest > 0 {
        task.sink.warn(&format!("{rest} more device files are in the archive"));
    }
}

fn size_bytes(volume: &Found) -> u64 {
    let image = volume.format == Some(ImageFormat::Raw);
    if image { std::fs::metadata(&volume.path).map_or(0, |meta| meta.len()) } else { 0 }
}

impl GuestDriver for CtDriver {
    fn kind(&self) -> GuestKind {
        GuestKind::Lxc
    }

    fn id(&self) -> u32 {
        self.id
    }

    fn name(&self) -> Option<String> {
        self.config.hostname().map(str::to_owned)
    }

    fn prepare<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<bool, GuestError>> {
        Box::pin(async move { Ok(self.prepare_now(task).await?) })
    }

    fn enter_mode<'a>(
        &'a mut self,
        task: Task<'a>,
    ) -> BoxFuture<'a, Result<Vec<VolumeInfo>, GuestError>> {
        Box::pin(self.enter_mode_now(task))
    }

    fn acquire<'a>(&'a mut self, _: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn point_in_time<'a>(
        &'a mut self,
        _: &'a [BitmapRequest],
        task: Task<'a>,
    ) -> BoxFuture<'a, Result<PointInTime, GuestError>> {
        Box::pin(self.point_in_time_now(task))
    }

    fn resume<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<Option<u64>, GuestError>> {
        Box::pin(async move {
            // It may hang with its storage: what it still makes is looked for once more before the release.
            let settled = tokio::time::timeout(self.ctx.limits.undo, self.snapshotting.settle());
            if settled.await.is_err() {
                task.sink.warn("a snapshot is not complete yet, and is not waited for any longer");
            }
            if let Some(suspension) = &self.suspension {
                suspension.settle().await;
                self.power = None;
                self.tell_goes_on(task).await?;
                return Ok(self.frozen_ms);
            }
            if std::mem::take(&mut self.is_unread) {
                // Its volumes are read as they are: it runs again when that is over.
                return Ok(None);
            }
            let down_ms = self.start_again(task).await?;
            self.power = None;
            Ok(down_ms)
        })
    }

    fn is_held(&self) -> bool {
        self.way == Way::Direct && self.down_since.is_some()
    }

    fn open_source<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(self.open_view(task))
    }

    fn source(&self) -> GuestSource {
        let runner = self.runner.as_ref().expect("the engine opens the source first");
        let mount = |volume: &Found| ContainerMount {
            key: volume.entry.key.clone(),
            mount_point: volume.entry.mount_point.clone(),
            volume_id: volume.entry.volume.clone(),
        };
        let firewall = std::fs::read(self.ctx.layout.firewall_path(self.id)).ok();
        let bandwidth = self.options.bandwidth.as_ref();
        GuestSource::Container(ContainerBackup {
            config: self.archived.clone().into_bytes(),
            firewall,
            tree: TREE.into(),
            host_tree: runner.view.host_tree(),
            mounts: self.volumes.iter().map(mount).collect(),
            id_map: self.ids.clone(),
            lists: LISTS.into(),
            host_lists: runner.lists.clone().unwrap_or_default(),
            skip_unreadable: self.options.skip_unreadable,
            expected_bytes: self.suspension.as_ref().map(Suspension::copied_bytes),
            bandwidth_limit: bandwidth.map(Budget::rate_bytes_per_s),
            runner: Arc::clone(runner) as _,
        })
    }

    fn watch<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, GuestError> {
        Box::pin(async move {
            // A snapshot is not lost; what commands say is told meanwhile.
            if let Some(lines) = &mut self.lines {
                while let Some(line) = lines.recv().await {
                    task.sink.info(&line);
                }
            }
            std::future::pending().await
        })
    }

    fn close_source<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(self.close_view(task))
    }

    fn teardown<'a>(&'a mut self, _: bool, _: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn release<'a>(&'a mut self, _: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(self.release_now())
    }

    fn leave_mode<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(async move {
            let owed = self.owed.clone();
            let thawed = beside(move || owed.thaw()).await;
            let started = self.start_again(task).await;
            self.power = None;
            // Else the journal must go on to say so.
            started.map(drop).and(thawed.map_err(GuestError::from))
        })
    }

    fn cleanup<'a>(&'a mut self, _: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(async move {
            if let Some(suspension) = self.suspension.take() {
                suspension.remove().await?;
            }
            let Some(dir) = self.dir.take() else { return Ok(()) };
            let removed = vzdump_core::blocking::run(move || temp_tree::remove(&dir));
            removed.await.map_err(GuestError::at("remove the directory of the backup"))
        })
    }

    fn stats(&self) -> Option<AccessStats> {
        None
    }

    fn cut_short(&self) -> Option<String> {
        self.runner.as_ref()?.killed.get().cloned()
    }

    fn unreadable(&self) -> (u64, Vec<IgnoredEntry>) {
        self.suspension.as_ref().map_or_else(Default::default, Suspension::unreadable)
    }

    fn volumes(&self) -> Vec<VolumeReport> {
        let report = |volume: &Found| VolumeReport {
            device: volume.entry.key.clone(),
            size_bytes: size_bytes(volume),
            bitmap_action: "not-used".to_owned(),
            dirty_bytes: None,
        };
        self.volumes.iter().map(report).collect()
    }
}
