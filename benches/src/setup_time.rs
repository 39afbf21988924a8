// SPDX-License-Identifier: MIT OR Apache-2.0
//! How long all guest I/O is held for one point in time over many large disks.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cases::Cache;
use crate::daemon::{Daemon, File};
use crate::disk::sparse;
use crate::run::Bench;
use crate::scratch::Scratch;
use crate::stats::{Estimate, estimate};

const DISKS: usize = 8;
const DISK_BYTES: u64 = 1 << 40;
const SMALL_BYTES: u64 = 1 << 20;
const RUNS: usize = 20;
const PAUSE: Duration = Duration::from_millis(20);

/// Both kinds of setup, alternating.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SetupTimes {
    /// Drained time with eight disks of 1 TiB and new bitmaps.
    pub large_ms: Vec<f64>,
    /// Drained time with one tiny disk and no bitmap: an empty drain of the same daemon.
    pub empty_ms: Vec<f64>,
    /// What the large ones take longer than the empty one before.
    pub difference_ms: Option<Estimate>,
}

/// Measures.
///
/// # Errors
/// The daemon refuses, or the file system has no sparse files of this size.
pub async fn measure(bench: &Bench) -> Result<SetupTimes> {
    let folder = Scratch::new(&bench.folder, "setup-")?;
    let daemon = Daemon::start(&bench.bin, &bench.folder, bench.iothread).await?;
    let names: Vec<String> = (0..DISKS).map(|n| format!("big{n}")).collect();
    let sizes =
        names.iter().map(|name| (name.as_str(), DISK_BYTES)).chain([("small", SMALL_BYTES)]);
    for (name, size_bytes) in sizes {
        for node in [name.to_owned(), format!("{name}-fleecing")] {
            let path = folder.path().join(&node);
            sparse(&path, size_bytes)?;
            let file = File { path: &path, qcow2: false, cache: Cache::Direct, aio: "native" };
            daemon.add_file(&node, &file).await?;
        }
        // The guest's device.
        daemon.export(name, name, true).await?;
    }
    let device = |name: &str| json!({ "device": name, "fleecing": format!("{name}-fleecing") });
    let small = json!([device("small")]);
    let large: Vec<Value> = names
        .iter()
        .map(|name| {
            let mut device = device(name);
            device["bitmap-mode"] = json!("new");
            device
        })
        .collect();
    let large = json!(large);
    let (mut large_ms, mut empty_ms) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        empty_ms.push(drained_ms(&daemon, &small).await?);
        large_ms.push(drained_ms(&daemon, &large).await?);
    }
    daemon.quit().await?;
    let differences: Vec<f64> = large_ms.iter().zip(&empty_ms).map(|(a, b)| a - b).collect();
    Ok(SetupTimes { large_ms, empty_ms, difference_ms: estimate(&differences) })
}

async fn drained_ms(daemon: &Daemon, devices: &Value) -> Result<f64> {
    let request = json!({ "target-id": "setup", "devices": devices });
    let infos = daemon.execute("backup-access-setup", request).await?;
    let ns = infos[0]["drained-ns"].as_u64().context("backup-access-setup reports no time")?;
    let end = json!({ "target-id": "setup", "success": false });
    daemon.execute("backup-access-teardown", end).await?;
    tokio::time::sleep(PAUSE).await;
    Ok(ns as f64 / 1e6)
}
