// SPDX-License-Identifier: GPL-2.0-or-later
//! Raw bindings to one configured QEMU build: bindgen's output and the C shim (`csrc/shim.h`).
//!
//! Enum constants carry their C names (`BACKUP_ACCESS_STATE_ACTIVE`, `QEMU_CLOCK_REALTIME`), and an
//! enum type is an integer alias. `BlockStatusMode` is the type of the second argument of a
//! driver's block-status callback, which differs between QEMU versions.
#![allow(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unnecessary_transmutes,
    unused_qualifications,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    reason = "generated code keeps C's names and forms"
)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
