// SPDX-License-Identifier: MIT OR Apache-2.0
//! Stress of the fleecing path in a real storage daemon: writers change a disk all the time, a
//! backup access is set up among them, and every sector of the snapshot is compared with what the
//! disk held at that moment.
//!
//! Each run is made from one seed: queue depth, buffer, kind of fleecing image, cache mode,
//! iothread, trims by the reader, sizes and offsets.

mod chain;
mod daemon;
mod model;
mod reader;
mod writers;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use provider_nbd::{Client, Options};
use qmp_client::backup::{self, Device, DeviceStatus, SetupRequest};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use daemon::Daemon;
use model::Model;

/// Time for one request of a run; far beyond what a slow machine needs.
const REQUEST_WITHIN: Duration = Duration::from_secs(60);
const TARGET: &str = "stress";

/// One run, as made from its seed.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The seed.
    pub seed: u64,
    /// Size of the disk in bytes; not a multiple of anything large.
    pub size_bytes: u64,
    /// Guest requests in flight.
    pub queue_depth: usize,
    /// RAM for old data in bytes.
    pub buffer_bytes: u64,
    /// Whether the fleecing image is qcow2.
    pub qcow2: bool,
    /// Whether source and fleecing image bypass the host's page cache.
    pub direct: bool,
    /// Whether the guest's export runs in an iothread.
    pub iothread: bool,
    /// Whether the reader releases what it has read.
    pub trims: bool,
    /// Whether a chain of increments is made first.
    pub chain: bool,
    /// How the daemon ends.
    pub ending: Ending,
}

/// How the daemon of a run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It quits after a teardown.
    TornDown,
    /// It is told to quit with the access active.
    QuitsActive,
    /// It is killed under guest writes with the access active.
    Killed,
}

impl Plan {
    /// The run of a seed. Low seeds go through the combinations that matter most.
    #[must_use]
    pub fn from_seed(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let direct = rng.random();
        // Direct I/O may demand whole blocks of the host's disk.
        let unit = if direct { 4096 } else { 512 };
        Self {
            seed,
            size_bytes: (rng.random_range(24..48) << 20) + unit * rng.random_range(0..9),
            queue_depth: if seed.is_multiple_of(2) { 32 } else { 1 },
            buffer_bytes: [0, 2 << 20, 4 << 20, 64 << 20][(seed / 2 % 4) as usize],
            qcow2: seed % 3 == 1,
            direct,
            iothread: seed % 4 >= 2,
            trims: rng.random(),
            chain: seed % 4 >= 1 && seed % 4 <= 2,
            ending: match seed % 5 {
                3 => Ending::Killed,
                4 => Ending::QuitsActive,
                _ => Ending::TornDown,
            },
        }
    }
}

/// What a run did, for its log line.
#[derive(Debug)]
pub struct Outcome {
    /// Guest requests while the access was active.
    pub requests: u64,
    /// Sectors compared.
    pub sectors: u64,
    /// Sectors read by increments.
    pub incremental_sectors: u64,
    /// Old data saved.
    pub captured_bytes: u64,
    /// How often a guest request found no room in RAM.
    pub overflows: u64,
    /// Longest wait of a guest request for a capture.
    pub delay_max_ns: u64,
}

/// Carries one run out.
///
/// # Errors
/// A sector is wrong, or something failed or took too long.
pub async fn run(plan: &Plan) -> Result<Outcome> {
    let daemon = Daemon::start(plan).await.context("starting the storage daemon")?;
    let guest = connect(&daemon, "guest", &[]).await?;
    let model = Arc::new(Model::new(plan.size_bytes / model::SECTOR));
    writers::fill(&guest, &model).await.context("filling the disk")?;
    let writers = writers::Writers::start(plan, &guest, &model);
    writers.let_run(200).await?;
    let incremental_sectors = if plan.chain {
        chain::check(plan, &daemon, &model, &writers).await.context("increments")?
    } else {
        0
    };

    model.begin_point_in_time();
    let request = SetupRequest {
        buffer_size_bytes: Some(plan.buffer_bytes),
        ..SetupRequest::new(TARGET, vec![Device::new("disk")])
    };
    let infos = backup::setup(daemon.session(), &request).await.context("setup")?;
    model.end_point_in_time();
    ensure!(infos[0].size_bytes == plan.size_bytes, "setup reports {} bytes", infos[0].size_bytes);
    daemon.export(&infos[0].node_name, "snapshot", None).await?;

    let requests_before = writers.requests();
    let snapshot = connect(&daemon, "snapshot", &["base:allocation"]).await?;
    let sectors = reader::check(plan, &snapshot, &model).await.context("reading the snapshot")?;
    let requests = writers.requests() - requests_before;
    let status = backup::query(daemon.session()).await?;
    let device = status.first().and_then(|access| access.devices.first());
    let device = device.context("the access is not listed")?.clone();
    ensure!(device.error.is_none(), "the snapshot reports {:?}", device.error);

    match plan.ending {
        Ending::TornDown => {
            // With the client still connected, and the guest still writing.
            let result = backup::teardown(daemon.session(), TARGET, true).await;
            let result = result.context("teardown")?;
            ensure!(result.existed, "the access was gone before its teardown");
            drop(snapshot);
            writers.let_run(50).await?;
        }
        Ending::QuitsActive => {}
        Ending::Killed => {
            let disk = daemon.kill()?;
            writers.abandon().await;
            model.check_killed_disk(&disk).context("comparing the disk after the kill")?;
            return Ok(outcome(requests, [sectors, incremental_sectors], &device));
        }
    }
    writers.stop().await.context("guest requests")?;
    reader::check_disk(&guest, &model).await.context("comparing the guest's disk")?;
    drop(guest);
    daemon.quit().await.context("quitting the storage daemon")?;
    Ok(outcome(requests, [sectors, incremental_sectors], &device))
}

fn outcome(
    requests: u64,
    [sectors, incremental_sectors]: [u64; 2],
    device: &DeviceStatus,
) -> Outcome {
    Outcome {
        requests,
        sectors,
        incremental_sectors,
        captured_bytes: device.captured_bytes,
        overflows: device.overflows,
        delay_max_ns: device.delay_max_ns,
    }
}

async fn connect(daemon: &Daemon, export: &str, contexts: &[&str]) -> Result<Client> {
    let options = Options {
        contexts: contexts.iter().map(|&context| context.to_owned()).collect(),
        connections: 1,
        whole_reads: true,
        timeout: Some(REQUEST_WITHIN),
    };
    Client::connect_unix(daemon.nbd_socket(), export, options)
        .await
        .with_context(|| format!("connecting to the export {export}"))
}
