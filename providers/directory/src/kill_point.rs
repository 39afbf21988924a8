// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lets tests kill the process between any two steps of a removal, of storing a container's files, or of a
//! commit. Debug builds only.

use std::sync::atomic::{AtomicU32, Ordering};

/// Number of the step, counted from 1, at which the process is killed.
const KILL_VARIABLE: &str = "DIRECTORY_TEST_KILL_AT";
/// Set when the file system shall seem unable to exchange two directories.
const NO_EXCHANGE_VARIABLE: &str = "DIRECTORY_TEST_NO_EXCHANGE";

/// Ends this process by SIGKILL if this is the chosen step.
pub(crate) fn step() {
    static STEPS: AtomicU32 = AtomicU32::new(0);
    let Ok(chosen) = std::env::var(KILL_VARIABLE) else { return };
    let step = STEPS.fetch_add(1, Ordering::Relaxed) + 1;
    if chosen.parse() == Ok(step) {
        // Cannot fail: a process may always signal itself.
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// Whether the file system shall seem unable to exchange two directories.
pub(crate) fn is_without_exchange() -> bool {
    std::env::var_os(NO_EXCHANGE_VARIABLE).is_some()
}
