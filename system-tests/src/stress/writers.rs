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

use super::Plan;
use super::model::{Model, SECTOR, Ticket, encode};

/// Sectors of a 4 KiB granule.
const GRANULE: u64 = 8;
/// Longest request in sectors.
const LONGEST: u64 = 2048;
const PROGRESS_WITHIN: Duration = Duration::from_secs(120);

pub(super) struct Writers {
    tasks: JoinSet<Result<()>>,
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Write,
    Zeroes { no_hole: bool },
    Trim,
}

impl Writers {
    /// Starts as many as the plan's queue depth.
    pub(super) fn start(plan: &Plan, guest: &Client, model: &Arc<Model>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        for index in 0..plan.queue_depth as u64 {
            let mut rng = StdRng::seed_from_u64(plan.seed.wrapping_mul(1000) + index);
            let (guest, model) = (guest.clone(), Arc::clone(model));
            let (stop, requests) = (Arc::clone(&stop), Arc::clone(&requests));
            tasks.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    one_request(&mut rng, &guest, &model).await?;
                    requests.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
        }
        Self { tasks, stop, requests }
    }

    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Waits until so many more requests are done.
    pub(super) async fn let_run(&self, more: u64) -> Result<()> {
        let goal = self.requests() + more;
        let deadline = Instant::now() + PROGRESS_WITHIN;
        while self.requests() < goal {
            ensure!(Instant::now() < deadline, "the guest makes no progress");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// The daemon is gone: waits until all have failed. What was in flight stays so in the model.
    pub(super) async fn abandon(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
    }

    pub(super) async fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(task) = self.tasks.join_next().await {
            task??;
        }
        Ok(())
    }
}

/// Writes the whole disk once, but for some holes.
pub(super) async fn fill(guest: &Client, model: &Model) -> Result<()> {
    let sectors = model.sectors();
    for (index, start) in (0..sectors).step_by(LONGEST as usize).enumerate() {
        if index % 5 == 3 {
            continue;
        }
        let range = start..(start + LONGEST).min(sectors);
        let ticket = model.begin(range, false).context("nothing else is in flight")?;
        carry_out(guest, &ticket, Kind::Write).await?;
        model.complete(&ticket);
    }
    Ok(())
}

async fn one_request(rng: &mut StdRng, guest: &Client, model: &Model) -> Result<()> {
    let kind = match rng.random_range(0..100) {
        0..65 => Kind::Write,
        65..85 => Kind::Zeroes { no_hole: rng.random() },
        _ => Kind::Trim,
    };
    let range = random_range(rng, model.sectors(), kind);
    let Some(ticket) = model.begin(range, !matches!(kind, Kind::Write)) else {
        tokio::task::yield_now().await;
        return Ok(());
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
