// SPDX-License-Identifier: GPL-2.0-or-later
//! Timers of the main thread.

use core::ffi::c_void;
use core::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicPtr, Ordering};

use qemu_ext_sys as sys;

use super::main_loop::MainLoop;
use super::try_guard;
use crate::fault;

/// After a panic a timer fires again in so many milliseconds: what it watches must not be left alone.
const AFTER_PANIC_MS: u32 = 1000;

/// What a timer calls; it exists as long as the process.
struct Alarm {
    callback: fn(MainLoop),
    timer: AtomicPtr<sys::QEMUTimer>,
}

/// A timer that calls one function. It exists as long as the process.
#[derive(Debug)]
pub struct Timer(NonNull<sys::QEMUTimer>);

// SAFETY: arming and stopping a timer is allowed from every thread.
unsafe impl Send for Timer {}

extern "C" fn fire(opaque: *mut c_void) {
    // SAFETY: `Timer::new` leaked it.
    let alarm = unsafe { &*opaque.cast::<Alarm>() };
    let called = try_guard(|| {
        fault::point("timer");
        if let Some(main_loop) = MainLoop::current() {
            (alarm.callback)(main_loop);
        }
    });
    if called.is_none()
        && let Some(timer) = NonNull::new(alarm.timer.load(Ordering::Acquire))
    {
        Timer(timer).arm_in_ms(AFTER_PANIC_MS);
    }
}

impl Timer {
    /// A timer of the main context that is not armed. It fires in nested waits too.
    pub fn new(_: MainLoop, callback: fn(MainLoop)) -> Option<Self> {
        // SAFETY: context and alarm exist as long as the process.
        Self::with(callback, |alarm| unsafe {
            sys::ba_aio_timer_new_ms(
                sys::qemu_get_aio_context(),
                sys::QEMU_CLOCK_REALTIME,
                Some(fire),
                alarm,
            )
        })
    }

    /// A timer that is not armed and fires in the main loop itself, never in a nested wait.
    pub fn new_outside_polls(_: MainLoop, callback: fn(MainLoop)) -> Option<Self> {
        // SAFETY: the alarm exists as long as the process.
        Self::with(callback, |alarm| unsafe {
            sys::ba_main_loop_timer_new_ms(sys::QEMU_CLOCK_REALTIME, Some(fire), alarm)
        })
    }

    fn with(
        callback: fn(MainLoop),
        make: impl FnOnce(*mut c_void) -> *mut sys::QEMUTimer,
    ) -> Option<Self> {
        let alarm = Alarm { callback, timer: AtomicPtr::new(null_mut()) };
        let alarm: &'static Alarm = Box::leak(Box::new(alarm));
        let timer = make(core::ptr::from_ref(alarm).cast_mut().cast());
        alarm.timer.store(timer, Ordering::Release);
        NonNull::new(timer).map(Self)
    }

    /// Lets it fire once, in `ms` milliseconds from now.
    pub fn arm_in_ms(&self, ms: u32) {
        // SAFETY: the timer exists as long as the process.
        unsafe {
            let now = sys::qemu_clock_get_ms(sys::QEMU_CLOCK_REALTIME);
            sys::ba_timer_mod_ms(self.0.as_ptr(), now.saturating_add(i64::from(ms)));
        }
    }
}
