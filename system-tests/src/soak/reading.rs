// SPDX-License-Identifier: MIT OR Apache-2.0
//! The readers of a snapshot: those that read all, those that leave, those that are killed.

use std::ops::Range;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use provider_nbd::{Client, Errno, context};
use rand::Rng as _;
use rand::rngs::StdRng;
use serde_json::Value;
use tokio::sync::OnceCell;

use super::machine::Machine;
use super::plan::{AccessPlan, DevicePlan, Reader};
use super::tally::{COMPARED, READERS_KILLED, RELEASED};
use crate::qemu::bin_dir;
use crate::storage::dirty_areas;
use crate::stress::model::{Moment, SECTOR};
use crate::stress::reader::{Reading, Tolerated, check};

const LONGEST_VISIT: Duration = Duration::from_millis(300);
const ENDS_WITHIN: Duration = Duration::from_secs(30);

/// The snapshot of a disk, with what it must hold.
pub(super) struct Snapshot {
    pub(super) node: String,
    pub(super) moment: Moment,
    pub(super) generation: Option<String>,
    pub(super) is_increment: bool,
    /// Nobody told what the bitmap is: any area may be clean.
    pub(super) bitmap_unknown: bool,
    /// Clean areas can be read too.
    all_readable: bool,
    sectors: u64,
    info: Value,
    export: OnceCell<String>,
}

impl Snapshot {
    /// From what setup, or a query if its caller died, says of a device.
    pub(super) fn new(
        info: Value,
        moment: Moment,
        sectors: u64,
        plan: &AccessPlan,
        device: &DevicePlan,
    ) -> Result<Self> {
        // Nobody has seen what the setup said.
        let bitmap_unknown = plan.setup_dies.is_some();
        let text = |member: &str| info[member].as_str().map(str::to_owned);
        Ok(Self {
            node: text("node-name").context("no node name")?,
            moment,
            generation: text("generation"),
            is_increment: info["bitmap-action"] == "used" && !bitmap_unknown,
            bitmap_unknown: bitmap_unknown && !device.readable,
            all_readable: device.readable,
            sectors,
            info,
            export: OnceCell::new(),
        })
    }

    /// Exports it and connects to it; the client, and the context of its dirty bitmap.
    async fn open(&self, machine: &Machine) -> Result<(Client, Option<String>)> {
        let name = self.export(machine).await?;
        let dirty = self.info["bitmap-name"].as_str().map(context::dirty_bitmap);
        let contexts: Vec<&str> =
            std::iter::once(context::BASE_ALLOCATION).chain(dirty.as_deref()).collect();
        Ok((machine.connect(name, &contexts).await?, dirty))
    }

    /// The name of its export. There is one: a bitmap cannot be exported twice.
    async fn export(&self, machine: &Machine) -> Result<&str> {
        let export = async || {
            let _quiet = machine.quiet().await;
            machine.storage.export_snapshot(&self.info).await
        };
        self.export.get_or_try_init(export).await.map(String::as_str)
    }

    /// The sectors that can be read.
    async fn areas(&self, client: &Client, dirty: Option<&str>) -> Result<Vec<Range<u64>>> {
        let Some(dirty) = dirty else {
            return Ok(std::iter::once(0..self.sectors).collect());
        };
        let areas = dirty_areas(client, dirty).await?;
        let bytes: u64 = areas.iter().map(|(_, len)| len).sum();
        ensure!(self.info["dirty"] == bytes, "{bytes} dirty bytes, but {}", self.info);
        if self.all_readable {
            return Ok(std::iter::once(0..self.sectors).collect());
        }
        let sectors = |(offset, len)| offset / SECTOR..(offset + len) / SECTOR;
        Ok(areas.into_iter().map(sectors).collect())
    }

    /// All reads fail.
    pub(super) async fn expect_broken(&self, machine: &Machine) -> Result<()> {
        let (client, _) = self.open(machine).await?;
        for offset in [0, (self.sectors / 2) * SECTOR, (self.sectors - 1) * SECTOR] {
            let read = client.read(offset, SECTOR as usize).await;
            let errno = read.as_ref().err().and_then(provider_nbd::Error::errno);
            ensure!(
                errno == Some(Errno::EIO) || errno == Some(Errno::EPERM),
                "a read of a broken snapshot at {offset}: {:?}",
                read.map(|_| "data")
            );
        }
        Ok(())
    }
}

/// A reader's orders.
pub(super) struct Visit<'a> {
    pub(super) reader: Reader,
    pub(super) snapshot: &'a Snapshot,
    /// Errors that its requests may meet; all of them once the access is being torn down.
    pub(super) tolerated: Tolerated,
    /// Takes the values of all sectors that one who reads all has read.
    pub(super) values: Arc<Mutex<Vec<u64>>>,
}

impl Visit<'_> {
    /// Reads as ordered; whether all that can be read was read.
    pub(super) async fn read(
        &self,
        machine: &Machine,
        mut rng: StdRng,
        at: &(dyn Fn(&str) + Sync),
    ) -> Result<bool> {
        let seed = rng.random();
        let done = match self.reader {
            Reader::Nobody => Ok(false),
            Reader::Whole { trims } => {
                let copy = Some(Arc::clone(&self.values));
                let errnos = self.tolerated.errnos;
                self.whole(machine, Reading { trims, copy, ..self.reading(seed, errnos) }, at).await
            }
            Reader::Two => self.two(machine, seed, at).await.map(|()| false),
            Reader::Leaves => self.leave(machine, &mut rng, at).await.map(|()| false),
            Reader::Process => self.killed(machine, &mut rng, at).await.map(|()| false),
        };
        match done {
            // What was to be opened is gone.
            Err(error) if self.closing() && is_refusal(&error) => Ok(false),
            other => other,
        }
    }

    fn closing(&self) -> bool {
        self.tolerated.all.load(Ordering::Relaxed)
    }

    fn reading(&self, seed: u64, errnos: &'static [Errno]) -> Reading {
        let tolerated = Tolerated { errnos, all: Arc::clone(&self.tolerated.all) };
        Reading { tolerated, ..Reading::whole(seed, self.snapshot.sectors) }
    }

    async fn whole(
        &self,
        machine: &Machine,
        reading: Reading,
        at: &(dyn Fn(&str) + Sync),
    ) -> Result<bool> {
        at("opening the snapshot");
        let opened = self.snapshot.open(machine).await?;
        at("reading all of the snapshot");
        self.all(machine, reading, opened).await
    }

    /// Whether all was read that can be read.
    async fn all(
        &self,
        machine: &Machine,
        mut reading: Reading,
        (client, dirty): (Client, Option<String>),
    ) -> Result<bool> {
        reading.areas = self.snapshot.areas(&client, dirty.as_deref()).await?;
        let read = check(&reading, &client, &self.snapshot.moment).await?;
        machine.tally.add(COMPARED, read * SECTOR);
        if reading.trims {
            machine.tally.add(RELEASED, read * SECTOR);
        }
        Ok(read == reading.sectors())
    }

    /// One reads what the other one releases.
    async fn two(&self, machine: &Machine, seed: u64, at: &(dyn Fn(&str) + Sync)) -> Result<()> {
        let errnos: &'static [Errno] = match self.tolerated.errnos {
            [] | [Errno::EPERM] => &[Errno::EPERM],
            _ => &[Errno::EIO, Errno::EPERM],
        };
        let reads = self.reading(seed, errnos);
        let releases = Reading { trims: true, ..self.reading(!seed, self.tolerated.errnos) };
        tokio::try_join!(
            Box::pin(self.whole(machine, reads, at)),
            Box::pin(self.whole(machine, releases, at))
        )
        .map(drop)
    }

    /// Disconnects with requests in flight.
    async fn leave(
        &self,
        machine: &Machine,
        rng: &mut StdRng,
        at: &(dyn Fn(&str) + Sync),
    ) -> Result<()> {
        let time = LONGEST_VISIT.mul_f64(rng.random());
        let reading =
            Reading { trims: rng.random(), ..self.reading(rng.random(), self.tolerated.errnos) };
        at("opening the snapshot");
        let opened = self.snapshot.open(machine).await?;
        at("leaving");
        let visit = tokio::time::timeout(time, Box::pin(self.all(machine, reading, opened)));
        machine.tally.add(READERS_KILLED, 1);
        visit.await.map_or(Ok(()), |read| read.map(drop))
    }

    /// A process of its own reads until it is killed. It connects while everybody is quiet.
    async fn killed(
        &self,
        machine: &Machine,
        rng: &mut StdRng,
        at: &(dyn Fn(&str) + Sync),
    ) -> Result<()> {
        let export = self.snapshot.export(machine).await?;
        let socket = machine.storage.path("nbd");
        let mut command = tokio::process::Command::new(bin_dir()?.join("qemu-img"));
        command.args(["convert", "-n", "-f", "raw"]);
        command.arg(format!("nbd+unix:///{export}?socket={}", socket.display()));
        let size_bytes = self.snapshot.sectors * SECTOR;
        command.args(["--target-image-opts", &format!("driver=null-co,size={size_bytes}")]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let _quiet = machine.quiet().await;
        at("a process reads the snapshot");
        let mut process = command.kill_on_drop(true).spawn().context("qemu-img")?;
        let ended = tokio::time::timeout(LONGEST_VISIT.mul_f64(rng.random()), process.wait());
        if ended.await.is_err() {
            at("killing a process that reads the snapshot");
            tokio::time::timeout(ENDS_WITHIN, process.kill()).await.context("it is not dead")??;
            machine.tally.add(READERS_KILLED, 1);
        }
        Ok(())
    }
}

/// Whether it is QEMU that said no, by QMP or NBD, and no comparison that failed.
fn is_refusal(error: &anyhow::Error) -> bool {
    let said = |cause: &(dyn std::error::Error + 'static)| {
        cause.is::<qmp_client::Error>() || cause.is::<provider_nbd::Error>()
    };
    error.chain().any(said)
}
