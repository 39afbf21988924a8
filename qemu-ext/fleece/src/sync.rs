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

/// The same for the models. What it held is leaked at the end of a model's run.
#[cfg(loom)]
pub(crate) struct Place<T: 'static>(Mutex<Option<&'static T>>);

#[cfg(loom)]
impl<T: 'static> Place<T> {
    pub(crate) fn empty() -> Self {
        Self(Mutex::new(None))
    }

    pub(crate) fn get(&self) -> Option<&T> {
        *self.0.lock()
    }

    pub(crate) fn fill(&self, value: Box<T>) -> bool {
        let mut place = self.0.lock();
        let first = place.is_none();
        if first {
            *place = Some(Box::leak(value));
        }
        first
    }
}
