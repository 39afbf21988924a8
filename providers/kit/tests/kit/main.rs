// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kit passes providers that are right, and catches each that is not.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "tests")]

mod directory;
mod faults;
mod files;

use provider_kit::{Outcome, Report};

/// A report as text, for a failed test.
fn shown(report: &Report) -> String {
    let lines = report
        .checks
        .iter()
        .map(|check| format!("{:18} {:6} ms {:?}\n", check.name, check.elapsed_ms, check.outcome));
    lines.collect()
}

/// Names of the checks that failed.
fn failed(report: &Report) -> Vec<&str> {
    let bad = report.checks.iter().filter(|check| matches!(check.outcome, Outcome::Failed { .. }));
    bad.map(|check| check.name.as_str()).collect()
}
