// SPDX-License-Identifier: GPL-2.0-or-later
//! The main loop: the proof that one is in it, and ways to get there from a coroutine or thread.

use core::ffi::c_void;
use core::marker::PhantomData;
use std::time::{Duration, Instant};

use qemu_ext_sys as sys;

use super::guard;
use crate::fault;

/// Proof that the running code holds the big lock and is in no coroutine, so that it may look at
/// the block graph, change it and poll. It cannot leave the thread.
#[derive(Debug, Clone, Copy)]
pub struct MainLoop(PhantomData<*mut ()>);

impl MainLoop {
    /// The proof, if it can be had here.
    pub fn current() -> Option<Self> {
        // SAFETY: the function only asks.
        unsafe { sys::ba_in_main_loop() }.then_some(Self(PhantomData))
    }

    /// Whether the machine runs or has run; false where there is none.
    pub fn vm_has_run(self) -> bool {
        // SAFETY: the function only asks.
        unsafe { sys::ba_vm_has_run() }
    }

    /// Runs what is due in the main loop until the condition holds; gives up after `limit`.
    pub fn poll_until(self, limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
        let start = Instant::now();
        while !condition() {
            if start.elapsed() >= limit {
                return false;
            }
            // SAFETY: we are in the main loop and in no coroutine, so we may poll its context.
            let progress = unsafe { sys::ba_aio_poll(sys::qemu_get_aio_context(), false) };
            if !progress {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        true
    }
}

type Task = Box<dyn FnOnce(MainLoop) + Send>;

extern "C" fn run_task<const IN_POLLS: bool>(opaque: *mut c_void) {
    // SAFETY: `schedule` made the pointer of a box, for this one call.
    let task = unsafe { Box::from_raw(opaque.cast::<Task>()) };
    guard((), || {
        fault::point(if IN_POLLS { "task_in_polls" } else { "task" });
        if let Some(main_loop) = MainLoop::current() {
            task(main_loop);
        }
    });
}

/// Runs the task soon in the main loop itself, never inside another command's wait. May be called
/// from any thread.
pub fn schedule(task: Task) {
    let opaque = Box::into_raw(Box::new(task)).cast();
    // SAFETY: the callback takes the box over, once.
    unsafe {
        sys::ba_bh_schedule_oneshot(sys::ba_main_loop_context(), Some(run_task::<false>), opaque);
    }
}

/// Runs the task soon in the main context, also inside waits that poll it, such as a drain. May be
/// called from any thread.
pub fn schedule_in_polls(task: Task) {
    let opaque = Box::into_raw(Box::new(task)).cast();
    // SAFETY: as above.
    unsafe {
        sys::ba_bh_schedule_oneshot(sys::qemu_get_aio_context(), Some(run_task::<true>), opaque);
    }
}

/// A call from a coroutine to the main loop, on the coroutine's stack.
struct Call<F, T> {
    function: Option<F>,
    result: Option<T>,
    coroutine: *mut sys::Coroutine,
}

extern "C" fn run_call<F: FnOnce(MainLoop) -> T, T>(opaque: *mut c_void) {
    // SAFETY: the coroutine that owns it does not run before it is woken below.
    let call = unsafe { &mut *opaque.cast::<Call<F, T>>() };
    let function = call.function.take();
    let coroutine = call.coroutine;
    call.result = guard(None, || {
        fault::point("call_from_coroutine");
        Some(function?(MainLoop::current()?))
    });
    // SAFETY: it yielded before this bottom half could run, and nobody else wakes it.
    unsafe { sys::aio_co_wake(coroutine) };
}

/// Runs the function in the main loop, outside of coroutines, while the calling coroutine waits.
/// None when it panicked, or when the caller is no coroutine.
pub fn call_from_coroutine<F: FnOnce(MainLoop) -> T, T>(function: F) -> Option<T> {
    // SAFETY: the function only asks.
    if !unsafe { sys::qemu_in_coroutine() } {
        return None;
    }
    let mut call = Call {
        function: Some(function),
        result: None,
        // SAFETY: we are in a coroutine.
        coroutine: unsafe { sys::qemu_coroutine_self() },
    };
    // SAFETY: `call` lives until the bottom half has run, since only that wakes us.
    unsafe {
        sys::ba_bh_schedule_oneshot(
            sys::ba_main_loop_context(),
            Some(run_call::<F, T>),
            (&raw mut call).cast(),
        );
        sys::qemu_coroutine_yield();
    }
    call.result
}

/// Suspends the calling coroutine.
pub fn sleep_in_coroutine(time: Duration) {
    let nanoseconds = i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
    // SAFETY: the function only asks.
    if unsafe { sys::qemu_in_coroutine() } {
        // SAFETY: we are in a coroutine.
        unsafe { sys::qemu_co_sleep_ns(sys::QEMU_CLOCK_REALTIME, nanoseconds) };
    }
}
