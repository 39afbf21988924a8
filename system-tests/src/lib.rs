// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the demo and the end-to-end tests are made of.
//!
//! * [`records`]: numbered, self-checking records that a guest writes to two disks.

pub mod records;
