// SPDX-License-Identifier: MIT OR Apache-2.0
//! One guest of a job, from its locks to its report.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use provider_api::{CancellationToken, GuestKind, Job, Provider};

use super::aftermath::{self, Aftermath};
use super::hooks::{GuestHooks, Hooks, Phase};
use super::report::GuestResult;
use super::run::Run;
use super::{
    BackupOptions, GuestReport, JobContext, backup_lock_path, chain, guest_words, report,
    target_lock_path, unless_cancelled,
};
use crate::guest::GuestDriver;
use crate::journal::recover::{self, Leftover};
use crate::lock::{FileLock, LockError};
use crate::task_log::{FileLog, GuestLines, TaskSink, Tee, duration};
use crate::vm::backup::{Mechanism, VmDriver};
use crate::vm::leftovers;

/// The provider's job; its guests are begun one after the other.
pub(super) type SharedJob = tokio::sync::Mutex<Box<dyn Job>>;

/// What the guests of one job share.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a> {
    pub(super) ctx: &'a JobContext,
    pub(super) provider: &'a dyn Provider,
    pub(super) hooks: Hooks<'a>,
    pub(super) options: &'a BackupOptions,
    pub(super) sink: &'a dyn TaskSink,
    pub(super) cancel: &'a CancellationToken,
}

impl<'a> Shared<'a> {
    /// Backs up one guest; the result is in the report.
    pub(super) async fn run_guest(&self, job: &SharedJob, id: u32) -> GuestReport {
        let mut report = GuestReport::new(self.ctx.layout.guest_kind(id), id);
        if self.cancel.is_cancelled() {
            // Not begun: there is nothing to tell about it but this.
            report.error = Some("the job was cancelled".to_owned());
            return report;
        }
        if self.options.jobs > 1 {
            self.run_with(job, &GuestLines::new(self.sink, id), &mut report).await;
        } else {
            self.run_with(job, self.sink, &mut report).await;
        }
        report
    }

    async fn run_with(&self, job: &SharedJob, sink: &dyn TaskSink, report: &mut GuestReport) {
        let (kind, id) = (report.kind, report.id);
        let start = jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S");
        let guest = guest_words(kind, id);
        let begin =
            [format!("Starting Backup of {guest} ({kind})"), format!("Backup started at {start}")];
        begin.iter().for_each(|line| sink.info(line));
        let started = Instant::now();
        let mut hooks = self.hooks.guest(kind, id, self.options.mode.name());
        let locks = match unless_cancelled(self.cancel, self.lock_guest(kind, id, sink)).await {
            Ok(locks) => locks,
            Err(error) => {
                report.error = Some(error);
                end_guest(&hooks, sink, started, report).await;
                return;
            }
        };
        // Only now: the file may be that of the guest's running backup.
        let log_path = self.ctx.layout.log_dir().join(format!("{kind}-{id}.log"));
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
        if let Err(error) = self.run_locked(job, &mut hooks, sink, report).await {
            report.error = Some(error);
        }
        let Self { ctx, provider, options, cancel, .. } = *self;
        let aftermath = Aftermath { ctx, provider, options, sink, cancel };
        let run = AssertUnwindSafe(Box::pin(aftermath.run(report)));
        if run.catch_unwind().await.is_err() {
            let text = "internal error after the commit: the archive is complete and stays";
            warn_of(Err(text.to_owned()), sink, report);
        }
        self.tell_end(&hooks, sink, report).await;
        end_guest(&hooks, sink, started, report).await;
        drop(locks);
    }

    async fn run_locked(
        &self,
        job: &SharedJob,
        hooks: &mut GuestHooks<'a>,
        sink: &dyn TaskSink,
        report: &mut GuestReport,
    ) -> Result<(), String> {
        let (kind, id) = (report.kind, report.id);
        let begin = async {
            let driver = self.ready(kind, id, sink).await?;
            let Self { ctx, provider, options, cancel, .. } = *self;
            aftermath::check_protected(ctx, provider, options, report, cancel).await?;
            Ok(driver)
        };
        let mut driver = unless_cancelled(self.cancel, begin).await?;
        hooks.set_name(driver.name());
        hooks.call(Phase::BackupStart, Vec::new(), sink).await?;
        let run = Box::pin(Run::new(self, job, hooks, driver.as_mut(), sink, report).finish());
        // A provider is the work of others, and its faults are not those of the other guests.
        let Err(panic) = AssertUnwindSafe(run).catch_unwind().await else {
            return Ok(());
        };
        // Whether it had committed is what the recovery finds out.
        report.result = GuestResult::Unknown;
        let what = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no reason is known");
        sink.warn(&format!("internal error: {what}; cleaning up"));
        // All that it held; the guest may be down, and must not be so until its next backup.
        drop(driver);
        let cleaned = AssertUnwindSafe(self.clean_up(kind, id, sink)).catch_unwind().await;
        let cleaned = cleaned.unwrap_or_else(|_| Err("internal error again".to_owned()));
        Err(match cleaned {
            Ok(()) => format!("internal error: {what}; what it had begun is undone"),
            Err(why) => format!(
                "internal error: {what}; the next backup of {} cleans up ({why})",
                guest_words(kind, id)
            ),
        })
    }

    /// Cleans up after earlier tasks of a guest that is locked.
    async fn clean_up(&self, kind: GuestKind, id: u32, sink: &dyn TaskSink) -> Result<(), String> {
        let left = Box::pin(recover::recover_guest(self.ctx, kind, id, sink)).await;
        match left.map_err(|error| chain(&error))?.into_iter().next() {
            Some(Leftover { reason, .. }) => Err(reason),
            None => Ok(()),
        }
    }

    /// Tells the hook script that the archive is there. That it then fails is an error, but one that
    /// does not take the archive away.
    async fn tell_end(
        &self,
        hooks: &GuestHooks<'_>,
        sink: &dyn TaskSink,
        report: &mut GuestReport,
    ) {
        if !report.is_success() {
            return;
        }
        let archive = report.archive.as_deref().unwrap_or_default();
        let target = format!("{}:backup/{archive}", self.options.storage);
        if let Err(error) =
            hooks.call(Phase::BackupEnd, vec![("TARGET", target.into())], sink).await
        {
            report.error = Some(format!("{error}; the archive is complete and stays"));
        }
    }

    /// Cleans up after earlier tasks of a guest that is locked, and opens its driver.
    async fn ready(
        &self,
        kind: GuestKind,
        id: u32,
        sink: &dyn TaskSink,
    ) -> Result<Box<dyn GuestDriver>, String> {
        self.clean_up(kind, id, sink)
            .await
            .map_err(|why| format!("an earlier task of this guest is not cleaned up: {why}"))?;
        let capabilities = self.provider.describe().capabilities;
        match kind {
            GuestKind::Qemu => {
                leftovers::remove_of_guest(self.ctx, id, sink).await;
                let mechanism = Mechanism::of(&capabilities).ok_or_else(|| {
                    format!(
                        "the provider of the storage '{}' backs up no VMs",
                        self.options.storage
                    )
                })?;
                VmDriver::open(self.ctx, id, self.options, mechanism)
                    .map(|driver| Box::new(driver) as _)
                    .map_err(|error| chain(&error))
            }
            GuestKind::Lxc if !capabilities.container => Err(format!(
                "the provider of the storage '{}' backs up no containers",
                self.options.storage
            )),
            GuestKind::Lxc => {
                self.ctx.containers.open(self.ctx, id, self.options).map_err(|error| chain(&error))
            }
        }
    }

    async fn lock_guest(
        &self,
        kind: GuestKind,
        id: u32,
        sink: &dyn TaskSink,
    ) -> Result<[FileLock; 2], String> {
        if self.ctx.layout.guest_configs(id).len() > 1 {
            // One of the two would be left out in silence.
            return Err(format!(
                "there are a VM and a container with the number {id}; give one of them another number"
            ));
        }
        let wait = self.options.lock_wait;
        let deadline = Instant::now() + wait;
        let target = target_lock_path(&self.ctx.layout, kind, id, &self.options.storage);
        let guest = backup_lock_path(&self.ctx.layout, kind, id);
        let mut held = Vec::new();
        for path in [&target, &guest] {
            let what = guest_words(kind, id);
            let lock = match FileLock::try_acquire(path, &what) {
                Err(busy @ LockError::Busy { .. }) if Instant::now() < deadline => {
                    sink.info(&format!("{busy} Waiting for up to {}.", duration(wait)));
                    let left = deadline.saturating_duration_since(Instant::now());
                    FileLock::acquire(path, &what, left).await
                }
                other => other,
            };
            held.push(lock.map_err(|error| busy_words(&error, wait))?);
        }
        Ok(held.try_into().expect("two paths give two locks"))
    }
}

/// The last lines of the log and the last calls of the hook script.
async fn end_guest(
    hooks: &GuestHooks<'_>,
    sink: &dyn TaskSink,
    started: Instant,
    report: &mut GuestReport,
) {
    report.duration_ms = report::millis(started.elapsed());
    report.log_end(sink);
    if !report.is_success() {
        warn_of(hooks.call(Phase::BackupAbort, Vec::new(), sink).await, sink, report);
    }
    let log = report.log_path.iter().map(|path| ("LOGFILE", path.into())).collect();
    warn_of(hooks.call(Phase::LogEnd, log, sink).await, sink, report);
}

/// A script that fails when all else is over changes nothing.
fn warn_of(result: Result<(), String>, sink: &dyn TaskSink, report: &mut GuestReport) {
    if let Err(error) = result {
        sink.warn(&error);
        report.warnings.push(error);
    }
}

fn busy_words(error: &LockError, wait: Duration) -> String {
    let words = chain(error);
    if matches!(error, LockError::Busy { .. }) && !wait.is_zero() {
        return format!("{words} It was waited for {}.", duration(wait));
    }
    words
}
