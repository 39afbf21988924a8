// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask fuzz`: the targets of `fuzz/` with libFuzzer, on a stable toolchain.
//!
//! `cargo fuzz` does the same and more, but is one more program to install and wants a nightly
//! toolchain for its sanitizers. Those find faults of `unsafe` code, which the targets do not have.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cargo::cargo;
use crate::paths::Paths;
use crate::run::{Show, Step, output};

/// What makes the compiler count which edges of the program run, for libFuzzer to follow.
const FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions",
    "-Ccodegen-units=1",
];
/// A target may build for this long.
const BUILD_LIMIT: Duration = Duration::from_secs(1800);
/// For reading the corpus, and for the last input.
const RUN_MARGIN: Duration = Duration::from_secs(120);
const DEFAULT_SECONDS: u32 = 60;
/// One input may take so long, and the whole process so much memory.
const INPUT_SECONDS: u32 = 30;
const MEMORY_MIB: u32 = 2048;
/// Longest input that is made up.
const INPUT_BYTES: u32 = 16 << 10;

/// Which targets, and how long.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Seconds of each target
    #[arg(long, value_name = "N", default_value_t = DEFAULT_SECONDS)]
    seconds: u32,
    /// Targets, by the names of the files in fuzz/fuzz_targets (default: all)
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
}

/// Runs the targets one after the other, all of them even if one finds something.
pub(crate) fn run(paths: &Paths, options: &Options) -> Result<ExitCode> {
    let fuzzer = Fuzzer::build(paths)?;
    let known = fuzzer.targets();
    if let Some(unknown) = options.targets.iter().find(|name| !known.contains(name)) {
        bail!("no target \"{unknown}\"; there are {}", known.join(", "));
    }
    let chosen = if options.targets.is_empty() { known } else { &options.targets };
    let mut code = ExitCode::SUCCESS;
    for target in chosen {
        if let Err(error) = fuzzer.run(target, options.seconds) {
            eprintln!("error: {error:#}");
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

/// The targets, built.
pub(crate) struct Fuzzer<'a> {
    paths: &'a Paths,
    programs: PathBuf,
    targets: Vec<String>,
}

impl<'a> Fuzzer<'a> {
    /// Builds all targets.
    pub(crate) fn build(paths: &'a Paths) -> Result<Self> {
        let triple = host_triple()?;
        let target_dir = paths.root.join("target/fuzz");
        let args = ["build", "--quiet", "--release", "--locked"];
        let mut command = cargo(paths, &args);
        command.arg("--manifest-path").arg(paths.root.join("fuzz/Cargo.toml"));
        command.arg("--target-dir").arg(&target_dir);
        // With a target, even the host's own, the flags are not those of build scripts.
        command.args(["--target", &triple]).env("RUSTFLAGS", FLAGS.join(" "));
        let log = paths.logs().join("fuzz-build.log");
        Step { name: "fuzz targets", log, show: Show::All, limit: BUILD_LIMIT }.run(command)?;
        let programs = target_dir.join(triple).join("release");
        Ok(Self { paths, programs, targets: targets(paths)? })
    }

    /// The names of all targets.
    pub(crate) fn targets(&self) -> &[String] {
        &self.targets
    }

    /// Runs one target; an error if it finds something.
    pub(crate) fn run(&self, target: &str, seconds: u32) -> Result<()> {
        let folder = self.paths.root.join("target/fuzz");
        // What it finds interesting is kept here, so that the next run goes on from there.
        let corpus = folder.join("corpus").join(target);
        let artifacts = folder.join("artifacts").join(target);
        for folder in [&corpus, &artifacts] {
            fs::create_dir_all(folder)
                .with_context(|| format!("{}: cannot create", folder.display()))?;
        }
        let mut command = Command::new(self.programs.join(target));
        command.arg(format!("-max_total_time={seconds}"));
        command.arg(format!("-timeout={INPUT_SECONDS}"));
        command.arg(format!("-rss_limit_mb={MEMORY_MIB}"));
        command.arg(format!("-max_len={INPUT_BYTES}"));
        command.arg(format!("-artifact_prefix={}/", artifacts.display()));
        command.arg("-print_final_stats=1");
        command.arg(corpus).arg(self.paths.root.join("fuzz/seeds").join(target));
        let name = format!("fuzz {target}, {seconds} s");
        let log = self.paths.logs().join(format!("fuzz-{target}.log"));
        let limit = Duration::from_secs(seconds.into()) + RUN_MARGIN;
        let step = Step { name: &name, log, show: Show::Progress, limit };
        step.run(command).with_context(|| {
            format!("what made {target} fail is in {}; see docs/testing.md", artifacts.display())
        })
    }
}

/// The names of the targets' files.
fn targets(paths: &Paths) -> Result<Vec<String>> {
    let folder = paths.root.join("fuzz/fuzz_targets");
    let files = fs::read_dir(&folder).with_context(|| format!("{}: cannot read", folder.display()));
    let mut names = Vec::new();
    for file in files? {
        let path = file.with_context(|| format!("{}: cannot read", folder.display()))?.path();
        names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

fn host_triple() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = output(Command::new(rustc).arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV does not tell the host")?.to_owned())
}
