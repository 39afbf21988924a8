// SPDX-License-Identifier: MIT OR Apache-2.0
//! The block nodes of a disk that is filled from an archive while its guest runs.
//!
//! ```text
//! qcow2     device ─► drive-scsi0 ─ backing ─► archive-scsi0 (NBD)
//! others    device ─► overlay-scsi0 ─ backing ─► archive-scsi0        drive-scsi0 is filled beside it
//! ```
//!
//! An archive that cannot be read for a while holds requests back, then fails them: the guest is paused by
//! that, and never sees zeroes or an error.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{CmdlineError, path_text};

/// How long requests wait for the archive's server to come back before they fail. Less than a guest's own
/// time limits.
const RECONNECT_S: u32 = 10;
/// How long the server may take to answer when QEMU is started.
const OPEN_S: u32 = 30;

/// A disk that is not complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveNode {
    /// Its key.
    pub key: String,
    /// Where the archive is served.
    pub socket: PathBuf,
    /// Name of the export.
    pub export: String,
    /// The qcow2 image that has the guest's writes, where that is not the disk itself.
    pub overlay: Option<PathBuf>,
}

impl LiveNode {
    /// The node of the archive.
    #[must_use]
    pub fn archive_node(key: &str) -> String {
        format!("archive-{key}")
    }

    /// The node of an image that has the guest's writes.
    #[must_use]
    pub fn overlay_node(key: &str) -> String {
        format!("overlay-{key}")
    }

    /// The node that the guest uses.
    pub(super) fn top(&self) -> String {
        match self.overlay {
            Some(_) => Self::overlay_node(&self.key),
            None => super::drive_node(&self.key),
        }
    }

    /// A node of its own: options of a backing within another one's would be mixed with what the image's header
    /// says.
    pub(super) fn archive(&self) -> Result<Value, CmdlineError> {
        Ok(json!({
            "driver": "nbd",
            "node-name": Self::archive_node(&self.key),
            "server": { "type": "unix", "path": path_text(&self.socket)? },
            "export": self.export,
            "read-only": true,
            "reconnect-delay": RECONNECT_S,
            "open-timeout": OPEN_S,
        }))
    }

    /// Puts the archive below the disk's node, or returns another node that has it and is used instead.
    pub(super) fn attach(&self, disk: &mut Value) -> Result<Option<Value>, CmdlineError> {
        let archive = json!(Self::archive_node(&self.key));
        let Some(overlay) = &self.overlay else {
            disk["backing"] = archive;
            return Ok(None);
        };
        let mut node = disk.clone();
        if let Some(members) = node.as_object_mut() {
            members.remove("data-file");
        }
        node["driver"] = json!("qcow2");
        node["node-name"] = json!(Self::overlay_node(&self.key));
        node["backing"] = archive;
        node["file"]["driver"] = json!("file");
        node["file"]["node-name"] = json!(format!("overlay-file-{}", self.key));
        node["file"]["filename"] = json!(path_text(overlay)?);
        Ok(Some(node))
    }
}
