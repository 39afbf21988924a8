// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask bench`: builds what is measured and the program that measures it, and runs it.

use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cargo::{QEMU_BIN_ENV, cargo};
use crate::paths::Paths;
use crate::run::{Show, Step};
use crate::{qemu, setup};

/// Measures what a backup costs.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Guest I/O during a backup, side by side: none, QEMU's own filter, ours
    #[command(disable_help_flag = true)]
    Fleecing {
        /// Passed to the program: --full, --only PATTERN, --rounds N …, see --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<String>,
    },
}

pub(crate) fn run(paths: &Paths, options: &Options) -> Result<ExitCode> {
    let What::Fleecing { args } = &options.what;
    let asks_only = args.iter().any(|arg| ["--help", "-h", "--list"].contains(&arg.as_str()));
    if !asks_only {
        setup::run_for_benchmarks()?;
        qemu::run(paths, &qemu::Options::default())?;
    }
    let package = ["--release", "--package", "benches", "--bin", "fleecing-bench"];
    Step {
        name: "build the benchmark",
        log: paths.logs().join("bench-build.log"),
        show: Show::Progress,
        limit: Duration::from_secs(3600),
    }
    .run(cargo(paths, &[&["build"], &package[..]].concat()))?;
    // The program talks to the terminal itself, and may be stopped there.
    let status = cargo(paths, &[&["run", "--quiet"], &package[..], &["--"]].concat())
        .env(QEMU_BIN_ENV, paths.qemu_bin())
        .args(args)
        .stdin(Stdio::null())
        .status()
        .context("cargo: cannot start")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
