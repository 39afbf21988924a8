// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a backup does with its VM, with real QEMUs: the power state before, during and after it, which
//! disks it takes, and the guest agent. The guest is a boot sector (`sector`), so that it boots within
//! seconds; only `agent` needs a Linux.
//!
//! The number in a test's name is that of the scenario in the project's list of behaviours.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]
#![allow(unreachable_pub, reason = "modules of one test program")]

mod agent;
mod crash;
mod disks;
mod power;
mod sector;
mod site;
mod stop;
