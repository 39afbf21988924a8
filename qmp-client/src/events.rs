// SPDX-License-Identifier: MIT OR Apache-2.0
//! The upstream events that host tools watch for, with the members that they use.
//!
//! ```
//! # fn watch(event: &qmp_client::Event) -> qmp_client::Result<()> {
//! use qmp_client::events::ExportDeleted;
//!
//! if let Some(ExportDeleted { id }) = event.read()? {
//!     println!("the export {id} is gone");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Those of the backup access extension are in [`crate::backup`].

/// An event whose members are known.
pub use qapi_spec::Event as TypedEvent;
use serde::Deserialize;
use serde_json::Value;

use crate::{Error, Event, Result, open_enum::open_enum};

impl Event {
    /// Reads it as a certain event; `None` if it is another one.
    ///
    /// # Errors
    /// [`Error::Protocol`] if it is that event but its members are not.
    pub fn read<E: TypedEvent>(&self) -> Result<Option<E>> {
        if self.name != E::NAME {
            return Ok(None);
        }
        E::deserialize::<&Value>(&self.data).map(Some).map_err(|e| Error::protocol(E::NAME, e))
    }
}

/// Implements [`TypedEvent`].
macro_rules! events {
    ($( $name:ident = $wire:literal; )+) => {
        $( impl TypedEvent for $name { const NAME: &'static str = $wire; } )+
    };
}

events! {
    BlockIoError = "BLOCK_IO_ERROR";
    DeviceDeleted = "DEVICE_DELETED";
    ExportDeleted = "BLOCK_EXPORT_DELETED";
    JobStatusChanged = "JOB_STATUS_CHANGE";
    Resumed = "RESUME";
    ShutDown = "SHUTDOWN";
    Stopped = "STOP";
}

/// A request of the guest failed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockIoError {
    /// The device's backend, empty if it has none.
    #[serde(default)]
    pub device: String,
    /// The block node.
    #[serde(default)]
    pub node_name: Option<String>,
    /// The device's id or path in QEMU's object tree.
    #[serde(default)]
    pub qom_path: Option<String>,
    /// `read` or `write`.
    #[serde(default)]
    pub operation: String,
    /// What QEMU did: `ignore`, `report` (to the guest) or `stop` (the guest).
    #[serde(default)]
    pub action: String,
    /// Whether there was no space left, where QEMU says so.
    #[serde(default)]
    pub nospace: Option<bool>,
    /// The reason in words.
    #[serde(default)]
    pub reason: String,
}

/// The guest has released a device: the answer to [`crate::commands::DeviceDel`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct DeviceDeleted {
    /// Its id, if it had one.
    #[serde(default)]
    pub device: Option<String>,
    /// Its path in QEMU's object tree.
    pub path: String,
}

/// An export is gone, and with it its hold on the node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ExportDeleted {
    /// Its id.
    pub id: String,
}

/// A job goes on to another state.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct JobStatusChanged {
    /// Its id.
    pub id: String,
    /// The new state.
    pub status: JobStatus,
}

open_enum! {
    /// State of a job.
    pub enum JobStatus {
        /// It was made and has not begun.
        Created = "created",
        /// It works.
        Running = "running",
        /// It is held.
        Paused = "paused",
        /// It has copied everything once and follows the changes.
        Ready = "ready",
        /// It follows the changes and is held.
        Standby = "standby",
        /// It waits for the other jobs of its transaction.
        Waiting = "waiting",
        /// It waits for `job-finalize`.
        Pending = "pending",
        /// It failed or was cancelled.
        Aborting = "aborting",
        /// It is over and waits for `job-dismiss`.
        Concluded = "concluded",
        /// It is gone.
        Null = "null",
    }
}

/// The guest's processors run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Resumed;

/// The guest has shut down, or QEMU ends.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ShutDown {
    /// Whether the guest asked for it.
    pub guest: bool,
    /// Why, for example `guest-shutdown`, `host-qmp-quit` or `host-signal`.
    #[serde(default)]
    pub reason: String,
}

/// The guest's processors stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Stopped;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(name: &str, data: Value) -> Event {
        Event { name: name.to_owned(), data, timestamp: crate::Timestamp::default() }
    }

    #[test]
    fn an_event_is_read_as_what_it_is_and_nothing_else() {
        let deleted = event("BLOCK_EXPORT_DELETED", json!({"id": "e", "new-member": 1}));
        assert_eq!(deleted.read().unwrap(), Some(ExportDeleted { id: "e".into() }));
        assert_eq!(deleted.read::<Stopped>().unwrap(), None);
        assert_eq!(event("STOP", Value::Null).read().unwrap(), Some(Stopped));
        let status = event("JOB_STATUS_CHANGE", json!({"id": "j", "status": "resting"}));
        let status: JobStatusChanged = status.read().unwrap().unwrap();
        assert_eq!(status.status, JobStatus::Other("resting".into()));
    }

    #[test]
    fn an_event_without_its_members_is_an_error_that_names_it() {
        let error = event("SHUTDOWN", json!({"reason": "host-signal"})).read::<ShutDown>();
        assert!(error.unwrap_err().to_string().starts_with("SHUTDOWN: "));
    }
}
