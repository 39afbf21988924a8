// SPDX-License-Identifier: MIT OR Apache-2.0
//! Numbered, self-checking records on a pair of disks.
//!
//! The guest writes record 1, 2, 3, … to disk A and then to disk B. Where a record goes and what
//! it contains follows from its number alone, so the whole content of both disks is known from
//! one number: the last record. A checker therefore notices a lost, old, torn, misplaced or
//! foreign sector anywhere on the disks, and two disks of different points in time.
//!
//! * [`layout`]: where each record goes, and which record a sector must hold.
//! * [`content`]: what a sector holds.
//! * [`check`]: compares a pair of disks with what they must hold.
//! * [`writer`]: writes records at a fixed rate and measures how long the longest write took.
//! * [`passes`]: a third disk that several threads write at once.
//! * [`program`]: the command line of the program `guest-records`.
//!
//! The module uses the standard library only: it is also compiled alone, as a static program
//! that runs as the guest's only application.

pub mod check;
pub mod content;
pub mod disk;
pub mod layout;
pub mod passes;
pub mod program;
pub mod writer;
