// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask bench vm`: how fast backups of a VM are, beside plain copying tools.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use benches::cases::turns;
use benches::disk::{Disk, check_free};
use benches::place;
use benches::report::{Table, number, with_range};
use benches::stats::{Estimate, estimate, ratio};
use benches::vm::{Content, Programs, Tool, Vm, check_folder};
use clap::Parser;
use serde::Serialize;
use serde_json::json;

const MIB: u64 = 1 << 20;
/// The sparse disk of the increment.
const SPARSE_BYTES: u64 = 1 << 40;
const CASES: [&str; 3] = ["full", "increment", "disks"];
const VZDUMP: &str = "vzdump";
const TOOLS: [Tool; 4] =
    [Tool::NbdcopyQcow2, Tool::ConvertQcow2, Tool::NbdcopyRaw, Tool::ConvertRaw];
const INCREMENT: &str = "increment of 1 TiB";
const COPY: &str = "nbdcopy of as much";
const ONE_DISK: &str = "one disk";
const EIGHT_DISKS: &str = "eight disks";

/// Measures backups of a VM by vzdump beside nbdcopy and qemu-img convert of the same snapshot: a full
/// backup, an increment of a large disk, eight disks at the same time.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask bench vm", bin_name = "cargo xtask bench vm")]
struct Options {
    /// Rounds of each case
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Data of a full backup in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    data: u64,
    /// Changed data of an increment in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..=1 << 18))]
    dirty: u64,
    /// Only this: full, increment or disks
    #[arg(long, value_name = "CASE", value_parser = CASES)]
    only: Option<String>,
    /// Writes everything that was measured
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The folder of the patched QEMU programs
    #[arg(long, env = "VZDUMP_QEMU_BIN", value_name = "DIR")]
    qemu: Option<PathBuf>,
    /// The program vzdump (default: beside this one)
    #[arg(long, value_name = "FILE")]
    vzdump: Option<PathBuf>,
    /// Where the disks and backups are (default target/bench)
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
}

/// One way to do it: its seconds by round; a failed run is none.
#[derive(Debug, Serialize)]
struct Series {
    name: &'static str,
    seconds: Vec<Option<f64>>,
}

/// What is compared in one case.
#[derive(Debug, Serialize)]
struct Case {
    name: &'static str,
    bytes: u64,
    series: Vec<Series>,
    goals: Vec<Goal>,
    errors: Vec<String>,
}

/// A bound of the ratio of the times of two ways.
#[derive(Debug, Serialize)]
struct Goal {
    of: &'static str,
    against: &'static str,
    most: f64,
    measured: Option<Estimate>,
}

impl Case {
    fn new(name: &'static str, bytes: u64, ways: &[&'static str]) -> Self {
        let series = ways.iter().map(|&name| Series { name, seconds: Vec::new() }).collect();
        Self { name, bytes, series, goals: Vec::new(), errors: Vec::new() }
    }

    fn add(&mut self, way: usize, round: u32, seconds: Result<f64>) {
        let name = self.series[way].name;
        let seconds = seconds.inspect_err(|error| {
            let error = format!("{}: round {}, {name}: {error:#}", self.name, round + 1);
            eprintln!("FAILED {error}");
            self.errors.push(error);
        });
        if let Ok(seconds) = &seconds {
            eprintln!("{}: round {}, {name}: {} s", self.name, round + 1, number(Some(*seconds)));
        }
        self.series[way].seconds.push(seconds.ok());
    }

    fn seconds(&self, name: &str) -> &[Option<f64>] {
        self.series.iter().find(|series| series.name == name).map_or(&[], |found| &found.seconds)
    }

    fn judge(&mut self, of: &'static str, against: &'static str, most: f64) {
        let measured = ratio(self.seconds(of), self.seconds(against));
        self.goals.push(Goal { of, against, most, measured });
    }

    fn text(&self) -> String {
        let first = self.series.first().map_or("", |series| series.name);
        let against = format!("time / {first}");
        let mut table = Table::new(&["", "seconds", "MB/s", &against]);
        for series in &self.series {
            let known: Vec<f64> = series.seconds.iter().copied().flatten().collect();
            let median = estimate(&known);
            table.rows.push(vec![
                series.name.to_owned(),
                with_range(median),
                number(median.map(|median| self.bytes as f64 / 1e6 / median.median)),
                with_range(ratio(&series.seconds, self.seconds(first))),
            ]);
        }
        let mut text =
            format!("\n== {}, {} MiB\n\n{}\n", self.name, self.bytes / MIB, table.text(false));
        for goal in &self.goals {
            let reached = goal.measured.map(|measured| measured.median <= goal.most);
            let word = match reached {
                Some(true) => "reached",
                Some(false) => "NOT reached",
                None => "not measured",
            };
            text.push_str(&format!(
                "{} / {} at most {:.3}: {} {word}\n",
                goal.of,
                goal.against,
                goal.most,
                with_range(goal.measured)
            ));
        }
        text
    }
}

/// What all cases work with.
struct Place {
    programs: Programs,
    folder: PathBuf,
}

impl Place {
    async fn start(&self, disks: &[Content]) -> Result<Vm> {
        Vm::start(&self.programs, &self.folder, disks).await
    }
}

/// A full backup, and the tools into both formats.
async fn full(options: &Options, place: &Place, disk: &Disk) -> Result<Case> {
    let ways: Vec<&'static str> = [VZDUMP].into_iter().chain(TOOLS.map(Tool::name)).collect();
    let mut case = Case::new("full backup", disk.size_bytes, &ways);
    let vm = place.start(&[Content::File(disk.path.clone())]).await?;
    for round in 0..options.rounds {
        for way in turns(ways.len(), round as usize) {
            let seconds = match way.checked_sub(1) {
                None => full_backup(&vm, disk.size_bytes).await,
                Some(tool) => vm.copy(TOOLS[tool], 0, disk.size_bytes).await,
            };
            case.add(way, round, seconds);
        }
    }
    case.judge(VZDUMP, Tool::NbdcopyQcow2.name(), 1.0 / 0.95);
    Ok(case)
}

async fn full_backup(vm: &Vm, bytes: u64) -> Result<f64> {
    vm.forget_backups()?;
    let backup = vm.backup().await?;
    ensure!(backup.read_bytes == bytes, "it read {} of {bytes} bytes", backup.read_bytes);
    Ok(backup.seconds)
}

/// What changed in a large disk, and a copy of a disk that is not larger than that.
async fn increment(options: &Options, place: &Place) -> Result<Case> {
    let dirty = options.dirty * MIB;
    let mut case = Case::new("increment", dirty, &[INCREMENT, COPY]);
    let changed = Disk::ensure(&place.folder, dirty)?;
    let disks = [Content::File(changed.path), Content::Empty(SPARSE_BYTES)];
    let vm = place.start(&disks).await?;
    // The increments build upon it; it holds the first disk, which does not change later.
    vm.backup().await?;
    for round in 0..options.rounds {
        let pattern = u8::try_from(round % 255 + 1)?;
        vm.write(1, pattern, offset(round, dirty), dirty).await?;
        for way in turns(2, round as usize) {
            let seconds = match way {
                0 => vm.backup().await.and_then(|backup| {
                    let read = backup.read_bytes;
                    ensure!(read == dirty, "it read {read} of {dirty} changed bytes");
                    Ok(backup.seconds)
                }),
                _ => vm.copy(Tool::NbdcopyQcow2, 0, dirty).await,
            };
            case.add(way, round, seconds);
        }
    }
    case.judge(INCREMENT, COPY, 1.2);
    Ok(case)
}

/// Where a round writes so many bytes to the sparse disk: far from the rounds before.
fn offset(round: u32, bytes: u64) -> u64 {
    ((u64::from(round) * 7 + 1) << 32) % (SPARSE_BYTES - bytes)
}

/// The same data on one disk, and on eight that are copied side by side.
async fn disks(options: &Options, place: &Place, disk: &Disk) -> Result<Case> {
    let mut case = Case::new("disks side by side", disk.size_bytes, &[EIGHT_DISKS, ONE_DISK]);
    let part = Disk::ensure(&place.folder, disk.size_bytes / 8)?;
    let eight = vec![Content::File(part.path); 8];
    let eight = place.start(&eight).await?;
    let one = place.start(&[Content::File(disk.path.clone())]).await?;
    for round in 0..options.rounds {
        for way in turns(2, round as usize) {
            let seconds = full_backup([&eight, &one][way], disk.size_bytes).await;
            case.add(way, round, seconds);
        }
    }
    case.judge(EIGHT_DISKS, ONE_DISK, 1.0);
    Ok(case)
}

/// Whether everything could be measured.
async fn measure(options: &Options) -> Result<bool> {
    let (folder, _alone) = place::folder(options.folder.as_deref())?;
    check_folder(&folder)?;
    let bytes = options.data * MIB;
    // The disk, two copies of it in VMs, a backup and a copy; and what increments add.
    let rounds = u64::from(options.rounds);
    let needed = bytes * 5 + options.dirty * MIB * (2 * rounds + 4);
    check_free(&folder, needed, "--data, --dirty and --rounds make that less")?;
    let vzdump = match &options.vzdump {
        Some(program) => program.clone(),
        None => std::env::current_exe()?.with_file_name("vzdump"),
    };
    let place = Place {
        programs: Programs {
            qemu: place::qemu(options.qemu.as_deref())?,
            vzdump: vzdump.canonicalize().with_context(|| format!("no {}", vzdump.display()))?,
        },
        folder: folder.clone(),
    };
    let disk = Disk::ensure(&folder, bytes)?;
    let wanted = |name: &str| options.only.as_deref().is_none_or(|only| only == name);
    let mut cases = Vec::new();
    for name in CASES.into_iter().filter(|name| wanted(name)) {
        cases.push(match name {
            "full" => full(options, &place, &disk).await?,
            "increment" => increment(options, &place).await?,
            _ => disks(options, &place, &disk).await?,
        });
        // After each: a later one may fail.
        keep(options, &cases)?;
    }
    Ok(cases.iter().all(|case| case.errors.is_empty()))
}

/// Prints the last case, and writes all.
fn keep(options: &Options, cases: &[Case]) -> Result<()> {
    print!("{}", cases.last().map(Case::text).unwrap_or_default());
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&json!({ "cases": cases }))?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    match place::until_stopped(measure(&options)).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_writes_inside_of_the_sparse_disk() {
        for bytes in [64 * MIB, 1024 * MIB, MIB << 18] {
            for round in 0..1000 {
                let offset = offset(round, bytes);
                assert!(offset + bytes <= SPARSE_BYTES, "round {round}, {bytes} bytes");
                assert!(offset.is_multiple_of(MIB));
            }
        }
        assert_eq!(offset(2, 1024 * MIB), 15 << 32);
    }
}
