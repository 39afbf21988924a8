// SPDX-License-Identifier: GPL-2.0-or-later
//! Which accesses exist. Nodes are kept by name and looked up when needed; what is kept by pointer
//! (holders, exports) is held by a reference of ours.
//!
//! The lock is never held across a call that polls or changes the graph.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fleece::State;
use fleece::bitmap_name::Action;

use super::bitmaps::AccessBitmaps;
use crate::qemu::error::Error;
use crate::qemu::export::HeldExport;
use crate::qemu::graph::{Bds, Holder, Relaxed};
use crate::qemu::main_loop::MainLoop;
use crate::qemu::migration::MigrationBlocker;
use crate::qemu::timer::Timer;

/// One device of an access.
#[derive(Debug)]
pub(super) struct Device {
    /// As named in the request.
    pub(super) device: String,
    pub(super) source_node: String,
    pub(super) fleecing_node: String,
    pub(super) filter_node: String,
    pub(super) snapshot_node: String,
    pub(super) size_bytes: u64,
    pub(super) timeout: Duration,
    pub(super) action: Action,
    pub(super) dirty_bytes: Option<u64>,
    pub(super) bitmaps: Option<AccessBitmaps>,
    /// Owns the snapshot node, so that no user can delete it.
    pub(super) owner: Option<Holder>,
    /// Backends of the fleecing image; held until the filter is closed.
    pub(super) relaxed: Vec<Relaxed>,
    /// The worst state that was reported by an event.
    pub(super) reported: State,
}

impl Device {
    pub(super) fn filter(&self, main_loop: MainLoop) -> Option<Bds> {
        Bds::find(main_loop, &self.filter_node)
    }

    pub(super) fn snapshot(&self, main_loop: MainLoop) -> Option<Bds> {
        Bds::find(main_loop, &self.snapshot_node)
    }

    pub(super) fn source(&self, main_loop: MainLoop) -> Option<Bds> {
        Bds::find(main_loop, &self.source_node)
    }
}

/// One access.
#[derive(Debug)]
pub(super) struct Access {
    pub(super) target_id: String,
    pub(super) start_time_ms: u64,
    pub(super) devices: Vec<Device>,
    /// Exports that a teardown has told to end.
    pub(super) exports: Vec<HeldExport>,
    /// Ends with the access.
    pub(super) _migration_blocker: MigrationBlocker,
}

#[derive(Debug)]
pub(super) struct Registry {
    pub(super) accesses: Vec<Access>,
    /// The command that changes something right now.
    operation: Option<&'static str>,
    /// Fires every second while there are accesses.
    pub(super) watchdog: Option<Timer>,
}

static REGISTRY: Mutex<Registry> =
    Mutex::new(Registry { accesses: Vec::new(), operation: None, watchdog: None });

/// The registry, locked.
pub(super) fn lock() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    pub(super) fn access(&mut self, target_id: &str) -> Option<&mut Access> {
        self.accesses.iter_mut().find(|access| access.target_id == target_id)
    }

    /// The target that has an access to this node.
    pub(super) fn target_of_source(&self, source_node: &str) -> Option<&str> {
        self.accesses
            .iter()
            .find(|access| access.devices.iter().any(|d| d.source_node == source_node))
            .map(|access| access.target_id.as_str())
    }

    /// The target whose access uses this bitmap of a node.
    pub(super) fn target_of_bitmap(&self, source_node: &str, bitmap: &str) -> Option<&str> {
        let uses = |device: &Device| {
            device.source_node == source_node
                && device.bitmaps.as_ref().is_some_and(|bitmaps| bitmaps.uses(bitmap))
        };
        self.accesses
            .iter()
            .find(|access| access.devices.iter().any(uses))
            .map(|access| access.target_id.as_str())
    }

    /// Whether an access of the target still has bitmaps of this node to settle.
    pub(super) fn is_unsettled(&self, target_id: &str, source_node: &str) -> bool {
        let waits = |device: &Device| device.source_node == source_node && device.bitmaps.is_some();
        self.accesses
            .iter()
            .any(|access| access.target_id == target_id && access.devices.iter().any(waits))
    }

    /// Takes an access out.
    pub(super) fn take(&mut self, target_id: &str) -> Option<Access> {
        let index = self.accesses.iter().position(|access| access.target_id == target_id)?;
        Some(self.accesses.remove(index))
    }
}

/// Keeps other commands from changing anything meanwhile.
#[derive(Debug)]
pub(super) struct Operation(());

impl Operation {
    pub(super) fn begin(command: &'static str) -> Result<Self, Error> {
        let mut registry = lock();
        match registry.operation {
            Some(other) => Err(Error::new(format!("{other} is in progress; try again later"))),
            None => {
                registry.operation = Some(command);
                Ok(Self(()))
            }
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        lock().operation = None;
    }
}
