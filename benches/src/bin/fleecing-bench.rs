// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask bench fleecing`: what a backup costs the guest, side by side in one run.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use benches::cases::{self, Case, Work};
use benches::disk::{Disk, check_space};
use benches::report::{CaseResult, case_text, goals_text, setup_text};
use benches::results::Results;
use benches::run::Bench;
use benches::sample::Metric;
use benches::setup_time;
use benches::timeline::{self, Line};
use benches::{fio, guest, place, svg};
use clap::Parser;
use serde_json::{Value, json};

/// Not for tables: it says something only of this machine.
const FILE_SYSTEM_ID: &str = "file system id";
const DAEMON: &str = "qemu-storage-daemon";
const SETUP: &str = "setup-8x1t";
const TIMELINE: &str = "timeline";
const TIMELINE_CASE: &str = "rate-4k/direct/raw/limited";
const TIMELINE_SECONDS: u32 = 40;
/// What a run takes beside its running time.
const OVERHEAD_SECONDS: f64 = 1.3;
const SHUTDOWN_WITHIN: Duration = Duration::from_secs(5);

/// Measures guest I/O during a backup: without one, with QEMU's own filter, with ours, and what
/// capturing old data costs at least. Without --full a selection that takes about five minutes.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask bench fleecing", bin_name = "cargo xtask bench fleecing")]
struct Options {
    /// Everything; takes hours
    #[arg(long)]
    full: bool,
    /// Only cases whose name contains this, of all cases; may be repeated
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Rounds of each case (default 3, with --full 5)
    #[arg(long, value_name = "N")]
    rounds: Option<u64>,
    /// Running time of each run (default 2, with --full 10)
    #[arg(long, value_name = "N")]
    seconds: Option<u32>,
    /// Size of the disk in MiB (default 2048, with --full 8192)
    #[arg(long, value_name = "MIB")]
    disk_size: Option<u64>,
    /// Writes everything that was measured, after each case
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// What is in the file of --json already is not measured again: goes on after an interruption
    #[arg(long, requires = "json")]
    resume: bool,
    /// Writes the tables as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Where plots go (default target/bench/plots)
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
    /// The backup client releases what it has read
    #[arg(long)]
    reader_trims: bool,
    /// From so many KiB in a row on, our filter shares blocks of the disk with the fleecing image
    /// instead of copying them; the folder must be on XFS or btrfs
    #[arg(long, value_name = "KIB")]
    reflink: Option<u64>,
    /// The guest's export gets a thread of its own
    #[arg(long)]
    iothread: bool,
    /// Asynchronous I/O of cache "default"; cache "direct" always has "native"
    #[arg(long, value_name = "KIND", default_value = "threads", value_parser = ["threads", "io_uring"])]
    cached_aio: String,
    /// Prints the names of the cases
    #[arg(long)]
    list: bool,
    /// The folder of the patched QEMU programs
    #[arg(long, env = "VZDUMP_QEMU_BIN", value_name = "DIR")]
    qemu: Option<PathBuf>,
    /// The guest's kernel, its initramfs and its load program, see `cargo xtask bench`
    #[arg(long, value_names = ["KERNEL", "INITRD", "LOAD"], num_args = 3)]
    guest: Option<Vec<PathBuf>>,
    /// Where the disk and the sockets are; never in RAM (default target/bench)
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
}

impl Options {
    fn wants(&self, name: &str, short: bool) -> bool {
        if self.only.is_empty() {
            return self.full || short;
        }
        self.only.iter().any(|pattern| name.contains(pattern))
    }

    fn cases(&self) -> Vec<Case> {
        cases::all().into_iter().filter(|case| self.wants(&case.name, case.short)).collect()
    }

    fn guest_cases(&self) -> Vec<Case> {
        guest::cases().into_iter().filter(|case| self.wants(&case.name, false)).collect()
    }

    fn guest_parts(&self) -> Option<guest::Parts> {
        let [kernel, initrd, load] = self.guest.as_deref()? else { return None };
        Some(guest::Parts { kernel: kernel.clone(), initrd: initrd.clone(), load: load.clone() })
    }

    fn seconds(&self) -> u32 {
        self.seconds.unwrap_or(if self.full { 10 } else { 2 }).max(1)
    }

    fn long_seconds(&self) -> u32 {
        self.seconds.map_or(if self.full { 60 } else { 3 }, |seconds| seconds * 3)
    }

    fn rounds(&self) -> u64 {
        self.rounds.unwrap_or(if self.full { 5 } else { 3 }).max(1)
    }

    fn disk_bytes(&self) -> u64 {
        self.disk_size.unwrap_or(if self.full { 8192 } else { 2048 }).max(64) << 20
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(Box::pin(place::until_stopped(measure(&options))));
    // Children are killed when their handles go; only a thread that fills a disk may linger.
    runtime.shutdown_timeout(SHUTDOWN_WITHIN);
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything could be measured.
async fn measure(options: &Options) -> Result<bool> {
    let cases = options.cases();
    if options.list {
        for case in cases.iter().chain(&options.guest_cases()) {
            let modes: Vec<&str> = case.modes.iter().map(|mode| mode.name).collect();
            println!("{:<44} {}", case.name, modes.join(" "));
        }
        for name in [SETUP, TIMELINE] {
            if options.wants(name, name == SETUP) {
                println!("{name}");
            }
        }
        return Ok(true);
    }
    let version = fio::probe().await?;
    let (bench, _alone) = prepare(options).await?;
    let machine = machine(options, &bench, &version)?;
    let mut results = already(options, &machine)?;
    let left: Vec<Case> = cases.into_iter().filter(|case| !results.has(&case.name)).collect();
    announce(options, &left);
    for case in left {
        let result = Box::pin(one_case(&bench, case, options.rounds())).await;
        print!("{}", case_text(&result, false));
        results.cases.push(result);
        keep(options, &machine, &results)?;
    }
    if let Err(error) = Box::pin(in_guest(options, &bench, &machine, &mut results)).await {
        results.errors.push(format!("guest: {error:#}"));
    }
    if options.wants(SETUP, true) && results.setup.is_none() {
        eprintln!("{SETUP}");
        match Box::pin(setup_time::measure(&bench)).await {
            Ok(setup) => {
                print!("{}", setup_text(&setup, false));
                results.setup = Some(setup);
            }
            Err(error) => results.errors.push(format!("{SETUP}: {error:#}")),
        }
    }
    if options.wants(TIMELINE, false) && results.timeline.is_empty() {
        match Box::pin(timelines(&bench)).await {
            Ok(lines) => results.timeline = lines,
            Err(error) => results.errors.push(format!("{TIMELINE}: {error:#}")),
        }
    }
    keep(options, &machine, &results)?;
    finish(options, &bench, &machine, &results)
}

/// What an interrupted run has measured.
fn already(options: &Options, machine: &Value) -> Result<Results> {
    let Some(path) = options.json.as_ref().filter(|_| options.resume) else {
        return Ok(Results::default());
    };
    let known = [cases::all(), guest::cases()].concat();
    let results = Results::load(path, machine, &known)?;
    eprintln!("{} cases were measured before", results.cases.len());
    Ok(results)
}

fn keep(options: &Options, machine: &Value, results: &Results) -> Result<()> {
    options.json.as_ref().map_or(Ok(()), |path| results.save(path, machine))
}

/// The lock keeps other runs away while it is held.
async fn prepare(options: &Options) -> Result<(Bench, std::fs::File)> {
    let bin = place::qemu(options.qemu.as_deref())?;
    let (folder, lock) = place::folder(options.folder.as_deref())?;
    let size_bytes = options.disk_bytes();
    check_space(&folder, size_bytes)?;
    let in_folder = folder.clone();
    let disk = tokio::task::spawn_blocking(move || Disk::ensure(&in_folder, size_bytes)).await??;
    let bench = Bench {
        bin,
        folder,
        disk,
        seconds: options.seconds(),
        long_seconds: options.long_seconds(),
        cached_aio: options.cached_aio.clone(),
        iothread: options.iothread,
        reader_trims: options.reader_trims,
        reflink_bytes: options.reflink.map(|kib| kib << 10),
    };
    bench.check_unused().await?;
    Ok((bench, lock))
}

fn announce(options: &Options, cases: &[Case]) {
    let seconds: f64 = cases
        .iter()
        .map(|case| {
            let each = if case.long { options.long_seconds() } else { options.seconds() };
            let probes = usize::from(case.work == Work::FixedRate);
            (case.modes.len() + probes) as f64 * (f64::from(each) + OVERHEAD_SECONDS)
        })
        .sum::<f64>()
        * options.rounds() as f64;
    let minutes = (seconds / 60.0).ceil().max(0.0);
    eprintln!("{} cases, {} rounds, about {minutes} min", cases.len(), options.rounds());
}

/// All rounds of a case. A failed run is noted, the others go on.
async fn one_case(bench: &Bench, case: Case, rounds: u64) -> CaseResult {
    let mut result = CaseResult::new(case);
    for round in 0..rounds {
        let mut rate = None;
        if result.case.work == Work::FixedRate {
            match Box::pin(bench.half_rate(&result.case, round)).await {
                Ok(found) => {
                    result.rates.push(found);
                    rate = Some(found);
                }
                Err(error) => {
                    result.errors.push(format!("round {round}, offered rate: {error:#}"));
                    continue;
                }
            }
        }
        for index in result.case.order(round as usize) {
            let mode = result.case.modes[index];
            eprintln!("{}: round {} of {rounds}, {}", result.case.name, round + 1, mode.name);
            let sample = Box::pin(bench.run(&result.case, mode, round, rate)).await;
            let sample = sample.map_err(|error| {
                let error = format!("round {round}, {}: {error:#}", mode.name);
                eprintln!("FAILED {error}");
                result.errors.push(error);
            });
            result.add(index, sample.ok());
        }
    }
    result
}

/// The cases that run in a Linux guest.
async fn in_guest(
    options: &Options,
    bench: &Bench,
    machine: &Value,
    results: &mut Results,
) -> Result<()> {
    let mut cases = options.guest_cases();
    cases.retain(|case| !results.has(&case.name));
    if cases.is_empty() {
        return Ok(());
    }
    let parts = options.guest_parts().context("no guest is given, see --guest")?;
    let guest = guest::Guest::prepare(&parts, &bench.folder).await?;
    for case in cases {
        let mut result = CaseResult::new(case);
        for round in 0..options.rounds() {
            for index in result.case.order(round as usize) {
                let mode = result.case.modes[index];
                eprintln!("{}: round {}, {}", result.case.name, round + 1, mode.name);
                let sample = Box::pin(guest.run(bench, &result.case, mode, round)).await;
                let sample = sample.map_err(|error| {
                    result.errors.push(format!("round {round}, {}: {error:#}", mode.name));
                });
                result.add(index, sample.ok());
            }
        }
        print!("{}", case_text(&result, false));
        results.cases.push(result);
        keep(options, machine, results)?;
    }
    Ok(())
}

async fn timelines(bench: &Bench) -> Result<Vec<Line>> {
    let all = cases::all();
    let case = all.iter().find(|case| case.name == TIMELINE_CASE).context("no case for it")?;
    let rate = bench.half_rate(case, 0).await?;
    let mut lines = Vec::new();
    for mode in [cases::NONE, cases::C, cases::OURS] {
        eprintln!("{TIMELINE}: {}", mode.name);
        lines.push(Box::pin(timeline::run(bench, case, mode, TIMELINE_SECONDS, rate)).await?);
    }
    Ok(lines)
}

/// Prints the goals, plots, and writes the tables.
fn finish(options: &Options, bench: &Bench, machine: &Value, results: &Results) -> Result<bool> {
    let verdicts = results.verdicts();
    print!("{}", goals_text(&verdicts, false));
    for error in &results.errors {
        eprintln!("FAILED {error}");
    }
    let plots = options.plots.clone().unwrap_or_else(|| bench.folder.join("plots"));
    plot(&plots, results)?;
    if let Some(path) = &options.markdown {
        let mut text = String::from("## Results\n\n");
        let described = machine.as_object().into_iter().flatten();
        for (name, value) in described.filter(|(name, _)| *name != FILE_SYSTEM_ID) {
            text.push_str(&format!("- {name}: {}\n", value.to_string().trim_matches('"')));
        }
        text.push_str(&goals_text(&verdicts, true));
        text.extend(results.cases.iter().map(|case| case_text(case, true)));
        text.extend(results.setup.iter().map(|setup| setup_text(setup, true)));
        write(path, &text)?;
    }
    eprintln!("plots: {}", plots.display());
    Ok(results.errors.is_empty() && results.cases.iter().all(|case| case.errors.is_empty()))
}

/// What the numbers depend on.
fn machine(options: &Options, bench: &Bench, fio: &str) -> Result<Value> {
    let first = |path: &str, name: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
        line.rsplit(':').next().unwrap_or_default().trim().to_owned()
    };
    let daemon = std::fs::read(bench.bin.join(DAEMON)).context(DAEMON)?;
    let (file_system, file_system_id) = place::file_system(&bench.folder)?;
    Ok(json!({
        "processor": first("/proc/cpuinfo", "model name"),
        "processors": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "memory": first("/proc/meminfo", "MemTotal"),
        "kernel": first("/proc/sys/kernel/osrelease", ""),
        "load before the last run": first("/proc/loadavg", ""),
        "fio": fio,
        "file system": file_system,
        FILE_SYSTEM_ID: file_system_id,
        "disk MiB": bench.disk.size_bytes >> 20,
        "rounds": options.rounds(),
        "seconds": bench.seconds,
        "seconds of long runs": bench.long_seconds,
        "aio with cache direct": "native",
        "aio with cache default": bench.cached_aio,
        "reader releases": bench.reader_trims,
        "iothread": bench.iothread,
        "reflink KiB": options.reflink,
        "BLAKE3 of qemu-storage-daemon": blake3::hash(&daemon).to_hex()[..16].to_owned(),
    }))
}

fn plot(folder: &Path, results: &Results) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let names = ["none", "c", "ours", "ceiling"];
    for (metric, file) in [(Metric::Iops, "iops"), (Metric::P99, "p99"), (Metric::Reader, "reader")]
    {
        // Sizes of requests differ too much for one scale: everything relative to no backup.
        let groups: Vec<_> = results
            .cases
            .iter()
            .filter(|case| case.ratio(metric, "ours", "none").is_some())
            .map(|case| {
                let bars = names.iter().map(|mode| case.ratio(metric, mode, "none")).collect();
                (case.case.name.as_str(), bars)
            })
            .collect();
        if !groups.is_empty() {
            let title = format!("{}, relative to no backup", metric.name());
            write(&folder.join(format!("{file}.svg")), &svg::bars(&title, &names, &groups))?;
        }
    }
    if !results.timeline.is_empty() {
        let lines: Vec<_> = results
            .timeline
            .iter()
            .map(|line| (line.mode.as_str(), line.points.as_slice()))
            .collect();
        let title = "latency of 4 KiB writes at a fixed rate, means of 100 ms";
        let mark = (timeline::BEGINS.as_secs_f64(), "the backup begins");
        write(&folder.join("latency.svg"), &svg::lines(title, "µs", &lines, mark))?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
