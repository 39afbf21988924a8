// SPDX-License-Identifier: MIT OR Apache-2.0
//! The project's chores: `cargo xtask <command>` (or `./x <command>`).
#![forbid(unsafe_code)]

mod apt;
mod bench;
mod cargo;
mod demo;
mod fidelity;
mod fuzz;
mod paths;
mod qemu;
mod run;
mod setup;
mod soak;
mod test;
mod tidy;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::paths::Paths;

/// Builds QEMU with the backup extension, runs the tests, the demo and the benchmarks.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install the Debian packages that the build, the tests and the demo need
    Setup,
    /// Build the patched QEMU into target/qemu/bin
    Qemu(qemu::Options),
    /// Show the main job on a real guest: backup, increment, restore, check
    Demo(demo::Options),
    /// Measure what a backup costs the guest
    Bench(bench::Options),
    /// Everything that must pass: format, lints, rules, unit and system tests
    Test(test::Options),
    /// The same as `test`, as the gate runs it
    Ci(test::Options),
    /// `test` with the long suites: more stress seeds, the soak, the fuzz targets, the comparison of
    /// restored files, the tests marked ignored
    Full(test::Options),
    /// Run the fuzz targets of the QMP and NBD clients and of the reader of archives for a bounded time
    Fuzz(fuzz::Options),
    /// Random backup accesses with faults, kills and guest I/O, for as long as asked for
    Soak(soak::Options),
    /// Compare files of containers with what a restore brings back: a tree of odd things, and a Debian
    #[command(disable_help_flag = true)]
    Fidelity(fidelity::Options),
    /// Check the repository's own rules: dependencies, unsafe, licence headers, file sizes
    Tidy,
}

fn main() -> ExitCode {
    match dispatch(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> Result<ExitCode> {
    let paths = Paths::find()?;
    match command {
        Command::Setup => setup::run()?,
        Command::Qemu(options) => {
            if options.builds() {
                setup::run()?;
            }
            qemu::run(&paths, &options)?;
        }
        Command::Demo(options) => return demo::run(&paths, &options),
        Command::Bench(options) => return bench::run(&paths, &options),
        Command::Test(options) | Command::Ci(options) => return test::run(&paths, &options),
        Command::Full(options) => return test::run(&paths, &options.full()),
        Command::Fuzz(options) => return fuzz::run(&paths, &options),
        Command::Soak(options) => return soak::run(&paths, options),
        Command::Fidelity(options) => return fidelity::run(&paths, &options),
        Command::Tidy => return tidy::run(&paths),
    }
    Ok(ExitCode::SUCCESS)
}
