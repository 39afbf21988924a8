// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lets the end-to-end tests kill or stop the process at a chosen step of a backup, or have it asked
//! to end. Debug builds only.
//!
//! Between commit and teardown there are milliseconds; a test that hoped to hit them would prove
//! nothing on the day it misses.

use nix::sys::signal::{Signal, raise};

use super::state::Action;
use crate::journal::Entry;

/// Names the action, such as `Teardown`, before which the process is killed, or the line of the
/// journal, such as `entry:start`, after which it is.
const KILL: &str = "VZDUMP_TEST_KILL_AT";
/// The same for a process that is stopped, as by SIGSTOP, until the test has it go on.
const STOP: &str = "VZDUMP_TEST_STOP_AT";
/// The same for a process that is asked to end, twice.
const TERM: &str = "VZDUMP_TEST_TERM_AT";

/// Before an action.
pub(super) fn reached(action: Action) {
    at(&name_of(action));
}

/// After a line of the journal is durable.
pub(crate) fn journalled(entry: &Entry) {
    let value = serde_json::to_value(entry).unwrap_or_default();
    at(&format!("entry:{}", value["entry"].as_str().unwrap_or_default()));
}

/// Signals this process if this is the chosen step.
pub fn at(step: &str) {
    let faults: [(&str, &[Signal]); 3] = [
        (KILL, &[Signal::SIGKILL]),
        (STOP, &[Signal::SIGSTOP]),
        (TERM, &[Signal::SIGTERM, Signal::SIGINT]),
    ];
    for (variable, signals) in faults {
        if std::env::var(variable).is_ok_and(|chosen| chosen == step) {
            tracing::warn!(step, ?signals, "on request of {variable}");
            for &signal in signals {
                // To this thread, not to the process: another thread would take the signal a while
                // later, with the step begun and its time limits running.
                let _ = raise(signal);
            }
        }
    }
}

fn name_of(action: Action) -> String {
    format!("{action:?}").split([' ', '(', '{']).next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_are_chosen_by_name_alone() {
        assert_eq!(name_of(Action::Teardown { success: true }), "Teardown");
        assert_eq!(name_of(Action::JournalCommit), "JournalCommit");
    }
}
