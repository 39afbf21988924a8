// SPDX-License-Identifier: MIT OR Apache-2.0
//! The upstream commands that backups use, with the members that they use.
//!
//! Members this client does not know are skipped in replies; anything else goes through
//! [`crate::Session::execute_raw`]. Names of members are QEMU's, units are added.

use std::path::Path;

use qapi_spec::Empty;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Version, open_enum::open_enum, wire_command::commands};

commands! {
    QueryVersion = "query-version" -> Version;
    QueryCommands = "query-commands" -> Vec<CommandInfo>;
    QueryQmpSchema = "query-qmp-schema" -> Vec<Value>;
    QueryStatus = "query-status" -> StatusInfo;
    QueryBlock = "query-block" -> Vec<BlockInfo>;
    QueryNamedBlockNodes = "query-named-block-nodes" -> Vec<NodeInfo>;
    QueryBlockExports = "query-block-exports" -> Vec<BlockExportInfo>;
    BlockdevAdd = "blockdev-add" -> Empty;
    BlockdevDel = "blockdev-del" -> Empty;
    NbdServerStart = "nbd-server-start" -> Empty;
    NbdServerStop = "nbd-server-stop" -> Empty;
    NbdExportAdd = "block-export-add" -> Empty;
    BlockExportDel = "block-export-del" -> Empty;
    DeviceAdd = "device_add" -> Empty;
    DeviceDel = "device_del" -> Empty;
    ObjectAdd = "object-add" -> Empty;
    ObjectDel = "object-del" -> Empty;
    GetFd = "getfd" -> Empty;
    CloseFd = "closefd" -> Empty;
    AddFd = "add-fd" -> AddFdInfo;
    RemoveFd = "remove-fd" -> Empty;
    QueryFdsets = "query-fdsets" -> Vec<FdsetInfo>;
    Stop = "stop" -> Empty;
    Cont = "cont" -> Empty;
    SystemPowerdown = "system_powerdown" -> Empty;
    SystemReset = "system_reset" -> Empty;
    SetAction = "set-action" -> Empty;
    Quit = "quit" -> Empty;
}

/// QEMU's version.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryVersion;

/// The names of all commands this QEMU has.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryCommands;

/// One command.
#[derive(Debug, Clone, Deserialize)]
pub struct CommandInfo {
    /// Its name.
    pub name: String,
}

/// The whole schema, some hundred kilobytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryQmpSchema;

/// Whether the guest runs.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryStatus;

/// Reply of [`QueryStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct StatusInfo {
    /// Whether the guest's processors run.
    pub running: bool,
    /// The state in detail.
    pub status: RunState,
}

open_enum! {
    /// State of the guest, as far as backups treat states differently.
    pub enum RunState {
        /// It runs.
        Running = "running",
        /// `stop` was given.
        Paused = "paused",
        /// QEMU was started with `-S` and has not run yet.
        Prelaunch = "prelaunch",
        /// The guest has shut down, QEMU remains.
        Shutdown = "shutdown",
        /// An I/O error stopped it.
        IoError = "io-error",
        /// It waits for an incoming migration.
        InMigrate = "inmigrate",
        /// It was migrated away.
        PostMigrate = "postmigrate",
        /// The last phase of an outgoing migration.
        FinishMigrate = "finish-migrate",
        /// The guest's system crashed.
        GuestPanicked = "guest-panicked",
        /// QEMU failed.
        InternalError = "internal-error",
        /// The guest sleeps.
        Suspended = "suspended",
        /// Its state is being saved.
        SaveVm = "save-vm",
        /// Its state is being restored.
        RestoreVm = "restore-vm",
    }
}

/// All block devices of the guest.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryBlock;

/// One block device.
#[derive(Debug, Clone, Deserialize)]
pub struct BlockInfo {
    /// Name of its backend, empty if it has none.
    #[serde(default)]
    pub device: String,
    /// The device's id or path in QEMU's object tree.
    #[serde(default)]
    pub qdev: Option<String>,
    /// Whether its medium can be changed.
    #[serde(default)]
    pub removable: bool,
    /// The medium; `None` if there is none.
    #[serde(default)]
    pub inserted: Option<NodeInfo>,
}

/// All named block nodes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryNamedBlockNodes {
    /// Leave out the (nested) information about backing images.
    pub flat: bool,
}

/// One block node.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeInfo {
    /// Its name.
    #[serde(default)]
    pub node_name: Option<String>,
    /// Its driver.
    #[serde(default)]
    pub drv: String,
    /// Its file or a `json:` description.
    #[serde(default)]
    pub file: String,
    /// Whether it is read-only.
    #[serde(default)]
    pub ro: bool,
    /// The image in it.
    pub image: ImageInfo,
    /// Its dirty bitmaps.
    #[serde(default)]
    pub dirty_bitmaps: Vec<DirtyBitmapInfo>,
}

/// An image.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// Its file or a `json:` description.
    #[serde(default)]
    pub filename: String,
    /// Its format.
    #[serde(default)]
    pub format: String,
    /// Size as the guest sees it.
    #[serde(rename = "virtual-size")]
    pub virtual_size_bytes: u64,
    /// Space it takes.
    #[serde(rename = "actual-size", default)]
    pub actual_size_bytes: Option<u64>,
    /// Its cluster size.
    #[serde(rename = "cluster-size", default)]
    pub cluster_size_bytes: Option<u64>,
}

/// A dirty bitmap.
#[derive(Debug, Clone, Deserialize)]
pub struct DirtyBitmapInfo {
    /// Its name, if it has one.
    #[serde(default)]
    pub name: Option<String>,
    /// Bytes that are dirty.
    #[serde(rename = "count")]
    pub dirty_bytes: u64,
    /// Bytes per bit.
    #[serde(rename = "granularity")]
    pub granularity_bytes: u64,
    /// Whether new writes are recorded.
    #[serde(default)]
    pub recording: bool,
    /// Whether something uses it.
    #[serde(default)]
    pub busy: bool,
    /// Whether it is stored in the image.
    #[serde(default)]
    pub persistent: bool,
    /// Whether it was not stored properly and is worthless.
    #[serde(default)]
    pub inconsistent: bool,
}

/// Adds a block node: `node-name`, `driver` and the driver's options.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct BlockdevAdd(pub Map<String, Value>);

/// Removes a block node.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevDel {
    /// Its name.
    pub node_name: String,
}

/// Starts the built-in NBD server; there is one per QEMU.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NbdServerStart {
    /// Where it listens.
    pub addr: ServerAddress,
    /// Connections at once, 0 is unlimited; QEMU's default is 100 (unlimited before QEMU 9.1).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    /// An object with TLS credentials, for TCP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_creds: Option<String>,
}

impl NbdServerStart {
    /// On a Unix socket; `None` if the path is not UTF-8, which QMP cannot say.
    #[must_use]
    pub fn unix(path: &Path) -> Option<Self> {
        Some(Self::at(ServerAddress::Unix { path: path.to_str()?.to_owned() }))
    }

    /// On a listening socket that QEMU was given by [`GetFd`] under this name: a host tool can so
    /// choose a place that QEMU itself cannot reach.
    #[must_use]
    pub fn given(fdname: impl Into<String>) -> Self {
        Self::at(ServerAddress::Fd { name: fdname.into() })
    }

    fn at(addr: ServerAddress) -> Self {
        Self { addr, max_connections: None, tls_creds: None }
    }
}

/// An address in the form `nbd-server-start` takes.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum ServerAddress {
    /// A Unix socket.
    Unix {
        /// Its path.
        path: String,
    },
    /// TCP.
    Inet {
        /// Name or address.
        host: String,
        /// Port, as text.
        port: String,
    },
    /// A listening socket that QEMU was given.
    Fd {
        /// Its name, see [`GetFd`].
        #[serde(rename = "str")]
        name: String,
    },
}

/// Stops the NBD server and removes its exports.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct NbdServerStop;

/// Exports a node over NBD.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", rename = "nbd", rename_all = "kebab-case")]
pub struct NbdExportAdd {
    /// Id of the export.
    pub id: String,
    /// The node.
    pub node_name: String,
    /// Name for clients; by default the node's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether clients may write and discard.
    pub writable: bool,
    /// Dirty bitmaps that clients may query.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<BitmapRef>,
    /// The I/O thread that serves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iothread: Option<String>,
}

/// A dirty bitmap.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub enum BitmapRef {
    /// By name, on the exported node or below it.
    Name(String),
    /// On a certain node.
    OnNode {
        /// The node.
        node: String,
        /// The bitmap's name.
        name: String,
    },
}

/// Removes an export.
#[derive(Debug, Clone, Serialize)]
pub struct BlockExportDel {
    /// Its id.
    pub id: String,
    /// Whether connected clients are thrown out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<RemoveMode>,
}

/// How an export is removed.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RemoveMode {
    /// Refuse while clients are connected (QEMU's default).
    Safe,
    /// Disconnect clients.
    Hard,
}

/// All exports.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryBlockExports;

/// One export.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockExportInfo {
    /// Its id.
    pub id: String,
    /// `nbd`, `fuse`, …
    #[serde(rename = "type", default)]
    pub kind: String,
    /// The node.
    #[serde(default)]
    pub node_name: String,
    /// Whether it is being removed.
    #[serde(default)]
    pub shutting_down: bool,
}

/// Plugs a device: `driver`, `id` and its properties.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct DeviceAdd(pub Map<String, Value>);

/// Asks the guest to release a device; the event `DEVICE_DELETED` tells when it has.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceDel {
    /// Its id or path.
    pub id: String,
}

/// Makes an object: `qom-type`, `id` and its properties.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct ObjectAdd(pub Map<String, Value>);

/// Removes an object.
#[derive(Debug, Clone, Serialize)]
pub struct ObjectDel {
    /// Its id.
    pub id: String,
}

/// Gives QEMU a descriptor under a name; for [`crate::Session::execute_with_fd`]. Whatever is told
/// the name takes the descriptor and closes it in the end; a name is good for one use.
///
/// The storage daemon has no commands for descriptors.
#[derive(Debug, Clone, Serialize)]
pub struct GetFd {
    /// The name.
    pub fdname: String,
}

/// Closes a descriptor given by [`GetFd`].
#[derive(Debug, Clone, Serialize)]
pub struct CloseFd {
    /// The name.
    pub fdname: String,
}

/// Adds a descriptor to a set; for [`crate::Session::execute_with_fd`].
///
/// A set is opened like a file by its [path](AddFdInfo::path), for example as the `filename` of a
/// `file` node. QEMU takes the descriptor of the set whose access mode is what it needs: a node
/// that is written needs one that was opened for reading and writing. QEMU drops a set that nobody
/// uses when the monitor's client leaves.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct AddFd {
    /// The set; by default a new one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fdset_id: Option<u64>,
    /// A note that `query-fdsets` shows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub opaque: Option<String>,
}

/// Reply of [`AddFd`].
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct AddFdInfo {
    /// The set.
    pub fdset_id: u64,
    /// The descriptor's number in QEMU.
    pub fd: i64,
}

impl AddFdInfo {
    /// What to open in QEMU to get the descriptor.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/dev/fdset/{}", self.fdset_id)
    }
}

/// Removes descriptors from a set. What has opened them goes on; the set itself goes with its last
/// user.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RemoveFd {
    /// The set.
    pub fdset_id: u64,
    /// The descriptor's number in QEMU; by default all of the set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd: Option<i64>,
}

/// All sets of descriptors.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryFdsets;

/// A set of descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FdsetInfo {
    /// Its id.
    pub fdset_id: u64,
    /// What is in it.
    pub fds: Vec<FdsetFd>,
}

/// A descriptor of a set.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct FdsetFd {
    /// Its number in QEMU.
    pub fd: i64,
    /// The note that [`AddFd`] left.
    #[serde(default)]
    pub opaque: Option<String>,
}

/// Stops the guest's processors.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Stop;

/// Lets the guest's processors go on.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Cont;

/// Presses the guest's power button.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct SystemPowerdown;

/// Resets the machine; it has happened some time after the reply.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct SystemReset;

/// Changes what QEMU does at certain events of the guest; what is not given stays.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct SetAction {
    /// When the guest switches off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shutdown: Option<ShutdownAction>,
}

/// What QEMU does when the guest switches off. A signal or `quit` ends it all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownAction {
    /// It ends, as it does by default.
    Poweroff,
    /// It stays, in the state [`RunState::Shutdown`].
    Pause,
}

/// Ends QEMU at once, perhaps before it replies: see [`crate::Session::quit`].
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Quit;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_export_has_the_form_qemu_expects() {
        let export = NbdExportAdd {
            id: "e".into(),
            node_name: "n".into(),
            name: None,
            writable: true,
            bitmaps: vec![
                BitmapRef::Name("b".into()),
                BitmapRef::OnNode { node: "n".into(), name: "c".into() },
            ],
            iothread: None,
        };
        let expected = json!({"type": "nbd", "id": "e", "node-name": "n", "writable": true,
            "bitmaps": ["b", {"node": "n", "name": "c"}]});
        assert_eq!(serde_json::to_value(export).unwrap(), expected);
        let server = NbdServerStart::unix(Path::new("/s")).unwrap();
        let expected = json!({"addr": {"type": "unix", "data": {"path": "/s"}}});
        assert_eq!(serde_json::to_value(server).unwrap(), expected);
        let server = NbdServerStart::given("socket");
        let expected = json!({"addr": {"type": "fd", "data": {"str": "socket"}}});
        assert_eq!(serde_json::to_value(server).unwrap(), expected);
    }

    #[test]
    fn an_unknown_run_state_is_kept() {
        let status = json!({"running": false, "status": "hibernating", "new-member": {}});
        let status: StatusInfo = serde_json::from_value(status).unwrap();
        assert_eq!(status.status, RunState::Other("hibernating".into()));
    }
}
