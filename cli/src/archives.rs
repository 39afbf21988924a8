// SPDX-License-Identifier: MIT OR Apache-2.0
//! The commands for archives: verify, prune, remove, notes, protect, unprotect.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use vzdump_host::{
    BootReport, BootRequest, Booted, Fate, GuestKind, PruneReport, PruneRequest, PrunedArchive,
    Verified, VerifyExtent, VerifyRequest, VerifyResult, VerifySummary, random_seed, size, utc,
};

use crate::args::{Kind, PruneArgs, VerifyArgs};
use crate::commands::{CommandResult, Run, task_result};
use crate::output::{self, archived, printable, table};
use crate::task::Screen;

impl Run<'_> {
    pub(crate) async fn verify(&self, args: VerifyArgs) -> CommandResult {
        if args.boot {
            return self.boot(args).await;
        }
        let extent = args.sample.map_or(VerifyExtent::All, |percent| VerifyExtent::Sample {
            percent,
            seed: args.seed.unwrap_or_else(random_seed),
        });
        let request = VerifyRequest {
            archives: args.archives,
            storage: args.storage,
            guests: args.guest,
            extent,
            not_since_days: args.not_since,
        };
        let screen = Screen::new(self.output, false);
        let summary = self.host.verify(request, &screen, self.cancel).await?;
        drop(screen);
        let success = summary.is_success();
        self.output.result(&task_result(json!(summary), success), || verify_text(&summary));
        Ok(if success { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn boot(&self, args: VerifyArgs) -> CommandResult {
        let request = BootRequest {
            archives: args.archives,
            timeout: Duration::from_secs(args.boot_timeout),
            console: args.boot_console,
            allow_raw_config: args.allow_raw_config,
        };
        let screen = Screen::new(self.output, false);
        let reports = self.host.boot(&request, &screen, self.cancel).await?;
        drop(screen);
        let success = reports.iter().all(|report| report.ready);
        let value = json!({ "archives": reports });
        self.output.result(&task_result(value, success), || boot_text(&reports));
        Ok(if success { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    pub(crate) async fn prune(&self, args: PruneArgs) -> CommandResult {
        let request = PruneRequest {
            ids: args.ids,
            kind: args.kind.map(Into::into),
            storage: args.storage,
            retention: args.keep.retention(),
            dry_run: args.dry_run,
        };
        let screen = Screen::new(self.output, false);
        let report = self.host.prune(request, &screen, self.cancel).await?;
        drop(screen);
        for problem in &report.problems {
            output::warning(&printable(problem));
        }
        let success = report.is_success();
        self.output.result(&task_result(json!(report), success), || prune_text(&report));
        Ok(if success { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    pub(crate) async fn remove(&self, archive: &str) -> CommandResult {
        let removed = self.host.remove_archive(archive, self.cancel).await?.to_string();
        self.output.result(&json!({ "volid": removed, "removed": true }), || {
            format!("removed '{removed}'\n")
        });
        Ok(ExitCode::SUCCESS)
    }

    pub(crate) async fn show_log(&self, archive: &str) -> CommandResult {
        let log = self.or_cancelled(self.host.log(archive)).await??;
        self.output.result(&json!({ "log": log }), || {
            let end = if log.is_empty() || log.ends_with('\n') { "" } else { "\n" };
            format!("{}{end}", archived(&log))
        });
        Ok(ExitCode::SUCCESS)
    }

    pub(crate) async fn notes(&self, archive: &str, text: Option<&str>) -> CommandResult {
        let Some(text) = text else {
            let notes = self.or_cancelled(self.host.notes(archive)).await??;
            self.output.result(&json!({ "notes": notes }), || {
                let end = if notes.is_empty() || notes.ends_with('\n') { "" } else { "\n" };
                format!("{}{end}", archived(&notes))
            });
            return Ok(ExitCode::SUCCESS);
        };
        let changed = self.host.set_notes(archive, text).await?.to_string();
        self.output.result(&json!({ "volid": changed, "notes": text }), || {
            format!("changed the notes of '{changed}'\n")
        });
        Ok(ExitCode::SUCCESS)
    }

    pub(crate) async fn protect(&self, archive: &str, protected: bool) -> CommandResult {
        let changed = self.host.set_protected(archive, protected).await?.to_string();
        self.output.result(&json!({ "volid": changed, "protected": protected }), || {
            let now = if protected { "protected" } else { "no longer protected" };
            format!("'{changed}' is {now}\n")
        });
        Ok(ExitCode::SUCCESS)
    }
}

fn verify_text(summary: &VerifySummary) -> String {
    let rows = summary.archives.iter().map(|archive| {
        let result = match &archive.result {
            VerifyResult::Sound => "sound".to_owned(),
            VerifyResult::Damaged { damage_count, .. } => format!("DAMAGED ({damage_count})"),
            VerifyResult::Skipped => "skipped (verified lately)".to_owned(),
            VerifyResult::Gone => "removed meanwhile".to_owned(),
            VerifyResult::Failed { error } => format!("FAILED: {}", printable(error)),
        };
        vec![archive.volid.clone(), size(archive.read_bytes), result]
    });
    let mut text = table(&["VOLID", "READ", "RESULT"], rows.collect());
    if let VerifyExtent::Sample { percent, seed } = summary.extent {
        text.push_str(&format!("a sample of {percent} %; --seed {seed} reads the same again\n"));
    }
    text
}

fn boot_text(reports: &[BootReport]) -> String {
    let rows = reports.iter().map(|report| {
        let result = match (report.ready_ms, report.is_untested) {
            (Some(ms), _) => format!("ready after {:.1} s", ms as f64 / 1000.0),
            (None, false) => "NOT READY".to_owned(),
            (None, true) => "not tested".to_owned(),
        };
        let picture = report.screenshot.as_ref().map(|path| path.display().to_string());
        vec![report.archive.clone(), result, picture.unwrap_or_else(|| "-".to_owned())]
    });
    table(&["VOLID", "RESULT", "SCREENSHOT"], rows.collect())
}

/// What the last test of this host said of an archive.
pub(crate) fn booted_text(booted: Option<&Booted>) -> String {
    let Some(Booted { time_s, ready_ms, .. }) = booted else { return "-".to_owned() };
    let time = utc(*time_s).unwrap_or_else(|| "?".to_owned());
    match ready_ms {
        Some(ms) => format!("{time} {:.1}s", *ms as f64 / 1000.0),
        None => format!("{time} NOT READY"),
    }
}

/// When an archive was verified last, how much of it if not all, and whether it was damaged.
pub(crate) fn verified_text(verified: Option<Verified>) -> String {
    let Some(Verified { time_s, extent, damage_count }) = verified else {
        return "-".to_owned();
    };
    let mut text = utc(time_s).unwrap_or_else(|| "?".to_owned());
    if let VerifyExtent::Sample { percent, .. } = extent {
        text.push_str(&format!(" {percent}%"));
    }
    if damage_count > 0 {
        text.push_str(" DAMAGED");
    }
    text
}

fn prune_text(report: &PruneReport) -> String {
    let rows = report.archives.iter().map(|archive| {
        vec![
            archive.volid.clone(),
            archive.subtype.to_string(),
            archive.vmid.to_string(),
            archive.time.clone(),
            mark(archive, report.dry_run),
        ]
    });
    let mut text = table(&["VOLID", "SUBTYPE", "VMID", "TIME", "RESULT"], rows.collect());
    let goes = |archive: &&PrunedArchive| match archive.fate {
        Fate::Removed => true,
        Fate::Remove => report.dry_run,
        _ => false,
    };
    let gone = report.archives.iter().filter(goes).count();
    let (storage, rules) = (&report.storage, &report.retention);
    let verb = if report.dry_run { "would be removed" } else { "removed" };
    text.push_str(&format!("{gone} archives of '{storage}' {verb} ({rules})\n"));
    text
}

fn mark(archive: &PrunedArchive, dry_run: bool) -> String {
    match &archive.fate {
        Fate::Keep { rule } => format!("keep ({rule})"),
        Fate::Protected => "protected".to_owned(),
        Fate::Undated => "keep (its time is impossible)".to_owned(),
        Fate::New => "keep (new)".to_owned(),
        Fate::Remove if dry_run => "remove".to_owned(),
        Fate::Remove => "not removed".to_owned(),
        Fate::Removed => "removed".to_owned(),
        Fate::Needed { by } => format!("keep (needed by {})", printable(&by.join(", "))),
        Fate::Failed { error } => format!("FAILED: {}", printable(error)),
    }
}

impl From<Kind> for GuestKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Qemu => Self::Qemu,
            Kind::Lxc => Self::Lxc,
        }
    }
}
