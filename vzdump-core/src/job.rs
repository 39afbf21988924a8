// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backup jobs: some guests, one after the other or several at a time, to one provider.
//!
//! [`run_backup`] does what concerns the job: the provider's job, and one report per guest.
//! `one_guest` does what surrounds the backup of one guest: its locks, its log, the recovery of what
//! an earlier task left behind. `run` drives the backup itself in the order that `state` keeps. One
//! guest's failure does not stop the others.

mod aftermath;
pub(crate) mod commit;
pub mod describe;
pub mod hooks;
#[cfg(debug_assertions)]
pub mod kill_point;
mod one_guest;
pub(crate) mod progress;
pub mod report;
mod run;
pub mod state;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt as _};
use provider_api::{
    BoxFuture, Call, CancellationToken, Excludes, GuestKind, Job, JobInfo, Provider,
};

use self::hooks::{Hooks, Phase};
use self::one_guest::{Shared, SharedJob};
use crate::bandwidth::Budget;
use crate::guest::{BackupMode, Containers};
use crate::host_budget::HostRam;
use crate::layout::Layout;
use crate::retention::Retention;
use crate::storage::StorageSet;
use crate::task_log::{TaskSink, clean};
use crate::tools::Tools;
use crate::vm::backup::FleecingOptions;
use crate::vm::freeze_guard::{FreezeLimits, GuardCommand};

pub use report::{GuestReport, JobReport};

/// A busy guest fails its backup, but a lock can outlive its holder for a moment: a program that is
/// being started by another thread has a copy of it until it is executed.
const LOCK_WAIT: Duration = Duration::from_secs(1);

/// The most guests that a job works on at the same time.
pub const JOBS_MAX: usize = 64;
/// How long a guest may take to shut down unless the request says otherwise.
pub const STOP_WAIT: Duration = Duration::from_secs(600);

/// Where the provider of a storage is found.
pub trait Providers: Send + Sync {
    /// The provider of this storage, or a sentence that says why there is none.
    fn provider<'a>(&'a self, storage: &'a str)
    -> BoxFuture<'a, Result<Arc<dyn Provider>, String>>;
}

/// Bounds of all waits of a task, beside those of QMP commands.
#[derive(Debug, Clone)]
pub struct Limits {
    /// For making a provider's storage ready: mounting a network file system, starting a service.
    pub activate: Duration,
    /// For one call of the provider that has nothing to copy.
    pub provider_call: Duration,
    /// For allocating and attaching all fleecing images.
    pub acquire: Duration,
    /// For freeze, point in time and thaw.
    pub point_in_time: Duration,
    /// Between two signs of life of a provider that copies.
    pub transfer_stall: Duration,
    /// For the provider's commit.
    pub commit: Duration,
    /// The same of a provider that says it commits slowly, and how long it is asked for the outcome of such a
    /// commit as long as that is pending.
    pub slow_commit: Duration,
    /// What a commit gets to end after the job was cancelled.
    pub commit_grace: Duration,
    /// How often a commit's outcome is asked for.
    pub outcome_attempts: u32,
    /// Before the second question; doubled each time, up to a minute.
    pub outcome_delay: Duration,
    /// For offering a disk or the files of an archive, which may have to be put together first.
    pub offer: Duration,
    /// For one step of undoing.
    pub undo: Duration,
    /// For the removal of one archive, which may have to be copied into another one.
    pub removal: Duration,
    /// For one call of the hook script.
    pub hook: Duration,
    /// What a call of the hook script that belongs to ending in order gets after the job was
    /// cancelled; others are ended at once.
    pub hook_grace: Duration,
    /// For the freeze of a guest's file systems.
    pub freeze: FreezeLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            activate: Duration::from_secs(600),
            provider_call: Duration::from_secs(120),
            acquire: Duration::from_secs(900),
            point_in_time: Duration::from_secs(300),
            transfer_stall: Duration::from_secs(1800),
            commit: Duration::from_secs(4 * 3600),
            slow_commit: Duration::from_secs(24 * 3600),
            commit_grace: Duration::from_secs(60),
            outcome_attempts: 6,
            outcome_delay: Duration::from_secs(2),
            offer: Duration::from_secs(12 * 3600),
            undo: Duration::from_secs(180),
            removal: Duration::from_secs(12 * 3600),
            hook: Duration::from_secs(4 * 3600),
            hook_grace: Duration::from_secs(60),
            freeze: FreezeLimits::default(),
        }
    }
}

/// What all tasks of a host share.
#[derive(Clone)]
pub struct JobContext {
    /// Where everything is.
    pub layout: Layout,
    /// QEMU's programs.
    pub tools: Tools,
    /// The storages of images.
    pub storages: StorageSet,
    /// The providers, for the recovery of tasks of any storage.
    pub providers: Arc<dyn Providers>,
    /// The containers of the host.
    pub containers: Arc<dyn Containers>,
    /// How the freeze guard is started.
    pub guard: GuardCommand,
    /// Bounds of all waits.
    pub limits: Limits,
}

/// What a backup is asked to do.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// The provider's storage.
    pub storage: String,
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
    /// Template of the archive's notes, see [`crate::notes_template`].
    pub notes: Option<String>,
    /// Whether the archive is protected from removal.
    pub protected: bool,
    /// How many protected archives of one guest the storage may hold; by default any number.
    pub max_protected: Option<u32>,
    /// Which archives of the guest stay after its backup; by default all.
    pub prune: Option<Retention>,
    /// How many guests are worked on at the same time, 1 to [`JOBS_MAX`].
    pub jobs: usize,
    /// What all disks together may read; by default as much as they can.
    pub bandwidth: Option<Budget>,
    /// RAM for old data of all disks of all guests that are worked on at the same time, in bytes;
    /// by default only that of each disk is bounded.
    pub buffer_total_bytes: Option<u64>,
    /// What all backups of the host may have of RAM together; by default any.
    pub host_ram: Option<HostRam>,
    /// The hook script.
    pub script: Option<PathBuf>,
    /// Where files of containers are copied to that cannot be snapshotted; by default
    /// [`Layout::temp_dir`].
    pub temp_dir: Option<PathBuf>,
    /// Patterns of what is left out of containers, as `--exclude-path` of vzdump.
    pub exclude: Excludes,
    /// Whether files of containers that cannot be read are left out.
    pub skip_unreadable: bool,
    /// What happens to a running guest for the point in time.
    pub mode: BackupMode,
    /// How long a guest may take to shut down in the mode stop.
    pub stop_wait: Duration,
}

impl BackupOptions {
    /// The defaults for a storage.
    pub fn new(storage: impl Into<String>) -> Self {
        Self {
            storage: storage.into(),
            fleecing: FleecingOptions::default(),
            freeze: true,
            buffer_size_bytes: None,
            granularity_bytes: None,
            lock_wait: LOCK_WAIT,
            notes: None,
            protected: false,
            max_protected: None,
            prune: None,
            jobs: 1,
            bandwidth: None,
            buffer_total_bytes: None,
            host_ram: None,
            script: None,
            temp_dir: None,
            exclude: Excludes::default(),
            skip_unreadable: false,
            mode: BackupMode::default(),
            stop_wait: STOP_WAIT,
        }
    }
}

/// An error and its causes in one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        // Transparent errors repeat themselves.
        if !text.ends_with(&cause) {
            text = format!("{}: {cause}", text.trim_end_matches('.'));
        }
        source = error.source();
    }
    clean(&text)
}

/// Backs up guests, [`BackupOptions::jobs`] of them at a time.
///
/// Never fails as a whole: what went wrong is in the report, for the job or for each guest, in the
/// order of the request. Ends in bounded time after `cancel`, and must be awaited to its end:
/// dropping the future leaves what it had acquired to the recovery.
pub async fn run_backup(
    ctx: &JobContext,
    guests: &[u32],
    provider: &dyn Provider,
    options: &BackupOptions,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> JobReport {
    let started = Instant::now();
    sink.info(&format!("starting new backup job: {}", command_line(guests, options)));
    let mut report = JobReport::new(&options.storage);
    let hooks = Hooks::new(ctx, options.script.as_deref(), &options.storage, cancel);
    let shared = Shared { ctx, provider, hooks, options, sink, cancel };
    match init_job(&shared).await {
        Ok(()) => {
            (report.guests, report.error) = run_job(&shared, guests).await;
            end_job(&shared, &mut report).await;
        }
        Err(error) => report.error = Some(error),
    }
    if let Some(error) = &report.error {
        sink.error(&format!("Backup job failed - {error}"));
    } else if report.is_success() {
        sink.info("Backup job finished successfully");
    } else {
        sink.error("Backup job finished with errors");
    }
    report.duration_ms = report::millis(started.elapsed());
    report
}

fn command_line(guests: &[u32], options: &BackupOptions) -> String {
    let mut words = vec!["vzdump".to_owned()];
    words.extend(guests.iter().map(u32::to_string));
    words.extend(["--storage".to_owned(), options.storage.clone()]);
    if options.jobs > 1 {
        words.push(format!("--jobs {}", options.jobs));
    }
    if let Some(budget) = &options.bandwidth {
        words.push(format!("--bwlimit {}", budget.rate_bytes_per_s() >> 10));
    }
    words.join(" ")
}

/// What must hold before anything is begun.
async fn init_job(shared: &Shared<'_>) -> Result<(), String> {
    if let Some(script) = &shared.options.script {
        hooks::check_script(script)?;
    }
    aftermath::check_options(shared.options, shared.provider)?;
    shared.hooks.job(Phase::JobInit, shared.sink).await
}

/// The provider's job from its begin to its end: the guests' reports, and what went wrong with the
/// job itself.
async fn run_job(shared: &Shared<'_>, guests: &[u32]) -> (Vec<GuestReport>, Option<String>) {
    let job = match start_job(shared.ctx, shared.provider, shared.cancel).await {
        Ok(job) => tokio::sync::Mutex::new(job),
        Err(error) => return (Vec::new(), Some(error)),
    };
    let (reports, error) = match shared.hooks.job(Phase::JobStart, shared.sink).await {
        Ok(()) => (run_guests(shared, &job, guests).await, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    finish_job(shared.ctx, job.into_inner(), shared.sink).await;
    (reports, error)
}

/// Tells the hook script how the job ended. One with guests that failed has come to its end too, and
/// so has one that was cancelled when nothing was left to be given up.
async fn end_job(shared: &Shared<'_>, report: &mut JobReport) {
    let is_interrupted =
        shared.cancel.is_cancelled() && !report.guests.iter().all(GuestReport::is_success);
    if report.error.is_none() && !is_interrupted {
        report.error = shared.hooks.job(Phase::JobEnd, shared.sink).await.err();
        if report.error.is_none() {
            return;
        }
    }
    if let Err(error) = shared.hooks.job(Phase::JobAbort, shared.sink).await {
        shared.sink.warn(&error);
    }
}

/// Works on all guests, some at a time; the reports are in the order of the guests.
async fn run_guests(shared: &Shared<'_>, job: &SharedJob, guests: &[u32]) -> Vec<GuestReport> {
    let runs: Vec<BoxFuture<'_, (usize, GuestReport)>> = guests
        .iter()
        .enumerate()
        .map(|(index, &id)| -> BoxFuture<'_, _> {
            Box::pin(async move { (index, shared.run_guest(job, id).await) })
        })
        .collect();
    let at_once = shared.options.jobs.clamp(1, JOBS_MAX);
    let mut reports: Vec<_> = stream::iter(runs).buffer_unordered(at_once).collect().await;
    reports.sort_by_key(|(index, _)| *index);
    reports.into_iter().map(|(_, report)| report).collect()
}

/// Bounds a call of a provider that does not obey its deadline; its error in words.
async fn in_time<T>(
    limits: &Limits,
    work: impl Future<Output = provider_api::Result<T>>,
) -> Result<T, String> {
    match tokio::time::timeout(limits.provider_call, work).await {
        Ok(result) => result.map_err(|error| chain(&error)),
        Err(_) => Err("the provider did not answer in time".to_owned()),
    }
}

async fn start_job(
    ctx: &JobContext,
    provider: &dyn Provider,
    cancel: &CancellationToken,
) -> Result<Box<dyn Job>, String> {
    let description = provider.describe();
    if let Err(why) = provider_api::check_api_version(description.api_version) {
        return Err(format!("{}: {why}", clean(&description.name)));
    }
    let start = async {
        activate(provider, &ctx.limits, cancel).await?;
        let limit = ctx.limits.provider_call;
        let call = call_within(cancel, limit);
        let start = provider.start_job(JobInfo { start_time_s: now_s() }, &call);
        match tokio::time::timeout(limit, start).await {
            Ok(started) => started.map_err(|error| chain(&error)),
            Err(_) => Err("the provider did not begin the job in time".to_owned()),
        }
    };
    unless_cancelled(cancel, start).await
}

/// Makes a provider ready, within the time that this may take.
pub(crate) async fn activate(
    provider: &dyn Provider,
    limits: &Limits,
    cancel: &CancellationToken,
) -> Result<(), String> {
    let call = call_within(cancel, limits.activate);
    match tokio::time::timeout(limits.activate, provider.activate(&call)).await {
        Ok(activated) => activated.map_err(|error| chain(&error)),
        Err(_) => Err(format!(
            "the provider did not become ready within {} seconds",
            limits.activate.as_secs()
        )),
    }
}

async fn finish_job(ctx: &JobContext, job: Box<dyn Job>, sink: &dyn TaskSink) {
    // Not cancelled: it is the pair of `start_job`.
    let call = call_within(&CancellationToken::new(), ctx.limits.provider_call);
    match tokio::time::timeout(ctx.limits.provider_call, job.finish(&call)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => sink.warn(&format!("end of the job: {}", chain(&error))),
        Err(_) => sink.warn("end of the job: the provider did not answer in time"),
    }
}

/// The limits of one call of the provider.
pub(crate) fn call_within(cancel: &CancellationToken, limit: Duration) -> Call {
    Call { cancel: cancel.child_token(), deadline: Instant::now().checked_add(limit) }
}

pub(crate) fn now_s() -> i64 {
    jiff::Timestamp::now().as_second()
}

async fn unless_cancelled<T>(
    cancel: &CancellationToken,
    step: impl Future<Output = Result<T, String>>,
) -> Result<T, String> {
    let step = cancel.run_until_cancelled(step);
    step.await.unwrap_or_else(|| Err("the job was cancelled".to_owned()))
}

/// The path of the lock that backups of one guest share.
pub fn backup_lock_path(layout: &Layout, kind: GuestKind, id: u32) -> PathBuf {
    layout.lock_dir().join(format!("backup-{kind}-{id}.lock"))
}

/// The path of the lock that all work on one guest's archives in one storage shares: its backups, and
/// the removal of its archives.
pub fn target_lock_path(layout: &Layout, kind: GuestKind, id: u32, storage: &str) -> PathBuf {
    layout.lock_dir().join(format!("backup-{kind}-{id}-{storage}.lock"))
}

/// A guest in log lines.
pub(crate) fn guest_words(kind: GuestKind, id: u32) -> String {
    match kind {
        GuestKind::Qemu => format!("VM {id}"),
        GuestKind::Lxc => format!("CT {id}"),
    }
}
