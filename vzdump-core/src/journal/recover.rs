// SPDX-License-Identifier: MIT OR Apache-2.0
//! Cleans up after tasks that died, from their journals.
//!
//! For a backup, in this order: thaw, have a TPM go on, and let a guest run again that was paused or shut down; end the
//! storage daemons that offered its disks as files, and remove their mounts; ask what became of a commit that was begun (nothing is torn
//! down while that is open and QEMU has the access, whose lease ends that soon); tear the access down with its exports, as a success only if the
//! commit is durable; stop the NBD server, if it is ours; detach and free the fleecing images; remove directories; leave
//! QEMU as it would be without the backup, which may be to end it; remove the journal.
//! What belongs to a QEMU that has ended needs no QMP. Every step may be repeated, so what the recovery itself
//! writes down only saves work: that it cannot, on a full disk, keeps it from nothing. A guest that cannot be let
//! run keeps the journal, but not the rest from being undone.
//!
//! For a new guest, restored or not: a configuration that names one of the new volumes makes it
//! complete, because it is written in one step and last; else the volumes are freed. For one that is
//! replaced: `restore/replace.rs`. A guest that has run while its disks were filled is not touched: only
//! going on with its restore makes it whole (`restore/live.rs`).
//!
//! The caller holds the guest's lock. Whoever writes a journal holds it from before the journal is
//! made until nobody writes to it any more, so no journal found belongs to a task under way, even if
//! the process that ran the task is still there.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};

use provider_api::{CommitOutcome, GuestKind, Uuid, check_archive_name};
use qmp_client::{Session, backup};

use super::volumes::free_within;
use super::{Entry, FileExport, Held, JournalError, KnownOutcome, ProcessStamp, Record, TaskKind};
use crate::blocking;
use crate::config::guest::VmConfig;
use crate::guest::GuestError;
use crate::job::commit::ask_outcome;
use crate::job::{JobContext, backup_lock_path, chain, guest_words};
use crate::lock::{FileLock, LockError};
use crate::restore;
use crate::storage::{StorageError, VolumeId};
use crate::task_log::TaskSink;
use crate::temp_tree;
use crate::vm::backup::power::{self, Change, Vm};
use crate::vm::backup::{file, ops};
use crate::vm::freeze_guard::thaw_directly;
use crate::vm::process::VmProcess;
use crate::vm::tpm_guard;

/// A journal that could not be cleared.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Leftover {
    /// The journal.
    pub journal: PathBuf,
    /// Why, and what to do.
    pub reason: String,
}

/// What a recovery of all guests did.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Recovered {
    /// Journals that were cleared.
    pub cleared: Vec<PathBuf>,
    /// Journals of guests that are being worked on.
    pub busy: Vec<PathBuf>,
    /// Journals that could not be cleared.
    pub left: Vec<Leftover>,
}

/// What becomes of a guest that its backup shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Afterwards {
    /// It runs again.
    Runs,
    /// It stays down: it is to be replaced or removed.
    StaysDown,
}

/// Cleans up after earlier tasks of one guest, whose lock the caller holds. Returns what is left.
///
/// # Errors
/// The journals cannot be listed.
pub async fn recover_guest(
    ctx: &JobContext,
    kind: GuestKind,
    id: u32,
    sink: &dyn TaskSink,
) -> Result<Vec<Leftover>, JournalError> {
    recover_each(ctx, (kind, id), Afterwards::Runs, sink).await
}

/// The same for a guest that is to be replaced or removed: one that its backup shut down is not started, and may not
/// be startable.
///
/// # Errors
/// As [`recover_guest`].
pub async fn recover_guest_down(
    ctx: &JobContext,
    kind: GuestKind,
    id: u32,
    sink: &dyn TaskSink,
) -> Result<Vec<Leftover>, JournalError> {
    recover_each(ctx, (kind, id), Afterwards::StaysDown, sink).await
}

async fn recover_each(
    ctx: &JobContext,
    guest: (GuestKind, u32),
    afterwards: Afterwards,
    sink: &dyn TaskSink,
) -> Result<Vec<Leftover>, JournalError> {
    let mut left = Vec::new();
    for journal in super::list(&ctx.layout, Some(guest))? {
        if let Err(reason) = recover_journal(ctx, &journal, afterwards, sink).await {
            left.push(Leftover { journal, reason });
        }
    }
    Ok(left)
}

/// Cleans up after all dead tasks of all guests (`doctor --fix`).
///
/// # Errors
/// The journals cannot be listed.
pub async fn recover_all(ctx: &JobContext, sink: &dyn TaskSink) -> Result<Recovered, JournalError> {
    let mut recovered = Recovered::default();
    for journal in super::list(&ctx.layout, None)? {
        let lock = match read_if_there(&journal) {
            Ok(None) => continue,
            Ok(Some(Record { begin, .. })) => {
                let path = backup_lock_path(&ctx.layout, begin.guest_kind, begin.guest_id);
                FileLock::try_acquire(&path, &format!("guest {}", begin.guest_id))
            }
            Err(error) => {
                recovered.left.push(Leftover { journal, reason: chain(&error) });
                continue;
            }
        };
        match lock {
            Ok(_held) => match recover_journal(ctx, &journal, Afterwards::Runs, sink).await {
                Ok(()) => recovered.cleared.push(journal),
                Err(reason) => recovered.left.push(Leftover { journal, reason }),
            },
            Err(LockError::Busy { .. }) => recovered.busy.push(journal),
            Err(error) => recovered.left.push(Leftover { journal, reason: chain(&error) }),
        }
    }
    Ok(recovered)
}

/// Reads one journal of a list; none if its task has ended, or was cleaned up after, meanwhile.
///
/// # Errors
/// As [`super::read`].
pub fn read_if_there(path: &Path) -> Result<Option<Record>, JournalError> {
    match super::read(path) {
        Err(JournalError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        other => other.map(Some),
    }
}

async fn recover_journal(
    ctx: &JobContext,
    journal: &Path,
    afterwards: Afterwards,
    sink: &dyn TaskSink,
) -> Result<(), String> {
    let record = read_if_there(journal).map_err(|error| chain(&error))?;
    let Some(record) = record else { return Ok(()) };
    restore::refuse_recovery(&record)?;
    let begin = &record.begin;
    let is_ours = begin.owner.process.pid.unsigned_abs() == std::process::id();
    if begin.owner.is_alive() && !is_ours {
        let pid = begin.owner.process.pid;
        sink.warn(&format!(
            "the process {pid} still runs, but no longer works on guest {}",
            begin.guest_id
        ));
    }
    let what = match begin.task {
        TaskKind::Backup => "backup",
        TaskKind::Restore => "restore",
        TaskKind::Create => "creation",
    };
    sink.warn(&format!("cleaning up after an interrupted {what} of guest {}", begin.guest_id));
    match begin.task {
        TaskKind::Backup => {
            let is_committed = if begin.guest_kind == GuestKind::Lxc {
                recover_container_backup(ctx, &record, afterwards, sink).await?
            } else {
                recover_backup(ctx, &record, afterwards, sink).await?
            };
            if is_committed {
                describe(ctx, &record, sink).await;
            }
        }
        TaskKind::Restore if record.live.is_some() => {
            restore::recover_live(ctx, &record).await?;
            recover_new(ctx, &record, what, sink).await?;
        }
        TaskKind::Restore if record.replaces.is_some() => {
            restore::replace::recover(ctx, &record, sink).await?;
            remove_directories(ctx, &record).await?;
        }
        TaskKind::Restore | TaskKind::Create => recover_new(ctx, &record, what, sink).await?,
    }
    super::remove(journal).await.map_err(|error| chain(&error))
}

/// Tells whether the backup is durable.
async fn recover_backup(
    ctx: &JobContext,
    record: &Record,
    afterwards: Afterwards,
    sink: &dyn TaskSink,
) -> Result<bool, String> {
    let id = record.begin.guest_id;
    if record.frozen && record.qemu.as_ref().is_some_and(ProcessStamp::is_alive) {
        // A guest must not wait for a provider. The guard has most likely thawed it long ago.
        if let Err(error) = thaw_directly(&ctx.layout.agent_socket(id), ctx.limits.freeze).await {
            sink.warn(&format!("whether VM {id} is thawed is not known: {error}"));
        }
    }
    if let Some(tpm) = record.tpm.as_ref().filter(|tpm| tpm.is_alive()) {
        // Its guard has most likely done so long ago.
        tpm_guard::go_on(tpm.process)
            .map_err(|error| format!("the swtpm of VM {id} may be stopped: {error}"))?;
    }
    // After a start of the host it is the host's matter which guests run.
    let is_of_this_boot = record.ran.as_ref().is_some_and(ProcessStamp::is_of_this_boot);
    let held = record.held.filter(|_| is_of_this_boot);
    let stays_down = held == Some(Held::ShutDown) && afterwards == Afterwards::StaysDown;
    let again = match held {
        Some(_) if stays_down => {
            sink.warn(&format!("VM {id}, which its backup shut down, is not started again"));
            Ok(())
        }
        Some(held) => run_again(ctx, record, held, sink).await,
        None => Ok(()),
    };
    let is_committed = undo_backup(ctx, record, stays_down, sink).await;
    both(again, is_committed)
}

/// Both errors, if there are two.
fn both<T>(again: Result<(), String>, undone: Result<T, String>) -> Result<T, String> {
    match (again, undone) {
        (Ok(()), undone) => undone,
        (Err(again), Ok(_)) => Err(again),
        (Err(again), Err(undone)) => Err(format!("{again}; {undone}")),
    }
}

fn vm_of<'a>(ctx: &'a JobContext, record: &Record) -> Vm<'a> {
    let JobContext { layout, tools, storages, .. } = ctx;
    Vm { layout, tools, storages, id: record.begin.guest_id }
}

async fn run_again(
    ctx: &JobContext,
    record: &Record,
    held: Held,
    sink: &dyn TaskSink,
) -> Result<(), String> {
    let id = record.begin.guest_id;
    let mark = record.started.as_ref().map(|(mark, _)| mark.as_str());
    let again = power::run_again(vm_of(ctx, record), held, mark, record.ran.as_ref(), None).await;
    let again = again.map_err(|error| {
        let advice = "start or stop the VM yourself to settle that";
        format!("{} ({advice})", chain(&error).trim_end_matches('.'))
    })?;
    power::log_again(again, id, None, sink);
    note(record, Entry::Resumed, sink).await;
    Ok(())
}

/// Writes down what has been done.
async fn note(record: &Record, entry: Entry, sink: &dyn TaskSink) {
    if let Err(error) = super::append_to(&record.path, entry).await {
        sink.warn(&format!("going on all the same: {}", chain(&error)));
    }
}

/// All but that the guest runs. Tells whether the backup is durable.
async fn undo_backup(
    ctx: &JobContext,
    record: &Record,
    stays_down: bool,
    sink: &dyn TaskSink,
) -> Result<bool, String> {
    let vm = vm_of(ctx, record);
    // Nobody can read them any more: what they read from went with the task's process.
    for export in &record.file_exports {
        withdraw_file(ctx, export).await?;
    }
    let is_committed = settle_commit(ctx, record, sink).await?;
    let qemu = qemu_of(record)?;
    // Before anything was acquired in QEMU it need not be asked, and may be busy or hang.
    let has_traces = record.access.is_some()
        || record.nbd.is_some()
        || record.kept_alive
        || record.started.is_some()
        || !record.fleecing.is_empty();
    let session = match qemu {
        Some(qemu) if has_traces => {
            power::connect_patiently(vm, qemu).await.map_err(|error| chain(&error))?
        }
        _ => None,
    };
    if let Some(session) = &session {
        undo_in_qemu(session, record, is_committed, sink).await.map_err(|error| chain(&error))?;
    }
    for image in record.fleecing.iter().rev() {
        free_named(ctx, &image.volume).await?;
    }
    remove_directories(ctx, record).await?;
    let (Some(session), Some(qemu)) = (session, qemu) else { return Ok(is_committed) };
    let change = Change {
        is_off: record.started.as_ref().is_some_and(|(_, is_to_run)| !is_to_run || stays_down),
        is_kept: record.kept_alive,
    };
    power::leave(vm, &qemu, &session, change, sink).await.map_err(|error| chain(&error))?;
    Ok(is_committed)
}

/// Gives the archive of a backup that is durable the notes and the protection it was to have. Can only
/// warn: nothing else waits for it.
async fn describe(ctx: &JobContext, record: &Record, sink: &dyn TaskSink) {
    let Some(id) = record.committing.filter(|_| !record.description.is_empty()) else { return };
    let storage = &record.begin.storage;
    let given = async {
        let provider = ctx.providers.provider(storage).await?;
        // Asked again for its name, which the provider chose.
        match ask_outcome(provider.as_ref(), id, &ctx.limits, sink).await? {
            CommitOutcome::Committed { archive } if check_archive_name(&archive).is_ok() => {
                let description = &record.description;
                description.give(provider.as_ref(), storage, &archive, &ctx.limits, sink).await;
                Ok(())
            }
            _ => Err("the provider does not name it".to_owned()),
        }
    };
    if let Err(error) = given.await {
        sink.warn(&format!("the archive of the interrupted backup has no notes: {error}"));
    }
}

/// A container goes on before anything else is undone. Tells whether the backup is durable.
async fn recover_container_backup(
    ctx: &JobContext,
    record: &Record,
    afterwards: Afterwards,
    sink: &dyn TaskSink,
) -> Result<bool, String> {
    let mut wanted = record.clone();
    if wanted.held.is_some() && afterwards == Afterwards::StaysDown {
        wanted.held = None;
        let id = record.begin.guest_id;
        sink.warn(&format!("CT {id}, which its backup shut down, is not started again"));
    }
    let is_wanted = wanted.frozen || wanted.held.is_some();
    let again = if is_wanted { ctx.containers.run_again(ctx, &wanted, sink).await } else { Ok(()) };
    if again.is_ok() && is_wanted {
        for entry in [Entry::Thawed, Entry::Resumed] {
            note(record, entry, sink).await;
        }
    }
    let is_committed = undo_container_backup(ctx, record, sink).await;
    both(again, is_committed)
}

async fn undo_container_backup(
    ctx: &JobContext,
    record: &Record,
    sink: &dyn TaskSink,
) -> Result<bool, String> {
    let is_committed = settle_commit(ctx, record, sink).await?;
    for (volume, name) in &record.snapshots {
        delete_snapshot(ctx, volume, name).await?;
    }
    for volume in record.volumes.iter().rev() {
        free_named(ctx, volume).await?;
    }
    for path in &record.temporary_trees {
        remove_temporary_tree(ctx, path, record.begin.guest_id).await?;
    }
    remove_directories(ctx, record).await?;
    Ok(is_committed)
}

async fn remove_temporary_tree(ctx: &JobContext, path: &Path, id: u32) -> Result<(), String> {
    // A journal is our own, but a wrong path here would cost too much.
    if !temp_tree::is_planned(path, id) {
        return Err(format!("the directory '{}' is not one of ours", path.display()));
    }
    let tree = path.to_owned();
    let removed = blocking::run(move || temp_tree::remove(&tree));
    // As many files as the container has.
    let in_time = tokio::time::timeout(ctx.limits.removal, removed).await;
    in_time
        .unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
        .map_err(|error| format!("cannot remove the copy '{}': {error}", path.display()))
}

async fn delete_snapshot(ctx: &JobContext, volume: &str, name: &str) -> Result<(), String> {
    let volume: VolumeId = volume.parse().map_err(|error| chain(&error))?;
    let storage = ctx.storages.images(volume.storage()).map_err(|error| chain(&error))?;
    let limit = ctx.limits.undo;
    match tokio::time::timeout(limit, storage.delete_snapshot(&ctx.tools, &volume, name)).await {
        Ok(Ok(_) | Err(StorageError::NotFound { .. })) => Ok(()),
        Ok(Err(error)) => Err(chain(&error)),
        Err(_) => Err(format!(
            "the snapshot '{name}' of '{volume}' could not be removed within {} seconds",
            limit.as_secs()
        )),
    }
}

/// The QEMU that the backup worked with last, if it lives.
fn qemu_of(record: &Record) -> Result<Option<VmProcess>, String> {
    let Some((mark, _)) = &record.started else {
        let qemu = record.qemu.as_ref().filter(|qemu| qemu.is_alive());
        return Ok(qemu.map(|qemu| qemu.process));
    };
    // Its process may not have been written down yet.
    VmProcess::of_mark(mark).map_err(|error| format!("cannot look for a QEMU in /proc: {error}"))
}

/// Finds out whether the backup is durable. An error means that nothing may be torn down yet.
async fn settle_commit(
    ctx: &JobContext,
    record: &Record,
    sink: &dyn TaskSink,
) -> Result<bool, String> {
    let Some(id) = record.committing else {
        return Ok(false);
    };
    match record.outcome {
        Some(KnownOutcome::Committed) => return Ok(true),
        Some(KnownOutcome::NotCommitted | KnownOutcome::Unknown) => return Ok(false),
        None => {}
    }
    let what = format!("what became of the commit {id} on the storage '{}'", record.begin.storage);
    let outcome = match outcome_of(ctx, record, id, sink).await {
        Ok(outcome) => outcome,
        Err(why) if has_access(ctx, record).await? => {
            return Err(format!(
                "{what} is not known yet ({why}); nothing was changed, try again later"
            ));
        }
        Err(why) => {
            // Nothing depends on the answer any more but notes and protection.
            let archive = record.archive.as_deref().unwrap_or("-");
            sink.warn(&format!(
                "{what} is not known ({why}); the archive '{archive}', if it is there, is left \
                 alone, without the notes and the protection it was to have"
            ));
            KnownOutcome::Unknown
        }
    };
    note(record, Entry::Outcome { id, outcome }, sink).await;
    Ok(outcome == KnownOutcome::Committed)
}

/// Asks the provider; an error says why there is no answer.
async fn outcome_of(
    ctx: &JobContext,
    record: &Record,
    id: Uuid,
    sink: &dyn TaskSink,
) -> Result<KnownOutcome, String> {
    let provider = ctx.providers.provider(&record.begin.storage).await?;
    match ask_outcome(provider.as_ref(), id, &ctx.limits, sink).await? {
        CommitOutcome::Committed { archive } => {
            sink.info(&format!("the interrupted backup is committed as '{archive}'"));
            Ok(KnownOutcome::Committed)
        }
        CommitOutcome::NotCommitted => {
            sink.info("the interrupted backup was not committed");
            Ok(KnownOutcome::NotCommitted)
        }
        CommitOutcome::Pending => Err("it is pending".to_owned()),
    }
}

/// Whether QEMU still has the access, whose end decides from where the next increment counts.
async fn has_access(ctx: &JobContext, record: &Record) -> Result<bool, String> {
    let (Some(target_id), Some(qemu)) = (&record.access, qemu_of(record)?) else {
        return Ok(false);
    };
    let session = power::connect_patiently(vm_of(ctx, record), qemu).await;
    let Some(session) = session.map_err(|error| chain(&error))? else { return Ok(false) };
    let access = backup::find(&session, target_id).await;
    let access = access.map_err(|error| format!("cannot ask for the backup access: {error}"))?;
    Ok(access.is_some())
}

async fn undo_in_qemu(
    session: &Session,
    record: &Record,
    is_committed: bool,
    sink: &dyn TaskSink,
) -> Result<(), GuestError> {
    // Before the teardown, which ends our exports.
    let owns_nbd = match &record.nbd {
        Some((socket, exports)) => ops::owns_nbd(session, socket, exports)
            .await
            .map_err(GuestError::at("find out whose the NBD server is"))?,
        None => false,
    };
    if let Some(target_id) = &record.access {
        let result = backup::teardown(session, target_id, is_committed)
            .await
            .map_err(GuestError::at("end the backup access"))?;
        if let Some(reason) = result.reason {
            sink.warn(&format!("backup access: {reason}"));
        }
    }
    if owns_nbd {
        ops::stop_nbd(session).await?;
    }
    for image in record.fleecing.iter().rev() {
        ops::remove_node(session, &image.node)
            .await
            .map_err(GuestError::at(format!("detach the fleecing image '{}'", image.volume)))?;
    }
    Ok(())
}

async fn withdraw_file(ctx: &JobContext, export: &FileExport) -> Result<(), String> {
    // A journal is our own, but a wrong path here would cost too much.
    if !export.path.starts_with(ctx.layout.run()) {
        return Err(format!("the file '{}' is not one of ours", export.path.display()));
    }
    let withdrawn = bounded(ctx, file::withdraw(export)).await;
    withdrawn
        .map_err(|error| format!("cannot withdraw the file '{}': {error}", export.path.display()))
}

async fn free_named(ctx: &JobContext, volume: &str) -> Result<(), String> {
    let volume: VolumeId = volume.parse().map_err(|error| chain(&error))?;
    free_within(ctx, &volume, ctx.limits.undo).await
}

async fn remove_directories(ctx: &JobContext, record: &Record) -> Result<(), String> {
    for dir in &record.directories {
        // A journal is our own, but a wrong path here would cost too much.
        if !dir.starts_with(ctx.layout.run()) || dir.as_path() == ctx.layout.run() {
            return Err(format!("the directory '{}' is not one of ours", dir.display()));
        }
        let removed = blocking::run({
            let dir = dir.clone();
            move || temp_tree::remove(&dir)
        });
        match bounded(ctx, removed).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(format!("cannot remove the directory '{}': {error}", dir.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

async fn recover_new(
    ctx: &JobContext,
    record: &Record,
    what: &str,
    sink: &dyn TaskSink,
) -> Result<(), String> {
    let id = record.begin.guest_id;
    let kind = record.begin.guest_kind;
    let guest = guest_words(kind, id);
    let path = ctx.layout.guest_config_path(kind, id);
    let config = VmConfig::read(&path).map_err(|error| chain(&error))?;
    // Some of them may have been detached, moved or removed since, so one is enough.
    let is_complete = config
        .as_ref()
        .is_some_and(|config| record.volumes.iter().any(|volume| config.names_volume(volume)));
    if record.complete || is_complete {
        sink.info(&format!("the interrupted {what} of {guest} was complete"));
        return remove_directories(ctx, record).await;
    }
    for volume in record.volumes.iter().rev() {
        free_named(ctx, volume).await?;
    }
    if config.is_none() {
        for file in &record.files {
            // As with directories: only what a restore writes.
            if file.starts_with(ctx.layout.etc()) && *file == ctx.layout.firewall_path(id) {
                remove_file(ctx, file).await?;
            }
        }
    }
    remove_directories(ctx, record).await
}

async fn remove_file(ctx: &JobContext, path: &Path) -> Result<(), String> {
    let removed = blocking::run({
        let path = path.to_owned();
        move || std::fs::remove_file(path)
    });
    match bounded(ctx, removed).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(format!("cannot remove '{}': {error}", path.display()))
        }
        _ => Ok(()),
    }
}

async fn bounded<T>(ctx: &JobContext, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let limit = ctx.limits.undo;
    let in_time = tokio::time::timeout(limit, work).await;
    in_time.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
}
