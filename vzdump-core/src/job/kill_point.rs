// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lets the end-to-end tests kill the process at a chosen step of a backup, or have it asked to end.
//! Debug builds only.
//!
//! Between commit and teardown there are milliseconds; a test that hoped to hit them would prove
//! nothing on the day it misses.

use rustix::process::{Signal, getpid, kill_process};

use super::state::Action;

/// Names the action, such as `Teardown`, before which the process is killed.
const VARIABLE: &str = "VZDUMP_TEST_KILL_AT";
/// Names the action before which the process is asked to end, twice.
const TERM_VARIABLE: &str = "VZDUMP_TEST_TERM_AT";

/// Signals this process if this is the chosen action.
pub(super) fn reached(action: Action) {
    for (variable, signals) in
        [(VARIABLE, [Signal::KILL].as_slice()), (TERM_VARIABLE, &[Signal::TERM, Signal::INT])]
    {
        if std::env::var(variable).is_ok_and(|chosen| is_chosen(action, &chosen)) {
            tracing::warn!(?action, "signalled on request of {variable}");
            for &signal in signals {
                // Cannot fail: a process may always signal itself.
                let _ = kill_process(getpid(), signal);
            }
        }
    }
}

fn is_chosen(action: Action, chosen: &str) -> bool {
    format!("{action:?}").split([' ', '(', '{']).next() == Some(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_are_chosen_by_name_alone() {
        assert!(is_chosen(Action::Teardown { success: true }, "Teardown"));
        assert!(is_chosen(Action::Commit, "Commit"));
        assert!(!is_chosen(Action::JournalCommit, "Commit"));
        assert!(!is_chosen(Action::Commit, ""));
    }
}
