// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line of the program `guest-records`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::check::check_pair;
use super::content::Side;
use super::disk::{Disk, create_pair, size_of};
use super::passes::{self, Sections};
use super::writer::{WriterOptions, write_records};

const USAGE: &str = "usage:
  guest-records create SIZE_BYTES PAIR_NUMBER FILE_A FILE_B
  guest-records check [--allow-in-flight] DISK...
  guest-records write [--rate N] [--stop-after N] DISK...
  guest-records passes SECTIONS DISK
Of the disks named, those that carry the headers of a pair are used, in whatever order.";

/// How long the disks of a starting machine may take to appear.
const DISKS_APPEAR_WITHIN: Duration = Duration::from_secs(60);

/// Runs the program with these arguments (without its name).
#[must_use]
pub fn run(arguments: &[String]) -> ExitCode {
    match dispatch(arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("ERROR {error}"));
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: &[String]) -> Result<bool, String> {
    let Some((command, rest)) = arguments.split_first() else { return Err(USAGE.into()) };
    match (command.as_str(), rest) {
        ("create", [size, pair, a, b]) => {
            create_pair([Path::new(a), Path::new(b)], number(size)?, number(pair)?)?;
            Ok(true)
        }
        ("check", rest) => check(rest),
        ("write", rest) => write(rest).map(|()| true),
        ("passes", [count, disk]) => {
            let file = std::fs::File::open(disk).map_err(|error| format!("{disk}: {error}"))?;
            let size = size_of(&file).map_err(|error| format!("{disk}: {error}"))?;
            passes::write(Path::new(disk), Sections::new(size, number(count)?)?, 0).map(|()| true)
        }
        _ => Err(USAGE.into()),
    }
}

fn check(arguments: &[String]) -> Result<bool, String> {
    let allow_in_flight = arguments.iter().any(|argument| argument == "--allow-in-flight");
    let paths: Vec<PathBuf> = arguments
        .iter()
        .filter(|argument| !argument.starts_with("--"))
        .map(PathBuf::from)
        .collect();
    let start = Instant::now();
    let [a, b] = find_pair(&paths, false)?;
    let report = check_pair(&a, &b, allow_in_flight)?;
    say(&format!("{} ms={}", report.line(), start.elapsed().as_millis()));
    Ok(report.problems.is_empty())
}

fn write(arguments: &[String]) -> Result<(), String> {
    let mut options = WriterOptions { rate_per_s: 200, stop_after: 0, flush: true };
    let mut paths = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| format!("{argument} needs a number"));
        match argument.as_str() {
            "--rate" => {
                let rate = number(value()?)?;
                options.rate_per_s =
                    u32::try_from(rate).map_err(|_| format!("{rate} is too fast"))?;
            }
            "--stop-after" => options.stop_after = number(value()?)?,
            path => paths.push(PathBuf::from(path)),
        }
    }
    let [a, b] = find_pair(&paths, true)?;
    let end = write_records(&a, &b, options, |progress| say(&progress.line()))?;
    say(&format!("WRITTEN last={}", end.last));
    Ok(())
}

/// The pair among the disks named; waits for it, because disks of a booting machine come late.
fn find_pair(paths: &[PathBuf], writable: bool) -> Result<[Disk; 2], String> {
    let deadline = Instant::now() + DISKS_APPEAR_WITHIN;
    loop {
        let (mut a, mut b, mut missing, mut errors) = (None, None, false, Vec::new());
        for path in paths {
            if !path.exists() {
                missing = true;
                continue;
            }
            match Disk::open(path, writable) {
                Ok(disk) if disk.header.side == Side::A => a = Some(disk),
                Ok(disk) => b = Some(disk),
                Err(error) => errors.push(error),
            }
        }
        if let (Some(a), Some(b)) = (a, b) {
            return Ok([a, b]);
        }
        if !missing || Instant::now() >= deadline {
            return Err(format!("no pair of record disks among {paths:?}: {}", errors.join("; ")));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text:?} is no number"))
}

/// One line on the console; a console that is gone is no reason to stop writing.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
