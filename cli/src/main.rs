// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vzdump`: backups of virtual machines through pluggable providers.
//!
//! Everything is done by `vzdump-host`; here are the command line, what is printed, and signals.
//!
//! | exit code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | not done; the reason is printed |
//! | 2 | the command line makes no sense |
//! | 255 | the backup of a guest failed |

#![forbid(unsafe_code)]

mod args;
mod commands;
mod output;
mod signals;
mod task;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use args::Cli;
use output::Output;

/// Sets what the program tells about its inner workings, `debug` or the like.
const LOG_ENV: &str = "VZDUMP_LOG";

#[tokio::main]
async fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    // Before anything else: the guard must not fail over options it does not have.
    if args.get(1).is_some_and(|arg| arg == vzdump_host::GUARD_SUBCOMMAND) {
        return vzdump_host::run_guard(&args[2..]).await;
    }
    let cli = Cli::parse_from(args);
    let filter = EnvFilter::try_from_env(LOG_ENV).unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .init();
    let output = Output::new(cli.global.output);
    match Box::pin(commands::run(cli, &output)).await {
        Ok(code) => code,
        Err(failure) => {
            output.failure(&failure);
            ExitCode::FAILURE
        }
    }
}
