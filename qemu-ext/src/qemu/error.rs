// SPDX-License-Identifier: GPL-2.0-or-later
//! Errors as QMP reports them.

use core::fmt;
use core::ptr;

use qemu_ext_sys as sys;

use super::glib;

/// An error's class in QMP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Generic,
    DeviceNotFound,
}

/// An error for the client.
#[derive(Debug, Clone)]
pub struct Error {
    class: Class,
    message: String,
}

impl Error {
    /// An error of the general class.
    pub fn new(message: impl Into<String>) -> Self {
        Self { class: Class::Generic, message: message.into() }
    }

    /// The error that a device does not exist.
    pub fn device_not_found(message: impl Into<String>) -> Self {
        Self { class: Class::DeviceNotFound, message: message.into() }
    }

    /// The same error, with what was going on put before it.
    #[must_use]
    pub fn context(self, what: &str) -> Self {
        Self { message: format!("{what}: {}", self.message), ..self }
    }

    /// Hands the error to a C caller.
    ///
    /// # Safety
    /// `errp` is what a C caller gave for its error: null, or a pointer to a null pointer.
    pub unsafe fn give(&self, errp: *mut *mut sys::Error) {
        let message = glib::c_string(&self.message);
        // SAFETY: `errp` is as the caller says; the message is copied.
        unsafe {
            match self.class {
                Class::Generic => sys::ba_error_setg(errp, message.as_ptr()),
                Class::DeviceNotFound => {
                    sys::ba_error_setg_device_not_found(errp, message.as_ptr());
                }
            }
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// A place for the error of one call into QEMU.
pub struct Slot(*mut sys::Error);

impl Slot {
    /// An empty place.
    pub fn new() -> Self {
        Self(ptr::null_mut())
    }

    /// What the call is given.
    pub fn as_errp(&mut self) -> *mut *mut sys::Error {
        &raw mut self.0
    }

    /// The error that the call left, or a general one if it left none.
    pub fn take(self) -> Error {
        if self.0.is_null() {
            return Error::new("unknown error");
        }
        // SAFETY: a call put a valid error there, and it is freed only when `self` is dropped.
        let (class, message) =
            unsafe { (sys::error_get_class(self.0), glib::text(sys::error_get_pretty(self.0))) };
        if class == sys::ERROR_CLASS_DEVICE_NOT_FOUND {
            Error::device_not_found(message)
        } else {
            Error::new(message)
        }
    }
}

impl Default for Slot {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // SAFETY: null, or an error that belongs to this place.
        unsafe { sys::error_free(self.0) };
    }
}
