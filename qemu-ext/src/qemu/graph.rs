// SPDX-License-Identifier: GPL-2.0-or-later
//! Nodes of QEMU's block graph: finding, opening, replacing and draining them.

use core::ffi::{c_int, c_void};
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU32, Ordering};

use qemu_ext_sys as sys;

use super::error::{Error, Slot};
use super::glib;
use super::main_loop::MainLoop;
use super::seal::Thawed;

/// A node of the block graph.
///
/// It is a plain pointer: whoever keeps one knows (by a reference, by a parent, or because the big
/// lock was not released since) that the node is still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bds(NonNull<sys::BlockDriverState>);

// SAFETY: the pointer itself may be passed between threads; what may be called with it, and where,
// is stated by each function that takes one.
unsafe impl Send for Bds {}
// SAFETY: as for `Send`.
unsafe impl Sync for Bds {}

impl Bds {
    /// Wraps a pointer from QEMU; `None` for null.
    pub fn from_ptr(ptr: *mut sys::BlockDriverState) -> Option<Self> {
        NonNull::new(ptr).map(Self)
    }

    /// The pointer, for a call into QEMU.
    pub fn as_ptr(self) -> *mut sys::BlockDriverState {
        self.0.as_ptr()
    }

    /// The node of this name.
    pub fn find(_: MainLoop, node_name: &str) -> Option<Self> {
        let name = glib::c_string(node_name);
        // SAFETY: main loop.
        Self::from_ptr(unsafe { sys::bdrv_find_node(name.as_ptr()) })
    }

    /// All nodes.
    pub fn all(_: MainLoop) -> Vec<Self> {
        let mut all = Vec::new();
        // SAFETY: main loop: the list does not change meanwhile.
        let mut next = unsafe { sys::bdrv_next_all_states(ptr::null_mut()) };
        while let Some(node) = Self::from_ptr(next) {
            all.push(node);
            // SAFETY: as above.
            next = unsafe { sys::bdrv_next_all_states(node.as_ptr()) };
        }
        all
    }

    /// The node's name.
    pub fn node_name(self, _: MainLoop) -> String {
        // SAFETY: main loop, the node is there.
        unsafe { glib::text(sys::bdrv_get_node_name(self.as_ptr())) }
    }

    /// The name of the node's driver; empty without a medium.
    pub fn driver(self, _: MainLoop) -> String {
        // SAFETY: main loop, the node is there.
        unsafe { glib::text(sys::bdrv_get_format_name(self.as_ptr())) }
    }

    /// The first node at or below this one that is no filter.
    pub fn skip_filters(self, _: MainLoop) -> Self {
        let _lock = GraphReader::new();
        // SAFETY: main loop with the graph lock.
        Self::from_ptr(unsafe { sys::bdrv_skip_filters(self.as_ptr()) }).unwrap_or(self)
    }

    /// The size in bytes.
    ///
    /// # Errors
    /// The device's error.
    pub fn length(self, _: MainLoop) -> Result<u64, Error> {
        // SAFETY: main loop, outside of coroutines.
        let size = unsafe { sys::bdrv_getlength(self.as_ptr()) };
        u64::try_from(size).map_err(|_| {
            let errno = i32::try_from(-size).unwrap_or(i32::MAX);
            Error::new(std::io::Error::from_raw_os_error(errno).to_string())
        })
    }

    /// The size in bytes of a node that was opened; 0 if it cannot be had. Main loop.
    pub fn size_bytes(self) -> u64 {
        MainLoop::current().and_then(|main_loop| self.length(main_loop).ok()).unwrap_or(0)
    }

    /// Whether there is a medium.
    pub fn is_inserted(self, _: MainLoop) -> bool {
        // SAFETY: main loop, outside of coroutines.
        unsafe { sys::bdrv_is_inserted(self.as_ptr()) }
    }

    /// Whether it was opened read-only.
    pub fn is_read_only(self, _: MainLoop) -> bool {
        // SAFETY: main loop.
        unsafe { sys::bdrv_is_read_only(self.as_ptr()) }
    }

    /// Whether it is a SCSI generic device, whose requests bypass filters.
    pub fn is_scsi_generic(self, _: MainLoop) -> bool {
        // SAFETY: main loop.
        unsafe { sys::bdrv_is_sg(self.as_ptr()) }
    }

    /// Whether a user of the node may make it grow, as a format does with its storage.
    pub fn may_grow(self, main_loop: MainLoop) -> bool {
        self.used_for(main_loop) & u64::from(sys::BLK_PERM_RESIZE) != 0
    }

    /// Whether a user of the node may write to it.
    pub fn may_be_written(self, main_loop: MainLoop) -> bool {
        self.used_for(main_loop) & u64::from(sys::BLK_PERM_WRITE) != 0
    }

    /// The permissions that its users have.
    fn used_for(self, _: MainLoop) -> u64 {
        let _lock = GraphReader::new();
        let (mut perm, mut shared) = (0, 0);
        // SAFETY: main loop with the graph lock; out pointers of ours.
        unsafe {
            sys::bdrv_get_cumulative_perm(self.as_ptr(), &raw mut perm, &raw mut shared);
        }
        perm
    }

    /// Whether nothing was written to it since it was opened. Exact while everything is drained.
    pub fn is_unwritten(self, _: MainLoop) -> bool {
        // SAFETY: the node is there; the counter is an atomic for everybody.
        let counter = unsafe { AtomicU32::from_ptr(&raw mut (*self.as_ptr()).write_gen) };
        counter.load(Ordering::SeqCst) == 0
    }

    /// Writes out what caches hold of it.
    ///
    /// # Errors
    /// The device's error.
    pub fn flush(self, _: MainLoop) -> Result<(), Error> {
        // SAFETY: main loop, outside of coroutines.
        match unsafe { sys::bdrv_flush(self.as_ptr()) } {
            0.. => Ok(()),
            errno => Err(Error::new(std::io::Error::from_raw_os_error(-errno).to_string())),
        }
    }

    /// The name of the file that a node of a protocol opened.
    pub fn file_name(self, _: MainLoop) -> String {
        // SAFETY: main loop, the node is there; the array ends in a zero.
        unsafe { glib::text((*self.as_ptr()).exact_filename.as_ptr()) }
    }

    /// Whether it is a zoned device, whose own requests filters do not pass on.
    pub fn is_zoned(self, _: MainLoop) -> bool {
        // SAFETY: the node is there.
        unsafe { (*self.as_ptr()).bl.zoned != sys::BLK_Z_NONE }
    }

    /// Whether it was handed over to another process (migration).
    pub fn is_inactive(self, _: MainLoop) -> bool {
        let _lock = GraphReader::new();
        // SAFETY: main loop with the graph lock.
        unsafe { sys::bdrv_is_inactive(self.as_ptr()) }
    }

    /// The open flags that a filter above it must share.
    pub fn inherited_flags(self, _: MainLoop) -> u32 {
        const SHARED: u32 = sys::BDRV_O_RDWR | sys::BDRV_O_UNMAP | sys::BDRV_O_CACHE_MASK;
        // SAFETY: main loop.
        let flags = unsafe { sys::bdrv_get_flags(self.as_ptr()) };
        u32::try_from(flags).unwrap_or(0) & SHARED
    }

    /// Whether something (a block job) forbids backups of the node, and what it says.
    pub fn backup_forbidden(self, _: MainLoop) -> Option<Error> {
        let _lock = GraphReader::new();
        let mut error = Slot::new();
        // SAFETY: main loop with the graph lock.
        let blocked = unsafe {
            sys::bdrv_op_is_blocked(
                self.as_ptr(),
                sys::BLOCK_OP_TYPE_BACKUP_SOURCE,
                error.as_errp(),
            )
        };
        blocked.then(|| error.take())
    }

    /// The node behind its `file` link: what a filter filters, where `raw` has its data.
    pub fn below(self, _: MainLoop) -> Option<Self> {
        let _lock = GraphReader::new();
        // SAFETY: main loop with the graph lock; the link of a node that is there.
        unsafe {
            let link = (*self.as_ptr()).file;
            if link.is_null() { None } else { Self::from_ptr((*link).bs) }
        }
    }

    /// Whatever uses the node.
    pub fn parents(self, _: MainLoop) -> Vec<Parent> {
        let _lock = GraphReader::new();
        let mut parents = Vec::new();
        // SAFETY: main loop with the graph lock: the list does not change meanwhile, and each
        // parent's description is a new string.
        unsafe {
            let mut child = sys::ba_bs_first_parent(self.as_ptr());
            while !child.is_null() {
                parents.push(Parent {
                    who: ParentId((*child).opaque),
                    description: glib::take_text(sys::ba_child_description(child)),
                });
                child = sys::ba_bs_next_parent(child);
            }
        }
        parents
    }
}

/// Identifies a parent among others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ParentId(*mut c_void);

impl ParentId {
    /// The parent that QEMU knows by this pointer.
    pub fn of(ptr: *mut c_void) -> Self {
        Self(ptr)
    }

    /// Whether QEMU knows it by this pointer.
    pub fn is(self, ptr: *mut c_void) -> bool {
        self.0 == ptr
    }
}

/// A user of a node.
#[derive(Debug)]
pub struct Parent {
    /// Who it is.
    pub who: ParentId,
    /// What it calls itself.
    pub description: String,
}

/// The graph lock for reading, as the main loop takes it.
pub(super) struct GraphReader;

impl GraphReader {
    pub(super) fn new() -> Self {
        // SAFETY: all callers hold the proof that this is the main loop.
        unsafe { sys::ba_graph_rdlock_main_loop() };
        Self
    }
}

impl Drop for GraphReader {
    fn drop(&mut self) {
        // SAFETY: taken in `new`.
        unsafe { sys::ba_graph_rdunlock_main_loop() };
    }
}

/// How a snapshot node is opened: "writable", because only such a node can be exported to clients
/// that discard.
pub const SNAPSHOT_FLAGS: u32 = sys::BDRV_O_RDWR | sys::BDRV_O_UNMAP;

/// A reference to a node.
#[derive(Debug)]
pub struct NodeRef {
    node: Bds,
    _main_loop: MainLoop,
}

impl NodeRef {
    /// One more reference.
    pub fn new(main_loop: MainLoop, node: Bds) -> Self {
        // SAFETY: main loop, the node is there.
        unsafe { sys::bdrv_ref(node.as_ptr()) };
        Self { node, _main_loop: main_loop }
    }

    /// Opens a node with these string options.
    ///
    /// # Errors
    /// QEMU's error.
    pub fn open(main_loop: MainLoop, options: &[(&str, &str)], flags: u32) -> Result<Self, Error> {
        let mut error = Slot::new();
        // SAFETY: main loop; `bdrv_open` takes the dictionary over.
        let node = unsafe {
            let dict = sys::qdict_new();
            for (key, value) in options {
                let (key, value) = (glib::c_string(key), glib::c_string(value));
                sys::qdict_put_str(dict, key.as_ptr(), value.as_ptr());
            }
            let flags = c_int::try_from(flags).unwrap_or(0);
            sys::bdrv_open(ptr::null(), ptr::null(), dict, flags, error.as_errp())
        };
        match Bds::from_ptr(node) {
            Some(node) => Ok(Self { node, _main_loop: main_loop }),
            None => Err(error.take()),
        }
    }

    /// The node.
    pub fn node(&self) -> Bds {
        self.node
    }
}

impl Drop for NodeRef {
    fn drop(&mut self) {
        // SAFETY: the main loop still (it cannot leave the thread); the reference is ours.
        unsafe { sys::bdrv_unref(self.node.as_ptr()) };
    }
}

/// A BlockBackend of someone: the guest device's or the monitor's end of the graph.
#[derive(Debug, Clone, Copy)]
pub struct Backend(NonNull<sys::BlockBackend>);

impl Backend {
    /// The backend of this name.
    pub fn find(_: MainLoop, name: &str) -> Option<Self> {
        let name = glib::c_string(name);
        // SAFETY: main loop.
        NonNull::new(unsafe { sys::blk_by_name(name.as_ptr()) }).map(Self)
    }

    /// The backend of the device with this qdev id.
    pub fn find_by_qdev_id(_: MainLoop, id: &str) -> Option<Self> {
        let id = glib::c_string(id);
        // SAFETY: main loop.
        NonNull::new(unsafe { sys::ba_blk_by_qdev_id(id.as_ptr()) }).map(Self)
    }

    /// All of them.
    pub fn all(_: MainLoop) -> Vec<Self> {
        let mut all = Vec::new();
        // SAFETY: main loop: the list does not change meanwhile.
        let mut next = unsafe { sys::blk_all_next(ptr::null_mut()) };
        while let Some(backend) = NonNull::new(next) {
            all.push(Self(backend));
            // SAFETY: as above.
            next = unsafe { sys::blk_all_next(backend.as_ptr()) };
        }
        all
    }

    /// Its root node; none without a medium.
    pub fn node(self, _: MainLoop) -> Option<Bds> {
        // SAFETY: main loop.
        Bds::from_ptr(unsafe { sys::blk_bs(self.0.as_ptr()) })
    }

    /// Its name; empty if the monitor does not know it.
    pub fn name(self, _: MainLoop) -> String {
        // SAFETY: main loop.
        unsafe { glib::text(sys::blk_name(self.0.as_ptr())) }
    }

    /// The type of the guest device; empty if there is none.
    pub fn device_type(self, _: MainLoop) -> String {
        // SAFETY: main loop.
        unsafe { glib::text(sys::ba_blk_device_type(self.0.as_ptr())) }
    }

    /// How it appears among the parents of its node.
    pub fn id(self) -> ParentId {
        ParentId(self.0.as_ptr().cast())
    }
}

/// A backend without a device, as `-drive` makes them: it claims permissions that it does not use.
/// While this exists it claims none, so that its node can be used as a fleecing image.
#[derive(Debug)]
pub struct Relaxed {
    backend: Backend,
    perm: u64,
    shared: u64,
}

// SAFETY: only the main loop uses the pointer (see `drop`).
unsafe impl Send for Relaxed {}

impl Relaxed {
    /// Takes the backend's claims away.
    ///
    /// # Errors
    /// QEMU's error.
    pub fn new(_: MainLoop, backend: Backend) -> Result<Self, Error> {
        let blk = backend.0.as_ptr();
        let (mut perm, mut shared) = (0, 0);
        let mut error = Slot::new();
        // SAFETY: main loop; the backend is there, and our reference keeps it.
        unsafe {
            sys::blk_get_perm(blk, &raw mut perm, &raw mut shared);
            if sys::blk_set_perm(blk, 0, u64::from(sys::BLK_PERM_ALL), error.as_errp()) < 0 {
                return Err(error.take());
            }
            sys::blk_ref(blk);
        }
        Ok(Self { backend, perm, shared })
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        let Some(main_loop) = MainLoop::current() else { return };
        let blk = self.backend.0.as_ptr();
        let mut error = Slot::new();
        // SAFETY: main loop; the reference is ours. A device that came meanwhile knows better
        // what it needs.
        unsafe {
            if self.backend.device_type(main_loop).is_empty() {
                sys::blk_set_perm(blk, self.perm, self.shared, error.as_errp());
            }
            sys::blk_unref(blk);
        }
    }
}

/// An anonymous BlockBackend of our own: it holds a node, uses nothing of it, and keeps the node in
/// its AioContext unless told otherwise.
#[derive(Debug)]
pub struct Holder(Backend);

// SAFETY: only the main loop uses the pointer (see `drop`).
unsafe impl Send for Holder {}

impl Holder {
    /// Holds the node, where it is.
    ///
    /// # Errors
    /// QEMU's error.
    pub fn new(_: MainLoop, node: Bds) -> Result<Self, Error> {
        let mut error = Slot::new();
        // SAFETY: main loop; the node is there.
        unsafe {
            let context = sys::bdrv_get_aio_context(node.as_ptr());
            let backend = sys::blk_new(context, 0, u64::from(sys::BLK_PERM_ALL));
            let holder = Self(Backend(NonNull::new_unchecked(backend)));
            if sys::blk_insert_bs(backend, node.as_ptr(), error.as_errp()) < 0 {
                return Err(error.take());
            }
            Ok(holder)
        }
    }

    /// The node that it holds.
    pub fn node(&self, main_loop: MainLoop) -> Option<Bds> {
        self.0.node(main_loop)
    }

    /// Holds this node: a job or an overlay may have put itself in its place.
    ///
    /// # Errors
    /// QEMU's error; it holds what it held.
    pub fn hold_again(&self, _: MainLoop, node: Bds) -> Result<(), Error> {
        let mut error = Slot::new();
        // SAFETY: main loop; backend and node are there.
        let result =
            unsafe { sys::blk_replace_bs(self.0.0.as_ptr(), node.as_ptr(), error.as_errp()) };
        if result < 0 { Err(error.take()) } else { Ok(()) }
    }

    /// Whether the node may be moved to another AioContext.
    pub fn allow_context_change(&self, _: MainLoop, allow: bool) {
        // SAFETY: main loop; the backend is ours.
        unsafe { sys::blk_set_allow_aio_context_change(self.0.0.as_ptr(), allow) };
    }

    /// How it appears among the parents of its node.
    pub fn id(&self) -> ParentId {
        self.0.id()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if MainLoop::current().is_some() {
            // SAFETY: main loop; the reference is ours.
            unsafe { sys::blk_unref(self.0.0.as_ptr()) };
        }
    }
}

/// While it exists, no request of anyone is in flight and none is started.
#[derive(Debug)]
pub struct Drained(MainLoop);

impl Drained {
    /// Waits for all requests in flight and holds new ones.
    pub fn new(main_loop: MainLoop) -> Self {
        // SAFETY: main loop, outside of coroutines.
        unsafe { sys::bdrv_drain_all_begin() };
        Self(main_loop)
    }

    /// The main loop, in which this lives.
    pub fn main_loop(&self) -> MainLoop {
        self.0
    }

    /// Puts `to` in the place of `from` for all its users: also for those whose links are sealed.
    ///
    /// # Errors
    /// QEMU's error; nothing was changed.
    pub fn replace_node(&self, from: Bds, to: Bds) -> Result<(), Error> {
        let mut error = Slot::new();
        let _thawed = Thawed::links_to(self.0, from);
        // SAFETY: main loop, everything is quiesced, both nodes are there.
        let result = unsafe {
            sys::bdrv_graph_wrlock();
            let result = sys::bdrv_replace_node(from.as_ptr(), to.as_ptr(), error.as_errp());
            sys::bdrv_graph_wrunlock();
            result
        };
        if result < 0 { Err(error.take()) } else { Ok(()) }
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        // SAFETY: begun in `new`, in the same thread.
        unsafe { sys::bdrv_drain_all_end() };
    }
}
