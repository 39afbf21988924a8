// SPDX-License-Identifier: GPL-2.0-or-later
//! Coroutines (`include/qemu/coroutine.h`) and the graph lock they need
//! (`include/block/graph-lock.h`).

use core::cell::Cell;
use core::ffi::{c_int, c_void};
use core::ptr::NonNull;
use std::marker::PhantomData;

use qemu_ext_sys as sys;

use super::graph::Bds;
use super::guard;
use crate::fault;

/// Proof that the code runs in a coroutine that holds the graph's read lock.
///
/// Driver callbacks get it from their caller; background coroutines take it around each I/O.
#[derive(Debug)]
pub struct CoGraph<'a> {
    owned: bool,
    not_send: PhantomData<(&'a (), *const ())>,
}

impl CoGraph<'_> {
    /// The caller's lock.
    ///
    /// # Safety
    /// The caller runs in a coroutine and holds the graph's read lock for the value's life.
    pub unsafe fn of_caller() -> Self {
        Self { owned: false, not_send: PhantomData }
    }

    /// Takes the lock for a background coroutine.
    ///
    /// # Safety
    /// The caller runs in a coroutine.
    unsafe fn take() -> Self {
        // SAFETY: in a coroutine, says the caller.
        unsafe { sys::bdrv_graph_co_rdlock() };
        Self { owned: true, not_send: PhantomData }
    }
}

impl Drop for CoGraph<'_> {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: taken in `take`, by the same coroutine.
            unsafe { sys::bdrv_graph_co_rdunlock() };
        }
    }
}

/// Proof that the code runs in a coroutine.
#[derive(Debug, Clone, Copy)]
pub struct InCoroutine(PhantomData<*const ()>);

impl InCoroutine {
    /// The calling coroutine.
    ///
    /// # Safety
    /// The caller runs in a coroutine.
    pub unsafe fn new() -> Self {
        Self(PhantomData)
    }

    /// Takes the graph's read lock.
    pub fn lock_graph(self) -> CoGraph<'static> {
        // SAFETY: by type invariant this is a coroutine.
        unsafe { CoGraph::take() }
    }
}

/// A coroutine that waits.
#[derive(Debug)]
pub struct Waiting(NonNull<sys::Coroutine>);

// SAFETY: `aio_co_wake` may be called from any thread.
unsafe impl Send for Waiting {}

impl Waiting {
    /// The calling coroutine, to be published before [`park`].
    pub fn current() -> Self {
        // SAFETY: valid anywhere; inside a coroutine it is that coroutine.
        let current = unsafe { sys::qemu_coroutine_self() };
        Self(NonNull::new(current).expect("QEMU always has a current coroutine"))
    }

    /// Whether it is the calling coroutine: published, and not parked.
    pub fn is_current(&self) -> bool {
        // SAFETY: valid anywhere.
        self.0.as_ptr() == unsafe { sys::qemu_coroutine_self() }
    }

    /// Resumes it, in its own AioContext. Each published value is woken exactly once, and its
    /// coroutine parks exactly once for it; a wake-up from another thread, or from itself, that
    /// comes before the park is scheduled and runs after it.
    pub fn wake(self) {
        // SAFETY: the coroutine has published itself and parks (see above).
        unsafe {
            if self.is_current() {
                sys::aio_co_schedule(sys::qemu_get_current_aio_context(), self.0.as_ptr());
            } else {
                sys::aio_co_wake(self.0.as_ptr());
            }
        }
    }
}

/// Runs a call that blocks in one of QEMU's worker threads while the calling coroutine waits. None
/// when it panicked.
pub fn in_worker<T: Send, F: FnOnce() -> T + Send>(_: &CoGraph<'_>, function: F) -> Option<T> {
    struct Call<F, T> {
        function: Option<F>,
        result: Option<T>,
    }
    extern "C" fn run<F: FnOnce() -> T, T>(opaque: *mut c_void) -> c_int {
        // SAFETY: the coroutine that owns it waits for us.
        let call = unsafe { &mut *opaque.cast::<Call<F, T>>() };
        let function = call.function.take();
        call.result = guard(None, || {
            fault::point("worker");
            Some(function?())
        });
        0
    }
    let mut call = Call { function: Some(function), result: None };
    // SAFETY: in a coroutine by the witness; `call` lives until the function has run, since only
    // that lets us go on.
    unsafe { sys::thread_pool_submit_co(Some(run::<F, T>), (&raw mut call).cast()) };
    call.result
}

/// Suspends the calling coroutine until it is woken.
pub fn park() {
    // SAFETY: engine code that waits runs in coroutines only: all callbacks that reach it are
    // coroutine functions, and flushers are coroutines.
    unsafe { sys::qemu_coroutine_yield() };
}

/// Keeps a node busy: a drained section waits until the value is dropped.
#[derive(Debug)]
pub struct Busy(Bds);

impl Busy {
    /// Counts a request on the node, which is alive: one of its requests or its driver's callbacks
    /// calls this.
    pub fn new(node: Bds) -> Self {
        // SAFETY: as stated.
        unsafe { sys::bdrv_inc_in_flight(node.as_ptr()) };
        Self(node)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        // SAFETY: counted in `new`; the node lives at least until now because it was busy.
        unsafe { sys::bdrv_dec_in_flight(self.0.as_ptr()) };
    }
}

/// What a background coroutine runs; it must not panic.
type Body = Box<dyn FnOnce(InCoroutine)>;

/// Runs `body` in a new coroutine in the node's AioContext. The node is busy until it ends.
pub fn spawn(node: Bds, body: impl FnOnce(InCoroutine) + 'static) {
    let task: Box<(Busy, Body)> = Box::new((Busy::new(node), Box::new(body)));
    // SAFETY: the entry takes the box over.
    let co = unsafe { sys::qemu_coroutine_create(Some(entry), Box::into_raw(task).cast()) };
    // SAFETY: the node is alive, as above.
    let context = unsafe { sys::bdrv_get_aio_context(node.as_ptr()) };
    // SAFETY: a new coroutine that nobody else enters.
    unsafe { sys::aio_co_enter(context, co) };
}

extern "C" fn entry(opaque: *mut c_void) {
    // SAFETY: `spawn` passes exactly this, once.
    let task = unsafe { Box::from_raw(opaque.cast::<(Busy, Body)>()) };
    let (_busy, body) = *task;
    // SAFETY: this is a coroutine's entry.
    let here = unsafe { InCoroutine::new() };
    guard((), move || body(here));
}

/// Work that several coroutines of one thread share, on the stack of the one that waits for it.
struct Shared<'a> {
    job: &'a dyn Fn(usize),
    count: usize,
    next: Cell<usize>,
    helpers: Cell<usize>,
    owner: *mut sys::Coroutine,
    owner_waits: Cell<bool>,
}

impl Shared<'_> {
    fn work(&self) {
        while self.next.get() < self.count {
            let index = self.next.get();
            self.next.set(index + 1);
            (self.job)(index);
        }
    }
}

extern "C" fn help(opaque: *mut c_void) {
    // SAFETY: `for_each` passes its own state and does not return before all helpers have ended.
    let shared = unsafe { &*opaque.cast::<Shared<'_>>() };
    guard((), || {
        fault::point("read_helper");
        shared.work();
    });
    shared.helpers.set(shared.helpers.get() - 1);
    if shared.helpers.get() == 0 && shared.owner_waits.get() {
        // SAFETY: it has yielded to be woken here; it runs when this coroutine has ended.
        unsafe { sys::aio_co_wake(shared.owner) };
    }
}

/// Calls `job` with 0 to `count - 1`, up to `width` of them side by side: in this coroutine and
/// in helpers of the same thread, for which it holds the graph lock. A panic of a helper's job is
/// swallowed: jobs must note their success.
pub fn for_each(_: &CoGraph<'_>, count: usize, width: usize, job: &dyn Fn(usize)) {
    let shared = Shared {
        job,
        count,
        next: Cell::new(0),
        helpers: Cell::new(0),
        // SAFETY: valid anywhere; the witness says that this is a coroutine.
        owner: unsafe { sys::qemu_coroutine_self() },
        owner_waits: Cell::new(false),
    };
    for _ in 1..count.min(width) {
        shared.helpers.set(shared.helpers.get() + 1);
        let opaque = core::ptr::from_ref(&shared).cast_mut().cast();
        // SAFETY: `shared` outlives the helper, see the wait below.
        unsafe { sys::qemu_coroutine_enter(sys::qemu_coroutine_create(Some(help), opaque)) };
    }
    // Whatever happens to our own part, the helpers use our stack until they have ended.
    let own = super::try_guard(|| shared.work());
    while shared.helpers.get() > 0 {
        shared.owner_waits.set(true);
        park();
        shared.owner_waits.set(false);
    }
    assert!(own.is_some(), "a parallel job panicked");
}
