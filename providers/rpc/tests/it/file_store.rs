// SPDX-License-Identifier: MIT OR Apache-2.0
//! The examples, driven through the protocol.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use provider_api::{
    Archive, BitmapMode, BitmapRequest, BoxFuture, Call, CommandEnd, CommitOutcome, Compression,
    ContainerBackup, ContainerCommand, ContainerData, ContainerRunner, Error, Excludes,
    GuestBackup, GuestInfo, GuestKind, Identity, JobInfo, Kind, Provider, Readable, Result,
    Selection, Uuid, VmBackup, VolumeInfo, VolumeSource,
};
use provider_rpc::{Direction, RpcProvider};
use tokio::sync::Notify;

use crate::bench::{Bench, Notes, call, region, vm};

const EXAMPLE: &str = "python/file-store.py";
const IN_SHELL: &str = "shell/tar-store.sh";
const SIZE: usize = (3 << 20) + 512;

fn guest(kind: GuestKind, start_time_s: i64) -> GuestInfo {
    GuestInfo { kind, id: 100, name: Some("web".to_owned()), start_time_s }
}

async fn start_guest(
    provider: &RpcProvider,
    kind: GuestKind,
    start_time_s: i64,
) -> Box<dyn GuestBackup> {
    provider.activate(&call()).await.unwrap();
    let mut job = provider.start_job(JobInfo { start_time_s }, &call()).await.unwrap();
    let backup = job.start_guest(guest(kind, start_time_s), &call()).await.unwrap();
    job.finish(&call()).await.unwrap();
    backup
}

async fn plan(backup: &mut dyn GuestBackup) -> BitmapRequest {
    let size_bytes = SIZE as u64;
    let volumes = [VolumeInfo { device: "scsi0".to_owned(), size_bytes, volume_id: None }];
    backup.plan_volumes(&volumes, &call()).await.unwrap().remove(0)
}

/// A disk with data, holes and an odd end.
fn disk(path: &Path) -> Vec<u8> {
    let mut content: Vec<u8> = (0..SIZE).map(|at| (at / 512 % 251) as u8 + 1).collect();
    content[1 << 20..2 << 20].fill(0);
    content[5000..9000].fill(0);
    std::fs::write(path, &content).unwrap();
    content
}

async fn full(provider: &RpcProvider, path: &Path, time_s: i64) -> (String, Vec<u8>) {
    let content = disk(path);
    let mut backup = start_guest(provider, GuestKind::Qemu, time_s).await;
    assert_eq!(plan(&mut *backup).await, BitmapRequest::New);
    let (mib, end) = (1 << 20, SIZE as u64);
    let regions =
        vec![region(0, mib, false), region(mib, mib, true), region(2 * mib, end - 2 * mib, false)];
    let backup_vm = vm(path, regions, BitmapMode::New, "one");
    (store(backup, backup_vm).await, content)
}

async fn store(mut backup: Box<dyn GuestBackup>, vm: VmBackup) -> String {
    let notes = Notes::default();
    let moved = backup.backup_vm(vm, &notes, &call()).await.unwrap();
    assert!(moved.read_bytes + moved.zero_bytes >= moved.total_bytes, "{moved:?}");
    assert!(!notes.0.lock().unwrap().is_empty(), "no progress was reported");
    let name = backup.archive_name().to_owned();
    let committed = backup.commit(Uuid::new_v4(), &call()).await.unwrap();
    assert_eq!(committed.archive, name);
    name
}

async fn restored(provider: &RpcProvider, archive: &str, bench: &Bench) -> Vec<u8> {
    let mut restore = provider.restore_vm_init(archive, &call()).await.unwrap();
    assert_eq!(restore.devices()[0].size_bytes, SIZE as u64);
    let source = restore.volume_init("scsi0", bench.dir.path(), &call()).await.unwrap();
    let VolumeSource::Path(path) = source else { panic!("{source:?}") };
    let content = std::fs::read(path).unwrap();
    restore.volume_cleanup("scsi0", &call()).await.unwrap();
    restore.cleanup(&call()).await.unwrap();
    content
}

async fn listed(provider: &RpcProvider) -> Vec<Archive> {
    provider.list(&call()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_backup_and_an_increment_restore_exactly() {
    let bench = Bench::with_example(EXAMPLE);
    let provider = bench.start().await.unwrap();
    let path = bench.dir.path().join("disk");
    let (first, old) = full(&provider, &path, 1_800_000_000).await;
    assert_eq!(first, "vzdump-qemu-100-2027_01_15-08_00_00");

    let mut new = disk(&path);
    new[100_000..140_000].fill(7);
    new[200_000..300_000].fill(0);
    new[SIZE - 512..].fill(9);
    std::fs::write(&path, &new).unwrap();
    let mut backup = start_guest(&provider, GuestKind::Qemu, 1_800_000_100).await;
    let asked = BitmapRequest::Use { generation: "one".to_owned(), readable: Readable::Dirty };
    assert_eq!(plan(&mut *backup).await, asked);
    let regions = vec![
        region(98_304, 45_056, false),
        region(196_608, 106_496, false),
        region(1 << 20, 4096, true),
        region(SIZE as u64 - 512, 512, false),
    ];
    let second = store(backup, vm(&path, regions, BitmapMode::Reuse, "two")).await;

    assert!(restored(&provider, &first, &bench).await == old, "the full backup is wrong");
    assert!(restored(&provider, &second, &bench).await == new, "the increment is wrong");
    // Without a part of its areas it would be the full backup.
    let areas = bench.archives().join(&second).join("scsi0.areas");
    let text = std::fs::read(&areas).unwrap();
    std::fs::write(&areas, &text[..text.iter().position(|b| *b == b'\n').unwrap() + 1]).unwrap();
    let mut restore = provider.restore_vm_init(&second, &call()).await.unwrap();
    let error = restore.volume_init("scsi0", bench.dir.path(), &call()).await.unwrap_err();
    assert_eq!(error.kind, Kind::Corrupt, "{error}");
    restore.cleanup(&call()).await.unwrap();
    std::fs::write(&areas, text).unwrap();
    let archives = listed(&provider).await;
    assert_eq!(archives.len(), 2);
    assert_eq!(archives[1].base.as_ref(), Some(&first));
    let config = provider.guest_config(&second, &call()).await.unwrap();
    assert!(config.config.starts_with(b"name: web") && config.firewall.is_some());

    // The stored parts of the snapshot were given back.
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap());
    assert!(blocks * 512 < SIZE as u64, "nothing was released");

    let error = provider.remove(&first, &call()).await.unwrap_err();
    assert_eq!((error.kind, error.dependents), (Kind::HasDependents, vec![second.clone()]));
    provider.set_protected(&second, true, &call()).await.unwrap();
    assert_eq!(provider.remove(&second, &call()).await.unwrap_err().kind, Kind::Protected);
    provider.set_protected(&second, false, &call()).await.unwrap();
    let restore = provider.restore_vm_init(&second, &call()).await.unwrap();
    assert_eq!(provider.remove(&second, &call()).await.unwrap_err().kind, Kind::InUse);
    restore.cleanup(&call()).await.unwrap();
    provider.remove(&second, &call()).await.unwrap();
    provider.remove(&first, &call()).await.unwrap();
    assert_eq!(provider.remove(&first, &call()).await.unwrap_err().kind, Kind::NotFound);
    assert!(listed(&provider).await.is_empty());
    let seen = bench.check_messages();
    for method in ["regions", "progress", "backup_vm", "volume_init", "remove"] {
        assert!(seen.contains(method), "{seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_that_is_of_no_use_keeps_nothing_from_being_done() {
    let bench = Bench::with_example(EXAMPLE);
    let provider = bench.start().await.unwrap();
    let (first, _) = full(&provider, &bench.dir.path().join("disk"), 1_800_000_000).await;
    let manifest = bench.archives().join(&first).join("manifest.json");
    // It is being removed.
    let removal = std::fs::OpenOptions::new().write(true).read(true).open(&manifest).unwrap();
    removal.lock().unwrap();
    let mut backup = start_guest(&provider, GuestKind::Qemu, 1_800_000_100).await;
    assert_eq!(plan(&mut *backup).await, BitmapRequest::New);
    backup.abort("seen", &call()).await.unwrap();
    drop(removal);
    // Its chain is long enough.
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replace("\"chain\": 1,", "\"chain\": 30,")).unwrap();
    let mut backup = start_guest(&provider, GuestKind::Qemu, 1_800_000_100).await;
    assert_eq!(plan(&mut *backup).await, BitmapRequest::New);
    provider.remove(&first, &call()).await.unwrap();
    backup.abort("seen", &call()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_backup_in_rust_restores_exactly() {
    let bench = Bench::in_rust();
    let provider = bench.start().await.unwrap();
    let path = bench.dir.path().join("disk");
    let content = disk(&path);
    let end = SIZE as u64;
    let mut backup = start_guest(&provider, GuestKind::Qemu, 1_800_000_000).await;
    assert_eq!(plan(&mut *backup).await, BitmapRequest::None);
    let regions = vec![
        region(0, 1 << 20, false),
        region(1 << 20, 1 << 20, true),
        region(2 << 20, end - (2 << 20), false),
    ];
    let (id, notes) = (Uuid::new_v4(), Notes::default());
    let vm = vm(&path, regions, BitmapMode::None, "x");
    backup.backup_vm(vm, &notes, &call()).await.unwrap();
    let archive = backup.commit(id, &call()).await.unwrap().archive;
    assert!(restored(&provider, &archive, &bench).await == content);
    let other = bench.start().await.unwrap();
    let committed = CommitOutcome::Committed { archive: archive.clone() };
    assert_eq!(other.commit_outcome(id, &call()).await.unwrap(), committed);
    let outcome = other.commit_outcome(Uuid::new_v4(), &call()).await.unwrap();
    assert_eq!(outcome, CommitOutcome::NotCommitted);
    provider.remove(&archive, &call()).await.unwrap();
    assert!(listed(&other).await.is_empty());
    bench.check_messages();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn notes_and_logs_are_kept() {
    let bench = Bench::with_example(EXAMPLE);
    let provider = bench.start().await.unwrap();
    let (name, _) = full(&provider, &bench.dir.path().join("disk"), 1_800_000_000).await;
    provider.set_notes(&name, "before the\nupdate", &call()).await.unwrap();
    assert_eq!(provider.notes(&name, &call()).await.unwrap(), "before the\nupdate");
    assert_eq!(listed(&provider).await[0].notes.as_deref(), Some("before the"));
    let log = "line\n".repeat(200_000);
    provider.keep_log(&name, &log, &call()).await.unwrap();
    assert_eq!(std::fs::read_to_string(bench.archives().join(&name).join("log")).unwrap(), log);
    assert_eq!(provider.log(&name, &call()).await.unwrap(), log);
    for bad in ["../x", "vzdump-qemu-1", ".commits", "a/b"] {
        assert_eq!(provider.notes(bad, &call()).await.unwrap_err().kind, Kind::NotFound, "{bad}");
    }
    let status = provider.status(&call()).await.unwrap();
    assert!(status.total_bytes > status.used_bytes && status.used_bytes > 0);
    assert!(bench.check_messages().contains("kept_log"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_list_comes_in_pages_that_a_removal_does_not_shift() {
    const MANIFEST: &str = r#"{"subtype": "qemu", "guest_id": 100, "time_s": "5", "size_bytes": "7",
        "base": null, "commit_id": null}"#;
    for mut bench in [Bench::with_example(EXAMPLE), Bench::in_rust()] {
        for number in 0..1200 {
            let place = bench.archives().join(format!("archive-{number:04}"));
            std::fs::create_dir_all(&place).unwrap();
            std::fs::write(place.join("manifest.json"), MANIFEST).unwrap();
        }
        let first = bench.archives().join("archive-0000");
        bench.options.tap = Some(Arc::new(move |_: Direction, line: &str| {
            // It has been listed, and the next page is not asked for yet.
            if line.contains("\"next\"") {
                let _ = std::fs::remove_dir_all(&first);
            }
        }));
        let provider = bench.start().await.unwrap();
        let names = listed(&provider).await.into_iter().map(|archive| archive.name);
        assert_eq!(names.collect::<BTreeSet<_>>().len(), 1200);
        assert!(!bench.archives().join("archive-0000").exists(), "there was one page");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_outcome_of_a_commit_is_known_to_every_process() {
    let bench = Bench::with_example(EXAMPLE);
    let provider = bench.start().await.unwrap();
    let path = bench.dir.path().join("disk");
    disk(&path);
    let mut backup = start_guest(&provider, GuestKind::Qemu, 1_800_000_000).await;
    let whole = vec![region(0, SIZE as u64, false)];
    let notes = Notes::default();
    backup
        .backup_vm(vm(&path, whole.clone(), BitmapMode::New, "x"), &notes, &call())
        .await
        .unwrap();
    let (id, never) = (Uuid::new_v4(), Uuid::new_v4());
    let archive = backup.commit(id, &call()).await.unwrap().archive;
    let other = bench.start().await.unwrap();
    let call = call();
    let outcome = |id| other.commit_outcome(id, &call);
    assert_eq!(outcome(id).await.unwrap(), CommitOutcome::Committed { archive });
    assert_eq!(outcome(never).await.unwrap(), CommitOutcome::NotCommitted);
    // What was said once is binding: that commit is refused now.
    disk(&path);
    let mut late = start_guest(&provider, GuestKind::Qemu, 1_800_000_200).await;
    late.backup_vm(vm(&path, whole, BitmapMode::New, "y"), &notes, &call).await.unwrap();
    assert!(late.commit(never, &call).await.is_err());
    assert_eq!(listed(&other).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_aborted_or_killed_backup_left_goes_away() {
    let bench = Bench::with_example(EXAMPLE);
    let left = || {
        let names = bench.archives().read_dir().unwrap().map(|e| e.unwrap().file_name());
        names.filter(|name| name.to_str().unwrap().starts_with(".tmp-")).count()
    };
    let provider = bench.start().await.unwrap();
    let backup = start_guest(&provider, GuestKind::Qemu, 1_800_000_000).await;
    assert_eq!(left(), 1);
    backup.abort("a test", &call()).await.unwrap();
    assert_eq!(left(), 0);
    let _alive = start_guest(&provider, GuestKind::Qemu, 1_800_000_000).await;
    // A second process leaves what the first one is making alone.
    let other = bench.start().await.unwrap();
    other.activate(&call()).await.unwrap();
    assert_eq!(left(), 1);
    crate::faults::kill(&bench);
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while left() > 0 {
        assert!(std::time::Instant::now() < deadline, "it stays");
        let _ = other.activate(&call()).await;
    }
}

/// Runs a command as it is, and lets it say something more.
#[derive(Debug)]
struct Plain(&'static str);

impl ContainerRunner for Plain {
    fn command<'a>(
        &'a self,
        command: ContainerCommand,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<CommandEnd>> {
        Box::pin(async move {
            assert_eq!(command.identity, Identity::MappedRoot);
            let mut child = tokio::process::Command::new(&command.argv[0]);
            child.args(&command.argv[1..]).stdout(command.stdout.unwrap());
            let output = child.stderr(std::process::Stdio::piped()).kill_on_drop(true).spawn();
            let output = output.unwrap().wait_with_output().await;
            let output = output.map_err(|error| Error::io("tar", error))?;
            let stderr_tail = format!("{}{}", String::from_utf8_lossy(&output.stderr), self.0);
            Ok(CommandEnd { exit_code: output.status.code().unwrap_or(137), stderr_tail })
        })
    }
}

pub(crate) fn container(tree: &Path) -> ContainerBackup {
    let lists = tree.with_extension(Uuid::new_v4().to_string());
    let excludes = Excludes::parse(&["/tmp", "*.swp"]).unwrap();
    Selection::write(&lists, tree, &[], &excludes).unwrap();
    ContainerBackup {
        config: b"hostname: web\n".to_vec(),
        firewall: None,
        tree: tree.to_owned(),
        host_tree: tree.to_owned(),
        mounts: Vec::new(),
        id_map: Vec::new(),
        lists: lists.clone(),
        host_lists: lists,
        skip_unreadable: false,
        expected_bytes: None,
        bandwidth_limit: None,
        runner: Arc::new(Plain("")),
    }
}

pub(crate) fn tree(root: &Path) {
    for dir in ["etc", "tmp"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    std::fs::write(root.join("etc/hostname"), "web\n").unwrap();
    std::fs::write(root.join("etc/.hostname.swp"), "x").unwrap();
    std::fs::write(root.join("tmp/file"), "x").unwrap();
    std::os::unix::fs::symlink("/nowhere", root.join("etc/link")).unwrap();
}

/// Backs a small tree up and checks what the archive holds.
pub(crate) async fn back_up_container(bench: &Bench) {
    let provider = bench.start().await.unwrap();
    let root = bench.dir.path().join("tree");
    tree(&root);
    // More than a volume has that it is to be restored to.
    std::fs::File::create(root.join("etc/sparse")).unwrap().set_len(4 << 30).unwrap();
    let mut backup = start_guest(&provider, GuestKind::Lxc, 1_800_000_000).await;
    let notes = Notes::default();
    let moved = backup.backup_container(container(&root), &notes, &call()).await.unwrap();
    // The root, etc, hostname, the link and the file; not tmp, nor what editors left.
    assert_eq!(moved.entries, 5, "{moved:?}");
    assert!(moved.written_bytes < 1 << 20, "{moved:?}");
    let archive = backup.commit(Uuid::new_v4(), &call()).await.unwrap().archive;
    assert_eq!(listed(&provider).await[0].subtype, GuestKind::Lxc);

    let mut restore = provider.restore_container_init(&archive, &call()).await.unwrap();
    let data = restore.data(bench.dir.path(), &call()).await.unwrap();
    let ContainerData::Tar { path, compression: Compression::None } = data else {
        panic!("{data:?}")
    };
    let target = bench.dir.path().join("target");
    std::fs::create_dir(&target).unwrap();
    let mut tar = std::process::Command::new("tar");
    assert!(tar.arg("-xf").arg(path).arg("-C").arg(&target).status().unwrap().success());
    assert_eq!(std::fs::read_to_string(target.join("etc/hostname")).unwrap(), "web\n");
    assert!(!target.join("tmp").exists() && target.join("etc/link").is_symlink());
    restore.cleanup(&call()).await.unwrap();
    provider.remove(&archive, &call()).await.unwrap();
    assert!(listed(&provider).await.is_empty());
    let seen = bench.check_messages();
    for method in ["container.command", "backup_container", "container_data"] {
        assert!(seen.contains(method), "{seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_is_read_through_the_runner() {
    back_up_container(&Bench::with_example(EXAMPLE)).await;
    back_up_container(&Bench::with_example(IN_SHELL)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_read_is_left_out_if_it_may_be_and_never_replaced_by_zeros() {
    let in_part = "tar: ./etc/a: File shrank by 512 bytes; padding with zeros\n";
    for example in [EXAMPLE, IN_SHELL] {
        let bench = Bench::with_example(example);
        let provider = bench.start().await.unwrap();
        let root = bench.dir.path().join("tree");
        tree(&root);
        for (skip_unreadable, says, is_stored) in
            [(false, "", false), (true, in_part, false), (true, "", true)]
        {
            let runner = Arc::new(Plain(says));
            let backup = ContainerBackup { skip_unreadable, runner, ..container(&root) };
            // Listed, but it cannot be opened.
            let list = backup.host_lists.join(Selection::SELECTED);
            let names = [std::fs::read(&list).unwrap(), b"./etc/gone\0".to_vec()].concat();
            std::fs::write(&list, names).unwrap();
            let mut guest = start_guest(&provider, GuestKind::Lxc, 1_800_000_000).await;
            let stored = guest.backup_container(backup, &Notes::default(), &call()).await;
            assert_eq!(stored.is_ok(), is_stored, "{example} {skip_unreadable} {says}: {stored:?}");
            if let Ok(moved) = stored {
                let ignored = &moved.ignored[0];
                let why = "Cannot stat: No such file or directory";
                assert_eq!((ignored.path.as_str(), ignored.why.as_str()), ("/etc/gone", why));
                assert_eq!((moved.entries, moved.ignored_count), (4, 1));
            }
            guest.abort("it was a test", &call()).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_read_in_rust_is_not_taken_for_missing() {
    let bench = Bench::in_rust();
    let provider = bench.start().await.unwrap();
    let call = call();
    provider.activate(&call).await.unwrap();
    // It is there, and no file.
    std::fs::create_dir_all(bench.archives().join("archive/manifest.json")).unwrap();
    let id = Uuid::new_v4();
    std::fs::write(bench.archives().join(".commits").join(id.to_string()), "archive").unwrap();
    assert_eq!(provider.list(&call).await.unwrap_err().kind, Kind::Io);
    assert_eq!(provider.commit_outcome(id, &call).await.unwrap_err().kind, Kind::Io);
    for (name, kind) in [("archive", Kind::Io), ("other", Kind::NotFound)] {
        assert_eq!(provider.guest_config(name, &call).await.unwrap_err().kind, kind, "{name}");
    }
}

/// Runs a command as it is, once it may.
#[derive(Debug, Default)]
struct Held {
    asked: Notify,
    may_run: Notify,
}

impl ContainerRunner for Held {
    fn command<'a>(
        &'a self,
        command: ContainerCommand,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<CommandEnd>> {
        Box::pin(async move {
            self.asked.notify_one();
            self.may_run.notified().await;
            Plain("").command(command, call).await
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_for_a_backup_in_shell_is_answered_when_it_is_cancelled() {
    let bench = Bench::with_example(IN_SHELL);
    let provider = bench.start().await.unwrap();
    let root = bench.dir.path().join("tree");
    tree(&root);
    let runner = Arc::new(Held::default());
    let files = ContainerBackup { runner: runner.clone(), ..container(&root) };
    let mut backup = start_guest(&provider, GuestKind::Lxc, 1_800_000_000).await;
    let (notes, patient, impatient) = (Notes::default(), call(), call());
    let asking = async {
        runner.asked.notified().await;
        let cancel = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            impatient.cancel.cancel();
        };
        let outcome = provider.commit_outcome(Uuid::new_v4(), &impatient);
        let (outcome, ()) = tokio::join!(outcome, cancel);
        runner.may_run.notify_one();
        outcome
    };
    let copying = backup.backup_container(files, &notes, &patient);
    let (moved, outcome) = tokio::join!(copying, asking);
    let error = outcome.unwrap_err();
    assert_eq!(error.kind, Kind::Cancelled);
    assert!(error.to_string().contains("before its turn came"), "{error}");
    assert_eq!(moved.unwrap().entries, 4);
    // It was never begun, so nothing was decided.
    assert!(!bench.archives().join(".commits").exists());
    bench.check_messages();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_says_in_shell_which_backups_live() {
    let bench = Bench::with_example(IN_SHELL);
    let provider = bench.start().await.unwrap();
    let backup = start_guest(&provider, GuestKind::Lxc, 1_800_000_000).await;
    let name = backup.archive_name().to_owned();
    let stored = || {
        let dirs = bench.archives().read_dir().unwrap().map(|entry| entry.unwrap().path());
        dirs.filter(|dir| dir.join(&name).join("files.tar").exists()).count()
    };
    // Left by the dead, and the number in its name is again one of a process.
    let dead = bench.archives().join(format!(".tmp-dead-{}", std::process::id()));
    std::fs::create_dir_all(dead.join(&name)).unwrap();
    let other = bench.start().await.unwrap();
    other.activate(&call()).await.unwrap();
    assert!(!dead.exists());
    assert_eq!(stored(), 1);
    backup.abort("a test", &call()).await.unwrap();
    assert_eq!(stored(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_in_shell_that_fails_is_an_error() {
    let bench = Bench::with_example(IN_SHELL);
    let provider = bench.start().await.unwrap();
    let _backup = start_guest(&provider, GuestKind::Lxc, 1_800_000_000).await;
    // Where it would be moved to is gone.
    for entry in bench.archives().read_dir().unwrap() {
        std::fs::remove_dir_all(entry.unwrap().path()).unwrap();
    }
    let place = bench.archives().join("archive");
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("entry.json"), "{}").unwrap();
    let error = provider.remove("archive", &call()).await.unwrap_err();
    assert_eq!(error.kind, Kind::Io);
    assert!(error.to_string().contains("The archive archive could not be removed"), "{error}");
    assert!(place.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_outcome_of_a_commit_is_known_in_shell_too() {
    let bench = Bench::with_example(IN_SHELL);
    let provider = bench.start().await.unwrap();
    let root = bench.dir.path().join("tree");
    tree(&root);
    let (call, notes) = (call(), Notes::default());
    let mut backup = start_guest(&provider, GuestKind::Lxc, 1_800_000_000).await;
    backup.backup_container(container(&root), &notes, &call).await.unwrap();
    let (id, never) = (Uuid::new_v4(), Uuid::new_v4());
    let archive = backup.commit(id, &call).await.unwrap().archive;
    let other = bench.start().await.unwrap();
    let committed = CommitOutcome::Committed { archive };
    assert_eq!(other.commit_outcome(id, &call).await.unwrap(), committed);
    let outcome = other.commit_outcome(never, &call).await.unwrap();
    assert_eq!(outcome, CommitOutcome::NotCommitted);
    let mut late = start_guest(&provider, GuestKind::Lxc, 1_800_000_200).await;
    late.backup_container(container(&root), &notes, &call).await.unwrap();
    assert!(late.commit(never, &call).await.is_err());
    assert_eq!(listed(&other).await.len(), 1);
    assert_eq!(other.remove("../archives", &call).await.unwrap_err().kind, Kind::NotFound);
    bench.check_messages();
}
