// SPDX-License-Identifier: MIT OR Apache-2.0
//! A live restore: the VM runs at once, on images that are empty at first and lie over what the provider serves,
//! and its disks are filled while it runs (`docs/design/0025`).
//!
//! ```text
//! Live        journalled: the disks, their volumes, where the archive's sockets are
//! config      there, and locked; it names the images that have the guest's writes
//! start       QEMU, whose guest does not run yet
//! Runs        journalled; from here on nothing is undone: only a resume makes the VM whole
//! fill        `fill.rs`, per disk: Pivot if its target is another volume, then Filled
//! config      names the filled volumes and is not locked
//! Complete    journalled; images that nothing needs any more are freed
//! ```
//!
//! An image that is not complete names its archive as its backing file, so that whoever opens it without this
//! program gets an error, not zeroes.

mod fill;
mod resume;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use provider_api::{GuestKind, VmRestore};
use qmp_client::Session;
use qmp_client::commands::{Cont, RunState, SetAction, ShutdownAction};
use tokio::process::Command;

pub use self::resume::{give_up_restore, resume_restore};
use super::RestoreReport;
use super::config::NewVolume;
use super::copy::{Source, nbd_options};
use super::plan::{Plan, PlannedDisk};
use super::replace::{beside, free_unnamed};
use super::task::{Archived, Made, Restore, Step, Volumes, remove_dir, reported, step, words};
use crate::blocking;
use crate::config::guest::VmConfig;
use crate::job::{JobContext, chain};
use crate::journal::{Entry, Journal, Live, LiveDisk, Record};
use crate::layout::{Layout, Monitor, check_socket_path, make_private_dir};
use crate::lock::FileLock;
use crate::storage::{ImageFormat, VolumeId};
use crate::task_log::clean;
use crate::vm::backup::ops;
use crate::vm::qemu_cmdline::LiveNode;
use crate::vm::runner::{self, LIVE_LOCK, live_advice};

/// What is known of a live restore whose guest runs, or may run.
pub(super) struct Filling {
    journal: Journal,
    live: Live,
    /// Where the provider makes its sockets this time.
    private_dir: PathBuf,
    /// Those of processes before this one, in which something was mounted.
    old_dirs: Vec<PathBuf>,
    exports: BTreeMap<String, String>,
    pivoted: BTreeSet<String>,
    filled: BTreeSet<String>,
    /// Devices that the provider was asked for.
    offered: Vec<String>,
}

/// Small volumes that QEMU reads whole at its start.
fn is_copied(key: &str) -> bool {
    key.starts_with("efidisk") || key.starts_with("tpmstate")
}

fn needs_overlay(disk: &PlannedDisk) -> bool {
    !is_copied(&disk.key) && disk.format != ImageFormat::Qcow2
}

/// The images that are needed beside the disks for the time of the restore.
pub(super) fn overlays(disks: &[PlannedDisk]) -> Vec<PlannedDisk> {
    let disks = disks.iter().filter(|disk| needs_overlay(disk)).cloned();
    disks.map(|disk| PlannedDisk { format: ImageFormat::Qcow2, ..disk }).collect()
}

/// Refuses to clean up after a restore whose guest has run: the images have what it wrote.
pub(crate) fn refuse_recovery(record: &Record) -> Result<(), String> {
    if is_unfinished(record) && !record.given_up {
        return Err(live_advice(record.begin.guest_id));
    }
    Ok(())
}

/// A live restore whose guest has run, or may have, and whose disks are not complete.
fn is_unfinished(record: &Record) -> bool {
    record.live.is_some() && record.runs && !record.complete
}

/// Undoes what is not a volume, a directory or a rule of the firewall, of a restore whose guest has not run or that is given
/// up; or finishes one that is complete.
pub(crate) async fn recover(ctx: &JobContext, record: &Record) -> Result<(), String> {
    let id = record.begin.guest_id;
    if !record.complete {
        return undo_guest(ctx, id).await;
    }
    let overlays = record.live.as_ref().map(overlay_volumes).unwrap_or_default();
    let freed = free_unnamed(ctx, (GuestKind::Qemu, id), &overlays).await;
    freed.map_err(|problems| problems.join("; "))
}

fn overlay_volumes(live: &Live) -> Vec<VolumeId> {
    live.disks.iter().filter_map(|disk| disk.overlay.as_ref()?.parse().ok()).collect()
}

/// Ends the QEMU, and removes the configuration.
async fn undo_guest(ctx: &JobContext, id: u32) -> Result<(), String> {
    let path = ctx.layout.vm_config_path(id);
    let config = VmConfig::read(&path).map_err(words)?;
    if config.is_none_or(|config| config.get("lock") != Some(LIVE_LOCK)) {
        return Ok(());
    }
    let options = runner::StopOptions { timeout: std::time::Duration::ZERO };
    runner::stop(&ctx.layout, id, options).await.map_err(words)?;
    blocking::run(move || std::fs::remove_file(path)).await.map_err(|error| error.to_string())
}

/// The directory whose links lead QEMU to the archive's sockets.
fn live_dir(layout: &Layout, id: u32) -> PathBuf {
    layout.run().join(format!("live-{id}"))
}

impl Restore<'_> {
    pub(super) fn check_live_request(&self) -> Step<()> {
        let options = self.options;
        if options.force || options.in_place || !options.disks.is_empty() {
            return Err(
                "a live restore makes a new VM: choose a free number, or restore without --live"
                    .to_owned(),
            );
        }
        if !self.provider.describe().capabilities.random_read {
            return Err(format!(
                "the provider of the storage '{}' cannot serve a disk at random, as a live restore \
                 needs it; restore without --live",
                options.source_storage
            ));
        }
        Ok(())
    }

    /// Whether the VM could be started on this host, before anything is made.
    pub(super) fn check_live(&self, plan: &Plan, archived: &Archived) -> Step<()> {
        let volumes = plan.disks.iter().map(|disk| {
            let volume = format!("{}:{}/new", disk.storage.id(), self.id);
            (disk.key.clone(), NewVolume { volume, size_bytes: disk.size_bytes })
        });
        let (config, _) = self.new_config(plan, archived, None, &volumes.collect())?;
        let dir = live_dir(&self.ctx.layout, self.id);
        check_socket_path(&dir.join("a-long-disk-name")).map_err(words)?;
        self.ctx.tools.qemu_system().map_err(words)?;
        runner::check_config(&self.ctx.layout, self.id, &config).map_err(words)
    }

    pub(super) async fn run_live(
        &self,
        mut source: Box<dyn VmRestore>,
        archived: &Archived,
        power: FileLock,
        report: &mut RestoreReport,
    ) -> Step<()> {
        let begun = self.plan_and_begin(source.devices(), archived, None, report).await;
        let (plan, mut made) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                self.end_source(source, report).await;
                return Err(error);
            }
        };
        let mut offered = Vec::new();
        let (from, also) = (source.as_mut(), &mut offered);
        let begun = self.begin_live(from, &plan, archived, power, &mut made, also, report).await;
        let (live, exports, session) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                self.withdraw_all(source, offered, report).await;
                let mut problems: Vec<String> =
                    undo_guest(self.ctx, self.id).await.err().into_iter().collect();
                let dirs = [made.private_dir.clone(), live_dir(&self.ctx.layout, self.id)];
                for dir in dirs {
                    problems.extend(remove_dir(dir).await.err());
                }
                // What is left is the recovery's.
                let undone = if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) };
                let problems = self.undo(made, undone).await;
                self.warn(report, problems);
                return Err(error);
            }
        };
        let mut filling = Filling {
            journal: made.new.journal,
            live,
            private_dir: made.private_dir,
            old_dirs: Vec::new(),
            exports,
            pivoted: BTreeSet::new(),
            filled: BTreeSet::new(),
            offered,
        };
        self.fill_and_complete(source, &mut filling, Some(session), report).await
    }

    /// Fills the disks of a guest that runs. After an error everything stays for a resume.
    async fn fill_and_complete(
        &self,
        mut source: Box<dyn VmRestore>,
        filling: &mut Filling,
        session: Option<Session>,
        report: &mut RestoreReport,
    ) -> Step<()> {
        let filled = match &session {
            Some(session) => self.fill_live(source.as_mut(), filling, session, report).await,
            None => Ok(()),
        };
        let offered = std::mem::take(&mut filling.offered);
        self.withdraw_all(source, offered, report).await;
        let done = match filled {
            Ok(()) => self.complete_live(filling, session.as_ref(), report).await,
            Err(error) => Err(error),
        };
        done.map_err(|error| format!("{error}. {}", live_advice(self.id)))
    }

    /// Nothing of the provider's is needed any more.
    async fn withdraw_all(
        &self,
        mut source: Box<dyn VmRestore>,
        offered: Vec<String>,
        report: &mut RestoreReport,
    ) {
        for device in offered.into_iter().rev() {
            self.withdraw_one(source.as_mut(), &device, &mut report.warnings).await;
        }
        self.end_source(source, report).await;
    }

    /// Everything up to a guest that runs. After an error it does not, and all is to be undone.
    #[expect(clippy::too_many_arguments, reason = "what is made is undone by the caller")]
    async fn begin_live(
        &self,
        source: &mut dyn VmRestore,
        plan: &Plan,
        archived: &Archived,
        power: FileLock,
        made: &mut Made,
        offered: &mut Vec<String>,
        report: &mut RestoreReport,
    ) -> Step<(Live, BTreeMap<String, String>, Session)> {
        let dir = live_dir(&self.ctx.layout, self.id);
        let journal = made.new.journal.clone();
        journal.append(Entry::Directory { path: dir.clone() }).await.map_err(words)?;
        make_private_dir(&dir).map_err(words)?;
        journal.append(Entry::Archive { name: self.archive.to_owned() }).await.map_err(words)?;
        let mut sources = Vec::new();
        for disk in &plan.disks {
            offered.push(disk.device.clone());
            let (dir, limit) = (&made.private_dir, self.ctx.limits.offer);
            let offer = self.offer_one(source, &disk.device, disk.size_bytes, dir, limit);
            let offer =
                offer.await.map_err(|error| format!("the disk '{}': {error}", disk.device))?;
            sources.push((disk, offer));
        }
        step("live:offered");
        let mut live =
            Live { dir, limit_bytes_per_s: self.options.limit_bytes_per_s, disks: Vec::new() };
        let mut exports = BTreeMap::new();
        let mut volumes = Volumes::new();
        for (disk, offer) in sources {
            let volume = self.make_volume(disk, made).await?;
            let new = NewVolume { volume: volume.to_string(), size_bytes: disk.size_bytes };
            volumes.insert(disk.key.clone(), new);
            if is_copied(&disk.key) {
                self.cancellable(self.copy(offer, disk, &volume, |_| ())).await?;
                continue;
            }
            let export = self.link(&live.dir, &disk.key, offer).await?;
            let overlay = match needs_overlay(disk) {
                true => {
                    let disk = PlannedDisk { format: ImageFormat::Qcow2, ..disk.clone() };
                    Some(self.make_volume(&disk, made).await?)
                }
                false => None,
            };
            let image = overlay.as_ref().unwrap_or(&volume);
            self.set_backing(disk, image, &live.dir.join(&disk.key), &export).await?;
            let entry = Entry::Export { key: disk.key.clone(), export: export.clone() };
            journal.append(entry).await.map_err(words)?;
            exports.insert(disk.key.clone(), export);
            live.disks.push(LiveDisk {
                device: disk.device.clone(),
                key: disk.key.clone(),
                size_bytes: disk.size_bytes,
                volume: volume.to_string(),
                overlay: overlay.map(|volume| volume.to_string()),
            });
        }
        step("live:allocated");
        let (config, warnings) = self.new_config(plan, archived, None, &volumes)?;
        self.warn(report, warnings);
        journal.append(Entry::Live(live.clone())).await.map_err(words)?;
        let locked = locked(&config, &live)?;
        self.write_new(&locked, archived.firewall.clone(), made).await?;
        step("live:configured");
        drop(power);
        let nodes = self.nodes(&live, &exports, &BTreeSet::new())?;
        let session = self.cancellable(self.start_live(&config, &nodes, report)).await?;
        step("live:started");
        report.volumes = reported(volumes);
        if self.cancel.is_cancelled() {
            return Err("the restore was cancelled".to_owned());
        }
        journal.append(Entry::Runs).await.map_err(words)?;
        // From here on the caller keeps everything, so this does not fail.
        self.let_run(&session, report).await;
        Ok((live, exports, session))
    }

    async fn make_volume(&self, disk: &PlannedDisk, made: &mut Made) -> Step<VolumeId> {
        let PlannedDisk { storage, format, size_bytes, .. } = disk;
        let new = made.new.allocate(self.ctx, storage.as_ref(), self.id, *format, *size_bytes);
        self.cancellable(async { new.await.map_err(words) }).await
    }

    /// Has QEMU find an offer; returns the name of its export.
    async fn link(&self, dir: &Path, key: &str, offer: Source) -> Step<String> {
        let Source::Nbd { socket, export } = offer else {
            return Err(format!(
                "the disk '{key}': the provider offers no NBD export for a guest to read; restore \
                 without --live"
            ));
        };
        let (link, new) = (dir.join(key), dir.join(format!(".{key}.new")));
        let linked = blocking::run(move || {
            // Left by a process that was killed between the two.
            let _ = std::fs::remove_file(&new);
            symlink(socket, &new)?;
            std::fs::rename(new, link)
        });
        linked
            .await
            .map_err(|error| format!("cannot make a link in '{}': {error}", dir.display()))?;
        Ok(export)
    }

    /// Writes into an image that what it does not have is in the archive.
    async fn set_backing(
        &self,
        disk: &PlannedDisk,
        image: &VolumeId,
        socket: &Path,
        export: &str,
    ) -> Step<()> {
        let path = disk.storage.volume_path(image).map_err(words)?;
        let qemu_img = self.ctx.tools.qemu_img().map_err(words)?;
        let set = Command::new(qemu_img)
            .args(["rebase", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b"])
            .arg(nbd_options(socket, export))
            .arg("--")
            .arg(&path)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let set = self.cancellable(async { set.await.map_err(|error| error.to_string()) });
        let set = set.await.map_err(|error| format!("cannot start qemu-img: {error}"))?;
        if !set.status.success() {
            let said = clean(&String::from_utf8_lossy(&set.stderr));
            return Err(format!("qemu-img did not prepare '{image}': {said}"));
        }
        let synced = blocking::run(move || std::fs::File::open(path)?.sync_all()).await;
        synced.map_err(|error| format!("cannot sync '{image}': {error}"))
    }

    /// What QEMU needs for the disks that are not complete.
    fn nodes(
        &self,
        live: &Live,
        exports: &BTreeMap<String, String>,
        complete: &BTreeSet<String>,
    ) -> Step<Vec<LiveNode>> {
        let mut nodes = Vec::new();
        for disk in live.disks.iter().filter(|disk| !complete.contains(&disk.key)) {
            let key = disk.key.clone();
            let export = exports.get(&key).cloned();
            let overlay = disk.overlay.as_ref().map(|volume| self.ctx.storages.resolve(volume));
            nodes.push(LiveNode {
                socket: live.dir.join(&key),
                export: export.ok_or_else(|| format!("the disk '{key}' has no export"))?,
                overlay: overlay.transpose().map_err(words)?,
                key,
            });
        }
        Ok(nodes)
    }

    /// Starts QEMU, whose guest does not run yet. `config` names the volumes that are filled.
    async fn start_live(
        &self,
        config: &VmConfig,
        nodes: &[LiveNode],
        report: &mut RestoreReport,
    ) -> Step<Session> {
        let JobContext { layout, tools, storages, .. } = self.ctx;
        let started = runner::start_live(layout, tools, storages, self.id, config, nodes).await;
        self.warn(report, started.map_err(words)?.notices);
        let socket = layout.qmp_socket(self.id, Monitor::Backup);
        ops::connect(&socket).await.map_err(words)
    }

    /// Lets the guest run in a QEMU that stays when it switches off. What fails is for the loop that fills the
    /// disks to see.
    async fn let_run(&self, session: &Session, report: &mut RestoreReport) {
        let stays = SetAction { shutdown: Some(ShutdownAction::Pause) };
        let result = async {
            session.execute(stays).await?;
            session.execute(Cont).await
        };
        match result.await {
            Ok(_) => {
                report.started = true;
                self.sink.info(&format!("VM {} runs; its disks are being filled", self.id));
            }
            Err(error) => {
                let error = chain(&error);
                self.warn(report, [format!("VM {} does not run yet: {error}", self.id)]);
            }
        }
        step("live:running");
    }

    /// The VM is whole: nothing of the archive is needed any more.
    async fn complete_live(
        &self,
        filling: &Filling,
        session: Option<&Session>,
        report: &mut RestoreReport,
    ) -> Step<()> {
        let layout = &self.ctx.layout;
        let path = layout.vm_config_path(self.id);
        let mut config = runner::read_config(layout, self.id).map_err(words)?;
        name_targets(&mut config, &filling.live)?;
        if config.get("lock") == Some(LIVE_LOCK) {
            config.remove("lock");
        }
        beside(move || config.write(&path)).await?;
        step("live:unlocked");
        filling.journal.append(Entry::Complete).await.map_err(words)?;
        // What is left can only warn.
        let overlays = overlay_volumes(&filling.live);
        let mut problems = free_unnamed(self.ctx, (GuestKind::Qemu, self.id), &overlays)
            .await
            .err()
            .unwrap_or_default();
        for dir in [&filling.private_dir, &filling.live.dir].into_iter().chain(&filling.old_dirs) {
            problems.extend(remove_dir(dir.clone()).await.err());
        }
        if problems.is_empty() {
            problems.extend(filling.journal.clone().remove().await.err().map(words));
        }
        if let Some(session) = session {
            problems.extend(self.leave_live(session).await.err());
        }
        self.warn(report, problems);
        Ok(())
    }

    /// QEMU is as one that was started without any restore.
    async fn leave_live(&self, session: &Session) -> Step<()> {
        let layout = &self.ctx.layout;
        let Some(process) = runner::find_process(layout, self.id).map_err(words)? else {
            return Ok(());
        };
        let goes = SetAction { shutdown: Some(ShutdownAction::Poweroff) };
        session.execute(goes).await.map_err(words)?;
        let off = [RunState::Shutdown];
        runner::end_if(layout, self.id, &process, session, &off).await.map(drop).map_err(words)
    }
}

/// The configuration while the disks are filled: it names the images that have the guest's writes, and
/// nobody else may start it.
fn locked(config: &VmConfig, live: &Live) -> Step<VmConfig> {
    let mut config = config.clone();
    for disk in &live.disks {
        if let Some(overlay) = &disk.overlay {
            name_volume(&mut config, &disk.key, overlay)?;
        }
    }
    config.set("lock", LIVE_LOCK).map_err(words)?;
    Ok(config)
}

/// Names the volumes that are filled instead of the images before them.
fn name_targets(config: &mut VmConfig, live: &Live) -> Step<()> {
    for disk in live.disks.iter().filter(|disk| disk.overlay.is_some()) {
        name_volume(config, &disk.key, &disk.volume)?;
    }
    Ok(())
}

fn name_volume(config: &mut VmConfig, key: &str, volume: &str) -> Step<()> {
    let disks = config.disks().map_err(words)?;
    let Some(disk) = disks.into_iter().find(|disk| disk.key == key) else {
        return Err(format!("the configuration has no disk '{key}' any more"));
    };
    let disk = crate::config::guest::DiskEntry { volume: volume.to_owned(), ..disk };
    config.set(key, &disk.to_value()).map_err(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live() -> Live {
        let disk = |key: &str, overlay: Option<&str>| LiveDisk {
            device: key.to_owned(),
            key: key.to_owned(),
            size_bytes: 512,
            volume: format!("local:200/vm-200-{key}.raw"),
            overlay: overlay.map(str::to_owned),
        };
        let disks = vec![disk("scsi0", Some("local:200/vm-200-disk-9.qcow2")), disk("scsi1", None)];
        Live { dir: "/run/live-200".into(), limit_bytes_per_s: None, disks }
    }

    #[test]
    fn while_it_is_filled_the_configuration_names_what_has_the_guests_writes() {
        let text = "name: x\nscsi0: local:200/vm-200-scsi0.raw,iothread=1\n\
                    scsi1: local:200/vm-200-scsi1.raw\n";
        let config = VmConfig::parse(text);
        let mut locked = locked(&config, &live()).unwrap();
        assert_eq!(locked.get("lock"), Some("live-restore"));
        assert_eq!(locked.get("scsi0"), Some("local:200/vm-200-disk-9.qcow2,iothread=1"));
        assert_eq!(locked.get("scsi1"), config.get("scsi1"));
        name_targets(&mut locked, &live()).unwrap();
        locked.remove("lock");
        assert_eq!(locked.to_string(), text);
        locked.remove("scsi0");
        assert!(name_targets(&mut locked, &live()).unwrap_err().contains("no disk 'scsi0'"));
    }
}
