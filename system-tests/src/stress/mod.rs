// SPDX-License-Identifier: MIT OR Apache-2.0
//! Stress of the fleecing path in a real storage daemon: writers change a disk all the time, a
//! backup access is set up among them, and every sector of the snapshot is compared with what the
//! disk held at that moment.
//!
//! Each run is made from one seed: queue depth, buffer, kind of fleecing image, cache mode,
//! iothread, trims by the reader, sizes and offsets, drains beside it, requests of the size of the
//! disk; and in one of three a fault below the disk or its fleecing image. Then the snapshot may be
//! lost, but what is read from it is right, and the guest's requests succeed.

mod chain;
pub(crate) mod daemon;
pub(crate) mod faults;
pub(crate) mod model;
pub(crate) mod reader;
pub(crate) mod writers;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use provider_nbd::Errno;
use qmp_client::backup::{self, AccessState, Device, DeviceStatus, SetupRequest};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::storage::until;
use daemon::Daemon;
pub use faults::Fault;
use model::Model;
use reader::Reading;
use writers::Load;

/// Seconds without progress that break a snapshot whose image is bad.
const BREAKS_AFTER_S: u32 = 1;
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
    /// Whether the guest also trims and zeroes up to the whole disk at once.
    pub large: bool,
    /// Whether the monitor drains the disk all the time.
    pub drains: bool,
    /// What goes wrong below.
    pub fault: Option<Fault>,
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
        let fault = (seed % 3 == 2).then(|| Fault::ALL[(seed / 3 % 5) as usize]);
        let served = fault.is_some_and(|fault| fault.serves_disk() || fault.serves_image());
        let direct = !served && rng.random();
        // Direct I/O may demand whole blocks of the host's disk.
        let (unit, tail) =
            if direct { (4096, 1) } else { (512, [1, 0, 7, 8][rng.random_range(0..4)]) };
        Self {
            seed,
            size_bytes: (rng.random_range(16..32) << 20) + unit * tail,
            queue_depth: if seed.is_multiple_of(2) { 32 } else { 1 },
            buffer_bytes: match fault {
                Some(_) => [0, 1 << 20][rng.random_range(0..2)],
                None => [0, 2 << 20, 4 << 20, 64 << 20][(seed / 2 % 4) as usize],
            },
            // Only such an image can be smaller than what it says.
            qcow2: seed % 3 == 1 || fault == Some(Fault::Full),
            direct,
            iothread: seed % 4 >= 2,
            trims: rng.random(),
            chain: fault.is_none() && seed % 4 >= 1 && seed % 4 <= 2,
            large: rng.random_ratio(1, 3),
            // QEMU's drained sections wait for all I/O, so for a fleecing image that hangs as well.
            drains: rng.random::<bool>() && fault != Some(Fault::Stall),
            fault,
            ending: match seed % 5 {
                // What a server of the disk was told goes on after the kill.
                3 if !fault.is_some_and(Fault::serves_disk) => Ending::Killed,
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
    /// Sectors of the snapshot that were read and are right: all, unless there are faults.
    pub sectors: u64,
    /// How the snapshot was after that.
    pub state: AccessState,
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
    let mut daemon = Daemon::start(plan).await.context("starting the storage daemon")?;
    let guest = daemon.connect("guest", &[]).await?;
    let model = Arc::new(Model::new(plan.size_bytes / model::SECTOR));
    writers::fill(&guest, &model).await.context("filling the disk")?;
    let load = Load {
        seed: plan.seed,
        queue_depth: plan.queue_depth,
        flushes: false,
        pause: Duration::ZERO,
    };
    let writers = writers::Writers::start(load, &guest, &model);
    writers.let_run(200).await?;
    let drains = plan.drains.then(|| daemon.drain_all_the_time());
    let incremental_sectors = if plan.chain {
        chain::check(plan, &daemon, &model, &writers).await.context("increments")?
    } else {
        0
    };

    let moment = model.begin_point_in_time();
    let request = SetupRequest {
        buffer_size_bytes: Some(plan.buffer_bytes),
        timeout_s: plan.fault.is_some_and(Fault::breaks).then_some(BREAKS_AFTER_S),
        ..SetupRequest::new(TARGET, vec![Device::new("disk")])
    };
    let infos = backup::setup(daemon.session(), &request).await.context("setup")?;
    model.end_point_in_time(&moment);
    ensure!(infos[0].size_bytes == plan.size_bytes, "setup reports {} bytes", infos[0].size_bytes);
    daemon.export(&infos[0].node_name, "snapshot", None).await?;

    let requests_before = writers.requests();
    if plan.large {
        writers.allow_large();
    }
    let snapshot = daemon.connect("snapshot", &["base:allocation"]).await?;
    if plan.fault.is_some() {
        // Some data is saved before it begins.
        writers.let_run(20).await?;
        daemon.faults.begin().await.context("beginning the fault")?;
        writers.let_run(20).await.context("under the fault")?;
    }
    let reading = reading(plan, model.sectors());
    let read = tokio::select! {
        read = reader::check(&reading, &snapshot, &moment) => read,
        // What hangs in the image cannot be called back: it moves on once that broke the snapshot.
        Err(error) = move_on(plan, &mut daemon) => Err(error),
    };
    let sectors = read.with_context(|| format!("reading the snapshot ({plan:?})"))?;
    let device = status(plan, &daemon).await?;
    let outcome = Outcome {
        requests: writers.requests() - requests_before,
        sectors,
        state: device.state.clone(),
        incremental_sectors,
        captured_bytes: device.captured_bytes,
        overflows: device.overflows,
        delay_max_ns: device.delay_max_ns,
    };
    if let Some(drains) = drains {
        drains.stop().await.context("draining")?;
    }
    if plan.ending == Ending::Killed {
        let disk = daemon.kill()?;
        writers.abandon().await;
        model.check_ended_disk(&disk).context("comparing the disk after the kill")?;
        return Ok(outcome);
    }
    if plan.ending == Ending::TornDown {
        tear_down(plan, &mut daemon).await.context("teardown")?;
        drop(snapshot);
        writers.let_run(50).await?;
    }
    daemon.faults.end().await?;
    writers.stop().await.context("guest requests")?;
    reader::check_disk(&guest, &model).await.context("comparing the guest's disk")?;
    drop(guest);
    let disk = daemon.quit().await.context("quitting the storage daemon")?;
    model.check_ended_disk(&disk).context("comparing the disk after the end")?;
    Ok(outcome)
}

/// What the backup client does.
fn reading(plan: &Plan, sectors: u64) -> Reading {
    let mut reading = Reading { trims: plan.trims, ..Reading::whole(plan.seed, sectors) };
    if plan.fault.is_some_and(Fault::loses) {
        reading.tolerated.errnos = &[Errno::EIO];
    }
    reading
}

/// Ends a stall as soon as it broke the snapshot; then, or in a run without one, waits forever.
async fn move_on(plan: &Plan, daemon: &mut Daemon) -> Result<()> {
    if plan.fault == Some(Fault::Stall) {
        until("the stalled image breaks the snapshot", async || {
            Ok(status(plan, daemon).await?.state == AccessState::Broken)
        })
        .await?;
        daemon.faults.end().await?;
    }
    std::future::pending().await
}

/// The state of the access's only disk, which must be one that the plan allows.
async fn status(plan: &Plan, daemon: &Daemon) -> Result<DeviceStatus> {
    let status = backup::query(daemon.session()).await?;
    let device = status.first().and_then(|access| access.devices.first());
    let device = device.context("the access is not listed")?.clone();
    let allowed = match device.state {
        AccessState::Active => true,
        AccessState::Degraded => plan.fault.is_some_and(Fault::loses),
        _ => plan.fault.is_some_and(Fault::breaks),
    };
    ensure!(allowed, "the snapshot is {:?}: {:?}", device.state, device.error);
    Ok(device)
}

/// With the client still connected, and the guest still writing. An image that hangs is waited for
/// in vain, then it goes on.
async fn tear_down(plan: &Plan, daemon: &mut Daemon) -> Result<()> {
    let first = backup::teardown(daemon.session(), TARGET, true).await;
    daemon.faults.end().await?;
    match first {
        Ok(result) => ensure!(result.existed, "the access was gone before its teardown"),
        Err(error) => {
            ensure!(plan.fault == Some(Fault::Stall), "{error}");
            until("the teardown succeeds", async || {
                Ok(backup::teardown(daemon.session(), TARGET, true).await.is_ok())
            })
            .await?;
        }
    }
    Ok(())
}
