// SPDX-License-Identifier: GPL-2.0-or-later
//! Keeps what is below a filter as it is: which node has the data of the disk and of the fleecing
//! image.
//!
//! Other commands put nodes between two nodes (block jobs, external snapshots), or put another node
//! in the place of one (`blockdev-reopen`). Below a filter that would change the disk past it, take
//! guest writes away from the dirty bitmaps, or lose the old data in the fleecing image. QEMU refuses
//! to change a frozen link. Filters of several targets share the links below their disk, so these
//! are counted.
//!
//! An internal snapshot is loaded without asking anybody, but not into a node that has a dirty
//! bitmap: each node that could be reverted gets one that records nothing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use core::ptr::NonNull;

use qemu_ext_sys as sys;

use super::bitmap::Bitmap;
use super::blocker::OpBlocker;
use super::driver;
use super::error::Error;
use super::glib;
use super::graph::{Bds, GraphReader};
use super::main_loop::MainLoop;

/// How many seals hold each frozen link.
static FROZEN: Mutex<BTreeMap<Link, u32>> = Mutex::new(BTreeMap::new());

fn frozen() -> MutexGuard<'static, BTreeMap<Link, u32>> {
    FROZEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A link from a node to its `file` or `backing` child, or from a filter to its fleecing image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Link(NonNull<sys::BdrvChild>);

// SAFETY: only the main loop uses the pointer.
unsafe impl Send for Link {}
// SAFETY: as for `Send`.
unsafe impl Sync for Link {}

impl Link {
    fn is_frozen(self) -> bool {
        // SAFETY: main loop, as all changes of the graph; a frozen link stays where it is, and
        // others are looked at only when they have just been found.
        unsafe { (*self.0.as_ptr()).frozen }
    }

    fn set_frozen(self, on: bool) {
        // SAFETY: as above.
        unsafe { (*self.0.as_ptr()).frozen = on };
    }

    /// Whether somebody else keeps the link where it is, and may let it go at any time.
    fn is_frozen_by_others(self) -> bool {
        self.is_frozen() && !frozen().contains_key(&self)
    }

    /// Freezes the link, or counts one more who does.
    fn freeze(self) {
        *frozen().entry(self).or_default() += 1;
        self.set_frozen(true);
    }

    fn thaw(self) {
        let mut frozen = frozen();
        let Some(count) = frozen.get_mut(&self) else { return };
        *count -= 1;
        if *count == 0 {
            frozen.remove(&self);
            self.set_frozen(false);
        }
    }
}

/// The links from a node that can be frozen: whoever changes those asks first. Of a filter these are
/// all links. The caller holds the graph lock.
fn freezable(node: Bds, is_filter: bool) -> Vec<(Link, Bds)> {
    let bs = node.as_ptr();
    let mut links = Vec::new();
    // SAFETY: main loop with the graph lock: the list of children does not change meanwhile.
    unsafe {
        let mut child = sys::ba_bs_first_child(bs);
        while let Some(link) = NonNull::new(child).map(Link) {
            let asked_for = is_filter || child == (*bs).file || child == (*bs).backing;
            if asked_for && let Some(below) = Bds::from_ptr((*child).bs) {
                links.push((link, below));
            }
            child = sys::ba_bs_next_child(child);
        }
    }
    links
}

/// Fails if a block job is at work below the filter. The caller holds the graph lock.
fn check_jobs(main_loop: MainLoop, filter: Bds) -> Result<(), Error> {
    let mut seen = HashSet::from([filter]);
    let mut left = vec![filter];
    while let Some(node) = left.pop() {
        if node != filter
            && let Some(job) = job_of(node)
        {
            let name = node.node_name(main_loop);
            return Err(Error::new(format!("node '{name}' below it is in use by {job}")));
        }
        let below = freezable(node, node == filter).into_iter().map(|(_, below)| below);
        left.extend(below.filter(|&below| seen.insert(below)));
    }
    Ok(())
}

/// What is found below a filter, as far as we can hold it: other nodes may go away.
#[derive(Debug, Default)]
struct Below {
    links: Vec<Link>,
    /// The nodes seen, and whether an internal snapshot could be loaded into each.
    nodes: HashMap<Bds, bool>,
}

impl Below {
    /// Looks at the node and all below it: can it be reverted? The caller holds the graph lock.
    fn look(&mut self, node: Bds, is_filter: bool) -> bool {
        if let Some(&revertible) = self.nodes.get(&node) {
            return revertible;
        }
        // SAFETY: the node is there.
        let drv = unsafe { (*node.as_ptr()).drv };
        // SAFETY: a driver is never freed; there is none without a medium.
        let mut revertible = unsafe { !drv.is_null() && (*drv).bdrv_snapshot_goto.is_some() };
        for (link, below) in freezable(node, is_filter) {
            if !link.is_frozen_by_others() {
                self.links.push(link);
                // QEMU reverts what is below where the node itself cannot be.
                revertible |= self.look(below, false);
            }
        }
        self.nodes.insert(node, revertible && !is_filter);
        revertible
    }
}

/// The block job that uses the node, if there is one: what it calls itself.
fn job_of(node: Bds) -> Option<String> {
    // SAFETY: main loop with the graph lock: the list does not change meanwhile; the description is
    // a new string.
    unsafe {
        let mut parent = sys::ba_bs_first_parent(node.as_ptr());
        while !parent.is_null() {
            let class = (*parent).klass;
            if (*class).stay_at_node && !driver::is_staying_link(class) {
                return Some(glib::take_text(sys::ba_child_description(parent)));
            }
            parent = sys::ba_bs_next_parent(parent);
        }
    }
    None
}

/// What is below one filter stays as it is until this is dropped: at the latest when the filter
/// closes, because QEMU asserts that the links of a closing node are not frozen.
#[derive(Debug)]
pub struct Seal {
    links: Vec<Link>,
    bitmaps: Vec<Bitmap>,
    starts: Vec<Start>,
    _blockers: [OpBlocker; 2],
}

// SAFETY: only the main loop uses what is inside.
unsafe impl Send for Seal {}
// SAFETY: as for `Send`.
unsafe impl Sync for Seal {}

impl Seal {
    /// Seals the graph below a filter. Commands on its disk and its fleecing image are refused for
    /// this reason.
    ///
    /// # Errors
    /// A block job is at work there, or there is no memory.
    pub fn new(
        main_loop: MainLoop,
        filter: Bds,
        [source, target]: [Bds; 2],
        reason: &str,
    ) -> Result<Self, Error> {
        let mut below = Below::default();
        {
            let _lock = GraphReader::new();
            check_jobs(main_loop, filter)?;
            below.look(filter, true);
        }
        let blockers = [source, target].map(|node| OpBlocker::new(main_loop, node, reason));
        below.links.iter().for_each(|link| link.freeze());
        let starts = below.nodes.keys().map(|&node| Start::of(node)).collect();
        let mut this =
            Self { links: below.links, bitmaps: Vec::new(), starts, _blockers: blockers };
        for (node, revertible) in below.nodes {
            if revertible {
                this.bitmaps.push(Bitmap::create_silent(main_loop, node)?);
            }
        }
        Ok(this)
    }

    /// What happened to the data although links and nodes are the same: reopened, a node may begin
    /// elsewhere in the one below.
    pub fn broken(&self, main_loop: MainLoop) -> Option<String> {
        let moved = self.starts.iter().find(|start| Start::of(start.node) != **start)?;
        let name = moved.node.node_name(main_loop);
        Some(format!("node '{name}' was reopened with another offset"))
    }
}

/// Where a node's data begins in the node below.
#[derive(Debug, PartialEq, Eq)]
struct Start {
    node: Bds,
    offset_bytes: u64,
}

impl Start {
    fn of(node: Bds) -> Self {
        // SAFETY: main loop; a node below a filter stays, and has options as long as it is open.
        let offset_bytes =
            unsafe { sys::ba_qdict_get_size((*node.as_ptr()).options, c"offset".as_ptr()) };
        Self { node, offset_bytes }
    }
}

impl Drop for Seal {
    fn drop(&mut self) {
        let Some(main_loop) = MainLoop::current() else { return };
        for link in self.links.drain(..) {
            link.thaw();
        }
        for bitmap in self.bitmaps.drain(..) {
            // Nobody can use a bitmap without a name.
            drop(bitmap.release(main_loop));
        }
    }
}

/// Lets our own change of the graph move the links to a node that only seals hold; they are frozen
/// again when this is dropped, wherever they lead then.
#[derive(Debug)]
pub(super) struct Thawed(Vec<Link>);

impl Thawed {
    pub(super) fn links_to(_: MainLoop, node: Bds) -> Self {
        let _lock = GraphReader::new();
        let frozen = frozen();
        let mut links = Vec::new();
        // SAFETY: main loop with the graph lock: the list of parents does not change meanwhile.
        unsafe {
            let mut parent = sys::ba_bs_first_parent(node.as_ptr());
            while let Some(link) = NonNull::new(parent).map(Link) {
                if frozen.contains_key(&link) {
                    links.push(link);
                }
                parent = sys::ba_bs_next_parent(parent);
            }
        }
        links.iter().for_each(|link| link.set_frozen(false));
        Self(links)
    }
}

impl Drop for Thawed {
    fn drop(&mut self) {
        self.0.iter().for_each(|link| link.set_frozen(true));
    }
}
