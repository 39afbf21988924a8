// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask demo`: builds everything and runs the demo of the main job.

use std::process::{ExitCode, Stdio};

use anyhow::{Context, Result};

use crate::cargo::{QEMU_BIN_ENV, build, cargo};
use crate::paths::Paths;
use crate::{qemu, setup};

/// Shows backup, increment and restore of a running guest.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Passed to the demo, for example --keep
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    args: Vec<String>,
}

pub(crate) fn run(paths: &Paths, options: &Options) -> Result<ExitCode> {
    setup::run()?;
    qemu::run(paths, &qemu::Options::default())?;
    let programs = ["--release", "--package", "vzdump", "--package", "system-tests", "--bins"];
    build(paths, "build vzdump and the demo", "demo-build.log", &programs)?;
    // The demo talks to the terminal itself, and may be stopped there.
    let status = cargo(
        paths,
        &["run", "--quiet", "--release", "--package", "system-tests", "--bin", "demo", "--"],
    )
    .env(QEMU_BIN_ENV, paths.qemu_bin())
    .args(&options.args)
    .stdin(Stdio::null())
    .status()
    .context("cargo: cannot start")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
