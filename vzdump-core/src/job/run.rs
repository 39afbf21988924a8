// SPDX-License-Identifier: MIT OR Apache-2.0
//! Drives one guest's backup: carries out what [`super::state`] hands out, bounds its time, and keeps
//! the first error.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use provider_api::{
    BitmapRequest, CancellationToken, ContainerTransferred, GuestBackup, GuestInfo, GuestKind,
    IGNORED_MAX, IgnoredEntry, Provider, Transferred, Uuid, VolumeInfo, check_archive_name,
};

use super::describe::Description;
use super::hooks::GuestHooks;
#[cfg(debug_assertions)]
use super::kill_point;
use super::one_guest::{Shared, SharedJob};
use super::progress::Meter;
use super::report::{GuestReport, millis};
use super::state::{Action, Event, Machine, Outcome};
use super::{BackupOptions, JobContext, Limits, call_within, chain, guest_words};
use crate::guest::{GuestDriver, GuestError, GuestSource, Task, VolumeReport};
use crate::journal::{Begin, Entry, Journal, TaskKind};
use crate::task_log::{TaskSink, clean, size, transferred};

/// How long the reason of a broken snapshot is waited for after the provider failed.
const REASON_WAIT: Duration = Duration::from_millis(500);
/// QEMU's word for a bitmap that says what changed.
const BITMAP_USED: &str = "used";
/// Longest generation a provider may ask for.
const GENERATION_BYTES_MAX: usize = 255;

/// One guest's backup under way.
pub(super) struct Run<'a> {
    pub(super) ctx: &'a JobContext,
    pub(super) provider: &'a dyn Provider,
    job: &'a SharedJob,
    hooks: &'a GuestHooks<'a>,
    driver: &'a mut dyn GuestDriver,
    options: &'a BackupOptions,
    pub(super) sink: &'a dyn TaskSink,
    pub(super) cancel: &'a CancellationToken,
    pub(super) report: &'a mut GuestReport,
    journal: Option<Journal>,
    pub(super) backup: Option<Box<dyn GuestBackup>>,
    volumes: Vec<VolumeInfo>,
    requests: Vec<BitmapRequest>,
    /// The host's id of the commit.
    pub(super) commit_id: Uuid,
    /// What became of it, once known.
    pub(super) outcome: Option<Outcome>,
}

/// An error of a step, in words.
pub(super) type StepResult<T = Event> = Result<T, String>;

/// What a step of the driver may use, apart from the driver itself.
fn task<'a>(
    journal: Option<&'a Journal>,
    sink: &'a dyn TaskSink,
    hooks: &'a GuestHooks<'a>,
) -> StepResult<Task<'a>> {
    let journal = journal.ok_or("the journal is not open")?;
    Ok(Task { journal, sink, hooks })
}

fn words(error: impl std::error::Error + 'static) -> String {
    chain(&error)
}

impl<'a> Run<'a> {
    pub(super) fn new(
        shared: &Shared<'a>,
        job: &'a SharedJob,
        hooks: &'a GuestHooks<'a>,
        driver: &'a mut dyn GuestDriver,
        sink: &'a dyn TaskSink,
        report: &'a mut GuestReport,
    ) -> Self {
        Self {
            ctx: shared.ctx,
            provider: shared.provider,
            job,
            hooks,
            driver,
            options: shared.options,
            sink,
            cancel: shared.cancel,
            report,
            journal: None,
            backup: None,
            volumes: Vec::new(),
            requests: Vec::new(),
            commit_id: Uuid::new_v4(),
            outcome: None,
        }
    }

    /// Runs the backup to its end; the result is in the report.
    pub(super) async fn finish(mut self) {
        self.report.name = self.driver.name();
        let mut machine = Machine::new(self.provider.describe().capabilities.slow_commit);
        loop {
            let action = machine.current();
            if let Action::Finish(verdict) = action {
                self.report.result = verdict.into();
                break;
            }
            #[cfg(debug_assertions)]
            kill_point::reached(action);
            let event = match self.bounded(action, machine.is_cancellable()).await {
                Ok(event) => event,
                Err(error) => {
                    self.note(action, error);
                    Event::Failed
                }
            };
            machine.on(event);
        }
        self.report.volumes = self.driver.volumes();
        self.report.access = self.driver.stats();
        self.log_costs();
    }

    /// Carries out an action within its time, unless the job is cancelled.
    async fn bounded(&mut self, action: Action, is_cancellable: bool) -> StepResult {
        let limit = limit_of(action, self.driver.kind(), &self.ctx.limits);
        let cancel = self.cancel.clone();
        let step = within(limit, action, self.act(action));
        if !is_cancellable {
            return step.await;
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err("the job was cancelled".to_owned()),
            result = step => result,
        }
    }

    /// Keeps the first error; everything after it is a warning.
    fn note(&mut self, action: Action, error: String) {
        let is_undo = matches!(
            action,
            Action::DropData
                | Action::CloseSource
                | Action::Teardown { .. }
                | Action::Release
                | Action::LeaveMode
                | Action::Cleanup
                | Action::Abort
                | Action::Describe
                | Action::CloseJournal { .. }
                | Action::RecordOutcome
        );
        if !is_undo && self.report.error.is_none() {
            // Only a guest that does not go on.
            let is_there = self.outcome == Some(Outcome::Committed);
            let fate = if is_there { "; the archive is complete and stays" } else { "" };
            self.report.error = Some(format!("{error}{fate}"));
            return;
        }
        tracing::warn!(?action, error, "a step failed");
        self.sink.warn(&error);
        self.report.warnings.push(error);
    }

    async fn act(&mut self, action: Action) -> StepResult {
        match action {
            Action::OpenJournal => self.open_journal().await?,
            Action::StartGuest => self.start_guest().await?,
            Action::Prepare => return self.prepare().await,
            Action::EnterMode => self.enter_mode().await?,
            // A container has no bitmaps to plan.
            Action::PlanVolumes if self.driver.kind() == GuestKind::Lxc => {}
            Action::PlanVolumes => self.plan_volumes().await?,
            Action::PointInTime => self.point_in_time().await?,
            Action::Resume => {
                self.resume().await?;
                if self.driver.is_held() {
                    return Ok(Event::Held);
                }
            }
            Action::Transfer => self.transfer().await?,
            Action::JournalCommit => {
                let (id, description) = (self.commit_id, self.description()?);
                let entry = Entry::Committing { id, description };
                self.journal()?.append(entry).await.map_err(words)?;
            }
            Action::Commit => {
                self.commit().await?;
                self.outcome = Some(Outcome::Committed);
            }
            Action::AskOutcome => {
                let outcome = self.ask_outcome().await;
                self.outcome = Some(outcome);
                return Ok(Event::Known(outcome));
            }
            Action::Abort => self.abort().await?,
            Action::Describe => self.describe().await?,
            Action::CloseJournal { keep } => self.close_journal(keep).await?,
            Action::RecordOutcome => self.record_outcome().await?,
            Action::Acquire
            | Action::OpenSource
            | Action::DropData
            | Action::CloseSource
            | Action::Teardown { .. }
            | Action::Release
            | Action::LeaveMode
            | Action::Cleanup => self.drive(action).await.map_err(words)?,
            Action::Finish(_) => {}
        }
        Ok(Event::Done)
    }

    /// The actions that are the driver's alone.
    async fn drive(&mut self, action: Action) -> Result<(), GuestError> {
        let Some(journal) = &self.journal else {
            return Ok(());
        };
        let task = Task { journal, sink: self.sink, hooks: self.hooks };
        match action {
            Action::Acquire => self.driver.acquire(task).await,
            Action::OpenSource => self.driver.open_source(task).await,
            Action::DropData => self.driver.drop_data(task).await,
            Action::CloseSource => self.driver.close_source(task).await,
            Action::Teardown { success } => self.driver.teardown(success, task).await,
            Action::Release => self.driver.release(task).await,
            Action::LeaveMode => self.driver.leave_mode(task).await,
            _ => self.driver.cleanup(task).await,
        }
    }

    pub(super) fn journal(&self) -> StepResult<&Journal> {
        self.journal.as_ref().ok_or_else(|| "the journal is not open".to_owned())
    }

    async fn open_journal(&mut self) -> StepResult<()> {
        let (kind, id) = (self.driver.kind(), self.driver.id());
        let begin = Begin::new(TaskKind::Backup, kind, id, &self.options.storage)
            .map_err(|error| format!("cannot read /proc of this process: {error}"))?;
        self.journal = Some(Journal::create(&self.ctx.layout, begin).await.map_err(words)?);
        Ok(())
    }

    async fn start_guest(&mut self) -> StepResult<()> {
        let info = GuestInfo {
            kind: self.driver.kind(),
            id: self.driver.id(),
            name: self.driver.name(),
            start_time_s: super::now_s(),
        };
        // Other guests of the job may be before this one; each of them is bounded.
        let mut job = self.job.lock().await;
        let limit = self.ctx.limits.provider_call;
        let call = call_within(self.cancel, limit);
        let start = async { job.start_guest(info, &call).await.map_err(words) };
        let backup = within(Some(limit), Action::StartGuest, start).await?;
        drop(job);
        let name = backup.archive_name().to_owned();
        // Kept before it is checked: a backup with a bad name must be aborted too.
        self.backup = Some(backup);
        check_archive_name(&name)?;
        self.journal()?.append(Entry::Archive { name: name.clone() }).await.map_err(words)?;
        let storage = &self.options.storage;
        self.sink.info(&format!("creating archive '{storage}:backup/{name}'"));
        self.report.archive = Some(name);
        Ok(())
    }

    async fn prepare(&mut self) -> StepResult {
        let task = task(self.journal.as_ref(), self.sink, self.hooks)?;
        let has_disks = self.driver.prepare(task).await.map_err(words)?;
        Ok(Event::Prepared { has_disks })
    }

    async fn enter_mode(&mut self) -> StepResult<()> {
        let task = task(self.journal.as_ref(), self.sink, self.hooks)?;
        self.volumes = self.driver.enter_mode(task).await.map_err(words)?;
        self.report.disks_size_bytes =
            self.volumes.iter().fold(0, |sum, volume| sum.saturating_add(volume.size_bytes));
        Ok(())
    }

    async fn resume(&mut self) -> StepResult<()> {
        let task = task(self.journal.as_ref(), self.sink, self.hooks)?;
        self.report.point_in_time.downtime_ms = self.driver.resume(task).await.map_err(words)?;
        Ok(())
    }

    async fn plan_volumes(&mut self) -> StepResult<()> {
        let call = call_within(self.cancel, self.ctx.limits.provider_call);
        let backup = self.backup.as_mut().ok_or("the provider's backup is not begun")?;
        let requests = backup.plan_volumes(&self.volumes, &call).await.map_err(words)?;
        check_requests(&requests, self.volumes.len())?;
        self.requests = requests;
        Ok(())
    }

    async fn point_in_time(&mut self) -> StepResult<()> {
        let task = task(self.journal.as_ref(), self.sink, self.hooks)?;
        let result = self.driver.point_in_time(&self.requests, task).await;
        self.report.point_in_time = result.map_err(words)?;
        Ok(())
    }

    async fn transfer(&mut self) -> StepResult<()> {
        let source = self.driver.source();
        let backup = self.backup.as_mut().ok_or("the provider's backup is not begun")?;
        let task = task(self.journal.as_ref(), self.sink, self.hooks)?;
        self.report.reused_bytes = reused_bytes(&self.driver.volumes());
        let meter = Meter::new(self.driver.id(), self.report.reused_bytes, self.sink);
        let stall = self.ctx.limits.transfer_stall;
        // Cancelled with the job, and when the snapshot is lost; it has no deadline of its own.
        let call = provider_api::Call { cancel: self.cancel.child_token(), deadline: None };
        let _stop = call.cancel.clone().drop_guard();
        let mut lost = self.driver.watch(task);
        let result = tokio::select! {
            biased;
            error = &mut lost => Err(words(error)),
            result = copy(backup.as_mut(), source, &meter, &call) => match result {
                Ok(moved) => Ok(moved),
                // The provider sees only an I/O error; the guest's side knows why.
                Err(error) => Err(match tokio::time::timeout(REASON_WAIT, &mut lost).await {
                    Ok(reason) => words(reason),
                    Err(_) => words(error),
                }),
            },
            () = meter.run_until_stalled(stall) =>
                Err(format!("the provider made no progress for {} seconds", stall.as_secs())),
        };
        drop(lost);
        self.report.transfer_ms = millis(meter.elapsed());
        let moved = result?;
        if let Moved::Disks(moved) = &moved {
            check_looked_at(moved.total_bytes, &self.driver.volumes())?;
        }
        meter.end();
        self.report.transferred = moved.transferred();
        self.report.reused_bytes = not_looked_at(
            self.report.reused_bytes,
            self.report.disks_size_bytes,
            self.report.transferred.total_bytes,
        );
        if let Moved::Container(moved) = moved {
            self.take_container(moved)?;
        }
        self.log_moved(meter.elapsed());
        Ok(())
    }

    /// What a provider says of a container's archive is untrusted.
    fn take_container(&mut self, mut moved: ContainerTransferred) -> StepResult<()> {
        moved.ignored.truncate(IGNORED_MAX);
        for entry in &mut moved.ignored {
            *entry = cleaned(entry);
            self.sink.warn(&format!("not in the archive: '{}': {}", entry.path, entry.why));
        }
        let named = moved.ignored.len() as u64;
        if moved.ignored_count > named {
            self.sink.warn(&format!("{} more are not in the archive", moved.ignored_count - named));
        }
        let (count, unreadable) = self.driver.unreadable();
        moved.ignored_count = moved.ignored_count.saturating_add(count);
        moved.ignored.splice(0..0, unreadable.iter().map(cleaned));
        moved.ignored.truncate(IGNORED_MAX);
        if let Some(why) = self.driver.cut_short() {
            return Err(format!("the archive cannot be complete: {why}"));
        }
        // A tree has at least its root: such an archive would be a backup only by name.
        if moved.entries == 0 {
            return Err("the provider's archive has no entries, but the container has".to_owned());
        }
        self.report.container = Some(moved);
        Ok(())
    }

    /// What the archive gets when it is committed.
    fn description(&self) -> StepResult<Description> {
        let name = self.driver.name();
        Description::of(self.options, self.driver.kind(), self.driver.id(), name.as_deref())
    }

    async fn describe(&mut self) -> StepResult<()> {
        let Some(archive) = self.report.archive.clone() else { return Ok(()) };
        let (storage, limits) = (&self.options.storage, &self.ctx.limits);
        let description = self.description()?;
        let give = description.give(self.provider, storage, &archive, limits, self.sink);
        // The work of others, after which the journal must still be closed.
        match AssertUnwindSafe(give).catch_unwind().await {
            Ok(warnings) => self.report.warnings.extend(warnings),
            Err(_) => return Err("internal error of the provider: the archive stays".to_owned()),
        }
        Ok(())
    }

    async fn abort(&mut self) -> StepResult<()> {
        let Some(backup) = self.backup.take() else {
            return Ok(());
        };
        let why = self.report.error.clone().unwrap_or_default();
        let call = call_within(&CancellationToken::new(), self.ctx.limits.undo);
        let aborted = backup.abort(&why, &call).await;
        aborted
            .map_err(|error| format!("the provider could not give its backup up: {}", words(error)))
    }

    async fn close_journal(&mut self, keep: bool) -> StepResult<()> {
        let Some(journal) = self.journal.take() else {
            return Ok(());
        };
        if keep {
            self.sink.warn(&format!(
                "something could not be undone; the next backup of {} will try again ({})",
                guest_words(self.driver.kind(), self.driver.id()),
                journal.path().display()
            ));
            return Ok(());
        }
        journal.remove().await.map_err(words)
    }

    fn log_moved(&self, elapsed: Duration) {
        let (moved, reused) = (&self.report.transferred, self.report.reused_bytes);
        let part = |bytes, of| {
            let percent = (u128::from(bytes) * 100).checked_div(u128::from(of)).unwrap_or(0);
            format!("{} ({percent}%)", size(bytes))
        };
        if moved.zero_bytes > 0 {
            let zero = part(moved.zero_bytes, moved.total_bytes);
            self.sink.info(&format!("backup is sparse: {zero} total zero data"));
        }
        if reused > 0 {
            let reused = part(reused, self.report.disks_size_bytes);
            self.sink.info(&format!("backup was done incrementally, reused {reused}"));
        }
        self.sink.info(&transferred(moved.total_bytes, elapsed));
    }

    fn log_costs(&self) {
        if let Some(stats) = &self.report.access {
            let ms = |ns: u64| format!("{:.1} ms", ns as f64 / 1e6);
            self.sink.info(&format!(
                "guest writes that had to wait: {} (half of them up to {}, 99% up to {}, longest {}); \
                 old data saved: {}",
                stats.writes_delayed,
                ms(stats.delay_p50_ns),
                ms(stats.delay_p99_ns),
                ms(stats.delay_max_ns),
                size(stats.captured_bytes),
            ));
        }
    }
}

/// What a provider has copied.
enum Moved {
    Disks(Transferred),
    Container(ContainerTransferred),
}

impl Moved {
    fn transferred(&self) -> Transferred {
        match self {
            Self::Disks(moved) => *moved,
            Self::Container(moved) => Transferred {
                total_bytes: moved.read_bytes,
                read_bytes: moved.read_bytes,
                zero_bytes: 0,
                written_bytes: moved.written_bytes,
            },
        }
    }
}

/// Has the provider copy what the guest's kind gives.
async fn copy(
    backup: &mut dyn GuestBackup,
    source: GuestSource,
    meter: &Meter<'_>,
    call: &provider_api::Call,
) -> provider_api::Result<Moved> {
    match source {
        GuestSource::Vm(source) => backup.backup_vm(source, meter, call).await.map(Moved::Disks),
        GuestSource::Container(source) => {
            backup.backup_container(source, meter, call).await.map(Moved::Container)
        }
    }
}

/// What the used bitmaps say did not change.
fn reused_bytes(volumes: &[VolumeReport]) -> u64 {
    let used = volumes.iter().filter(|volume| volume.bitmap_action == BITMAP_USED);
    used.fold(0, |sum: u64, volume| {
        let dirty = volume.dirty_bytes.unwrap_or(volume.size_bytes);
        sum.saturating_add(volume.size_bytes.saturating_sub(dirty))
    })
}

/// A provider that has looked at less than there was has left something out.
fn check_looked_at(looked_at_bytes: u64, volumes: &[VolumeReport]) -> Result<(), String> {
    let all_bytes = volumes.iter().fold(0, |sum: u64, one| sum.saturating_add(one.size_bytes));
    let wanted_bytes = all_bytes.saturating_sub(reused_bytes(volumes));
    if looked_at_bytes >= wanted_bytes {
        return Ok(());
    }
    Err(format!(
        "the provider says that it looked at {looked_at_bytes} bytes of the disks, but there were {wanted_bytes}"
    ))
}

/// What was reused in the end: a provider that may read everything may have made a full backup after all.
fn not_looked_at(reused_bytes: u64, disks_size_bytes: u64, looked_at_bytes: u64) -> u64 {
    reused_bytes.min(disks_size_bytes.saturating_sub(looked_at_bytes))
}

/// A provider's answer is untrusted input.
fn check_requests(requests: &[BitmapRequest], disks: usize) -> Result<(), String> {
    if requests.len() != disks {
        return Err(format!(
            "the provider planned {} disks, but the guest has {disks}",
            requests.len()
        ));
    }
    for request in requests {
        if let BitmapRequest::Use { generation, .. } = request {
            let is_plain = generation.bytes().all(|b| b.is_ascii_graphic());
            if generation.is_empty() || generation.len() > GENERATION_BYTES_MAX || !is_plain {
                return Err("the provider asked for a generation that cannot be one".to_owned());
            }
        }
    }
    Ok(())
}

/// A file's name may be made to mislead whoever reads the report.
fn cleaned(entry: &IgnoredEntry) -> IgnoredEntry {
    IgnoredEntry { path: clean(&entry.path), why: clean(&entry.why) }
}

fn limit_of(action: Action, kind: GuestKind, limits: &Limits) -> Option<Duration> {
    match action {
        // Many files may have to be listed: its driver bounds that, by progress.
        Action::OpenSource if kind == GuestKind::Lxc => None,
        Action::OpenJournal
        | Action::Prepare
        | Action::PlanVolumes
        | Action::OpenSource
        | Action::JournalCommit => Some(limits.provider_call),
        Action::Acquire => Some(limits.acquire),
        Action::PointInTime => Some(limits.point_in_time),
        // These bound themselves, by progress or by their own limits.
        Action::StartGuest
        | Action::EnterMode
        | Action::Resume
        | Action::LeaveMode
        | Action::Transfer
        | Action::Commit
        | Action::AskOutcome
        | Action::Describe
        | Action::Finish(_) => None,
        // A copy of a container has as many files as the container.
        Action::Cleanup if kind == GuestKind::Lxc => Some(limits.removal),
        _ => Some(limits.undo),
    }
}

async fn within<T>(
    limit: Option<Duration>,
    action: Action,
    step: impl Future<Output = StepResult<T>>,
) -> StepResult<T> {
    let Some(limit) = limit else {
        return step.await;
    };
    let started = Instant::now();
    match tokio::time::timeout(limit, step).await {
        Ok(result) => result,
        Err(_) => {
            let after = started.elapsed().as_secs();
            Err(format!("the step '{action:?}' did not end within {after} seconds"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_full_backup_reuses_nothing() {
        assert_eq!(not_looked_at(90, 100, 10), 90);
        assert_eq!(not_looked_at(90, 100, 100), 0);
        assert_eq!(not_looked_at(90, 100, 40), 60);
        // What a provider claims need not be true.
        assert_eq!(not_looked_at(90, 100, u64::MAX), 0);
        assert_eq!(not_looked_at(90, 100, 0), 90);
    }

    #[test]
    fn a_provider_s_plan_is_checked() {
        let using = |text: &str| BitmapRequest::Use {
            generation: text.to_owned(),
            readable: provider_api::Readable::Dirty,
        };
        assert!(check_requests(&[BitmapRequest::New, using("abc")], 2).is_ok());
        assert!(check_requests(&[BitmapRequest::New], 2).is_err());
        for bad in ["", "a b", "a\n", &"x".repeat(256)] {
            assert!(check_requests(&[using(bad)], 1).is_err(), "{bad:?}");
        }
    }
}
