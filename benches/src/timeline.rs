// SPDX-License-Identifier: MIT OR Apache-2.0
//! Latency over time while a backup begins under a running guest.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::access;
use crate::cases::{Case, Filter, Mode};
use crate::daemon::Daemon;
use crate::fio;
use crate::reader::Reader;
use crate::run::Bench;
use crate::scratch::Scratch;

/// When the backup begins.
pub const BEGINS: Duration = Duration::from_secs(10);
const READER_BYTES_PER_SECOND: u64 = 300_000_000;
/// What the guest writes through, so that a filter can be put below it while it runs.
const TOP: &str = "top";

/// One line of the plot: seconds and microseconds, means of 100 ms.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Line {
    /// The mode.
    pub mode: String,
    /// Seconds since the guest's beginning, mean latency in microseconds.
    pub points: Vec<(f64, f64)>,
}

/// Runs the guest of a case at a fixed rate for `seconds`; the backup and its client begin after
/// [`BEGINS`].
///
/// # Errors
/// As every run.
pub async fn run(bench: &Bench, case: &Case, mode: Mode, seconds: u32, rate: u32) -> Result<Line> {
    let disk = bench.disk.clone();
    let cache = case.cache;
    tokio::task::spawn_blocking(move || disk.settle(cache)).await??;
    let logs = Scratch::new(&bench.folder, "log-")?;
    let daemon = Daemon::start(&bench.bin, &bench.folder, bench.iothread).await?;
    let image = bench.add_nodes(case, &daemon, true).await?;
    daemon.add_node(json!({ "driver": "raw", "node-name": TOP, "file": access::DISK })).await?;
    daemon.export(TOP, "guest", true).await?;
    let prefix = logs.path().join("guest");
    let job =
        fio::Job { seconds, latency_log: Some(prefix.clone()), ..bench.job(case, Some(rate)) };
    let socket = daemon.nbd_socket();
    let guest = job.run(&socket, "guest");
    let backup = async {
        tokio::time::sleep(BEGINS).await;
        begin(&daemon, mode.filter, &socket, bench.backup(case)).await
    };
    let (guest, reader) = tokio::join!(guest, backup);
    guest?;
    if let Some(reader) = reader.context("the backup did not begin")? {
        reader.stop().await?;
    }
    daemon.quit().await?;
    drop(image);
    Ok(Line { mode: mode.name.to_owned(), points: fio::latency_log(&prefix)? })
}

async fn begin(
    daemon: &Daemon,
    filter: Filter,
    socket: &Path,
    backup: access::Backup,
) -> Result<Option<Reader>> {
    let node = match filter {
        Filter::None => return Ok(None),
        Filter::Ours => access::set_up(daemon, backup).await?,
        Filter::C => {
            access::add_c_filter(daemon).await?;
            let top = json!({ "driver": "raw", "node-name": TOP, "file": access::C_FILTER });
            daemon.execute("blockdev-reopen", json!({ "options": [top] })).await?;
            access::add_c_snapshot(daemon).await?
        }
    };
    daemon.export(&node, "reader", backup.reader_trims).await?;
    Reader::start(socket, "reader", Some(READER_BYTES_PER_SECOND), backup.reader_trims)
        .await
        .map(Some)
}
