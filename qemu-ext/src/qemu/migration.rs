// SPDX-License-Identifier: GPL-2.0-or-later
//! Refusing migration for a time.

use core::ptr;

use qemu_ext_sys as sys;

use super::error::{Error, Slot};
use super::glib;
use super::main_loop::MainLoop;

/// While it exists, migration is refused.
#[derive(Debug)]
pub struct MigrationBlocker(*mut sys::Error);

// SAFETY: only the main loop uses the pointer (see `drop`).
unsafe impl Send for MigrationBlocker {}

impl MigrationBlocker {
    /// Refuses migration with this reason.
    ///
    /// # Errors
    /// A migration is going on, or this QEMU was started to be always migratable.
    pub fn new(_: MainLoop, reason: &str) -> Result<Self, Error> {
        let reason = glib::c_string(reason);
        let mut blocker = ptr::null_mut();
        let mut error = Slot::new();
        // SAFETY: main loop; both places are ours.
        let added = unsafe {
            sys::ba_migrate_add_blocker(&raw mut blocker, reason.as_ptr(), error.as_errp())
        };
        if added { Ok(Self(blocker)) } else { Err(error.take()) }
    }
}

impl Drop for MigrationBlocker {
    fn drop(&mut self) {
        if MainLoop::current().is_some() {
            // SAFETY: main loop; the blocker is the one that was added.
            unsafe { sys::ba_migrate_del_blocker(&raw mut self.0) };
        }
    }
}
