// SPDX-License-Identifier: MIT OR Apache-2.0
//! One run: a new daemon, a new fleecing image, one mode of one case.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::access::{self, Backup, DISK, FLEECING};
use crate::cases::{Cache, Case, Client, Filter, Fleecing, Mode, NONE, Reading, Work};
use crate::daemon::{Daemon, File};
use crate::disk::{Disk, FleecingFile};
use crate::fio::Job;
use crate::generate::Load;
use crate::nbdcopy;
use crate::procfs::{Usage, usage};
use crate::reader::{self, Reader};
use crate::sample::{Metric, Outcome, Sample};

const READER_BYTES_PER_SECOND: u64 = 300_000_000;
/// The reader runs for a moment before the guest begins.
const READER_BEGINS: Duration = Duration::from_millis(200);
/// What is written before it is written again; on a disk it also has to reach the fleecing image.
const REWRITE_REGION_BYTES: u64 = 512 << 20;
const NULL_REGION_BYTES: u64 = 48 << 20;
const NULL_DISK_BYTES: u64 = 256 << 30;
/// How long every mode rests before rewriting is measured: old data settles in that time, as a rule.
const REST: Duration = Duration::from_secs(3);
/// How much longer it may take for that.
const SETTLE_WITHIN: Duration = Duration::from_secs(10);

/// What all runs have in common.
#[derive(Debug, Clone)]
pub struct Bench {
    /// The patched programs.
    pub bin: PathBuf,
    /// Where disks and sockets are.
    pub folder: PathBuf,
    /// The guest's disk.
    pub disk: Disk,
    /// Running time of one run.
    pub seconds: u32,
    /// Running time of a long one.
    pub long_seconds: u32,
    /// Asynchronous I/O of files in the page cache.
    pub cached_aio: String,
    /// Whether the guest's export has a thread of its own.
    pub iothread: bool,
    /// Whether the reader releases what it has read.
    pub reader_trims: bool,
    /// From so many bytes on our filter shares blocks instead of copying them.
    pub reflink_bytes: Option<u64>,
}

/// The daemon of a run.
struct Stage {
    daemon: Daemon,
    fleecing: Option<FleecingFile>,
}

/// Counters at one moment.
struct Moment {
    at: Instant,
    usage: Usage,
    reader_bytes: u64,
    /// Since when a reader that reads once has nothing to do.
    reader_ended: Option<Instant>,
}

impl Bench {
    /// Runs a case in a mode. `rate` is the offered rate of [`Work::FixedRate`].
    ///
    /// # Errors
    /// Something cannot be started or fails; a snapshot that broke is an error, too.
    pub async fn run(
        &self,
        case: &Case,
        mode: Mode,
        round: u64,
        rate: Option<u32>,
    ) -> Result<Sample> {
        let stage = self.set_the_stage(case, mode).await?;
        let daemon = &stage.daemon;
        let socket = daemon.nbd_socket();
        self.prewrite(case, mode, daemon).await?;
        let speed = match case.reading {
            Reading::Absent => None,
            Reading::Limited => Some(Some(READER_BYTES_PER_SECOND)),
            Reading::Unlimited => Some(None),
        };
        let reader = match speed {
            Some(speed) => {
                let reader = Reader::start(&socket, "reader", speed, self.reader_trims).await?;
                tokio::time::sleep(READER_BEGINS).await;
                Some(reader)
            }
            None => None,
        };
        let moment = || -> Result<Moment> {
            let reader_bytes = reader.as_ref().map_or(0, Reader::done_bytes);
            let reader_ended = reader.as_ref().and_then(Reader::ended);
            let usage = usage(daemon.pid())?;
            Ok(Moment { at: Instant::now(), usage, reader_bytes, reader_ended })
        };
        let before = moment()?;
        let (guest, copy_mb_s) = self.work(case, mode, round, rate, daemon).await?;
        let after = moment()?;
        let access = match mode.filter {
            Filter::Ours => Some(access::query(daemon).await?),
            _ => None,
        };
        // Now: what is in RAM goes to the image next.
        let image_bytes = stage.fleecing.as_ref().map(FleecingFile::added_bytes).transpose()?;
        if let Some(access) = access.as_ref().filter(|access| access["state"] != "active") {
            bail!("the snapshot is {}: {}", access["state"], access["error"]);
        }
        let has_released = reader.is_some() && self.reader_trims;
        if let Some(reader) = reader {
            reader.stop().await?;
        }
        // QEMU's filter tells only a reader that it broke; what was released cannot be read, as it should be. Of images
        // that are null nothing can be read: the filter's assertion on block status ends the daemon.
        if mode.filter == Filter::C && !has_released && case.work.on_disk() {
            reader::probe(&socket, "reader").await.context("the snapshot is broken")?;
        }
        let mut sample = sample(case, guest, &before, &after);
        if let Some(speed) = copy_mb_s {
            sample.reader_mb_s = Some(speed);
        }
        sample.fleecing_bytes =
            fleecing_bytes(case, image_bytes, &sample, &before, &after, access.as_ref());
        sample.access = access;
        stage.daemon.quit().await?;
        Ok(sample)
    }

    /// Fails if another QEMU has the disk open, which would make single modes fail later.
    ///
    /// # Errors
    /// It has, or the storage daemon does not start.
    pub async fn check_unused(&self) -> Result<()> {
        let daemon = Daemon::start(&self.bin, &self.folder, false).await?;
        let path = self.disk.path.as_path();
        let file = File { path, qcow2: false, cache: Cache::Direct, aio: "native" };
        daemon.add_file(DISK, &file).await?;
        access::add_c_filter_on_nothing(&daemon)
            .await
            .with_context(|| format!("{} is in use by another QEMU", path.display()))?;
        daemon.quit().await
    }

    /// The offered rate: half of what is possible without a backup, beside the same reader.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub async fn half_rate(&self, case: &Case, round: u64) -> Result<u32> {
        let sample = self.run(case, NONE, round, None).await?;
        let iops = Metric::Iops.of(&sample).context("the run without a backup has no rate")?;
        Ok(((iops / 2.0) as u32).max(1))
    }

    /// How the backup of a case is made.
    pub fn backup(&self, case: &Case) -> Backup {
        Backup {
            buffer_bytes: case.buffer_bytes,
            reflink_bytes: self.reflink_bytes,
            reader_trims: self.reader_trims,
        }
    }

    async fn set_the_stage(&self, case: &Case, mode: Mode) -> Result<Stage> {
        if case.work.on_disk() {
            let (disk, cache) = (self.disk.clone(), case.cache);
            tokio::task::spawn_blocking(move || disk.settle(cache)).await??;
        }
        let daemon = Daemon::start(&self.bin, &self.folder, self.iothread).await?;
        let fleecing = self.add_nodes(case, &daemon, mode.filter != Filter::None).await?;
        access::begin(&daemon, mode.filter, self.backup(case)).await?;
        Ok(Stage { daemon, fleecing })
    }

    /// Adds the disk and, where it is needed, the fleecing image.
    ///
    /// # Errors
    /// The daemon refuses, or there is no space.
    pub async fn add_nodes(
        &self,
        case: &Case,
        daemon: &Daemon,
        with_fleecing: bool,
    ) -> Result<Option<FleecingFile>> {
        if !case.work.on_disk() {
            for node in [DISK, FLEECING] {
                let below = format!("{node}-file");
                daemon
                    .add_node(json!({ "driver": "null-co", "node-name": below,
                                        "size": NULL_DISK_BYTES, "read-zeroes": false }))
                    .await?;
                daemon
                    .add_node(json!({ "driver": "raw", "node-name": node, "file": below }))
                    .await?;
            }
            return Ok(None);
        }
        let disk = File {
            path: &self.disk.path,
            qcow2: false,
            cache: case.cache,
            aio: self.aio(case.cache),
        };
        daemon.add_file(DISK, &disk).await?;
        if !with_fleecing {
            return Ok(None);
        }
        let image =
            FleecingFile::create(case.fleecing, self.disk.size_bytes, &self.bin, &self.folder)
                .await?;
        // Direct I/O in RAM gains nothing and is not possible everywhere.
        let cache = if case.fleecing.in_ram() { Cache::Default } else { case.cache };
        let aio = if case.fleecing.in_ram() { "threads" } else { self.aio(cache) };
        let qcow2 = case.fleecing.is_qcow2();
        daemon.add_file(FLEECING, &File { path: &image.path, qcow2, cache, aio }).await?;
        Ok(Some(image))
    }

    fn aio(&self, cache: Cache) -> &str {
        match cache {
            Cache::Direct => "native",
            Cache::Default => &self.cached_aio,
        }
    }

    fn seconds(&self, case: &Case) -> u32 {
        if case.long { self.long_seconds } else { self.seconds }
    }

    /// Where rewriting is measured, writes everything first, and lets the old data settle. All modes rest, since
    /// what was written goes to the disk meanwhile in each of them.
    async fn prewrite(&self, case: &Case, mode: Mode, daemon: &Daemon) -> Result<()> {
        let Some(region_bytes) = rewritten(case.work, self.disk.size_bytes) else { return Ok(()) };
        let job = Job {
            rw: "write",
            block_bytes: 1 << 20,
            depth: 4,
            seconds: 300,
            region_bytes,
            ..Job::default()
        };
        job.run(&daemon.nbd_socket(), "guest").await.context("the first writing")?;
        tokio::time::sleep(REST).await;
        if mode.filter != Filter::Ours {
            return Ok(());
        }
        let deadline = Instant::now() + SETTLE_WITHIN;
        let mut last = Value::Null;
        while Instant::now() < deadline {
            let now = access::query(daemon).await?["in-ram"].clone();
            if now == last {
                break;
            }
            last = now;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    async fn work(
        &self,
        case: &Case,
        mode: Mode,
        round: u64,
        rate: Option<u32>,
        daemon: &Daemon,
    ) -> Result<(Outcome, Option<f64>)> {
        let socket = daemon.nbd_socket();
        let job = Job { seed: round + 1, ..self.job(case, rate) };
        if let Work::Nbdcopy { guest_iops } = case.work {
            let guest = guest_iops.map(|iops| Job { rate_iops: Some(iops), ..job });
            let (speed, guest) =
                nbdcopy::run(&socket, self.disk.size_bytes, self.seconds(case), guest).await?;
            return Ok((guest, Some(speed)));
        }
        if mode.client == Client::Fio {
            return Ok((job.run(&socket, "guest").await?, None));
        }
        let Work::Once { sequential, block_bytes, depth } = case.work else {
            bail!("{}: only work of this kind can be generated", mode.name);
        };
        let read_first = mode.client == Client::ReadFirst;
        let (seconds, seed) = (job.seconds, job.seed);
        let load = Load { read_first, sequential, block_bytes, depth, seconds, seed };
        Ok((load.run(&socket, "guest").await?, None))
    }

    /// fio's part of a case.
    #[must_use]
    pub fn job(&self, case: &Case, rate: Option<u32>) -> Job {
        let seconds = self.seconds(case);
        let small =
            Job { rw: "randwrite", block_bytes: 4096, depth: 16, seconds, ..Job::default() };
        match case.work {
            Work::Once { sequential, block_bytes, depth } => {
                let rw = if sequential { "write" } else { "randwrite" };
                Job { rw, block_bytes, depth, ..small }
            }
            Work::Few => Job { io_bytes: few_writes(self.disk.size_bytes) * 4096, ..small },
            Work::Mixed => Job { rw: "randrw", reads_percent: Some(70), ..small },
            Work::Zipf => Job { zipf: Some(1.1), repeat: true, ..small },
            // More in flight than needed: a late answer must not hold back the next request.
            Work::FixedRate => {
                let depth = if rate.is_some() { 128 } else { small.depth };
                Job { rate_iops: rate, depth, ..small }
            }
            Work::Nbdcopy { .. } => small,
            Work::Rewrite | Work::NullRewrite => {
                let region_bytes = rewritten(case.work, self.disk.size_bytes).unwrap_or_default();
                let depth = if case.work == Work::Rewrite { 1 } else { 32 };
                Job { region_bytes, depth, repeat: true, ..small }
            }
            Work::NullOnce => Job { depth: 32, repeat: true, ..small },
        }
    }
}

/// What is written before it is written again.
fn rewritten(work: Work, disk_bytes: u64) -> Option<u64> {
    match work {
        Work::Rewrite => Some(REWRITE_REGION_BYTES.min(disk_bytes / 4)),
        Work::NullRewrite => Some(NULL_REGION_BYTES),
        _ => None,
    }
}

/// So few that hardly two of them hit the same 64 KiB: one in 32 of those is written to.
fn few_writes(disk_bytes: u64) -> u64 {
    (disk_bytes / (64 << 10) / 32).max(1)
}

fn sample(case: &Case, guest: Outcome, before: &Moment, after: &Moment) -> Sample {
    let reader_bytes = after.reader_bytes - before.reader_bytes;
    let written = Some(guest.written_bytes).filter(|bytes| *bytes > 0 && case.work.on_disk());
    let per_byte = |bytes: u64| written.map(|written| bytes as f64 / written as f64);
    let (first, last) = (&before.usage, &after.usage);
    // Only past the page cache is each read of the client one of the disk.
    let copied = matches!(case.work, Work::Nbdcopy { .. });
    let fetched = (case.cache == Cache::Direct && !copied).then(|| {
        let own_reads = reader_bytes + (guest.bytes - guest.written_bytes);
        (last.read_bytes - first.read_bytes).saturating_sub(own_reads)
    });
    let reader_end = after.reader_ended.unwrap_or(after.at).min(after.at);
    let reader_seconds = reader_end.saturating_duration_since(before.at).as_secs_f64();
    Sample {
        guest,
        write_amplification: per_byte(last.write_bytes - first.write_bytes),
        read_amplification: fetched.and_then(per_byte),
        fleecing_bytes: None,
        reader_mb_s: (reader_bytes > 0).then(|| reader_bytes as f64 / 1e6 / reader_seconds),
        cpu_us_per_io: (guest.ios > 0)
            .then(|| (last.cpu_us - first.cpu_us) as f64 / guest.ios as f64),
        resident_mb: last.resident_bytes as f64 / 1e6,
        peak_mb: last.peak_bytes as f64 / 1e6,
        access: None,
    }
}

/// What went to the fleecing image, with what is in RAM and has still to go there: past the page
/// cache by the daemon's writes, else by what the image has grown. None without an image.
fn fleecing_bytes(
    case: &Case,
    image_bytes: Option<u64>,
    sample: &Sample,
    before: &Moment,
    after: &Moment,
    access: Option<&Value>,
) -> Option<f64> {
    // What was captured before the measurement is not of it.
    let image_bytes = image_bytes.filter(|_| rewritten(case.work, 0).is_none())?;
    let in_ram = access.and_then(|access| access["in-ram"].as_u64()).unwrap_or(0);
    let beside = matches!(case.fleecing, Fleecing::Raw | Fleecing::Qcow2);
    let stored = if case.cache == Cache::Direct && beside {
        let written = after.usage.write_bytes - before.usage.write_bytes;
        written.saturating_sub(sample.guest.written_bytes)
    } else {
        image_bytes
    };
    Some((stored + in_ram) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;

    fn bench() -> Bench {
        Bench {
            bin: PathBuf::new(),
            folder: PathBuf::new(),
            disk: Disk::at(PathBuf::new(), 1 << 30),
            seconds: 2,
            long_seconds: 4,
            cached_aio: "threads".into(),
            iothread: false,
            reader_trims: false,
            reflink_bytes: None,
        }
    }

    fn job_of(name: &str) -> Job {
        let cases = cases::all();
        let case = cases.iter().find(|case| case.name == name).unwrap();
        bench().job(case, None)
    }

    #[test]
    fn jobs_do_what_their_case_says() {
        let job = job_of("1m-seq-qd4/direct/raw/limited");
        assert_eq!((job.rw, job.block_bytes, job.depth), ("write", 1 << 20, 4));
        assert!(!job.repeat, "the disk's second pass captures nothing");
        assert_eq!(job_of("zipf-4k-qd16/direct/raw/limited").seconds, 4);
        assert_eq!(job_of("rewrite-4k-qd1/direct/raw/absent").region_bytes, 256 << 20);
    }

    #[test]
    fn few_writes_are_few() {
        assert_eq!(job_of("few-4k-qd16/direct/raw/absent/1m").io_bytes, 512 * 4096);
    }

    #[test]
    fn amplification_leaves_the_backup_client_out() {
        let cases = cases::all();
        let case = cases.iter().find(|case| case.name == "4k-qd16/direct/raw/limited").unwrap();
        let at = Instant::now();
        let before = Moment { at, usage: Usage::default(), reader_bytes: 0, reader_ended: None };
        let usage =
            Usage { read_bytes: 5_000_000, write_bytes: 3000, cpu_us: 50, ..Usage::default() };
        let at = at + Duration::from_secs(2);
        let mut after = Moment { at, usage, reader_bytes: 4_999_000, reader_ended: None };
        let guest =
            Outcome { ios: 10, writes: 10, bytes: 1000, written_bytes: 1000, ..Outcome::default() };
        let speed = |after: &Moment| sample(case, guest, &before, after).reader_mb_s;
        assert_eq!(speed(&after), Some(2.4995));
        after.reader_ended = Some(before.at + Duration::from_secs(1));
        assert_eq!(speed(&after), Some(4.999));
        let sample = sample(case, guest, &before, &after);
        assert_eq!(sample.write_amplification, Some(3.0));
        assert_eq!(sample.read_amplification, Some(1.0));
        assert_eq!(sample.cpu_us_per_io, Some(5.0));
    }

    #[test]
    fn old_data_in_the_image_and_in_ram_counts() {
        let cases = cases::all();
        let bytes = |name: &str, image_bytes| {
            let case = cases.iter().find(|case| case.name == name).unwrap();
            let at = Instant::now();
            let moment = |write_bytes| {
                let usage = Usage { write_bytes, ..Usage::default() };
                Moment { at, usage, reader_bytes: 0, reader_ended: None }
            };
            let guest = Outcome { writes: 1, written_bytes: 100, ..Outcome::default() };
            let sample = Sample { guest, ..Sample::default() };
            let access = json!({ "in-ram": 7 });
            fleecing_bytes(case, image_bytes, &sample, &moment(50), &moment(190), Some(&access))
        };
        assert_eq!(bytes("4k-qd16/direct/raw/limited", Some(1000)), Some(47.0));
        assert_eq!(bytes("4k-qd16/default/raw/limited/1g", Some(1000)), Some(1007.0));
        assert_eq!(bytes("4k-qd16/direct/raw/limited", None), None);
        assert_eq!(bytes("rewrite-4k-qd1/default/raw/absent", Some(1000)), None);
    }
}
