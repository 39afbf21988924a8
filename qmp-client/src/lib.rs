// SPDX-License-Identifier: MIT OR Apache-2.0
//! Client of QEMU's machine protocol (QMP) and of the guest agent.
//!
//! - [`Session`]: one connection to a QMP monitor. Commands run concurrently, are safe to cancel
//!   and have a time limit each; events come as a stream; file descriptors can be passed.
//! - [`commands`] and [`events`]: those of upstream that backups need.
//! - [`backup`]: the commands of the backup access extension, and [`backup::BackupAccess`], a
//!   guard that ends the access on every way out.
//! - [`agent::Agent`]: the guest agent (freeze, thaw, status).
//! - [`codec`]: bytes to messages, without any I/O.
//!
//! Everything a peer sends is read tolerantly: unknown events and members are kept or ignored,
//! unknown values of enumerations become `Other`. Everything is bounded: line length, event
//! queue, time.
//!
//! ```no_run
//! # async fn demo() -> qmp_client::Result<()> {
//! use qmp_client::{Options, Session, commands::QueryStatus};
//!
//! let session = Session::connect("/run/vm/100.qmp", Options::default()).await?;
//! let status = session.execute(QueryStatus).await?;
//! println!("running: {}", status.running);
//! # Ok(())
//! # }
//! ```
//!
//! # A backup from beginning to end
//! This program is `examples/backup.rs`. It needs nothing but the patched `qemu-storage-daemon`,
//! which it starts itself: `cargo run -p qmp-client --example backup`. The same session by hand, with
//! every reply explained, is in `docs/qmp.md`.
//!
#![doc = concat!("```no_run\n", include_str!("../examples/backup.rs"), "```")]
#![forbid(unsafe_code)]

pub mod agent;
pub mod backup;
pub mod codec;
pub mod commands;
mod error;
mod event;
pub mod events;
mod generated;
mod handshake;
pub mod jobs;
mod open_enum;
mod pending;
mod pump;
mod session;
mod stream;
mod wire_command;

pub use codec::{Event, Greeting, Timestamp, Version};
pub use error::{Error, Result};
pub use event::{EventItem, EventStream};
pub use qapi_spec::{Command, Empty};
pub use session::{Options, Session};
pub use stream::Stream;
