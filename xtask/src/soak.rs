// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask soak`: random backup accesses with faults, kills and guest I/O, for a while.

use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cargo::{QEMU_BIN_ENV, build, cargo};
use crate::paths::Paths;
use crate::run::{Show, Step};
use crate::{qemu, setup};

const PROGRAM: [&str; 5] = ["--release", "--package", "system-tests", "--bin", "soak"];
/// Beyond the minutes that were asked for: the last episode, and what a busy machine takes.
const MARGIN: Duration = Duration::from_secs(900);

/// Runs backup accesses of several targets, with everything that may happen to them.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct Options {
    /// For how long episodes begin
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MINUTES)]
    minutes: u32,
    /// Seed of the first episode; the next one's is larger by one (default: random)
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// At most so many episodes: with 1, --seed repeats one alone
    #[arg(long, value_name = "N")]
    episodes: Option<u64>,
}

/// What the long suites do too.
pub(crate) const DEFAULT_MINUTES: u32 = 20;

impl Options {
    pub(crate) fn for_minutes(minutes: u32) -> Self {
        Self { minutes, seed: None, episodes: None }
    }

    fn arguments(self) -> Vec<String> {
        let mut arguments = vec!["--minutes".to_owned(), self.minutes.to_string()];
        for (name, value) in [("--seed", self.seed), ("--episodes", self.episodes)] {
            arguments.extend(
                value.map(|value| [name.to_owned(), value.to_string()]).into_iter().flatten(),
            );
        }
        arguments
    }
}

pub(crate) fn run(paths: &Paths, options: Options) -> Result<ExitCode> {
    setup::run()?;
    qemu::run(paths, &qemu::Options::default())?;
    build_soak(paths)?;
    // The program talks to the terminal itself, and may be stopped there.
    let status = program(paths, options).stdin(Stdio::null()).status();
    let ok = status.context("cargo: cannot start")?.success();
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The same as a step of the long suites, on a QEMU that is there; whether all was right.
pub(crate) fn check(paths: &Paths, options: Options) -> Result<bool> {
    build_soak(paths)?;
    let step = Step {
        name: "soak",
        log: paths.logs().join("test-soak.log"),
        show: Show::All,
        limit: Duration::from_secs(u64::from(options.minutes) * 60) + MARGIN,
    };
    Ok(step.watch(program(paths, options), |_| ())?.ok())
}

fn build_soak(paths: &Paths) -> Result<()> {
    build(paths, "build the soak", "soak-build.log", &PROGRAM)
}

fn program(paths: &Paths, options: Options) -> Command {
    let mut command = cargo(paths, &[&["run", "--quiet"], &PROGRAM[..], &["--"]].concat());
    command.env(QEMU_BIN_ENV, paths.qemu_bin()).args(options.arguments());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_asked_for_is_passed_on() {
        assert_eq!(Options::for_minutes(7).arguments(), ["--minutes", "7"]);
        let options = Options { minutes: 1, seed: Some(5), episodes: Some(2) };
        let expected = ["--minutes", "1", "--seed", "5", "--episodes", "2"];
        assert_eq!(options.arguments(), expected);
    }
}
