// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a backup costs the guest and how fast it is: measurements side by side in one run.
//!
//! * [`cases`]: what is measured, and which part of it in a short run.
//! * [`run`]: one measurement of one case in one mode.
//! * [`daemon`]: the patched storage daemon, [`access`]: a backup access in it, [`disk`]: its files.
//! * [`fio`], [`generate`], [`nbdcopy`]: the guest's load; [`reader`]: the backup client's.
//! * [`guest`]: the same in a Linux guest.
//! * [`setup_time`]: how long all guest I/O is held; [`timeline`]: latency while a backup begins.
//! * [`stats`]: medians and their confidence; [`goals`]: what is to be reached.
//! * [`report`], [`svg`]: tables and plots; [`results`]: all that was measured, in a file.
//! * [`vm`]: backups of a VM, beside plain copying tools.
//! * [`source`]: a disk with a bitmap, [`backup`]: a provider's backup of it, [`plugin`]: the directory
//!   provider as a process of its own.
//! * [`place`]: where a benchmark works, and until when; [`scratch`]: what goes away with a run.
//! * [`procfs`], [`child`]: what a process used, and its end.

#![forbid(unsafe_code)]

pub mod access;
pub mod backup;
pub mod cases;
pub mod child;
pub mod ct;
pub mod daemon;
pub mod disk;
pub mod fio;
pub mod generate;
pub mod goals;
pub mod guest;
pub mod nbdcopy;
pub mod place;
pub mod plugin;
pub mod procfs;
pub mod reader;
pub mod report;
pub mod results;
pub mod run;
pub mod sample;
pub mod scratch;
pub mod setup_time;
pub mod source;
pub mod stats;
pub mod svg;
pub mod timeline;
pub mod vm;
