// SPDX-License-Identifier: GPL-2.0-or-later
//! Locks and atomics, in one place so that the interleaving models (`cfg(loom)`) run the same code
//! with loom's.

#[cfg(not(loom))]
use std::sync as base;

#[cfg(loom)]
use loom::sync as base;

pub(crate) use base::MutexGuard;
pub(crate) use base::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// A lock that ignores poisoning: whatever a panic left half done belongs to a snapshot that is
/// given up, and the guest must go on.
pub(crate) struct Mutex<T>(base::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(base::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A place that is filled at most once and read without a lock.
#[cfg(not(loom))]
pub(crate) struct Place<T>(std::sync::OnceLock<Box<T>>);

#[cfg(not(loom))]
impl<T> Place<T> {
    pub(crate) fn empty() -> Self {
        Self(std::sync::OnceLock::new())
    }

    pub(crate) fn get(&self) -> Option<&T> {
        self.0.get().map(Box::as_ref)
    }

    /// Fills it; whether `value` is what it holds now (another thread may have been first).
    pub(crate) fn fill(&self, value: Box<T>) -> bool {
        self.0.set(value).is_ok()
    }
}

/// The same for the models: only the flag is loom's. Looking at it does not order the threads that
/// look, so the models see no more order than `OnceLock` promises.
#[cfg(loom)]
pub(crate) struct Place<T> {
    filled: AtomicBool,
    value: std::sync::OnceLock<Box<T>>,
}

#[cfg(loom)]
impl<T> Place<T> {
    pub(crate) fn empty() -> Self {
        Self { filled: AtomicBool::new(false), value: std::sync::OnceLock::new() }
    }

    pub(crate) fn get(&self) -> Option<&T> {
        if self.filled.load(Ordering::Acquire) { self.value.get().map(Box::as_ref) } else { None }
    }

    pub(crate) fn fill(&self, value: Box<T>) -> bool {
        // One step: loom changes threads before this access, not after it.
        !self.filled.swap(true, Ordering::AcqRel) && self.value.set(value).is_ok()
    }
}
