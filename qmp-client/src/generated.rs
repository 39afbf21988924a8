// SPDX-License-Identifier: MIT OR Apache-2.0
//! Wire types generated from `qemu-ext/qapi/backup-access.json`; see `build.rs`.
//!
//! They stay private: `backup` gives them the crate's names, units and documentation. A change of
//! the contract that the client does not follow is a compile error there.
#![allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    non_camel_case_types,
    non_snake_case,
    dead_code,
    clippy::all,
    clippy::redundant_closure_for_method_calls,
    clippy::wildcard_imports,
    clippy::use_self,
    reason = "generated code keeps QEMU's names and its generator's style"
)]

use serde::{Deserialize, Serialize};

use crate::backup::{
    AccessState as BackupAccessState, BitmapAction as BackupAccessBitmapAction,
    BitmapMode as BackupAccessBitmapMode, OnError as BackupAccessOnError,
    Readable as BackupAccessReadable,
};

/// A command of the extension.
pub trait ExtensionCommand: qapi_spec::Command {}

include!(concat!(env!("OUT_DIR"), "/backup_access.rs"));

/// Every enum of the contract with its values.
#[cfg(test)]
pub(crate) const ENUM_VALUES: &[(&str, &[&str])] =
    include!(concat!(env!("OUT_DIR"), "/enum_values.rs"));
