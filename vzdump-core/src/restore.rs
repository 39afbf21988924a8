// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restores a VM from an archive as a new VM.
//!
//! ```text
//!  plan      number free, configuration, devices and sizes, storages, space: nothing is made yet
//!  make      per disk: volume journalled, allocated, filled from the provider, offer withdrawn
//!  switch    firewall rules, then the configuration, which makes the VM exist
//! ```
//!
//! A failure or cancellation before the switch removes all that was made; a crash leaves that to
//! the journal. The provider's `init` and `cleanup` calls always come in pairs.

mod config;
mod copy;
mod plan;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use provider_api::{
    CancellationToken, GuestConfig, GuestKind, Provider, VmRestore, check_archive_name,
};
use serde::Serialize;

use self::config::NewVolume;
use self::plan::PlannedDisk;
use crate::blocking;
use crate::config::guest::VmConfig;
use crate::config::{ConfigError, write_atomically};
use crate::job::report::millis;
use crate::job::{JobContext, activate, backup_lock_path, call_within, chain};
use crate::journal::recover::{self, Leftover};
use crate::journal::volumes::NewVolumes;
use crate::journal::{Begin, Entry, Journal, TaskKind};
use crate::layout::{check_guest_id, check_socket_path, make_private_dir};
use crate::lock::FileLock;
use crate::storage::{ImageFormat, VolumeId};
use crate::task_log::{Progress, TaskSink, clean, clock, rate, size};
use crate::vm::backup::short_id;
use crate::vm::{leftovers, runner};

/// Largest configuration taken from an archive.
const CONFIG_BYTES_MAX: usize = 1 << 20;
/// At least this much time lies between two progress lines.
const LINE_INTERVAL: Duration = Duration::from_secs(3);

/// What a restore is asked to do.
#[derive(Debug, Clone, Default)]
pub struct RestoreOptions {
    /// Name of the provider's storage.
    pub source_storage: String,
    /// Storage of the new volumes; by default those of the archive's configuration.
    pub storage: Option<String>,
    /// Format of the new volumes; by default those of the archive's configuration.
    pub format: Option<ImageFormat>,
    /// Start the VM afterwards.
    pub start: bool,
    /// Keep lines of the configuration that reach the host.
    pub allow_raw_config: bool,
    /// Restore even if the disks could outgrow the storage.
    pub overcommit: bool,
}

/// A restored disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RestoredVolume {
    /// Device name.
    pub device: String,
    /// Volume id.
    pub volume: String,
    /// Size in bytes.
    pub size_bytes: u64,
}

/// Result of a restore.
#[derive(Debug, Clone, Serialize)]
pub struct RestoreReport {
    /// Number of the new VM.
    pub id: u32,
    /// The archive.
    pub archive: String,
    /// What went wrong; none if the VM is there.
    pub error: Option<String>,
    /// What was changed or is odd.
    pub warnings: Vec<String>,
    /// The new volumes.
    pub volumes: Vec<RestoredVolume>,
    /// The new configuration.
    pub config_path: PathBuf,
    /// Whether the VM was started.
    pub started: bool,
    /// Duration in milliseconds.
    pub duration_ms: u64,
}

impl RestoreReport {
    /// Whether the new VM is there.
    pub fn is_success(&self) -> bool {
        self.error.is_none()
    }
}

/// Restores an archive of a VM as the new VM `id`.
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
    let mut report = RestoreReport {
        id,
        archive: archive.to_owned(),
        error: None,
        warnings: Vec::new(),
        volumes: Vec::new(),
        config_path: ctx.layout.vm_config_path(id),
        started: false,
        duration_ms: 0,
    };
    sink.info(&format!("restore of '{}' as VM {id}", clean(archive)));
    let task = Restore { ctx, provider, archive, id, options, sink, cancel };
    match Box::pin(task.run(&mut report)).await {
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

struct Restore<'a> {
    ctx: &'a JobContext,
    provider: &'a dyn Provider,
    archive: &'a str,
    id: u32,
    options: &'a RestoreOptions,
    sink: &'a dyn TaskSink,
    cancel: &'a CancellationToken,
}

/// What was made so far.
struct Made {
    new: NewVolumes,
    private_dir: PathBuf,
    firewall: Option<PathBuf>,
}

type Step<T> = Result<T, String>;

fn words(error: impl std::error::Error + 'static) -> String {
    chain(&error)
}

impl Restore<'_> {
    async fn run(&self, report: &mut RestoreReport) -> Step<()> {
        check_archive_name(self.archive)?;
        check_guest_id(self.id).map_err(words)?;
        let lock_path = backup_lock_path(&self.ctx.layout, GuestKind::Qemu, self.id);
        let _lock = FileLock::try_acquire(&lock_path, &format!("VM {}", self.id)).map_err(words)?;
        self.cancellable(self.recover()).await?;
        self.check_number_is_free()?;
        self.cancellable(activate(self.provider, &self.ctx.limits, self.cancel)).await?;
        let limit = self.ctx.limits.provider_call;
        let archived =
            self.cancellable(within(limit, "read the configuration", self.read_config())).await?;
        let call = call_within(self.cancel, limit);
        let mut source = self
            .cancellable(within(limit, "begin the restore", async {
                self.provider.restore_vm_init(self.archive, &call).await.map_err(words)
            }))
            .await?;
        let result = self.with_source(source.as_mut(), archived, report).await;
        self.end_source(source, report).await;
        result?;
        if self.options.start {
            self.start(report).await;
        }
        Ok(())
    }

    async fn recover(&self) -> Step<()> {
        let left = recover::recover_guest(self.ctx, GuestKind::Qemu, self.id, self.sink);
        if let Some(Leftover { reason, .. }) = left.await.map_err(words)?.first() {
            return Err(format!("an earlier task of this guest is not cleaned up: {reason}"));
        }
        leftovers::remove_of_guest(self.ctx, self.id, self.sink).await;
        Ok(())
    }

    fn check_number_is_free(&self) -> Step<()> {
        let id = self.id;
        let container = self.ctx.layout.etc().join("lxc").join(format!("{id}.conf"));
        if self.ctx.layout.vm_config_path(id).exists() {
            return Err(format!("VM {id} exists already; choose another number"));
        }
        if container.exists() {
            return Err(format!("there is a container {id} already; choose another number"));
        }
        Ok(())
    }

    async fn read_config(&self) -> Step<(VmConfig, Option<Vec<u8>>)> {
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
        Ok((VmConfig::from_bytes(config).map_err(words)?, firewall))
    }

    async fn with_source(
        &self,
        source: &mut dyn VmRestore,
        (archived, firewall): (VmConfig, Option<Vec<u8>>),
        report: &mut RestoreReport,
    ) -> Step<()> {
        let (disks, warnings) =
            plan::plan(&archived, source.devices(), &self.ctx.storages, self.options)?;
        let space = plan::check_space(&disks, self.options);
        self.cancellable(within_storage(self.ctx.limits.undo, space)).await?;
        self.warn(report, warnings);
        let mut made = self.begin().await?;
        let result = self.make(source, &disks, &archived, firewall, &mut made, report).await;
        // Nothing of the provider's is in there any more.
        let dir_removed = remove_dir(made.private_dir.clone()).await;
        match result {
            Ok(()) => {
                self.warn(report, dir_removed.err());
                let removed = made.new.journal.remove().await;
                self.warn(report, removed.err().map(words));
                Ok(())
            }
            Err(error) => {
                let problems = self.undo(made, dir_removed).await;
                self.warn(report, problems);
                Err(error)
            }
        }
    }

    /// The journal and the private directory.
    async fn begin(&self) -> Step<Made> {
        let storage = &self.options.source_storage;
        let begin = Begin::new(TaskKind::Restore, GuestKind::Qemu, self.id, storage)
            .map_err(|error| format!("cannot read /proc of this process: {error}"))?;
        // Short, because sockets are made in it.
        let private_dir = self.ctx.layout.run().join(format!("r-{}", short_id()));
        check_socket_path(&private_dir.join("socket-of-a-provider")).map_err(words)?;
        let journal = Journal::create(&self.ctx.layout, begin).await.map_err(words)?;
        let made = Made { new: NewVolumes::new(journal), private_dir, firewall: None };
        let entry = Entry::Directory { path: made.private_dir.clone() };
        let result = match made.new.journal.append(entry).await {
            Ok(()) => make_private_dir(&made.private_dir).map_err(words),
            Err(error) => Err(words(error)),
        };
        if let Err(error) = result {
            let problems = self.undo(made, Ok(())).await;
            problems.iter().for_each(|problem| self.sink.warn(problem));
            return Err(error);
        }
        Ok(made)
    }

    async fn make(
        &self,
        source: &mut dyn VmRestore,
        disks: &[PlannedDisk],
        archived: &VmConfig,
        firewall: Option<Vec<u8>>,
        made: &mut Made,
        report: &mut RestoreReport,
    ) -> Step<()> {
        let mut volumes = BTreeMap::new();
        for disk in disks {
            let PlannedDisk { storage, format, size_bytes, .. } = disk;
            let new = made.new.allocate(self.ctx, storage.as_ref(), self.id, *format, *size_bytes);
            let volume = self.cancellable(async { new.await.map_err(words) }).await?;
            self.fill(source, disk, &volume, &made.private_dir, report).await?;
            let (device, size_bytes) = (disk.key.clone(), disk.size_bytes);
            let volume = volume.to_string();
            volumes.insert(device.clone(), NewVolume { volume: volume.clone(), size_bytes });
            report.volumes.push(RestoredVolume { device, volume, size_bytes });
        }
        let (config, warnings) =
            config::rewrite(archived, &volumes, self.options.allow_raw_config).map_err(words)?;
        self.warn(report, warnings);
        if self.cancel.is_cancelled() {
            return Err("the restore was cancelled".to_owned());
        }
        self.switch(&config, firewall, made).await
    }

    /// Offer, copy, withdraw.
    async fn fill(
        &self,
        source: &mut dyn VmRestore,
        disk: &PlannedDisk,
        volume: &VolumeId,
        private_dir: &Path,
        report: &mut RestoreReport,
    ) -> Step<()> {
        self.sink.info(&format!(
            "restoring '{}' to '{volume}' ({})",
            disk.key,
            size(disk.size_bytes)
        ));
        let limit = self.ctx.limits.provider_call;
        let call = call_within(self.cancel, limit);
        let offered = self
            .cancellable(within(limit, "offer the disk", async {
                source.volume_init(&disk.key, private_dir, &call).await.map_err(words)
            }))
            .await;
        let result = match offered {
            Ok(offer) => self.cancellable(self.copy(&offer, disk, volume, private_dir)).await,
            Err(error) => Err(format!("the disk '{}': {error}", disk.key)),
        };
        // The pair of `volume_init`, also after it failed; not cancelled.
        let call = call_within(&CancellationToken::new(), self.ctx.limits.undo);
        let withdrawn = within(self.ctx.limits.undo, "withdraw the disk", async {
            source.volume_cleanup(&disk.key, &call).await.map_err(words)
        })
        .await;
        self.warn(report, withdrawn.err());
        result
    }

    async fn copy(
        &self,
        offer: &provider_api::VolumeSource,
        disk: &PlannedDisk,
        volume: &VolumeId,
        private_dir: &Path,
    ) -> Step<()> {
        let path = disk.storage.volume_path(volume).map_err(words)?;
        let data = disk.storage.data_path(volume).map_err(words)?;
        let options = disk.storage.image_options(volume).map_err(words)?;
        let opened = copy::open(offer, private_dir, disk.size_bytes).await?;
        let files: Vec<&Path> = [path.as_path()].into_iter().chain(data.as_deref()).collect();
        let target = copy::Target { options: &options, files: &files, size_bytes: disk.size_bytes };
        let mut meter = Meter::new(self.id, disk.size_bytes, self.sink);
        let stall = self.ctx.limits.transfer_stall;
        copy::copy(&self.ctx.tools, opened, target, stall, |done| meter.tell(done)).await
    }

    /// Makes the VM exist.
    async fn switch(
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
            write_beside(move || write_atomically(&path, &rules, true)).await?;
        }
        let (config, path) = (config.clone(), self.ctx.layout.vm_config_path(self.id));
        write_beside(move || config.write_new(&path)).await?;
        // From here on the VM exists; the journal only has to go.
        if let Err(error) = made.new.journal.append(Entry::Complete).await {
            tracing::warn!(%error, "the end of a restore was not journalled");
        }
        Ok(())
    }

    /// Removes what was made; returns what could not be removed.
    async fn undo(&self, mut made: Made, dir_removed: Step<()>) -> Vec<String> {
        let mut problems: Vec<String> = dir_removed.err().into_iter().collect();
        problems.extend(made.new.free(self.ctx).await);
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

    async fn end_source(&self, source: Box<dyn VmRestore>, report: &mut RestoreReport) {
        let limit = self.ctx.limits.undo;
        let call = call_within(&CancellationToken::new(), limit);
        let ended =
            within(limit, "end the restore", async { source.cleanup(&call).await.map_err(words) });
        let ended = ended.await;
        self.warn(report, ended.err());
    }

    async fn start(&self, report: &mut RestoreReport) {
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

    fn warn(&self, report: &mut RestoreReport, warnings: impl IntoIterator<Item = String>) {
        for warning in warnings {
            self.sink.warn(&warning);
            report.warnings.push(clean(&warning));
        }
    }

    async fn cancellable<T>(&self, step: impl Future<Output = Step<T>>) -> Step<T> {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err("the restore was cancelled".to_owned()),
            result = step => result,
        }
    }
}

async fn within<T>(limit: Duration, doing: &str, step: impl Future<Output = Step<T>>) -> Step<T> {
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

async fn remove_dir(dir: PathBuf) -> Step<()> {
    let shown = dir.display().to_string();
    match blocking::run(move || std::fs::remove_dir_all(dir)).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("cannot remove the directory '{shown}': {error}"))
        }
        _ => Ok(()),
    }
}

/// Writes a file that decides what there is: awaited to its end, so that nobody undoes what is
/// still being done.
async fn write_beside(
    write: impl FnOnce() -> Result<(), ConfigError> + Send + 'static,
) -> Step<()> {
    blocking::run(move || Ok(write())).await.map_err(words)?.map_err(words)
}

/// Progress of one disk.
struct Meter<'a> {
    sink: &'a dyn TaskSink,
    progress: Progress,
    started: Instant,
    /// Percent and time of the last line.
    line: Option<(u8, Instant)>,
}

impl<'a> Meter<'a> {
    fn new(guest_id: u32, total_bytes: u64, sink: &'a dyn TaskSink) -> Self {
        let progress = Progress { guest_id, total_bytes, ..Progress::default() };
        Self { sink, progress, started: Instant::now(), line: None }
    }

    fn tell(&mut self, done_bytes: u64) {
        let elapsed = self.started.elapsed();
        self.progress.done_bytes = done_bytes;
        self.progress.elapsed_ms = millis(elapsed);
        self.progress.read_bytes_per_s = rate(done_bytes, elapsed);
        self.progress.write_bytes_per_s = self.progress.read_bytes_per_s;
        self.sink.progress(&self.progress);
        let percent = self.progress.percent();
        let is_due = self.line.is_none_or(|(_, at)| at.elapsed() >= LINE_INTERVAL);
        let is_new = self.line.is_none_or(|(shown, _)| shown != percent);
        if is_new && (is_due || percent == 100) && percent > 0 {
            self.sink.info(&self.progress.line());
            self.line = Some((percent, Instant::now()));
        }
    }
}
