// SPDX-License-Identifier: GPL-2.0-or-later
//! Strings and checksums across the border to C.

use core::ffi::{CStr, c_char};
use std::ffi::CString;

use qemu_ext_sys as sys;

/// A C string of the text; NUL bytes in it are dropped, since C cannot carry them.
pub fn c_string(text: &str) -> CString {
    let bytes: Vec<u8> = text.bytes().filter(|&byte| byte != 0).collect();
    CString::new(bytes).expect("NUL bytes were dropped")
}

/// The text of a C string; empty for null.
///
/// # Safety
/// The pointer is null or points to a C string.
pub unsafe fn text(ptr: *const c_char) -> String {
    if ptr.is_null() {
        return String::new();
    }
    // SAFETY: the caller says that it is a C string.
    unsafe { CStr::from_ptr(ptr) }.to_string_lossy().into_owned()
}

/// The text of a C string that is ours to free; empty for null.
///
/// # Safety
/// The pointer is null or points to a C string allocated by GLib, which nobody else uses.
pub unsafe fn take_text(ptr: *mut c_char) -> String {
    // SAFETY: as the caller says.
    let owned = unsafe { text(ptr) };
    // SAFETY: it was allocated by GLib, and `g_free` takes null too.
    unsafe { sys::g_free(ptr.cast()) };
    owned
}

/// A copy of the text for C code that frees it with `g_free`.
pub fn strdup(text: &str) -> *mut c_char {
    let text = c_string(text);
    // SAFETY: the argument is a C string for the length of the call.
    unsafe { sys::g_strdup(text.as_ptr()) }
}

/// SHA-256 of the data in hexadecimal.
pub fn sha256_hex(data: &[u8]) -> String {
    // SAFETY: the data is readable for the given length; the result is a string of ours.
    unsafe {
        take_text(sys::g_compute_checksum_for_data(
            sys::G_CHECKSUM_SHA256,
            data.as_ptr(),
            data.len() as sys::gsize,
        ))
    }
}
