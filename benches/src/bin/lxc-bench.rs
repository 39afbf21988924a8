// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask bench lxc`: how fast backups of a container are, beside tools that copy files.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use benches::cases::turns;
use benches::ct::{Container, Tool};
use benches::disk::check_free;
use benches::place::{self, Stop};
use benches::report::{Table, number, with_range};
use benches::stats::{estimate, ratio};
use clap::Parser;
use serde_json::json;

const MIB: u64 = 1 << 20;
const VZDUMP: &str = "vzdump";
/// `tar | zstd -T2` is to take so much longer.
const FIRST_GOAL: f64 = 1.3;
/// And the second pass of rsync.
const FROZEN_GOAL: f64 = 1.0;

/// Measures backups of a container by vzdump beside tar with zstd, rsync, borg and restic of the same tree: a first
/// run, and how long the container is frozen for a second copy.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask bench lxc", bin_name = "cargo xtask bench lxc")]
struct Options {
    /// Rounds of each case
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Files of the container in MiB, at most
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(16..=1 << 20))]
    data: u64,
    /// Where the container's files come from
    #[arg(long, value_name = "DIR", default_value = "/usr")]
    tree: PathBuf,
    /// Only this: first or suspend
    #[arg(long, value_name = "CASE", value_parser = ["first", "suspend"])]
    only: Option<String>,
    /// Writes everything that was measured
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Writes the tables
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// The program vzdump (default: beside this one)
    #[arg(long, value_name = "FILE")]
    vzdump: Option<PathBuf>,
    /// Where the container and the copies are (default target/bench)
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
}

/// What one way took, by round.
struct Series {
    name: &'static str,
    values: Vec<Option<f64>>,
}

fn measured(series: &mut Series, case: &str, unit: &str, value: Result<f64>) -> bool {
    let round = series.values.len() + 1;
    let name = series.name;
    match &value {
        Ok(value) => {
            eprintln!("{case}: round {round}, {name}: {} {unit}", number(Some(*value)));
        }
        Err(error) => eprintln!("FAILED {case}: round {round}, {name}: {error:#}"),
    }
    let is_good = value.is_ok();
    series.values.push(value.ok());
    is_good
}

/// What one case brought.
struct Case {
    name: &'static str,
    title: String,
    unit: &'static str,
    /// The first way is the one that the others are compared with, and the second has a goal.
    series: Vec<Series>,
    goal: f64,
}

impl Case {
    fn text(&self, markdown: bool) -> String {
        let edge = if markdown { "###" } else { "==" };
        let mut table = Table::new(&["", self.unit, "/ vzdump"]);
        let ours = &self.series[0].values;
        for one in &self.series {
            let known: Vec<f64> = one.values.iter().copied().flatten().collect();
            // What would end a cell.
            let name = if markdown { one.name.replace('|', "\\|") } else { one.name.to_owned() };
            table.rows.push(vec![
                name,
                with_range(estimate(&known)),
                with_range(ratio(&one.values, ours)),
            ]);
        }
        let found = ratio(&self.series[1].values, ours);
        let word = match found {
            Some(found) if found.median >= self.goal => "reached",
            Some(_) => "NOT reached",
            None => "not measured",
        };
        let confidence = found.map_or(0.0, |found| found.confidence * 100.0);
        format!(
            "\n{edge} {}\n\n{}\n{} / {VZDUMP}, at least {}: {}, {word}\n\
             (medians [interval of the median, {confidence:.0} %], ratios within each round)\n",
            self.title,
            table.text(markdown),
            self.series[1].name,
            self.goal,
            with_range(found)
        )
    }
}

fn first(
    options: &Options,
    ct: &Container,
    stop: &Stop,
    is_good: &mut bool,
) -> Result<Vec<Series>> {
    let names = [VZDUMP].into_iter().chain(Tool::ALL.map(Tool::name));
    let mut series: Vec<Series> = names.map(|name| Series { name, values: Vec::new() }).collect();
    for round in 0..options.rounds {
        for way in turns(series.len(), round as usize) {
            stop.check()?;
            let seconds = match way.checked_sub(1) {
                None => ct.backup("stop").map(|(seconds, _)| seconds),
                Some(tool) => ct.copy(Tool::ALL[tool]),
            };
            *is_good &= measured(&mut series[way], "first run", "s", seconds);
        }
    }
    Ok(series)
}

fn suspend(
    options: &Options,
    ct: &Container,
    stop: &Stop,
    is_good: &mut bool,
) -> Result<Vec<Series>> {
    let mut series: Vec<Series> =
        [VZDUMP, "rsync"].map(|name| Series { name, values: Vec::new() }).into();
    for round in 0..options.rounds {
        for way in turns(2, round as usize) {
            stop.check()?;
            let milliseconds = match way {
                0 => ct.backup("suspend").and_then(|(_, second)| second.context("no second copy")),
                _ => ct.rsync_frozen(),
            };
            *is_good &= measured(&mut series[way], "frozen", "ms", milliseconds);
        }
    }
    Ok(series)
}

/// Whether everything could be measured. Nothing is written when it is stopped.
fn measure(options: &Options, stop: &Stop) -> Result<bool> {
    let (folder, _alone) = place::folder(options.folder.as_deref())?;
    check_free(&folder, options.data * MIB * 6, "--data makes that less")?;
    let vzdump = match &options.vzdump {
        Some(program) => program.clone(),
        None => std::env::current_exe()?.with_file_name("vzdump"),
    };
    let vzdump = vzdump.canonicalize().with_context(|| format!("no {}", vzdump.display()))?;
    let ct = Container::new(&vzdump, &folder, &options.tree, options.data * MIB)?;
    let wanted = |name: &str| options.only.as_deref().is_none_or(|only| only == name);
    let mut is_good = true;
    let mut cases = Vec::new();
    if wanted("first") {
        let series = first(options, &ct, stop, &mut is_good)?;
        let title = format!("First run, {} MiB in {} files", ct.data_bytes / MIB, ct.files);
        cases.push(Case { name: "first", title, unit: "seconds", series, goal: FIRST_GOAL });
    }
    if wanted("suspend") {
        stop.check()?;
        ct.start()?;
        let series = suspend(options, &ct, stop, &mut is_good)?;
        let title = "Second copy, while the container is frozen".to_owned();
        cases.push(Case { name: "suspend", title, unit: "ms", series, goal: FROZEN_GOAL });
    }
    stop.check()?;
    report(options, &cases)?;
    Ok(is_good)
}

fn report(options: &Options, cases: &[Case]) -> Result<()> {
    let text = |markdown| cases.iter().map(|case| case.text(markdown)).collect::<String>();
    print!("{}", text(false));
    let values = cases.iter().map(|case| {
        let ways = case.series.iter().map(|one| json!({ "name": one.name, "values": one.values }));
        json!({ "case": case.name, "ways": ways.collect::<Vec<_>>() })
    });
    let json = serde_json::to_string_pretty(&values.collect::<Vec<_>>())?;
    for (path, text) in [(&options.json, json), (&options.markdown, text(true))] {
        if let Some(path) = path {
            std::fs::write(path, text)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    match place::until_asked(move |stop| measure(&options, stop)).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
