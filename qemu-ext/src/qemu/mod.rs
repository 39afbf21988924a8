// SPDX-License-Identifier: GPL-2.0-or-later
//! Safe wrappers around QEMU, one file per concept. All `unsafe` of this crate lives here.

pub mod bitmap;
pub mod blocker;
pub mod cached;
pub mod child;
pub mod coroutine;
pub mod driver;
pub mod error;
pub mod export;
pub mod glib;
pub mod graph;
pub mod iovec;
pub mod main_loop;
pub mod memory;
pub mod migration;
pub mod qapi;
pub mod reflink;
pub mod seal;
pub mod sentinel;
pub mod timer;
pub mod users;

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `f` and returns `default` if it panics: unwinding must not cross into C.
///
/// Whoever calls this makes sure that what `f` left half done is given up (the snapshot is broken,
/// the command fails); locks ignore poisoning.
pub fn guard<T>(default: T, f: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or(default)
}

/// As [`guard`], with `None` for a panic.
pub fn try_guard<T>(f: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(f)).ok()
}
