// SPDX-License-Identifier: GPL-2.0-or-later
//! The fleecing engine: which old data is saved where, and in which order things happen.
//!
//! Pure: it knows no QEMU, does no I/O of its own and contains no `unsafe`. [`Engine`] is the
//! protocol (locks, waiting, I/O), generic over [`Io`]; inside QEMU a task is a coroutine, in the
//! tests it is a thread, and both run the same code.
//!
//! One sentence is the specification: *a successful snapshot read returns the content at the
//! point in time.*
//!
//! The life of a granule (4 KiB unless the devices need more):
//!
//! ```text
//!                 plan            publish              flush
//!   Needed ──────────► Reading ──────────► Ram ───────────────► Log
//!     │ ▲                 │  └─ all zero ─► Zero  │               │
//!     │ └─ guest request  │  └─ read error ► Lost │               │
//!     │    failed instead │                       │               │
//!     │ release           │ release               │ release       │ release
//!     ▼                   ▼                       ▼               ▼
//!    Gone                Gone                    Gone            Gone
//!
//!   Gone also from the start: outside the dirty bitmap. Never saved, never readable.
//! ```
//!
//! Once a guest request may pass, a granule never goes back; that is what makes reading without
//! freezing correct: a reader reads the source, looks again, and takes what was saved meanwhile
//! from its copy.
//!
//! ```text
//!   engine.rs    the engine, its begin and end            table.rs    states of granules, in regions
//!   write.rs     before a guest's write                    places.rs   where saved data is
//!   discard.rs   a guest's discards, at once or postponed  ram.rs      data in RAM, and room for it
//!   flush.rs     from RAM to the log                       log.rs      space of the fleecing image
//!   read.rs      snapshot reads and block status           group.rs    RAM over several disks
//!   release.rs   what the reader gives up                  watch.rs    requests in flight
//! ```
//!
//! Locks, in the order in which they are taken: a region, RAM, the log. No lock is held across a
//! call of [`Io`] that may yield, and tasks are woken with no lock held.

#![forbid(unsafe_code)]

pub mod bitmap_file;
pub mod bitmap_name;
mod discard;
mod engine;
mod flush;
mod group;
mod histogram;
mod io;
mod log;
mod mask;
mod places;
mod ram;
mod range;
mod read;
mod release;
mod runs;
mod spans;
mod stats;
mod sync;
mod table;
mod watch;
mod write;

pub use discard::Discard;
pub use engine::{Engine, OnError, Settings};
pub use flush::Batch;
pub use group::{Group, Membership};
pub use io::{Device, Errno, Fetch, Io, NeedMap};
pub use range::{ByteRange, Geometry, MAX_GRANULE_BYTES, MIN_GRANULE_BYTES, PIECE_BYTES};
pub use release::Announced;
pub use runs::Runs;
pub use stats::{State, Stats};

/// There is no memory for the states of granules, or they may have no more.
#[derive(Debug)]
pub struct OutOfMemory;
