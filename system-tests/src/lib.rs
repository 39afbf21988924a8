// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the demo and the end-to-end tests are made of.
//!
//! * [`stress`]: the snapshot of a disk under random writes, sector by sector.
//! * [`soak`]: random accesses, faults and deaths for as long as it is asked for.
//! * [`storage`]: a storage daemon with the nodes that a test adds.
//! * [`disk_form`]: how a disk and its bitmaps are stored.
//! * [`records`]: numbered, self-checking records that a guest writes to two disks.
//! * [`guest`]: builds the small Linux guest that writes them.
//! * [`secrets`]: what a guest keeps in EFI variables and its TPM.
//! * [`story`]: the main job, step by step, and what must be true at its end.
//! * [`table`]: the demo's closing table.
//! * [`docs`]: runs the sessions that a document shows.
//! * [`lab`]: a small installation with one VM, its backups and restores.
//! * [`fidelity`]: a tree of odd things, and whether it came back.
//! * [`round_trip`]: trees that go through a container's backup and restore.
//! * [`debian`]: a whole Debian for containers.
//! * [`vzdump`]: runs the program as a user would.
//! * [`console`]: what the guest says on its serial line.
//! * [`qemu`]: finds the patched QEMU, boots the guest directly.
//! * [`turn`]: one guest at a time.
//! * [`loopfs`]: a file system in a file.
//! * [`signals`]: ends programs that run VMs in order when a signal comes.
//! * [`process`]: programs with a time limit that are ended on every path.

#![forbid(unsafe_code)]

pub mod console;
pub mod debian;
pub mod disk_form;
pub mod docs;
pub mod fidelity;
pub mod guest;
pub mod lab;
pub mod loopfs;
pub mod process;
pub mod qemu;
pub mod records;
pub mod round_trip;
pub mod secrets;
pub mod signals;
pub mod soak;
pub mod storage;
pub mod story;
pub mod stress;
pub mod table;
pub mod turn;
pub mod vzdump;
