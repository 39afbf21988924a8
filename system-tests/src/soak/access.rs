// SPDX-License-Identifier: MIT OR Apache-2.0
//! One access from its setup to its end, and what its target keeps of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::future::try_join_all;
use provider_nbd::Errno;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use super::client;
use super::disk::{Bitmap, Copy, TARGETS};
use super::image::{Flaw, Image};
use super::machine::Machine;
use super::plan::{AccessPlan, DevicePlan, End, Mode, Reader};
use super::reading::{Snapshot, Visit};
use super::tally::{AGAIN, BROKEN, COPIES, DEGRADED, EXPIRED, Places, SETUPS, TEARDOWNS, USED};
use crate::storage::until;
use crate::stress::model::{Moment, ZERO};
use crate::stress::reader::Tolerated;

const RENEW_EVERY: Duration = Duration::from_millis(300);

/// What the actors of an episode share.
#[derive(Clone, Copy)]
pub(super) struct Stage<'a> {
    pub(super) machine: &'a Machine,
    pub(super) places: &'a Places,
    /// Some reads of the served disk fail.
    pub(super) read_errors: bool,
}

/// Lets a target have accesses, one after the other.
pub(super) async fn take(
    stage: Stage<'_>,
    target: usize,
    rounds: u32,
    mut rng: StdRng,
) -> Result<()> {
    let who = TARGETS[target];
    for _ in 0..rounds {
        stage.places.at(who, "resting");
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..200))).await;
        let plan = AccessPlan::random(stage.machine, target, &mut rng);
        let what = format!("{plan:?}");
        Box::pin(one(stage, plan, &mut rng)).await.with_context(|| format!("access: {what}"))?;
    }
    stage.places.at(who, "done");
    Ok(())
}

async fn one(stage: Stage<'_>, plan: AccessPlan, rng: &mut StdRng) -> Result<()> {
    let Stage { machine, places, .. } = stage;
    places.at(plan.target(), "waiting for its turn");
    let _turns = machine.turns(&plan.disks()).await;
    places.at(plan.target(), "making fleecing images");
    let mut images = Vec::new();
    for device in &plan.devices {
        images.push(Image::make(machine, &machine.disks[device.disk], device.flaw, rng).await?);
    }
    if let Some(access) = Access::set_up(stage, plan, &images).await? {
        access.run(&images, rng).await?;
    }
    for image in images {
        image.remove(machine).await?;
    }
    Ok(())
}

/// An access that exists.
struct Access<'a> {
    stage: Stage<'a>,
    plan: AccessPlan,
    snapshots: Vec<Snapshot>,
    /// Complete copies, by device.
    copies: Vec<Option<Copy>>,
    /// It is being torn down: readers may fail in any way.
    closing: Arc<AtomicBool>,
}

impl<'a> Access<'a> {
    /// Sets it up; none if the client died before QEMU had understood it.
    async fn set_up(stage: Stage<'a>, plan: AccessPlan, images: &[Image]) -> Result<Option<Self>> {
        let Stage { machine, places, .. } = stage;
        let nodes: Vec<&str> = images.iter().map(Image::node).collect();
        let request = plan.request(machine, &nodes);
        places.at(plan.target(), format!("setup {request}"));
        let quiet = machine.quiet().await;
        machine.forget_events(plan.target());
        let moments: Vec<Moment> = plan
            .devices
            .iter()
            .map(|device| machine.disks[device.disk].model.begin_point_in_time())
            .collect();
        let infos = match plan.setup_dies {
            None => Some(machine.storage.run("backup-access-setup", request).await?),
            Some(death) => {
                client::killed(machine, "backup-access-setup", request, death).await?;
                // An access that an earlier process has left.
                client::find(machine, plan.target()).await?.map(|access| access["devices"].clone())
            }
        };
        drop(quiet);
        for (device, moment) in plan.devices.iter().zip(&moments) {
            machine.disks[device.disk].model.end_point_in_time(moment);
        }
        let Some(infos) = infos else { return Ok(None) };
        machine.tally.add(SETUPS, 1);
        let infos = infos.as_array().cloned().context("no list of devices")?;
        ensure!(infos.len() == plan.devices.len(), "{infos:?}");
        let mut snapshots = Vec::new();
        for ((device, moment), info) in plan.devices.iter().zip(moments).zip(infos) {
            check_action(machine, &plan, device, &info)?;
            let disk = &machine.disks[device.disk];
            ensure!(info["size"] == disk.size_bytes, "the size of {}: {info}", disk.name);
            let snapshot = Snapshot::new(info, moment, disk.sectors(), plan.setup_dies.is_some())?;
            snapshots.push(snapshot);
        }
        let copies = plan.devices.iter().map(|_| None).collect();
        Ok(Some(Self { stage, plan, snapshots, copies, closing: Arc::default() }))
    }

    fn at(&self, what: impl Into<String>) {
        self.stage.places.at(self.plan.target(), what);
    }

    async fn run(mut self, images: &[Image], rng: &mut StdRng) -> Result<()> {
        let machine = self.stage.machine;
        let mut child = || StdRng::seed_from_u64(rng.random());
        let mut stall_rngs: Vec<_> = images.iter().map(|_| child()).collect();
        let stalls = images.iter().zip(&mut stall_rngs).map(|(i, rng)| i.stall(machine, rng));
        let stalls = try_join_all(stalls);
        let mut own = child();
        let read_rngs: Vec<_> = images.iter().map(|_| child()).collect();
        tokio::try_join!(Box::pin(self.read_and_end(read_rngs, &mut own)), Box::pin(stalls))
            .map(drop)
    }

    /// Renews the lease, if there is one, until told to stop.
    async fn renew(&self, stop: &AtomicBool) -> Result<()> {
        while self.plan.lease && !stop.load(Ordering::Relaxed) {
            let arguments = json!({ "target-id": self.plan.target() });
            let renewed = self.stage.machine.storage.run("backup-access-renew", arguments).await;
            if !stop.load(Ordering::Relaxed) {
                renewed?;
            }
            tokio::time::sleep(RENEW_EVERY).await;
        }
        Ok(())
    }

    async fn read_and_end(&mut self, rngs: Vec<StdRng>, rng: &mut StdRng) -> Result<()> {
        let read = AtomicBool::new(false);
        if matches!(self.plan.end, End::UnderReaders) {
            let time = Duration::from_millis(rng.random_range(0..400));
            let end = async {
                tokio::time::sleep(time).await;
                self.closing.store(true, Ordering::Relaxed);
                read.store(true, Ordering::Relaxed);
                self.tear_down(false).await
            };
            let readers = Box::pin(self.read_all(rngs));
            tokio::try_join!(readers, Box::pin(end), self.renew(&read))?;
            self.settle();
            return Ok(());
        }
        let reading = async {
            let copies = self.read_all(rngs).await;
            read.store(true, Ordering::Relaxed);
            copies
        };
        let (copies, ()) = tokio::try_join!(Box::pin(reading), self.renew(&read))?;
        self.copies = copies;
        self.end().await
    }

    /// Reads all snapshots; the copies that are complete.
    async fn read_all(&self, rngs: Vec<StdRng>) -> Result<Vec<Option<Copy>>> {
        let devices = self.plan.devices.iter().zip(&self.snapshots).zip(rngs);
        let reads = devices.map(|((device, snapshot), rng)| {
            Box::pin(async move {
                let name = self.stage.machine.disks[device.disk].name;
                let read = self.read(device, snapshot, rng).await;
                read.with_context(|| format!("the snapshot of {name}, {}", snapshot.node))
            })
        });
        try_join_all(reads).await
    }

    async fn read(
        &self,
        device: &DevicePlan,
        snapshot: &Snapshot,
        rng: StdRng,
    ) -> Result<Option<Copy>> {
        let machine = self.stage.machine;
        let disk = &machine.disks[device.disk];
        let base = || disk.kept(self.plan.target).copy.as_ref().map(|copy| copy.values.clone());
        let values = match (snapshot.is_increment, base()) {
            (false, _) => vec![ZERO; disk.sectors() as usize],
            (true, Some(values)) => values,
            (true, None) => bail!("an increment of a backup that was never committed"),
        };
        let values = Arc::new(Mutex::new(values));
        let may_lose = device.flaw.loses() || device.may_break() || self.stage.read_errors;
        let errnos: &'static [Errno] = match (may_lose, snapshot.bitmap_unknown) {
            (true, true) => &[Errno::EIO, Errno::EPERM],
            (true, false) => &[Errno::EIO],
            (false, true) => &[Errno::EPERM],
            (false, false) => &[],
        };
        let place = format!("{} on {}", self.plan.target(), disk.name);
        let at = |what: &str| self.stage.places.at(&place, what);
        let tolerated = Tolerated { errnos, all: Arc::clone(&self.closing) };
        let visit =
            Visit { reader: device.reader, snapshot, tolerated, values: Arc::clone(&values) };
        let complete = visit.read(machine, rng, &at).await?;
        at("done");
        if self.closing.load(Ordering::Relaxed) {
            return Ok(None);
        }
        self.check_state(device, snapshot).await?;
        let Some(generation) = snapshot.generation.clone().filter(|_| complete) else {
            return Ok(None);
        };
        let values = values.lock().unwrap_or_else(PoisonError::into_inner).clone();
        snapshot.moment.check_values(&values).context("the copy after this increment")?;
        machine.tally.add(COPIES, 1);
        Ok(Some(Copy { values, generation }))
    }

    /// The snapshot is in a state that its plan allows, or must be in.
    async fn check_state(&self, device: &DevicePlan, snapshot: &Snapshot) -> Result<()> {
        let machine = self.stage.machine;
        let state = async || -> Result<(String, Value)> {
            let access = client::find(machine, self.plan.target()).await?;
            let access = access.context("the access is not listed")?;
            let devices = access["devices"].as_array().context("no devices")?;
            let status = devices.iter().find(|status| status["node-name"] == snapshot.node);
            let status = status.context("the device is not listed")?.clone();
            Ok((status["state"].as_str().unwrap_or_default().to_owned(), status))
        };
        // The guest's writes never end, so such an image meets one of them.
        let must_break = device.flaw == Flaw::Fails
            && device.writes_through()
            && !snapshot.is_increment
            && !snapshot.bitmap_unknown
            && matches!(device.reader, Reader::Nobody | Reader::Leaves | Reader::Process);
        if must_break {
            until("the image breaks the snapshot", async || Ok(state().await?.0 == "broken"))
                .await?;
        }
        let (state, status) = state().await?;
        match state.as_str() {
            "active" => return Ok(()),
            "degraded" if self.stage.read_errors => machine.tally.add(DEGRADED, 1),
            "broken" if device.may_break() => {
                machine.tally.add(BROKEN, 1);
                snapshot.expect_broken(machine).await?;
            }
            _ => bail!("the snapshot is {state}: {status}"),
        }
        ensure!(status["error"].is_string(), "no reason: {status}");
        let (target, name) = (self.plan.target(), machine.disks[device.disk].name);
        until("an event tells of it", async || Ok(machine.was_reported(target, name))).await
    }

    async fn end(&mut self) -> Result<()> {
        let machine = self.stage.machine;
        let with_bitmap = self.snapshots.iter().map(|snapshot| snapshot.generation.is_some());
        let complete =
            with_bitmap.zip(&self.copies).all(|(bitmap, copy)| copy.is_some() || !bitmap);
        // The backup is committed before QEMU is told: it may be told that it was not.
        self.commit();
        let success = complete && self.plan.success;
        match self.plan.end {
            End::Expires => {
                self.at("its lease is not renewed");
                let _quiet = machine.quiet().await;
                let gone = async || Ok(client::find(machine, self.plan.target()).await?.is_none());
                until("the lease ends the access", gone).await?;
                machine.tally.add(EXPIRED, 1);
                self.settle();
                return Ok(());
            }
            End::Killed(death) => {
                self.at("a client dies in the teardown");
                let _quiet = machine.quiet().await;
                let arguments = json!({ "target-id": self.plan.target(), "success": success });
                client::killed(machine, "backup-access-teardown", arguments, death).await?;
                let again =
                    client::tear_down(machine, self.plan.target(), success, self.plan.hangs());
                let (count, _) = again.await?;
                machine.tally.add(TEARDOWNS, 1);
                machine.tally.add(AGAIN, count - 1);
            }
            End::Teardown { twice } => {
                self.tear_down(success).await?;
                if twice {
                    self.at("a second teardown");
                    let arguments = json!({ "target-id": self.plan.target(), "success": false });
                    let result = machine.change("backup-access-teardown", arguments).await?;
                    ensure!(result["existed"] == false, "a second teardown: {result}");
                }
            }
            End::UnderReaders => bail!("it has ended already"),
        }
        self.settle();
        Ok(())
    }

    async fn tear_down(&self, success: bool) -> Result<()> {
        let machine = self.stage.machine;
        self.at(format!("teardown, success {success}"));
        let _quiet = machine.quiet().await;
        let hangs = self.plan.hangs();
        let (count, result) =
            client::tear_down(machine, self.plan.target(), success, hangs).await?;
        ensure!(result["existed"] == true, "the access was gone before its teardown: {result}");
        let may_fail = |device: &DevicePlan| device.may_break() || device.flaw.loses();
        let spotless = !self.stage.read_errors && !self.plan.devices.iter().any(may_fail);
        ensure!(!spotless || result.get("reason").is_none(), "the teardown says {result}");
        machine.tally.add(TEARDOWNS, 1);
        machine.tally.add(AGAIN, count - 1);
        Ok(())
    }

    fn commit(&mut self) {
        for (device, copy) in self.plan.devices.iter().zip(&mut self.copies) {
            if let Some(copy) = copy.take() {
                let disk = &self.stage.machine.disks[device.disk];
                disk.kept(self.plan.target).copy = Some(copy);
            }
        }
    }

    /// What is left of the bitmaps.
    fn settle(&self) {
        for device in &self.plan.devices {
            let disk = &self.stage.machine.disks[device.disk];
            let mut kept = disk.kept(self.plan.target);
            match device.mode {
                Mode::Omitted => {}
                Mode::None => kept.bitmap = Bitmap::None,
                Mode::New | Mode::Use => kept.bitmap = Bitmap::One,
            }
        }
    }
}

/// What was done with the bitmap is what the request, and what the target keeps, lets expect.
fn check_action(
    machine: &Machine,
    plan: &AccessPlan,
    device: &DevicePlan,
    info: &Value,
) -> Result<()> {
    let kept = machine.disks[device.disk].kept(plan.target);
    let action = info["bitmap-action"].as_str().unwrap_or_default();
    let fits = match (device.mode, action) {
        (Mode::Omitted, "not-used") | (Mode::New, "new") => true,
        (Mode::None, "not-used") | (Mode::Use, "missing-recreated") => kept.bitmap != Bitmap::One,
        (Mode::None, "not-used-removed") | (Mode::Use, "invalid") => kept.bitmap != Bitmap::None,
        (Mode::Use, "used") => kept.bitmap != Bitmap::None && kept.copy.is_some(),
        _ => false,
    };
    ensure!(fits, "the target has {:?}, but: {info}", kept.bitmap);
    if action == "used" {
        machine.tally.add(USED, 1);
    }
    Ok(())
}
