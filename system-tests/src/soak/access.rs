// SPDX-License-Identifier: MIT OR Apache-2.0
//! One access from its setup to its end, and what its target keeps of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

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
use super::tally::{
    AGAIN, BROKEN, COPIES, DEGRADED, ENDS, EXPIRED, HELD_UP, Places, REMOVED, RENEWED, SETUPS, USED,
};
use crate::storage::{LIMIT, until};
use crate::stress::model::{Moment, ZERO};
use crate::stress::reader::Tolerated;

const TORN_DOWN: &str = "BACKUP_ACCESS_TORN_DOWN";
const REMOVE: &str = "backup-access-bitmap-remove";
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
        if stage.machine.features.has(REMOVE) && rng.random_ratio(1, 10) {
            remove_bitmaps(stage.machine, target, &mut rng).await?;
        }
        let plan = AccessPlan::random(stage.machine, target, &mut rng);
        let what = format!("{plan:?}");
        Box::pin(one(stage, plan, &mut rng)).await.with_context(|| format!("access: {what}"))?;
    }
    stage.places.at(who, "done");
    Ok(())
}

/// Has the bitmaps of one or all disks removed.
async fn remove_bitmaps(machine: &Machine, target: usize, rng: &mut StdRng) -> Result<()> {
    let mut arguments = json!({ "target-id": TARGETS[target] });
    let one = rng.random::<bool>().then(|| rng.random_range(0..machine.disks.len()));
    if let Some(disk) = one {
        arguments["device"] = json!(machine.disks[disk].name);
    }
    machine.change(REMOVE, arguments).await?;
    let disks = machine.disks.iter().enumerate();
    for (_, disk) in disks.filter(|&(index, _)| one.is_none_or(|one| one == index)) {
        disk.kept(target).bitmap = Bitmap::None;
    }
    machine.tally.add(REMOVED, 1);
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
    /// It is being torn down: readers may fail in any way.
    closing: Arc<AtomicBool>,
    /// The lease is not renewed any more.
    given_up: AtomicBool,
}

impl<'a> Access<'a> {
    /// Sets it up; none if the client died before QEMU had understood it.
    async fn set_up(stage: Stage<'a>, plan: AccessPlan, images: &[Image]) -> Result<Option<Self>> {
        let Stage { machine, places, .. } = stage;
        let nodes: Vec<&str> = images.iter().map(Image::node).collect();
        let request = plan.request(machine, &nodes);
        places.at(plan.target(), format!("setup {request}"));
        let Some((infos, moments)) = try_set_up(machine, &plan, &request).await? else {
            return Ok(None);
        };
        machine.tally.add(SETUPS, 1);
        let infos = infos.as_array().cloned().context("no list of devices")?;
        ensure!(infos.len() == plan.devices.len(), "{infos:?}");
        let mut snapshots = Vec::new();
        for ((device, moment), info) in plan.devices.iter().zip(moments).zip(infos) {
            check_action(machine, &plan, device, &info)?;
            let disk = &machine.disks[device.disk];
            ensure!(info["size"] == disk.size_bytes, "the size of {}: {info}", disk.name);
            let snapshot = Snapshot::new(info, moment, disk.sectors(), &plan, device)?;
            snapshots.push(snapshot);
        }
        let (closing, given_up) = (Arc::default(), AtomicBool::new(false));
        Ok(Some(Self { stage, plan, snapshots, closing, given_up }))
    }

    fn at(&self, what: impl Into<String>) {
        self.stage.places.at(self.plan.target(), what);
    }

    async fn run(self, images: &[Image], rng: &mut StdRng) -> Result<()> {
        let machine = self.stage.machine;
        let mut child = || StdRng::seed_from_u64(rng.random());
        let mut stall_rngs: Vec<_> = images.iter().map(|_| child()).collect();
        let stalls = images.iter().zip(&mut stall_rngs).map(|(i, rng)| i.stall(machine, rng));
        let stalls = try_join_all(stalls);
        let mut own = child();
        let read_rngs: Vec<_> = images.iter().map(|_| child()).collect();
        let work = Box::pin(self.read_and_end(read_rngs, &mut own));
        tokio::try_join!(work, Box::pin(stalls), self.renew()).map(drop)
    }

    /// Renews the lease, if there is one, until that is given up.
    async fn renew(&self) -> Result<()> {
        let machine = self.stage.machine;
        while self.plan.lease && !self.given_up.load(Ordering::Relaxed) {
            let arguments = json!({ "target-id": self.plan.target() });
            let renewed = machine.storage.run("backup-access-renew", arguments).await;
            if !self.given_up.load(Ordering::Relaxed) {
                renewed?;
                machine.tally.add(RENEWED, 1);
            }
            tokio::time::sleep(RENEW_EVERY).await;
        }
        Ok(())
    }

    async fn read_and_end(&self, rngs: Vec<StdRng>, rng: &mut StdRng) -> Result<()> {
        if matches!(self.plan.end, End::UnderReaders) {
            let time = Duration::from_millis(rng.random_range(0..400));
            let end = async {
                tokio::time::sleep(time).await;
                self.closing.store(true, Ordering::Relaxed);
                self.tear_down(false).await
            };
            let readers = Box::pin(self.read_all(rngs));
            return tokio::try_join!(readers, Box::pin(end)).map(drop);
        }
        let copies = Box::pin(self.read_all(rngs)).await?;
        Box::pin(self.end(copies)).await
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
        let state = self.check_state(device, snapshot).await;
        // It may have ended in the middle of that.
        if self.closing.load(Ordering::Relaxed) {
            return Ok(None);
        }
        state?;
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

    async fn end(&self, copies: Vec<Option<Copy>>) -> Result<()> {
        let machine = self.stage.machine;
        let with_bitmap =
            self.plan.devices.iter().map(|device| matches!(device.mode, Mode::New | Mode::Use));
        let complete = with_bitmap.zip(&copies).all(|(bitmap, copy)| copy.is_some() || !bitmap);
        // The backup is committed before QEMU is told: it may be told that it was not.
        for (device, copy) in self.plan.devices.iter().zip(copies) {
            if let Some(copy) = copy {
                machine.disks[device.disk].kept(self.plan.target).copy = Some(copy);
            }
        }
        let success = complete && self.plan.success;
        match self.plan.end {
            End::UnderReaders => bail!("it has ended already"),
            End::Teardown { twice: false } => self.tear_down(success).await,
            End::Teardown { twice: true } => {
                self.tear_down(success).await?;
                self.at("a second teardown");
                let arguments = json!({ "target-id": self.plan.target(), "success": false });
                let result = machine.change("backup-access-teardown", arguments).await?;
                ensure!(result["existed"] == false, "a second teardown: {result}");
                Ok(())
            }
            End::Killed(death) => {
                self.at("a client dies in the teardown");
                let quiet = machine.quiet().await;
                self.given_up.store(true, Ordering::Relaxed);
                let arguments = json!({ "target-id": self.plan.target(), "success": success });
                client::killed(machine, "backup-access-teardown", arguments, death).await?;
                drop(quiet);
                // Whether that one was executed or not.
                let (count, _) = client::tear_down(machine, self.plan.target(), success).await?;
                machine.tally.add(AGAIN, count - 1);
                self.ended(success).await
            }
            End::Expires => {
                self.at("its lease is not renewed");
                self.given_up.store(true, Ordering::Relaxed);
                let gone = async || Ok(client::find(machine, self.plan.target()).await?.is_none());
                until("the lease ends the access", gone).await?;
                machine.tally.add(EXPIRED, 1);
                self.ended(false).await
            }
        }
    }

    async fn tear_down(&self, success: bool) -> Result<()> {
        let machine = self.stage.machine;
        self.at(format!("teardown, success {success}"));
        self.given_up.store(true, Ordering::Relaxed);
        let (count, result) = client::tear_down(machine, self.plan.target(), success).await?;
        // Its lease ends it too after a teardown that gave up.
        let ended_already = self.plan.lease && count > 1;
        ensure!(
            result["existed"] == true || ended_already,
            "the access was gone before its teardown: {result}"
        );
        let may_fail = |device: &DevicePlan| device.may_break() || device.flaw.loses();
        let spotless = !self.stage.read_errors && !self.plan.devices.iter().any(may_fail);
        let reason = result.get("reason").is_some();
        ensure!(!(spotless && reason) || ended_already, "the teardown says {result}");
        machine.tally.add(AGAIN, count - 1);
        self.ended(success).await
    }

    /// It has ended: an event says so, once, and the bitmaps are known.
    async fn ended(&self, success: bool) -> Result<()> {
        let machine = self.stage.machine;
        self.at("an event tells of its end");
        machine.tally.add(ENDS, 1);
        if machine.features.has(TORN_DOWN) {
            let target = self.plan.target();
            let told = async || Ok(!machine.ends_reported(target).is_empty());
            until("an event tells of the end of the access", told).await?;
            let ends = machine.ends_reported(target);
            ensure!(ends == [success], "it ended with {success}, events say {ends:?}");
        }
        for device in &self.plan.devices {
            let disk = &machine.disks[device.disk];
            let mut kept = disk.kept(self.plan.target);
            match device.mode {
                Mode::Omitted => {}
                Mode::None => kept.bitmap = Bitmap::None,
                Mode::New | Mode::Use => kept.bitmap = Bitmap::One,
            }
        }
        Ok(())
    }
}

/// Gives the setup until it succeeds, or has a client that dies give it. The devices' infos and the
/// points in time; none if there is no access afterwards.
async fn try_set_up(
    machine: &Machine,
    plan: &AccessPlan,
    request: &Value,
) -> Result<Option<(Value, Vec<Moment>)>> {
    let start = Instant::now();
    loop {
        let _quiet = machine.quiet().await;
        let hangs = machine.hangs();
        machine.forget_events(plan.target());
        let moments: Vec<Moment> = plan
            .devices
            .iter()
            .map(|device| machine.disks[device.disk].model.begin_point_in_time())
            .collect();
        let infos = match plan.setup_dies {
            None => machine.storage.try_run("backup-access-setup", request.clone()).await,
            Some(death) => {
                client::killed(machine, "backup-access-setup", request.clone(), death).await?;
                // An access that an earlier process has left.
                let access = client::find(machine, plan.target()).await?;
                Ok(access.map_or(Value::Null, |access| access["devices"].clone()))
            }
        };
        for (device, moment) in plan.devices.iter().zip(&moments) {
            machine.disks[device.disk].model.end_point_in_time(moment);
        }
        match infos {
            Ok(Value::Null) => return Ok(None),
            Ok(infos) => return Ok(Some((infos, moments))),
            // It would have to wait for another target's image.
            Err(error) if hangs && client::is_held_up(&error) && start.elapsed() < 2 * LIMIT => {
                machine.tally.add(HELD_UP, 1);
            }
            Err(error) => return Err(error).with_context(|| format!("setup {request}")),
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
