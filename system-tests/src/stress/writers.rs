// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest: random writes, write-zeroes and trims, many at once, half of them unaligned, with
//! hot spots.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use provider_nbd::{Client, ZeroOptions};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::JoinSet;

use super::model::{Effect, Model, SECTOR, Ticket, encode};

/// Sectors of a 4 KiB granule.
const GRANULE: u64 = 8;
/// Longest request in sectors.
const LONGEST: u64 = 2048;
const PROGRESS_WITHIN: Duration = Duration::from_secs(120);

/// How much the guest does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) seed: u64,
    /// Requests in flight.
    pub(crate) queue_depth: usize,
    /// Whether it also flushes.
    pub(crate) flushes: bool,
    /// Longest pause between two requests of one of them.
    pub(crate) pause: Duration,
}

pub(crate) struct Writers {
    tasks: JoinSet<Result<()>>,
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    large: Arc<AtomicBool>,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Write,
    Zeroes { no_hole: bool },
    Trim,
}

impl Kind {
    fn effect(self) -> Effect {
        match self {
            Self::Write => Effect::Write,
            Self::Zeroes { .. } => Effect::Zero,
            Self::Trim => Effect::Trim,
        }
    }
}

impl Writers {
    /// Starts as many as the load's queue depth.
    pub(crate) fn start(load: Load, guest: &Client, model: &Arc<Model>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(AtomicU64::new(0));
        let large = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for index in 0..load.queue_depth as u64 {
            let mut rng = StdRng::seed_from_u64(load.seed.wrapping_mul(1000).wrapping_add(index));
            let (guest, model) = (guest.clone(), Arc::clone(model));
            let (stop, requests) = (Arc::clone(&stop), Arc::clone(&requests));
            let large = Arc::clone(&large);
            tasks.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    if large.load(Ordering::Relaxed) && rng.random_ratio(1, 150) {
                        large_request(&mut rng, &guest, &model).await?;
                    }
                    if load.flushes && rng.random_ratio(1, 40) {
                        flush(&guest, &model).await?;
                    }
                    if one_request(&mut rng, &guest, &model).await? {
                        requests.fetch_add(1, Ordering::Relaxed);
                    }
                    if !load.pause.is_zero() {
                        tokio::time::sleep(load.pause.mul_f64(rng.random())).await;
                    }
                }
                Ok(())
            });
        }
        Self { tasks, stop, requests, large }
    }

    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// From now on some requests are of up to the whole disk. Not earlier, or there would be little
    /// to save.
    pub(crate) fn allow_large(&self) {
        self.large.store(true, Ordering::Relaxed);
    }

    /// Waits until so many more requests are done.
    pub(crate) async fn let_run(&self, more: u64) -> Result<()> {
        let goal = self.requests() + more;
        let deadline = Instant::now() + PROGRESS_WITHIN;
        while self.requests() < goal {
            ensure!(Instant::now() < deadline, "the guest makes no progress");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// The daemon is gone: waits until all have failed. What was in flight stays so in the model.
    pub(crate) async fn abandon(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
    }

    pub(crate) async fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(task) = self.tasks.join_next().await {
            task??;
        }
        Ok(())
    }
}

/// Writes the whole disk once, but for some holes.
pub(crate) async fn fill(guest: &Client, model: &Model) -> Result<()> {
    let sectors = model.sectors();
    for (index, start) in (0..sectors).step_by(LONGEST as usize).enumerate() {
        if index % 5 == 3 {
            continue;
        }
        let range = start..(start + LONGEST).min(sectors);
        let ticket = model.begin(range, Effect::Write).context("nothing else is in flight")?;
        carry_out(guest, &ticket, Kind::Write).await?;
        model.complete(&ticket);
    }
    Ok(())
}

async fn flush(guest: &Client, model: &Model) -> Result<()> {
    let flush = model.begin_flush();
    guest.flush().await.context("guest's flush")?;
    model.end_flush(flush);
    Ok(())
}

/// Whether there was room for it beside the others.
async fn one_request(rng: &mut StdRng, guest: &Client, model: &Model) -> Result<bool> {
    let kind = match rng.random_range(0..100) {
        0..65 => Kind::Write,
        65..85 => Kind::Zeroes { no_hole: rng.random() },
        _ => Kind::Trim,
    };
    let range = random_range(rng, model.sectors(), kind);
    let Some(ticket) = model.begin(range, kind.effect()) else {
        tokio::task::yield_now().await;
        return Ok(false);
    };
    carry_out(guest, &ticket, kind).await?;
    model.complete(&ticket);
    Ok(true)
}

/// A trim or write-zeroes of up to the whole disk; it waits for its turn.
async fn large_request(rng: &mut StdRng, guest: &Client, model: &Model) -> Result<()> {
    let kind = if rng.random() { Kind::Trim } else { Kind::Zeroes { no_hole: rng.random() } };
    let whole = model.sectors() / GRANULE * GRANULE;
    let len = (whole >> rng.random_range(0..5)) / GRANULE * GRANULE;
    let start = rng.random_range(0..=(whole - len) / GRANULE) * GRANULE;
    if !model.reserve(&(start..start + len)) {
        return Ok(());
    }
    let deadline = Instant::now() + PROGRESS_WITHIN;
    let ticket = loop {
        if let Some(ticket) = model.begin_reserved(kind.effect()) {
            break ticket;
        }
        ensure!(!guest.is_closed(), "the daemon is gone");
        ensure!(Instant::now() < deadline, "the guest's other requests do not end");
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    carry_out(guest, &ticket, kind).await?;
    model.complete(&ticket);
    Ok(())
}

fn random_range(rng: &mut StdRng, sectors: u64, kind: Kind) -> Range<u64> {
    // A trim need not reach parts of the devices' own blocks: only whole ones are predictable.
    let unit = if matches!(kind, Kind::Trim) || rng.random() { GRANULE } else { 1 };
    let longest = match rng.random_range(0..10) {
        0 => LONGEST,
        1..4 => 128,
        _ => 16,
    };
    let area = if rng.random_ratio(1, 3) { sectors / 16 } else { sectors };
    let start = rng.random_range(0..area.saturating_sub(longest).max(1)) / unit * unit;
    let len = (rng.random_range(1..=longest) / unit * unit).max(unit);
    start..(start + len).min(sectors / unit * unit).max(start + unit)
}

async fn carry_out(guest: &Client, ticket: &Ticket, kind: Kind) -> Result<()> {
    let (start, end) = (ticket.sectors.start, ticket.sectors.end);
    let (offset, len) = (start * SECTOR, (end - start) * SECTOR);
    match kind {
        Kind::Write => {
            let data = Bytes::from(encode(&ticket.sectors, ticket.value));
            guest.write(offset, data, false).await
        }
        Kind::Zeroes { no_hole } => {
            let options = ZeroOptions { no_hole, ..ZeroOptions::default() };
            guest.write_zeroes(offset, len, options).await
        }
        Kind::Trim => guest.trim(offset, len).await,
    }
    .with_context(|| format!("guest's {kind:?} of {len} bytes at {offset}"))
}
