// SPDX-License-Identifier: MIT OR Apache-2.0
//! The commands for those who write providers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::anyhow;
use serde_json::json;
use vzdump_host::{
    CancellationToken, Host, KIT_SIZE_BYTES_MAX, KIT_SIZE_BYTES_MIN, KitReport, KitRequest,
    Language, Outcome, Overrides, check_provider, new_provider, size,
};

use crate::args::{CheckArgs, NewLanguage};
use crate::commands::{CommandResult, task_result};
use crate::output::{Output, printable, table};
use crate::task::Screen;

/// Writes a new provider.
pub(crate) fn new(dir: &Path, language: NewLanguage, output: Output) -> CommandResult {
    let language = match language {
        NewLanguage::Python => Language::Python,
        NewLanguage::Rust => Language::Rust,
    };
    let files = new_provider(dir, language)?;
    output.result(&json!({"files": files}), || {
        let lines = files.iter().map(|file| format!("wrote {}\n", file.display()));
        lines.collect::<String>() + "README.md says how to try it.\n"
    });
    Ok(ExitCode::SUCCESS)
}

/// Checks a provider. Fails if it does not keep the contract.
pub(crate) async fn check(
    root: Option<PathBuf>,
    overrides: Overrides,
    args: CheckArgs,
    output: Output,
    cancel: &CancellationToken,
) -> CommandResult {
    let allowed = KIT_SIZE_BYTES_MIN..=KIT_SIZE_BYTES_MAX;
    if let Some(wanted) = args.size.filter(|size| !allowed.contains(size)) {
        let (least, most) = (size(KIT_SIZE_BYTES_MIN), size(KIT_SIZE_BYTES_MAX));
        let wanted = size(wanted);
        return Err(anyhow!("--size {wanted}: disks of {least} to {most} are simulated").into());
    }
    let request = KitRequest {
        storage: args.storage,
        only: args.only,
        size_bytes: args.size,
        chain_steps: args.chain,
        seed: args.seed,
        data_dir: args.data_dir,
        is_real: args.real,
    };
    let screen = Screen::new(output, false);
    let open = Arc::new(move || Host::open(root.clone(), &overrides));
    let report = check_provider(open, request, &screen, cancel).await?;
    drop(screen);
    let success = report.is_success();
    output.result(&task_result(json!(report), success), || text(&report));
    Ok(if success { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(report: &KitReport) -> String {
    let rows = report.checks.iter().map(|check| {
        let result = match &check.outcome {
            Outcome::Passed { .. } => "passed".to_owned(),
            Outcome::Failed { .. } => "FAILED".to_owned(),
            Outcome::NotSupported { capability } => format!("not supported ({capability})"),
            Outcome::NotTested { .. } => "not tested".to_owned(),
        };
        vec![check.name.clone(), check.title.clone(), result, format!("{} ms", check.elapsed_ms)]
    });
    let mut text = table(&["CHECK", "WHAT", "RESULT", "TIME"], rows.collect());
    for check in &report.checks {
        text.push_str(&details(&check.name, &check.outcome));
    }
    text.push_str(&remarks(report));
    for archive in &report.left {
        text.push_str(&format!("left in the storage: {}\n", printable(archive)));
    }
    let counts = report.counts();
    text.push_str(&format!(
        "{}: {} ({} passed, {} failed, {} not supported, {} not tested; {}; --seed {})\n",
        printable(&report.provider),
        report.grade,
        counts.passed,
        counts.failed,
        counts.not_supported,
        counts.not_tested,
        report.source,
        report.seed
    ));
    text
}

/// Each remark once, with the checks that made it.
fn remarks(report: &KitReport) -> String {
    let mut by_text: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for check in &report.checks {
        if let Outcome::Passed { remarks } = &check.outcome {
            for remark in remarks {
                by_text.entry(remark).or_default().push(&check.name);
            }
        }
    }
    let lines = by_text
        .iter()
        .map(|(text, names)| format!("remark: {} ({})\n", printable(text), names.join(", ")));
    lines.collect()
}

/// What there is to say of a check beside its result.
fn details(name: &str, outcome: &Outcome) -> String {
    let mut text = String::new();
    match outcome {
        Outcome::Failed { why, advice } => {
            text.push_str(&format!("{name}: {}\n", printable(why)));
            if let Some(advice) = advice {
                text.push_str(&format!("  what to do: {}\n", printable(advice)));
            }
        }
        Outcome::NotTested { why } => text.push_str(&format!("{name}: {}\n", printable(why))),
        Outcome::Passed { .. } | Outcome::NotSupported { .. } => {}
    }
    text
}
