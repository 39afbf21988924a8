// SPDX-License-Identifier: MIT OR Apache-2.0
//! What all tasks of a host may use together, however many processes they run in.
//!
//! ```text
//!  run/budget/bandwidth-<boot>    when the next byte may pass; every process books in it
//!  run/budget/ram.lock            held while RAM is shared out
//!  run/budget/ram-<uuid>          RAM that a backup has; locked as long as it has it
//! ```
//!
//! Nothing of it is journalled: a process that dies loses its locks, and with them what it had.

mod ram;
mod rate;

pub use ram::{HostRam, RamShare};
pub use rate::HostRate;
