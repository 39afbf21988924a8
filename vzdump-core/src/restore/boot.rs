// SPDX-License-Identifier: MIT OR Apache-2.0
//! Starts an archive as a throw-away VM and waits for its guest: the only proof that a backup boots.
//!
//! The VM has an installation of its own in one directory below the state directory: configuration,
//! sockets, pid file, and per disk an image that is empty at first and lies over what the provider
//! serves. So nothing is written to the archive, the VM has no number on this host, and it has no network.
//! The directory is locked as long as it is used; one whose lock is free was left by a process that died: its QEMU is ended
//! and it is removed by the next such test, or the doctor.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use provider_api::{CancellationToken, Provider, VmRestore};
use qmp_client::agent::{Agent, AgentOptions};
use serde::Serialize;
use tokio::process::Command;

use super::config::{self, Merge, NewVolume};
use super::copy::{Source, nbd_options};
use super::plan::{self, PlannedDisk};
use super::task::{Archived, Restore, remove_dir};
use super::{PlannedVolume, RestoreOptions, screenshot};
use crate::blocking;
use crate::config::guest::{VmConfig, split_numbered};
use crate::config::storage::StorageConfig;
use crate::job::report::millis;
use crate::job::{JobContext, chain};
use crate::layout::{Layout, Monitor, check_socket_path, make_private_dir};
use crate::lock::FileLock;
use crate::storage::{DEFAULT_STORAGE, ImageFormat, StorageSet, VolumeId};
use crate::task_log::{TaskSink, clean};
use crate::vm::backup::short_id;
use crate::vm::{runner, tpm};

/// The number of the VM within its own installation.
const BOOT_ID: u32 = 100;
const LOCK_NAME: &str = "lock";
/// How often the guest is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// How long one question to the agent may take; while the guest boots nobody answers.
const AGENT_WITHIN: Duration = Duration::from_secs(1);
/// How much of the console is searched, from its end.
const CONSOLE_BYTES_MAX: u64 = 4 << 20;
/// How much of it is told of a guest that did not get ready.
const CONSOLE_TOLD_CHARS: usize = 400;
/// Lines of the configuration that a throw-away VM must not have.
const DROPPED: [&str; 3] = ["onboot", "lock", "protection"];

/// How to test an archive.
#[derive(Debug, Clone)]
pub struct BootOptions {
    /// How long the guest may take.
    pub timeout: Duration,
    /// Text on the console that means it is ready; by default its agent must answer.
    pub console: Option<String>,
    /// Keep lines of the configuration that reach the host.
    pub allow_raw_config: bool,
    /// Where a picture of the guest's display goes, if it has one.
    pub screenshot: Option<PathBuf>,
}

/// What came of a test.
#[derive(Debug, Clone, Serialize)]
pub struct BootReport {
    /// The archive.
    pub archive: String,
    /// Whether the guest got ready.
    pub ready: bool,
    /// From the start of QEMU until then, in milliseconds.
    pub ready_ms: Option<u64>,
    /// The picture of its display then.
    pub screenshot: Option<PathBuf>,
    /// Why it is not ready.
    pub error: Option<String>,
    /// The archive could not be tested at all; it says nothing about the archive.
    pub is_untested: bool,
    /// What was changed or is odd.
    pub warnings: Vec<String>,
}

/// An installation for one VM, removed by [`Place::remove`].
struct Place {
    root: PathBuf,
    layout: Layout,
    storages: StorageSet,
    _held: FileLock,
}

/// Boots an archive. Must be awaited to its end; cancel it by the token.
pub async fn boot_archive(
    ctx: &JobContext,
    provider: &dyn Provider,
    archive: &str,
    options: &BootOptions,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> BootReport {
    let mut report = BootReport {
        archive: archive.to_owned(),
        ready: false,
        ready_ms: None,
        screenshot: None,
        error: None,
        is_untested: true,
        warnings: Vec::new(),
    };
    sink.info(&format!("booting '{}' without network", clean(archive)));
    let restore = RestoreOptions {
        storage: Some(DEFAULT_STORAGE.to_owned()),
        format: Some(ImageFormat::Qcow2),
        allow_raw_config: options.allow_raw_config,
        ..RestoreOptions::default()
    };
    let task = Restore { ctx, provider, archive, id: BOOT_ID, options: &restore, sink, cancel };
    match Box::pin(task.boot(options, &mut report)).await {
        Ok(()) => {
            let seconds = report.ready_ms.unwrap_or(0) as f64 / 1000.0;
            sink.info(&format!("the guest was ready after {seconds:.1} s"));
        }
        Err(error) => {
            sink.error(&format!("'{}' did not boot - {error}", clean(archive)));
            report.error = Some(clean(&error));
        }
    }
    report
}

impl Restore<'_> {
    async fn boot(&self, options: &BootOptions, report: &mut BootReport) -> Result<(), String> {
        provider_api::check_archive_name(self.archive)?;
        if !self.provider.describe().capabilities.random_read {
            return Err("the provider of this storage cannot serve a disk at random".to_owned());
        }
        sweep(self.ctx).await;
        let archived = self.open_archive().await?;
        check_sign(options, &archived.config)?;
        let source = self.begin_source().await?;
        let state = self.ctx.layout.clone();
        let place = blocking::run(move || Ok(Place::make(&state))).await;
        match place.map_err(|error| error.to_string()).flatten() {
            Ok(place) => self.boot_source(source, place, &archived, options, report).await,
            Err(error) => {
                report.warnings.extend(self.cleanup(source).await.err());
                Err(error)
            }
        }
    }

    async fn boot_source(
        &self,
        mut source: Box<dyn VmRestore>,
        place: Place,
        archived: &Archived,
        options: &BootOptions,
        report: &mut BootReport,
    ) -> Result<(), String> {
        let (from, mut offered) = (source.as_mut(), Vec::new());
        let result = self.boot_in(&place, from, archived, options, &mut offered, report).await;
        let ended = place.end_vm().await;
        for device in offered.into_iter().rev() {
            self.withdraw_one(source.as_mut(), &device, &mut report.warnings).await;
        }
        report.warnings.extend(self.cleanup(source).await.err());
        let removed = match ended {
            Ok(()) => place.remove().await,
            // The next test ends it.
            Err(error) => Err(error),
        };
        report.warnings.extend(removed.err());
        result
    }

    async fn boot_in(
        &self,
        place: &Place,
        source: &mut dyn VmRestore,
        archived: &Archived,
        options: &BootOptions,
        offered: &mut Vec<String>,
        report: &mut BootReport,
    ) -> Result<(), String> {
        let config = &archived.config;
        let plan =
            plan::plan(BOOT_ID, config, None, source.devices(), &place.storages, self.options)?;
        report.warnings.extend(plan.warnings);
        let mut volumes = std::collections::BTreeMap::new();
        for (n, disk) in plan.disks.iter().enumerate() {
            offered.push(disk.device.clone());
            let PlannedVolume { device, size_bytes, .. } = disk.shown();
            let (dir, limit) = (place.layout.run(), self.ctx.limits.offer);
            let offer = self.offer_one(source, &device, size_bytes, dir, limit).await;
            let offer = offer.map_err(|error| format!("the disk '{device}': {error}"))?;
            let name = format!("vm-{BOOT_ID}-disk-{n}");
            let volume = self.cancellable(self.overlay(disk, &name, offer)).await?;
            volumes.insert(disk.key.clone(), NewVolume { volume: volume.to_string(), size_bytes });
        }
        let merge = Merge {
            volumes: &volumes,
            allow_raw_config: self.options.allow_raw_config,
            unique: false,
            old: None,
        };
        let (mut config, more) = config::rewrite(config, merge).map_err(|error| chain(&error))?;
        more.iter().for_each(|warning| self.sink.warn(warning));
        report.warnings.extend(more);
        isolate(&mut config);
        let (path, text) = (place.layout.vm_config_path(BOOT_ID), config.clone());
        super::replace::beside(move || text.write(&path)).await?;
        let started = Instant::now();
        let start = async {
            let options = runner::StartOptions::default();
            let Place { layout, storages, .. } = place;
            let vm = runner::start(layout, &self.ctx.tools, storages, BOOT_ID, options).await;
            vm.map_err(|error| chain(&error))
        };
        // What cannot be started on this host says nothing about the archive.
        self.cancellable(start).await?;
        let ready = self.cancellable(wait_until_ready(place, options, started)).await;
        // Of a test that was cancelled nothing is known.
        report.is_untested = self.cancel.is_cancelled();
        if let Some(to) = options.screenshot.as_ref().filter(|_| has_display(&config)) {
            match self.cancellable(screenshot::take(&place.layout, BOOT_ID, to)).await {
                Ok(()) => {
                    self.sink.info(&format!("its display is in '{}'", to.display()));
                    report.screenshot = Some(to.clone());
                }
                Err(why) => {
                    let why = format!("there is no picture of its display: {why}");
                    self.sink.warn(&why);
                    report.warnings.push(why);
                }
            }
        }
        report.ready_ms = Some(millis(ready?));
        report.ready = true;
        Ok(())
    }

    /// An empty image over what the provider serves; of a TPM's state a copy.
    async fn overlay(
        &self,
        disk: &PlannedDisk,
        name: &str,
        source: Source,
    ) -> Result<VolumeId, String> {
        let Source::Nbd { socket, export } = source else {
            return Err("the provider offers no NBD export for a guest to read".to_owned());
        };
        let storage = disk.storage.as_ref();
        let volume = VolumeId::new(storage.id(), BOOT_ID, name, disk.format);
        let volume = volume.map_err(|error| chain(&error))?;
        let path = storage.volume_path(&volume).map_err(|error| chain(&error))?;
        let dir = path.parent().map(Path::to_owned).unwrap_or_default();
        blocking::run(move || fs::create_dir_all(dir)).await.map_err(|error| error.to_string())?;
        let qemu_img = self.ctx.tools.qemu_img().map_err(|error| chain(&error))?;
        let options = nbd_options(&socket, &export);
        let mut command = Command::new(qemu_img);
        if disk.format == ImageFormat::Raw {
            // The state of a TPM is small, and swtpm reads nothing but a file.
            command.args(["convert", "-q", "-O", "raw", "--"]).arg(options).arg(path);
        } else {
            command.args(["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b"]).arg(options);
            command.arg("--").arg(path).arg(disk.size_bytes.to_string());
        }
        let made = command.stdin(Stdio::null()).kill_on_drop(true).output();
        let made = made.await.map_err(|error| format!("cannot start qemu-img: {error}"))?;
        if made.status.success() {
            return Ok(volume);
        }
        Err(format!("qemu-img made no image: {}", clean(&String::from_utf8_lossy(&made.stderr))))
    }
}

/// Refuses a sign of readiness that each guest gives, or that this one cannot give: such a test says nothing
/// of the archive.
fn check_sign(options: &BootOptions, config: &VmConfig) -> Result<(), String> {
    if options.timeout.is_zero() {
        return Err("no guest is ready within 0 seconds; give it more with --boot-timeout".into());
    }
    let Some(text) = &options.console else {
        return match config.agent_enabled() {
            true => Ok(()),
            false => Err("the guest has no agent that could say it is ready; name a text of its \
                          console with --boot-console"
                .to_owned()),
        };
    };
    if text.trim().is_empty() {
        return Err("an empty text is on every console; give --boot-console one that the guest \
                    writes only when it is ready"
            .to_owned());
    }
    // A device of the host is none of the throw-away VM's.
    if config.get("serial0") != Some("socket") {
        return Err("the VM has no serial console whose text could be read; leave out \
                    --boot-console if the guest has an agent, or add 'serial0: socket' to the VM \
                    and back it up again"
            .to_owned());
    }
    Ok(())
}

fn has_display(config: &VmConfig) -> bool {
    config.get("vga") == Some("std")
}

/// Takes away what would reach others, or keep the VM from being started.
fn isolate(config: &mut VmConfig) {
    let keys: Vec<String> = config.pairs().map(|(key, _)| key.to_owned()).collect();
    for key in keys {
        let is_net = matches!(split_numbered(&key), Some(("net", _)));
        if is_net || DROPPED.contains(&key.as_str()) {
            config.remove(&key);
        }
    }
}

/// How long it took.
async fn wait_until_ready(
    place: &Place,
    options: &BootOptions,
    started: Instant,
) -> Result<Duration, String> {
    loop {
        let is_ready = match &options.console {
            Some(text) => place.console().await.contains(text.as_str()),
            None => place.agent_answers().await,
        };
        if is_ready {
            return Ok(started.elapsed());
        }
        let runs = runner::find_process(&place.layout, BOOT_ID).map_err(|error| chain(&error))?;
        let why = match runs {
            None => "QEMU ended before the guest was ready".to_owned(),
            Some(_) if started.elapsed() < options.timeout => {
                tokio::time::sleep(LOOK).await;
                continue;
            }
            Some(_) => {
                let seconds = options.timeout.as_secs();
                format!("the guest was not ready within {seconds} seconds")
            }
        };
        let console = place.console().await;
        let skipped = console.chars().count().saturating_sub(CONSOLE_TOLD_CHARS);
        let last: String = console.chars().skip(skipped).collect();
        return Err(match last.trim() {
            "" => why,
            last => format!("{why}; the end of its console: {}", clean(last)),
        });
    }
}

impl Place {
    fn make(host: &Layout) -> Result<Self, String> {
        let root = dir_of_all(host).join(short_id());
        let words = |error: crate::layout::LayoutError| chain(&error);
        make_private_dir(&root).map_err(words)?;
        let held = FileLock::try_acquire(&root.join(LOCK_NAME), "A test of an archive");
        let held = held.map_err(|error| chain(&error))?;
        let place = Self::at(root, held);
        let sockets = [
            place.layout.qmp_socket(BOOT_ID, Monitor::Backup),
            place.layout.run().join("socket-of-a-provider"),
        ];
        let fits = sockets.iter().try_for_each(|path| check_socket_path(path).map_err(words));
        if let Err(error) = fits.and_then(|()| make_private_dir(place.layout.run()).map_err(words))
        {
            // Nothing is in it yet.
            let _ = fs::remove_dir_all(&place.root);
            return Err(error);
        }
        Ok(place)
    }

    fn at(root: PathBuf, held: FileLock) -> Self {
        let layout = Layout::new(Some(root.clone()));
        let storages = StorageSet::new(&StorageConfig::default(), &layout);
        Self { root, layout, storages, _held: held }
    }

    async fn agent_answers(&self) -> bool {
        let options = AgentOptions { connect_timeout: AGENT_WITHIN, ..AgentOptions::default() };
        let ask = async {
            let agent = Agent::connect(self.layout.agent_socket(BOOT_ID), options).await.ok()?;
            agent.ping().await.ok()
        };
        matches!(tokio::time::timeout(AGENT_WITHIN, ask).await, Ok(Some(())))
    }

    /// The end of what the guest wrote to its console.
    async fn console(&self) -> String {
        let path = self.layout.console_log(BOOT_ID);
        let read = blocking::run(move || {
            let mut file = fs::File::open(path)?;
            let from = file.metadata()?.len().saturating_sub(CONSOLE_BYTES_MAX);
            file.seek(SeekFrom::Start(from))?;
            let mut text = Vec::new();
            file.take(CONSOLE_BYTES_MAX).read_to_end(&mut text)?;
            Ok(text)
        });
        // Without a console there is nothing on it.
        String::from_utf8_lossy(&read.await.unwrap_or_default()).into_owned()
    }

    async fn end_vm(&self) -> Result<(), String> {
        if !self.layout.pid_file(BOOT_ID).exists() {
            // It may have died before it started QEMU.
            return tpm::end(&self.layout, BOOT_ID).await.map_err(|error| chain(&error));
        }
        let options = runner::StopOptions { timeout: Duration::ZERO };
        let stopped = runner::stop(&self.layout, BOOT_ID, options).await;
        stopped.map(drop).map_err(|error| chain(&error))
    }

    async fn remove(self) -> Result<(), String> {
        // First, because what a provider has mounted would be in it: then the lock stays for the next attempt.
        remove_dir(self.layout.run().to_owned()).await?;
        remove_dir(self.root).await
    }
}

fn dir_of_all(host: &Layout) -> PathBuf {
    host.state().join("boot")
}

/// Ends and removes what tests of dead processes left. What cannot be is left for the next time.
pub async fn sweep(ctx: &JobContext) {
    let dir = dir_of_all(&ctx.layout);
    let listed = blocking::run(move || {
        let entries = fs::read_dir(dir)?.flatten().map(|entry| entry.path());
        Ok(entries.filter(|path| path.join(LOCK_NAME).exists()).collect::<Vec<_>>())
    });
    for root in listed.await.unwrap_or_default() {
        let Ok(held) = FileLock::try_acquire(&root.join(LOCK_NAME), "A test of an archive") else {
            continue;
        };
        let place = Place::at(root, held);
        let ended = place.end_vm().await;
        let removed = match ended {
            Ok(()) => place.remove().await,
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::warn!(%error, "a throw-away VM is left");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_throw_away_vm_reaches_nobody() {
        let mut config = VmConfig::parse(
            "name: x\nnet0: virtio,bridge=vmbr0\nnet1: e1000\nonboot: 1\nprotection: 1\n",
        );
        isolate(&mut config);
        assert_eq!(config.to_string(), "name: x\n");
    }

    #[test]
    fn a_guest_must_be_able_to_say_that_it_is_ready() {
        let check = |console: Option<&str>, seconds: u64, config: &str| {
            let options = BootOptions {
                timeout: Duration::from_secs(seconds),
                console: console.map(str::to_owned),
                allow_raw_config: false,
                screenshot: None,
            };
            check_sign(&options, &VmConfig::parse(config))
        };
        assert_eq!(check(None, 1, "agent: 1\n"), Ok(()));
        assert_eq!(check(Some("login:"), 1, "serial0: socket\n"), Ok(()));
        for (console, seconds, config, words) in [
            (None, 1, "serial0: socket\n", "no agent"),
            (Some("login:"), 1, "agent: 1\n", "add 'serial0: socket'"),
            (Some("login:"), 1, "serial0: /dev/ttyS0\n", "add 'serial0: socket'"),
            (Some(""), 1, "serial0: socket\n", "empty text"),
            (Some(" "), 1, "serial0: socket\n", "empty text"),
            (None, 0, "agent: 1\n", "within 0 seconds"),
        ] {
            let error = check(console, seconds, config).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_place_is_held_by_its_process() {
        let root = tempfile::tempdir().unwrap();
        let host = Layout::new(Some(root.path().to_owned()));
        let place = Place::make(&host).unwrap();
        assert!(FileLock::try_acquire(&place.root.join(LOCK_NAME), "x").is_err());
        assert!(place.layout.run().starts_with(&place.root));
        assert_eq!(place.storages.image_ids(), [DEFAULT_STORAGE]);
    }
}
