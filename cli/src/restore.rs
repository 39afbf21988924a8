// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vzdump restore`.

use std::process::ExitCode;

use anyhow::ensure;
use serde_json::json;
use vzdump_host::{DiskChoice, RestorePlan, RestoreRequest, size};

use crate::args::RestoreArgs;
use crate::commands::{CommandResult, GUEST_FAILED, Run, task_result};
use crate::output::{self, printable};
use crate::task::Screen;

impl Run<'_> {
    pub(crate) async fn restore(&self, args: RestoreArgs) -> CommandResult {
        let dry_run = args.dry_run;
        let request = request(args)?;
        if dry_run {
            return self.plan_restore(request).await;
        }
        let screen = Screen::new(self.output, false);
        let report = self.host.restore(request, &screen, self.cancel).await?;
        drop(screen);
        let success = report.is_success();
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

fn request(args: RestoreArgs) -> anyhow::Result<RestoreRequest> {
    let disks: anyhow::Result<Vec<_>> = args.disks.iter().map(|text| disk_choice(text)).collect();
    Ok(RestoreRequest {
        archive: args.archive,
        id: args.id,
        disks: disks?,
        storage: args.storage,
        format: args.format.map(Into::into),
        force: args.force,
        in_place: args.in_place,
        unique: args.unique,
        parallel: Some(args.parallel),
        bwlimit_kib_per_s: args.bwlimit,
        start: args.start,
        allow_raw_config: args.allow_raw_config,
        overcommit: args.overcommit,
    })
}

fn disk_choice(text: &str) -> anyhow::Result<DiskChoice> {
    let (device, target) = match text.split_once('=') {
        Some((device, target)) => (device, Some(target)),
        None => (text, None),
    };
    let is_complete = !device.is_empty() && target.is_none_or(|target| !target.is_empty());
    ensure!(is_complete, "'--disk {text}': a disk such as scsi0 is needed, or scsi0=TARGET");
    Ok(DiskChoice { device: device.to_owned(), target: target.map(str::to_owned) })
}

fn plan_text(plan: &RestorePlan) -> String {
    let what = if plan.replaces { "changes the VM" } else { "makes the VM" };
    let mut text = format!("{what} {} from {}\n", plan.id, printable(&plan.archive));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_chosen_with_or_without_a_target() {
        let choice = disk_choice("scsi0").unwrap();
        assert_eq!((choice.device.as_str(), choice.target), ("scsi0", None));
        let choice = disk_choice("scsi0=local:100/vm-100-disk-0.raw").unwrap();
        assert_eq!(choice.target.as_deref(), Some("local:100/vm-100-disk-0.raw"));
        assert!(disk_choice("=scsi0").is_err() && disk_choice("scsi0=").is_err());
    }
}
