// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask test`: every check of the gate, each run even if another failed, and their totals.

use std::ops::AddAssign;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::cargo::{QEMU_BIN_ENV, cargo, ensure_components, has_subcommand};
use crate::paths::Paths;
use crate::qemu::Suite;
use crate::run::{Show, Step};
use crate::{fidelity, fuzz, qemu, setup, soak, tidy};

/// The crates that only build against a QEMU build tree.
const NEEDS_QEMU: &[&str] = &["qemu-ext", "qemu-ext-sys"];
const SYSTEM_TESTS: &str = "system-tests";
/// Seeds of the stress test in the long suites; the gate's number is the test's own default.
const FULL_SEEDS: u32 = 100;
/// Schedules of the engine's property test in `full`.
const FULL_SCHEDULES: u32 = 100_000;
/// Seconds of the engine's test with real threads in `full`.
const FULL_THREADS_SECONDS: u32 = 60;
/// How many more preemptions than in the gate the engine's interleavings have in `full`.
const FULL_MORE_PREEMPTIONS: u32 = 1;

/// Seconds of each fuzz target in `full`.
const FULL_FUZZ_SECONDS: u32 = 60;

/// Which checks to run, and how long.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Options {
    /// Only the checks that need no QEMU
    #[arg(long)]
    no_qemu: bool,
    /// Seeds of the stress test (default: the test's own)
    #[arg(long, value_name = "N")]
    stress_seeds: Option<u32>,
    /// Also the fuzz targets, each for so many seconds
    #[arg(long, value_name = "N")]
    fuzz_seconds: Option<u32>,
    /// Also the soak, for so many minutes; `full` does so for 20 unless told otherwise
    #[arg(long, value_name = "N", conflicts_with = "no_qemu")]
    soak_minutes: Option<u32>,
    /// Also the tests marked ignored
    #[arg(long)]
    ignored: bool,
    /// Also the QEMU of this suite of Debian, if it is offered: build it and run the system tests
    /// on it; `full` does so with sid:10.2 unless told otherwise
    #[arg(long, value_name = "SUITE[:SERIES]", conflicts_with = "no_qemu")]
    suite: Option<Suite>,
}

impl Options {
    /// The long suites.
    pub(crate) fn full(self) -> Self {
        let second = (!self.no_qemu).then(Suite::second);
        let soak_minutes = (!self.no_qemu).then_some(soak::DEFAULT_MINUTES);
        Self {
            stress_seeds: self.stress_seeds.or(Some(FULL_SEEDS)),
            fuzz_seconds: self.fuzz_seconds.or(Some(FULL_FUZZ_SECONDS)),
            soak_minutes: self.soak_minutes.or(soak_minutes),
            ignored: true,
            suite: self.suite.or(second),
            ..self
        }
    }
}

/// How many tests or checks ended in which way.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Totals {
    passed: u64,
    failed: u64,
}

impl Totals {
    const PASSED: Self = Self { passed: 1, failed: 0 };
    const FAILED: Self = Self { passed: 0, failed: 1 };
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Collects the rows of the closing table, and what could not be checked.
#[derive(Default)]
struct Report {
    rows: Vec<(String, Totals, Duration)>,
    omitted: Vec<String>,
}

impl Report {
    /// Runs one check and notes what came of it.
    fn check(&mut self, name: &str, run: impl FnOnce() -> Result<Totals>) -> bool {
        eprintln!("\n=== {name}");
        let start = Instant::now();
        let totals = run().unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            Totals::FAILED
        });
        self.rows.push((name.to_string(), totals, start.elapsed()));
        totals.failed == 0
    }

    /// Prints the table and the closing line.
    fn close(&self) -> ExitCode {
        let mut sum = Totals::default();
        println!("\n{:<16} {:>7} {:>7} {:>9}", "check", "passed", "failed", "seconds");
        for (name, totals, time) in &self.rows {
            println!(
                "{name:<16} {:>7} {:>7} {:>9.1}",
                totals.passed,
                totals.failed,
                time.as_secs_f64()
            );
            sum += *totals;
        }
        for what in &self.omitted {
            println!("\nNOT CHECKED: {what}");
        }
        println!("\n{} passed, {} failed", sum.passed, sum.failed);
        if sum.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Runs the gate.
pub(crate) fn run(paths: &Paths, options: &Options) -> Result<ExitCode> {
    setup::run()?;
    ensure_components(paths)?;
    let gate = Gate { paths, options, nextest: has_subcommand(paths, "nextest") };
    let mut report = Report::default();
    report.check("format", || gate.simple("format", &["fmt", "--all", "--check"]));
    report.check("tidy", || {
        let (passed, failed) = tidy::report(paths)?;
        Ok(Totals { passed, failed })
    });
    if has_subcommand(paths, "deny") {
        let args = ["deny", "--offline", "check", "licenses", "bans", "sources"];
        report.check("licences", || gate.simple("licences", &args));
    } else {
        let what = "licences and sources of the crates of others: there is no cargo-deny \
                    (cargo install cargo-deny)";
        report.omitted.push(what.into());
    }
    let qemu = !options.no_qemu
        && report.check("qemu", || {
            qemu::run(paths, &qemu::Options { faults: true, ..qemu::Options::default() })?;
            Ok(Totals::PASSED)
        });
    if qemu {
        let scope = if options.ignored { qemu::Scope::Everything } else { qemu::Scope::Module };
        report.check("qmp reference", || {
            qemu::check_reference(paths, scope)?;
            Ok(Totals::PASSED)
        });
    }
    report.check("clippy", || gate.clippy(qemu));
    report.check("unit tests", || gate.unit_tests());
    report.check("doc tests", || gate.doc_tests());
    report.check("interleavings", || gate.interleavings());
    if let Some(seconds) = options.fuzz_seconds {
        report.check("fuzz targets", || gate.fuzz(seconds));
    }
    if qemu {
        report.check("system tests", || gate.system_tests());
        if options.ignored {
            for is_privileged in [false, true] {
                report.check("fidelity", || {
                    let right = fidelity::check(paths, is_privileged)?;
                    Ok(if right { Totals::PASSED } else { Totals::FAILED })
                });
            }
        }
        if let Some(minutes) = options.soak_minutes {
            report.check("soak", || {
                let right = soak::check(paths, soak::Options::for_minutes(minutes))?;
                Ok(if right { Totals::PASSED } else { Totals::FAILED })
            });
        }
        if let Some(suite) = &options.suite {
            second_qemu(&gate, &mut report, suite);
        }
    } else if !options.no_qemu {
        report.check("system tests", || anyhow::bail!("cannot run without the patched QEMU"));
    }
    Ok(report.close())
}

/// Builds the QEMU of another suite and runs the system tests on it. That the suite cannot be had
/// here is no failure of ours: the report says so.
fn second_qemu(gate: &Gate<'_>, report: &mut Report, suite: &Suite) {
    eprintln!("\n=== is QEMU of {suite} offered?");
    if let Err(error) = qemu::fetch(gate.paths, suite) {
        report.omitted.push(format!("the QEMU of Debian's {suite}, not offered here: {error:#}"));
        return;
    }
    let options =
        qemu::Options { faults: true, suite: Some(suite.clone()), ..qemu::Options::default() };
    let built = report.check(&format!("qemu {suite}"), || {
        qemu::run(gate.paths, &options)?;
        // Each version has a generator of its own.
        qemu::check_reference(&suite.paths(gate.paths), qemu::Scope::Module)?;
        Ok(Totals::PASSED)
    });
    let tests = format!("tests on {suite}");
    if built {
        let paths = suite.paths(gate.paths);
        // As the gate runs them: the long suites have just run on the default QEMU.
        let short = Options::default();
        let gate = Gate { paths: &paths, options: &short, nextest: gate.nextest };
        report.check(&tests, || gate.run_system_tests(&tests));
    } else {
        report.check(&tests, || anyhow::bail!("cannot run without the QEMU of {suite}"));
    }
}

struct Gate<'a> {
    paths: &'a Paths,
    options: &'a Options,
    nextest: bool,
}

impl Gate<'_> {
    /// A command that passes or fails as a whole.
    fn simple(&self, name: &str, args: &[&str]) -> Result<Totals> {
        let ended = self.step(name, 1800).watch(cargo(self.paths, args), |_| ())?;
        Ok(if ended.ok() { Totals::PASSED } else { Totals::FAILED })
    }

    fn step<'a>(&self, name: &'a str, limit_s: u64) -> Step<'a> {
        let log = self.paths.logs().join(format!("test-{}.log", name.replace(' ', "-")));
        Step { name, log, show: Show::All, limit: Duration::from_secs(limit_s) }
    }

    /// All crates that can be built.
    fn workspace(&self, qemu: bool) -> Vec<&'static str> {
        let mut args = vec!["--workspace"];
        if !qemu {
            args.extend(NEEDS_QEMU.iter().flat_map(|name| ["--exclude", name]));
        }
        args
    }

    fn clippy(&self, qemu: bool) -> Result<Totals> {
        let mut args = vec!["clippy", "--quiet", "--all-targets"];
        args.extend(self.workspace(qemu));
        args.extend(["--", "-D", "warnings"]);
        let mut totals = self.simple("clippy", &args)?;
        if qemu {
            let args = ["clippy", "--quiet", "--package", "qemu-ext"];
            let faults = ["--features", "fault-injection", "--", "-D", "warnings"];
            totals += self.simple("clippy of faults", &[&args[..], &faults[..]].concat())?;
        }
        Ok(totals)
    }

    fn unit_tests(&self) -> Result<Totals> {
        let filter = format!("not package({SYSTEM_TESTS})");
        let mut command = if self.nextest {
            let mut command = cargo(self.paths, &["nextest", "run", "--no-fail-fast"]);
            command.args(["--no-tests=pass", "-E", &filter]);
            command
        } else {
            let mut command =
                cargo(self.paths, &["test", "--no-fail-fast", "--lib", "--bins", "--tests"]);
            command.args(["--exclude", SYSTEM_TESTS]);
            command
        };
        command.args(self.workspace(false));
        if self.options.ignored {
            command.env("SCHEDULES", FULL_SCHEDULES.to_string());
            command.env("THREADS_SECONDS", FULL_THREADS_SECONDS.to_string());
        }
        self.tests("unit tests", command, 2400)
    }

    /// nextest does not run them.
    fn doc_tests(&self) -> Result<Totals> {
        let mut command = cargo(self.paths, &["test", "--no-fail-fast", "--doc"]);
        command.args(self.workspace(false));
        self.tests("doc tests", command, 1800)
    }

    /// The models of the engine. `--cfg loom` changes every crate, so they have a target folder of
    /// their own.
    fn interleavings(&self) -> Result<Totals> {
        let args = ["test", "--no-fail-fast", "--release", "--package", "fleece", "--test", "loom"];
        let mut command = cargo(self.paths, &args);
        command.env("RUSTFLAGS", "--cfg loom");
        command.env("CARGO_TARGET_DIR", self.paths.root.join("target/loom"));
        if self.options.ignored {
            command.env("LOOM_MORE_PREEMPTIONS", FULL_MORE_PREEMPTIONS.to_string());
        }
        self.tests("interleavings", command, if self.options.ignored { 3600 } else { 600 })
    }

    /// Each target that finds nothing counts as passed.
    fn fuzz(&self, seconds: u32) -> Result<Totals> {
        let fuzzer = fuzz::Fuzzer::build(self.paths)?;
        let mut totals = Totals::default();
        for target in fuzzer.targets() {
            totals += match fuzzer.run(target, seconds) {
                Ok(()) => Totals::PASSED,
                Err(error) => {
                    eprintln!("error: {error:#}");
                    Totals::FAILED
                }
            };
        }
        Ok(totals)
    }

    fn system_tests(&self) -> Result<Totals> {
        // The debug build: only that can be killed at a chosen step.
        let vzdump = ["build", "--package", "vzdump"];
        if self.simple("vzdump", &vzdump)?.failed > 0 {
            anyhow::bail!("vzdump does not build");
        }
        self.run_system_tests("system tests")
    }

    fn run_system_tests(&self, name: &str) -> Result<Totals> {
        let mut command = if self.nextest {
            let mut command = cargo(self.paths, &["nextest", "run", "--no-fail-fast"]);
            command.args(["--no-tests=pass", "-E", &format!("package({SYSTEM_TESTS})")]);
            // The same selection as for the unit tests: nothing is built twice.
            command.args(self.workspace(false));
            if self.options.ignored {
                command.args(["--run-ignored", "all"]);
            }
            command
        } else {
            let mut command =
                cargo(self.paths, &["test", "--no-fail-fast", "--package", SYSTEM_TESTS]);
            command.args(["--lib", "--bins", "--tests"]);
            if self.options.ignored {
                command.args(["--", "--include-ignored"]);
            }
            command
        };
        command.env(QEMU_BIN_ENV, self.paths.qemu_bin());
        command.env("VZDUMP_BIN", self.paths.root.join("target/debug/vzdump"));
        if let Some(seeds) = self.options.stress_seeds {
            command.env("STRESS_SEEDS", seeds.to_string());
        }
        let limit_s = if self.options.ignored { 4 * 3600 } else { 2400 };
        self.tests(name, command, limit_s)
    }

    /// Runs a test runner and counts what it reports. A runner that fails without a failed test
    /// (it did not build, it was killed) counts as one.
    fn tests(&self, name: &str, command: Command, limit_s: u64) -> Result<Totals> {
        let mut totals = Totals::default();
        let ended = self.step(name, limit_s).watch(command, |line| {
            totals += summary(line).unwrap_or_default();
        })?;
        if !ended.ok() && totals.failed == 0 {
            if ended.timed_out {
                eprintln!("error: {name} took longer than {limit_s} s");
            }
            totals.failed = 1;
        }
        Ok(totals)
    }
}

/// Reads the closing line of cargo's or nextest's test run. nextest shows the output of failed
/// tests indented, with closing lines of their own: those do not count.
fn summary(line: &str) -> Option<Totals> {
    let counts = match line.strip_prefix("test result: ") {
        Some(rest) => rest.split_once(". ")?.1,
        None => line.trim_start().strip_prefix("Summary [")?.split_once("run: ")?.1,
    };
    // nextest: "11 passed (2 slow, 1 flaky), 1 failed, 1 timed out, 3 skipped".
    let mut totals = Totals::default();
    for part in counts.split([',', ';']) {
        let (number, what) = part.trim().split_once(' ')?;
        let Ok(number) = number.parse::<u64>() else { continue };
        match what.split(" (").next()? {
            "passed" => totals.passed += number,
            "failed" | "timed out" | "exec failed" => totals.failed += number,
            _ => {}
        }
    }
    Some(totals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_cargo_test_reports() {
        let line = "test result: FAILED. 5 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; \
            finished in 0.01s";
        assert_eq!(summary(line), Some(Totals { passed: 5, failed: 2 }));
        assert_eq!(summary("test a::b ... ok"), None);
        assert_eq!(summary(&format!("    {line}")), None);
    }

    #[test]
    fn counts_what_nextest_reports() {
        let line = "     Summary [   1.2s] 5/15 tests run: 11 passed (2 slow, 1 flaky), 1 failed, \
            2 timed out, 3 skipped";
        assert_eq!(summary(line), Some(Totals { passed: 11, failed: 3 }));
        let line = "     Summary [   0.003s] 1 test run: 1 passed, 0 skipped";
        assert_eq!(summary(line), Some(Totals { passed: 1, failed: 0 }));
    }

    #[test]
    fn the_long_suites_keep_what_was_asked_for() {
        let asked = Options { stress_seeds: Some(7), ..Options::default() }.full();
        assert_eq!((asked.stress_seeds, asked.ignored), (Some(7), true));
        assert_eq!(asked.suite, Some(Suite::second()));
        assert_eq!(asked.soak_minutes, Some(soak::DEFAULT_MINUTES));
        let shorter = Options { soak_minutes: Some(3), ..Options::default() }.full();
        assert_eq!(shorter.soak_minutes, Some(3));
        assert_eq!(Options { no_qemu: true, ..Options::default() }.full().soak_minutes, None);
        assert_eq!(Options { no_qemu: true, ..Options::default() }.full().suite, None);
        let full = Options::default().full();
        assert_eq!(full.stress_seeds, Some(FULL_SEEDS));
        assert_eq!(full.fuzz_seconds, Some(FULL_FUZZ_SECONDS));
    }
}
