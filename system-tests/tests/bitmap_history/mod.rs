// SPDX-License-Identifier: MIT OR Apache-2.0
//! A random history of one disk and two backup targets, and what must be true of every bitmap that
//! is used in it: what it does not mark dirty is the same now as it was at the backup that the
//! client names.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use provider_nbd::{Client, ZeroOptions, context};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};
use system_tests::disk_form::DiskForm;
use system_tests::storage::{Connection, LIMIT, Storage, folder};

const DISK: &str = "disk0";
const MIB: u64 = 1 << 20;
const MIN_BYTES: u64 = MIB;
const MAX_BYTES: u64 = 2 * MIB;
const STEPS: u32 = 40;
/// A bitmap is valid for its base and so many generations since.
const MAX_GENERATIONS: usize = 16;

/// How often each action occurred.
pub(super) type Actions = HashMap<String, u64>;

/// What the next setup of a target must find.
#[derive(Debug, Clone)]
enum Bitmap {
    Missing,
    /// A crash: there is none, or one that cannot be used.
    Crashed,
    Kept {
        generations: Vec<String>,
        success: bool,
        size_bytes: u64,
        /// The disk was smaller meanwhile.
        cut: bool,
    },
}

/// One backup target with what its client remembers.
struct Target {
    name: &'static str,
    bitmap: Bitmap,
    /// Content of the disk at the point in time of each generation.
    points: HashMap<String, Arc<Vec<u8>>>,
    /// Generations whose backups were committed, oldest first.
    committed: Vec<String>,
    /// Of the last access with a bitmap whose teardown was told of a success.
    last_success: Option<String>,
}

impl Target {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            bitmap: Bitmap::Missing,
            points: HashMap::new(),
            committed: Vec::new(),
            last_success: None,
        }
    }

    /// The actions that a request may lead to.
    fn expected(&self, mode: Option<&str>, generation: Option<&str>, size: u64) -> Vec<&str> {
        match (mode, &self.bitmap) {
            (None, _) | (Some("none"), Bitmap::Missing) => vec!["not-used"],
            (Some("none"), Bitmap::Crashed) => vec!["not-used", "not-used-removed"],
            (Some("none"), Bitmap::Kept { .. }) => vec!["not-used-removed"],
            (Some("new"), _) => vec!["new"],
            (_, Bitmap::Missing) => vec!["missing-recreated"],
            (_, Bitmap::Crashed) => vec!["missing-recreated", "invalid"],
            (_, Bitmap::Kept { generations, success, size_bytes, cut }) => {
                let named = match generation {
                    Some(generation) => generations.iter().any(|id| id == generation),
                    None => *success,
                };
                vec![if named && *size_bytes == size && !cut { "used" } else { "invalid" }]
            }
        }
    }

    /// The teardown, or a clean end of QEMU, after this setup.
    fn settle(&mut self, action: &str, id: &str, success: bool, size_bytes: u64) {
        let mut generations = match &mut self.bitmap {
            Bitmap::Kept { generations, .. } if action == "used" && !success => {
                std::mem::take(generations)
            }
            _ => Vec::new(),
        };
        generations.push(id.to_owned());
        if generations.len() > MAX_GENERATIONS + 1 {
            generations.remove(1);
        }
        if success {
            self.last_success = Some(id.to_owned());
        }
        self.bitmap = Bitmap::Kept { generations, success, size_bytes, cut: false };
    }
}

/// An access that is set up.
struct Access {
    target: usize,
    action: String,
    generation: Option<String>,
}

/// The disk, its process, and everything that is remembered.
pub(super) struct History {
    rng: StdRng,
    form: DiskForm,
    /// The disk's I/O is done in this thread.
    iothread: Option<&'static str>,
    storage: Option<Storage>,
    guest: Option<Client>,
    content: Vec<u8>,
    targets: [Target; 2],
    actions: Actions,
    log: Vec<String>,
}

impl History {
    /// Carries a whole history out; which actions occurred.
    pub(super) async fn run(seed: u64) -> Result<Actions> {
        let form = DiskForm::ALL[(seed % 3) as usize];
        let folder = folder()?;
        form.create(folder.path(), DISK, MAX_BYTES)?;
        DiskForm::Raw.create(folder.path(), "fleecing", MAX_BYTES)?;
        let mut this = Self {
            rng: StdRng::seed_from_u64(seed),
            form,
            iothread: (seed / 3 % 2 == 1).then_some("io0"),
            storage: Some(Storage::start_in(folder).await?),
            guest: None,
            content: vec![0; MAX_BYTES as usize],
            targets: [Target::new("first"), Target::new("second")],
            actions: Actions::new(),
            log: Vec::new(),
        };
        this.log.push(format!("{form:?}, thread {:?}", this.iothread));
        let done = this.steps().await;
        let log = this.log.join("\n");
        done.with_context(|| format!("after:\n{log}"))?;
        Ok(this.actions)
    }

    async fn steps(&mut self) -> Result<()> {
        self.open().await?;
        for _ in 0..STEPS {
            self.writes().await?;
            match self.rng.random_range(0..24) {
                0 => self.restart(None).await?,
                1 => self.crash().await?,
                2..=4 => self.resize().await?,
                _ => self.backup().await?,
            }
        }
        self.guest = None;
        self.storage.take().context("no process")?.quit().await
    }

    fn storage(&self) -> Result<&Storage> {
        self.storage.as_ref().context("no process")
    }

    fn guest(&self) -> Result<&Client> {
        self.guest.as_ref().context("no guest")
    }

    /// Opens the disk in a process that was just started.
    async fn open(&mut self) -> Result<()> {
        let storage = self.storage()?;
        if let Some(iothread) = self.iothread {
            storage.iothread(iothread).await?;
        }
        self.form.open(storage, DISK).await?;
        DiskForm::Raw.open(storage, "fleecing").await?;
        self.connect().await
    }

    async fn connect(&mut self) -> Result<()> {
        let storage = self.storage()?;
        storage.export_disk(DISK, self.iothread).await?;
        self.guest = Some(storage.client(DISK).await?);
        Ok(())
    }

    /// Some requests of the guest.
    async fn writes(&mut self) -> Result<()> {
        let size = self.content.len() as u64;
        for _ in 0..self.rng.random_range(0..4) {
            let len = self.rng.random_range(1..=48) * 512;
            let offset = self.rng.random_range(0..=(size - len) / 512) * 512;
            let range = offset as usize..(offset + len) as usize;
            let guest = self.guest.clone().context("no guest")?;
            match self.rng.random_range(0..8) {
                0 => {
                    guest.write_zeroes(offset, len, ZeroOptions::default()).await?;
                    self.content[range].fill(0);
                }
                1 => {
                    guest.trim(offset, len).await?;
                    let now = guest.read(offset, len as usize).await?;
                    self.content[range].copy_from_slice(&now);
                }
                _ => {
                    let pattern = self.rng.random();
                    let data = Bytes::from(vec![pattern; len as usize]);
                    guest.write(offset, data, false).await?;
                    self.content[range].fill(pattern);
                }
            }
        }
        Ok(())
    }

    /// A clean end, during an access or not, and a new start.
    async fn restart(&mut self, during: Option<Access>) -> Result<()> {
        self.log.push(format!("restart, during an access: {}", during.is_some()));
        self.guest = None;
        let folder = self.storage.take().context("no process")?.stop().await?;
        if let Some(access) = during
            && let Some(id) = &access.generation
        {
            let size = self.content.len() as u64;
            self.targets[access.target].settle(&access.action, id, false, size);
        }
        if !self.form.stores_bitmaps() {
            self.targets.iter_mut().for_each(|target| target.bitmap = Bitmap::Missing);
        }
        self.storage = Some(Storage::start_in(folder).await?);
        self.open().await
    }

    /// An end by SIGKILL and a new start.
    async fn crash(&mut self) -> Result<()> {
        self.log.push("kill".to_owned());
        self.guest = None;
        let folder = self.storage.take().context("no process")?.kill()?;
        for target in &mut self.targets {
            target.bitmap = match target.bitmap {
                Bitmap::Missing => Bitmap::Missing,
                _ if self.form.stores_bitmaps() => Bitmap::Crashed,
                _ => Bitmap::Missing,
            };
        }
        self.storage = Some(Storage::start_in(folder).await?);
        self.open().await?;
        // An image may have lost what was not flushed, as with a real disk.
        self.look().await
    }

    /// Takes over what the disk holds now.
    async fn look(&mut self) -> Result<()> {
        let now = self.guest()?.read(0, self.content.len()).await?;
        self.content.copy_from_slice(&now);
        Ok(())
    }

    async fn resize(&mut self) -> Result<()> {
        // QEMU refuses to resize an image with a bitmap that cannot be used, and aborts when it is
        // to resize one with a file for the data that nobody may write to.
        let crashed = self.targets.iter().any(|target| matches!(target.bitmap, Bitmap::Crashed));
        if crashed || self.form == DiskForm::RawWithQcow2 {
            return Ok(());
        }
        self.guest = None;
        let storage = self.storage()?;
        let export = json!({ "id": format!("guest-{DISK}"), "mode": "hard" });
        storage.run("block-export-del", export).await?;
        system_tests::storage::until("the export is gone", async || {
            Ok(storage.run("query-block-exports", json!({})).await? == json!([]))
        })
        .await?;
        let old = self.content.len() as u64;
        let sizes = [MIN_BYTES, MAX_BYTES - 64 * 1024, MAX_BYTES - 512, MAX_BYTES];
        let size = *sizes.choose(&mut self.rng).context("no sizes")?;
        // There, or there and back.
        let back = self.rng.random_bool(0.6);
        for size in [size].into_iter().chain(back.then_some(old)) {
            let arguments = json!({ "node-name": DISK, "size": size });
            self.storage()?.run("block_resize", arguments).await?;
            self.log.push(format!("resize from {} to {size}", self.content.len()));
            self.content.resize(size as usize, 0);
            for target in &mut self.targets {
                if let Bitmap::Kept { size_bytes, cut, .. } = &mut target.bitmap {
                    *cut |= size < *size_bytes;
                }
            }
        }
        self.connect().await?;
        // An image may still hold what was cut off within a cluster.
        self.look().await
    }

    /// The generation that the client names: the last one, none, an older one, or a foreign one.
    fn choose_generation(&mut self, target: usize) -> Option<String> {
        let committed = &self.targets[target].committed;
        match self.rng.random_range(0..10) {
            0 => None,
            1 => Some("aaaaaaaaaa".to_owned()),
            2 => committed.choose(&mut self.rng).cloned(),
            3 => self.targets[1 - target].committed.last().cloned(),
            _ => committed.last().cloned(),
        }
    }

    async fn backup(&mut self) -> Result<()> {
        let target = self.rng.random_range(0..2);
        let mode = match self.rng.random_range(0..20) {
            0 => None,
            1 => Some("none"),
            2 => Some("new"),
            _ => Some("use"),
        };
        let generation = self.choose_generation(target);
        let mut device = json!({ "device": DISK, "fleecing": "fleecing" });
        if let Some(mode) = mode {
            device["bitmap-mode"] = json!(mode);
        }
        if let Some(generation) = &generation {
            device["generation"] = json!(generation);
        }
        if self.rng.random_ratio(1, 3) {
            let sizes = [4096, 16384, 65536];
            device["granularity"] = json!(sizes.choose(&mut self.rng));
        }
        if self.rng.random_ratio(1, 4) {
            device["readable"] = json!("all");
        }
        // Discards during an access may have been done at its end.
        self.look().await?;
        let name = self.targets[target].name;
        self.log.push(format!("setup of {name}: {device}"));
        let infos = self.storage()?.setup_of(name, json!([device])).await?;
        let access = self.check(target, mode, generation.as_deref(), &infos[0])?;
        self.writes().await?;
        self.check_dirty(&access, generation.as_deref(), &infos[0]).await?;
        self.writes().await?;
        self.end(access).await
    }

    /// Checks what the setup says; the point in time.
    fn check(
        &mut self,
        target: usize,
        mode: Option<&str>,
        generation: Option<&str>,
        info: &Value,
    ) -> Result<Access> {
        let size = self.content.len() as u64;
        let action = info["bitmap-action"].as_str().context("no action")?.to_owned();
        self.log.push(format!("  {action}, {} bytes dirty", info["dirty"]));
        let expected = self.targets[target].expected(mode, generation, size);
        let bitmap = &self.targets[target].bitmap;
        ensure!(expected.contains(&action.as_str()), "not {expected:?} of {bitmap:?}");
        *self.actions.entry(action.clone()).or_default() += 1;
        let id = info["generation"].as_str().map(str::to_owned);
        ensure!(id.is_some() != action.starts_with("not-used"), "generation {id:?}");
        if action == "not-used-removed" {
            self.targets[target].bitmap = Bitmap::Missing;
        }
        if let Some(id) = &id {
            let now = Arc::new(self.content.clone());
            self.targets[target].points.insert(id.clone(), now);
        }
        Ok(Access { target, action, generation: id })
    }

    /// What the bitmap does not mark must be as it was at the backup that the client has.
    async fn check_dirty(
        &mut self,
        access: &Access,
        generation: Option<&str>,
        info: &Value,
    ) -> Result<()> {
        let Some(id) = &access.generation else { return Ok(()) };
        let target = &self.targets[access.target];
        let point = Arc::clone(&target.points[id]);
        let storage = self.storage()?;
        let name = storage.export_snapshot(info).await?;
        let dirty = context::dirty_bitmap(info["bitmap-name"].as_str().context("no bitmap")?);
        let contexts = [dirty.as_str()];
        let how = Connection { contexts: &contexts, timeout: LIMIT };
        let snapshot = storage.client_with(&name, how).await?;
        let mut extents = snapshot.extents(&dirty, 0, snapshot.size_bytes());
        let mut marked = vec![false; point.len()];
        let mut sum = 0;
        while let Some(extent) = extents.next().await? {
            if extent.flags & context::DIRTY == 0 {
                continue;
            }
            sum += extent.len;
            let range = extent.offset as usize..extent.end() as usize;
            let found = snapshot.read(extent.offset, range.len()).await?;
            ensure!(found[..] == point[range.clone()], "wrong data at {}", extent.offset);
            marked[range].fill(true);
        }
        ensure!(info["dirty"] == sum, "{sum} dirty bytes, not {}", info["dirty"]);
        if access.action != "used" {
            ensure!(sum == point.len() as u64, "only {sum} bytes are dirty");
            return Ok(());
        }
        let base = match generation.or(target.last_success.as_deref()) {
            Some(base) => target.points.get(base).context("a generation nobody was told")?,
            None => bail!("a bitmap is used without any backup"),
        };
        let missed = (0..point.len()).find(|&at| !marked[at] && point[at] != base[at]);
        ensure!(missed.is_none(), "byte {missed:?} changed and is not dirty");
        Ok(())
    }

    /// One of the ends of an access. The client may have committed, or not, whatever happens then.
    async fn end(&mut self, access: Access) -> Result<()> {
        let kind = self.rng.random_range(0..20);
        let committed = kind <= 13 || self.rng.random();
        if let Some(id) = access.generation.clone().filter(|_| committed) {
            self.targets[access.target].committed.push(id);
        }
        match kind {
            14 => return self.restart(Some(access)).await,
            15 => return self.crash_during(access).await,
            _ => {}
        }
        let success = kind <= 13;
        self.log.push(format!("  committed: {committed}, teardown: {success}"));
        let target = self.targets[access.target].name;
        let result = self.storage()?.teardown_of(target, success).await?;
        ensure!(result.get("reason").is_none(), "teardown: {result}");
        if let Some(id) = &access.generation {
            let size = self.content.len() as u64;
            self.targets[access.target].settle(&access.action, id, success, size);
        }
        Ok(())
    }

    async fn crash_during(&mut self, access: Access) -> Result<()> {
        if access.generation.is_some() {
            self.targets[access.target].bitmap = Bitmap::Crashed;
        }
        self.crash().await
    }
}
