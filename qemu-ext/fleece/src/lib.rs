// SPDX-License-Identifier: GPL-2.0-or-later
//! The fleecing engine: which old data is saved where, and in which order things happen.
//!
//! Pure: it knows no QEMU, does no I/O of its own and contains no `unsafe`. [`Engine`] is the
//! protocol (lock, wait, I/O) over `core::Core` (states and transitions), generic over [`Io`];
//! inside QEMU a task is a coroutine, in the tests it is a thread, and both run the same code.
//!
//! One sentence is the specification: *a successful snapshot read returns the content at the
//! point in time.*
//!
//! The life of a granule (4 KiB unless the devices need more):
//!
//! ```text
//!                 plan            publish              flush
//!   Needed ──────────► Reading ──────────► Ram ───────────────► Log
//!     │                   │  └─ all zero ─► Zero  │               │
//!     │ release           │  └─ read error ► Lost │ release       │ release
//!     ▼                   ▼                       ▼               ▼
//!   Released           Released               Released        Released
//!
//!   Clean (outside the dirty bitmap): never saved, never readable
//! ```
//!
//! A state never goes back to `Needed`; that is what makes reading without freezing correct: a
//! reader reads the source, looks again, and takes what was saved meanwhile from its copy.

#![forbid(unsafe_code)]

pub mod bitmap_name;
mod core;
mod engine;
mod group;
mod io;
mod log;
mod range;
mod stats;
mod table;

pub use crate::core::Batch;
pub use engine::{Engine, Settings};
pub use group::Group;
pub use io::{Errno, Io, NeedMap};
pub use range::{ByteRange, Geometry, MAX_GRANULE_BYTES, MIN_GRANULE_BYTES, PIECE_BYTES};
pub use stats::{State, Stats};

/// What an error does that is met before a guest write is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// The write goes on, and the snapshot loses the old data.
    #[default]
    BreakSnapshot,
    /// The write fails, and the snapshot stays complete.
    BreakGuestWrite,
}

/// There is no memory for the states of granules.
#[derive(Debug)]
pub struct OutOfMemory;
