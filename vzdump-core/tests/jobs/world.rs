// SPDX-License-Identifier: MIT OR Apache-2.0
//! A host with one running VM of two disks, all of it scripted.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use provider_api::{BoxFuture, CancellationToken, GuestKind, Provider};
use vzdump_core::config::storage::StorageConfig;
use vzdump_core::job::{BackupOptions, GuestReport, JobContext, Limits, Providers, run_backup};
use vzdump_core::journal;
use vzdump_core::journal::recover::{Leftover, recover_guest};
use vzdump_core::layout::{Layout, Monitor};
use vzdump_core::storage::StorageSet;
use vzdump_core::task_log::{Level, Progress, TaskSink};
use vzdump_core::tools::Tools;
use vzdump_core::vm::freeze_guard::GuardCommand;

use crate::peer::Peer;
use crate::provider::{Commit, FakeProvider, Script};

pub const ID: u32 = 100;
pub const DISKS: [(&str, u64); 2] = [("scsi0", 1 << 20), ("virtio1", 3 << 19)];
/// Nothing that works takes this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// A sink that keeps its lines.
#[derive(Default)]
pub struct Lines(pub Mutex<Vec<String>>);

impl TaskSink for Lines {
    fn line(&self, level: Level, text: &str) {
        self.0.lock().unwrap().push(format!("{level}: {text}"));
    }
    fn progress(&self, _progress: &Progress) {}
}

impl Lines {
    pub fn text(&self) -> String {
        self.0.lock().unwrap().join("\n")
    }
}

struct One(FakeProvider);

impl Providers for One {
    fn provider<'a>(
        &'a self,
        storage: &'a str,
    ) -> BoxFuture<'a, Result<Arc<dyn Provider>, String>> {
        assert_eq!(storage, "store");
        let provider: Arc<dyn Provider> = Arc::new(self.0.clone());
        Box::pin(std::future::ready(Ok(provider)))
    }
}

/// The process that counts as the VM's QEMU.
pub struct PidHolder(Child);

impl Drop for PidHolder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub struct World {
    pub root: PathBuf,
    pub ctx: JobContext,
    pub peer: Peer,
    pub provider: FakeProvider,
    pub sink: Lines,
    pub cancel: CancellationToken,
    pub options: BackupOptions,
    qemu: Option<PidHolder>,
    _dir: tempfile::TempDir,
}

pub fn own_command(entry: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", entry, "--nocapture"]);
    command
}

pub fn context(root: &Path, provider: &FakeProvider) -> JobContext {
    let layout = Layout::new(Some(root.to_owned()));
    let storages = StorageSet::new(&StorageConfig::default(), &layout);
    let limits = Limits {
        commit: Duration::from_millis(500),
        outcome_attempts: 3,
        outcome_delay: Duration::from_millis(10),
        ..Limits::default()
    };
    JobContext {
        layout,
        tools: Tools::find(None, None),
        storages,
        providers: Arc::new(One(provider.clone())),
        containers: Arc::new(vzdump_core::guest::NoContainers),
        guard: GuardCommand {
            program: std::env::current_exe().unwrap(),
            args: ["--exact", "guard_entry", "--nocapture"].map(Into::into).to_vec(),
        },
        limits,
    }
}

impl World {
    pub fn new() -> Self {
        Self::with("", Script::default())
    }

    /// A world whose VM has more lines in its configuration.
    pub fn with(lines: &str, script: Script) -> Self {
        let dir = tempfile::Builder::new().prefix("vz").tempdir().unwrap();
        let root = dir.path().to_owned();
        let provider = FakeProvider::new(&root.join("provider"), script);
        let ctx = context(&root, &provider);
        let layout = &ctx.layout;
        layout.make_vm_run_dir(ID).unwrap();
        let path = layout.vm_config_path(ID);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let config = format!(
            "name: web\nscsi0: local:100/vm-100-disk-0.raw\n\
             virtio1: local:100/vm-100-disk-1.raw\nscsi2: local:100/x.raw,backup=0\n{lines}"
        );
        std::fs::write(path, config).unwrap();
        let peer = Peer::start(&layout.qmp_socket(ID, Monitor::Backup), &DISKS);
        let qemu = Some(start_qemu(&layout.pid_file(ID)));
        Self {
            root,
            ctx,
            peer,
            provider,
            sink: Lines::default(),
            cancel: CancellationToken::new(),
            options: BackupOptions::new("store"),
            qemu,
            _dir: dir,
        }
    }

    /// Runs a backup of the VM; it must end.
    pub async fn backup(&self) -> GuestReport {
        let run =
            run_backup(&self.ctx, &[ID], &self.provider, &self.options, &self.sink, &self.cancel);
        let mut report = tokio::time::timeout(PATIENCE, run).await.expect("the job hangs");
        assert_eq!(report.guests.len(), 1, "{report:?}");
        report.guests.remove(0)
    }

    pub async fn recover(&self) -> Vec<Leftover> {
        let recovery = recover_guest(&self.ctx, GuestKind::Qemu, ID, &self.sink);
        tokio::time::timeout(PATIENCE, recovery).await.expect("the recovery hangs").unwrap()
    }

    pub fn journals(&self) -> Vec<PathBuf> {
        journal::list(&self.ctx.layout, None).unwrap()
    }

    /// QEMU dies, with all that was in it.
    pub fn kill_qemu(&mut self) {
        self.peer.end();
        self.qemu = None;
        let _ = std::fs::remove_file(self.ctx.layout.qmp_socket(ID, Monitor::Backup));
    }

    /// Files of the job that are left.
    fn left_files(&self) -> Vec<PathBuf> {
        let mut left = Vec::new();
        let images = self.root.join("state/storage/images/100");
        for dir in [images, self.ctx.layout.vm_run_dir(ID)] {
            let Ok(entries) = std::fs::read_dir(dir) else { continue };
            left.extend(entries.map(|entry| entry.unwrap().path()).filter(|path| {
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                name.contains("fleece") || name.starts_with("b-")
            }));
        }
        left
    }

    pub fn assert_no_files(&self, what: &str) {
        let left = self.left_files();
        assert!(left.is_empty(), "{what}: {left:?} are left\n{}", self.sink.text());
        let journals = self.journals();
        assert!(journals.is_empty(), "{what}: {journals:?} are left\n{}", self.sink.text());
    }

    pub fn assert_clean(&self, what: &str) {
        self.peer.assert_clean(what);
        self.assert_no_files(what);
    }

    /// What the teardowns said: `true` only for a backup that is durable.
    pub fn assert_truthful(&self, what: &str) {
        let said_success =
            self.peer.log().iter().any(|line| line == "backup-access-teardown success=true");
        assert!(
            !said_success || self.provider.committed() > 0,
            "{what}: the bitmap was settled without a commit\n{}",
            self.sink.text()
        );
    }

    /// A backup in a process of its own.
    pub fn spawn_child(&self, commit: Commit) -> Child {
        own_command("backup_entry")
            .env("VZDUMP_TEST_ROOT", &self.root)
            .env("VZDUMP_TEST_COMMIT", format!("{commit:?}"))
            .env("VZDUMP_TEST_MODE", self.options.mode.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }
}

pub fn start_qemu(pid_file: &Path) -> PidHolder {
    let mut child = own_command("pid_holder_entry")
        .env("VZDUMP_TEST_PID_FILE", pid_file)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    while !lines.next().unwrap().unwrap().contains("locked") {}
    PidHolder(child)
}

pub fn hold_pid_file(path: &Path) {
    let file = std::fs::File::create(path).unwrap();
    rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    println!("locked");
    let _ = std::io::stdin().read(&mut [0]);
    std::process::exit(0);
}

pub fn backup_in_child(root: &Path) {
    let commit = match std::env::var("VZDUMP_TEST_COMMIT").unwrap().as_str() {
        "DiesBefore" => Commit::DiesBefore,
        "DiesAfter" => Commit::DiesAfter,
        _ => Commit::Works,
    };
    let mode = std::env::var("VZDUMP_TEST_MODE").unwrap();
    let script = Script { commit, ..Script::default() };
    let provider = FakeProvider::new(&root.join("provider"), script);
    let ctx = context(root, &provider);
    let (sink, cancel) = (Lines::default(), CancellationToken::new());
    let options = BackupOptions { mode: mode.parse().unwrap(), ..BackupOptions::new("store") };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(run_backup(&ctx, &[ID], &provider, &options, &sink, &cancel));
    std::process::exit(0);
}
