// SPDX-License-Identifier: MIT OR Apache-2.0
//! The order of one guest's backup: which action follows which event. Pure; `super::run` drives it.
//!
//! ```text
//!  OpenJournal ► StartGuest ► Prepare ► EnterMode ► PlanVolumes ► Acquire ► PointInTime ► Resume ►
//!                                └─(no disks)────────────────────────► Transfer ◄─── OpenSource ◄─┘
//!                                                                          │
//!                                       (slow commit)  DropData ◄──────────┤
//!                                                          │               │
//!  every failure or cancellation: what was begun is      JournalCommit ◄───┘
//!  undone, the newest first, each once                         ▼
//!       │                                                   Commit ─error► AskOutcome
//!       ▼                                                      └──► RecordOutcome ◄─┘
//!  [Resume] ► Teardown{success} ► CloseSource ► Release ◄──────────────┘
//!                 ► LeaveMode ► Cleanup ► Abort ► [Describe] ► CloseJournal ► Finish
//! ```
//!
//! # Invariants
//! - An action counts as begun when it is handed out, so a step that fails half way is undone too.
//! - `Teardown { success: true }` is handed out only after the commit's outcome is `Committed`.
//! - `Abort` is handed out only if `Commit` was not: the provider's backup is consumed once.
//! - `CloseSource` comes after `Teardown`, although its pair began later: the teardown ends the
//!   exports in bounded time, while stopping an NBD server that still has exports waits for their
//!   requests, and with them all of QEMU, for as long as a storage hangs.
//! - After `EnterMode` comes `Resume`: after the point in time, and if it was not reached or failed
//!   then, first of all that is undone, because a guest must not wait for anything that is undone.
//! - A guest that must stay down until its data has been read (`Held`) is let go on by another `Resume`, after
//!   `Release` and before `LeaveMode`.
//! - `DropData` comes only after the provider has read everything, so that it fails costs the guest
//!   something, and the backup nothing: the commit follows all the same. Which changes count for the
//!   next increment is decided by the teardown alone.
//! - `Describe` comes only after a known commit, last of all that the journal is needed for.
//! - A failure while undoing changes neither the verdict nor what is undone after it.

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Create the journal.
    OpenJournal,
    /// Have the provider begin this guest's backup.
    StartGuest,
    /// Read the configuration and choose the disks.
    Prepare,
    /// Bring the guest into the state that the mode needs, and connect to it.
    EnterMode,
    /// Ask the provider which bitmaps to use.
    PlanVolumes,
    /// Acquire what the point in time needs: fleecing images.
    Acquire,
    /// Freeze, take the point in time, thaw.
    PointInTime,
    /// Let the guest go on that was held for the point in time.
    Resume,
    /// Offer the frozen disks to the provider.
    OpenSource,
    /// Have the provider copy.
    Transfer,
    /// Withdraw the frozen disks and drop their old data, because the commit will take long.
    DropData,
    /// Write down the commit's id, durably.
    JournalCommit,
    /// Have the provider commit.
    Commit,
    /// Ask the provider what became of the commit.
    AskOutcome,
    /// Write down what became of it.
    RecordOutcome,
    /// Withdraw the frozen disks.
    CloseSource,
    /// End the point in time.
    Teardown {
        /// Whether the backup is durable.
        success: bool,
    },
    /// Give back what [`Action::Acquire`] acquired.
    Release,
    /// Disconnect from the guest, and leave it as it would be without the backup.
    LeaveMode,
    /// Undo [`Action::Prepare`].
    Cleanup,
    /// Have the provider give its backup up.
    Abort,
    /// Give the archive its notes and its protection.
    Describe,
    /// Remove the journal, or keep it because something could not be undone.
    CloseJournal {
        /// Something is left for the recovery.
        keep: bool,
    },
    /// All is done.
    Finish(Verdict),
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The action succeeded.
    Done,
    /// [`Action::Prepare`] succeeded.
    Prepared {
        /// The guest has disks to back up.
        has_disks: bool,
    },
    /// [`Action::Resume`] succeeded, but the guest goes on only when its data has been read.
    Held,
    /// The action failed or was cancelled.
    Failed,
    /// [`Action::AskOutcome`] has an answer.
    Known(Outcome),
}

/// What became of a commit, as far as it could be found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is durable.
    Committed,
    /// It did not happen.
    NotCommitted,
    /// Nobody knows; the archive is left alone.
    Unknown,
}

/// How the backup ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The archive is durable.
    Committed,
    /// There is no archive.
    Failed,
    /// There may be an archive.
    Unknown,
}

/// State of one guest's backup.
#[derive(Debug)]
pub struct Machine {
    current: Action,
    /// How to undo what was begun; the last is undone first.
    undo: Vec<Action>,
    verdict: Verdict,
    unwinding: bool,
    leftovers: bool,
    /// The guest may be held for the point in time.
    is_held: bool,
    /// The provider commits slowly.
    is_slow: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new(false)
    }
}

impl Machine {
    /// A backup that has not begun; `is_slow` if its provider commits slowly.
    pub fn new(is_slow: bool) -> Self {
        Self {
            current: Action::OpenJournal,
            undo: vec![Action::CloseJournal { keep: false }],
            verdict: Verdict::Failed,
            unwinding: false,
            leftovers: false,
            is_held: false,
            is_slow,
        }
    }

    /// The action under way; the first one is [`Action::OpenJournal`].
    pub fn current(&self) -> Action {
        self.current
    }

    /// Whether cancellation has an effect: from when there is a journal, which a thread creates that
    /// would go on by itself, until the commit begins, except while the guest is let go on.
    pub fn is_cancellable(&self) -> bool {
        let is_shielded = matches!(
            self.current,
            Action::OpenJournal
                | Action::Resume
                | Action::Commit
                | Action::AskOutcome
                | Action::RecordOutcome
        );
        !self.unwinding && !is_shielded
    }

    /// Takes what became of the current action and says what is next.
    pub fn on(&mut self, event: Event) -> Action {
        if self.current == Action::Resume && (event != Event::Failed || self.unwinding) {
            self.is_held = false;
            if event == Event::Held && !self.unwinding {
                self.resume_later();
            }
        }
        let next = match (self.current, event) {
            (Action::Finish(verdict), _) => Action::Finish(verdict),
            // Neither may stop the way to the teardown.
            (Action::RecordOutcome, _) => self.unwind(),
            (_, Event::Failed) if self.unwinding => {
                // `LeaveMode` tries again what `Resume` could not do.
                // What the archive did not get, it may never: that is a warning, not a leftover.
                self.leftovers |=
                    !matches!(self.current, Action::Abort | Action::Resume | Action::Describe);
                self.unwind()
            }
            (_, _) if self.unwinding => self.unwind(),
            (Action::Commit, Event::Failed) => Action::AskOutcome,
            (Action::Commit, _) => self.decide(Outcome::Committed),
            (Action::AskOutcome, Event::Known(outcome)) => self.decide(outcome),
            (Action::AskOutcome, _) => self.decide(Outcome::Unknown),
            (Action::DropData, _) => Action::JournalCommit,
            (_, Event::Failed) => self.unwind(),
            (Action::Transfer, _) if self.is_slow => Action::DropData,
            (Action::Prepare, Event::Prepared { has_disks: false }) => Action::Transfer,
            (current, _) => forward(current),
        };
        self.begin(next);
        next
    }

    fn begin(&mut self, action: Action) {
        match action {
            Action::StartGuest => self.undo.push(Action::Abort),
            Action::Prepare => self.undo.push(Action::Cleanup),
            Action::EnterMode => {
                self.undo.push(Action::LeaveMode);
                self.is_held = true;
            }
            Action::Acquire => self.undo.push(Action::Release),
            Action::PointInTime => self.undo.push(Action::Teardown { success: false }),
            // Below the teardown, so that it is undone after it.
            Action::OpenSource => {
                let below = self.undo.len().saturating_sub(1);
                self.undo.insert(below, Action::CloseSource);
            }
            // The provider's backup is consumed by the commit.
            Action::Commit => self.undo.retain(|undo| *undo != Action::Abort),
            _ => {}
        }
        self.current = action;
    }

    /// When nothing of the guest's is in use any more.
    fn resume_later(&mut self) {
        let leave = self.undo.iter().position(|undo| *undo == Action::LeaveMode);
        self.undo.insert(leave.map_or(0, |at| at + 1), Action::Resume);
    }

    fn decide(&mut self, outcome: Outcome) -> Action {
        self.verdict = match outcome {
            Outcome::Committed => Verdict::Committed,
            Outcome::NotCommitted => Verdict::Failed,
            Outcome::Unknown => Verdict::Unknown,
        };
        Action::RecordOutcome
    }

    fn unwind(&mut self) -> Action {
        self.unwinding = true;
        if self.is_held {
            return Action::Resume;
        }
        match self.undo.pop() {
            None => Action::Finish(self.verdict),
            Some(close @ Action::CloseJournal { .. })
                if self.verdict == Verdict::Committed && self.current != Action::Describe =>
            {
                self.undo.push(close);
                Action::Describe
            }
            Some(Action::Teardown { .. }) => {
                Action::Teardown { success: self.verdict == Verdict::Committed }
            }
            Some(Action::CloseJournal { .. }) => Action::CloseJournal { keep: self.leftovers },
            Some(undo) => undo,
        }
    }
}

/// What follows an action that succeeded, before the commit.
fn forward(current: Action) -> Action {
    match current {
        Action::OpenJournal => Action::StartGuest,
        Action::StartGuest => Action::Prepare,
        Action::Prepare => Action::EnterMode,
        Action::EnterMode => Action::PlanVolumes,
        Action::PlanVolumes => Action::Acquire,
        Action::Acquire => Action::PointInTime,
        Action::PointInTime => Action::Resume,
        Action::Resume => Action::OpenSource,
        Action::OpenSource => Action::Transfer,
        Action::Transfer | Action::DropData => Action::JournalCommit,
        Action::JournalCommit => Action::Commit,
        other => unreachable!("{other:?} is not a step on the way to the commit"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of a backup without a fault, up to the end.
    fn run(machine: &mut Machine, mut answer: impl FnMut(Action) -> Event) -> Vec<Action> {
        let mut seen = vec![machine.current()];
        while !matches!(machine.current(), Action::Finish(_)) {
            assert!(seen.len() < 40, "the machine does not end: {seen:?}");
            let event = answer(machine.current());
            seen.push(machine.on(event));
        }
        seen
    }

    fn good(action: Action) -> Event {
        match action {
            Action::Prepare => Event::Prepared { has_disks: true },
            Action::AskOutcome => Event::Known(Outcome::Committed),
            _ => Event::Done,
        }
    }

    /// What may be undone, and what makes that necessary; undone from the last to the first.
    const PAIRS: [(Action, Action); 6] = [
        (Action::StartGuest, Action::Abort),
        (Action::Prepare, Action::Cleanup),
        (Action::EnterMode, Action::LeaveMode),
        (Action::Acquire, Action::Release),
        (Action::OpenSource, Action::CloseSource),
        (Action::PointInTime, Action::Teardown { success: false }),
    ];

    #[test]
    fn a_good_backup_has_the_documented_order() {
        use Action::{
            Acquire, Cleanup, CloseJournal, CloseSource, Commit, Describe, EnterMode, Finish,
            JournalCommit, LeaveMode, OpenJournal, OpenSource, PlanVolumes, PointInTime, Prepare,
            RecordOutcome, Release, Resume, StartGuest, Teardown, Transfer,
        };
        let seen = run(&mut Machine::new(false), good);
        assert_eq!(
            seen,
            [
                OpenJournal,
                StartGuest,
                Prepare,
                EnterMode,
                PlanVolumes,
                Acquire,
                PointInTime,
                Resume,
                OpenSource,
                Transfer,
                JournalCommit,
                Commit,
                RecordOutcome,
                Teardown { success: true },
                CloseSource,
                Release,
                LeaveMode,
                Cleanup,
                Describe,
                CloseJournal { keep: false },
                Finish(Verdict::Committed),
            ]
        );
    }

    #[test]
    fn a_guest_that_stays_down_to_be_read_goes_on_before_it_is_left_whatever_fails() {
        let order = run(&mut Machine::new(false), good);
        for failing in order.iter().copied().map(Some).chain([None]) {
            let mut resumes = 0;
            let seen = run(&mut Machine::new(false), |action| {
                resumes += u32::from(action == Action::Resume);
                match action {
                    Action::Resume if resumes > 1 && failing == Some(action) => Event::Failed,
                    Action::Resume => Event::Held,
                    other if failing == Some(other) => Event::Failed,
                    other => good(other),
                }
            });
            let at = |wanted: Action| seen.iter().rposition(|action| *action == wanted);
            let is_read = at(Action::OpenSource).is_some();
            assert_eq!(resumes, if is_read { 2 } else { resumes.min(1) }, "{seen:?}");
            if is_read {
                let places = [Action::CloseSource, Action::Release, Action::Resume]
                    .map(|action| at(action).expect("each is there"));
                assert!(
                    places.is_sorted() && at(Action::Resume) < at(Action::LeaveMode),
                    "{seen:?}"
                );
                // What failed there the next step tries again.
                let keep = matches!(
                    failing,
                    Some(
                        Action::Teardown { .. }
                            | Action::CloseSource
                            | Action::Release
                            | Action::LeaveMode
                            | Action::Cleanup
                    )
                );
                assert!(at(Action::CloseJournal { keep }).is_some(), "{failing:?}: {seen:?}");
            }
        }
    }

    #[test]
    fn a_guest_without_disks_needs_no_point_in_time() {
        let seen = run(&mut Machine::new(false), |action| match action {
            Action::Prepare => Event::Prepared { has_disks: false },
            other => good(other),
        });
        assert!(seen.contains(&Action::Commit));
        let is_of_disks = |a: &Action| {
            matches!(
                a,
                Action::EnterMode | Action::Resume | Action::LeaveMode | Action::PointInTime
            ) || matches!(a, Action::Teardown { .. })
        };
        assert!(!seen.iter().any(is_of_disks), "{seen:?}");
        assert_eq!(seen.last(), Some(&Action::Finish(Verdict::Committed)));
    }

    #[test]
    fn every_failure_before_the_commit_undoes_what_was_begun() {
        let order = run(&mut Machine::new(false), good);
        let commit = order.iter().position(|a| *a == Action::Commit).expect("there is a commit");
        for failing in &order[..commit] {
            let seen = run(&mut Machine::new(false), |action| {
                if action == *failing { Event::Failed } else { good(action) }
            });
            assert_eq!(seen.last(), Some(&Action::Finish(Verdict::Failed)), "{failing:?}");
            let at = seen.iter().position(|a| a == failing).expect("it was handed out");
            let begun = &seen[..=at];
            let is_held = begun.contains(&Action::EnterMode)
                && (!begun.contains(&Action::Resume) || *failing == Action::Resume);
            // The guest first, then in the order of the pairs, each once, nothing else.
            let expected: Vec<Action> = is_held
                .then_some(Action::Resume)
                .into_iter()
                .chain(
                    PAIRS
                        .iter()
                        .rev()
                        .filter(|(begin, _)| seen.contains(begin))
                        .map(|(_, undo)| *undo),
                )
                .chain([Action::CloseJournal { keep: false }, Action::Finish(Verdict::Failed)])
                .collect();
            assert_eq!(&seen[at + 1..], expected, "{failing:?}");
        }
    }

    #[test]
    fn the_bitmap_is_settled_only_by_a_known_commit() {
        for (outcome, success, verdict) in [
            (Outcome::Committed, true, Verdict::Committed),
            (Outcome::NotCommitted, false, Verdict::Failed),
            (Outcome::Unknown, false, Verdict::Unknown),
        ] {
            let seen = run(&mut Machine::new(false), |action| match action {
                Action::Commit => Event::Failed,
                Action::AskOutcome => Event::Known(outcome),
                other => good(other),
            });
            assert!(seen.contains(&Action::Teardown { success }), "{outcome:?}");
            assert!(!seen.contains(&Action::Teardown { success: !success }));
            // The commit consumed the provider's backup: it is never aborted too.
            assert!(!seen.contains(&Action::Abort));
            assert_eq!(seen.last(), Some(&Action::Finish(verdict)));
        }
    }

    /// Whatever becomes of the data and of the commit: the data is dropped before the commit, and the
    /// teardown comes after it and tells the truth.
    #[test]
    fn a_slow_commit_begins_when_the_data_is_dropped() {
        let outcomes = [
            (Some(Outcome::Committed), true),
            (Some(Outcome::NotCommitted), false),
            (Some(Outcome::Unknown), false),
            (None, true),
        ];
        for (dropped, (outcome, success)) in
            [Event::Done, Event::Failed].into_iter().flat_map(|d| outcomes.map(|o| (d, o)))
        {
            let seen = run(&mut Machine::new(true), |action| match (action, outcome) {
                (Action::DropData, _) => dropped,
                (Action::Commit, Some(_)) => Event::Failed,
                (Action::AskOutcome, Some(outcome)) => Event::Known(outcome),
                (other, _) => good(other),
            });
            let at = |wanted: Action| seen.iter().position(|action| *action == wanted);
            let order = [
                Action::Transfer,
                Action::DropData,
                Action::JournalCommit,
                Action::Commit,
                Action::RecordOutcome,
                Action::Teardown { success },
                Action::CloseSource,
            ];
            let places = order.map(|action| at(action).expect("each is there once"));
            assert!(places.is_sorted(), "{seen:?}");
            assert_eq!(at(Action::Teardown { success: !success }), None, "{seen:?}");
        }
    }

    #[test]
    fn data_is_dropped_early_only_for_a_slow_commit() {
        let seen = run(&mut Machine::new(false), good);
        assert!(!seen.contains(&Action::DropData));
        // Nor before everything is read.
        let seen = run(&mut Machine::new(true), |action| match action {
            Action::Transfer => Event::Failed,
            other => good(other),
        });
        assert!(!seen.contains(&Action::DropData) && !seen.contains(&Action::Commit));
    }

    #[test]
    fn a_failing_question_is_an_unknown_outcome() {
        let seen = run(&mut Machine::new(false), |action| match action {
            Action::Commit | Action::AskOutcome => Event::Failed,
            other => good(other),
        });
        assert!(seen.contains(&Action::Teardown { success: false }));
        assert_eq!(seen.last(), Some(&Action::Finish(Verdict::Unknown)));
    }

    #[test]
    fn failures_while_undoing_keep_the_journal_and_the_verdict() {
        for failing in [
            Action::CloseSource,
            Action::Teardown { success: true },
            Action::Release,
            Action::LeaveMode,
            Action::Cleanup,
            Action::RecordOutcome,
        ] {
            let seen = run(&mut Machine::new(false), |action| {
                if action == failing { Event::Failed } else { good(action) }
            });
            let keep = failing != Action::RecordOutcome;
            assert!(seen.contains(&Action::CloseJournal { keep }), "{failing:?}: {seen:?}");
            assert_eq!(seen.last(), Some(&Action::Finish(Verdict::Committed)));
            // All else is undone all the same.
            assert!(seen.contains(&Action::Release) && seen.contains(&Action::Cleanup));
        }
    }

    /// Every sequence of successes and failures, however unlikely: the guest goes on before anything
    /// is undone.
    #[test]
    fn the_guest_goes_on_first_whatever_fails() {
        // The first that fails, and one bit for each action after it.
        for (first, later) in (0..16).flat_map(|first| (0_u32..1 << 10).map(move |l| (first, l))) {
            let mut machine = Machine::new(false);
            let mut step = 0;
            let seen = run(&mut machine, |action| {
                let is_later = step > first && later >> (step - first - 1) & 1 == 1;
                let fails = step == first || is_later;
                step += 1;
                if fails { Event::Failed } else { good(action) }
            });
            let count = |wanted: Action| seen.iter().filter(|a| **a == wanted).count();
            let entered = count(Action::EnterMode);
            assert!((entered..=2 * entered).contains(&count(Action::Resume)), "{seen:?}");
            assert_eq!(count(Action::LeaveMode), entered, "{seen:?}");
            if let Some(resume) = seen.iter().rposition(|a| *a == Action::Resume) {
                let is_undo = |a: &Action| PAIRS.iter().any(|(_, undo)| undo == a);
                assert!(!seen[..resume].iter().any(is_undo), "{seen:?}");
            }
        }
    }

    #[test]
    fn cancellation_begins_with_the_journal_ends_at_the_commit_and_waits_for_the_guest() {
        let mut machine = Machine::new(false);
        let mut at_commit = false;
        while !matches!(machine.current(), Action::Finish(_)) {
            at_commit |= machine.current() == Action::Commit;
            let is_shielded = matches!(machine.current(), Action::OpenJournal | Action::Resume);
            let expected = !at_commit && !is_shielded;
            assert_eq!(machine.is_cancellable(), expected, "{:?}", machine.current());
            let event = good(machine.current());
            machine.on(event);
        }
    }
}
