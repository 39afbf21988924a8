// SPDX-License-Identifier: MIT OR Apache-2.0
//! The fleecing images of an access, good and bad ones.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rand::Rng as _;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use tokio::sync::Mutex;

use super::disk::Disk;
use super::machine::Machine;
use super::tally::STALLS;
use crate::storage::{create_qcow2, raw_node};
use crate::stress::faults::{Fault, Faults};

const MIB: u64 = 1 << 20;
/// What a full image has room for, its own tables included.
const ROOM_BYTES: u64 = 3 * MIB;
const SLOW_BYTES_PER_S: u64 = 400_000;
const LONGEST_STALL: Duration = Duration::from_secs(4);

/// What is wrong with an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flaw {
    Nothing,
    /// It is smaller than the disk, and so is its limit.
    Small,
    /// It finds no more room, though it looks large enough.
    Full,
    /// Its first write fails.
    FailsOnce,
    /// Its writes fail.
    Fails,
    /// Its reads fail.
    Unreadable,
    /// It is slow.
    Slow,
    /// It stops, and goes on later.
    Stuck,
}

impl Flaw {
    pub(super) fn random(rng: &mut StdRng) -> Self {
        match rng.random_range(0..100) {
            0..6 => Self::Small,
            6..12 => Self::Full,
            12..18 => Self::FailsOnce,
            18..24 => Self::Fails,
            24..29 => Self::Unreadable,
            29..34 => Self::Slow,
            34..42 => Self::Stuck,
            _ => Self::Nothing,
        }
    }

    /// Whether the snapshot may break.
    pub(super) fn may_break(self) -> bool {
        !matches!(self, Self::Nothing | Self::FailsOnce | Self::Unreadable)
    }

    /// Whether reads of the snapshot may fail.
    pub(super) fn loses(self) -> bool {
        self.may_break() || self == Self::Unreadable
    }

    /// Whether requests may be in flight for long, so that a teardown gives up.
    pub(super) fn hangs(self) -> bool {
        matches!(self, Self::Slow | Self::Stuck)
    }
}

/// An image in the process.
pub(super) struct Image {
    pub(super) flaw: Flaw,
    /// From the topmost one to the lowest one.
    nodes: Vec<String>,
    group: Option<String>,
    file: PathBuf,
    server: Option<Mutex<Faults>>,
}

impl Image {
    /// Makes one for a disk.
    pub(super) async fn make(
        machine: &Machine,
        disk: &Disk,
        flaw: Flaw,
        rng: &mut StdRng,
    ) -> Result<Self> {
        let name = format!("fleece{}", machine.number());
        let storage = &machine.storage;
        let qcow2 = flaw == Flaw::Full || rng.random_ratio(1, 4);
        let size_bytes = match flaw {
            Flaw::Small => rng.random_range(1..=disk.size_bytes / MIB / 2) * MIB,
            // Direct I/O may demand whole blocks of the host's disk.
            _ => disk.size_bytes.next_multiple_of(4096),
        };
        let file = storage.path(&name);
        if qcow2 {
            create_qcow2(&file, size_bytes)?;
        } else {
            File::create(&file)?.set_len(size_bytes)?;
        }
        if flaw == Flaw::Full {
            File::options().write(true).open(&file)?.set_len(ROOM_BYTES)?;
        }
        if flaw.hangs() {
            machine.hanging.fetch_add(1, Ordering::Relaxed);
        }
        let mut this = Self { flaw, nodes: Vec::new(), group: None, file, server: None };
        let mut lowest = storage.file_node(&format!("{name}-file"), &name);
        if flaw == Flaw::Stuck {
            let mut faults = Faults::new(Some(Fault::Stall), &storage.path(""));
            lowest = faults.serve(storage, &name, false).await?;
            lowest["node-name"] = json!(format!("{name}-file"));
            lowest["discard"] = json!("unmap");
            this.server = Some(Mutex::new(faults));
        } else {
            lowest["cache"] = json!({ "direct": rng.random_ratio(1, 3) });
        }
        this.add(machine, lowest).await?;
        let format = if qcow2 { "qcow2" } else { "raw" };
        this.add_above(machine, &name, format).await?;
        Ok(this)
    }

    /// The topmost node.
    pub(super) fn node(&self) -> &str {
        self.nodes.first().map_or("", String::as_str)
    }

    async fn add(&mut self, machine: &Machine, node: Value) -> Result<()> {
        let name = node["node-name"].as_str().context("a node without a name")?.to_owned();
        machine.change("blockdev-add", node).await?;
        self.nodes.insert(0, name);
        Ok(())
    }

    /// Adds the format, with the flaw below or above it.
    async fn add_above(&mut self, machine: &Machine, name: &str, format: &str) -> Result<()> {
        if self.flaw == Flaw::Full {
            let mut room = raw_node(&format!("{name}-room"), self.node());
            room["size"] = json!(ROOM_BYTES);
            self.add(machine, room).await?;
        }
        let mut node = raw_node(&format!("{name}-{format}"), self.node());
        node["driver"] = json!(format);
        self.add(machine, node).await?;
        let errors = |iotype: &str, once: bool| json!([{ "event": "none", "iotype": iotype, "errno": 5, "once": once }]);
        let errors = match self.flaw {
            Flaw::FailsOnce => errors("write", true),
            Flaw::Fails => errors("write", false),
            Flaw::Unreadable => errors("read", false),
            Flaw::Slow => {
                let group = format!("{name}-brake");
                let limits = json!({ "bps-write": SLOW_BYTES_PER_S });
                let object = json!({ "qom-type": "throttle-group", "id": group, "limits": limits });
                machine.change("object-add", object).await?;
                let node = json!({ "driver": "throttle", "node-name": format!("{name}-slow"),
                                   "throttle-group": group, "file": self.node() });
                self.group = Some(group);
                return self.add(machine, node).await;
            }
            _ => return Ok(()),
        };
        let node = json!({ "driver": "blkdebug", "node-name": format!("{name}-bad"),
                           "image": self.node(), "discard": "unmap", "inject-error": errors });
        self.add(machine, node).await
    }

    /// Stops after a while and goes on later, if it is one that does.
    pub(super) async fn stall(&self, machine: &Machine, rng: &mut StdRng) -> Result<()> {
        let Some(server) = &self.server else { return Ok(()) };
        let pause = |rng: &mut StdRng, longest: Duration| longest.mul_f64(rng.random());
        tokio::time::sleep(pause(rng, LONGEST_STALL / 10)).await;
        server.lock().await.begin().await.context("stopping the image")?;
        machine.tally.add(STALLS, 1);
        tokio::time::sleep(pause(rng, LONGEST_STALL)).await;
        server.lock().await.end().await.context("letting the image go on")
    }

    /// Takes it out of the process and deletes it.
    pub(super) async fn remove(self, machine: &Machine) -> Result<()> {
        for node in &self.nodes {
            machine.change("blockdev-del", json!({ "node-name": node })).await?;
        }
        if self.flaw.hangs() {
            machine.hanging.fetch_sub(1, Ordering::Relaxed);
        }
        if let Some(group) = &self.group {
            machine.change("object-del", json!({ "id": group })).await?;
        }
        std::fs::remove_file(&self.file).context("deleting a fleecing image")
    }
}
