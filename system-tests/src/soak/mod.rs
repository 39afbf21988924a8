// SPDX-License-Identifier: MIT OR Apache-2.0
//! The soak: random backup accesses of several targets to disks that guests write to all the time,
//! with faults, deaths of clients, readers and processes, and block jobs beside them, for as long as
//! it is asked for.
//!
//! There are two processes. The lasting one lives from the beginning to the end: after each of its
//! episodes its graph, bitmaps, exports and descriptors must be as at the start, and its memory must
//! not grow. The mortal one is told to quit, or is killed, in the middle of accesses, and another one
//! takes its disks over: these must hold what the guest's requests left.
//!
//! Whatever is read of a snapshot is compared with what the disk held at its point in time, and each
//! increment is put into the copy that its target keeps, which must then be all of the disk.
//!
//! Everything random is made from the seed of the episode, which is printed; how the actors
//! interleave is not.

mod access;
mod client;
mod disk;
mod episode;
mod image;
mod machine;
mod noise;
mod plan;
pub(crate) mod proc;
mod reading;
mod report;
mod tally;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use crate::storage::folder;
use disk::Disk;
use episode::{Ending, Plan};
use machine::{Before, Kind, Machine};
pub use report::Summary;
use tally::{EPISODES, KILLS, Places, QUITS, Tally};

/// No episode may take longer, whatever hangs: all its waits are shorter.
const EPISODE_LIMIT: Duration = Duration::from_secs(300);
/// Its episodes between two looks at the lasting process's idle threads, which take their time to end.
const THREADS_EVERY: usize = 25;

/// What to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// The seed of the first episode; the next one's is larger by one.
    pub seed: u64,
    /// Episodes begin for so long.
    pub duration: Duration,
    /// At most so many of them.
    pub episodes: u64,
    /// Whether a line is printed for each.
    pub show: bool,
}

/// The two processes, each from its first episode on.
#[derive(Default)]
struct Soak {
    lasting: Option<Machine>,
    mortal: Option<Machine>,
    tally: Tally,
    places: Places,
    memory: Vec<proc::Memory>,
}

/// Carries a soak out.
///
/// # Errors
/// A byte is wrong, something is left behind, a process ended, something hangs. The text names the
/// episode's seed and says where everything was.
pub async fn run(options: &Options) -> Result<Summary> {
    let start = Instant::now();
    let mut soak = Soak::default();
    let mut number = 0;
    while number < options.episodes && start.elapsed() < options.duration {
        let plan = Plan::from_seed(options.seed.wrapping_add(number));
        number += 1;
        let began = Instant::now();
        let look_at_threads = options.episodes > THREADS_EVERY as u64;
        soak.episode(&plan, look_at_threads)
            .await
            .with_context(|| format!("episode {number}, seed {}: {plan:?}", plan.seed))?;
        if options.show {
            let memory = soak.memory.last().map_or(0, |memory| memory.resident_bytes);
            println!(
                "episode {number} seed {}: {} {:?}, {:.1} s; RSS {}",
                plan.seed,
                if plan.mortal { "mortal" } else { "lasting" },
                plan.ending,
                began.elapsed().as_secs_f64(),
                crate::table::bytes(memory)
            );
        }
    }
    let machine = soak.lasting.as_ref().or(soak.mortal.as_ref());
    let optional = machine.map_or_else(Vec::new, |machine| machine.features.missing());
    soak.end().await?;
    Ok(Summary::new(soak.tally, start.elapsed(), soak.memory, optional))
}

impl Soak {
    async fn episode(&mut self, plan: &Plan, look_at_threads: bool) -> Result<()> {
        self.places.clear();
        self.tally.add(EPISODES, 1);
        let carried_out = tokio::time::timeout(EPISODE_LIMIT, Box::pin(self.carry_out(plan)));
        let mut result = carried_out.await.unwrap_or_else(|_| Err(anyhow!("it hangs")));
        if result.is_ok()
            && !plan.mortal
            && let Some(machine) = &mut self.lasting
        {
            if look_at_threads && self.memory.len().is_multiple_of(THREADS_EVERY) {
                result = machine.check_threads(&self.places).await;
            }
            self.memory.push(proc::memory(machine.storage.pid())?);
        }
        result.map_err(|error| {
            let machine = if plan.mortal { &mut self.mortal } else { &mut self.lasting };
            let died = machine.as_mut().map_or_else(String::new, Machine::post_mortem);
            error.context(format!("{died}\nwhere everything was:\n{}", self.places.show()))
        })
    }

    async fn carry_out(&mut self, plan: &Plan) -> Result<()> {
        self.places.at("process", "starting");
        let slot = if plan.mortal { &mut self.mortal } else { &mut self.lasting };
        if slot.is_none() {
            let disks = if plan.mortal { Disk::of_the_mortal() } else { Disk::of_the_lasting() };
            let kind = if plan.mortal { plan.next_kind } else { Kind::Daemon };
            let machine = Machine::start(folder()?, disks, kind, Before::Nothing, &self.tally);
            *slot = Some(Box::pin(machine).await.context("the start of a process")?);
        }
        let machine = slot.as_ref().context("no process")?;
        self.places.at("process", "alive");
        let writers = Box::pin(episode::run(plan, machine, &self.places)).await?;
        if plan.ending == Ending::Stays {
            return Ok(());
        }
        let machine = slot.take().context("no process")?;
        let (before, (folder, disks)) = match plan.ending {
            Ending::Killed(_) => {
                self.places.at("process", "being killed");
                self.tally.add(KILLS, 1);
                (Before::Killed, machine.kill()?)
            }
            _ => {
                self.places.at("process", "quitting");
                self.tally.add(QUITS, 1);
                (Before::Quit, machine.quit().await?)
            }
        };
        for writers in writers {
            writers.abandon().await;
        }
        clear(folder.path())?;
        self.places.at("process", format!("starting after {before:?}"));
        let machine = Machine::start(folder, disks, plan.next_kind, before, &self.tally);
        *slot = Some(Box::pin(machine).await.context("the start of the next process")?);
        Ok(())
    }

    async fn end(&mut self) -> Result<()> {
        for machine in [self.lasting.take(), self.mortal.take()].into_iter().flatten() {
            machine.quit().await.context("the last end of a process")?;
        }
        Ok(())
    }
}

/// Deletes the fleecing images that the end of a process has left.
fn clear(folder: &std::path::Path) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("fleece") {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
