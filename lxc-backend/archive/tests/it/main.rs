// SPDX-License-Identifier: MIT OR Apache-2.0
//! Archives of GNU tar, and archives that mean harm.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;
mod gnu_tar;
mod hostile;
