// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask fidelity`: files go through the backup and the restore of a container, and are compared.

use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::bench::asks_only;
use crate::cargo::{QEMU_BIN_ENV, build};
use crate::paths::Paths;
use crate::run::{Show, Step};
use crate::{qemu, setup};

const PROGRAMS: [&str; 8] =
    ["--package", "vzdump", "--bin", "vzdump", "--package", "system-tests", "--bin", "fidelity"];
/// Two trees in three modes each.
const LIMIT: Duration = Duration::from_secs(1800);

/// Compares a tree of odd things and a Debian with what a restore brings back of them.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Passed to the program: --only TREE, --mode MODE, --privileged, --keep, see --help
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    args: Vec<String>,
}

pub(crate) fn run(paths: &Paths, options: &Options) -> Result<ExitCode> {
    if !asks_only(&options.args) {
        setup::run()?;
        qemu::run(paths, &qemu::Options::default())?;
    }
    build_programs(paths)?;
    // The program talks to the terminal itself, and may be stopped there.
    let status = program(paths).args(&options.args).stdin(Stdio::null()).status();
    let ok = status.context("fidelity: cannot start")?.success();
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The same as a step of the long suites, once for each kind of container; whether all was right.
pub(crate) fn check(paths: &Paths, is_privileged: bool) -> Result<bool> {
    build_programs(paths)?;
    let kind = if is_privileged { "privileged" } else { "unprivileged" };
    let step = Step {
        name: "fidelity",
        log: paths.logs().join(format!("test-fidelity-{kind}.log")),
        show: Show::All,
        limit: LIMIT,
    };
    let mut command = program(paths);
    command.args(is_privileged.then_some("--privileged"));
    Ok(step.watch(command, |_| ())?.ok())
}

fn build_programs(paths: &Paths) -> Result<()> {
    build(paths, "build vzdump and the comparison", "fidelity-build.log", &PROGRAMS)
}

fn program(paths: &Paths) -> Command {
    let mut command = Command::new(paths.root.join("target/debug/fidelity"));
    command.env(QEMU_BIN_ENV, paths.qemu_bin());
    command
}
