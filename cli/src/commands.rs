// SPDX-License-Identifier: MIT OR Apache-2.0
//! One function per command: options in, host function called, result printed.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use serde_json::{Value, json};
use vzdump_host::{
    BackupRequest, BackupSettings, CancellationToken, CreateOptions, DiskContent, DoctorReport,
    Host, ImageFormat, Overrides, StartOptions, StopOptions, Stopped, VmState, size,
};

use crate::archives::{booted_text, verified_text};
use crate::args::{
    BackupArgs, Bus, Cli, Command, CreateArgs, DiskFormat, ProviderCommand, VmCommand,
};
use crate::output::{self, Failure, Output, archived, printable, table};
use crate::signals::cancel_on_signal;
use crate::task::{Notices, Screen};
use crate::{pages, provider};

/// A guest's backup failed; the program's own exit code of -1.
pub(crate) const GUEST_FAILED: u8 = 255;

pub(crate) type CommandResult = Result<ExitCode, Failure>;

pub(crate) async fn run(cli: Cli, output: &Output) -> CommandResult {
    // These need no host, so a broken configuration must not keep them from working.
    match cli.command {
        Command::Completion { shell } => return Ok(pages::completion(shell)),
        Command::Man { dir } => return Ok(pages::manual(&dir)?),
        Command::Provider(ProviderCommand::New { dir, language }) => {
            return provider::new(&dir, language, *output);
        }
        _ => {}
    }
    let cancel = cancel_on_signal().context("cannot watch for signals")?;
    let overrides = Overrides { qemu_bin: cli.global.qemu_bin };
    let root = cli.global.root;
    if let Command::Provider(ProviderCommand::Check(args)) = cli.command {
        return provider::check(root, overrides, *args, *output, &cancel).await;
    }
    let host = Host::open(root, &overrides)?;
    let run = Run { host: &host, output: *output, cancel: &cancel };
    match cli.command {
        Command::Vm(VmCommand::Create(args)) => run.create(*args).await,
        Command::Vm(VmCommand::Start { id, paused }) => run.start(id, paused).await,
        Command::Vm(VmCommand::Stop { id, timeout, now }) => {
            let timeout_s = if now { 0 } else { timeout };
            run.stop(id, Duration::from_secs(timeout_s.into())).await
        }
        Command::Vm(VmCommand::Status { id }) => run.status(id).await,
        Command::Vm(VmCommand::Destroy { id }) => run.destroy(id).await,
        Command::Ct(command) => run.container(command).await,
        Command::Storage(command) => run.storage(command).await,
        Command::Backup(args) => run.backup(*args).await,
        Command::List { storage } => run.list(storage.as_deref()).await,
        Command::ShowConfig { archive, firewall } => run.show_config(&archive, firewall).await,
        Command::Restore(args) => run.restore(args).await,
        Command::Verify(args) => run.verify(args).await,
        Command::Prune(args) => run.prune(args).await,
        Command::Remove { archive } => run.remove(&archive).await,
        Command::ShowLog { archive } => run.show_log(&archive).await,
        Command::Notes { archive, text } => run.notes(&archive, text.as_deref()).await,
        Command::Protect { archive } => run.protect(&archive, true).await,
        Command::Unprotect { archive } => run.protect(&archive, false).await,
        Command::Doctor { fix } => run.doctor(fix).await,
        Command::Completion { .. } | Command::Man { .. } | Command::Provider(_) => {
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Whether what a command prints for programs are events, with the result as the last one.
pub(crate) const fn is_task(command: &Command) -> bool {
    matches!(
        command,
        Command::Backup(_)
            | Command::Restore(_)
            | Command::Verify(_)
            | Command::Prune(_)
            | Command::Doctor { .. }
            | Command::Provider(ProviderCommand::Check(_))
    )
}

/// What all commands need.
pub(crate) struct Run<'a> {
    pub(crate) host: &'a Host,
    pub(crate) output: Output,
    pub(crate) cancel: &'a CancellationToken,
}

impl Run<'_> {
    /// Waits for something that undoes itself when it is dropped, or only looks.
    pub(crate) async fn or_cancelled<T>(
        &self,
        work: impl Future<Output = T>,
    ) -> Result<T, Failure> {
        self.or_left(work, "what had been begun was undone.").await
    }

    /// Waits for something of which this is to be said when it is dropped.
    pub(crate) async fn or_left<T>(
        &self,
        work: impl Future<Output = T>,
        what_then: &str,
    ) -> Result<T, Failure> {
        let cancelled = || Failure::from(anyhow!("Interrupted; {what_then}"));
        self.cancel.run_until_cancelled(work).await.ok_or_else(cancelled)
    }

    async fn create(&self, args: CreateArgs) -> CommandResult {
        let id = args.id;
        let options = create_options(args)?;
        let created = self.host.vm_create(id, &options, &Notices, self.cancel).await?;
        self.output.result(&json!(created), || {
            let mut text = format!("created VM {id}: {}\n", created.config.display());
            for (key, volume) in &created.disks {
                text.push_str(&format!("  {key}: {volume}\n"));
            }
            text
        });
        Ok(ExitCode::SUCCESS)
    }

    async fn start(&self, id: u32, paused: bool) -> CommandResult {
        let options = StartOptions { paused };
        let started = self.or_cancelled(self.host.vm_start(id, options)).await??;
        let value = json!({
            "id": id,
            "pid": started.process.pid,
            "start_time_ticks": started.process.start_time_ticks,
            "notices": started.notices,
        });
        if !self.output.is_json() {
            started.notices.iter().for_each(|notice| output::warning(&printable(notice)));
        }
        self.output
            .result(&value, || format!("started VM {id} (process {})\n", started.process.pid));
        Ok(ExitCode::SUCCESS)
    }

    async fn stop(&self, id: u32, timeout: Duration) -> CommandResult {
        let work = self.host.vm_stop(id, StopOptions { timeout });
        let stopped = self.or_left(work, "the guest may have been told to shut down.").await??;
        self.output.result(&json!({ "id": id, "stopped": stopped }), || {
            let how = match stopped {
                Stopped::NotRunning => "was not running",
                Stopped::Shutdown => "has shut down",
                Stopped::ShutdownInBackup => {
                    "has shut down; its QEMU ends with its backup or restore"
                }
                Stopped::Quit => "was switched off",
                Stopped::Killed => "was killed",
            };
            format!("VM {id} {how}\n")
        });
        Ok(ExitCode::SUCCESS)
    }

    async fn status(&self, id: Option<u32>) -> CommandResult {
        let (all, value) = match id {
            Some(id) => {
                let status = self.or_cancelled(self.host.vm_status(id)).await??;
                let value = json!(status);
                (vec![VmState::from(status)], value)
            }
            None => {
                let all = self.or_cancelled(self.host.vm_list()).await??;
                let value = json!(all);
                (all, value)
            }
        };
        let problems = all.iter().filter_map(|vm| {
            Some(format!("VM {}: {}", vm.status.id, printable(vm.problem.as_deref()?)))
        });
        problems.for_each(|problem| output::warning(&problem));
        self.output.result(&value, || {
            table(&["VMID", "NAME", "STATUS", "PID"], all.iter().map(status_row).collect())
        });
        let is_well = all.iter().all(|vm| vm.problem.is_none());
        Ok(if is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn backup(&self, args: BackupArgs) -> CommandResult {
        let plan = self.host.plan_backup(backup_request(args)?)?;
        let screen = Screen::new(self.output, plan.quiet);
        let report = self.host.backup(&plan, &screen, self.cancel).await?;
        drop(screen);
        let success = report.is_success();
        // The lines have said it all to people.
        self.output.result(&task_result(json!(report), success), String::new);
        Ok(if success { ExitCode::SUCCESS } else { ExitCode::from(GUEST_FAILED) })
    }

    async fn list(&self, storage: Option<&str>) -> CommandResult {
        let list = self.or_cancelled(self.host.list(storage)).await??;
        for problem in &list.problems {
            output::warning(&format!("{}: {}", problem.storage, printable(&problem.problem)));
        }
        self.output.result(&json!(list), || {
            let rows = list.archives.iter().map(|archive| {
                vec![
                    archive.volid.clone(),
                    archive.subtype.to_string(),
                    archive.vmid.to_string(),
                    archive.time.clone(),
                    size(archive.size_bytes),
                    archive.base.clone().unwrap_or_else(|| "-".to_owned()),
                    if archive.protected { "yes" } else { "-" }.to_owned(),
                    verified_text(archive.verified),
                    booted_text(archive.booted.as_ref()),
                    printable(archive.notes.as_deref().unwrap_or("-")),
                ]
            });
            let header = [
                "VOLID",
                "SUBTYPE",
                "VMID",
                "TIME",
                "SIZE",
                "BASE",
                "PROTECTED",
                "VERIFIED",
                "BOOTED",
                "NOTES",
            ];
            table(&header, rows.collect())
        });
        Ok(if list.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn show_config(&self, archive: &str, firewall: bool) -> CommandResult {
        let config = self.or_cancelled(self.host.show_config(archive)).await??;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let shown = if firewall {
            let missing = || anyhow!("The archive '{archive}' holds no firewall configuration.");
            text(config.firewall.as_deref().ok_or_else(missing)?)
        } else {
            text(&config.config)
        };
        let value = json!({
            "config": text(&config.config),
            "firewall": config.firewall.as_deref().map(text),
        });
        self.output.result(&value, || archived(&shown));
        Ok(ExitCode::SUCCESS)
    }

    async fn doctor(&self, fix: bool) -> CommandResult {
        let screen = Screen::new(self.output, false);
        // As if it were killed: its journals say where the next run goes on.
        let left = "what is not cleaned up yet is left to the next run.";
        let report = self.or_left(self.host.doctor(fix, &screen), left).await??;
        drop(screen);
        let healthy = report.is_healthy();
        self.output.result(&task_result(json!(report), healthy), || doctor_text(&report));
        Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn backup_request(args: BackupArgs) -> anyhow::Result<BackupRequest> {
    let mut settings = BackupSettings {
        storage: args.storage,
        jobs: args.jobs,
        bwlimit_kib_per_s: args.bwlimit,
        ionice: args.ionice,
        lockwait_minutes: args.lockwait,
        mode: args.mode,
        stopwait_minutes: args.stopwait,
        fleecing: args.fleecing,
        exclude_path: (!args.exclude_path.is_empty()).then_some(args.exclude_path),
        stdexcludes: args.stdexcludes.map(|flag| flag == 1),
        skip_unreadable: args.skip_unreadable.then_some(true),
        tmpdir: args.tmpdir,
        script: args.script,
        quiet: args.quiet.then_some(true),
        prune_backups: args.prune_backups,
        remove: args.remove,
        notes_template: args.notes_template,
        protected: args.protected.then_some(true),
        ..BackupSettings::default()
    };
    let chosen = settings.choose(args.ids, args.all, args.exclude, args.pool);
    chosen.map_err(|why| anyhow!(why))?;
    Ok(BackupRequest {
        settings,
        job: args.job,
        freeze: !args.no_freeze,
        buffer_size_bytes: args.buffer_size,
        granularity_bytes: args.granularity,
        buffer_total_bytes: args.buffer_total,
    })
}

/// The last line of a task's JSON.
pub(crate) fn task_result(mut report: Value, success: bool) -> Value {
    report["event"] = json!("result");
    report["success"] = json!(success);
    report
}

fn status_row(VmState { status, problem }: &VmState) -> Vec<String> {
    let state = match (&status.qmp_status, status.running) {
        _ if problem.is_some() => "FAULT".to_owned(),
        (Some(state), true) => state.clone(),
        (None, true) => "running (monitor busy)".to_owned(),
        (_, false) => "stopped".to_owned(),
    };
    let pid = status.process.map(|process| process.pid.to_string());
    vec![
        status.id.to_string(),
        printable(status.name.as_deref().unwrap_or("-")),
        state,
        pid.unwrap_or_else(|| "-".to_owned()),
    ]
}

fn doctor_text(report: &DoctorReport) -> String {
    let rows = report.checks.iter().map(|check| {
        let state = if check.ok { "ok" } else { "FAULT" };
        vec![state.to_owned(), check.name.clone(), printable(&check.found)]
    });
    let mut text = table(&["STATE", "CHECK", "FOUND"], rows.collect());
    for pending in &report.pending {
        let guest = pending.guest_id.map_or_else(|| "?".to_owned(), |id| id.to_string());
        let state = match (&pending.problem, pending.alive) {
            (Some(problem), _) => printable(problem),
            (None, true) => "still at work".to_owned(),
            (None, false) => "dead".to_owned(),
        };
        text.push_str(&format!("task of guest {guest}: {state} ({})\n", pending.journal.display()));
    }
    if let Some(recovered) = &report.recovered {
        text.push_str(&format!("cleaned up after {} dead tasks\n", recovered.cleared.len()));
        let images = report.swept.as_ref().map_or(0, |swept| swept.removed.len());
        text.push_str(&format!("removed {images} fleecing images that no task knew\n"));
        for left in &recovered.left {
            let reason = printable(&left.reason);
            text.push_str(&format!("left: {}: {reason}\n", left.journal.display()));
        }
    } else if report.pending.iter().any(|pending| !pending.alive) {
        text.push_str("`vzdump doctor --fix` cleans up after dead tasks\n");
    }
    text
}

fn create_options(args: CreateArgs) -> anyhow::Result<CreateOptions> {
    let mut keys = vec![
        ("memory", args.memory.to_string()),
        ("cores", args.cores.to_string()),
        ("serial0", "socket".to_owned()),
    ];
    keys.extend(args.name.map(|name| ("name", name)));
    if args.agent {
        keys.push(("agent", "1".to_owned()));
    }
    if args.kvm {
        keys.push(("kvm", "1".to_owned()));
    }
    if args.bus == Bus::Scsi {
        keys.push(("scsihw", "virtio-scsi-single".to_owned()));
    }
    let mut qemu_args = Vec::new();
    for (option, file) in [("-kernel", args.kernel), ("-initrd", args.initrd)] {
        if let Some(file) = file {
            qemu_args.push(format!("{option} {}", quoted(&existing(&file)?)));
        }
    }
    qemu_args.extend(args.append.map(|text| format!("-append {}", quoted(&text))));
    qemu_args.extend(args.args);
    if !qemu_args.is_empty() {
        keys.push(("args", qemu_args.join(" ")));
    }
    let copies = args.disk_from.into_iter().map(DiskContent::CopyOf);
    let disks = copies.chain(args.disk.into_iter().map(DiskContent::Empty)).collect();
    Ok(CreateOptions {
        keys: keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        disks,
        storage: args.storage,
        format: args.format.into(),
        bus: match args.bus {
            Bus::Virtio => "virtio",
            Bus::Scsi => "scsi",
            Bus::Sata => "sata",
            Bus::Ide => "ide",
        }
        .to_owned(),
        disk_options: args.disk_options,
        efi: args.efidisk,
        tpm: args.tpm,
    })
}

impl From<DiskFormat> for ImageFormat {
    fn from(format: DiskFormat) -> Self {
        match format {
            DiskFormat::Raw => Self::Raw,
            DiskFormat::Qcow2 => Self::Qcow2,
            DiskFormat::RawBitmaps => Self::RawBitmaps,
        }
    }
}

/// The absolute path of a file, because QEMU runs in another directory.
fn existing(file: &Path) -> anyhow::Result<String> {
    let path: PathBuf =
        file.canonicalize().with_context(|| format!("cannot use '{}'", file.display()))?;
    path.into_os_string().into_string().map_err(|path| anyhow!("{path:?} is not text (UTF-8)"))
}

/// One word for the splitting of `args`.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn a_kernel_becomes_arguments_of_qemu() {
        let cli = Cli::parse_from([
            "vzdump",
            "vm",
            "create",
            "100",
            "--kernel",
            "/bin/sh",
            "--append",
            "a='b' c",
            "--args",
            "-no-reboot",
            "--bus",
            "scsi",
            "--disk",
            "1G",
            "--disk-from",
            "/x",
        ]);
        let Command::Vm(VmCommand::Create(args)) = cli.command else { panic!("another command") };
        let options = create_options(*args).unwrap();
        let get = |key: &str| options.keys.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        let kernel = existing(Path::new("/bin/sh")).unwrap();
        let expected = format!("-kernel '{kernel}' -append 'a='\\''b'\\'' c' -no-reboot");
        assert_eq!(get("args"), Some(expected.as_str()));
        assert_eq!(get("scsihw"), Some("virtio-scsi-single"));
        let disks = [DiskContent::CopyOf("/x".into()), DiskContent::Empty(1 << 30)];
        assert_eq!(options.disks, disks);
    }
}
