// SPDX-License-Identifier: MIT OR Apache-2.0
//! fio as the guest, over NBD.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use tokio::process::Command;

use crate::child::{self, Running};
use crate::sample::Outcome;

const PROBE_WITHIN: Duration = Duration::from_secs(20);
/// What fio may take beyond its running time.
const MARGIN: Duration = Duration::from_secs(60);

/// What the guest does.
#[derive(Debug, Clone, Default)]
pub struct Job {
    /// fio's name of the pattern.
    pub rw: &'static str,
    /// Size of a request.
    pub block_bytes: u64,
    /// Requests in flight.
    pub depth: u32,
    /// Running time.
    pub seconds: u32,
    /// Whether blocks may be written more than once; else the job ends early when all were.
    pub repeat: bool,
    /// Part of the disk from its beginning; all of it if 0.
    pub region_bytes: u64,
    /// Ends after so many bytes, if not 0.
    pub io_bytes: u64,
    /// Parameter of a zipf distribution.
    pub zipf: Option<f64>,
    /// Per cent of reads of a mixed pattern.
    pub reads_percent: Option<u8>,
    /// Offered requests per second.
    pub rate_iops: Option<u32>,
    /// Same seed, same offsets.
    pub seed: u64,
    /// Prefix of the file for latency over time.
    pub latency_log: Option<PathBuf>,
}

impl Job {
    fn arguments(&self, socket: &Path, export: &str) -> Vec<String> {
        let mut args = vec![
            "--name=guest".to_owned(),
            "--thread=1".to_owned(),
            "--ioengine=nbd".to_owned(),
            format!("--uri=nbd+unix:///{export}?socket={}", socket.display()),
            format!("--rw={}", self.rw),
            format!("--bs={}", self.block_bytes),
            format!("--iodepth={}", self.depth),
            format!("--runtime={}", self.seconds),
            format!("--randseed={}", self.seed),
            "--output-format=json+".to_owned(),
        ];
        if self.repeat {
            args.extend(["--time_based=1".to_owned(), "--norandommap=1".to_owned()]);
        }
        if self.region_bytes > 0 {
            args.push(format!("--size={}", self.region_bytes));
        }
        if self.io_bytes > 0 {
            args.push(format!("--io_size={}", self.io_bytes));
        }
        if let Some(theta) = self.zipf {
            args.push(format!("--random_distribution=zipf:{theta}"));
        }
        if let Some(percent) = self.reads_percent {
            args.push(format!("--rwmixread={percent}"));
        }
        if let Some(rate) = self.rate_iops {
            // Mixed jobs have a rate for each direction.
            args.push(format!("--rate_iops={rate}"));
            args.push("--rate_process=poisson".to_owned());
        }
        if let Some(prefix) = &self.latency_log {
            args.push(format!("--write_lat_log={}", prefix.display()));
            args.push("--log_avg_msec=100".to_owned());
        }
        args
    }

    /// Starts it.
    ///
    /// # Errors
    /// fio is missing.
    pub fn start(&self, socket: &Path, export: &str) -> Result<Running> {
        Running::start(Command::new("fio").args(self.arguments(socket, export)))
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// fio is missing, fails, or does not end in time.
    pub async fn run(&self, socket: &Path, export: &str) -> Result<Outcome> {
        self.collect(self.start(socket, export)?).await
    }

    /// Waits for a started job.
    ///
    /// # Errors
    /// As [`Job::run`].
    pub async fn collect(&self, running: Running) -> Result<Outcome> {
        let limit = Duration::from_secs(u64::from(self.seconds) * 2) + MARGIN;
        let finished = running.finish(limit).await?;
        parse(&finished.output).with_context(|| {
            let said = finished.complaint.trim();
            format!("fio ({}) printed no result: {said}", finished.status)
        })
    }
}

/// fio's version, if it can do what is needed.
///
/// # Errors
/// It is missing, or was built without libnbd.
pub async fn probe() -> Result<String> {
    let engines = child::run(Command::new("fio").arg("--enghelp"), PROBE_WITHIN).await?;
    if !engines.lines().any(|line| line.trim() == "nbd") {
        bail!(
            "fio has no NBD engine (fio --enghelp): it must be built with libnbd, as Debian's is"
        );
    }
    let version = child::run(Command::new("fio").arg("--version"), PROBE_WITHIN).await?;
    Ok(version.trim().to_owned())
}

#[derive(Deserialize)]
struct Output {
    jobs: Vec<JobOutput>,
}

#[derive(Deserialize)]
struct JobOutput {
    error: i32,
    read: Direction,
    write: Direction,
}

#[derive(Deserialize)]
struct Direction {
    io_bytes: u64,
    total_ios: u64,
    /// Milliseconds.
    runtime: u64,
    clat_ns: Latency,
}

#[derive(Deserialize)]
struct Latency {
    mean: f64,
    #[serde(default)]
    percentile: std::collections::BTreeMap<String, f64>,
}

impl Latency {
    fn percentile_us(&self, name: &str) -> f64 {
        self.percentile.get(name).map_or(0.0, |ns| ns / 1000.0)
    }
}

/// fio's JSON, before which its engines may have printed something.
fn parse(text: &str) -> Result<Outcome> {
    let begin = text.find('{').context("there is no JSON in it")?;
    let mut values = serde_json::Deserializer::from_str(&text[begin..]).into_iter::<Output>();
    let output = values.next().context("there is no JSON in it")??;
    let job = output.jobs.first().context("there is no job in it")?;
    if job.error != 0 {
        bail!("its job failed with error {}", job.error);
    }
    let (read, write) = (&job.read, &job.write);
    let main = if write.total_ios > 0 { write } else { read };
    let runtime_ms = read.runtime.max(write.runtime);
    if main.total_ios == 0 || runtime_ms == 0 {
        bail!("its job did nothing");
    }
    Ok(Outcome {
        ios: read.total_ios + write.total_ios,
        writes: write.total_ios,
        bytes: read.io_bytes + write.io_bytes,
        written_bytes: write.io_bytes,
        seconds: runtime_ms as f64 / 1000.0,
        mean_us: main.clat_ns.mean / 1000.0,
        p99_us: main.clat_ns.percentile_us("99.000000"),
        p999_us: main.clat_ns.percentile_us("99.900000"),
    })
}

/// Reads a latency log of [`Job::latency_log`]: seconds and microseconds.
///
/// # Errors
/// It cannot be read.
pub fn latency_log(prefix: &Path) -> Result<Vec<(f64, f64)>> {
    let mut path = prefix.as_os_str().to_owned();
    path.push("_clat.1.log");
    let path = PathBuf::from(path);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(parse_log(&text))
}

fn parse_log(text: &str) -> Vec<(f64, f64)> {
    let point = |line: &str| {
        let mut numbers = line.split(',').map(|word| word.trim().parse::<f64>());
        Some((numbers.next()?.ok()? / 1000.0, numbers.next()?.ok()? / 1000.0))
    };
    text.lines().filter_map(point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITES: &str = include_str!("../samples/fio-randwrite.json");
    const MIXED: &str = include_str!("../samples/fio-mixed.json");

    #[test]
    fn reads_a_result_behind_other_output() {
        let outcome = parse(WRITES).unwrap();
        assert_eq!((outcome.ios, outcome.writes), (58860, 58860));
        assert_eq!(outcome.written_bytes, 241_090_560);
        assert!((outcome.seconds - 2.001).abs() < 1e-9);
        assert!((outcome.mean_us - 535.197).abs() < 0.001);
        assert_eq!((outcome.p99_us, outcome.p999_us), (1368.064, 3358.72));
    }

    #[test]
    fn mixed_results_count_both_directions_and_time_the_writes() {
        let outcome = parse(MIXED).unwrap();
        assert_eq!((outcome.ios, outcome.writes), (100, 30));
        assert_eq!((outcome.bytes, outcome.written_bytes), (409_600, 122_880));
        assert_eq!(outcome.mean_us, 20.0);
    }

    #[test]
    fn failures_are_errors() {
        assert!(parse("fio: connection refused").is_err());
        assert!(parse(&WRITES.replace("\"error\" : 0", "\"error\" : 5")).is_err());
        assert!(parse("{\"jobs\": []}").is_err());
    }

    #[test]
    fn logs_are_points() {
        let log = "100, 503722, 1, 0, 0\n202, 450435, 1, 0, 0\nnoise\n";
        assert_eq!(parse_log(log), [(0.1, 503.722), (0.202, 450.435)]);
    }

    #[test]
    fn arguments_follow_the_job() {
        let job = Job {
            rw: "randwrite",
            block_bytes: 4096,
            depth: 16,
            seconds: 5,
            rate_iops: Some(100),
            ..Job::default()
        };
        let args = job.arguments(Path::new("/s"), "guest");
        assert!(args.contains(&"--uri=nbd+unix:///guest?socket=/s".to_owned()));
        assert!(args.contains(&"--rate_iops=100".to_owned()));
        assert!(!args.iter().any(|arg| arg.starts_with("--time_based")));
        assert!(
            Job { repeat: true, ..job }
                .arguments(Path::new("/s"), "g")
                .contains(&"--time_based=1".to_owned())
        );
    }
}
