// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask bench providers`: what backups by the directory provider cost, in process and over RPC,
//! beside plain copying tools.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use benches::backup::{Made, back_up, stored_bytes};
use benches::cases::turns;
use benches::disk::{Disk, check_free};
use benches::place;
use benches::procfs::family_cpu_us;
use benches::report::{Table, number, with_range};
use benches::scratch::Scratch;
use benches::source::{Image, PIECE_BYTES, Snapshot, half_zero};
use benches::stats::{estimate, ratio};
use benches::vm::{Tool, copy_to};
use clap::Parser;
use provider_api::{BitmapMode, Call, Provider};
use provider_directory::{DirectoryOptions, DirectoryProvider, ToolPaths};
use provider_rpc::{RpcOptions, RpcProvider};
use serde::Serialize;
use serde_json::json;

const MIB: u64 = 1 << 20;
const GIB: f64 = (1_u64 << 30) as f64;
const IN_PROCESS: &str = "directory, in process";
const RPC: &str = "directory, over RPC";
const TOOLS: [Tool; 2] = [Tool::NbdcopyQcow2, Tool::ConvertQcow2];
const WAYS: [&str; 4] = [IN_PROCESS, RPC, TOOLS[0].name(), TOOLS[1].name()];
const CASES: [&str; 3] = ["full", "half-zero", "increment"];
/// The time over RPC by that in process.
const RPC_AT_MOST: f64 = 1.1;

/// Measures backups by the directory provider, in process and over RPC, beside nbdcopy and qemu-img convert
/// of the same data: a disk without zeroes, one that is half zero, an increment.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask bench providers", bin_name = "cargo xtask bench providers")]
struct Options {
    /// Rounds of each case
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Size of the disk in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(8..=1 << 20))]
    disk_size: u64,
    /// What an increment finds changed, in per cent of the disk
    #[arg(long, value_name = "PERCENT", default_value_t = 25, value_parser = clap::value_parser!(u64).range(1..=100))]
    changed: u64,
    /// Only this case
    #[arg(long, value_name = "CASE", value_parser = CASES)]
    only: Option<String>,
    /// Lists the cases
    #[arg(long)]
    list: bool,
    /// Writes everything that was measured
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Writes the tables for a page
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// The folder of the patched QEMU programs
    #[arg(long, env = "VZDUMP_QEMU_BIN", value_name = "DIR")]
    qemu: Option<PathBuf>,
    /// The program directory-plugin (default: beside this one)
    #[arg(long, value_name = "FILE")]
    plugin: Option<PathBuf>,
    /// Where the disks and archives are (default target/bench)
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
}

/// One run.
#[derive(Debug, Clone, Copy, Serialize)]
struct Run {
    seconds: f64,
    cpu_seconds: f64,
    stored_bytes: u64,
}

/// What is compared in one case: by way and round; a failed run is none.
#[derive(Debug, Serialize)]
struct Case {
    name: &'static str,
    bytes: u64,
    ways: [&'static str; WAYS.len()],
    runs: [Vec<Option<Run>>; WAYS.len()],
    errors: Vec<String>,
}

impl Case {
    fn add(&mut self, way: usize, round: u32, run: Result<Run>) {
        let title = format!("{}: round {}, {}", self.name, round + 1, WAYS[way]);
        let run = run.inspect_err(|error| {
            let error = format!("{title}: {error:#}");
            eprintln!("FAILED {error}");
            self.errors.push(error);
        });
        if let Ok(run) = &run {
            eprintln!("{title}: {} s", number(Some(run.seconds)));
        }
        self.runs[way].push(run.ok());
    }

    fn values(&self, way: usize, of: impl Fn(&Run) -> f64) -> Vec<Option<f64>> {
        self.runs[way].iter().map(|run| run.as_ref().map(&of)).collect()
    }

    /// The median of a number, and its ratio to that of the provider in process.
    fn cells(&self, way: usize, scale: f64, of: impl Fn(&Run) -> f64) -> [String; 2] {
        let values = self.values(way, &of);
        let known: Vec<f64> = values.iter().flatten().map(|value| value * scale).collect();
        [with_range(estimate(&known)), with_range(ratio(&values, &self.values(0, &of)))]
    }

    fn text(&self, markdown: bool) -> String {
        let head = ["", "MB/s", "time", "CPU s/GiB", "CPU", "stored MiB", "stored"];
        let mut table = Table::new(&head);
        for (way, name) in self.ways.iter().enumerate() {
            let seconds: Vec<f64> =
                self.values(way, |run| run.seconds).into_iter().flatten().collect();
            let mb_s = estimate(&seconds).map(|found| self.bytes as f64 / 1e6 / found.median);
            let [_, time] = self.cells(way, 1.0, |run| run.seconds);
            let [cpu, cpu_ratio] = self.cells(way, GIB / self.bytes as f64, |run| run.cpu_seconds);
            let [stored, stored_ratio] =
                self.cells(way, 1.0 / MIB as f64, |run| run.stored_bytes as f64);
            let cells = [number(mb_s), time, cpu, cpu_ratio, stored, stored_ratio];
            table.rows.push([vec![(*name).to_owned()], cells.to_vec()].concat());
        }
        let edge = if markdown { "###" } else { "==" };
        let mut text = format!("\n{edge} {}, {} MiB\n\n", self.name, self.bytes / MIB);
        text.push_str(&table.text(markdown));
        let found = ratio(&self.values(1, |run| run.seconds), &self.values(0, |run| run.seconds));
        if let Some(found) = found {
            let word = if found.median <= RPC_AT_MOST { "reached" } else { "NOT reached" };
            text.push_str(&format!(
                "\ntime, CPU and stored: ratios to the first line, paired by round \
                 [interval of the median, {:.0} %]\n\
                 time over RPC at most {RPC_AT_MOST} of that in process: {} {word}\n",
                found.confidence * 100.0,
                with_range(Some(found))
            ));
        }
        text
    }
}

/// Where a case works.
struct Place {
    qemu: PathBuf,
    folder: PathBuf,
    storage: PathBuf,
    local: DirectoryProvider,
    remote: RpcProvider,
    start_time_s: i64,
}

impl Place {
    async fn new(qemu: &Path, plugin: &Path, folder: &Path) -> Result<Self> {
        let storage = folder.join("storage");
        let path = storage.to_str().context("the folder's name is no UTF-8")?.to_owned();
        let options = DirectoryOptions { path: storage.clone(), tools: ToolPaths::default() };
        let local = DirectoryProvider::new(options);
        let options = RpcOptions {
            program: plugin.to_owned(),
            storage: "bench".to_owned(),
            properties: vec![("path".to_owned(), path)],
            secrets_path: folder.join("bench.pw"),
            tap: None,
        };
        let remote = RpcProvider::start(options).await?;
        local.activate(&Call::default()).await?;
        remote.activate(&Call::default()).await?;
        // Archives are called after their time.
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let (qemu, folder) = (qemu.to_owned(), folder.to_owned());
        Ok(Self { qemu, folder, storage, local, remote, start_time_s: i64::try_from(now_s)? })
    }

    async fn back_up(&mut self, way: usize, from: &Snapshot, mode: BitmapMode) -> Result<Made> {
        let providers: [&dyn Provider; 2] = [&self.local, &self.remote];
        self.start_time_s += 1;
        back_up(providers[way], from, mode, self.start_time_s).await
    }

    /// A backup by a provider, which is removed again.
    async fn provider(&mut self, way: usize, from: &Snapshot, mode: BitmapMode) -> Result<Run> {
        let before = cpu_seconds(from)?;
        let made = self.back_up(way, from, mode).await?;
        let cpu_seconds = cpu_seconds(from)? - before;
        let stored_bytes = stored_bytes(&self.storage.join(&made.archive))?;
        self.local.remove(&made.archive, &Call::default()).await?;
        Ok(Run { seconds: made.seconds, cpu_seconds, stored_bytes })
    }

    /// A copy by a tool, which is removed again.
    async fn tool(&self, tool: Tool, from: &Snapshot) -> Result<Run> {
        let out = self.folder.join("out");
        let before = cpu_seconds(from)?;
        let copied = copy_to(tool, &self.qemu, &from.uri(), &out, from.size_bytes).await;
        let cpu_seconds = cpu_seconds(from)? - before;
        let stored_bytes = copied.and_then(|seconds| Ok((seconds, stored_bytes(&out)?)));
        std::fs::remove_file(&out).context("no copy")?;
        let (seconds, stored_bytes) = stored_bytes?;
        Ok(Run { seconds, cpu_seconds, stored_bytes })
    }
}

/// Of this process and all that it has started, without the server of the snapshot.
fn cpu_seconds(from: &Snapshot) -> Result<f64> {
    let servers: Vec<u32> = from.pid().into_iter().collect();
    Ok(family_cpu_us(std::process::id(), &servers)? as f64 / 1e6)
}

/// The rounds of a case: providers read the one snapshot, tools the other one.
async fn rounds(
    name: &'static str,
    options: &Options,
    place: &mut Place,
    [ours, theirs]: [&Snapshot; 2],
    mode: BitmapMode,
) -> Case {
    let bytes = theirs.size_bytes;
    let runs = std::array::from_fn(|_| Vec::new());
    let mut case = Case { name, bytes, ways: WAYS, runs, errors: Vec::new() };
    for round in 0..options.rounds {
        for way in turns(WAYS.len(), round as usize) {
            let run = match way.checked_sub(2) {
                None => place.provider(way, ours, mode).await,
                Some(tool) => place.tool(TOOLS[tool], theirs).await,
            };
            case.add(way, round, run);
        }
    }
    case
}

async fn full(
    name: &'static str,
    options: &Options,
    place: &mut Place,
    raw: &Path,
) -> Result<Case> {
    let image = Image::create(&place.qemu, &place.folder, name, raw).await?;
    let snapshot = image.serve().await?;
    let case = rounds(name, options, place, [&snapshot; 2], BitmapMode::New).await;
    snapshot.end().await?;
    Ok(case)
}

/// The tools copy a disk that is as large as what has changed.
async fn increment(
    name: &'static str,
    options: &Options,
    place: &mut Place,
    disk: &Disk,
    changed: &Disk,
) -> Result<Case> {
    let mut image = Image::create(&place.qemu, &place.folder, name, &disk.path).await?;
    let base = image.serve().await?;
    place.back_up(0, &base, BitmapMode::New).await?;
    base.end().await?;
    image.change(changed.size_bytes).await?;
    let ours = image.serve().await?;
    let copied = Image::create(&place.qemu, &place.folder, "changed", &changed.path).await?;
    let theirs = copied.serve().await?;
    let case = rounds(name, options, place, [&ours, &theirs], BitmapMode::Reuse).await;
    ours.end().await?;
    theirs.end().await?;
    Ok(case)
}

/// All cases that are wanted.
async fn measure(options: &Options) -> Result<Vec<Case>> {
    let (folder, _alone) = place::folder(options.folder.as_deref())?;
    let bytes = options.disk_size * MIB;
    // Two raw files, the image, the base of an increment, a backup; and the changed part, twice.
    check_free(&folder, bytes * 7, "--disk-size makes that less")?;
    let qemu = place::qemu(options.qemu.as_deref())?;
    let plugin = match &options.plugin {
        Some(program) => program.clone(),
        None => std::env::current_exe()?.with_file_name("directory-plugin"),
    };
    let plugin = plugin.canonicalize().with_context(|| format!("no {}", plugin.display()))?;
    let disk = Disk::ensure(&folder, bytes)?;
    let changed_bytes =
        (bytes * options.changed / 100).max(PIECE_BYTES) / PIECE_BYTES * PIECE_BYTES;
    let mut cases = Vec::new();
    for name in CASES {
        if options.only.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        let folder = Scratch::new(&folder, "p-")?;
        let mut place = Place::new(&qemu, &plugin, folder.path()).await?;
        cases.push(match name {
            "full" => full(name, options, &mut place, &disk.path).await?,
            "half-zero" => {
                let half = folder.path().join("half.raw");
                half_zero(&disk.path, &half)?;
                full(name, options, &mut place, &half).await?
            }
            _ => {
                let changed = Disk::ensure(folder.path(), changed_bytes)?;
                increment(name, options, &mut place, &disk, &changed).await?
            }
        });
    }
    ensure!(!cases.is_empty(), "no case was asked for");
    Ok(cases)
}

/// Whether everything could be measured.
async fn run(options: &Options) -> Result<bool> {
    // A server that a tool leaves behind still counts as its own.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let cases = measure(options).await?;
    let text = |markdown| cases.iter().map(|case| case.text(markdown)).collect::<String>();
    print!("{}", text(false));
    let json = serde_json::to_string_pretty(&json!({ "cases": cases }))?;
    for (path, text) in [(&options.json, json), (&options.markdown, text(true))] {
        if let Some(path) = path {
            std::fs::write(path, text)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(cases.iter().all(|case| case.errors.is_empty()))
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    if options.list {
        println!("{}", CASES.join("\n"));
        return ExitCode::SUCCESS;
    }
    match place::until_stopped(run(&options)).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
