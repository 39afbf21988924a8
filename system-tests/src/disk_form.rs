// SPDX-License-Identifier: MIT OR Apache-2.0
//! The forms in which a disk's data and its dirty bitmaps can be stored.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::storage::{Storage, raw_node};

/// How a disk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskForm {
    /// A raw file; bitmaps live as long as the process.
    Raw,
    /// A qcow2 image, which stores bitmaps.
    Qcow2,
    /// A raw file with a qcow2 image that stores no data but the bitmaps.
    RawWithQcow2,
}

impl DiskForm {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Raw, Self::Qcow2, Self::RawWithQcow2];

    /// Whether QEMU stores the bitmaps when the disk is closed.
    #[must_use]
    pub fn stores_bitmaps(self) -> bool {
        self != Self::Raw
    }

    /// Makes the files of a disk in a folder.
    ///
    /// # Errors
    /// They cannot be made.
    pub fn create(self, folder: &Path, name: &str, size_bytes: u64) -> Result<()> {
        let path = folder.join(name);
        if self == Self::Raw {
            return Ok(File::create(path)?.set_len(size_bytes)?);
        }
        let mut command = Command::new(crate::qemu::bin_dir()?.join("qemu-img"));
        command.args(["create", "-q", "-f", "qcow2"]);
        if self == Self::RawWithQcow2 {
            let data = folder.join(data_name(name));
            command.arg("-o").arg(format!("data_file={},data_file_raw=on", data.display()));
        }
        let status = command.arg(path).arg(size_bytes.to_string()).status();
        ensure!(status.context("qemu-img")?.success(), "qemu-img cannot make {name}");
        Ok(())
    }

    /// Adds the nodes of a disk in the process's folder; the topmost one has the disk's name.
    ///
    /// # Errors
    /// QEMU refuses one.
    pub async fn open(self, storage: &Storage, name: &str) -> Result<()> {
        for node in self.nodes(storage, name) {
            storage.node(node).await?;
        }
        Ok(())
    }

    /// The descriptions of a disk's nodes, the topmost one last.
    #[must_use]
    pub fn nodes(self, storage: &Storage, name: &str) -> Vec<Value> {
        let file = format!("{name}-file");
        let mut top = raw_node(name, &file);
        let mut nodes = vec![storage.file_node(&file, name)];
        if self != Self::Raw {
            top["driver"] = json!("qcow2");
        }
        if self == Self::RawWithQcow2 {
            let data = data_name(name);
            nodes.push(storage.file_node(&data, &data));
            top["data-file"] = json!(data);
        }
        nodes.push(top);
        nodes
    }
}

/// The raw file, and its node, of a disk whose bitmaps are in a qcow2 image.
fn data_name(disk: &str) -> String {
    format!("{disk}-data")
}
