// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lets the end-to-end tests kill the process at a chosen step of a backup. Debug builds only.
//!
//! Between commit and teardown there are milliseconds; a test that hoped to hit them would prove
//! nothing on the day it misses.

use super::state::Action;

/// Names the action, such as `Teardown`, before which the process is killed.
const VARIABLE: &str = "VZDUMP_TEST_KILL_AT";

/// Ends this process by SIGKILL if this is the chosen action.
pub(super) fn reached(action: Action) {
    if std::env::var(VARIABLE).is_ok_and(|chosen| is_chosen(action, &chosen)) {
        tracing::warn!(?action, "killed on request of {VARIABLE}");
        // Cannot fail: a process may always signal itself.
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
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
