// SPDX-License-Identifier: MIT OR Apache-2.0
//! One episode: guests that write, targets that come and go, and what goes on beside them, from one
//! seed; then either nothing of it is left, or the process has ended in the middle of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::access::{Stage, take};
use super::disk::TARGETS;
use super::machine::{Kind, Machine};
use super::noise;
use super::tally::{Places, REQUESTS};
use crate::stress::writers::{Load, Writers};

/// How an episode ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// All accesses are torn down, and the process lives on.
    Stays,
    /// The process is told to quit after a while.
    Quits(Duration),
    /// It is killed.
    Killed(Duration),
}

/// An episode, as made from its seed.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) seed: u64,
    /// Whether it happens to the process that is ended again and again.
    pub(super) mortal: bool,
    /// What that process is after its end.
    pub(super) next_kind: Kind,
    pub(super) ending: Ending,
    /// Some reads of the served disk fail.
    pub(super) read_errors: bool,
    /// Accesses of each target.
    rounds: [u32; TARGETS.len()],
    queue_depth: usize,
    pause: Duration,
    large: bool,
    jobs: bool,
}

impl Plan {
    pub(super) fn from_seed(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mortal = seed % 3 == 2;
        let time = Duration::from_millis(rng.random_range(200..2500));
        let ending = match rng.random_range(0..4) {
            _ if !mortal => Ending::Stays,
            0 => Ending::Stays,
            1 => Ending::Quits(time),
            _ => Ending::Killed(time),
        };
        Self {
            seed,
            mortal,
            next_kind: if rng.random_ratio(1, 3) { Kind::Emulator } else { Kind::Daemon },
            ending,
            read_errors: mortal && rng.random_ratio(2, 3),
            rounds: [(); TARGETS.len()].map(|()| rng.random_range(0..=2)),
            queue_depth: rng.random_range(1..=8),
            pause: Duration::from_millis([0, 2, 10][rng.random_range(0..3)]),
            large: rng.random_ratio(1, 3),
            jobs: rng.random(),
        }
    }
}

/// Carries an episode out. If its process is to end, that is still to be done, and the writers, which
/// write until then, are returned.
pub(super) async fn run(plan: &Plan, machine: &Machine, places: &Places) -> Result<Vec<Writers>> {
    let mut writers: Vec<Writers> = (0_u64..)
        .zip(machine.disks.iter().zip(&machine.guests))
        .map(|(number, (disk, guest))| {
            let load = Load {
                seed: plan.seed.wrapping_mul(31).wrapping_add(number),
                queue_depth: plan.queue_depth,
                flushes: true,
                pause: plan.pause,
            };
            let writers = Writers::start(load, guest, &disk.model);
            if plan.large {
                writers.allow_large();
            }
            writers
        })
        .collect();
    let played = match plan.ending {
        Ending::Stays => Box::pin(play(plan, machine, places)).await,
        Ending::Quits(time) | Ending::Killed(time) => {
            // Whatever goes on then is left in the middle.
            let played = tokio::time::timeout(time, Box::pin(play(plan, machine, places))).await;
            played.unwrap_or(Ok(()))
        }
    };
    machine.tally.add(REQUESTS, writers.iter().map(Writers::requests).sum());
    played?;
    if plan.ending == Ending::Stays {
        for (writers, disk) in writers.drain(..).zip(&machine.disks) {
            places.at("guests", format!("the end of the writers of {}", disk.name));
            writers.stop().await.with_context(|| format!("the guest's {}", disk.name))?;
        }
        machine.read_errors(false).await?;
        machine.check_rest(places).await?;
    }
    Ok(writers)
}

/// All actors, up to the end of the accesses.
async fn play(plan: &Plan, machine: &Machine, places: &Places) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(!plan.seed);
    let mut child = || StdRng::seed_from_u64(rng.random());
    let stage = Stage { machine, places, read_errors: plan.read_errors };
    machine.read_errors(plan.read_errors).await?;
    let stop = AtomicBool::new(false);
    let [a, b, c] = [0, 1, 2].map(|target| {
        Box::pin(take(stage, target, plan.rounds[target].max(u32::from(target == 0)), child()))
    });
    let targets = async {
        let ended = tokio::try_join!(a, b, c);
        stop.store(true, Ordering::Relaxed);
        ended
    };
    let noise = noise::make(machine, child(), places, &stop);
    let jobs_rng = child();
    let jobs = async {
        if plan.jobs { noise::run_jobs(machine, jobs_rng, places, &stop).await } else { Ok(()) }
    };
    tokio::try_join!(Box::pin(targets), Box::pin(noise), Box::pin(jobs)).map(drop)
}
