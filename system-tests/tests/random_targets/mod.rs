// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random setups, teardowns, guest requests, snapshot reads and releases of three targets on two
//! disks, from one seed, beside a guest that never rests. Every snapshot is compared with a model of
//! its disk at its point in time, every increment put into the copy of its target, and at the end
//! graph and bitmaps are as at the start.

mod model;
mod noise;
mod view;

use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use provider_nbd::{Client, ZeroOptions};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};
use system_tests::storage::Storage;

use model::{Disk, SECTOR};
use noise::Noise;
use view::{Chain, View};

const DISKS: [&str; 2] = ["disk0", "disk1"];
const TARGETS: [&str; 3] = ["a", "b", "c"];
/// What the model knows; the end of each disk belongs to the restless guest.
const KNOWN_BYTES: u64 = (2 << 20) - 3 * SECTOR;
const DISK_BYTES: u64 = (3 << 20) + SECTOR;
const STEPS: u32 = 200;

/// How often what was done.
#[derive(Debug, Default)]
#[allow(dead_code, reason = "shown")]
pub(super) struct Counts {
    setups: u32,
    increments: u32,
    refused: u32,
    teardowns: u32,
    reads: u32,
    releases: u32,
    requests: u32,
    noise: u64,
}

struct World {
    storage: Storage,
    guests: Vec<Client>,
    disks: Vec<Disk>,
    /// The accesses of each target, by disk; empty if it has none.
    views: Vec<Vec<View>>,
    /// What each target keeps of each disk.
    chains: Vec<Vec<Chain>>,
    rng: StdRng,
    story: String,
    counts: Counts,
}

/// Runs one seed; an error tells what was done before.
pub(super) async fn run(seed: u64) -> Result<Counts> {
    let iothread = (seed % 2 == 1).then_some("io0");
    let mut world = World::start(seed, iothread).await?;
    let begin = world.storage.graph().await?;
    let mut noise = Vec::new();
    for disk in DISKS {
        let client = world.storage.client(disk).await?;
        noise.push(Noise::start(client, seed, KNOWN_BYTES.next_multiple_of(4096), DISK_BYTES));
    }
    let mut ended = async || -> Result<()> {
        for _ in 0..STEPS {
            world.step().await?;
        }
        world.end().await
    };
    let ended = ended().await;
    for noise in noise {
        let made = noise.stop().await;
        if ended.is_ok() {
            world.counts.noise += made.context("the restless guest")?;
        }
    }
    ended.with_context(|| format!("what was done:\n{}", world.story))?;
    let end = world.storage.graph().await?;
    ensure!(end == begin, "the graph was {begin:#?}\nand is {end:#?}");
    for disk in DISKS {
        let bitmaps = world.storage.bitmaps(disk).await?;
        ensure!(bitmaps.is_empty(), "bitmaps are left on {disk}: {bitmaps:?}");
    }
    world.storage.quit().await?;
    Ok(world.counts)
}

impl World {
    async fn start(seed: u64, iothread: Option<&str>) -> Result<Self> {
        let storage = Storage::start().await?;
        if let Some(iothread) = iothread {
            storage.iothread(iothread).await?;
        }
        let mut guests = Vec::new();
        for disk in DISKS {
            storage.disk(disk, DISK_BYTES).await?;
            storage.export_disk(disk, iothread).await?;
            guests.push(storage.client(disk).await?);
            for target in TARGETS {
                storage.disk(&format!("{disk}-{target}"), DISK_BYTES).await?;
            }
        }
        let chains = || DISKS.map(|_| Chain::default()).into_iter().collect();
        Ok(Self {
            storage,
            guests,
            disks: vec![Disk::new(KNOWN_BYTES); DISKS.len()],
            views: TARGETS.map(|_| Vec::new()).into_iter().collect(),
            chains: TARGETS.map(|_| chains()).into_iter().collect(),
            rng: StdRng::seed_from_u64(seed),
            story: String::new(),
            counts: Counts::default(),
        })
    }

    fn tell(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = self.story.write_fmt(line);
        self.story.push('\n');
    }

    async fn step(&mut self) -> Result<()> {
        let target = self.rng.random_range(0..TARGETS.len());
        match self.rng.random_range(0..100) {
            0..=49 => self.guest_request().await,
            50..=53 => self.refused_setup().await,
            _ if self.views[target].is_empty() => self.set_up(target).await,
            54..=64 => self.tear_down(target).await,
            65..=84 => self.look(target, false).await,
            _ => self.look(target, true).await,
        }
    }

    /// A range of the known part: mostly small, sometimes unaligned.
    fn range(&mut self) -> (u64, u64) {
        let unit = if self.rng.random_bool(0.5) { 4096 } else { SECTOR };
        let limit = if self.rng.random_bool(0.2) { KNOWN_BYTES } else { 128 << 10 };
        let offset = self.rng.random_range(0..KNOWN_BYTES) / unit * unit;
        let len = self.rng.random_range(1..=limit).next_multiple_of(unit);
        (offset, len.min(KNOWN_BYTES - offset))
    }

    async fn guest_request(&mut self) -> Result<()> {
        let disk = self.rng.random_range(0..DISKS.len());
        let (offset, len) = self.range();
        let kind = self.rng.random_range(0..10);
        self.tell(format_args!("guest {kind} on disk {disk} at {offset} of {len}"));
        self.counts.requests += 1;
        let guest = &self.guests[disk];
        let model = &mut self.disks[disk];
        match kind {
            0..=4 => {
                let value = self.rng.random_range(1..=255_u8);
                let data = Bytes::from(vec![value; usize::try_from(len)?]);
                guest.write(offset, data, false).await?;
                model.fill(value, offset, len);
            }
            5 => {
                guest.write_zeroes(offset, len, ZeroOptions::default()).await?;
                model.fill(0, offset, len);
            }
            6..=7 => {
                guest.trim(offset, len).await?;
                model.discard(offset, len);
            }
            _ => model.check(offset, &guest.read(offset, usize::try_from(len)?).await?)?,
        }
        Ok(())
    }

    /// Sets one or both disks up, in any order, each with a bitmap, without, or removing it.
    async fn set_up(&mut self, target: usize) -> Result<()> {
        let mut disks: Vec<usize> = (0..DISKS.len()).collect();
        disks.shuffle(&mut self.rng);
        disks.truncate(self.rng.random_range(1..=DISKS.len()));
        let mut devices = Vec::new();
        for &disk in &disks {
            let mode = self.rng.random_range(0..10);
            devices.push(self.chains[target][disk].device(target, disk, mode));
        }
        self.tell(format_args!("setup of {}: {devices:?}", TARGETS[target]));
        let buffer_bytes = [0, 1 << 16, 64 << 20][self.rng.random_range(0..3)];
        let request = json!({ "target-id": TARGETS[target], "devices": devices,
                              "buffer-size": buffer_bytes });
        let infos = self.storage.run("backup-access-setup", request).await?;
        let infos = infos.as_array().cloned().context("no list")?;
        self.counts.setups += 1;
        for (&disk, info) in disks.iter().zip(&infos) {
            let chain = &mut self.chains[target][disk];
            let at = self.disks[disk].clone();
            let view = View::open(&self.storage, disk, info, at, chain).await?;
            self.counts.increments += u32::from(view.is_increment());
            self.views[target].push(view);
        }
        Ok(())
    }

    /// A setup that names something wrong changes nothing.
    async fn refused_setup(&mut self) -> Result<()> {
        let Some(target) = self.views.iter().position(Vec::is_empty) else { return Ok(()) };
        let good = json!({ "device": DISKS[0], "fleecing": fleecing(target, 0),
                           "bitmap-mode": "new" });
        let taken = (0..TARGETS.len())
            .find(|&other| other != target && self.views[other].iter().any(|v| v.disk == 1));
        let bad = match taken {
            Some(other) => json!({ "device": DISKS[1], "fleecing": fleecing(other, 1) }),
            None => json!({ "device": DISKS[1], "fleecing": "nothing" }),
        };
        self.tell(format_args!("refused setup of {}: {bad}", TARGETS[target]));
        let before = self.storage.graph().await?;
        let request = json!({ "target-id": TARGETS[target], "devices": [good, bad] });
        let answer = self.storage.try_run("backup-access-setup", request).await;
        ensure!(answer.is_err(), "it was accepted: {answer:?}");
        let after = self.storage.graph().await?;
        ensure!(after == before, "it changed {before:#?}\nto {after:#?}");
        self.counts.refused += 1;
        Ok(())
    }

    async fn tear_down(&mut self, target: usize) -> Result<()> {
        let success = self.rng.random();
        self.tell(format_args!("teardown of {}, success {success}", TARGETS[target]));
        let mut views = std::mem::take(&mut self.views[target]);
        for view in &mut views {
            if success {
                view.complete().await.with_context(|| format!("the copy of disk {}", view.disk))?;
            }
            if self.rng.random() {
                view.disconnect();
            }
        }
        let arguments = json!({ "target-id": TARGETS[target], "success": success });
        let result = self.storage.run("backup-access-teardown", arguments).await?;
        ensure!(result == json!({ "existed": true }), "the teardown says {result}");
        for view in views {
            view.settle(&mut self.chains[target], success);
        }
        self.counts.teardowns += 1;
        Ok(())
    }

    /// Reads a part of a snapshot, and releases it if told to.
    async fn look(&mut self, target: usize, release: bool) -> Result<()> {
        let (offset, len) = self.range();
        let index = self.rng.random_range(0..DISKS.len());
        let Some(view) = self.views[target].get_mut(index) else { return Ok(()) };
        let line = format!(
            "{} of {}, disk {}, at {offset} of {len}",
            if release { "release" } else { "read" },
            TARGETS[target],
            view.disk
        );
        let done = if release {
            self.counts.releases += 1;
            view.release(offset, len).await
        } else {
            self.counts.reads += 1;
            view.read(offset, len).await
        };
        self.tell(format_args!("{line}"));
        done.with_context(|| line)
    }

    /// Looks at all that is left, ends it, and has all bitmaps removed.
    async fn end(&mut self) -> Result<()> {
        let status = self.storage.run("query-backup-access", json!({})).await?;
        let devices = status.as_array().into_iter().flatten();
        for device in devices.filter_map(|access| access["devices"].as_array()).flatten() {
            ensure!(device["state"] == "active", "{device}");
        }
        let mut order: Vec<usize> = (0..TARGETS.len()).collect();
        order.shuffle(&mut self.rng);
        for &target in &order {
            if !self.views[target].is_empty() {
                self.tear_down(target).await?;
            }
        }
        for target in order {
            let device = |disk: usize| {
                json!({ "device": DISKS[disk], "bitmap-mode": "none",
                                               "fleecing": fleecing(target, disk) })
            };
            let devices: Vec<Value> = (0..DISKS.len()).map(device).collect();
            let request = json!({ "target-id": TARGETS[target], "devices": devices });
            self.storage.run("backup-access-setup", request).await?;
            let arguments = json!({ "target-id": TARGETS[target], "success": true });
            self.storage.run("backup-access-teardown", arguments).await?;
        }
        for (guest, model) in self.guests.iter().zip(&self.disks) {
            model.check(0, &guest.read(0, usize::try_from(KNOWN_BYTES)?).await?)?;
        }
        Ok(())
    }
}

/// The fleecing image of a target for a disk.
fn fleecing(target: usize, disk: usize) -> String {
    format!("{}-{}", DISKS[disk], TARGETS[target])
}
