// SPDX-License-Identifier: MIT OR Apache-2.0
//! Providers in any language: an executable that speaks JSON-RPC 2.0 on its standard input and output.
//!
//! [`RpcProvider`] starts the executable and passes every call of the contract on to it. The protocol is
//! described in `docs/provider-protocol.md`; the types here follow it message by message.
//!
//! | what must hold | where |
//! |---|---|
//! | memory is bounded: line length, requests, reports, log lines, lists | `wire`, `connection`, `serve`, `provider` |
//! | a message that makes no sense ends the process, with an error that quotes it | `connection` |
//! | no wait is longer than the call's deadline, or than its cancellation by some seconds | `connection` |
//! | nothing of a plugin is left, however we end | `process` |
//! | a plugin that died is started again, but its guests' backups fail | `provider`, `job` |
//! | secrets come only from a private file and go only through descriptor 3 | `settings`, `process` |

#![forbid(unsafe_code)]

mod connection;
mod files;
mod job;
mod process;
mod provider;
mod restore;
mod serve;
mod settings;
mod tap;
mod wire;

pub use connection::{CANCELLED_MAX, REQUESTS_MAX};
pub use process::END_GRACE;
pub use provider::{RpcOptions, RpcProvider, is_plugin_name};
pub use serve::PLUGIN_REQUESTS_MAX;
pub use tap::{Direction, Tap};
pub use wire::LINE_BYTES_MAX;
