// SPDX-License-Identifier: GPL-2.0-or-later
//! `QEMUIOVector` (`include/qemu/iov.h`): the reader's buffer, and one of our own for writes.

use core::ptr::NonNull;
use std::marker::PhantomData;

use qemu_ext_sys as sys;

/// The part of a request's vector that the request is about.
///
/// # Invariants
/// `qiov` is alive as long as this value and has at least `offset + len` bytes.
#[derive(Debug)]
pub struct IoSlice {
    qiov: NonNull<sys::QEMUIOVector>,
    offset: usize,
    len: usize,
}

impl IoSlice {
    /// The `len` bytes from `offset` of a request's vector; `None` for null.
    ///
    /// # Safety
    /// The vector must outlive the value and have at least `offset + len` bytes, and nobody else
    /// may use those bytes meanwhile.
    pub unsafe fn new(qiov: *mut sys::QEMUIOVector, offset: usize, len: usize) -> Option<Self> {
        Some(Self { qiov: NonNull::new(qiov)?, offset, len })
    }

    pub(super) fn as_ptr(&self) -> *mut sys::QEMUIOVector {
        self.qiov.as_ptr()
    }

    pub(super) fn vector_offset(&self, at: usize, len: usize) -> usize {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "within the request");
        self.offset + at
    }

    /// Copies `data` to `at`.
    pub fn copy_from(&mut self, at: usize, data: &[u8]) {
        let offset = self.vector_offset(at, data.len());
        // SAFETY: by type invariant the vector has those bytes; `data` is `data.len()` long.
        unsafe {
            sys::qemu_iovec_from_buf(self.qiov.as_ptr(), offset, data.as_ptr().cast(), data.len());
        }
    }

    /// Fills `len` bytes at `at` with zeroes.
    pub fn zero(&mut self, at: usize, len: usize) {
        let offset = self.vector_offset(at, len);
        // SAFETY: by type invariant the vector has those bytes.
        unsafe { sys::qemu_iovec_memset(self.qiov.as_ptr(), offset, 0, len) };
    }
}

/// A vector over our own data, for writes.
///
/// # Invariants
/// `raw` was initialised by `qemu_iovec_init` and names only memory of `'a`.
pub struct WriteVector<'a> {
    raw: sys::QEMUIOVector,
    len: usize,
    data: PhantomData<&'a [u8]>,
}

impl<'a> WriteVector<'a> {
    /// A vector over `parts`.
    pub fn new(parts: &[&'a [u8]]) -> Self {
        let mut raw = sys::QEMUIOVector::default();
        // SAFETY: `raw` is ours; the hint only sizes its table.
        unsafe { sys::qemu_iovec_init(&raw mut raw, parts.len().min(1024) as i32) };
        for part in parts {
            // SAFETY: the part lives as long as the vector; a write does not change it.
            unsafe {
                sys::qemu_iovec_add(&raw mut raw, part.as_ptr().cast_mut().cast(), part.len());
            }
        }
        let len = parts.iter().map(|part| part.len()).sum();
        Self { raw, len, data: PhantomData }
    }

    /// Length in bytes.
    pub(super) fn byte_count(&self) -> usize {
        self.len
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut sys::QEMUIOVector {
        &raw mut self.raw
    }
}

impl Drop for WriteVector<'_> {
    fn drop(&mut self) {
        // SAFETY: by type invariant.
        unsafe { sys::qemu_iovec_destroy(&raw mut self.raw) };
    }
}
