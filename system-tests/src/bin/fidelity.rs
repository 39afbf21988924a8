// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask fidelity`: trees of files go through the backup and the restore of a container, and are
//! compared with what they were.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use system_tests::process::Stop;
use system_tests::round_trip::{Host, Tree, Trip};

const USAGE: &str = "usage: cargo xtask fidelity [OPTION]...
  --only TREE   only this tree: odd (everything that files can be) or debian (made by debootstrap)
  --mode MODE   only this mode: snapshot, suspend or stop (default: all of them)
  --privileged  a privileged container, which has device files, too
  --keep        leave the folder with the trees, archives and logs";
const TREES: [Tree; 2] = [Tree::Odd, Tree::Debian];
const MODES: [&str; 3] = ["snapshot", "suspend", "stop"];
/// Differences that are shown of one trip; all are counted.
const SHOWN_MAX: usize = 50;
/// The first restored container.
const FIRST_RESTORED: u32 = 300;

#[derive(Debug)]
struct Options {
    trees: Vec<Tree>,
    modes: Vec<&'static str>,
    is_privileged: bool,
    keeps: bool,
}

fn main() -> ExitCode {
    let outcome = parse(std::env::args().skip(1)).and_then(|options| {
        let Some(options) = options else { return Ok(0) };
        run(&options)
    });
    match outcome {
        Ok(0) => ExitCode::SUCCESS,
        Ok(count) => {
            eprintln!("\n{count} differences");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Nothing if only help is asked for.
fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Options>> {
    let mut options = Options {
        trees: TREES.to_vec(),
        modes: MODES.to_vec(),
        is_privileged: false,
        keeps: false,
    };
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--only" => {
                let name = arguments.next().context(USAGE)?;
                options.trees.retain(|tree| tree.name() == name);
            }
            "--mode" => {
                let name = arguments.next().context(USAGE)?;
                options.modes.retain(|mode| *mode == name);
            }
            "--privileged" => options.is_privileged = true,
            "--keep" => options.keeps = true,
            "-h" | "--help" => {
                println!("{USAGE}");
                return Ok(None);
            }
            _ => bail!("{USAGE}"),
        }
    }
    if options.trees.is_empty() || options.modes.is_empty() {
        bail!("{USAGE}");
    }
    Ok(Some(options))
}

/// How many differences there are.
fn run(options: &Options) -> Result<usize> {
    let stop = Stop::default();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.spawn(stop_when_asked(stop.clone()));
    let mut count = 0;
    for tree in &options.trees {
        // Not /tmp, which may be memory.
        let folder = tempfile::Builder::new().prefix("vzdump-fidelity-").tempdir_in("/var/tmp")?;
        let result = trips(folder.path(), *tree, options, &stop);
        if options.keeps || result.as_ref().is_ok_and(|found| *found > 0) {
            println!("\nEverything is left in {}", folder.keep().display());
        }
        count += result?;
    }
    Ok(count)
}

/// The trip under way fails then, and cleans up behind itself.
async fn stop_when_asked(stop: Stop) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    eprintln!("\nStopping…");
    stop.request();
}

fn trips(folder: &Path, tree: Tree, options: &Options, stop: &Stop) -> Result<usize> {
    let kind = if options.is_privileged { "a privileged" } else { "an unprivileged" };
    println!("\nThe tree \"{}\" in {kind} container", tree.name());
    let host = Host::new(folder, tree, options.is_privileged, stop)?;
    let unpacked = host.unpacked()?;
    print!("{}", counts(&unpacked.comparison.kinds));
    let mut found = tell(&unpacked, None);
    for (mode, id) in options.modes.iter().zip(FIRST_RESTORED..) {
        let started = Instant::now();
        let trip = host.there_and_back(mode, id)?;
        found += tell(&trip, Some(started.elapsed().as_secs_f64()));
    }
    Ok(found)
}

fn counts(kinds: &BTreeMap<&'static str, u64>) -> String {
    kinds.iter().map(|(kind, count)| format!("  {count:>7}  {kind}\n")).collect()
}

/// Prints what was found; how much that is.
fn tell(trip: &Trip, seconds: Option<f64>) -> usize {
    let differences = &trip.comparison.differences;
    let time = seconds.map(|s| format!(", {s:.1} s")).unwrap_or_default();
    let word = match differences.len() {
        0 => "the same".to_owned(),
        count => format!("{count} DIFFERENCES"),
    };
    println!("{:<24} {word}{time}", trip.way);
    for line in differences.iter().take(SHOWN_MAX) {
        println!("    {line}");
    }
    if differences.len() > SHOWN_MAX {
        println!("    … and {} more", differences.len() - SHOWN_MAX);
    }
    differences.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Option<Options>> {
        parse(arguments.iter().map(|argument| (*argument).to_owned()))
    }

    #[test]
    fn everything_is_compared_unless_less_is_asked_for() {
        let all = parsed(&[]).unwrap().unwrap();
        assert_eq!((all.trees, all.modes), (TREES.to_vec(), MODES.to_vec()));
        let arguments = ["--only", "debian", "--mode", "stop", "--privileged", "--keep"];
        let one = parsed(&arguments).unwrap().unwrap();
        assert_eq!((one.trees, one.modes), (vec![Tree::Debian], vec!["stop"]));
        assert!(one.is_privileged && one.keeps);
        assert!(parsed(&["--help"]).unwrap().is_none());
        for bad in [&["--only"][..], &["--only", "x"], &["--mode", "x"], &["x"]] {
            assert!(parsed(bad).is_err(), "{bad:?}");
        }
    }
}
