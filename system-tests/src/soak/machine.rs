// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process with its disks, their guests, and what must be true of it whenever nothing goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use provider_nbd::Client;
use qmp_client::{Event, EventItem, Session};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::{Mutex, MutexGuard, OwnedMutexGuard};
use tokio::task::JoinHandle;

use super::disk::{Bitmap, Disk, Form, TARGETS};
use super::proc::{descriptors, threads};
use super::tally::{COMPARED, EXPIRED, Places, REMOVED, RENEWED, Tally};
use crate::storage::{Connection, LIMIT, Launch, STDERR, Storage, until};
use crate::stress::faults::{Fault, Faults};
use crate::stress::reader::{check_disk, resume_disk};

/// glibc keeps freed memory in arenas, one for each of several threads, and in pieces: less of that,
/// and less noise, so that a leak stands out.
const ENVIRONMENT: [(&str, &str); 3] = [
    ("MALLOC_ARENA_MAX", "1"),
    ("MALLOC_MMAP_THRESHOLD_", "65536"),
    ("MALLOC_TRIM_THRESHOLD_", "65536"),
];
/// QEMU's threads for file I/O; they end when there was nothing to do for ten seconds.
const WORKERS: usize = 64;
const WORKERS_END_WITHIN: Duration = Duration::from_secs(12);
/// A few of them are woken at the end of that time and wait once more.
const ALL_WORKERS_END_WITHIN: Duration = Duration::from_secs(180);
/// What our bitmaps' names begin with, and those of the ones that guard them end with.
const GUARD_SUFFIX: &str = "guard";
const BITMAP_PREFIX: &str = "ba1-";

/// What kind of process it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Daemon,
    /// With a guest that never runs.
    Emulator,
}

/// What the extension can do.
#[derive(Debug, Clone, Default)]
pub(super) struct Features {
    pub(super) several_targets: bool,
    /// Names of commands, events and members of the schema.
    names: BTreeSet<String>,
}

impl Features {
    pub(super) fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    pub(super) fn leases(&self) -> bool {
        self.has("backup-access-renew")
    }

    /// What cannot come to pass.
    pub(super) fn missing(&self) -> Vec<&'static str> {
        let mut missing = Vec::new();
        if !self.leases() {
            missing.extend([RENEWED, EXPIRED]);
        }
        if !self.has("backup-access-bitmap-remove") {
            missing.push(REMOVED);
        }
        missing
    }
}

/// A running process.
pub(super) struct Machine {
    pub(super) storage: Storage,
    pub(super) kind: Kind,
    pub(super) disks: Vec<Disk>,
    pub(super) guests: Vec<Client>,
    pub(super) features: Features,
    /// QEMU 10.0 does not tell a client that connects within a drained section to be quiet: the
    /// section may never end, with or without an access. So who connects holds this, and who drains.
    quiet: Mutex<()>,
    /// The server of the disk whose reads can fail.
    served: Mutex<Option<Faults>>,
    rest: Rest,
    numbers: AtomicU64,
    /// Fleecing images that may not move.
    pub(super) hanging: AtomicUsize,
    events: Events,
    pub(super) tally: Tally,
}

/// What it is like when nothing goes on.
#[derive(Debug, Default)]
struct Rest {
    graph: Vec<String>,
    exports: Vec<String>,
    objects: Vec<String>,
    descriptors: Vec<String>,
    threads: Option<usize>,
}

/// How the process before this one ended, for the disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    Nothing,
    Quit,
    Killed,
}

impl Machine {
    /// Starts it on disks that may have content, and compares that.
    pub(super) async fn start(
        folder: TempDir,
        disks: Vec<Disk>,
        kind: Kind,
        before: Before,
        tally: &Tally,
    ) -> Result<Self> {
        let launch = Launch {
            emulator: (kind == Kind::Emulator).then_some(&[]),
            environment: &ENVIRONMENT,
            keep_stderr: true,
        };
        let storage = Storage::launch(folder, &launch).await?;
        let events = Events::collect(storage.session());
        let mut this = Self {
            storage,
            kind,
            disks,
            guests: Vec::new(),
            features: Features::default(),
            quiet: Mutex::default(),
            served: Mutex::default(),
            rest: Rest::default(),
            numbers: AtomicU64::new(0),
            hanging: AtomicUsize::new(0),
            events,
            tally: tally.clone(),
        };
        this.add_disks(before).await?;
        this.features = this.probe().await.context("probing the features")?;
        this.rest = this.look().await?;
        Ok(this)
    }

    async fn add_disks(&mut self, before: Before) -> Result<()> {
        let threads: BTreeSet<_> = self.disks.iter().filter_map(|disk| disk.iothread).collect();
        for thread in threads {
            self.storage.iothread(thread).await?;
        }
        for disk in &self.disks {
            if before == Before::Nothing {
                disk.create(&self.storage.path(""))?;
            } else {
                disk.process_ended();
            }
            let mut file = disk.file_node(&self.storage);
            if disk.form == Form::Served {
                let mut faults = Faults::new(Some(Fault::DiskReads), &self.storage.path(""));
                faults.end().await?;
                let node = faults.serve(&self.storage, disk.name, true).await?;
                file["driver"] = node["driver"].clone();
                file["server"] = node["server"].clone();
                file.as_object_mut().context("no object")?.remove("filename");
                *self.served.lock().await = Some(faults);
            }
            disk.add(&self.storage, file).await?;
            let guest = self.storage.client(&disk.guest_node()).await?;
            let clean = before != Before::Killed;
            let resumed = resume_disk(&guest, &disk.model, clean).await;
            resumed.with_context(|| format!("{} after {before:?}", disk.name))?;
            self.tally.add(COMPARED, disk.size_bytes);
            self.guests.push(guest);
        }
        if self.kind == Kind::Emulator {
            // The guest's own device on a disk, beside the writers that stand for it.
            let disk = &self.disks[0];
            let device = json!({ "driver": "virtio-blk-pci", "id": "dev0", "share-rw": true,
                                 "drive": disk.guest_node() });
            self.storage.run("device_add", device).await?;
        }
        Ok(())
    }

    async fn probe(&self) -> Result<Features> {
        let schema = self.storage.run("query-qmp-schema", json!({})).await?;
        let mut names = BTreeSet::new();
        for entry in schema.as_array().into_iter().flatten() {
            let members = entry["members"].as_array().into_iter().flatten();
            names.extend(
                members.chain([entry]).filter_map(|e| e["name"].as_str()).map(str::to_owned),
            );
        }
        ensure!(names.contains("backup-access-setup"), "this QEMU has no backup access");
        let several_targets = self.probe_targets().await?;
        Ok(Features { several_targets, names })
    }

    /// Whether two targets may have an access to one disk.
    async fn probe_targets(&self) -> Result<bool> {
        let disk = &self.disks[0];
        for number in 0..2 {
            self.storage.disk(&format!("probe{number}"), disk.size_bytes).await?;
        }
        let setup = async |number: usize| {
            let device = json!({ "device": disk.name, "fleecing": format!("probe{number}") });
            let request = json!({ "target-id": TARGETS[number], "devices": [device] });
            self.storage.try_run("backup-access-setup", request).await
        };
        setup(0).await?;
        let second = setup(1).await;
        for (number, target) in TARGETS.iter().enumerate().take(2) {
            let request = json!({ "target-id": target, "success": false });
            self.storage.run("backup-access-teardown", request).await?;
            for node in [format!("probe{number}"), format!("probe{number}-file")] {
                self.storage.run("blockdev-del", json!({ "node-name": node })).await?;
            }
            std::fs::remove_file(self.storage.path(&format!("probe{number}")))?;
        }
        match second {
            Ok(_) => Ok(true),
            Err(error) if error.to_string().contains("are not supported") => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Tells it to quit; it must end with exit code 0. Its folder and disks.
    pub(super) async fn quit(self) -> Result<(TempDir, Vec<Disk>)> {
        // A server that stands still would hold it up: it ends first, or goes on.
        self.read_errors(false).await?;
        let folder = self.storage.stop().await?;
        Ok((folder, self.disks))
    }

    /// Kills it. Its folder and disks.
    pub(super) fn kill(self) -> Result<(TempDir, Vec<Disk>)> {
        let folder = self.storage.kill()?;
        // What the server was told would go on after the comparison.
        drop(self.served);
        Ok((folder, self.disks))
    }

    /// How it ended, if it has, and what it said last.
    pub(super) fn post_mortem(&mut self) -> String {
        let ended = match self.storage.ended() {
            Ok(Some(status)) => format!("the process has ended: {status}"),
            Ok(None) => "the process lives".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        let said = self.stderr();
        format!("{ended}; it said:\n{}", crate::process::tail(&said))
    }

    fn stderr(&self) -> String {
        std::fs::read_to_string(self.storage.path(STDERR)).unwrap_or_default()
    }

    /// A number that was not used before, for names.
    pub(super) fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Nobody else connects or drains as long as this is held.
    pub(super) async fn quiet(&self) -> MutexGuard<'_, ()> {
        self.quiet.lock().await
    }

    /// The right to have an access to these disks, which are in ascending order.
    pub(super) async fn turns(&self, disks: &[usize]) -> Vec<OwnedMutexGuard<()>> {
        let mut turns = Vec::new();
        if !self.features.several_targets {
            for &disk in disks {
                turns.push(Arc::clone(&self.disks[disk].turn).lock_owned().await);
            }
        }
        turns
    }

    /// Gives a command that may drain or change the graph, and must succeed.
    pub(super) async fn change(&self, command: &str, arguments: Value) -> Result<Value> {
        let _quiet = self.quiet().await;
        self.storage.run(command, arguments).await
    }

    /// Connects to an export.
    pub(super) async fn connect(&self, export: &str, contexts: &[&str]) -> Result<Client> {
        let _quiet = self.quiet().await;
        self.storage.client_with(export, Connection { contexts, timeout: LIMIT }).await
    }

    /// From now on some reads of the served disk fail, or none.
    pub(super) async fn read_errors(&self, on: bool) -> Result<()> {
        match &mut *self.served.lock().await {
            Some(faults) if on => faults.begin().await,
            Some(faults) => faults.end().await,
            None => Ok(()),
        }
    }

    /// Whether an event said that a snapshot became worse.
    pub(super) fn was_reported(&self, target: &str, device: &str) -> bool {
        self.events.seen().broken.contains(&(target.to_owned(), device.to_owned()))
    }

    /// With which success an access of a target ended, as often as events told of it.
    pub(super) fn ends_reported(&self, target: &str) -> Vec<bool> {
        self.events.seen().ended.get(target).cloned().unwrap_or_default()
    }

    /// A new access is set up: what events told of an earlier one is not about it.
    pub(super) fn forget_events(&self, target: &str) {
        let mut seen = self.events.seen();
        seen.broken.retain(|(other, _)| other != target);
        seen.ended.remove(target);
    }

    /// Whether there are fleecing images that may not move.
    pub(super) fn hangs(&self) -> bool {
        self.hanging.load(Ordering::Relaxed) > 0
    }

    /// What it is like now.
    async fn look(&self) -> Result<Rest> {
        let names = |list: &Value, member: &str| -> Vec<String> {
            let list = list.as_array().into_iter().flatten();
            let mut names: Vec<_> =
                list.filter_map(|entry| entry[member].as_str()).map(str::to_owned).collect();
            names.sort();
            names
        };
        let exports = self.storage.run("query-block-exports", json!({})).await?;
        let objects = self.storage.run("qom-list", json!({ "path": "/objects" })).await?;
        Ok(Rest {
            graph: self.storage.graph().await?,
            exports: names(&exports, "id"),
            objects: names(&objects, "name"),
            descriptors: descriptors(self.storage.pid())?,
            threads: None,
        })
    }

    /// After an episode: nothing of it is left, and the disks are right.
    pub(super) async fn check_rest(&self, places: &Places) -> Result<()> {
        places.at("check", "nothing of the episode is left");
        let mut now = Rest::default();
        // Connections are closed and nodes deleted a little later.
        let same = until("nothing of the episode is left", async || {
            now = self.look().await?;
            Ok(now.graph == self.rest.graph
                && now.exports == self.rest.exports
                && now.objects == self.rest.objects
                && now.descriptors == self.rest.descriptors)
        });
        if let Err(error) = same.await {
            let mut text = String::new();
            for (what, was, is) in [
                ("graph", &self.rest.graph, &now.graph),
                ("exports", &self.rest.exports, &now.exports),
                ("objects", &self.rest.objects, &now.objects),
                ("descriptors", &self.rest.descriptors, &now.descriptors),
            ] {
                if was != is {
                    text.push_str(&format!("\n{what} at the start: {was:#?}\nnow: {is:#?}"));
                }
            }
            return Err(error.context(text));
        }
        for command in ["query-backup-access", "query-block-jobs"] {
            let list = self.storage.run(command, json!({})).await?;
            ensure!(list == json!([]), "{command}: {list}");
        }
        let threads = threads(self.storage.pid())?;
        let limit = self.rest.threads.unwrap_or(threads) + WORKERS * (1 + self.disks.len());
        ensure!(threads <= limit, "{threads} threads");
        let said = self.stderr();
        ensure!(!said.contains("panicked"), "it panicked: {said}");
        self.check_bitmaps().await?;
        for (disk, guest) in self.disks.iter().zip(&self.guests) {
            places.at("check", format!("the guest's {}", disk.name));
            check_disk(guest, &disk.model).await.with_context(|| disk.name)?;
            self.tally.add(COMPARED, disk.size_bytes);
        }
        Ok(())
    }

    /// Waits until only those threads are left that never end. The first call says how many.
    pub(super) async fn check_threads(&mut self, places: &Places) -> Result<()> {
        places.at("check", "QEMU's idle threads end");
        let pid = self.storage.pid();
        let Some(wanted) = self.rest.threads else {
            tokio::time::sleep(WORKERS_END_WITHIN).await;
            self.rest.threads = Some(threads(pid)?);
            return Ok(());
        };
        let start = Instant::now();
        let mut now = threads(pid)?;
        while now > wanted {
            ensure!(
                start.elapsed() < ALL_WORKERS_END_WITHIN,
                "{now} threads after {:.0} s of rest, {wanted} at the start",
                start.elapsed().as_secs_f64()
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
            now = threads(pid)?;
        }
        // One may have been about to end at the first look.
        self.rest.threads = Some(now);
        Ok(())
    }

    async fn check_bitmaps(&self) -> Result<()> {
        for disk in &self.disks {
            let all = self.storage.bitmaps(disk.name).await?;
            // Beside each bitmap is one that records nothing.
            let (guards, found): (Vec<_>, Vec<_>) =
                all.iter().partition(|name| name.ends_with(GUARD_SUFFIX));
            ensure!(found.iter().all(|name| name.starts_with(BITMAP_PREFIX)), "{all:?}");
            let count = |wanted: Bitmap| {
                (0..TARGETS.len()).filter(|&target| disk.kept(target).bitmap == wanted).count()
            };
            let (least, unknown) = (count(Bitmap::One), count(Bitmap::Unknown));
            ensure!(
                (least..=least + unknown).contains(&found.len()),
                "{} should have {least} bitmaps, and up to {unknown} more: {all:?}",
                disk.name
            );
            // A crash can leave one alone in the image.
            let is_alone = |guard: &str| {
                let target = guard.trim_end_matches(GUARD_SUFFIX);
                !found.iter().any(|name| name.starts_with(target))
            };
            let alone = guards.iter().filter(|name| is_alone(name)).count();
            ensure!(alone <= unknown, "{} has guards without bitmaps: {all:?}", disk.name);
        }
        Ok(())
    }
}

/// What events told of.
#[derive(Debug, Default)]
struct Seen {
    /// Snapshots that became worse, by target and device.
    broken: BTreeSet<(String, String)>,
    /// Ends of accesses, with their success, by target.
    ended: BTreeMap<String, Vec<bool>>,
}

impl Seen {
    fn note(&mut self, event: &Event) {
        let target = event.data["target-id"].as_str().unwrap_or_default().to_owned();
        match event.name.as_str() {
            "BACKUP_ACCESS_BROKEN" => {
                let device = event.data["device"].as_str().unwrap_or_default();
                self.broken.insert((target, device.to_owned()));
            }
            "BACKUP_ACCESS_TORN_DOWN" => {
                self.ended.entry(target).or_default().push(event.data["success"] == true);
            }
            _ => {}
        }
    }
}

/// Collects what events tell of.
#[derive(Debug)]
struct Events {
    seen: Arc<std::sync::Mutex<Seen>>,
    task: JoinHandle<()>,
}

impl Events {
    fn collect(session: &Session) -> Self {
        let mut events = session.events();
        let seen = Arc::<std::sync::Mutex<Seen>>::default();
        let collected = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            while let Some(item) = events.next().await {
                if let EventItem::Event(event) = item {
                    collected.lock().unwrap_or_else(PoisonError::into_inner).note(&event);
                }
            }
        });
        Self { seen, task }
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.task.abort();
    }
}
