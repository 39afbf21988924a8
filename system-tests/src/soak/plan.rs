// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one access will be, as made from the random numbers of its episode.

use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use serde_json::{Value, json};

use super::client::Death;
use super::disk::{Form, TARGETS};
use super::image::Flaw;
use super::machine::Machine;

const MIB: u64 = 1 << 20;
const LEASE_S: u64 = 2;

/// Use of a bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Omitted,
    None,
    New,
    Use,
}

/// What reads a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    Nobody,
    /// All that the snapshot offers; the copy may be committed.
    Whole {
        trims: bool,
    },
    /// One that reads all, and one that releases all.
    Two,
    /// Disconnects in the middle of its requests.
    Leaves,
    /// A process that is killed.
    Process,
}

/// How an access ends.
#[derive(Debug, Clone, Copy)]
pub(super) enum End {
    /// When all has been read.
    Teardown { twice: bool },
    /// While readers are at work.
    UnderReaders,
    /// By a client that dies, then by another one.
    Killed(Death),
    /// Nobody renews its lease.
    Expires,
}

/// One disk of an access.
#[derive(Debug, Clone)]
pub(super) struct DevicePlan {
    pub(super) disk: usize,
    pub(super) flaw: Flaw,
    pub(super) mode: Mode,
    /// Whether the generation is told.
    pub(super) tells_generation: bool,
    pub(super) reader: Reader,
    /// Clean areas can be read too.
    pub(super) readable: bool,
    options: Value,
}

/// One access.
#[derive(Debug, Clone)]
pub(super) struct AccessPlan {
    pub(super) target: usize,
    pub(super) devices: Vec<DevicePlan>,
    /// The client that sets it up dies.
    pub(super) setup_dies: Option<Death>,
    pub(super) end: End,
    pub(super) lease: bool,
    /// Whether a complete backup is told to be one.
    pub(super) success: bool,
    options: Value,
}

impl AccessPlan {
    pub(super) fn random(machine: &Machine, target: usize, rng: &mut StdRng) -> Self {
        let mut disks: Vec<usize> = (0..machine.disks.len()).collect();
        disks.shuffle(rng);
        disks.truncate(rng.random_range(1..=machine.disks.len()));
        // Whoever waits for several turns waits in one order.
        disks.sort_unstable();
        // The point in time is taken for all disks in any order.
        let faulty = rng.random_range(0..disks.len());
        let mut devices: Vec<_> = disks
            .iter()
            .enumerate()
            .map(|(index, &disk)| {
                let flaw = if index == faulty { Flaw::random(rng) } else { Flaw::Nothing };
                DevicePlan::random(machine, disk, flaw, rng)
            })
            .collect();
        devices.shuffle(rng);
        let leases = machine.features.leases();
        let stuck = devices.iter().any(|device| device.flaw == Flaw::Stuck);
        if stuck && rng.random() {
            // A teardown waits for the longest of all timeouts.
            devices.iter_mut().for_each(|device| device.options["timeout"] = json!(1));
        }
        let end = match rng.random_range(0..100) {
            // A teardown that may have to be given again.
            0..60 if stuck => End::UnderReaders,
            0..15 => End::UnderReaders,
            15..27 => End::Killed(Death::random(rng)),
            27..37 if leases => End::Expires,
            _ => End::Teardown { twice: rng.random_ratio(1, 4) },
        };
        let lease = leases && (rng.random_ratio(1, 4) || matches!(end, End::Expires));
        let mut options = json!({});
        if lease {
            options["lease"] = json!(LEASE_S);
        }
        if rng.random_ratio(1, 4) {
            options["buffer-total"] = json!([0, MIB, 4 * MIB][rng.random_range(0..3)]);
        }
        if rng.random_ratio(1, 3) {
            options["granularity"] = json!(4096_u64 << rng.random_range(0..=10));
        }
        Self {
            target,
            devices,
            setup_dies: rng.random_ratio(1, 10).then(|| Death::random(rng)),
            end,
            lease,
            success: rng.random_ratio(3, 4),
            options,
        }
    }

    pub(super) fn target(&self) -> &'static str {
        TARGETS[self.target]
    }

    /// The disks in ascending order.
    pub(super) fn disks(&self) -> Vec<usize> {
        let mut disks: Vec<_> = self.devices.iter().map(|device| device.disk).collect();
        disks.sort_unstable();
        disks
    }

    /// The arguments of the setup; `images` are the fleecing images' nodes.
    pub(super) fn request(&self, machine: &Machine, images: &[&str]) -> Value {
        let devices: Vec<Value> = self
            .devices
            .iter()
            .zip(images)
            .map(|(device, image)| device.request(machine, self.target, image))
            .collect();
        merged(json!({ "target-id": self.target(), "devices": devices }), &self.options)
    }
}

impl DevicePlan {
    fn random(machine: &Machine, disk: usize, flaw: Flaw, rng: &mut StdRng) -> Self {
        let mut options = json!({});
        let buffers = [0, 0, 64 << 10, 512 << 10, 2 * MIB, 64 * MIB];
        // What never gets to the image meets no error of it.
        let buffers = if flaw == Flaw::Nothing { &buffers[..] } else { &buffers[..4] };
        options["buffer-size"] = json!(buffers[rng.random_range(0..buffers.len())]);
        if flaw == Flaw::Small || rng.random_ratio(1, 10) {
            options["fleecing-limit"] = json!(rng.random_range(1..=16) * MIB);
        }
        if rng.random_ratio(1, 10) {
            options["metadata-limit"] = json!(64 * MIB);
        }
        if flaw.may_break() {
            options["timeout"] = json!(rng.random_range(1..=2));
        } else if rng.random_ratio(1, 4) && machine.disks[disk].form != Form::Served {
            // The guest's requests never fail: nothing is wrong here.
            options["on-error"] = json!("break-guest-write");
        }
        let readable = machine.features.has("readable") && rng.random_ratio(1, 5);
        if readable {
            options["readable"] = json!("all");
        }
        Self {
            disk,
            flaw,
            readable,
            mode: match rng.random_range(0..10) {
                0..2 => Mode::Omitted,
                2 => Mode::None,
                3 => Mode::New,
                _ => Mode::Use,
            },
            tells_generation: rng.random_ratio(2, 3),
            reader: match rng.random_range(0..10) {
                0 => Reader::Nobody,
                1 => Reader::Two,
                2 => Reader::Leaves,
                3 => Reader::Process,
                other => Reader::Whole { trims: other < 6 },
            },
            options,
        }
    }

    /// Whether the snapshot may break.
    pub(super) fn may_break(&self) -> bool {
        let options = ["fleecing-limit", "timeout"];
        self.flaw.may_break() || options.iter().any(|name| self.options.get(name).is_some())
    }

    /// Whether old data goes to the image at once.
    pub(super) fn writes_through(&self) -> bool {
        self.options["buffer-size"] == 0
    }

    fn request(&self, machine: &Machine, target: usize, image: &str) -> Value {
        let disk = &machine.disks[self.disk];
        let mut device = json!({ "device": disk.name, "fleecing": image });
        match self.mode {
            Mode::Omitted => {}
            Mode::None => device["bitmap-mode"] = json!("none"),
            Mode::New => device["bitmap-mode"] = json!("new"),
            Mode::Use => device["bitmap-mode"] = json!("use"),
        }
        if self.mode == Mode::Use
            && self.tells_generation
            && let Some(copy) = &disk.kept(target).copy
        {
            device["generation"] = json!(copy.generation);
        }
        merged(device, &self.options)
    }
}

fn merged(mut object: Value, members: &Value) -> Value {
    for (key, value) in members.as_object().into_iter().flatten() {
        object[key] = value.clone();
    }
    object
}
