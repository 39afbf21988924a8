// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM whose disk is written over the monitor, and backups of it by [`FileProvider`] in this process, or in
//! one of its own.

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use provider_api::{BoxFuture, CancellationToken, GuestKind, Provider};
use system_tests::qemu;
use vzdump_core::config::storage::StorageConfig;
use vzdump_core::job::{BackupOptions, GuestReport, JobContext, Limits, Providers, run_backup};
use vzdump_core::journal::recover::{recover_all, recover_guest};
use vzdump_core::layout::Layout;
use vzdump_core::storage::StorageSet;
use vzdump_core::task_log::{Level, Progress, TaskSink};
use vzdump_core::tools::Tools;
use vzdump_core::vm::freeze_guard::GuardCommand;

use crate::place::{LATE, Place, random_file};
use crate::provider::{Behaviour, FileProvider};

pub const VM: u32 = 100;
pub const STORE: &str = "files";
pub const KIB: u64 = 1 << 10;
/// With an end that is no multiple of a page.
pub const DISK_BYTES: u64 = (4 << 20) + 512;

pub struct Lines(std::sync::Mutex<Vec<String>>);

impl TaskSink for Lines {
    fn line(&self, level: Level, text: &str) {
        self.0.lock().unwrap().push(format!("{level}: {text}"));
    }
    fn progress(&self, _progress: &Progress) {}
}

struct One(FileProvider);

impl Providers for One {
    fn provider<'a>(
        &'a self,
        storage: &'a str,
    ) -> BoxFuture<'a, Result<Arc<dyn Provider>, String>> {
        assert_eq!(storage, STORE);
        let provider: Arc<dyn Provider> = Arc::new(self.0.clone());
        Box::pin(std::future::ready(Ok(provider)))
    }
}

fn context(root: &Path, provider: &FileProvider) -> JobContext {
    let layout = Layout::new(Some(root.to_owned()));
    let config = StorageConfig::read(&layout.storage_config_path()).unwrap();
    JobContext {
        storages: StorageSet::new(&config, &layout),
        tools: Tools::in_dir(qemu::bin_dir().unwrap()),
        providers: Arc::new(One(provider.clone())),
        containers: Arc::new(vzdump_core::guest::NoContainers),
        guard: GuardCommand { program: "/bin/false".into(), args: Vec::new() },
        limits: Limits::default(),
        layout,
    }
}

pub struct Scene {
    pub place: Place,
    pub provider: FileProvider,
    pub ctx: JobContext,
    pub sink: Lines,
    pub cancel: CancellationToken,
    pub options: BackupOptions,
    /// What the disk holds.
    pub bytes: Vec<u8>,
}

impl Scene {
    /// A VM with one disk, most of it random and a part of it zero, that does not run.
    pub fn new(behaviour: Behaviour) -> Self {
        let place = Place::new("");
        let source = place.path("source");
        let mut bytes = random_file(&source, DISK_BYTES);
        bytes[1 << 20..2 << 20].fill(0);
        std::fs::write(&source, &bytes).unwrap();
        place.create(&["--disk-from", source.to_str().unwrap()]);
        place.start();
        let provider = FileProvider::new(&place.path("archives"), behaviour);
        let ctx = context(&place.path(""), &provider);
        let sink = Lines(std::sync::Mutex::default());
        let options = BackupOptions::new(STORE);
        Self { place, provider, ctx, sink, cancel: CancellationToken::new(), options, bytes }
    }

    pub fn log(&self) -> String {
        self.sink.0.lock().unwrap().join("\n")
    }

    /// The guest writes to its disk.
    pub async fn write(&mut self, pattern: u8, offset: u64, length: u64) {
        let session = self.place.monitor().await;
        crate::place::writes(&session, pattern, offset, length).await;
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
        self.bytes[range].fill(pattern);
    }

    pub async fn backup(&self) -> GuestReport {
        let Self { ctx, provider, options, sink, cancel, .. } = self;
        let run = run_backup(ctx, &[VM], provider, options, sink, cancel);
        let mut report = tokio::time::timeout(LATE, run).await.expect("the backup hangs");
        report.guests.remove(0)
    }

    pub async fn good_backup(&self) -> GuestReport {
        let report = self.backup().await;
        assert!(report.is_success() && report.warnings.is_empty(), "{report:?}\n{}", self.log());
        report
    }

    /// An archive holds these bytes.
    pub fn assert_holds(&self, report: &GuestReport, bytes: &[u8], what: &str) {
        let stored = self.provider.bytes(report.archive.as_deref().unwrap(), "scsi0");
        assert_eq!(stored.len(), bytes.len(), "{what}");
        let wrong = (0..bytes.len()).find(|&at| stored[at] != bytes[at]);
        assert_eq!(wrong, None, "{what}: the first wrong byte");
    }

    /// A backup in a process of its own that is killed at a step.
    pub async fn backup_killed_at(&self, step: &str) {
        let behaviour = if self.provider.describe().capabilities.slow_commit { "slow" } else { "" };
        let mut child = tokio::process::Command::from(own_command())
            .env("VZDUMP_TEST_ROOT", self.place.path(""))
            .env("VZDUMP_TEST_BEHAVIOUR", behaviour)
            .env("VZDUMP_TEST_KILL_AT", step)
            .spawn()
            .unwrap();
        let ended = tokio::time::timeout(LATE, child.wait()).await.expect("it hangs").unwrap();
        assert_eq!(ended.signal(), Some(9), "{step} was not reached");
    }

    pub async fn recover(&self) {
        let left = recover_guest(&self.ctx, GuestKind::Qemu, VM, &self.sink).await.unwrap();
        assert_eq!(left, [], "{}", self.log());
    }

    pub async fn doctor(&self) {
        let all = recover_all(&self.ctx, &self.sink).await.unwrap();
        assert!(all.left.is_empty() && all.busy.is_empty(), "{all:?}");
    }

    /// Nothing of a backup is left: no image, no journal, no mount, no daemon.
    pub fn assert_tidy(&self, what: &str) {
        self.place.assert_tidy();
        assert_eq!(self.mounts(), Vec::<String>::new(), "{what}");
        assert_eq!(self.daemons(), Vec::<i32>::new(), "{what}");
        let folders = std::fs::read_dir(self.place.path("run/vm/100")).unwrap();
        let names = folders.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let left: Vec<_> = names.filter(|name| name.starts_with("b-")).collect();
        assert!(left.is_empty(), "{what}: {left:?}");
    }

    pub fn mounts(&self) -> Vec<String> {
        let root = self.place.path("run").display().to_string();
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let places = table.lines().filter_map(|line| line.split(' ').nth(4));
        places.filter(|place| place.starts_with(&root)).map(str::to_owned).collect()
    }

    /// The storage daemons of this scene.
    pub fn daemons(&self) -> Vec<i32> {
        let root = self.place.path("run").display().to_string();
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let is_ours = |pid: &i32| {
            let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words);
            words.contains("qemu-storage-daemon") && words.contains(&root)
        };
        pids.filter(is_ours).collect()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // After a test that failed; by their numbers, and only those below our own folder.
        for pid in self.daemons().into_iter().filter_map(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        for place in self.mounts() {
            let _ = Command::new("umount").args(["-l", &place]).status();
        }
    }
}

fn own_command() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "backup_entry", "--nocapture"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

pub fn backup_in_child(root: &Path) {
    let slow_commit = std::env::var("VZDUMP_TEST_BEHAVIOUR").is_ok_and(|text| text == "slow");
    let behaviour = Behaviour { slow_commit, ..Behaviour::default() };
    let provider = FileProvider::new(&root.join("archives"), behaviour);
    let ctx = context(root, &provider);
    let (sink, cancel) = (Lines(std::sync::Mutex::default()), CancellationToken::new());
    let options = BackupOptions::new(STORE);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let run = run_backup(&ctx, &[VM], &provider, &options, &sink, &cancel);
    let _ = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(120), run).await });
    std::process::exit(0);
}
