// SPDX-License-Identifier: GPL-2.0-or-later
//! Faults for the tests: panics, errors and failed allocations at named points.
//!
//! Only with the feature `fault-injection`, which no program for users has; without it all
//! functions are empty. The environment variable `BACKUP_ACCESS_FAULTS` names the faults, such as
//! `panic:before_write:3,alloc:block,error:setup_step:7`: a panic at the third pass of one point,
//! every allocation at another one fails, and the seventh step of setups fails with an error. Each fault writes a line to the standard error output, so that a test sees
//! that it happened.

#[cfg(not(feature = "fault-injection"))]
mod plan {
    /// Panics if a test asked for that.
    #[inline(always)]
    pub(crate) fn point(_: &str) {}

    /// Whether the allocation that follows fails because a test asked for that.
    #[inline(always)]
    pub(crate) fn alloc_fails(_: &str) -> bool {
        false
    }

    /// Whether the step that follows fails, or panics, because a test asked for that.
    #[inline(always)]
    pub(crate) fn step_fails(_: &str) -> bool {
        false
    }
}

#[cfg(feature = "fault-injection")]
mod plan {
    use std::io::Write;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    const VARIABLE: &str = "BACKUP_ACCESS_FAULTS";

    #[derive(Debug)]
    struct Fault {
        kind: String,
        point: String,
        /// At this pass, counted from 1; none means at each.
        at: Option<u64>,
        passes: AtomicU64,
    }

    fn parse(text: &str) -> Option<Fault> {
        let mut words = text.split(':');
        let kind =
            words.next().filter(|kind| ["panic", "alloc", "error"].contains(kind))?.to_owned();
        let point = words.next()?.to_owned();
        let at = words.next().map(str::parse).transpose().ok()?;
        Some(Fault { kind, point, at, passes: AtomicU64::new(0) })
    }

    fn faults() -> &'static [Fault] {
        static FAULTS: OnceLock<Vec<Fault>> = OnceLock::new();
        FAULTS.get_or_init(|| {
            let text = std::env::var(VARIABLE).unwrap_or_default();
            let entries = text.split(',').filter(|entry| !entry.is_empty());
            let known = |entry| {
                let fault = parse(entry);
                if fault.is_none() {
                    drop(writeln!(std::io::stderr(), "{VARIABLE}: no fault: {entry}"));
                }
                fault
            };
            entries.filter_map(known).collect()
        })
    }

    fn is_due(kind: &str, point: &str) -> bool {
        let mut due = false;
        for fault in faults().iter().filter(|fault| fault.kind == kind && fault.point == point) {
            let pass = fault.passes.fetch_add(1, Ordering::Relaxed) + 1;
            due |= fault.at.is_none_or(|at| at == pass);
        }
        due
    }

    /// Panics if a test asked for that.
    pub(crate) fn point(name: &str) {
        assert!(!is_due("panic", name), "injected at {name}");
    }

    /// Whether the allocation that follows fails because a test asked for that.
    pub(crate) fn alloc_fails(name: &str) -> bool {
        said(is_due("alloc", name), "allocation failure", name)
    }

    /// Whether the step that follows fails, or panics, because a test asked for that.
    pub(crate) fn step_fails(name: &str) -> bool {
        point(name);
        said(is_due("error", name), "error", name)
    }

    fn said(due: bool, what: &str, name: &str) -> bool {
        if due {
            drop(writeln!(std::io::stderr(), "qemu-ext: {what} injected at {name}"));
        }
        due
    }
}

pub(crate) use plan::{alloc_fails, point, step_fails};
