// SPDX-License-Identifier: MIT OR Apache-2.0
//! The demo: backs up a running VM, twice, restores both backups, and lets the guests check them.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use system_tests::lab::{BACKUPS, IMAGES, Lab, LabOptions, PLAIN_VIRTIO, SOURCE_VM};
use system_tests::process::Stop;
use system_tests::signals::{CLEAN_WITHIN, Ended, until_signal};
use system_tests::story::{self, Ending, Pace};
use system_tests::table::bytes;

const USAGE: &str = "usage: demo [--keep] [--dir DIR]
  --keep     leave the folder with configuration, disks, backups and logs
  --dir DIR  use this folder, which must be empty or new (default: a new one in /var/tmp)";
/// Disks, their backups and restores together.
const NEEDED_BYTES: u64 = 6 << 30;
const OPTIONS: LabOptions = LabOptions {
    disk_bytes: 512 << 20,
    format: "qcow2",
    hardware: PLAIN_VIRTIO,
    rate_per_s: 200,
    show: true,
};
const PACE: Pace = Pace { before: 500, between: 2500 };

struct Options {
    keep: bool,
    dir: Option<PathBuf>,
}

fn main() -> ExitCode {
    let outcome = parse(std::env::args().skip(1)).and_then(|options| run(&options));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options { keep: false, dir: None };
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--keep" => options.keep = true,
            "--dir" => options.dir = Some(arguments.next().context(USAGE)?.into()),
            _ => bail!("{USAGE}"),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<()> {
    let mut folder = Folder::make(options)?;
    let (dir, keep) = (folder.path.clone(), options.keep);
    match until_signal(move |stop| demo(&dir, keep, stop))? {
        Ended::Done(result) => {
            folder.close(result.is_err())?;
            result
        }
        Ended::Stopped => {
            folder.close(false)?;
            bail!("interrupted; the VMs are stopped")
        }
        Ended::Stuck => {
            folder.close(true)?;
            bail!("interrupted; the VMs did not stop within {CLEAN_WITHIN:?}")
        }
    }
}

fn demo(dir: &Path, keep: bool, stop: &Stop) -> Result<()> {
    println!("Backup of a running VM, an increment, and restores of both, in {}\n", dir.display());
    println!("1. Build a small Linux guest and its disks (2 × {}).", bytes(OPTIONS.disk_bytes));
    let mut lab = Lab::create(dir, OPTIONS, stop)?;
    let mut number = 1;
    let ending = story::tell(&mut lab, PACE, |text| {
        number += 1;
        println!("{number}. {text}");
    })?;
    let archives = lab.archives()?;
    println!("\n{}", ending.table);
    println!("{}", explain(&ending));
    if keep {
        println!("\nTry these by hand:");
        hints(&lab, &archives).iter().for_each(|line| println!("   {line}"));
    } else {
        println!("\nRun it with --keep to try the commands by hand afterwards.");
    }
    Ok(())
}

fn explain(ending: &Ending) -> String {
    let Ending { full, increment, touched_bytes, .. } = ending;
    format!(
        "The increment transferred {} of {}: the guest's records since the full backup touched {}\n\
         (counted in clusters of 64 KiB). Every sector of both restored VMs is what it must be, and\n\
         both disks of each are from one point in time.",
        bytes(increment.total_bytes),
        bytes(full.disks_bytes),
        bytes(*touched_bytes)
    )
}

fn hints(lab: &Lab, archives: &[String]) -> Vec<String> {
    let archive = archives.last().map_or("ARCHIVE", String::as_str);
    let vm = SOURCE_VM.to_string();
    [
        vec!["list", "--storage", BACKUPS],
        vec!["show-config", archive],
        vec!["vm", "start", &vm],
        vec!["backup", &vm, "--storage", BACKUPS],
        vec!["restore", archive, "110", "--storage", IMAGES, "--allow-raw-config"],
        vec!["vm", "stop", &vm],
    ]
    .iter()
    .map(|arguments| lab.vzdump.line(arguments))
    .collect()
}

/// The folder of the demo, removed at the end unless it is to be kept.
struct Folder {
    path: PathBuf,
    temporary: Option<tempfile::TempDir>,
    keep: bool,
}

impl Folder {
    fn make(options: &Options) -> Result<Self> {
        let (path, temporary) = match &options.dir {
            Some(dir) => {
                std::fs::create_dir_all(dir)
                    .with_context(|| format!("cannot make {}", dir.display()))?;
                if dir.read_dir()?.next().is_some() {
                    bail!("{} is not empty", dir.display());
                }
                (std::path::absolute(dir)?, None)
            }
            None => {
                // Not /tmp, which may be memory: the disks need gigabytes.
                let made =
                    tempfile::Builder::new().prefix("vzdump-demo-").tempdir_in("/var/tmp")?;
                (made.path().to_owned(), Some(made))
            }
        };
        let free = rustix::fs::statvfs(&path)?;
        let free_bytes = free.f_bavail.saturating_mul(free.f_frsize);
        if free_bytes < NEEDED_BYTES {
            let (free, needed) = (bytes(free_bytes), bytes(NEEDED_BYTES));
            bail!("{} has {free} of free space, the demo needs {needed}", path.display());
        }
        Ok(Self { path, temporary, keep: options.keep })
    }

    /// A folder that the user named is emptied, not removed; logs of a failure are kept.
    fn close(&mut self, failed: bool) -> Result<()> {
        let temporary = self.temporary.take();
        if self.keep || failed {
            let kept = temporary.map_or_else(|| self.path.clone(), tempfile::TempDir::keep);
            println!("\nEverything is left in {}", kept.display());
            return Ok(());
        }
        if temporary.is_none() {
            for entry in self.path.read_dir()? {
                let entry = entry?.path();
                let removed = if entry.is_dir() {
                    std::fs::remove_dir_all(&entry)
                } else {
                    std::fs::remove_file(&entry)
                };
                removed.with_context(|| format!("cannot remove {}", entry.display()))?;
            }
        }
        Ok(())
    }
}
