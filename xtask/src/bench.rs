// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask bench`: builds what is measured and the program that measures it, and runs it.

use std::ffi::OsString;
use std::fs;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cargo::{QEMU_BIN_ENV, build, cargo};
use crate::paths::Paths;
use crate::run::{Show, Step, output};
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
    /// Backups of a VM beside nbdcopy and qemu-img convert: full, increment, many disks
    #[command(disable_help_flag = true)]
    Vm {
        /// Passed to the program: --rounds N, --data MIB …, see --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<String>,
    },
    /// Backups of a container beside tar with zstd, rsync, borg and restic; needs root
    #[command(disable_help_flag = true)]
    Lxc {
        /// Passed to the program: --rounds N, --data MIB …, see --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<String>,
    },
    /// Backups by the directory provider, in process and over RPC, beside nbdcopy and qemu-img convert
    #[command(disable_help_flag = true)]
    Providers {
        /// Passed to the program: --rounds N, --disk-size MIB …, see --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<String>,
    },
    /// Restores beside qemu-img convert, and a guest's first answer from a live restore beside a full one
    #[command(disable_help_flag = true)]
    Restore {
        /// Passed to the program: --rounds N, --disk-size MIB …, see --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<String>,
    },
}

pub(crate) fn run(paths: &Paths, options: &Options) -> Result<ExitCode> {
    match &options.what {
        What::Fleecing { args } => fleecing(paths, args),
        What::Vm { args } => {
            let vzdump = ["--package", "vzdump", "--bin", "vzdump"];
            beside_tools(paths, "benches", "vm-bench", &vzdump, args)
        }
        What::Restore { args } => {
            let vzdump = ["--package", "vzdump", "--bin", "vzdump"];
            beside_tools(paths, "system-tests", "restore-bench", &vzdump, args)
        }
        What::Lxc { args } => {
            if !asks_only(args) {
                setup::run_for_benchmarks()?;
            }
            let vzdump = ["--package", "vzdump", "--bin", "vzdump"];
            beside_tools(paths, "benches", "lxc-bench", &vzdump, args)
        }
        What::Providers { args } => {
            let plugin = ["--bin", "directory-plugin"];
            beside_tools(paths, "benches", "providers-bench", &plugin, args)
        }
    }
}

/// How backups compare with plain copies: runs a program that needs another one beside it.
fn beside_tools(
    paths: &Paths,
    package: &str,
    program: &str,
    needed: &[&str],
    args: &[String],
) -> Result<ExitCode> {
    if !asks_only(args) {
        setup::run()?;
        qemu::run(paths, &qemu::Options::default())?;
    }
    let programs = [&["--release", "--package", package, "--bin", program], needed].concat();
    build_bench(paths, &programs)?;
    let status = Command::new(paths.root.join("target/release").join(program))
        .env(QEMU_BIN_ENV, paths.qemu_bin())
        .args(args)
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("{program}: cannot start"))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether a program is only to say something of itself, for which nothing else is needed.
pub(crate) fn asks_only(args: &[String]) -> bool {
    args.iter().any(|arg| ["--help", "-h", "--list"].contains(&arg.as_str()))
}

fn build_bench(paths: &Paths, programs: &[&str]) -> Result<()> {
    build(paths, "build the benchmark", "bench-build.log", programs)
}

fn fleecing(paths: &Paths, args: &[String]) -> Result<ExitCode> {
    let asks_only = asks_only(args);
    if !asks_only {
        setup::run_for_benchmarks()?;
        qemu::run(paths, &qemu::Options::default())?;
    }
    let package = ["--release", "--package", "benches", "--bin", "fleecing-bench"];
    build_bench(paths, &package)?;
    let program = [&["run", "--quiet"], &package[..], &["--"]].concat();
    let guest =
        if !asks_only && wants_guest(paths, &program, args)? { guest(paths)? } else { Vec::new() };
    // The program talks to the terminal itself, and may be stopped there.
    let status = cargo(paths, &program)
        .env(QEMU_BIN_ENV, paths.qemu_bin())
        .args(args)
        .args(guest)
        .stdin(Stdio::null())
        .status()
        .context("cargo: cannot start")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether any of the cases that are asked for runs in the guest, and none is given.
fn wants_guest(paths: &Paths, program: &[&str], args: &[String]) -> Result<bool> {
    if args.iter().any(|arg| arg == "--guest") {
        return Ok(false);
    }
    let listed = output(cargo(paths, program).args(args).arg("--list"))?;
    Ok(listed.lines().any(|line| line.starts_with("guest-")))
}

/// Kernel, initramfs and load program of the guest, as the program wants them.
fn guest(paths: &Paths) -> Result<Vec<OsString>> {
    let load = paths.root.join("target/bench/guest-load");
    fs::create_dir_all(paths.root.join("target/bench")).context("cannot create target/bench")?;
    let source = paths.root.join("benches/src/bin/guest-load.rs");
    let mut compile = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    compile.args(["--edition", "2024", "--crate-name", "guest_load", "-C", "opt-level=3"]);
    compile.args(["-C", "target-feature=+crt-static", "-C", "strip=symbols", "-o"]);
    compile.arg(&load).arg(source);
    Step {
        name: "compile the guest's load",
        log: paths.logs().join("bench-load.log"),
        show: Show::Progress,
        limit: Duration::from_secs(3600),
    }
    .run(compile)?;
    let image = ["--release", "--package", "system-tests", "--bin", "guest-image"];
    build(paths, "build the guest", "bench-guest.log", &image)?;
    let printed = output(&mut cargo(paths, &[&["run", "--quiet"], &image[..]].concat()))?;
    let mut args = vec![OsString::from("--guest")];
    args.extend(printed.lines().map(OsString::from));
    args.push(load.into());
    Ok(args)
}
