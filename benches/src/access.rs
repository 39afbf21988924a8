// SPDX-License-Identifier: MIT OR Apache-2.0
//! The point-in-time view of a disk: by QEMU's own filter, by ours, or none.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cases::Filter;
use crate::daemon::Daemon;

/// The disk's node.
pub const DISK: &str = "disk";
/// The fleecing image's node.
pub const FLEECING: &str = "disk-fleecing";
/// QEMU's filter.
pub const C_FILTER: &str = "cbw";
const C_SNAPSHOT: &str = "snapshot";
const TARGET: &str = "bench";

/// How a backup is made.
#[derive(Debug, Clone, Copy)]
pub struct Backup {
    /// Our RAM for old data.
    pub buffer_bytes: u64,
    /// From so many bytes on old data shares the disk's blocks with our fleecing image.
    pub reflink_bytes: Option<u64>,
    /// Whether the reader releases what it has read.
    pub reader_trims: bool,
}

/// Exports the disk as `guest`, begins the access, and exports what the backup client reads as
/// `reader`: the snapshot, or the disk itself without a filter.
///
/// # Errors
/// The daemon refuses.
pub async fn begin(daemon: &Daemon, filter: Filter, backup: Backup) -> Result<()> {
    let reader = match filter {
        Filter::None => {
            daemon.export(DISK, "guest", true).await?;
            DISK.to_owned()
        }
        Filter::C => {
            add_c_filter(daemon).await?;
            daemon.export(C_FILTER, "guest", true).await?;
            add_c_snapshot(daemon).await?
        }
        Filter::Ours => {
            // The filter goes between what is there and the disk.
            daemon.export(DISK, "guest", true).await?;
            set_up(daemon, backup).await?
        }
    };
    daemon.export(&reader, "reader", backup.reader_trims && filter != Filter::None).await
}

/// Adds QEMU's filter above the disk; nothing uses it yet.
///
/// # Errors
/// The daemon refuses.
pub async fn add_c_filter(daemon: &Daemon) -> Result<()> {
    daemon
        .add_node(json!({ "driver": "copy-before-write", "node-name": C_FILTER, "file": DISK,
                          "target": FLEECING, "on-cbw-error": "break-snapshot",
                          "cbw-timeout": 45 }))
        .await
}

/// Puts QEMU's filter with a target in RAM above the disk and exports it: it shares the disk with no
/// other writer, so this works only where the others will.
///
/// # Errors
/// The daemon refuses.
pub async fn add_c_filter_on_nothing(daemon: &Daemon) -> Result<()> {
    let size = daemon.execute("query-named-block-nodes", json!({ "flat": true })).await?;
    let node = size.as_array().and_then(|all| all.iter().find(|node| node["node-name"] == DISK));
    let size = node.map(|node| node["image"]["virtual-size"].clone()).context("no disk")?;
    daemon.add_node(json!({ "driver": "null-co", "node-name": FLEECING, "size": size })).await?;
    add_c_filter(daemon).await?;
    daemon.export(C_FILTER, "guest", true).await
}

/// Adds QEMU's view of its filter.
///
/// # Errors
/// The daemon refuses.
pub async fn add_c_snapshot(daemon: &Daemon) -> Result<String> {
    daemon
        .add_node(json!({ "driver": "snapshot-access", "node-name": C_SNAPSHOT,
                          "file": C_FILTER, "discard": "unmap" }))
        .await?;
    Ok(C_SNAPSHOT.to_owned())
}

/// Begins our access of the one disk.
///
/// # Errors
/// The daemon refuses, or has no such command.
pub async fn set_up(daemon: &Daemon, backup: Backup) -> Result<String> {
    let mut request = json!({ "target-id": TARGET, "buffer-size": backup.buffer_bytes,
                              "devices": [{ "device": DISK, "fleecing": FLEECING }] });
    if let Some(bytes) = backup.reflink_bytes {
        request["reflink-size"] = json!(bytes);
    }
    let infos = daemon.execute("backup-access-setup", request).await?;
    let node = infos[0]["node-name"].as_str().context("backup-access-setup named no node")?;
    Ok(node.to_owned())
}

/// The state of our access of the one disk.
///
/// # Errors
/// There is none.
pub async fn query(daemon: &Daemon) -> Result<Value> {
    let status = daemon.execute("query-backup-access", json!({})).await?;
    let device = status[0]["devices"].get(0).context("the access has no device")?;
    Ok(device.clone())
}
