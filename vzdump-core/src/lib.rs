// SPDX-License-Identifier: MIT OR Apache-2.0
//! The engine of backups and restores: configuration, guests, jobs and their recovery.
//!
//! Nothing here prints; callers (`vzdump-host`, and through it the program and a later service)
//! get typed results and events.
//!
//! ```text
//! layout, tools          where things are
//! config, storage        Proxmox VE's files and the images they name
//! vm::{qemu_cmdline,runner}  a VM's process
//! guest, vm::backup      the driver of one guest's backup
//! bandwidth, host_budget what guests may read together, and have of RAM
//! job, task_log, journal jobs, their log lines, and what a crash leaves behind
//! retention, prune       which archives are kept, and the removal of the others
//! notes_template         the text that archives are described with
//! restore                archives back to guests
//! ```

#![forbid(unsafe_code)]

pub mod bandwidth;
pub mod blocking;
mod bound;
pub mod config;
pub mod guest;
pub mod host_budget;
pub mod job;
pub mod journal;
pub mod layout;
pub mod lock;
pub mod notes_template;
pub mod prune;
pub mod restore;
pub mod retention;
pub mod storage;
pub mod task_log;
pub mod temp_tree;
pub mod tools;
pub mod verify;
pub mod vm;
