// SPDX-License-Identifier: MIT OR Apache-2.0
//! Containers: their files come back as they were, and what is no whole tree is never an archive.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::ffi::OsString;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use provider_api::{
    BoxFuture, Call, CommandEnd, CommitOutcome, Compression, ContainerBackup, ContainerCommand,
    ContainerData, ContainerMount, ContainerRunner, ContainerTransferred, Excludes, GuestBackup,
    GuestInfo, GuestKind, Identity, JobInfo, Kind, Progress, Provider, Result, Selection, Uuid,
    VerifyExtent, VerifyOptions,
};
use provider_directory::{ContainerFormat, DirectoryOptions, DirectoryProvider, ToolPaths};
use tempfile::TempDir;

#[path = "container/tree.rs"]
mod tree;

const LIMIT: Duration = Duration::from_secs(120);

/// Runs commands as this process, in place of a container's root.
#[derive(Debug)]
struct Here {
    /// What is run instead, if it is not what is asked for.
    instead: Option<&'static str>,
    seen: Mutex<Vec<OsString>>,
}

impl ContainerRunner for Here {
    fn command<'a>(
        &'a self,
        command: ContainerCommand,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<CommandEnd>> {
        Box::pin(async move {
            assert_eq!(command.identity, Identity::MappedRoot);
            *self.seen.lock().unwrap() = command.argv.clone();
            let mut child = match self.instead {
                Some(script) => {
                    let mut shell = Command::new("sh");
                    shell.args(["-c", script]);
                    shell
                }
                None => {
                    let mut child = Command::new(&command.argv[0]);
                    child.args(&command.argv[1..]);
                    child
                }
            };
            child.stdin(Stdio::null()).stdout(command.stdout.unwrap()).stderr(Stdio::piped());
            let mut bound = tokio::process::Command::from(child);
            let running = bound.kill_on_drop(true).spawn().unwrap();
            // It holds our end of the pipe, too.
            drop(bound);
            let output = running.wait_with_output().await.unwrap();
            command.stderr.unwrap().give(&output.stderr);
            Ok(CommandEnd {
                exit_code: output
                    .status
                    .code()
                    .unwrap_or_else(|| 128 + output.status.signal().unwrap()),
                stderr_tail: String::from_utf8_lossy(&output.stderr).into_owned(),
            })
        })
    }
}

#[derive(Default)]
struct Reports(Mutex<Vec<(u64, u64)>>);

impl Progress for Reports {
    fn report(&self, _device: &str, done_bytes: u64, total_bytes: u64, _zero_bytes: u64) {
        self.0.lock().unwrap().push((done_bytes, total_bytes));
    }
    fn log(&self, _line: &str) {}
}

struct Place {
    dir: TempDir,
    provider: DirectoryProvider,
    runner: Arc<Here>,
    call: Call,
}

impl Place {
    async fn new(instead: Option<&'static str>) -> Self {
        Self::with(instead, ContainerFormat::Tar).await
    }

    async fn with(instead: Option<&'static str>, format: ContainerFormat) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("tree")).unwrap();
        let path = dir.path().join("store");
        let provider =
            DirectoryProvider::new(DirectoryOptions { path, tools: ToolPaths::default() });
        let provider = provider.with_container_format(format);
        let call = Call::default();
        provider.activate(&call).await.unwrap();
        let runner = Arc::new(Here { instead, seen: Mutex::default() });
        Self { dir, provider, runner, call }
    }

    fn tree(&self) -> PathBuf {
        self.dir.path().join("tree")
    }

    fn file(&self, archive: &str, name: &str) -> PathBuf {
        self.dir.path().join("store").join(archive).join(name)
    }

    /// The directories of the storage that are no archives.
    fn leftovers(&self) -> Vec<OsString> {
        let all = std::fs::read_dir(self.dir.path().join("store")).unwrap();
        let names = all.map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with(".tmp")).collect()
    }

    fn backup(&self, mounts: &[&str], exclude: &[&str]) -> ContainerBackup {
        let mount = |place: &&str| ContainerMount {
            key: "mp".into(),
            mount_point: place.into(),
            volume_id: "local:101/x".into(),
        };
        let lists = self.dir.path().join(Uuid::new_v4().to_string());
        let excludes = Excludes::parse(exclude).unwrap();
        let places: Vec<_> = mounts.iter().map(Path::new).collect();
        Selection::write(&lists, &self.tree(), &places, &excludes).unwrap();
        ContainerBackup {
            config: b"arch: amd64\n".to_vec(),
            firewall: Some(b"[OPTIONS]\n".to_vec()),
            tree: self.tree(),
            host_tree: self.tree(),
            mounts: mounts.iter().map(mount).collect(),
            id_map: Vec::new(),
            lists: lists.clone(),
            host_lists: lists,
            skip_unreadable: false,
            expected_bytes: None,
            bandwidth_limit: None,
            runner: Arc::clone(&self.runner) as Arc<dyn ContainerRunner>,
        }
    }

    async fn begin(&self) -> Box<dyn GuestBackup> {
        let job = self.provider.start_job(JobInfo { start_time_s: 0 }, &self.call).await;
        let guest = GuestInfo { kind: GuestKind::Lxc, id: 101, name: None, start_time_s: 86_400 };
        job.unwrap().start_guest(guest, &self.call).await.unwrap()
    }

    /// A backup that is committed: its name and what it moved.
    async fn store(&self, backup: ContainerBackup) -> (String, ContainerTransferred) {
        let mut guest = self.begin().await;
        let reports = Reports::default();
        let copied = guest.backup_container(backup, &reports, &self.call);
        let moved = tokio::time::timeout(LIMIT, copied).await.unwrap().unwrap();
        let last = *reports.0.lock().unwrap().last().unwrap();
        assert_eq!(last, (moved.read_bytes, moved.read_bytes));
        let id = Uuid::new_v4();
        let committed = guest.commit(id, &self.call).await.unwrap();
        let outcome = self.provider.commit_outcome(id, &self.call).await.unwrap();
        assert_eq!(outcome, CommitOutcome::Committed { archive: committed.archive.clone() });
        assert!(committed.size_bytes > moved.written_bytes);
        if let Ok(tree) = self.file(&committed.archive, "tree.tar.zst").metadata() {
            assert_eq!(moved.written_bytes, tree.len());
        }
        (committed.archive, moved)
    }

    /// Unpacks an archive as a host would.
    async fn restored(&self, archive: &str) -> TempDir {
        let target = tempfile::tempdir().unwrap();
        let mut restore = self.provider.restore_container_init(archive, &self.call).await.unwrap();
        let ContainerData::Tar { path, compression } =
            restore.data(target.path(), &self.call).await.unwrap()
        else {
            panic!("no tar archive");
        };
        assert_eq!(compression, Compression::Zst);
        let mut tar = Command::new("tar");
        tar.args(["--zstd", "--xattrs", "--xattrs-include=user.*", "-xpf"]).arg(path);
        assert!(tar.arg("-C").arg(target.path()).status().unwrap().success());
        restore.cleanup(&self.call).await.unwrap();
        target
    }
}

fn listed(dir: &Path) -> Vec<String> {
    let mut command = Command::new("find");
    let output = command.args([".", "-mindepth", "1"]).current_dir(dir).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines: Vec<_> = text.lines().map(|line| line[2..].to_owned()).collect();
    lines.sort();
    lines
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_comes_back_as_it_was_without_what_was_excluded() {
    let place = Place::new(None).await;
    let tree = place.tree();
    for folder in ["etc", "tmp", "var/tmp", "home/a"] {
        std::fs::create_dir_all(tree.join(folder)).unwrap();
    }
    std::fs::write(tree.join("etc/hosts"), "127.0.0.1 localhost\n").unwrap();
    std::fs::set_permissions(tree.join("etc/hosts"), PermissionsExt::from_mode(0o4751)).unwrap();
    std::fs::hard_link(tree.join("etc/hosts"), tree.join("home/a/hosts")).unwrap();
    symlink("/etc/passwd", tree.join("etc/link")).unwrap();
    std::fs::write(tree.join("home/a/\u{e9} \n x"), vec![7; 300_000]).unwrap();
    for out in ["tmp/x", "var/tmp/y", "home/a/z.bak"] {
        std::fs::write(tree.join(out), "gone").unwrap();
    }
    let sparse = std::fs::File::create(tree.join("home/sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    std::fs::set_permissions(tree.join("home/a"), PermissionsExt::from_mode(0o700)).unwrap();
    let _listener = UnixListener::bind(tree.join("home/sock")).unwrap();
    let backup = place.backup(&["/"], &["/tmp/?*", "*.bak", "/var/tmp"]);
    let (archive, moved) = place.store(backup).await;
    assert_eq!(archive, "vzdump-lxc-101-1970_01_02-00_00_00");
    let names: Vec<_> = moved.ignored.iter().map(|entry| entry.path.as_str()).collect();
    assert_eq!((names, moved.ignored_count), (vec!["/home/sock"], 1));
    assert!(moved.read_bytes < 1 << 20, "the hole of a sparse file was stored");

    let restored = place.restored(&archive).await;
    let back = restored.path();
    let mut expected = listed(&tree);
    expected.retain(|name| {
        !["tmp/x", "var/tmp", "var/tmp/y", "home/a/z.bak", "home/sock"].contains(&name.as_str())
    });
    assert_eq!(listed(back), expected);
    // And the tree itself.
    assert_eq!(moved.entries, expected.len() as u64 - 1 + 1);
    let hosts = back.join("etc/hosts").metadata().unwrap();
    assert_eq!((hosts.mode() & 0o7777, hosts.nlink()), (0o4751, 2));
    assert_eq!(hosts.ino(), back.join("home/a/hosts").metadata().unwrap().ino());
    assert_eq!(std::fs::read(back.join("home/a/\u{e9} \n x")).unwrap(), vec![7; 300_000]);
    let sparse = back.join("home/sparse").metadata().unwrap();
    assert_eq!((sparse.len(), sparse.blocks()), (64 << 20, 0));
    assert_eq!(back.join("home/a").metadata().unwrap().mode() & 0o7777, 0o700);
    assert_eq!(std::fs::read_link(back.join("etc/link")).unwrap(), Path::new("/etc/passwd"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_archive_of_a_container_is_one_as_any_other() {
    let place = Place::new(None).await;
    std::fs::write(place.tree().join("file"), vec![1; 10_000]).unwrap();
    let (first, _) = place.store(place.backup(&["/"], &[])).await;
    let (second, _) = place.store(place.backup(&["/"], &[])).await;
    assert_eq!(second, format!("{first}-2"));
    let Place { provider, call, .. } = &place;
    let mut list = provider.list(call).await.unwrap();
    list.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(list.iter().map(|a| &a.name).collect::<Vec<_>>(), [&first, &second]);
    assert!(list.iter().all(|a| a.subtype == GuestKind::Lxc && a.base.is_none()));
    let config = provider.guest_config(&first, call).await.unwrap();
    assert_eq!(config.config, b"arch: amd64\n");
    assert_eq!(config.firewall.as_deref(), Some(&b"[OPTIONS]\n"[..]));
    provider.set_notes(&first, "before the update", call).await.unwrap();
    provider.keep_log(&first, "INFO: done\n", call).await.unwrap();
    provider.set_protected(&first, true, call).await.unwrap();
    let refused = provider.remove(&first, call).await.unwrap_err();
    assert_eq!(refused.kind, Kind::Protected);
    let refused = provider.restore_vm_init(&first, call).await.err().unwrap();
    assert_eq!(refused.kind, Kind::Invalid);
    // Read by a restore: it stays.
    let restore = provider.restore_container_init(&second, call).await.unwrap();
    assert_eq!(provider.remove(&second, call).await.unwrap_err().kind, Kind::InUse);
    restore.cleanup(call).await.unwrap();
    provider.remove(&second, call).await.unwrap();
    assert!(!place.file(&second, "").exists());

    let options = VerifyOptions { extent: VerifyExtent::All, known_sound: Vec::new() };
    let reports = Reports::default();
    let sound = provider.verify(&first, &options, &reports, call).await.unwrap();
    assert!(sound.is_sound() && sound.read_bytes > 0, "{sound:?}");
    for name in ["tree.tar.zst", "lxc.conf", "lxc.fw", "manifest.json"] {
        let path = place.file(&first, name);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let damaged = provider.verify(&first, &options, &reports, call).await.unwrap();
        assert!(!damaged.is_sound(), "{name}");
        bytes[middle] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
    }
    // Shorter than it was: not even offered.
    let tree = std::fs::File::options().write(true).open(place.file(&first, "tree.tar.zst"));
    tree.unwrap().set_len(10).unwrap();
    let refused = provider.restore_container_init(&first, call).await.err().unwrap();
    assert_eq!(refused.kind, Kind::Corrupt);
}

/// What comes out of the command, and what is then said.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_whole_tree_fails_the_backup() {
    for (script, said) in [
        ("head -c 10240 /dev/zero", "has no entries"),
        ("true", "ends too early"),
        ("tar -c /bin/sh | head -c 5000", "ends too early"),
        ("head -c 10240 /dev/urandom", "damaged header"),
        // It is ended because it is not read any more, which is no reason.
        ("exec cat /dev/urandom", "damaged header"),
        (
            "echo 'tar: ./x: Cannot open: Permission denied' >&2; tar -c /etc/hostname; exit 2",
            "Permission denied",
        ),
        (
            "echo 'tar: ./x: Warning: Cannot llistxattrat: Input/output error' >&2; tar -c /etc/hostname",
            "Cannot llistxattrat",
        ),
        ("kill -9 $$", "ended with 137"),
    ] {
        let place = Place::new(Some(script)).await;
        let mut guest = place.begin().await;
        let reports = Reports::default();
        let copied = guest.backup_container(place.backup(&["/"], &[]), &reports, &place.call);
        let error = tokio::time::timeout(LIMIT, copied).await.unwrap().unwrap_err();
        assert!(error.message.contains(said), "{script}: {error}");
        guest.abort("it failed", &place.call).await.unwrap();
        assert!(place.provider.list(&place.call).await.unwrap().is_empty());
        assert_eq!(place.leftovers(), Vec::<OsString>::new(), "{script}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_dropped_ends_its_command() {
    let place = Place::new(Some("exec sleep 1000")).await;
    let mut guest = place.begin().await;
    let reports = Reports::default();
    let copied = guest.backup_container(place.backup(&["/"], &[]), &reports, &place.call);
    assert!(tokio::time::timeout(Duration::from_secs(1), copied).await.is_err());
    let call = Call::default();
    guest.abort("cancelled", &call).await.unwrap();
    assert_eq!(place.leftovers(), Vec::<OsString>::new());
    // And one that is cancelled.
    let mut guest = place.begin().await;
    place.call.cancel.cancel();
    let copied = guest.backup_container(place.backup(&["/"], &[]), &reports, &place.call);
    let error = tokio::time::timeout(LIMIT, copied).await.unwrap().unwrap_err();
    assert_eq!(error.kind, Kind::Cancelled);
    guest.abort("cancelled", &call).await.unwrap();
}

/// A mount that is undone when it is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(arguments: &[&str], place: &Path) -> Self {
        let mut command = Command::new("mount");
        assert!(command.args(arguments).arg(place).status().unwrap().success(), "mount as root");
        Self(place.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_walk_crosses_into_the_volumes_and_into_nothing_else() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can mount");
        return;
    }
    let place = Place::new(None).await;
    let tree = place.tree();
    for folder in ["mnt/a", "mnt/foreign", "mnt/same", "source"] {
        std::fs::create_dir_all(tree.join(folder)).unwrap();
    }
    let _a = Mounted::new(&["-t", "tmpfs", "none"], &tree.join("mnt/a"));
    std::fs::create_dir(tree.join("mnt/a/deep")).unwrap();
    let _deep = Mounted::new(&["-t", "tmpfs", "none"], &tree.join("mnt/a/deep"));
    let _foreign = Mounted::new(&["-t", "tmpfs", "none"], &tree.join("mnt/foreign"));
    let source = tree.join("source");
    let _same = Mounted::new(&["--bind", source.to_str().unwrap()], &tree.join("mnt/same"));
    for file in ["root", "mnt/a/one", "mnt/a/deep/two", "mnt/foreign/no", "source/same"] {
        std::fs::write(tree.join(file), file).unwrap();
    }
    let mounts = ["/", "/mnt/a/deep", "/mnt/a", "/mnt/same"];
    let (archive, _) = place.store(place.backup(&mounts, &[])).await;
    let restored = place.restored(&archive).await;
    let mut expected = listed(&tree);
    expected.retain(|name| name != "mnt/foreign/no");
    assert_eq!(listed(restored.path()), expected);
    // The volume on the file system of another one is not walked twice.
    let argv = place.runner.seen.lock().unwrap().clone();
    let list = argv.last().unwrap().to_str().unwrap().strip_prefix("--files-from=").unwrap();
    let walks = std::fs::read_to_string(list).unwrap();
    assert_eq!(walks, "--recursion\0.\0--recursion\0./mnt/a\0./mnt/a/deep\0");
}
