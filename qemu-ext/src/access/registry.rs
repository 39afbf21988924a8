// SPDX-License-Identifier: GPL-2.0-or-later
//! Which accesses exist. Nodes are kept by name and looked up when needed; what is kept by pointer
//! (holders, exports) is held by a reference of ours.
//!
//! The lock is never held across a call that polls or changes the graph.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fleece::State;
use fleece::bitmap_name::Action;

use super::bitmaps::AccessBitmaps;
use super::lease::{Clock, Lease};
use crate::filter;
use crate::qemu::error::Error;
use crate::qemu::export::HeldExport;
use crate::qemu::graph::{Bds, Holder, Relaxed};
use crate::qemu::main_loop::MainLoop;
use crate::qemu::migration::MigrationBlocker;
use crate::qemu::timer::Timer;

/// A request of at most 1 MiB that takes so long will not end soon. Nor will one after the end of
/// the snapshot, however short it has been there: it may have ended for that.
const STUCK: Duration = Duration::from_secs(5);

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
    /// None if it lasts until a command ends it.
    pub(super) lease: Option<Lease>,
    /// A teardown has begun.
    pub(super) closing: bool,
    /// What the last teardown command said about the backup's success.
    pub(super) verdict: Option<bool>,
    /// The event about its end was sent, though it is still here: QEMU exits.
    pub(super) end_reported: bool,
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
    pub(super) lease_clock: Clock,
    /// The last accesses that ended without a command, the oldest first.
    ended: Vec<Ended>,
}

/// An access that ended without a command.
#[derive(Debug)]
struct Ended {
    target_id: String,
    /// As a success or not.
    how: &'static str,
    why: String,
    when: Instant,
}

/// So many of them are remembered.
const MAX_ENDED: usize = 64;

static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
    accesses: Vec::new(),
    operation: None,
    watchdog: None,
    lease_clock: Clock::new(),
    ended: Vec::new(),
});

/// The registry, locked.
pub(super) fn lock() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    pub(super) fn access(&mut self, target_id: &str) -> Option<&mut Access> {
        self.accesses.iter_mut().find(|access| access.target_id == target_id)
    }

    /// A target that has an access to this node.
    pub(super) fn target_of_source(&self, source_node: &str) -> Option<&str> {
        self.find_device(|device| device.source_node == source_node).map(|(target, _)| target)
    }

    /// A device for which the condition holds, with its target.
    pub(super) fn find_device(
        &self,
        condition: impl Fn(&Device) -> bool,
    ) -> Option<(&str, &Device)> {
        self.accesses
            .iter()
            .flat_map(|access| access.devices.iter().map(|d| (access.target_id.as_str(), d)))
            .find(|(_, device)| condition(device))
    }

    /// A device of another target whose requests do not end: a drained section would wait for it,
    /// and hold all guest I/O and the monitor meanwhile.
    pub(super) fn stuck_device(&self, main_loop: MainLoop, target_id: &str) -> Option<String> {
        let others = self.accesses.iter().filter(|access| access.target_id != target_id);
        let mut devices = others.flat_map(|access| access.devices.iter().map(move |d| (access, d)));
        devices.find_map(|(access, device)| {
            let node = device.filter(main_loop)?;
            let is_over = matches!(filter::stats(node).state, State::Broken | State::Closing);
            let age = filter::oldest_io(node).filter(|&age| is_over || age >= STUCK)?;
            Some(format!(
                "device '{}' of target '{}' has had a request to its fleecing image '{}', or a postponed \
                 discard of the guest, in flight for {} ms",
                device.device,
                access.target_id,
                device.fleecing_node,
                age.as_millis()
            ))
        })
    }

    /// The target whose access uses this bitmap of a node.
    pub(super) fn target_of_bitmap(&self, source_node: &str, bitmap: &str) -> Option<&str> {
        let uses = |device: &Device| {
            device.source_node == source_node
                && device.bitmaps.as_ref().is_some_and(|bitmaps| bitmaps.uses(bitmap))
        };
        self.find_device(uses).map(|(target_id, _)| target_id)
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

    /// A command of ours is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.operation.is_some()
    }

    /// Adds an access. How an earlier one of its target ended does not matter any more.
    pub(super) fn add(&mut self, access: Access) {
        self.ended.retain(|ended| ended.target_id != access.target_id);
        self.accesses.push(access);
    }

    /// Remembers why an access is gone.
    pub(super) fn note_end(&mut self, target_id: &str, how: &'static str, why: String) {
        self.ended.retain(|ended| ended.target_id != target_id);
        if self.ended.len() == MAX_ENDED {
            self.ended.remove(0);
        }
        let target_id = target_id.to_owned();
        self.ended.push(Ended { target_id, how, why, when: Instant::now() });
    }

    /// Why the target's last access is gone although no command ended it, if that is known.
    pub(super) fn why_gone(&self, target_id: &str) -> Option<String> {
        let ended = self.ended.iter().find(|ended| ended.target_id == target_id)?;
        let seconds = ended.when.elapsed().as_secs();
        Some(format!("it was torn down as {} {seconds} seconds ago: {}", ended.how, ended.why))
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
