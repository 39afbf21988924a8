// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backup jobs: some guests, one after the other, to one provider.
//!
//! [`run_backup`] does what concerns the job: the provider's job, the locks, the recovery of what an
//! earlier task left behind, and one report per guest. `run` drives the backup of one guest in
//! the order that `state` keeps. One guest's failure does not stop the others.

pub(crate) mod commit;
#[cfg(debug_assertions)]
mod kill_point;
mod progress;
pub mod report;
mod run;
pub mod state;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use provider_api::{BoxFuture, Call, CancellationToken, GuestKind, Job, JobInfo, Provider};

use crate::guest::GuestDriver;
use crate::journal::recover::{self, Leftover};
use crate::layout::Layout;
use crate::lock::FileLock;
use crate::storage::StorageSet;
use crate::task_log::{FileLog, TaskSink, Tee, clean};
use crate::tools::Tools;
use crate::vm::backup::{FleecingOptions, VmDriver};
use crate::vm::freeze_guard::GuardCommand;
use crate::vm::leftovers;

pub use report::{GuestReport, JobReport};

/// A busy guest fails its backup, but a lock can outlive its holder for a moment: a program that is
/// being started by another thread has a copy of it until it is executed.
const LOCK_WAIT: Duration = Duration::from_secs(1);

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
    /// What a commit gets to end after the job was cancelled.
    pub commit_grace: Duration,
    /// How often a commit's outcome is asked for.
    pub outcome_attempts: u32,
    /// Before the second question; doubled each time, up to a minute.
    pub outcome_delay: Duration,
    /// For one step of undoing.
    pub undo: Duration,
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
            commit_grace: Duration::from_secs(60),
            outcome_attempts: 6,
            outcome_delay: Duration::from_secs(2),
            undo: Duration::from_secs(180),
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

/// Backs up guests, one after the other.
///
/// Never fails as a whole: what went wrong is in the report, for the job or for each guest. Ends
/// in bounded time after `cancel`, and must be awaited to its end: dropping the future leaves what
/// it had acquired to the recovery.
pub async fn run_backup(
    ctx: &JobContext,
    guests: &[u32],
    provider: &dyn Provider,
    options: &BackupOptions,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> JobReport {
    let started = Instant::now();
    let ids: Vec<String> = guests.iter().map(u32::to_string).collect();
    sink.info(&format!(
        "starting new backup job: vzdump {} --storage {}",
        ids.join(" "),
        options.storage
    ));
    let mut report = JobReport::new(&options.storage);
    match start_job(ctx, provider, cancel).await {
        Ok(mut job) => {
            for &id in guests {
                let guest = run_guest(ctx, id, provider, job.as_mut(), options, sink, cancel).await;
                report.guests.push(guest);
            }
            finish_job(ctx, job, sink).await;
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

async fn start_job(
    ctx: &JobContext,
    provider: &dyn Provider,
    cancel: &CancellationToken,
) -> Result<Box<dyn Job>, String> {
    let description = provider.describe();
    let oldest = provider_api::API_VERSION - provider_api::API_AGE;
    if !(oldest..=provider_api::API_VERSION).contains(&description.api_version) {
        return Err(format!(
            "the provider '{}' has API version {}, this host speaks {oldest} to {}",
            clean(&description.name),
            description.api_version,
            provider_api::API_VERSION
        ));
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

/// One guest with its log file, from the lock to the report.
async fn run_guest(
    ctx: &JobContext,
    id: u32,
    provider: &dyn Provider,
    job: &mut dyn Job,
    options: &BackupOptions,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> GuestReport {
    let started = Instant::now();
    let mut report = GuestReport::new(GuestKind::Qemu, id);
    let start = jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S");
    let begin =
        [format!("Starting Backup of VM {id} (qemu)"), format!("Backup started at {start}")];
    begin.iter().for_each(|line| sink.info(line));
    let locks = match unless_cancelled(cancel, lock_guest(ctx, id, options)).await {
        Ok(locks) => locks,
        Err(error) => {
            report.error = Some(error);
            report.duration_ms = report::millis(started.elapsed());
            report.log_end(sink);
            return report;
        }
    };
    // Only now: the file may be that of the guest's running backup.
    let log_path = ctx.layout.log_dir().join(format!("{}-{id}.log", GuestKind::Qemu));
    let file = FileLog::create(&log_path);
    let tee;
    let sink: &dyn TaskSink = match &file {
        Ok(file) => {
            begin.iter().for_each(|line| file.info(line));
            report.log_path = Some(log_path);
            tee = Tee(sink, file);
            &tee
        }
        Err(error) => {
            sink.warn(&format!("no log file '{}': {error}", log_path.display()));
            sink
        }
    };
    match unless_cancelled(cancel, ready(ctx, id, options, sink)).await {
        Ok(mut driver) => {
            let run =
                run::Run::new(ctx, provider, job, &mut driver, options, sink, cancel, &mut report);
            Box::pin(run.finish()).await;
        }
        Err(error) => report.error = Some(error),
    }
    report.duration_ms = report::millis(started.elapsed());
    report.log_end(sink);
    drop(locks);
    report
}

async fn unless_cancelled<T>(
    cancel: &CancellationToken,
    step: impl Future<Output = Result<T, String>>,
) -> Result<T, String> {
    let step = cancel.run_until_cancelled(step);
    step.await.unwrap_or_else(|| Err("the job was cancelled".to_owned()))
}

/// Cleans up after earlier tasks of a guest that is locked, and opens its driver.
async fn ready(
    ctx: &JobContext,
    id: u32,
    options: &BackupOptions,
    sink: &dyn TaskSink,
) -> Result<VmDriver, String> {
    let left = recover::recover_guest(ctx, GuestKind::Qemu, id, sink)
        .await
        .map_err(|error| chain(&error))?;
    if let Some(Leftover { reason, .. }) = left.first() {
        return Err(format!("an earlier task of this guest is not cleaned up: {reason}"));
    }
    leftovers::remove_of_guest(ctx, id, sink).await;
    VmDriver::open(ctx, id, options).map_err(|error| chain(&error))
}

/// The path of the lock that backups of one guest share.
pub fn backup_lock_path(layout: &Layout, kind: GuestKind, id: u32) -> PathBuf {
    layout.lock_dir().join(format!("backup-{kind}-{id}.lock"))
}

async fn lock_guest(
    ctx: &JobContext,
    id: u32,
    options: &BackupOptions,
) -> Result<[FileLock; 2], String> {
    let deadline = Instant::now() + options.lock_wait;
    let what = format!("VM {id}");
    let name = format!("backup-qemu-{id}-{}.lock", options.storage);
    let target = ctx.layout.lock_dir().join(name);
    let guest = backup_lock_path(&ctx.layout, GuestKind::Qemu, id);
    let mut held = Vec::new();
    for path in [&target, &guest] {
        let left = deadline.saturating_duration_since(Instant::now());
        let lock = FileLock::acquire(path, &what, left).await.map_err(|error| chain(&error))?;
        held.push(lock);
    }
    Ok(held.try_into().expect("two paths give two locks"))
}

/// Whether a driver's guest is a VM; for words in log lines.
pub(crate) fn guest_words(driver: &dyn GuestDriver) -> String {
    match driver.kind() {
        GuestKind::Qemu => format!("VM {}", driver.id()),
        GuestKind::Lxc => format!("CT {}", driver.id()),
    }
}
