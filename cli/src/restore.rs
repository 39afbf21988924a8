// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vzdump restore`.

use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use serde_json::json;
use vzdump_host::{
    DiskChoice, DiskToFile, FileRestoreRequest, ImageFormat, RestorePlan, RestoreReport,
    RestoreRequest, size,
};

use crate::args::{RestoreArgs, RestoredFormat};
use crate::commands::{CommandResult, GUEST_FAILED, Run, task_result};
use crate::output::{self, printable};
use crate::task::Screen;

impl Run<'_> {
    pub(crate) async fn restore(&self, args: RestoreArgs) -> CommandResult {
        if let Some(id) = args.resume {
            return self.resume_restore(id, args.bwlimit).await;
        }
        if let Some(id) = args.give_up {
            return self.give_up_restore(id).await;
        }
        let targets: anyhow::Result<Vec<Target>> =
            args.disks.iter().map(|text| target(text)).collect();
        let targets = targets?;
        if targets.iter().any(|target| matches!(target, Target::File(_))) {
            return self.restore_to_files(args, targets).await;
        }
        let dry_run = args.dry_run;
        let request = request(args, targets)?;
        if dry_run {
            return self.plan_restore(request).await;
        }
        let screen = Screen::new(self.output, false);
        let report = self.host.restore(request, &screen, self.cancel).await?;
        drop(screen);
        Ok(self.restored(&report))
    }

    async fn resume_restore(&self, id: u32, bwlimit: Option<u64>) -> CommandResult {
        let screen = Screen::new(self.output, false);
        let report = self.host.resume_restore(id, bwlimit, &screen, self.cancel).await?;
        drop(screen);
        Ok(self.restored(&report))
    }

    async fn give_up_restore(&self, id: u32) -> CommandResult {
        let screen = Screen::new(self.output, false);
        self.host.give_up_restore(id, &screen).await?;
        drop(screen);
        let result = task_result(json!({ "id": id }), true);
        self.output.result(&result, || format!("VM {id} is removed\n"));
        Ok(ExitCode::SUCCESS)
    }

    fn restored(&self, report: &RestoreReport) -> ExitCode {
        let success = report.is_success();
        self.output.result(&task_result(json!(report), success), String::new);
        if success { ExitCode::SUCCESS } else { ExitCode::from(GUEST_FAILED) }
    }

    async fn restore_to_files(&self, args: RestoreArgs, targets: Vec<Target>) -> CommandResult {
        let request = file_request(args, targets)?;
        let screen = Screen::new(self.output, false);
        let report = self.host.restore_to_files(request, &screen, self.cancel).await?;
        drop(screen);
        let success = report.error.is_none();
        self.output.result(&task_result(json!(report), success), String::new);
        Ok(if success { ExitCode::SUCCESS } else { ExitCode::from(GUEST_FAILED) })
    }

    async fn plan_restore(&self, request: RestoreRequest) -> CommandResult {
        let plan = self.host.plan_restore(request, self.cancel).await?;
        if !self.output.is_json() {
            plan.warnings.iter().for_each(|warning| output::warning(&printable(warning)));
        }
        self.output.result(&json!(plan), || plan_text(&plan));
        Ok(if plan.problem.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

const NO_GUEST: &str = "the number of the guest is missing, behind the archive; if disks are to go to files, write \
                        their paths with a slash or `./` in front";

/// Where one disk goes.
#[derive(Debug)]
enum Target {
    Guest(DiskChoice),
    File(DiskToFile),
}

fn request(args: RestoreArgs, targets: Vec<Target>) -> anyhow::Result<RestoreRequest> {
    let disks = targets.into_iter().filter_map(|target| match target {
        Target::Guest(choice) => Some(choice),
        Target::File(_) => None,
    });
    Ok(RestoreRequest {
        archive: args.archive.context("the archive is missing")?,
        id: args.id.context(NO_GUEST)?,
        disks: disks.collect(),
        storage: args.storage,
        format: args.format.map(Into::into),
        force: args.force,
        in_place: args.in_place,
        unique: args.unique,
        parallel: args.parallel,
        bwlimit_kib_per_s: args.bwlimit,
        start: args.start,
        live: args.live,
        allow_raw_config: args.allow_raw_config,
        overcommit: args.overcommit,
        privileged: args.privileged,
    })
}

fn file_request(args: RestoreArgs, targets: Vec<Target>) -> anyhow::Result<FileRestoreRequest> {
    let only_guests = args.id.is_some()
        || args.storage.is_some()
        || args.start
        || args.dry_run
        || args.overcommit
        || args.allow_raw_config
        || args.privileged;
    ensure!(
        !only_guests,
        "disks that go to files need no guest: leave out its number, --storage, --start, --dry-run, \
         --overcommit, --allow-raw-config and --privileged"
    );
    ensure!(args.parallel.is_none(), "disks go to files one after the other: leave out --parallel");
    let mut disks = Vec::new();
    for target in targets {
        match target {
            Target::File(disk) => disks.push(disk),
            Target::Guest(choice) => {
                bail!("disks go to files or to a guest, not both at once: '{}'", choice.device)
            }
        }
    }
    Ok(FileRestoreRequest {
        archive: args.archive.context("the archive is missing")?,
        disks,
        format: args.format.map(Into::into),
        force: args.force,
        bwlimit_kib_per_s: args.bwlimit,
    })
}

fn target(text: &str) -> anyhow::Result<Target> {
    let (device, target) = match text.split_once('=') {
        Some((device, target)) => (device.to_owned(), Some(target)),
        None => (text.to_owned(), None),
    };
    let is_complete = !device.is_empty() && target.is_none_or(|target| !target.is_empty());
    ensure!(is_complete, "'--disk {text}': a disk such as scsi0 is needed, or scsi0=TARGET");
    Ok(match target {
        Some(path) if ["/", "./", "../"].iter().any(|start| path.starts_with(start)) => {
            let path = std::path::absolute(path).with_context(|| format!("'--disk {text}'"))?;
            Target::File(DiskToFile { device, path })
        }
        _ => Target::Guest(DiskChoice { device, target: target.map(str::to_owned) }),
    })
}

fn plan_text(plan: &RestorePlan) -> String {
    let what = if plan.replaces { "changes" } else { "makes" };
    let guest = match plan.privileged {
        None => "VM",
        Some(false) => "unprivileged container",
        Some(true) => "privileged container",
    };
    let mut text = format!("{what} the {guest} {} from {}\n", plan.id, printable(&plan.archive));
    if plan.live {
        text.push_str("  live     the VM starts at once; its disks are filled while it runs\n");
    }
    for disk in &plan.disks {
        let from = match disk.device == disk.key {
            true => String::new(),
            false => format!(" (from '{}')", disk.device),
        };
        text.push_str(&format!(
            "  new      {}{from}: {} as {} on '{}'\n",
            disk.key,
            size(disk.size_bytes),
            disk.format,
            disk.storage
        ));
    }
    for volume in &plan.removed {
        text.push_str(&format!("  removed  {}\n", printable(volume)));
    }
    for (key, value) in &plan.stays {
        text.push_str(&format!("  stays    {key}: {}\n", printable(value)));
    }
    for volume in &plan.unused {
        text.push_str(&format!("  unused   {}\n", printable(volume)));
    }
    for pool in &plan.space {
        let storages: Vec<&str> = pool.storages.iter().map(String::as_str).collect();
        text.push_str(&format!(
            "  space    {}: up to {} of {} free\n",
            storages.join(", "),
            size(pool.needed_bytes),
            size(pool.available_bytes.saturating_add(pool.freed_bytes))
        ));
    }
    if plan.firewall {
        text.push_str("  firewall rules of the archive\n");
    }
    if let Some(problem) = &plan.problem {
        text.push_str(&format!("  refused: {problem}\n"));
    }
    text.push_str("configuration:\n");
    for line in plan.config.lines() {
        text.push_str(&format!("  {}\n", printable(line)));
    }
    text
}

impl From<RestoredFormat> for ImageFormat {
    fn from(format: RestoredFormat) -> Self {
        match format {
            RestoredFormat::Raw => Self::Raw,
            RestoredFormat::Qcow2 => Self::Qcow2,
            RestoredFormat::RawBitmaps => Self::RawBitmaps,
            RestoredFormat::Subvol => Self::Subvol,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    #[test]
    fn a_disk_is_chosen_with_or_without_a_target() {
        let guest = |text: &str| match target(text).unwrap() {
            Target::Guest(choice) => (choice.device, choice.target),
            Target::File(file) => panic!("{file:?}"),
        };
        assert_eq!(guest("scsi0"), ("scsi0".to_owned(), None));
        let volume = "local:100/vm-100-disk-0.raw";
        let expected = ("scsi0".to_owned(), Some(volume.to_owned()));
        assert_eq!(guest(&format!("scsi0={volume}")), expected);
        for path in ["/dev/vdb", "./disk.raw", "../disk.raw"] {
            let Target::File(file) = target(&format!("scsi0={path}")).unwrap() else { panic!() };
            assert!(file.path.is_absolute(), "{file:?}");
        }
        assert!(target("=scsi0").is_err() && target("scsi0=").is_err());
    }

    #[test]
    fn disks_that_go_to_files_take_no_option_that_would_be_forgotten() {
        let request = |options: &[&str]| {
            let words = [&["vzdump", "restore", "a", "--disk", "scsi0=/a"], options].concat();
            let Command::Restore(args) = Cli::try_parse_from(words).unwrap().command else {
                panic!()
            };
            file_request(args, vec![target("scsi0=/a").unwrap()]).map_err(|why| why.to_string())
        };
        assert!(request(&["--force", "--format", "raw", "--bwlimit", "1"]).is_ok());
        for options in [&["--privileged"][..], &["--start"], &["--parallel", "4"]] {
            let error = request(options).unwrap_err();
            assert!(error.contains(options[0]), "{error}");
        }
    }
}
