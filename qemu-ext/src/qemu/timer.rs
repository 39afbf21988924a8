// SPDX-License-Identifier: GPL-2.0-or-later
//! A timer of the main context, which fires in nested waits too.

use core::ffi::c_void;
use core::ptr::NonNull;

use qemu_ext_sys as sys;

use super::guard;
use super::main_loop::MainLoop;
use crate::fault;

/// A timer that calls one function. It exists as long as the process.
#[derive(Debug)]
pub struct Timer(NonNull<sys::QEMUTimer>);

// SAFETY: arming and stopping a timer is allowed from every thread.
unsafe impl Send for Timer {}

extern "C" fn fire(opaque: *mut c_void) {
    guard((), || {
        fault::point("timer");
        // SAFETY: `Timer::new` stored exactly such a function.
        let callback = unsafe { core::mem::transmute::<*mut c_void, fn(MainLoop)>(opaque) };
        if let Some(main_loop) = MainLoop::current() {
            callback(main_loop);
        }
    });
}

impl Timer {
    /// A timer that is not armed.
    pub fn new(_: MainLoop, callback: fn(MainLoop)) -> Option<Self> {
        // SAFETY: the context exists as long as the process, the callback is a plain function.
        let timer = unsafe {
            sys::ba_aio_timer_new_ms(
                sys::qemu_get_aio_context(),
                sys::QEMU_CLOCK_REALTIME,
                Some(fire),
                callback as *mut c_void,
            )
        };
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
