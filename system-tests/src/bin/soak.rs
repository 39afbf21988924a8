// SPDX-License-Identifier: MIT OR Apache-2.0
//! The soak: random backup accesses with faults, kills and guest I/O, for as long as it is told to.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use system_tests::soak::{Options, Summary, run};

const USAGE: &str = "usage: soak [--minutes N] [--seed S] [--episodes N]
  --minutes N   begin episodes for so long (default: 20)
  --seed S      the seed of the first episode, the next one's is larger by one (default: random)
  --episodes N  at most so many: with 1, `--seed S` repeats one episode alone";
const DEFAULT_MINUTES: u64 = 20;
/// A soak of so many minutes must have met everything there is.
const LONG_MINUTES: u64 = 10;

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)).and_then(|options| soak(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe soak failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options> {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut options = Options {
        seed,
        duration: Duration::from_secs(DEFAULT_MINUTES * 60),
        episodes: u64::MAX,
        show: true,
    };
    while let Some(argument) = arguments.next() {
        let mut number = || -> Result<u64> {
            let value = arguments.next().context(USAGE)?;
            value.parse().with_context(|| format!("{argument} {value}: no number\n{USAGE}"))
        };
        match argument.as_str() {
            "--minutes" => {
                let minutes = number()?;
                let seconds = minutes.checked_mul(60).context("--minutes: too many")?;
                options.duration = Duration::from_secs(seconds);
            }
            "--seed" => options.seed = number()?,
            "--episodes" => options.episodes = number()?,
            _ => bail!("{USAGE}"),
        }
    }
    Ok(options)
}

fn soak(options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let summary = runtime.block_on(async {
        println!("the first episode has seed {}", options.seed);
        // Whatever was started ends when the soak is dropped.
        tokio::select! {
            summary = run(options) => summary,
            _ = tokio::signal::ctrl_c() => bail!("interrupted"),
        }
    })?;
    println!("\n{summary}");
    verdict(options, &summary)?;
    println!("everything was right");
    Ok(())
}

fn verdict(options: &Options, summary: &Summary) -> Result<()> {
    if options.episodes == u64::MAX && options.duration.as_secs() >= LONG_MINUTES * 60 {
        summary.check_variety()?;
    }
    summary.check_memory()
}
