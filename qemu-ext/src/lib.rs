// SPDX-License-Identifier: GPL-2.0-or-later
//! What runs inside QEMU: a fleecing filter, a snapshot driver, and the QMP commands over both.
//!
//! ```text
//!  QMP ──► access/          setup, teardown, query: graph changes, bitmaps (main loop)
//!             │
//!  guest ──► filter.rs ◄── snapshot.rs ◄── NBD export
//!             │   saves old data, reads it back: both are fleece::Engine over filter_io.rs
//!             ▼
//!          qemu/            safe wrappers, one file per concept; all `unsafe` is there
//!             ▼
//!          qemu-ext-sys     bindgen's output and the C shim
//! ```
//!
//! Rules: no lock held across anything that yields; no `&mut` from C's `opaque`; no panic into C.

pub mod access;
mod fault;
pub mod filter;
mod filter_io;
pub mod qemu;
mod snapshot;
