// SPDX-License-Identifier: MIT OR Apache-2.0
//! A full copy and increments under guest writes: after each increment the copy must be what the
//! disk held at that point in time, though only the areas of the dirty bitmap were read. Some
//! backups are given up; the next one must then cover their changes too.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use provider_nbd::{Client, context};
use qmp_client::backup::{self, AccessInfo, BitmapAction, BitmapMode, Device, SetupRequest};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::Plan;
use super::daemon::Daemon;
use super::model::{Model, Moment, SECTOR, ZERO, decode};
use super::writers::Writers;

const TARGET: &str = "chain";
const INCREMENTS: u32 = 4;
const READ_BYTES: u64 = 1 << 20;

/// What the provider keeps: the values of all sectors, and their generation.
#[derive(Clone)]
struct Copy {
    values: Vec<u64>,
    generation: Option<String>,
}

/// Carries the chain out while the writers go on; returns the sectors read by increments.
pub(super) async fn check(
    plan: &Plan,
    daemon: &Daemon,
    model: &Arc<Model>,
    writers: &Writers,
) -> Result<u64> {
    let mut rng = StdRng::seed_from_u64(plan.seed ^ 0xC4A1);
    let sectors = model.sectors() as usize;
    let mut stored = Copy { values: vec![ZERO; sectors], generation: None };
    let mut read = 0;
    for number in 0..=INCREMENTS {
        writers.let_run(60).await?;
        let mut copy = stored.clone();
        let (info, moment) = begin(plan, daemon, model, copy.generation.as_deref()).await?;
        let wanted = if number == 0 { BitmapAction::New } else { BitmapAction::Used };
        ensure!(info.bitmap_action == wanted, "backup {number}: bitmap {}", info.bitmap_action);
        let count = take(daemon, &info, number, &mut copy.values).await?;
        moment
            .check_values(&copy.values)
            .with_context(|| format!("the copy of backup {number}"))?;
        if number > 0 {
            read += count;
        }
        // The full one is kept, or there would be no increment.
        let success = number == 0 || rng.random();
        backup::teardown(daemon.session(), TARGET, success).await.context("teardown")?;
        if success {
            copy.generation.clone_from(&info.generation);
            stored = copy;
        }
    }
    Ok(read)
}

/// Sets the access up; the point in time.
async fn begin(
    plan: &Plan,
    daemon: &Daemon,
    model: &Model,
    generation: Option<&str>,
) -> Result<(AccessInfo, Moment)> {
    let mut device = Device::new("disk");
    device.bitmap_mode = Some(if generation.is_some() { BitmapMode::Use } else { BitmapMode::New });
    device.generation = generation.map(str::to_owned);
    let request = SetupRequest {
        buffer_size_bytes: Some(plan.buffer_bytes),
        ..SetupRequest::new(TARGET, vec![device])
    };
    let moment = model.begin_point_in_time();
    let infos = backup::setup(daemon.session(), &request).await.context("setup")?;
    model.end_point_in_time(&moment);
    Ok((infos.into_iter().next().context("setup names no device")?, moment))
}

/// Reads what the bitmap marks into the copy; returns the number of sectors.
async fn take(daemon: &Daemon, info: &AccessInfo, number: u32, values: &mut [u64]) -> Result<u64> {
    let bitmap = info.bitmap_name.as_deref().context("setup names no bitmap")?;
    let export = format!("chain-{number}");
    daemon.export(&info.node_name, &export, Some(bitmap)).await?;
    let dirty = context::dirty_bitmap(bitmap);
    let snapshot = daemon.connect(&export, &[&dirty]).await?;
    let mut extents = snapshot.extents(&dirty, 0, snapshot.size_bytes());
    let mut bytes = 0;
    while let Some(extent) = extents.next().await.context("dirty areas")? {
        if extent.flags & context::DIRTY == 0 {
            continue;
        }
        bytes += extent.len;
        copy_extent(&snapshot, extent.offset, extent.end(), values).await?;
    }
    ensure!(info.dirty_bytes == Some(bytes), "{bytes} dirty bytes, not {:?}", info.dirty_bytes);
    Ok(bytes / SECTOR)
}

async fn copy_extent(snapshot: &Client, start: u64, end: u64, values: &mut [u64]) -> Result<()> {
    let mut at = start;
    while at < end {
        let len = (end - at).min(READ_BYTES);
        let data = snapshot.read(at, len as usize).await?;
        for (sector, bytes) in (at / SECTOR..).zip(data.chunks(SECTOR as usize)) {
            values[sector as usize] = decode(sector, bytes)?;
        }
        at += len;
    }
    Ok(())
}
