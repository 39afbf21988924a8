// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask tidy`: the repository's own rules, checked as tests.

mod deps;
mod files;
mod lexer;
mod qapi;
mod scenarios;

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

pub(crate) use lexer::code_only;

use crate::cargo::cargo;
use crate::paths::Paths;
use crate::run::output;

/// One rule and what breaks it.
pub(crate) struct Rule {
    pub(crate) name: &'static str,
    pub(crate) broken: Vec<String>,
}

/// Prints what breaks a rule; fails if anything does.
pub(crate) fn run(paths: &Paths) -> Result<ExitCode> {
    let broken = report(paths)?.1;
    Ok(if broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints every rule with what breaks it; returns how many rules hold and how many do not.
pub(crate) fn report(paths: &Paths) -> Result<(u64, u64)> {
    let metadata = output(&mut cargo(
        paths,
        &["metadata", "--format-version", "1", "--no-deps", "--offline"],
    ))?;
    let mut rules = deps::check(&metadata)?;
    let files = tracked_files(paths)?;
    rules.extend(files::check(&paths.root, &files)?);
    rules.push(qapi::check(&paths.root, &files)?);
    rules.push(scenarios::check(&paths.root, &files)?);
    let mut counts = (0, 0);
    for rule in &rules {
        if rule.broken.is_empty() {
            counts.0 += 1;
            println!("ok      {}", rule.name);
        } else {
            counts.1 += 1;
            println!("BROKEN  {}", rule.name);
            for line in &rule.broken {
                println!("        {line}");
            }
        }
    }
    Ok(counts)
}

/// Every file that is or could be committed, relative to the top.
fn tracked_files(paths: &Paths) -> Result<Vec<String>> {
    let mut git = Command::new("git");
    // The gate's clone may belong to another user.
    git.args(["-c", "safe.directory=*"]);
    git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let list =
        output(git.current_dir(&paths.root)).context("cannot list the repository's files")?;
    let mut files: Vec<String> =
        list.split('\0').filter(|file| !file.is_empty()).map(str::to_string).collect();
    // A deleted file stays in the index until it is committed.
    files.retain(|file| paths.root.join(file).is_file());
    files.sort();
    files.dedup();
    Ok(files)
}
