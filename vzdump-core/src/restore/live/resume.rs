// SPDX-License-Identifier: MIT OR Apache-2.0
//! Goes on with a live restore whose process ended: the archive is served again where QEMU looks for it; a
//! QEMU that ended, too, is started again. Or gives it up.

use std::collections::BTreeSet;
use std::time::Instant;

use provider_api::{CancellationToken, GuestKind, Provider, VmRestore};
use qmp_client::Session;
use qmp_client::commands::{QueryStatus, RunState};

use super::fill::open_in;
use super::{Filling, is_unfinished, live_dir, name_targets};
use crate::config::guest::VmConfig;
use crate::job::{JobContext, backup_lock_path};
use crate::journal::recover::recover_guest;
use crate::journal::{self, Entry, Journal, LiveDisk, ProcessStamp, Record};
use crate::layout::{Monitor, check_guest_id, check_socket_path, make_private_dir};
use crate::lock::FileLock;
use crate::restore::task::{Restore, Step, remove_dir, step, words};
use crate::restore::{RestoreOptions, RestoreReport, RestoredVolume, end_report};
use crate::task_log::{TaskSink, clean};
use crate::vm::backup::{ops, short_id};
use crate::vm::runner::{self, LIVE_LOCK};

/// Goes on with the live restore of the VM `id`, with the limit it had unless there is another one; 0 is none. Must be
/// awaited to its end; cancel it by the token.
pub async fn resume_restore(
    ctx: &JobContext,
    id: u32,
    limit_bytes_per_s: Option<u64>,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> RestoreReport {
    let started = Instant::now();
    let mut report = RestoreReport::new(id, "", ctx.layout.vm_config_path(id));
    sink.info(&format!("going on with the live restore of VM {id}"));
    let resumed = Box::pin(resume(ctx, id, limit_bytes_per_s, sink, cancel, &mut report)).await;
    end_report(report, resumed, started, sink)
}

/// Gives up the live restore of the VM `id`: its QEMU is ended, and it is removed with all that its guest wrote. A process
/// that dies meanwhile leaves the rest to the next task of the VM.
///
/// # Errors
/// There is none, somebody works on it, or not all of it could be removed.
pub async fn give_up_restore(ctx: &JobContext, id: u32, sink: &dyn TaskSink) -> Result<(), String> {
    check_guest_id(id).map_err(words)?;
    let lock_path = backup_lock_path(&ctx.layout, GuestKind::Qemu, id);
    let _lock = FileLock::try_acquire(&lock_path, &format!("VM {id}")).map_err(words)?;
    let record = find(ctx, id)?;
    let config = VmConfig::read(&ctx.layout.vm_config_path(id)).map_err(words)?;
    if config.is_some_and(|config| config.get("lock") != Some(LIVE_LOCK)) {
        return Err(format!(
            "the disks of VM {id} are complete already; `vzdump restore --resume {id}` ends the restore"
        ));
    }
    if !record.given_up {
        journal::append_to(&record.path, Entry::GivenUp).await.map_err(words)?;
    }
    step("live:given-up");
    let left = recover_guest(ctx, GuestKind::Qemu, id, sink).await.map_err(words)?;
    let problems: Vec<String> = left.into_iter().map(|left| left.reason).collect();
    if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
}

async fn resume(
    ctx: &JobContext,
    id: u32,
    limit_bytes_per_s: Option<u64>,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
    report: &mut RestoreReport,
) -> Step<()> {
    check_guest_id(id).map_err(words)?;
    let lock_path = backup_lock_path(&ctx.layout, GuestKind::Qemu, id);
    let _lock = FileLock::try_acquire(&lock_path, &format!("VM {id}")).map_err(words)?;
    let record = find(ctx, id)?;
    if record.given_up {
        return Err("it was given up; `vzdump doctor --fix` removes what is left of it".to_owned());
    }
    let archive = record.archive.clone().ok_or("the journal does not name the archive")?;
    report.archive.clone_from(&archive);
    let storage = record.begin.storage.clone();
    let provider = ctx.providers.provider(&storage).await?;
    let limit = record.live.as_ref().and_then(|live| live.limit_bytes_per_s);
    let options = RestoreOptions {
        source_storage: storage,
        live: true,
        limit_bytes_per_s: limit_bytes_per_s.or(limit).filter(|limit| *limit > 0),
        ..RestoreOptions::default()
    };
    let provider: &dyn Provider = provider.as_ref();
    let task = Restore { ctx, provider, archive: &archive, id, options: &options, sink, cancel };
    task.resume(record, report).await
}

/// The journal of the restore.
fn find(ctx: &JobContext, id: u32) -> Step<Record> {
    for path in journal::list(&ctx.layout, Some((GuestKind::Qemu, id))).map_err(words)? {
        let record = journal::read(&path).map_err(words)?;
        if is_unfinished(&record) {
            return Ok(record);
        }
    }
    Err(format!("there is no unfinished live restore of VM {id}"))
}

impl Restore<'_> {
    async fn resume(&self, record: Record, report: &mut RestoreReport) -> Step<()> {
        let mut filling = self.reopen(record, report).await?;
        report.volumes = volumes(&filling.live.disks);
        let process = runner::find_process(&self.ctx.layout, self.id).map_err(words)?;
        let session = match process {
            Some(_) => {
                let socket = self.ctx.layout.qmp_socket(self.id, Monitor::Backup);
                Some(ops::connect(&socket).await.map_err(words)?)
            }
            None => {
                self.settle_pivoted(&mut filling).await?;
                None
            }
        };
        let needed = self.needed(&filling, session.as_ref()).await?;
        let is_open = filling.live.disks.iter().any(|disk| !filling.filled.contains(&disk.key));
        if needed.is_empty() && (session.is_some() || !is_open) {
            let was_running = session.is_some();
            self.fill_and_complete(Box::new(NoArchive), &mut filling, session, report).await?;
            if !was_running {
                self.start(report).await;
            }
            return Ok(());
        }
        self.activate().await?;
        let source = self.begin_source().await?;
        self.resume_source(source, &mut filling, session, &needed, report).await
    }

    async fn resume_source(
        &self,
        mut source: Box<dyn VmRestore>,
        filling: &mut Filling,
        session: Option<Session>,
        needed: &BTreeSet<String>,
        report: &mut RestoreReport,
    ) -> Step<()> {
        let ready = self.serve_again(source.as_mut(), filling, session, needed, report).await;
        match ready {
            Ok(session) => {
                report.started = true;
                self.fill_and_complete(source, filling, Some(session), report).await
            }
            Err(error) => {
                let offered = std::mem::take(&mut filling.offered);
                self.withdraw_all(source, offered, report).await;
                Err(format!("{error}. {}", runner::live_advice(self.id)))
            }
        }
    }

    /// The archive is served, and QEMU runs.
    async fn serve_again(
        &self,
        source: &mut dyn VmRestore,
        filling: &mut Filling,
        session: Option<Session>,
        needed: &BTreeSet<String>,
        report: &mut RestoreReport,
    ) -> Step<Session> {
        let devices = source.devices().to_vec();
        for disk in filling.live.disks.clone().iter().filter(|disk| needed.contains(&disk.key)) {
            check_same(disk, &devices)?;
            if session.is_some() {
                let limit = self.ctx.limits.offer;
                self.offer_again(source, filling, disk, limit, report).await?;
            } else {
                self.offer_anew(source, filling, disk).await?;
            }
        }
        let Some(session) = session else { return self.restart(filling, report).await };
        let status = session.execute(QueryStatus).await.map_err(words)?.status;
        if status == RunState::Prelaunch {
            self.let_run(&session, report).await;
        }
        Ok(session)
    }

    /// The journal, and directories of this process.
    async fn reopen(&self, record: Record, report: &mut RestoreReport) -> Step<Filling> {
        let live = record.live.ok_or("the journal says nothing of a live restore")?;
        if live.dir != live_dir(&self.ctx.layout, self.id) {
            return Err(format!("the directory '{}' is not one of ours", live.dir.display()));
        }
        let journal = Journal::reopen(&record.path).await.map_err(words)?;
        let owner = ProcessStamp::current().map_err(|error| error.to_string())?;
        journal.append(Entry::Resume { owner }).await.map_err(words)?;
        let run = self.ctx.layout.run();
        let mut old_dirs = Vec::new();
        for dir in record.directories {
            if dir != live.dir
                && dir.starts_with(run)
                && dir != run
                && let Err(problem) = remove_dir(dir.clone()).await
            {
                // The guest waits; it is tried again at the end.
                self.warn(report, [problem]);
                old_dirs.push(dir);
            }
        }
        let private_dir = run.join(format!("r-{}", short_id()));
        check_socket_path(&private_dir.join("socket-of-a-provider")).map_err(words)?;
        let entry = Entry::Directory { path: private_dir.clone() };
        journal.append(entry).await.map_err(words)?;
        for dir in [&private_dir, &live.dir] {
            make_private_dir(dir).map_err(words)?;
        }
        Ok(Filling {
            journal,
            live,
            private_dir,
            old_dirs,
            exports: record.exports,
            pivoted: record.pivoted,
            filled: record.filled,
            offered: Vec::new(),
        })
    }

    /// Of a QEMU that ended only the journal says which side counts.
    async fn settle_pivoted(&self, filling: &mut Filling) -> Step<()> {
        for key in filling.pivoted.clone() {
            if filling.filled.insert(key.clone()) {
                filling.journal.append(Entry::Filled { key }).await.map_err(words)?;
            }
        }
        Ok(())
    }

    /// The disks whose archive must be served.
    async fn needed(&self, filling: &Filling, session: Option<&Session>) -> Step<BTreeSet<String>> {
        let open = filling.live.disks.iter().map(|disk| disk.key.clone());
        let open: BTreeSet<String> = open
            .filter(|key| !filling.filled.contains(key) && !filling.pivoted.contains(key))
            .collect();
        let Some(session) = session else { return Ok(open) };
        let reads = open_in(session).await?;
        Ok(open.into_iter().filter(|key| reads.contains(key)).collect())
    }

    async fn offer_anew(
        &self,
        source: &mut dyn VmRestore,
        filling: &mut Filling,
        disk: &LiveDisk,
    ) -> Step<()> {
        let LiveDisk { device, key, size_bytes, .. } = disk;
        filling.offered.push(device.clone());
        let (dir, limit) = (&filling.private_dir, self.ctx.limits.offer);
        let offer = self.offer_one(source, device, *size_bytes, dir, limit).await;
        let offer = offer.map_err(|error| format!("the disk '{device}': {error}"))?;
        let export = self.link(&filling.live.dir, key, offer).await?;
        if filling.exports.get(key) != Some(&export) {
            let entry = Entry::Export { key: key.clone(), export: export.clone() };
            filling.journal.append(entry).await.map_err(words)?;
            filling.exports.insert(key.clone(), export);
        }
        Ok(())
    }

    async fn restart(&self, filling: &Filling, report: &mut RestoreReport) -> Step<Session> {
        let mut config = runner::read_config(&self.ctx.layout, self.id).map_err(words)?;
        name_targets(&mut config, &filling.live)?;
        let nodes = self.nodes(&filling.live, &filling.exports, &filling.filled)?;
        let session = self.cancellable(self.start_live(&config, &nodes, report)).await?;
        self.let_run(&session, report).await;
        Ok(session)
    }
}

/// The archive must be the one that the restore began with.
fn check_same(disk: &LiveDisk, devices: &[provider_api::RestoreDevice]) -> Step<()> {
    let found = devices.iter().find(|device| device.device == disk.device);
    match found.map(|device| device.size_bytes) {
        Some(size_bytes) if size_bytes == disk.size_bytes => Ok(()),
        Some(size_bytes) => Err(format!(
            "the archive's disk '{}' has {size_bytes} bytes now, not {}",
            clean(&disk.device),
            disk.size_bytes
        )),
        None => Err(format!("the archive has no disk '{}' any more", clean(&disk.device))),
    }
}

fn volumes(disks: &[LiveDisk]) -> Vec<RestoredVolume> {
    let volume = |disk: &LiveDisk| RestoredVolume {
        device: disk.key.clone(),
        volume: disk.volume.clone(),
        size_bytes: disk.size_bytes,
    };
    disks.iter().map(volume).collect()
}

/// For disks that need no archive any more.
struct NoArchive;

impl VmRestore for NoArchive {
    fn devices(&self) -> &[provider_api::RestoreDevice] {
        &[]
    }

    fn volume_init<'a>(
        &'a mut self,
        _device: &'a str,
        _private_dir: &'a std::path::Path,
        _call: &'a provider_api::Call,
    ) -> provider_api::BoxFuture<'a, provider_api::Result<provider_api::VolumeSource>> {
        let words = "The disk needs no archive any more.";
        Box::pin(async move { Err(provider_api::Error::new(provider_api::Kind::Other, words)) })
    }

    fn volume_cleanup<'a>(
        &'a mut self,
        _device: &'a str,
        _call: &'a provider_api::Call,
    ) -> provider_api::BoxFuture<'a, provider_api::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn cleanup<'a>(
        self: Box<Self>,
        _call: &'a provider_api::Call,
    ) -> provider_api::BoxFuture<'a, provider_api::Result<()>>
    where
        Self: 'a,
    {
        Box::pin(async { Ok(()) })
    }
}
