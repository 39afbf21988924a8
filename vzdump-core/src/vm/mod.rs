// SPDX-License-Identifier: MIT OR Apache-2.0
//! Virtual machines: the command line of QEMU, its process, and its backup.

pub mod backup;
pub mod create;
pub mod destroy;
pub mod freeze_guard;
pub mod leftovers;
pub mod ovmf;
pub mod process;
pub mod qemu_cmdline;
pub mod runner;
pub mod tpm;
pub mod tpm_guard;
