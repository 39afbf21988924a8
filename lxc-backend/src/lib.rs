// SPDX-License-Identifier: MIT OR Apache-2.0
//! Containers of LXC: starting and stopping them, their backup and their restore.
//!
//! ```text
//! lxc/<id>.conf ─► config ─► runtime    a mount namespace with the volumes, LXC's monitor in it
//!                              │
//!                 driver ──────┤        freeze, snapshot, thaw (guard: thaws whatever happens)
//!                    │         │        suspend: copy, freeze, copy what has changed, thaw
//!                    ▼
//!                 view ─► holder        a thread with its own mount namespace, the tree in it
//!                    ▼
//!                 runner ─► sandbox     one command: namespaces, a root of its own, few rights
//! ```
//!
//! All that is mounted is mounted in namespaces that end with their last process, so a crash leaves no mount
//! behind (`docs/design/0024-containers-in-namespaces.md`).

#![deny(unsafe_code)]

mod attach;
pub mod config;
mod copy;
pub mod create;
mod devices;
pub mod driver;
mod error;
mod freezer;
pub mod guard;
mod holder;
mod ids;
mod lxc;
mod metadata;
mod opening;
mod pace;
mod place;
mod power;
pub mod restore;
pub mod runner;
pub mod runtime;
pub mod sandbox;
pub mod show;
mod snapshot;
mod suspend;
mod system;
mod tool;
mod unpack;
mod view;

pub use driver::LxcContainers;
pub use error::CtError;
pub use guard::{SUBCOMMAND as GUARD_SUBCOMMAND, run_guard};
pub use sandbox::{SUBCOMMAND as SANDBOX_SUBCOMMAND, run_sandbox};
