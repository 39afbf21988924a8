// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backups of a real QEMU by `vzdump` and the storages below them: fleecing images whose storage is full,
//! stalls, cannot discard, or is a btrfs; what a crash leaves there; bitmaps that outlive QEMU.
//!
//! Numbers in names are those of the scenarios that each test is.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "modules of one test program")]

mod bitmaps;
mod budget;
mod chains;
mod fleecing;
mod leftovers;
mod place;
