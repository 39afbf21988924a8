// SPDX-License-Identifier: MIT OR Apache-2.0
//! The protocol with real processes: good plugins, lying ones, dying ones.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod bench;
mod faults;
mod file_store;
mod kit;
mod schema;
