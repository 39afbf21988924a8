// SPDX-License-Identifier: MIT OR Apache-2.0
//! A scripted provider. What it commits is a file, so that another process can ask for it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use provider_api::{
    Archive, BitmapRequest, BoxFuture, Call, Capabilities, CommitOutcome, Committed, Description,
    Error, GuestBackup, GuestConfig, GuestInfo, Job, JobInfo, Kind, Progress, Provider,
    RestoreDevice, Result, Status, Transferred, Uuid, VerifyOptions, VerifyReport, VmBackup,
    VmRestore, VolumeInfo, VolumeSource,
};
use tokio::sync::Notify;

/// The provider's one archive name.
pub const ARCHIVE: &str = "vzdump-qemu-100-2026_01_02-03_04_05";

/// An archive of another guest.
pub const OTHER_ARCHIVE: &str = "vzdump-qemu-999-2026_01_02-03_04_05";

/// How the provider commits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Commit {
    #[default]
    Works,
    /// Durable, and then an error.
    WorksButFails,
    /// Not durable, and an error.
    Fails,
    /// An error, and the outcome stays open.
    StaysPending,
    /// Durable, and an error; the outcome stays open for so many questions.
    PendingFor(usize),
    /// Never returns; not durable.
    Hangs,
    /// The process dies before it is durable.
    DiesBefore,
    /// The process dies when it is durable.
    DiesAfter,
}

/// Something that a provider claims and that is not so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// The commit was of somebody else's archive.
    OtherArchive,
    /// It looked at one byte, and was done.
    HardlyAny,
    /// The commit stores nothing, and says that it did.
    NoArchive,
    /// All numbers are as large as can be.
    HugeNumbers,
    /// Disks that nobody has, without end.
    OtherDisks,
    /// Lines without end, each long and with control characters.
    EndlessLines,
    /// `start_guest` never answers.
    NoStart,
    /// `plan_volumes` never answers.
    NoPlan,
}

#[derive(Default)]
pub struct Script {
    pub lie: Option<Lie>,
    /// The call that fails.
    pub fail: Option<&'static str>,
    pub commit: Commit,
    /// How long the storage takes to become ready.
    pub activation: std::time::Duration,
    /// `backup_vm` tells that it began, and waits to be told to go on.
    pub hold: Option<Arc<(Notify, Notify)>>,
    /// How long `backup_vm` takes.
    pub copy_for: std::time::Duration,
    /// The call that fails for this guest alone.
    pub fail_guest: Option<(u32, &'static str)>,
    /// The call that panics for this guest.
    pub panic_guest: Option<(u32, &'static str)>,
    pub requests: Vec<BitmapRequest>,
    pub archive_name: Option<String>,
    /// What the storage holds, and what its removal says of what others need.
    pub archives: Vec<Archive>,
    pub needed: Vec<String>,
    /// Archives whose removal says that they are not there; these are gone in truth.
    pub not_found: Vec<(String, bool)>,
    /// Looks at each change to the storage's archives.
    pub on_change: Option<Arc<dyn Fn() + Send + Sync>>,
    /// For restores: configuration, firewall rules and disks with their files.
    pub restore: Option<Stored>,
    /// A store that a restore mounts in its private directory, until its cleanup.
    pub store: Option<PathBuf>,
    /// What a verification finds; without it, one never ends, even if it is cancelled.
    pub verify: Option<VerifyReport>,
    /// It commits slowly.
    pub is_slow: bool,
}

/// An archive to restore.
#[derive(Clone, Default)]
pub struct Stored {
    pub config: String,
    pub firewall: Option<String>,
    pub devices: Vec<RestoreDevice>,
    pub sources: Vec<VolumeSource>,
}

pub struct Inner {
    pub script: Mutex<Script>,
    pub calls: Mutex<Vec<String>>,
    /// Guests whose backups were given up, and why.
    pub aborts: Mutex<Vec<(u32, String)>>,
    /// Guests that are being copied, now and at most.
    pub copies: Mutex<(usize, usize)>,
    dir: PathBuf,
}

impl Inner {
    fn call(&self, name: &'static str) -> Result<()> {
        self.calls.lock().unwrap().push(name.to_owned());
        if self.script.lock().unwrap().fail == Some(name) {
            return Err(Error::new(Kind::Other, format!("scripted failure of {name}")));
        }
        Ok(())
    }

    /// A call that changes an archive.
    fn change(&self, name: &'static str, what: &str) -> Result<()> {
        let on_change = self.script.lock().unwrap().on_change.clone();
        if let Some(look) = on_change {
            look();
        }
        self.call(name)?;
        self.calls.lock().unwrap().push(what.to_owned());
        Ok(())
    }

    fn guest_call(&self, guest: u32, name: &'static str) -> Result<()> {
        self.call(name)?;
        let panic_guest = self.script.lock().unwrap().panic_guest;
        assert!(panic_guest != Some((guest, name)), "scripted panic of {name} of {guest}");
        if self.script.lock().unwrap().fail_guest == Some((guest, name)) {
            let text = format!("scripted failure of {name} of {guest}");
            return Err(Error::new(Kind::Other, text));
        }
        Ok(())
    }

    fn lie(&self) -> Option<Lie> {
        self.script.lock().unwrap().lie
    }

    fn lies(&self, lie: Lie) -> bool {
        self.lie() == Some(lie)
    }

    fn commit_file(&self, id: Uuid) -> PathBuf {
        self.dir.join(id.to_string())
    }
}

#[derive(Clone)]
pub struct FakeProvider(pub Arc<Inner>);

impl FakeProvider {
    pub fn new(dir: &Path, script: Script) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        Self(Arc::new(Inner {
            script: Mutex::new(script),
            calls: Mutex::default(),
            aborts: Mutex::default(),
            copies: Mutex::default(),
            dir: dir.to_owned(),
        }))
    }

    pub fn calls(&self) -> Vec<String> {
        self.0.calls.lock().unwrap().clone()
    }

    pub fn count(&self, name: &str) -> usize {
        self.calls().iter().filter(|call| *call == name).count()
    }

    /// Archives that were committed.
    pub fn committed(&self) -> usize {
        std::fs::read_dir(&self.0.dir).unwrap().count()
    }
}

/// Progress as no disk makes it.
fn tell(lie: Lie, progress: &dyn Progress) {
    match lie {
        Lie::HugeNumbers => progress.report("scsi0", u64::MAX, u64::MAX, u64::MAX),
        Lie::OtherDisks => {
            for n in 0..100_000 {
                progress.report(&format!("disk\u{1b}[2J{n}"), n, 1, u64::MAX);
            }
        }
        Lie::EndlessLines => {
            let line = "\u{1b}[2J\n\u{7}".repeat(1000);
            (0..20_000).for_each(|_| progress.log(&line));
        }
        Lie::OtherArchive | Lie::NoStart | Lie::NoPlan | Lie::HardlyAny | Lie::NoArchive => {}
    }
}

fn ready<'a, T: Send + 'a>(value: T) -> BoxFuture<'a, T> {
    Box::pin(std::future::ready(value))
}

impl Provider for FakeProvider {
    fn describe(&self) -> Description {
        let api_version = provider_api::API_VERSION;
        let capabilities = Capabilities {
            vm_nbd: true,
            slow_commit: self.0.script.lock().unwrap().is_slow,
            notes: true,
            log: true,
            protect: true,
            remove: true,
            ..Capabilities::default()
        };
        Description { name: "fake".into(), api_version, capabilities }
    }

    fn activate<'a>(&'a self, _call: &'a Call) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let activation = self.0.script.lock().unwrap().activation;
            tokio::time::sleep(activation).await;
            self.0.call("activate")
        })
    }

    fn status<'a>(&'a self, _call: &'a Call) -> BoxFuture<'a, Result<Status>> {
        ready(Ok(Status { total_bytes: 1, used_bytes: 0 }))
    }

    fn list<'a>(&'a self, _call: &'a Call) -> BoxFuture<'a, Result<Vec<Archive>>> {
        let archives = self.0.script.lock().unwrap().archives.clone();
        ready(self.0.call("list").map(|()| archives))
    }

    fn set_notes<'a>(
        &'a self,
        archive: &'a str,
        notes: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        ready(self.0.change("set_notes", &format!("{archive}: {notes}")))
    }

    fn keep_log<'a>(
        &'a self,
        archive: &'a str,
        log: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        let lines = log.lines().count();
        assert!(lines > 3 && log.contains("creating archive"), "{log}");
        ready(self.0.change("keep_log", &format!("{archive}: log")))
    }

    fn set_protected<'a>(
        &'a self,
        archive: &'a str,
        protected: bool,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        ready(self.0.change("set_protected", &format!("{archive}: {protected}")))
    }

    fn remove<'a>(&'a self, archive: &'a str, _call: &'a Call) -> BoxFuture<'a, Result<()>> {
        let needed = self.0.script.lock().unwrap().needed.contains(&archive.to_owned());
        ready(self.0.change("remove", archive).and_then(|()| {
            if needed {
                return Err(Error::has_dependents(archive, vec![ARCHIVE.to_owned()]));
            }
            let mut script = self.0.script.lock().unwrap();
            let not_found = script.not_found.iter().find(|(name, _)| name == archive).cloned();
            if not_found.as_ref().is_none_or(|(_, is_gone)| *is_gone) {
                script.archives.retain(|a| a.name != archive);
            }
            match not_found {
                Some(_) => Err(Error::new(Kind::NotFound, "scripted: something is missing")),
                None => Ok(()),
            }
        }))
    }

    fn verify<'a>(
        &'a self,
        _archive: &'a str,
        _options: &'a VerifyOptions,
        progress: &'a dyn Progress,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<VerifyReport>> {
        Box::pin(async move {
            self.0.call("verify")?;
            progress.report("scsi0", 30, 30, 0);
            let report = self.0.script.lock().unwrap().verify.clone();
            match report {
                Some(report) => Ok(report),
                None => std::future::pending().await,
            }
        })
    }

    fn guest_config<'a>(
        &'a self,
        _archive: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<GuestConfig>> {
        if self.0.lies(Lie::NoArchive) {
            return ready(Err(Error::new(Kind::NotFound, "There is no such archive.")));
        }
        ready(self.0.call("guest_config").map(|()| {
            let script = self.0.script.lock().unwrap();
            let stored = script.restore.clone().unwrap_or_default();
            GuestConfig {
                config: stored.config.into_bytes(),
                firewall: stored.firewall.map(String::into_bytes),
            }
        }))
    }

    fn commit_outcome<'a>(
        &'a self,
        id: Uuid,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<CommitOutcome>> {
        ready(self.0.call("commit_outcome").map(|()| {
            let script = self.0.script.lock().unwrap();
            let asked = self.count("commit_outcome");
            let is_pending = match script.commit {
                Commit::StaysPending => true,
                Commit::PendingFor(questions) => asked <= questions,
                _ => false,
            };
            if is_pending {
                CommitOutcome::Pending
            } else if self.0.commit_file(id).exists() {
                CommitOutcome::Committed { archive: ARCHIVE.into() }
            } else {
                CommitOutcome::NotCommitted
            }
        }))
    }

    fn start_job<'a>(
        &'a self,
        _job: JobInfo,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn Job>>> {
        let job: Box<dyn Job> = Box::new(FakeJob(Arc::clone(&self.0)));
        ready(self.0.call("start_job").map(|()| job))
    }

    fn restore_vm_init<'a>(
        &'a self,
        _archive: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn VmRestore>>> {
        let stored = self.0.script.lock().unwrap().restore.clone().unwrap_or_default();
        let restore: Box<dyn VmRestore> =
            Box::new(FakeRestore { inner: Arc::clone(&self.0), stored, mounted: None });
        ready(self.0.call("restore_vm_init").map(|()| restore))
    }
}

struct FakeJob(Arc<Inner>);

impl Job for FakeJob {
    fn start_guest<'a>(
        &'a mut self,
        guest: GuestInfo,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn GuestBackup>>> {
        let name = self.0.script.lock().unwrap().archive_name.clone();
        let name = name.unwrap_or_else(|| ARCHIVE.to_owned());
        let backup: Box<dyn GuestBackup> =
            Box::new(FakeBackup(Arc::clone(&self.0), name, guest.id));
        if self.0.lies(Lie::NoStart) {
            return Box::pin(std::future::pending());
        }
        ready(self.0.guest_call(guest.id, "start_guest").map(|()| backup))
    }

    fn finish<'a>(self: Box<Self>, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        ready(self.0.call("finish"))
    }
}

struct FakeBackup(Arc<Inner>, String, u32);

/// Counts a guest that is being copied.
struct Copying<'a>(&'a Inner);

impl<'a> Copying<'a> {
    fn begin(inner: &'a Inner) -> Self {
        let mut copies = inner.copies.lock().unwrap();
        copies.0 += 1;
        copies.1 = copies.1.max(copies.0);
        Self(inner)
    }
}

impl Drop for Copying<'_> {
    fn drop(&mut self) {
        self.0.copies.lock().unwrap().0 -= 1;
    }
}

impl GuestBackup for FakeBackup {
    fn archive_name(&self) -> &str {
        &self.1
    }

    fn plan_volumes<'a>(
        &'a mut self,
        volumes: &'a [VolumeInfo],
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Vec<BitmapRequest>>> {
        let requests = self.0.script.lock().unwrap().requests.clone();
        if self.0.lies(Lie::NoPlan) {
            return Box::pin(std::future::pending());
        }
        ready(self.0.guest_call(self.2, "plan_volumes").map(|()| {
            if requests.is_empty() { vec![BitmapRequest::New; volumes.len()] } else { requests }
        }))
    }

    fn backup_vm<'a>(
        &'a mut self,
        backup: VmBackup,
        progress: &'a dyn Progress,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Transferred>> {
        Box::pin(async move {
            self.0.guest_call(self.2, "backup_vm")?;
            let _copying = Copying::begin(&self.0);
            let copy_for = self.0.script.lock().unwrap().copy_for;
            tokio::time::sleep(copy_for).await;
            let described: Vec<String> = backup
                .volumes
                .iter()
                .map(|v| format!("{} {:?} {:?}", v.device, v.bitmap_mode, v.generation))
                .collect();
            self.0.calls.lock().unwrap().push(format!("volumes {described:?}"));
            let hold = self.0.script.lock().unwrap().hold.clone();
            if let Some(hold) = hold {
                hold.0.notify_one();
                hold.1.notified().await;
            }
            for volume in &backup.volumes {
                progress.report(&volume.device, volume.size_bytes, volume.size_bytes, 0);
            }
            progress.log("all read");
            if let Some(lie) = self.0.lie() {
                tell(lie, progress);
            }
            if self.0.lies(Lie::HugeNumbers) {
                let huge = u64::MAX;
                return Ok(Transferred {
                    total_bytes: huge,
                    read_bytes: huge,
                    zero_bytes: huge,
                    written_bytes: huge,
                });
            }
            if self.0.lies(Lie::HardlyAny) {
                return Ok(Transferred { total_bytes: 1, ..Transferred::default() });
            }
            let looked_at = |volume: &provider_api::Volume| match volume.bitmap_mode {
                provider_api::BitmapMode::Reuse => volume.dirty_bytes.unwrap(),
                _ => volume.size_bytes,
            };
            let total_bytes = backup.volumes.iter().map(looked_at).sum();
            Ok(Transferred { total_bytes, read_bytes: total_bytes, ..Transferred::default() })
        })
    }

    fn commit<'a>(self: Box<Self>, id: Uuid, _call: &'a Call) -> BoxFuture<'a, Result<Committed>>
    where
        Self: 'a,
    {
        Box::pin(async move {
            self.0.guest_call(self.2, "commit")?;
            let how = self.0.script.lock().unwrap().commit;
            let write = || std::fs::write(self.0.commit_file(id), ARCHIVE).unwrap();
            let failed = Error::new(Kind::Io, "scripted failure of commit");
            match how {
                Commit::Works => write(),
                Commit::WorksButFails | Commit::PendingFor(_) => {
                    write();
                    return Err(failed);
                }
                Commit::Fails | Commit::StaysPending => return Err(failed),
                Commit::Hangs => std::future::pending().await,
                Commit::DiesBefore => std::process::abort(),
                Commit::DiesAfter => {
                    write();
                    std::process::abort();
                }
            }
            if self.0.lies(Lie::OtherArchive) {
                return Ok(Committed { archive: OTHER_ARCHIVE.into(), size_bytes: u64::MAX });
            }
            Ok(Committed { archive: ARCHIVE.into(), size_bytes: 42 })
        })
    }

    fn abort<'a>(self: Box<Self>, why: &'a str, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        self.0.aborts.lock().unwrap().push((self.2, why.to_owned()));
        ready(self.0.call("abort"))
    }
}

struct FakeRestore {
    inner: Arc<Inner>,
    stored: Stored,
    mounted: Option<PathBuf>,
}

impl VmRestore for FakeRestore {
    fn devices(&self) -> &[RestoreDevice] {
        &self.stored.devices
    }

    fn volume_init<'a>(
        &'a mut self,
        device: &'a str,
        private_dir: &'a Path,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<VolumeSource>> {
        let store = self.inner.script.lock().unwrap().store.clone();
        if let (Some(store), None) = (store, &self.mounted) {
            let place = private_dir.join("store");
            std::fs::create_dir(&place).unwrap();
            run("mount", &[Path::new("--bind"), &store, &place]);
            self.mounted = Some(place);
        }
        let at = self.stored.devices.iter().position(|d| d.device == device).unwrap();
        ready(self.inner.call("volume_init").map(|()| self.stored.sources[at].clone()))
    }

    fn volume_cleanup<'a>(
        &'a mut self,
        _device: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        ready(self.inner.call("volume_cleanup"))
    }

    fn cleanup<'a>(self: Box<Self>, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        let cleaned = self.inner.call("cleanup");
        if let (Ok(()), Some(place)) = (&cleaned, &self.mounted) {
            run("umount", &[place]);
        }
        ready(cleaned)
    }
}

pub fn run(program: &str, arguments: &[&Path]) {
    let status = std::process::Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}
