// SPDX-License-Identifier: MIT OR Apache-2.0
//! The backup client: reads every sector of the snapshot once, in random order and sizes, several
//! requests at a time, asks for block status in between, and releases what it has read. In a run
//! with faults, requests may fail; what succeeds must be right.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use provider_nbd::{Client, Errno, context};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::Plan;
use super::faults::Fault;
use super::model::{Model, SECTOR};

const DEPTH: usize = 8;

/// Compares the whole snapshot; returns the number of sectors that were read.
pub(super) async fn check(plan: &Plan, snapshot: &Client, model: &Arc<Model>) -> Result<u64> {
    let loses = plan.fault.is_some_and(Fault::loses);
    let mut rng = StdRng::seed_from_u64(plan.seed ^ 0xBEEF);
    let mut pieces = cut(&mut rng, model.sectors());
    pieces.shuffle(&mut rng);
    let room = Arc::new(Semaphore::new(DEPTH));
    let mut tasks = JoinSet::new();
    let mut read = 0;
    for piece in &pieces {
        let place = Arc::clone(&room).acquire_owned().await?;
        let (snapshot, model, piece) = (snapshot.clone(), Arc::clone(model), piece.clone());
        let (trims, status) = (plan.trims, rng.random_ratio(1, 4));
        tasks.spawn(async move {
            let _place = place;
            if status {
                tolerate(loses, check_status(&snapshot, &model, &piece).await)?;
            }
            tolerate(loses, check_piece(&snapshot, &model, &piece, trims).await)
        });
        while let Some(done) = tasks.try_join_next() {
            read += done??;
        }
    }
    while let Some(done) = tasks.join_next().await {
        read += done??;
    }
    if loses {
        // What was released and what was lost cannot be told apart any more.
    } else if plan.trims {
        check_released(snapshot, &pieces).await?;
    } else {
        // Saved data is still there and still the same.
        for piece in pieces.iter().take(pieces.len() / 4) {
            check_piece(snapshot, model, piece, false).await?;
        }
    }
    ensure!(loses || read == model.sectors(), "{read} sectors were read");
    Ok(read)
}

/// The result, or nothing if the request failed as it may.
fn tolerate(loses: bool, result: Result<u64>) -> Result<u64> {
    match result {
        Err(error) if loses && errno_of(&error) == Some(Errno::EIO) => Ok(0),
        other => other,
    }
}

fn errno_of(error: &anyhow::Error) -> Option<Errno> {
    error.downcast_ref::<provider_nbd::Error>().and_then(provider_nbd::Error::errno)
}

fn cut(rng: &mut StdRng, sectors: u64) -> Vec<Range<u64>> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < sectors {
        let longest = [8, 128, 2048][rng.random_range(0..3)];
        let end = (at + rng.random_range(1..=longest)).min(sectors);
        pieces.push(at..end);
        at = end;
    }
    pieces
}

async fn check_piece(
    snapshot: &Client,
    model: &Model,
    piece: &Range<u64>,
    trim: bool,
) -> Result<u64> {
    let (offset, len) = (piece.start * SECTOR, (piece.end - piece.start) * SECTOR);
    let data = snapshot.read(offset, len as usize).await;
    let data = data.with_context(|| format!("snapshot read of {len} bytes at {offset}"))?;
    model.check_snapshot(piece.start, &data)?;
    if trim {
        snapshot.trim(offset, len).await.context("trim of the snapshot")?;
    }
    Ok(piece.end - piece.start)
}

/// No sector counts as read by this.
async fn check_status(snapshot: &Client, model: &Model, piece: &Range<u64>) -> Result<u64> {
    let (offset, len) = (piece.start * SECTOR, (piece.end - piece.start) * SECTOR);
    let mut extents = snapshot.extents(context::BASE_ALLOCATION, offset, len);
    while let Some(extent) = extents.next().await.context("block status of the snapshot")? {
        if extent.flags & context::ZERO != 0 {
            model.check_zero(extent.offset / SECTOR..extent.end() / SECTOR)?;
        }
    }
    Ok(0)
}

/// Whole granules that were released must not be readable any more.
async fn check_released(snapshot: &Client, pieces: &[Range<u64>]) -> Result<()> {
    let whole = pieces.iter().find(|piece| piece.start.next_multiple_of(8) + 8 <= piece.end);
    let Some(piece) = whole else { return Ok(()) };
    let offset = piece.start.next_multiple_of(8) * SECTOR;
    let error = snapshot.read(offset, 4096).await.err();
    let errno = error.as_ref().and_then(provider_nbd::Error::errno);
    ensure!(errno == Some(Errno::EPERM), "a read of a released area gives {error:?}, not EPERM");
    Ok(())
}

/// Compares the guest's own disk; no request is in flight.
pub(super) async fn check_disk(guest: &Client, model: &Model) -> Result<()> {
    let sectors = model.sectors();
    for start in (0..sectors).step_by(2048) {
        let len = (sectors - start).min(2048) * SECTOR;
        let data = guest.read(start * SECTOR, len as usize).await?;
        model.check_disk(start, &data)?;
    }
    Ok(())
}
