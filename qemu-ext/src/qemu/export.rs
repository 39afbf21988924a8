// SPDX-License-Identifier: GPL-2.0-or-later
//! Block exports (NBD and others) of a node, and how to end them.

use core::ptr::NonNull;

use qemu_ext_sys as sys;

use super::error::Slot;
use super::glib;
use super::graph::{Bds, Drained, ParentId};
use super::main_loop::MainLoop;

/// Calls the function with each export.
fn for_each(_: MainLoop, mut function: impl FnMut(&str, NonNull<sys::BlockExport>)) {
    let mut error = Slot::new();
    // SAFETY: main loop; the list is ours and freed below, its strings are copied.
    unsafe {
        let list = sys::qmp_query_block_exports(error.as_errp());
        let mut entry = list;
        while !entry.is_null() {
            let id = (*(*entry).value).id;
            if let Some(export) = NonNull::new(sys::blk_exp_find(id)) {
                function(&glib::text(id), export);
            }
            entry = (*entry).next;
        }
        sys::qapi_free_BlockExportInfoList(list);
    }
}

/// Calls the function with each export of the node.
fn for_each_of(
    main_loop: MainLoop,
    node: Bds,
    mut function: impl FnMut(&str, NonNull<sys::BlockExport>),
) {
    for_each(main_loop, |id, export| {
        // SAFETY: the export is in QEMU's list, so it is there; the pointers are compared only.
        if unsafe { sys::ba_blk_exp_bs(export.as_ptr()) } == node.as_ptr() {
            function(id, export);
        }
    });
}

/// How an export appears among the parents of its node.
fn parent_of(export: NonNull<sys::BlockExport>) -> ParentId {
    // SAFETY: the export is in QEMU's list, so it is there.
    ParentId::of(unsafe { (*export.as_ptr()).blk }.cast())
}

/// The ids of all exports of the node.
pub fn ids_of(main_loop: MainLoop, node: Bds) -> Vec<String> {
    let mut ids = Vec::new();
    for_each_of(main_loop, node, |id, _| ids.push(id.to_owned()));
    ids
}

/// How the node's exports appear among its parents.
pub fn parents_of(main_loop: MainLoop, node: Bds) -> Vec<ParentId> {
    let mut parents = Vec::new();
    for_each_of(main_loop, node, |_, export| parents.push(parent_of(export)));
    parents
}

/// All exports: how they appear among the parents of their nodes, and their ids.
pub fn all(main_loop: MainLoop) -> Vec<(ParentId, String)> {
    let mut all = Vec::new();
    for_each(main_loop, |id, export| all.push((parent_of(export), id.to_owned())));
    all
}

/// An export with a reference of ours, so that it is deleted when we say so and not before.
#[derive(Debug)]
pub struct HeldExport {
    export: NonNull<sys::BlockExport>,
    id: String,
}

// SAFETY: only the main loop uses the pointer.
unsafe impl Send for HeldExport {}

impl HeldExport {
    /// Holds the export of this id.
    pub fn new(_: MainLoop, id: &str) -> Option<Self> {
        let name = glib::c_string(id);
        // SAFETY: main loop.
        let export = NonNull::new(unsafe { sys::blk_exp_find(name.as_ptr()) })?;
        // An export that nobody holds any more is about to be deleted.
        // SAFETY: main loop; it is in the list, so it is there.
        unsafe {
            if sys::ba_blk_exp_refcount(export.as_ptr()) == 0 {
                return None;
            }
            sys::blk_exp_ref(export.as_ptr());
        }
        Some(Self { export, id: id.to_owned() })
    }

    /// The export's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Disconnects its clients; does not wait for them.
    pub fn request_shutdown(&self, _: MainLoop) {
        // SAFETY: main loop, outside of coroutines; we hold the export. Asking twice is allowed.
        unsafe { sys::blk_exp_request_shutdown(self.export.as_ptr()) };
    }

    /// Whether nobody but us holds it.
    pub fn is_idle(&self, _: MainLoop) -> bool {
        // SAFETY: we hold the export.
        unsafe { sys::ba_blk_exp_refcount(self.export.as_ptr()) <= 1 }
    }

    /// Gives our reference up; the export is deleted soon after if it was the last one.
    pub fn release(self, _: &Drained) -> Ended {
        // SAFETY: main loop; the reference is ours and given up once.
        unsafe { sys::blk_exp_unref(self.export.as_ptr()) };
        Ended { export: self.export, id: self.id }
    }
}

/// An export whose deletion is on its way.
#[derive(Debug)]
pub struct Ended {
    export: NonNull<sys::BlockExport>,
    id: String,
}

impl Ended {
    /// Whether it is deleted.
    pub fn is_gone(&self, _: MainLoop) -> bool {
        let name = glib::c_string(&self.id);
        // SAFETY: main loop; the pointers are compared only.
        unsafe { sys::blk_exp_find(name.as_ptr()) != self.export.as_ptr() }
    }
}
