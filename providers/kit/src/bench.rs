// SPDX-License-Identifier: MIT OR Apache-2.0
//! Does with a provider what the host does, and judges every answer.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use provider_api::{
    Archive, BitmapMode, BitmapRequest, Call, CancellationToken, CommitOutcome, Committed, Error,
    GuestBackup, GuestInfo, GuestKind, Job, JobInfo, Progress, Provider, Readable, Transferred,
    Uuid, Volume, check_archive_name,
};

use crate::fault::{Checked, Fault, clean, ensure, words};
use crate::machine::{AnyMachine, Offer, SimMachine, Truth, Vm, fresh_content, private_dir};
use crate::random::Random;
use crate::snapshot::Seen;
use crate::{Factory, KitOptions};

/// Longest generation that a host accepts.
const GENERATION_BYTES_MAX: usize = 255;
/// How long a commit's outcome may be pending.
const PENDING_LIMIT: Duration = Duration::from_secs(30);
/// Between two questions for it.
const PENDING_STEP: Duration = Duration::from_millis(50);

/// What all checks share.
pub(crate) struct Bench {
    pub(crate) factory: Factory,
    pub(crate) options: KitOptions,
    pub(crate) offer: Offer,
    next_guest: AtomicU32,
    taken: BTreeSet<u32>,
    time_s: AtomicI64,
    next_dir: AtomicU64,
    dir: PathBuf,
    pub(crate) cancel: CancellationToken,
}

impl Bench {
    pub(crate) fn new(
        factory: Factory,
        options: KitOptions,
        offer: Offer,
        taken: BTreeSet<u32>,
        dir: PathBuf,
        cancel: CancellationToken,
    ) -> Self {
        let now_s = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(0));
        Self {
            factory,
            next_guest: AtomicU32::new(options.first_guest_id),
            options,
            offer,
            taken,
            // In the past, because each backup needs a second of its own.
            time_s: AtomicI64::new(now_s - 86_400),
            next_dir: AtomicU64::new(0),
            dir,
            cancel,
        }
    }

    /// A guest that neither the host nor the storage knows.
    pub(crate) fn guest_id(&self) -> u32 {
        loop {
            let id = self.next_guest.fetch_add(1, Ordering::Relaxed);
            if !self.taken.contains(&id) {
                return id;
            }
        }
    }

    pub(crate) fn time_s(&self) -> i64 {
        self.time_s.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn private_dir(&self) -> Checked<PathBuf> {
        let number = self.next_dir.fetch_add(1, Ordering::Relaxed);
        private_dir(&self.dir, &number.to_string())
    }
}

/// One check under way.
pub(crate) struct Ctx {
    pub(crate) bench: Arc<Bench>,
    remarks: Mutex<BTreeSet<String>>,
    /// The archives that were made, in their order.
    made: Mutex<Vec<String>>,
    /// The seed of the next machine.
    seed: AtomicU64,
    /// Whether disks are offered as files, whatever the host would choose.
    as_files: AtomicBool,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The backup of a guest that was begun.
pub(crate) struct Begun {
    pub(crate) job: Box<dyn Job>,
    pub(crate) backup: Box<dyn GuestBackup>,
    pub(crate) archive: String,
    pub(crate) time_s: i64,
}

/// What a copy was about, and how it ended.
pub(crate) struct Copied {
    pub(crate) result: Result<Transferred, Error>,
    pub(crate) truth: Truth,
    pub(crate) volumes: Vec<Volume>,
    /// Bytes that may have been looked at, as few and as many as is right.
    looked_at: (u64, u64),
    pub(crate) seen: Option<Seen>,
}

/// An archive.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    pub(crate) archive: String,
    pub(crate) commit_id: Uuid,
    pub(crate) truth: Truth,
    pub(crate) requests: Vec<BitmapRequest>,
    pub(crate) modes: Vec<BitmapMode>,
    pub(crate) generations: Vec<Option<String>>,
    pub(crate) transferred: Transferred,
}

impl Made {
    /// The archive of what was copied.
    pub(crate) fn new(
        archive: String,
        commit_id: Uuid,
        requests: Vec<BitmapRequest>,
        (truth, volumes): (Truth, &[Volume]),
        transferred: Transferred,
    ) -> Self {
        Self {
            archive,
            commit_id,
            truth,
            requests,
            modes: volumes.iter().map(|volume| volume.bitmap_mode).collect(),
            generations: volumes.iter().map(|volume| volume.generation.clone()).collect(),
            transferred,
        }
    }

    pub(crate) fn is_incremental(&self) -> bool {
        self.modes.iter().all(|mode| *mode == BitmapMode::Reuse)
    }
}

impl Ctx {
    pub(crate) fn new(bench: Arc<Bench>, seed: u64) -> Self {
        let (remarks, made) = (Mutex::default(), Mutex::default());
        Self { bench, remarks, made, seed: AtomicU64::new(seed), as_files: AtomicBool::new(false) }
    }

    /// From now on disks are offered as files.
    pub(crate) fn offer_files(&self) {
        self.as_files.store(true, Ordering::Relaxed);
        if self.bench.options.storage_daemon.is_none() {
            self.remark(
                "Without qemu-storage-daemon and FUSE, wrong reads of files are not noticed.",
            );
        }
    }

    /// Says something that is no fault.
    pub(crate) fn remark(&self, remark: impl Into<String>) {
        held(&self.remarks).insert(remark.into());
    }

    pub(crate) fn remarks(&self) -> Vec<String> {
        held(&self.remarks).iter().cloned().collect()
    }

    /// Archives that were made, the last one first.
    pub(crate) fn made(&self) -> Vec<String> {
        held(&self.made).iter().rev().cloned().collect()
    }

    /// Keeps in mind that an archive has to be removed after the check.
    pub(crate) fn note_made(&self, archive: &str) {
        held(&self.made).push(archive.to_owned());
    }

    pub(crate) fn call(&self) -> Call {
        let deadline = Instant::now().checked_add(self.bench.options.call_limit);
        Call { cancel: self.bench.cancel.child_token(), deadline }
    }

    /// Waits for a call of the provider, but not for ever.
    pub(crate) async fn answer<T>(
        &self,
        what: &str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Checked<Result<T, Error>> {
        let limit = self.bench.options.call_limit + Duration::from_secs(2);
        match tokio::time::timeout(limit, work).await {
            Ok(result) => Ok(result),
            Err(_) => Err(Fault::new(format!("{what} does not return, also after its deadline."))
                .advise("Every call must end when its deadline passes or its token is cancelled.")),
        }
    }

    /// Waits for a call that must succeed.
    pub(crate) async fn expect<T>(
        &self,
        what: &str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Checked<T> {
        let result = self.answer(what, work).await?;
        result.map_err(|error| Fault::new(format!("{what} fails: {}", words(&error))))
    }

    /// A new provider object, made ready.
    pub(crate) async fn provider(&self) -> Checked<Arc<dyn Provider>> {
        let provider = self.bare_provider().await?;
        self.expect("activate", provider.activate(&self.call())).await?;
        Ok(provider)
    }

    pub(crate) async fn bare_provider(&self) -> Checked<Arc<dyn Provider>> {
        let made = tokio::time::timeout(self.bench.options.call_limit, (self.bench.factory)());
        match made.await {
            Ok(made) => made
                .map_err(|why| Fault::new(format!("The provider cannot be made: {}", clean(&why)))),
            Err(_) => Err(Fault::new("The provider cannot be made: that does not end.")),
        }
    }

    /// A virtual machine with disks of these sizes.
    pub(crate) async fn vm(&self, sizes_bytes: &[u64]) -> Checked<Vm> {
        let mut random = Random::new(self.seed.fetch_add(1, Ordering::Relaxed));
        let disks: Truth = sizes_bytes
            .iter()
            .enumerate()
            .map(|(n, size)| (format!("scsi{n}"), Arc::new(fresh_content(&mut random, *size))))
            .collect();
        let machine = match &self.bench.options.machines {
            Some(maker) => AnyMachine::Other(maker.make(&disks).await.map_err(Fault::new)?),
            None => {
                let dir = self.bench.private_dir()?;
                let mut offer = self.bench.offer.clone();
                if self.as_files.load(Ordering::Relaxed) {
                    let storage_daemon = self.bench.options.storage_daemon.clone();
                    offer = Offer::File { storage_daemon };
                }
                AnyMachine::Sim(Box::new(SimMachine::new(&disks, dir, offer)))
            }
        };
        let id = self.bench.guest_id();
        Ok(Vm {
            id,
            name: Some(format!("kit-{id}")),
            config: format!("name: kit-{id}\nmemory: 512\nscsi0: kit:scsi0\n").into_bytes(),
            firewall: Some(b"[OPTIONS]\nenable: 1\n".to_vec()),
            truth: disks,
            machine,
            random,
            is_busy: true,
        })
    }

    /// A machine with one disk of the usual size and one that fits no unit.
    pub(crate) async fn usual_vm(&self) -> Checked<Vm> {
        let size = self.bench.options.size_bytes;
        self.vm(&[size, size / 4 + 512 * 3]).await
    }

    /// Begins a job and the backup of a guest.
    pub(crate) async fn begin(&self, provider: &dyn Provider, vm: &Vm) -> Checked<Begun> {
        let start_time_s = self.bench.time_s();
        let call = self.call();
        let job = provider.start_job(JobInfo { start_time_s }, &call);
        let mut job = self.expect("start_job", job).await?;
        let (backup, archive) = self.start_guest(job.as_mut(), vm, start_time_s).await?;
        Ok(Begun { job, backup, archive, time_s: start_time_s })
    }

    pub(crate) async fn start_guest(
        &self,
        job: &mut dyn Job,
        vm: &Vm,
        start_time_s: i64,
    ) -> Checked<(Box<dyn GuestBackup>, String)> {
        let info =
            GuestInfo { kind: GuestKind::Qemu, id: vm.id, name: vm.name.clone(), start_time_s };
        let call = self.call();
        let backup = self.expect("start_guest", job.start_guest(info, &call)).await?;
        let archive = backup.archive_name().to_owned();
        check_archive_name(&archive).map_err(Fault::new)?;
        Ok((backup, archive))
    }

    /// Lets the provider say which bitmaps it wants.
    pub(crate) async fn plan(
        &self,
        backup: &mut dyn GuestBackup,
        vm: &mut Vm,
    ) -> Checked<Vec<BitmapRequest>> {
        let disks = vm.machine.as_dyn().disks();
        let call = self.call();
        let requests = self.expect("plan_volumes", backup.plan_volumes(&disks, &call)).await?;
        ensure(requests.len() == disks.len(), || {
            format!("plan_volumes answers {} requests for {} disks.", requests.len(), disks.len())
        })?;
        for request in &requests {
            if let BitmapRequest::Use { generation, .. } = request {
                let bytes = generation.len();
                ensure((1..=GENERATION_BYTES_MAX).contains(&bytes), || {
                    format!(
                        "plan_volumes asks for a generation of {bytes} bytes; 1 to 255 are allowed."
                    )
                })?;
            }
        }
        Ok(requests)
    }

    /// Freezes the disks and lets the provider copy them, while the guest changes them further.
    pub(crate) async fn copy(
        &self,
        backup: &mut dyn GuestBackup,
        vm: &mut Vm,
        requests: &[BitmapRequest],
    ) -> Checked<Copied> {
        let volumes = vm.machine.as_dyn().freeze(requests).await;
        let volumes = volumes.map_err(|why| Fault::new(format!("The kit's disks fail: {why}")))?;
        let truth = vm.truth.clone();
        if vm.is_busy {
            vm.scribble(2).await?;
        }
        let meter = Meter::new(&volumes, requests);
        let call = self.call();
        let offered = vm.backup(volumes.clone());
        let result = self.answer("backup_vm", backup.backup_vm(offered, &meter, &call)).await?;
        let seen = match &vm.machine {
            AnyMachine::Sim(machine) => Some(machine.seen()),
            AnyMachine::Other(_) => None,
        };
        if result.is_ok() {
            meter.judge()?;
        }
        let looked_at = meter.sums();
        Ok(Copied { result, truth, volumes, looked_at, seen })
    }

    /// Ends the backup by a commit, and the job.
    pub(crate) async fn commit(&self, begun: Begun, id: Uuid) -> Checked<Result<Committed, Error>> {
        self.note_made(&begun.archive);
        let call = self.call();
        let result = self.answer("commit", begun.backup.commit(id, &call)).await?;
        let call = self.call();
        self.expect("finish", begun.job.finish(&call)).await?;
        Ok(result)
    }

    /// Ends the backup without an archive, and the job.
    pub(crate) async fn abort(&self, begun: Begun) -> Checked {
        let call = self.call();
        self.expect("abort", begun.backup.abort("the kit gives it up", &call)).await?;
        let call = self.call();
        self.expect("finish", begun.job.finish(&call)).await
    }

    /// A whole backup that must succeed, with all that can be seen of it.
    pub(crate) async fn back_up(&self, provider: &dyn Provider, vm: &mut Vm) -> Checked<Made> {
        let made = self.try_back_up(provider, vm).await;
        let thawed = vm.machine.as_dyn().thaw(made.is_ok()).await;
        let made = made?;
        thawed.map_err(|why| Fault::new(format!("The kit's disks fail: {why}")))?;
        Ok(made)
    }

    async fn try_back_up(&self, provider: &dyn Provider, vm: &mut Vm) -> Checked<Made> {
        let mut begun = self.begin(provider, vm).await?;
        let requests = self.plan(begun.backup.as_mut(), vm).await?;
        let copied = self.copy(begun.backup.as_mut(), vm, &requests).await?;
        let transferred = match &copied.result {
            Ok(transferred) => *transferred,
            Err(error) => {
                let fault = Fault::new(format!("backup_vm fails: {}", words(error)));
                // Its own failure would hide the first one.
                let _ = self.abort(begun).await;
                return Err(fault);
            }
        };
        self.judge_copy(&copied, &transferred)?;
        let before = self.list(provider).await?;
        ensure(!before.contains_key(&begun.archive), || {
            format!("Archive {} is listed before its commit.", begun.archive)
        })?;
        let (archive, time_s, commit_id) = (begun.archive.clone(), begun.time_s, Uuid::new_v4());
        let committed = self.commit(begun, commit_id).await?;
        let committed =
            committed.map_err(|error| Fault::new(format!("commit fails: {}", words(&error))))?;
        let made =
            Made::new(archive, commit_id, requests, (copied.truth, &copied.volumes), transferred);
        self.judge_archive(provider, vm, &made, &committed, time_s).await?;
        Ok(made)
    }

    /// Judges what a provider did with the disks, and what it says about it.
    pub(crate) fn judge_copy(&self, copied: &Copied, moved: &Transferred) -> Checked {
        let (least, most) = copied.looked_at;
        ensure(moved.total_bytes == least || moved.total_bytes == most, || {
            format!(
                "backup_vm says that it looked at {} bytes; the disks had {least} to look at.",
                moved.total_bytes
            )
        })?;
        let Some(seen) = &copied.seen else { return Ok(()) };
        if let Some((device, offset)) = &seen.released_unread_at {
            return Err(Fault::new(format!(
                "It released {} bytes of data that it had not read, the first at {offset} of {device}.",
                seen.released_unread_bytes
            ))
            .advise("Trim an area only after its data is stored."));
        }
        if seen.reads_of_released > 0 {
            return Err(Fault::new(format!(
                "It read {} times what it had released.",
                seen.reads_of_released
            ))
            .advise("Trim an area only after its data is stored: it cannot be read again."));
        }
        if seen.reads_of_clean > 0 {
            return Err(Fault::new(format!(
                "It read {} times where the bitmap marks nothing.",
                seen.reads_of_clean
            ))
            .advise("Read only what the bitmap marks, or ask for `readable` all."));
        }
        if seen.read_again > 0 {
            self.remark("It reads areas more than once; each costs the host the same again.");
        }
        if seen.released_bytes == 0 && seen.read_bytes > 0 {
            self.remark(
                "It releases nothing: the old data of a busy guest stays until the backup's end.",
            );
        }
        Ok(())
    }

    async fn judge_archive(
        &self,
        provider: &dyn Provider,
        vm: &Vm,
        made: &Made,
        committed: &Committed,
        time_s: i64,
    ) -> Checked {
        let name = &made.archive;
        ensure(committed.archive == *name, || {
            format!("commit names the archive {}, not {name}.", clean(&committed.archive))
        })?;
        let list = self.list(provider).await?;
        let Some(entry) = list.get(name) else {
            return Err(Fault::new(format!("Archive {name} is not listed after its commit.")));
        };
        ensure(entry.subtype == GuestKind::Qemu && entry.guest_id == vm.id, || {
            format!("Archive {name} is listed for guest {} {}.", entry.subtype, entry.guest_id)
        })?;
        ensure(entry.time_s == time_s, || {
            format!("Archive {name} is listed with the time {}, not {time_s}.", entry.time_s)
        })?;
        ensure(entry.commit_id.is_none_or(|id| id == made.commit_id), || {
            format!("Archive {name} is listed with another commit id.")
        })?;
        if let Some(base) = &entry.base {
            ensure(list.contains_key(base), || {
                format!("Archive {name} builds upon {}, which is not listed.", clean(base))
            })?;
        }
        let outcome = self.outcome(provider, made.commit_id).await?;
        ensure(outcome == CommitOutcome::Committed { archive: name.clone() }, || {
            format!("commit_outcome of archive {name} is {outcome:?} after its commit.")
        })
    }

    /// The outcome of a commit, once it is not pending.
    pub(crate) async fn outcome(
        &self,
        provider: &dyn Provider,
        id: Uuid,
    ) -> Checked<CommitOutcome> {
        let until = Instant::now() + PENDING_LIMIT;
        loop {
            let call = self.call();
            let outcome = self.expect("commit_outcome", provider.commit_outcome(id, &call)).await?;
            if outcome != CommitOutcome::Pending {
                return Ok(outcome);
            }
            ensure(Instant::now() < until, || {
                format!("commit_outcome says pending for {} s.", PENDING_LIMIT.as_secs())
            })?;
            tokio::time::sleep(PENDING_STEP).await;
        }
    }

    /// All archives by their names, which were checked.
    pub(crate) async fn list(&self, provider: &dyn Provider) -> Checked<BTreeMap<String, Archive>> {
        let call = self.call();
        let archives = self.expect("list", provider.list(&call)).await?;
        let mut by_name = BTreeMap::new();
        for archive in archives {
            check_archive_name(&archive.name).map_err(|why| Fault::new(format!("list: {why}")))?;
            let name = archive.name.clone();
            ensure(by_name.insert(name.clone(), archive).is_none(), || {
                format!("Archive {name} is listed twice.")
            })?;
        }
        Ok(by_name)
    }
}

/// Bytes of a volume that a backup has to look at, and those that it may: all of the disk, if it asked for
/// that.
fn looked_at_bytes(volume: &Volume, request: Option<&BitmapRequest>) -> (u64, u64) {
    let has_all = matches!(request, Some(BitmapRequest::Use { readable: Readable::All, .. }));
    match (volume.bitmap_mode, volume.dirty_bytes) {
        (BitmapMode::Reuse, Some(dirty)) if has_all => (dirty, volume.size_bytes),
        (BitmapMode::Reuse, Some(dirty)) => (dirty, dirty),
        _ => (volume.size_bytes, volume.size_bytes),
    }
}

/// Checks what is reported.
struct Meter {
    /// Bytes to be looked at, by device: as few and as many as is right.
    expected: BTreeMap<String, (u64, u64)>,
    fault: Mutex<Option<String>>,
    reports: AtomicU64,
}

impl Meter {
    fn new(volumes: &[Volume], requests: &[BitmapRequest]) -> Self {
        let looked_at =
            |(n, v): (usize, &Volume)| (v.device.clone(), looked_at_bytes(v, requests.get(n)));
        let expected = volumes.iter().enumerate().map(looked_at).collect();
        Self { expected, fault: Mutex::default(), reports: AtomicU64::new(0) }
    }

    fn sums(&self) -> (u64, u64) {
        self.expected.values().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    fn judge(&self) -> Checked {
        if let Some(fault) = held(&self.fault).take() {
            return Err(Fault::new(fault));
        }
        let has_work = self.expected.values().any(|(least, _)| *least > 0);
        let is_silent = self.reports.load(Ordering::Relaxed) == 0;
        if has_work && is_silent {
            return Err(Fault::new("It reports no progress.")
                .advise("The host gives up a backup that reports nothing for long."));
        }
        Ok(())
    }
}

impl Progress for Meter {
    fn report(&self, device: &str, done_bytes: u64, total_bytes: u64, zero_bytes: u64) {
        self.reports.fetch_add(1, Ordering::Relaxed);
        let expected = self.expected.get(device).map(|(_, most)| most);
        let is_right = expected.is_some_and(|bytes| total_bytes <= *bytes)
            && done_bytes <= total_bytes
            && zero_bytes <= done_bytes;
        if !is_right {
            held(&self.fault).get_or_insert_with(|| {
                format!(
                    "It reports {done_bytes} of {total_bytes} bytes, {zero_bytes} of them zero, for disk \
                     {}, which has {} to look at.",
                    clean(device),
                    expected.map_or_else(|| "nothing".to_owned(), |n| format!("{n} bytes"))
                )
            });
        }
    }

    fn log(&self, _line: &str) {}
}
