// SPDX-License-Identifier: MIT OR Apache-2.0
//! The client against servers: a scripted one that misbehaves, and real ones.

#![forbid(unsafe_code)]

mod crate_nbd;
mod fake;
mod faults;
mod handshake;
mod nbdkit;
mod peer;
mod qemu;
mod requests;
mod server;
