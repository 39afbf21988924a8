// SPDX-License-Identifier: MIT OR Apache-2.0
//! The backup client: reads every sector of the snapshot once, in random order and sizes, several
//! requests at a time, asks for block status in between, and releases what it has read. In a run
//! with faults, requests may fail; what succeeds must be right.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use provider_nbd::{Client, Errno, context};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::model::{Model, Moment, SECTOR, decode};

const DEPTH: usize = 8;

/// What to read of a snapshot, and how.
pub(crate) struct Reading {
    pub(crate) seed: u64,
    /// The sectors to read; each once.
    pub(crate) areas: Vec<Range<u64>>,
    /// Whether what was read is released.
    pub(crate) trims: bool,
    pub(crate) tolerated: Tolerated,
    /// Takes the values of the sectors.
    pub(crate) copy: Option<Arc<Mutex<Vec<u64>>>>,
}

impl Reading {
    /// All of a disk.
    pub(crate) fn whole(seed: u64, sectors: u64) -> Self {
        Self {
            seed,
            areas: std::iter::once(0..sectors).collect(),
            trims: false,
            tolerated: Tolerated::default(),
            copy: None,
        }
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.areas.iter().map(|area| area.end - area.start).sum()
    }
}

/// Errors that requests may meet. What succeeds must be right all the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tolerated {
    pub(crate) errnos: &'static [Errno],
    /// From now on requests may fail in any way.
    pub(crate) all: Arc<AtomicBool>,
}

impl Tolerated {
    fn nothing(&self) -> bool {
        self.errnos.is_empty() && !self.all.load(Ordering::Relaxed)
    }

    /// Whether the error is one of them.
    pub(crate) fn covers(&self, error: &anyhow::Error) -> bool {
        let Some(error) = error.downcast_ref::<provider_nbd::Error>() else { return false };
        self.all.load(Ordering::Relaxed)
            || error.errno().is_some_and(|errno| self.errnos.contains(&errno))
    }

    /// The result, or 0 if the request failed as it may.
    fn or_nothing(&self, result: Result<u64>) -> Result<u64> {
        match result {
            Err(error) if self.covers(&error) => Ok(0),
            other => other,
        }
    }
}

/// Compares the areas with the point in time; returns the number of sectors that were read.
pub(crate) async fn check(reading: &Reading, snapshot: &Client, moment: &Moment) -> Result<u64> {
    let mut rng = StdRng::seed_from_u64(reading.seed ^ 0xBEEF);
    let mut pieces: Vec<_> = reading.areas.iter().flat_map(|area| cut(&mut rng, area)).collect();
    pieces.shuffle(&mut rng);
    let room = Arc::new(Semaphore::new(DEPTH));
    let mut tasks = JoinSet::new();
    let mut read = 0;
    for piece in &pieces {
        let place = Arc::clone(&room).acquire_owned().await?;
        let (snapshot, moment, piece) = (snapshot.clone(), moment.clone(), piece.clone());
        let (trims, status) = (reading.trims, rng.random_ratio(1, 4));
        let (tolerated, copy) = (reading.tolerated.clone(), reading.copy.clone());
        tasks.spawn(async move {
            let _place = place;
            if status {
                tolerated.or_nothing(check_status(&snapshot, &moment, &piece).await)?;
            }
            let copy = copy.as_deref();
            tolerated.or_nothing(check_piece(&snapshot, &moment, &piece, trims, copy).await)
        });
        while let Some(done) = tasks.try_join_next() {
            read += done??;
        }
    }
    while let Some(done) = tasks.join_next().await {
        read += done??;
    }
    if !reading.tolerated.nothing() {
        // What was released and what was lost cannot be told apart any more.
        return Ok(read);
    }
    if reading.trims {
        check_released(snapshot, &pieces, &reading.tolerated).await?;
    } else {
        // Saved data is still there and still the same.
        for piece in pieces.iter().take(pieces.len() / 4) {
            let again = check_piece(snapshot, moment, piece, false, None).await;
            reading.tolerated.or_nothing(again)?;
        }
    }
    ensure!(
        read == reading.sectors() || !reading.tolerated.nothing(),
        "{read} sectors were read, not {}",
        reading.sectors()
    );
    Ok(read)
}

fn cut(rng: &mut StdRng, area: &Range<u64>) -> Vec<Range<u64>> {
    let mut pieces = Vec::new();
    let mut at = area.start;
    while at < area.end {
        let longest = [8, 128, 2048][rng.random_range(0..3)];
        let end = (at + rng.random_range(1..=longest)).min(area.end);
        pieces.push(at..end);
        at = end;
    }
    pieces
}

async fn check_piece(
    snapshot: &Client,
    moment: &Moment,
    piece: &Range<u64>,
    trim: bool,
    copy: Option<&Mutex<Vec<u64>>>,
) -> Result<u64> {
    let (offset, len) = (piece.start * SECTOR, (piece.end - piece.start) * SECTOR);
    let data = snapshot.read(offset, len as usize).await;
    let data = data.with_context(|| format!("snapshot read of {len} bytes at {offset}"))?;
    moment.check_snapshot(piece.start, &data)?;
    if let Some(copy) = copy {
        let mut copy = copy.lock().unwrap_or_else(PoisonError::into_inner);
        for (sector, bytes) in piece.clone().zip(data.chunks(SECTOR as usize)) {
            copy[sector as usize] = decode(sector, bytes)?;
        }
    }
    if trim {
        snapshot.trim(offset, len).await.context("trim of the snapshot")?;
    }
    Ok(piece.end - piece.start)
}

/// No sector counts as read by this.
async fn check_status(snapshot: &Client, moment: &Moment, piece: &Range<u64>) -> Result<u64> {
    let (offset, len) = (piece.start * SECTOR, (piece.end - piece.start) * SECTOR);
    let mut extents = snapshot.extents(context::BASE_ALLOCATION, offset, len);
    while let Some(extent) = extents.next().await.context("block status of the snapshot")? {
        if extent.flags & context::ZERO != 0 {
            moment.check_zero(extent.offset / SECTOR..extent.end() / SECTOR)?;
        }
    }
    Ok(0)
}

/// Whole granules that were released must not be readable any more.
async fn check_released(
    snapshot: &Client,
    pieces: &[Range<u64>],
    tolerated: &Tolerated,
) -> Result<()> {
    let whole = pieces.iter().find(|piece| piece.start.next_multiple_of(8) + 8 <= piece.end);
    let Some(piece) = whole else { return Ok(()) };
    let offset = piece.start.next_multiple_of(8) * SECTOR;
    let result = snapshot.read(offset, 4096).await;
    let errno = result.as_ref().err().and_then(provider_nbd::Error::errno);
    ensure!(
        errno == Some(Errno::EPERM) || !tolerated.nothing(),
        "a read of a released area gives {:?}, not EPERM",
        result.err()
    );
    Ok(())
}

/// Gives every piece of the guest's own disk to `check`.
async fn each_piece(
    guest: &Client,
    sectors: u64,
    mut check: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    for start in (0..sectors).step_by(2048) {
        let len = (sectors - start).min(2048) * SECTOR;
        let data = guest.read(start * SECTOR, len as usize).await?;
        check(start, &data)?;
    }
    Ok(())
}

/// Compares the guest's own disk; no request is in flight.
pub(crate) async fn check_disk(guest: &Client, model: &Model) -> Result<()> {
    each_piece(guest, model.sectors(), |first, data| model.check_disk(first, data)).await
}

/// Compares the disk with what the last daemon may have left, and goes on from what it holds.
pub(crate) async fn resume_disk(guest: &Client, model: &Model, clean: bool) -> Result<()> {
    each_piece(guest, model.sectors(), |first, data| model.resume(first, data, clean)).await?;
    model.resumed();
    Ok(())
}
