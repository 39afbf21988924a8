// SPDX-License-Identifier: MIT OR Apache-2.0
//! The commit of one guest's backup: until its outcome is known, and written down.

use std::time::{Duration, Instant};

use provider_api::{CancellationToken, CommitOutcome, Kind, Provider, Uuid};

use super::run::{Run, StepResult};
use super::state::Outcome;
use super::{Limits, call_within, chain};
use crate::journal::{Entry, KnownOutcome};
use crate::task_log::{TaskSink, clean};

/// The longest pause between two questions for an outcome.
const DELAY_MAX: Duration = Duration::from_secs(60);

impl Run<'_> {
    /// Asks the provider to commit; an error leaves the outcome unknown.
    pub(super) async fn commit(&mut self) -> StepResult<()> {
        let backup = self.backup.take().ok_or("the provider's backup is not begun")?;
        let limits = &self.ctx.limits;
        let limit = if self.commits_slowly() { limits.slow_commit } else { limits.commit };
        let call = call_within(self.cancel, limit);
        let impatient = async {
            self.cancel.cancelled().await;
            tokio::time::sleep(limits.commit_grace).await;
        };
        let committed = tokio::select! {
            biased;
            result = backup.commit(self.commit_id, &call) =>
                result.map_err(|error| format!("the commit failed: {}", chain(&error)))?,
            () = tokio::time::sleep(limit) =>
                return Err("the provider did not commit in time".to_owned()),
            () = impatient => return Err("the job was cancelled during the commit".to_owned()),
        };
        self.report.archive_size_bytes = committed.size_bytes;
        self.check_archive(&committed.archive);
        self.check_stored().await
    }

    /// Compares the archive's name, which is untrusted, with the one announced. Another name could be
    /// another guest's archive, whose notes and protection would be changed then.
    fn check_archive(&mut self, name: &str) {
        if self.report.archive.as_deref() != Some(name) {
            self.warn(format!(
                "the provider says that it committed the archive '{}', which is not the one it began; \
                 the name it began with is used",
                clean(name)
            ));
        }
    }

    /// A provider that does not know an archive that it has just committed has not stored it.
    async fn check_stored(&mut self) -> StepResult<()> {
        let Some(archive) = &self.report.archive else { return Ok(()) };
        // Also after the job was cancelled: it says what became of the backup.
        let call = call_within(&CancellationToken::new(), self.ctx.limits.provider_call);
        let asked = self.provider.guest_config(archive, &call);
        match tokio::time::timeout(self.ctx.limits.provider_call, asked).await {
            Ok(Err(error)) if error.kind == Kind::NotFound => {
                Err(format!("the provider says that it committed, but has no archive '{archive}'"))
            }
            // Whatever else is wrong does not say that it is not there.
            _ => Ok(()),
        }
    }

    fn warn(&mut self, text: String) {
        self.sink.warn(&text);
        self.report.warnings.push(text);
    }

    /// Asks what became of the commit until there is an answer, or patience ends.
    pub(super) async fn ask_outcome(&mut self) -> Outcome {
        let why = self.report.error.clone().unwrap_or_default();
        self.sink.warn(&format!("{why}; asking the provider what became of the commit"));
        let limits = &self.ctx.limits;
        let mut outcome = ask_outcome(self.provider, self.commit_id, limits, self.sink).await;
        if matches!(outcome, Ok(CommitOutcome::Pending)) && self.commits_slowly() {
            outcome = self.ask_on().await;
        }
        match outcome {
            Ok(CommitOutcome::Committed { archive }) => {
                self.check_archive(&archive);
                if let Err(missing) = self.check_stored().await {
                    self.warn(missing);
                    return Outcome::Unknown;
                }
                self.warn(format!("the backup is committed all the same ({why})"));
                self.report.error = None;
                Outcome::Committed
            }
            Ok(CommitOutcome::NotCommitted) => Outcome::NotCommitted,
            Ok(CommitOutcome::Pending) | Err(_) => {
                self.warn(format!(
                    "the outcome of the commit {} is unknown: the archive is left alone, and the \
                     next backup covers the changes of this one too",
                    self.commit_id
                ));
                Outcome::Unknown
            }
        }
    }

    fn commits_slowly(&self) -> bool {
        self.provider.describe().capabilities.slow_commit
    }

    /// Asks on while a slow commit is pending, which may be for hours; not after the job was cancelled.
    async fn ask_on(&mut self) -> Result<CommitOutcome, String> {
        if self.cancel.is_cancelled() {
            return Ok(CommitOutcome::Pending);
        }
        let limits = &self.ctx.limits;
        let hours = limits.slow_commit.as_secs() / 3600;
        self.sink.info(&format!("a slow commit is asked for until it is known, for {hours} hours"));
        let until = Instant::now() + limits.slow_commit;
        let pause = (limits.outcome_delay * 32).min(DELAY_MAX);
        while Instant::now() < until {
            let ask = async {
                tokio::time::sleep(pause).await;
                match ask_once(self.provider, self.commit_id, limits).await {
                    Err(_) => ask_outcome(self.provider, self.commit_id, limits, self.sink).await,
                    answer => answer,
                }
            };
            match self.cancel.run_until_cancelled(ask).await {
                Some(Ok(CommitOutcome::Pending)) => {}
                Some(answer) => return answer,
                None => break,
            }
        }
        Ok(CommitOutcome::Pending)
    }

    /// Writes the outcome down, so that a recovery need not ask again.
    pub(super) async fn record_outcome(&mut self) -> StepResult<()> {
        let outcome = match self.outcome {
            Some(Outcome::Committed) => KnownOutcome::Committed,
            Some(Outcome::NotCommitted) => KnownOutcome::NotCommitted,
            Some(Outcome::Unknown) | None => KnownOutcome::Unknown,
        };
        let id = self.commit_id;
        let entry = Entry::Outcome { id, outcome };
        self.journal()?.append(entry).await.map_err(|error| chain(&error))
    }
}

/// Asks for the outcome of a commit, a bounded number of times.
///
/// # Errors
/// The last answer was an error, in words.
pub(crate) async fn ask_outcome(
    provider: &dyn Provider,
    id: Uuid,
    limits: &Limits,
    sink: &dyn TaskSink,
) -> Result<CommitOutcome, String> {
    let mut delay = limits.outcome_delay;
    let mut last = Err("it was not asked".to_owned());
    for attempt in 0..limits.outcome_attempts.max(1) {
        if attempt > 0 {
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(DELAY_MAX);
        }
        last = ask_once(provider, id, limits).await;
        match &last {
            Ok(CommitOutcome::Pending) => sink.info("the commit is still pending"),
            Ok(_) => return last,
            Err(error) => sink.warn(&format!("no answer about the commit: {error}")),
        }
    }
    last
}

async fn ask_once(
    provider: &dyn Provider,
    id: Uuid,
    limits: &Limits,
) -> Result<CommitOutcome, String> {
    let call = call_within(&CancellationToken::new(), limits.provider_call);
    let question = provider.commit_outcome(id, &call);
    match tokio::time::timeout(limits.provider_call, question).await {
        Ok(answer) => answer.map_err(|error| chain(&error)),
        Err(_) => Err("the provider did not answer in time".to_owned()),
    }
}
