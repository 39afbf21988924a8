// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask bench restore`: full restores beside `qemu-img convert` of the archive's images, and a live
//! restore beside a full one that is followed by a boot, of a real guest.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use system_tests::console::Console;
use system_tests::lab::{IMAGES, Lab, LabOptions, PLAIN_VIRTIO, SOURCE_VM};
use system_tests::process::{Collected, Stop};
use system_tests::qemu;
use system_tests::signals::{CLEAN_WITHIN, Ended, until_signal};

const USAGE: &str =
    "usage: cargo xtask bench restore [--rounds N] [--disk-size MIB] [--only CASE] [--folder DIR]
    [--markdown FILE]
  --rounds N       rounds of each way, which take turns (default 3)
  --disk-size MIB  size of each of the two disks (default 512)
  --only CASE      only this: full or live
  --folder DIR     where disks and archives are (default /var/tmp)
  --markdown FILE  where the tables are written, as in docs/performance.md";
const NEW_VM: u32 = 200;
const WITHIN: Duration = Duration::from_secs(1800);
const MIB: u64 = 1 << 20;
const FULL_WAYS: [&str; 3] = ["vzdump restore", "qemu-img convert", "qemu-img convert -t none"];
const LIVE_WAYS: [&str; 2] = ["restore --live", "restore --start"];
const LIVE_COLUMNS: [&str; 4] = ["first answer s", "reads all s", "longest write ms", "complete s"];

struct Options {
    rounds: usize,
    disk_bytes: u64,
    folder: PathBuf,
    only: Option<String>,
    markdown: Option<PathBuf>,
}

/// A way, and what was measured of it in each round.
struct Series {
    name: &'static str,
    rounds: Vec<Vec<f64>>,
}

/// What the guest shows of a start.
struct Start {
    /// Until its agent is there.
    answer_s: f64,
    /// How long it took to read and check all of both disks.
    check_s: f64,
    /// Its longest write afterwards.
    longest_write_ms: f64,
    /// Until the disks are complete.
    complete_s: f64,
}

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)).and_then(|options| options.map_or(Ok(()), run)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Options>> {
    let (rounds, disk_bytes, folder) = (3, 512 * MIB, "/var/tmp".into());
    let mut options = Options { rounds, disk_bytes, folder, only: None, markdown: None };
    while let Some(argument) = arguments.next() {
        if ["-h", "--help"].contains(&argument.as_str()) {
            println!("{USAGE}");
            return Ok(None);
        }
        let value = arguments.next().context(USAGE)?;
        match argument.as_str() {
            "--rounds" => options.rounds = value.parse().context(USAGE)?,
            "--disk-size" => options.disk_bytes = value.parse::<u64>().context(USAGE)? * MIB,
            "--only" if ["full", "live"].contains(&value.as_str()) => options.only = Some(value),
            "--folder" => options.folder = value.into(),
            "--markdown" => options.markdown = Some(value.into()),
            _ => bail!("{USAGE}"),
        }
    }
    ensure!((1..=1000).contains(&options.rounds), "{USAGE}");
    ensure!((16 * MIB..=1 << 40).contains(&options.disk_bytes), "{USAGE}");
    Ok(Some(options))
}

/// Measures, until a signal comes: then the VMs are stopped and the folder is removed, too.
fn run(options: Options) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("vz-rb-").tempdir_in(&options.folder)?;
    let dir = folder.path().to_owned();
    match until_signal(move |stop| measure(&options, &dir, stop))? {
        Ended::Done(result) => result,
        Ended::Stopped => bail!("interrupted; the VMs are stopped"),
        Ended::Stuck => {
            let folder = folder.keep();
            bail!(
                "interrupted; the VMs in {} did not stop within {CLEAN_WITHIN:?}",
                folder.display()
            )
        }
    }
}

/// All that is wanted, in an empty folder; tables are written when all of it was measured.
fn measure(options: &Options, dir: &Path, stop: &Stop) -> Result<()> {
    let lab_options = LabOptions {
        disk_bytes: options.disk_bytes,
        format: "qcow2",
        hardware: PLAIN_VIRTIO,
        rate_per_s: 200,
        show: false,
    };
    let mut lab = Lab::create(dir, lab_options, stop)?;
    let mut console = lab.start(SOURCE_VM)?.console;
    console.wait_for_record(200, WITHIN, stop)?;
    lab.stop_vm(SOURCE_VM)?;
    let archive = lab.backup()?.volume;
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("two disks of {} MiB, load {}", options.disk_bytes / MIB, load.trim());
    let wanted = |case: &str| options.only.as_deref().is_none_or(|only| only == case);
    let mut tables = format!(
        "Two disks of {} MiB, {} rounds, load {}:\n",
        options.disk_bytes / MIB,
        options.rounds,
        load.split(' ').next().unwrap_or("unknown")
    );
    if wanted("full") {
        let series = ["qcow2", "raw"].map(|format| full(options, &lab, &archive, format));
        tables += &table("full restore, seconds", "goal of the first \u{2265} 1.0", &FULL_WAYS);
        for (format, series) in ["qcow2", "raw"].iter().zip(series) {
            tables += &row(format, &series?, 0);
        }
    }
    if wanted("live") {
        let ways = LIVE_WAYS;
        tables += &table("the guest runs", "above 1: `--live` is faster", &ways);
        for format in ["qcow2", "raw"] {
            let series = live(options, &mut lab, &archive, format)?;
            for (column, what) in LIVE_COLUMNS.iter().enumerate() {
                tables += &row(&format!("{format}: {what}"), &series, column);
            }
        }
    }
    stop.check()?;
    if let Some(path) = &options.markdown {
        fs::write(path, tables).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The begin of a table with the ratios of all ways to the first one.
fn table(what: &str, goal: &str, ways: &[&str]) -> String {
    let names: String = ways.iter().map(|way| format!(" `{way}` |")).collect();
    let first = ways.first().unwrap_or(&"");
    let ratios: String = ways.iter().skip(1).map(|way| format!(" `{way}` / `{first}` |")).collect();
    let lines = "---:|".repeat(ways.len() * 2 - 1);
    format!("\nRatios: {goal}.\n\n| {what} |{names}{ratios}\n|---|{lines}\n")
}

/// One line of it.
fn row(what: &str, series: &[Series], column: usize) -> String {
    let values = series.iter().map(|way| with_range(way.column(column)));
    let ratios = series.iter().skip(1).map(|way| with_range(ratios(&series[0], way, column)));
    let cells: String = values.chain(ratios).map(|cell| format!(" {cell} |")).collect();
    format!("| {what} |{cells}\n")
}

/// Full restores into one format.
fn full(options: &Options, lab: &Lab, archive: &str, format: &str) -> Result<Vec<Series>> {
    let sources = images(&lab.backups_dir(), "qcow2")?;
    ensure!(sources.len() == 2, "the archive has {} images, not 2", sources.len());
    let mut series = FULL_WAYS.map(Series::new);
    for round in 0..options.rounds {
        for turn in 0..series.len() {
            let way = (round + turn) % series.len();
            let seconds = match way {
                0 => restore(lab, archive, format)?,
                1 => convert(lab, &sources, format, &[])?,
                _ => convert(lab, &sources, format, &["-t", "none"])?,
            };
            series[way].rounds.push(vec![seconds]);
        }
    }
    println!("\n== full restore to {format}\n");
    show(&series, &["seconds"]);
    println!("goal: qemu-img convert / vzdump restore at least 1.0");
    Ok(series.into())
}

fn restore(lab: &Lab, archive: &str, format: &str) -> Result<f64> {
    let begin = Instant::now();
    let (vm, kernel) = (NEW_VM.to_string(), "--allow-raw-config");
    let arguments = ["restore", archive, &vm, "--storage", IMAGES, "--format", format, kernel];
    lab.vzdump.run(&arguments, WITHIN)?;
    let seconds = begin.elapsed().as_secs_f64();
    lab.vzdump.run(&["vm", "destroy", &vm], WITHIN)?;
    Ok(seconds)
}

/// All images at the same time, as a restore does it, and durably.
fn convert(lab: &Lab, sources: &[PathBuf], format: &str, more: &[&str]) -> Result<f64> {
    let folder = tempfile::tempdir_in(&lab.dir)?;
    let qemu_img = qemu::bin_dir()?.join("qemu-img");
    let begin = Instant::now();
    let mut running = Vec::new();
    let mut targets = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        let target = folder.path().join(index.to_string());
        let mut command = Command::new(&qemu_img);
        command.args(["convert", "-f", "qcow2", "-O", format]).args(more);
        command.arg(source).arg(&target);
        running.push(Collected::spawn(&mut command)?);
        targets.push(target);
    }
    for command in running {
        command.finish(WITHIN, &lab.stop)?.success("qemu-img convert")?;
    }
    for target in targets {
        File::open(target)?.sync_all()?;
    }
    Ok(begin.elapsed().as_secs_f64())
}

/// The files of a folder that end like this.
fn images(folder: &Path, ending: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(images(&path, ending)?);
        } else if path.extension().is_some_and(|end| end == ending) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Live restores into one format beside full ones that are followed by a boot.
fn live(options: &Options, lab: &mut Lab, archive: &str, format: &str) -> Result<Vec<Series>> {
    let mut series = LIVE_WAYS.map(Series::new);
    for round in 0..options.rounds {
        for turn in 0..series.len() {
            let way = (round + turn) % series.len();
            let start = start(lab, archive, format, ["--live", "--start"][way])?;
            let Start { answer_s, check_s, longest_write_ms, complete_s } = start;
            series[way].rounds.push(vec![answer_s, check_s, longest_write_ms, complete_s]);
        }
    }
    println!("\n== the guest runs, {format}\n");
    show(&series, &LIVE_COLUMNS);
    Ok(series.into())
}

fn start(lab: &mut Lab, archive: &str, format: &str, how: &str) -> Result<Start> {
    let vm = NEW_VM.to_string();
    let mut console = lab.watch(NEW_VM);
    let begin = Instant::now();
    let fixed = ["restore", archive, &vm, how, "--storage", IMAGES, "--format", format];
    let running = lab.vzdump.spawn(&[fixed.as_slice(), &["--allow-raw-config"]].concat())?;
    console.wait_for("GUEST AGENT", WITHIN, &lab.stop)?;
    let answer_s = begin.elapsed().as_secs_f64();
    // The agent may be there before or after the check.
    let mut all = Console::from_start_of(&lab.dir.join(format!("run/vm/{vm}/console.log")));
    let line = all.wait_for("CHECK ", WITHIN, &lab.stop)?;
    let check_ms = line.split_whitespace().find_map(|word| word.strip_prefix("ms="));
    let check_ms: f64 =
        check_ms.and_then(|ms| ms.parse().ok()).with_context(|| format!("odd check: {line}"))?;
    let mut longest = Duration::ZERO;
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        lab.stop.check()?;
        longest = longest.max(all.records()?.longest_stall);
        std::thread::sleep(Duration::from_millis(100));
    }
    let finished = running.finish(WITHIN, &lab.stop)?.success("vzdump restore")?;
    let result = system_tests::vzdump::last_json(&finished.stdout)?;
    let complete_ms = result["duration_ms"].as_f64().context("no duration")?;
    lab.stop_vm(NEW_VM)?;
    lab.vzdump.run(&["vm", "destroy", &vm], WITHIN)?;
    Ok(Start {
        answer_s,
        check_s: check_ms / 1000.0,
        longest_write_ms: longest.as_secs_f64() * 1000.0,
        complete_s: complete_ms / 1000.0,
    })
}

impl Series {
    fn new(name: &'static str) -> Self {
        Self { name, rounds: Vec::new() }
    }

    fn column(&self, column: usize) -> Vec<f64> {
        self.rounds.iter().map(|round| round[column]).collect()
    }
}

/// The median and the whole range.
fn with_range(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let (Some(least), Some(most)) = (values.first(), values.last()) else { return "-".to_owned() };
    format!("{:.2} [{least:.2}, {most:.2}]", values[values.len() / 2])
}

/// How another way compares with the first, round by round.
fn ratios(first: &Series, other: &Series, column: usize) -> Vec<f64> {
    let both = other.column(column).into_iter().zip(first.column(column));
    both.map(|(other, first)| other / first.max(1e-9)).collect()
}

/// What was measured, and ratios to the first way.
fn show(series: &[Series], columns: &[&str]) {
    for (index, column) in columns.iter().enumerate() {
        for way in series {
            println!("{column:>18}  {:<26} {}", way.name, with_range(way.column(index)));
        }
        let first = &series[0];
        for way in &series[1..] {
            let name = format!("{} / {}", way.name, first.name);
            println!("{:>18}  {name:<26} {}", "", with_range(ratios(first, way, index)));
        }
    }
}
