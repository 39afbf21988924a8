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
//! | 3 | done, but what there was to print could not be written |
//! | 255 | the backup or restore of a guest failed, or the job as a whole |

#![forbid(unsafe_code)]

mod archives;
mod args;
mod commands;
mod containers;
mod images;
mod output;
mod pages;
mod provider;
mod restore;
mod signals;
mod task;

use std::future::Future;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use tokio::runtime::Runtime;
use tracing_subscriber::EnvFilter;

use args::Cli;
use output::Output;

/// All was done, and standard output does not say so.
const OUTPUT_INCOMPLETE: u8 = 3;

/// Sets what the program tells about its inner workings, `debug` or the like.
const LOG_ENV: &str = "VZDUMP_LOG";

/// How long threads that are stuck in a file system are waited for when all else is done. What
/// they are about to change is in a journal, or harmless.
const STUCK_LIMIT: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    // Before there is a second thread: some namespaces cannot be entered with one.
    if let Some(code) = vzdump_host::run_hidden(&args) {
        return code;
    }
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => block_on(runtime, run(), STUCK_LIMIT),
        Err(error) => {
            output::warning(&format!("cannot start the program's threads: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Runs to the end, and then waits for stuck threads no longer than the limit: dropping a runtime
/// would wait for ever.
fn block_on<T>(runtime: Runtime, work: impl Future<Output = T>, limit: Duration) -> T {
    let result = runtime.block_on(work);
    runtime.shutdown_timeout(limit);
    result
}

async fn run() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    // Before anything else: the guard must not fail over options it does not have.
    if args.get(1).is_some_and(|arg| arg == vzdump_host::GUARD_SUBCOMMAND) {
        return vzdump_host::run_guard(&args[2..]).await;
    }
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let filter = EnvFilter::try_from_env(LOG_ENV).unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .init();
    let output = Output::new(cli.global.output, commands::is_task(&cli.command));
    match Box::pin(commands::run(cli, &output)).await {
        // What failed besides says more, and what was done need not be done again.
        Ok(ExitCode::SUCCESS) if output::is_incomplete() => ExitCode::from(OUTPUT_INCOMPLETE),
        Ok(code) => code,
        Err(failure) => {
            output.failure(&failure);
            ExitCode::FAILURE
        }
    }
}

/// Prints what is wrong with the command line, or the help that was asked for. Options of vzdump that
/// make no sense here are told from mistakes.
fn refuse(error: &clap::Error) -> ExitCode {
    // Nothing is left to be done when even this cannot be written.
    let _ = error.print();
    if let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg)
        && error.kind() == ErrorKind::UnknownArgument
        && let Some(why) = vzdump_host::without_meaning(argument.trim_start_matches('-'))
    {
        output::warning(&format!("'{argument}' is not needed here: {why}"));
    }
    u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stuck_thread_does_not_keep_the_program() {
        let runtime = Runtime::new().unwrap();
        let (release, stuck) = std::sync::mpsc::channel::<()>();
        let (sender, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let work = async {
                let (started, is_started) = tokio::sync::oneshot::channel();
                tokio::task::spawn_blocking(move || {
                    let _ = started.send(());
                    let _ = stuck.recv();
                });
                is_started.await.unwrap();
                7
            };
            sender.send(block_on(runtime, work, Duration::from_millis(10))).unwrap();
        });
        assert_eq!(ended.recv_timeout(Duration::from_secs(60)).unwrap(), 7);
        drop(release);
    }
}
