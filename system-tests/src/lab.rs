// SPDX-License-Identifier: MIT OR Apache-2.0
//! A small installation below one folder: two storages, a VM that writes records, its backups.
//!
//! ```text
//! DIR/etc/storage.cfg              local: disk images    backups: the backups
//! DIR/etc/qemu-server/100.conf     the VM
//! DIR/local/images/100/…           its two disks
//! DIR/backups/…                    what the provider stores
//! DIR/run/vm/100/console.log       what the guest says
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::console::Console;
use crate::guest::{GuestImage, KERNEL_OPTIONS};
use crate::process::{Stop, run, tail};
use crate::qemu::{self, BOOT_WITHIN};
use crate::records::check::{PairReport, check_pair};
use crate::records::disk::{Disk, create_pair};
use crate::records::layout::Layout;
use crate::vzdump::{TASK_WITHIN, Vzdump};

/// The VM that is backed up.
pub const SOURCE_VM: u32 = 100;
/// The storage of disk images.
pub const IMAGES: &str = "local";
/// The storage of backups.
pub const BACKUPS: &str = "backups";

/// The `storage.cfg` that has both, in folders of their names.
pub fn storages(root: &Path) -> String {
    format!(
        "dir: {IMAGES}\n\tpath {}\n\tcontent images\n\ndirectory: {BACKUPS}\n\tpath {}\n",
        root.join(IMAGES).display(),
        root.join(BACKUPS).display()
    )
}
/// Granularity of the bitmaps that mark what changed.
pub const CLUSTER_BYTES: u64 = 64 << 10;
/// Disks of every VM.
const DISKS: usize = 2;
/// Disks on virtio, served by QEMU's main thread.
pub const PLAIN_VIRTIO: &[&str] = &["--bus", "virtio"];
/// Disks on virtio, each with a thread of its own.
pub const VIRTIO_WITH_THREADS: &[&str] = &["--bus", "virtio", "--disk-options", "iothread=1"];
/// Disks on virtio-scsi with threads; the guest can discard.
pub const SCSI_WITH_THREADS: &[&str] =
    &["--bus", "scsi", "--disk-options", "iothread=1,discard=on"];
const PAIR_NUMBER: u64 = 0x5eed;
const START_WITHIN: Duration = Duration::from_secs(60);
const STOP_WITHIN: Duration = Duration::from_secs(60);
const CONVERT_WITHIN: Duration = Duration::from_secs(300);
const LIST_WITHIN: Duration = Duration::from_secs(60);

/// What the installation is made of.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// Size of each of the two disks in bytes.
    pub disk_bytes: u64,
    /// Format of the VM's disks: `raw`, `qcow2` or `raw+bitmaps`.
    pub format: &'static str,
    /// Options of `vm create` for how the disks are attached.
    pub hardware: &'static [&'static str],
    /// Records per second the guest writes.
    pub rate_per_s: u32,
    /// Print every command line that is run.
    pub show: bool,
}

/// The installation; its VMs are stopped when it is dropped.
#[derive(Debug)]
pub struct Lab {
    /// The folder of everything.
    pub dir: PathBuf,
    /// The program under test.
    pub vzdump: Vzdump,
    /// Asks all waits to end.
    pub stop: Stop,
    options: LabOptions,
    image: GuestImage,
    started: BTreeSet<u32>,
}

/// A started VM.
#[derive(Debug)]
pub struct Running {
    /// What it says on its serial line.
    pub console: Console,
    /// What its check of the disks found at the start.
    pub checked: Checked,
}

/// What the guest found when it checked its disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    /// Last record of disk A.
    pub last_a: u64,
    /// Last record of disk B.
    pub last_b: u64,
    /// Sectors of a record that was only half written.
    pub in_flight_sectors: u64,
}

/// What one backup of the VM was.
#[derive(Debug, Clone)]
pub struct Backup {
    /// Name for `restore`.
    pub volume: String,
    /// What the bitmap of each disk was used for.
    pub bitmap_actions: Vec<String>,
    /// Size of the disks together.
    pub disks_bytes: u64,
    /// What had to be looked at: all of the disks, or what changed.
    pub total_bytes: u64,
    /// What was read from the disks.
    pub read_bytes: u64,
    /// What the archive takes.
    pub archive_bytes: u64,
    /// How long it took.
    pub duration: Duration,
    /// How long the guest's file systems were frozen, if they were.
    pub freeze: Option<Duration>,
    /// The longest delay of a guest write, as QEMU measured it.
    pub longest_delay: Duration,
}

impl Lab {
    /// Makes an installation with one VM below an empty folder.
    ///
    /// # Errors
    /// Something is missing (the text says what to do), or cannot be made.
    pub fn create(dir: &Path, options: LabOptions, stop: &Stop) -> Result<Self> {
        let dir = std::path::absolute(dir)?;
        let vzdump = Vzdump::find(&dir, options.show, stop)?;
        let image = GuestImage::build(stop)?;
        let (stop, started) = (stop.clone(), BTreeSet::new());
        let lab = Self { dir, vzdump, stop, options, image, started };
        lab.write_storages()?;
        lab.make_vm()?;
        Ok(lab)
    }

    fn write_storages(&self) -> Result<()> {
        let (etc, images, backups) = (self.dir.join("etc"), self.images_dir(), self.backups_dir());
        for folder in [&etc, &images, &backups] {
            fs::create_dir_all(folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
        }
        fs::write(etc.join("storage.cfg"), storages(&self.dir)).context("cannot write storage.cfg")
    }

    /// Makes the VM by copies of two prepared disks; it boots the kernel it is given, because the
    /// disks hold records and no boot loader.
    fn make_vm(&self) -> Result<()> {
        let scratch = tempfile::tempdir_in(&self.dir)?;
        let [a, b] = ["a.raw", "b.raw"].map(|name| scratch.path().join(name));
        create_pair([&a, &b], self.options.disk_bytes, PAIR_NUMBER).map_err(anyhow::Error::msg)?;
        let GuestImage { kernel, initrd } = &self.image;
        let text = |path: &Path| {
            path.to_str().map(str::to_owned).with_context(|| format!("{path:?} is not text"))
        };
        let (kernel, initrd, a, b) = (text(kernel)?, text(initrd)?, text(&a)?, text(&b)?);
        let append = format!("{KERNEL_OPTIONS} vzdump.rate={}", self.options.rate_per_s);
        let mut arguments = vec!["vm", "create", "100", "--name", "demo", "--agent"];
        arguments.extend(["--memory", "256", "--cores", "2", "--format", self.options.format]);
        arguments.extend(self.options.hardware);
        arguments.extend(["--disk-from", &a, "--disk-from", &b]);
        arguments.extend(["--kernel", &kernel, "--initrd", &initrd, "--append", &append]);
        self.vzdump.run(&arguments, TASK_WITHIN).map(drop)
    }

    fn images_dir(&self) -> PathBuf {
        self.dir.join(IMAGES)
    }

    /// Where the provider stores backups.
    #[must_use]
    pub fn backups_dir(&self) -> PathBuf {
        self.dir.join(BACKUPS)
    }

    fn convert(&self, from: &Path, from_format: &str, to: &Path, to_format: &str) -> Result<()> {
        let mut command = Command::new(qemu::bin_dir()?.join("qemu-img"));
        command.args(["convert", "-f", from_format, "-O", to_format]).arg(from).arg(to);
        run(&mut command, CONVERT_WITHIN, &self.stop).map(drop)
    }

    /// Starts a VM and waits until the guest has checked its disks and started its agent.
    ///
    /// # Errors
    /// It does not start, or the check fails.
    pub fn start(&mut self, vm: u32) -> Result<Running> {
        // Noted first: a start that fails half way must be cleaned up too.
        self.started.insert(vm);
        self.vzdump.run(&["vm", "start", &vm.to_string()], START_WITHIN)?;
        // QEMU begins the log anew, so what is there now is of this start.
        let mut console = Console::from_start_of(&self.console_log(vm));
        let needles = ["CHECK ", "GUEST AGENT"];
        let [line, _] = console.wait_for_each(needles, BOOT_WITHIN, &self.stop)?;
        let checked = Checked::parse(&line)
            .with_context(|| format!("the guest's check of VM {vm} failed: {line}"))?;
        Ok(Running { console, checked })
    }

    /// The console of a VM that something else starts from now on; it is stopped at the end, too.
    pub fn watch(&mut self, vm: u32) -> Console {
        self.started.insert(vm);
        // QEMU begins the log anew.
        let _ = fs::remove_file(self.console_log(vm));
        Console::from_start_of(&self.console_log(vm))
    }

    /// Shows what may say why a test failed.
    fn show_state(&self, vm: u32) {
        let folder = self.dir.join(format!("run/vm/{vm}"));
        for name in ["console.log", "qemu.log"] {
            let bytes = fs::read(folder.join(name)).unwrap_or_default();
            println!("VM {vm}, {name}: {}", tail(&String::from_utf8_lossy(&bytes)));
        }
        let status =
            self.vzdump.uninterrupted().run(&["vm", "status", &vm.to_string()], STOP_WITHIN);
        println!("VM {vm}: {status:?}");
    }

    fn console_log(&self, vm: u32) -> PathBuf {
        self.dir.join(format!("run/vm/{vm}/console.log"))
    }

    /// Stops a VM.
    ///
    /// # Errors
    /// It does not stop in time.
    pub fn stop_vm(&mut self, vm: u32) -> Result<()> {
        self.vzdump.run(&["vm", "stop", &vm.to_string()], STOP_WITHIN)?;
        self.started.remove(&vm);
        Ok(())
    }

    /// The process of a VM's QEMU.
    ///
    /// # Errors
    /// There is none.
    pub fn qemu_pid(&self, vm: u32) -> Result<rustix::process::Pid> {
        let path = self.dir.join(format!("run/vm/{vm}/pid"));
        let text = fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))?;
        let number = text.trim().parse().ok().and_then(rustix::process::Pid::from_raw);
        number.with_context(|| format!("{} holds no process id: {text:?}", path.display()))
    }

    /// Backs the VM up.
    ///
    /// # Errors
    /// The backup fails or reports something that makes no sense.
    pub fn backup(&self) -> Result<Backup> {
        let start = Instant::now();
        let vm = SOURCE_VM.to_string();
        let report = self.vzdump.run(&["backup", &vm, "--storage", BACKUPS], TASK_WITHIN)?;
        Backup::parse(&report, start.elapsed())
            .with_context(|| format!("odd report of the backup: {report}"))
    }

    /// The names of all archives, as `list` shows them.
    ///
    /// # Errors
    /// `list` fails.
    pub fn archives(&self) -> Result<Vec<String>> {
        let list = self.vzdump.run(&["list", "--storage", BACKUPS], LIST_WITHIN)?;
        let items = list.as_array().or_else(|| list.get("archives")?.as_array());
        let items = items.with_context(|| format!("odd list: {list}"))?;
        items
            .iter()
            .map(|item| item.get("volid").and_then(Value::as_str).map(str::to_owned))
            .collect::<Option<_>>()
            .with_context(|| format!("archives without name: {list}"))
    }

    /// Restores an archive as a new VM that can be booted.
    ///
    /// # Errors
    /// The restore fails.
    pub fn restore(&self, archive: &str, vm: u32) -> Result<Duration> {
        let start = Instant::now();
        let id = vm.to_string();
        // The kernel is named by `args`, which a restore drops unless the administrator trusts it.
        let arguments = ["restore", archive, &id, "--storage", IMAGES, "--allow-raw-config"];
        self.vzdump.run(&arguments, TASK_WITHIN)?;
        Ok(start.elapsed())
    }

    /// Checks the disks of a stopped VM from outside, sector by sector.
    ///
    /// # Errors
    /// The disks cannot be read.
    pub fn check_outside(&self, vm: u32, allow_in_flight: bool) -> Result<PairReport> {
        let scratch = tempfile::tempdir_in(&self.dir)?;
        let folder = self.images_dir().join(format!("images/{vm}"));
        let mut images: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(&folder)
            .with_context(|| format!("VM {vm} has no disks in {}", folder.display()))?
        {
            let path = entry?.path();
            // Its data is in another file, which is raw.
            if !path.to_string_lossy().ends_with(".raw.qcow2") {
                images.push(path);
            }
        }
        images.sort();
        let (mut disks, mut others) = (Vec::new(), Vec::new());
        for (index, image) in images.iter().enumerate() {
            let raw = scratch.path().join(index.to_string());
            let format =
                if image.extension().is_some_and(|end| end == "qcow2") { "qcow2" } else { "raw" };
            self.convert(image, format, &raw, "raw")?;
            match Disk::open(&raw, false) {
                Ok(disk) => disks.push(disk),
                Err(error) => others.push(error),
            }
        }
        let [a, b] = disks.as_slice() else {
            bail!("VM {vm} has {} disks with records, not 2: {}", disks.len(), others.join("; "))
        };
        check_pair(a, b, allow_in_flight).map_err(anyhow::Error::msg)
    }

    /// How many bytes of clusters the records after `before` up to `after` touch on both disks.
    ///
    /// # Errors
    /// The disks are too small.
    pub fn touched_bytes(&self, before: Checked, after: Checked) -> Result<u64> {
        let layout = Layout::new(self.options.disk_bytes).map_err(anyhow::Error::msg)?;
        let clusters = |from: u64, to: u64| {
            let places = (from + 1..=to).map(|number| layout.place(number));
            let touched: BTreeSet<u64> = places
                .flat_map(|place| {
                    let end = place.offset_bytes + place.size_bytes - 1;
                    place.offset_bytes / CLUSTER_BYTES..=end / CLUSTER_BYTES
                })
                .collect();
            touched.len() as u64
        };
        let count = clusters(before.last_a, after.last_a) + clusters(before.last_b, after.last_b);
        Ok(count * CLUSTER_BYTES)
    }

    /// Ends a VM's QEMU without asking it.
    pub fn kill_qemu(&self, vm: u32) {
        let Ok(pid) = self.qemu_pid(vm) else { return };
        let root = self.dir.to_string_lossy().into_owned();
        // The number may belong to another process by now: ours names this installation.
        let command =
            fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        if String::from_utf8_lossy(&command).contains(&root) {
            // It fails only when the process is gone, which is what is wanted.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let vzdump = self.vzdump.uninterrupted();
        for vm in std::mem::take(&mut self.started) {
            if std::thread::panicking() {
                self.show_state(vm);
            }
            let stopped = vzdump.run(&["vm", "stop", &vm.to_string()], STOP_WITHIN);
            if stopped.is_err() {
                self.kill_qemu(vm);
            }
        }
    }
}

impl Checked {
    /// Reads the guest's `CHECK OK` line.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let rest = &line[line.find("CHECK OK ")?..];
        let value = |key: &str| {
            rest.split_whitespace().find_map(|word| word.strip_prefix(key))?.parse().ok()
        };
        Some(Self {
            last_a: value("last_a=")?,
            last_b: value("last_b=")?,
            in_flight_sectors: value("in_flight=")?,
        })
    }
}

impl Backup {
    fn parse(report: &Value, duration: Duration) -> Result<Self> {
        let guest = report.pointer("/guests/0").unwrap_or(report);
        let number = |pointer: &str| {
            let value = guest.pointer(pointer).and_then(Value::as_u64);
            value.with_context(|| format!("no number {pointer}"))
        };
        let result = guest.get("result").and_then(Value::as_str).unwrap_or_default();
        ensure!(result == "committed", "the result is {result:?}");
        let archive = guest.get("archive").and_then(Value::as_str).context("no archive")?;
        let volumes = guest.get("volumes").and_then(Value::as_array).context("no volumes")?;
        let action = |volume: &Value| volume.get("bitmap_action")?.as_str().map(str::to_owned);
        Ok(Self {
            volume: format!("{BACKUPS}:backup/{archive}"),
            bitmap_actions: volumes.iter().filter_map(action).collect(),
            disks_bytes: number("/disks_size_bytes")?,
            total_bytes: number("/transferred/total_bytes")?,
            read_bytes: number("/transferred/read_bytes")?,
            archive_bytes: number("/archive_size_bytes")?,
            duration,
            freeze: guest
                .pointer("/point_in_time/freeze_ms")
                .and_then(Value::as_u64)
                .map(Duration::from_millis),
            longest_delay: Duration::from_nanos(number("/access/delay_max_ns")?),
        })
    }

    /// Whether the bitmaps of both disks were used, so that only changes were transferred.
    #[must_use]
    pub fn is_increment(&self) -> bool {
        self.bitmap_actions.len() == DISKS
            && self.bitmap_actions.iter().all(|action| action == "used")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_check_is_read() {
        let line = "CHECK OK last_a=12 last_b=11 in_flight=0 ms=7";
        let checked = Checked { last_a: 12, last_b: 11, in_flight_sectors: 0 };
        assert_eq!(Checked::parse(line), Some(checked));
        assert_eq!(Checked::parse("CHECK FAILED last_a=12 last_b=11 in_flight=0"), None);
    }

    #[test]
    fn a_backups_report_is_read_and_a_failed_one_refused() {
        let report = serde_json::json!({"guests": [{
            "result": "committed", "archive": "vzdump-qemu-100-x", "disks_size_bytes": 10,
            "archive_size_bytes": 4, "transferred": {"total_bytes": 3, "read_bytes": 2},
            "access": {"delay_max_ns": 1500}, "volumes": [
                {"device": "virtio0", "bitmap_action": "used"},
                {"device": "virtio1", "bitmap_action": "used"}],
        }]});
        let backup = Backup::parse(&report, Duration::from_secs(1)).unwrap();
        assert!(backup.is_increment());
        assert_eq!(backup.volume, "backups:backup/vzdump-qemu-100-x");
        assert_eq!(backup.longest_delay, Duration::from_nanos(1500));
        let failed = serde_json::json!({"guests": [{"result": "failed"}]});
        assert!(Backup::parse(&failed, Duration::ZERO).is_err());
    }
}
