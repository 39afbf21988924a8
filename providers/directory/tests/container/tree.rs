// SPDX-License-Identifier: MIT OR Apache-2.0
//! Containers stored as trees of files.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::time::Instant;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

use super::*;

/// Names the storage to the child process of a test, and the commit it makes.
const CHILD_STORAGE: &str = "DIRECTORY_TEST_STORAGE";
const CHILD_COMMIT: &str = "DIRECTORY_TEST_COMMIT";
const KILL_AT: &str = "DIRECTORY_TEST_KILL_AT";
/// More steps than there are.
const STEPS_MAX: u32 = 40;

async fn place() -> Place {
    Place::with(None, ContainerFormat::Tree).await
}

fn make_files(tree: &Path) {
    fs::create_dir_all(tree.join("etc/deep")).unwrap();
    fs::write(tree.join("etc/hosts"), "127.0.0.1 localhost\n").unwrap();
    fs::set_permissions(tree.join("etc/hosts"), PermissionsExt::from_mode(0o4751)).unwrap();
    fs::hard_link(tree.join("etc/hosts"), tree.join("etc/deep/\u{e9} \n x")).unwrap();
    symlink("/etc/passwd", tree.join("etc/link")).unwrap();
    fs::write(tree.join("data"), vec![7; 300_000]).unwrap();
    let sparse = fs::File::create(tree.join("sparse")).unwrap();
    sparse.set_len(1 << 40).unwrap();
    sparse.write_all_at(b"island", 1 << 39).unwrap();
    mknodat(CWD, tree.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o620), 0).unwrap();
    let time = std::time::UNIX_EPOCH + Duration::from_nanos(1_600_000_000_123_456_789);
    for name in ["data", "etc/deep", "etc"] {
        fs::File::open(tree.join(name)).unwrap().set_modified(time).unwrap();
    }
}

/// What there is of each file, but its content.
fn seen(dir: &Path) -> BTreeMap<String, (u32, u64, i64, i64, u64, u64)> {
    let look = |name: String| {
        let meta = dir.join(&name).symlink_metadata().unwrap();
        let is_dir = meta.is_dir();
        let size = if is_dir { 0 } else { meta.len() };
        let links = if is_dir { 0 } else { meta.nlink() };
        (name, (meta.mode(), links, meta.mtime(), meta.mtime_nsec(), size, meta.rdev()))
    };
    listed_raw(dir).into_iter().map(look).collect()
}

fn listed_raw(dir: &Path) -> Vec<String> {
    let mut command = Command::new("find");
    let output =
        command.args([".", "-mindepth", "1", "-print0"]).current_dir(dir).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_terminator('\0').map(|line| line[2..].to_owned()).collect()
}

/// What was reported last of each part.
#[derive(Default)]
struct Parts(Mutex<BTreeMap<String, (u64, u64)>>);

impl Progress for Parts {
    fn report(&self, device: &str, done_bytes: u64, total_bytes: u64, _zero_bytes: u64) {
        self.0.lock().unwrap().insert(device.to_owned(), (done_bytes, total_bytes));
    }
    fn log(&self, _line: &str) {}
}

async fn verified(place: &Place, archive: &str) -> Vec<String> {
    let options = VerifyOptions { extent: VerifyExtent::All, known_sound: Vec::new() };
    let parts = Parts::default();
    let report = place.provider.verify(archive, &options, &parts, &place.call).await.unwrap();
    assert_eq!(report.damage.len() as u64, report.damage_count);
    let parts = parts.0.into_inner().unwrap();
    if report.is_sound() {
        assert_eq!(parts.keys().collect::<Vec<_>>(), ["tree", "tree.blake3"]);
        assert!(parts.values().all(|(done, total)| done == total), "{parts:?}");
    }
    report.damage.into_iter().map(|damage| damage.problem).collect()
}

async fn offered(place: &Place, archive: &str) -> PathBuf {
    let mut restore = place.provider.restore_container_init(archive, &place.call).await.unwrap();
    let data = restore.data(Path::new("/nowhere"), &place.call).await.unwrap();
    let ContainerData::Directory(path) = data else { panic!("no directory") };
    restore.cleanup(&place.call).await.unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn files_come_back_as_they_were_without_what_was_excluded() {
    let place = place().await;
    let tree = place.tree();
    make_files(&tree);
    let expected = seen(&tree);
    fs::create_dir(tree.join("tmp")).unwrap();
    for out in ["tmp/x", "etc/z.bak"] {
        fs::write(tree.join(out), "gone").unwrap();
    }
    let time = std::time::UNIX_EPOCH + Duration::from_nanos(1_600_000_000_123_456_789);
    fs::File::open(tree.join("etc")).unwrap().set_modified(time).unwrap();
    let _listener = UnixListener::bind(tree.join("sock")).unwrap();
    let (archive, moved) = place.store(place.backup(&["/"], &["/tmp", "*.bak"])).await;
    assert_eq!((moved.entries, moved.ignored_count), (expected.len() as u64 + 1, 1));
    assert!(moved.read_bytes < 1 << 20, "the hole of a sparse file was stored");
    let back = offered(&place, &archive).await;
    assert_eq!(seen(&back), expected);
    assert_eq!(fs::read(back.join("data")).unwrap(), vec![7; 300_000]);
    assert_eq!(fs::read_link(back.join("etc/link")).unwrap(), Path::new("/etc/passwd"));
    assert!(back.join("sparse").metadata().unwrap().blocks() < 1 << 10);
    // Nobody else gets at what is in it, such as programs that run as their owner.
    assert_eq!(place.file(&archive, "").metadata().unwrap().mode() & 0o7777, 0o700);
    let list = place.provider.list(&place.call).await.unwrap();
    assert!(list[0].size_bytes > 300_000 && list[0].size_bytes < 1 << 20, "{list:?}");
    assert_eq!(verified(&place, &archive).await, [""; 0]);
    // A storage that changes its format reads what it has.
    let other =
        DirectoryOptions { path: place.dir.path().join("store"), tools: ToolPaths::default() };
    let other = DirectoryProvider::new(other);
    assert_eq!(other.list(&place.call).await.unwrap().len(), 1);
    other.remove(&archive, &place.call).await.unwrap();
    assert!(!place.file(&archive, "").exists());
    assert_eq!(place.leftovers(), Vec::<OsString>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_of_an_archive_is_found() {
    let place = place().await;
    make_files(&place.tree());
    let (archive, _) = place.store(place.backup(&["/"], &[])).await;
    let flip = |name: &str, at: u64| {
        let path = place.file(&archive, name);
        let time = path.metadata().unwrap().modified().unwrap();
        let file = fs::File::options().read(true).write(true).open(&path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
        // As a fault of the medium, which changes no time.
        file.set_modified(time).unwrap();
    };
    for (name, at, said) in [
        ("tree/data", 150_000, "The content of /data is 300000:"),
        ("tree/etc/hosts", 0, "The content of /etc/deep/\\xc3\\xa9\\x20\\x0a\\x20x is 20:"),
        ("tree/sparse", (1 << 39) + 3, "The content of /sparse"),
        ("tree/sparse", 5, "The content of /sparse"),
        ("tree.blake3", 30, "tree.blake3 does not match its checksum"),
        ("lxc.conf", 3, "lxc.conf"),
        ("manifest.json", 200, "anifest"),
    ] {
        flip(name, at);
        let found = verified(&place, &archive).await;
        assert!(found.len() == 1 && found[0].contains(said), "{name}: {found:?}");
        flip(name, at);
        assert_eq!(verified(&place, &archive).await, [""; 0], "{name}");
    }
    // A file that is not there any more.
    let (file, aside) = (place.file(&archive, "tree/data"), place.file(&archive, "data"));
    let time = place.file(&archive, "tree").metadata().unwrap().modified().unwrap();
    fs::rename(&file, &aside).unwrap();
    let is_missing = "/data is missing.".to_owned();
    assert!(verified(&place, &archive).await.contains(&is_missing));
    let refused = place.provider.restore_container_init(&archive, &place.call).await.err().unwrap();
    assert_eq!(refused.kind, Kind::Corrupt, "{refused}");
    fs::rename(&aside, &file).unwrap();
    fs::File::open(place.file(&archive, "tree")).unwrap().set_modified(time).unwrap();
    assert_eq!(verified(&place, &archive).await, [""; 0]);
    // The storage's owner may have put there what he likes: nothing is followed.
    fs::rename(place.file(&archive, "tree"), place.file(&archive, "was")).unwrap();
    symlink("/etc", place.file(&archive, "tree")).unwrap();
    assert_eq!(verified(&place, &archive).await.len(), 1);
    let refused = place.provider.restore_container_init(&archive, &place.call).await.err().unwrap();
    assert_eq!(refused.kind, Kind::Corrupt);
    place.provider.remove(&archive, &place.call).await.unwrap();
    assert!(Path::new("/etc/passwd").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_privileged_container_s_devices_are_in_the_tree_and_harm_nobody() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can make devices");
        return;
    }
    let place = place().await;
    let tree = place.tree();
    let mode = Mode::from_raw_mode(0o666);
    let zero = makedev(1, 5);
    mknodat(CWD, tree.join("endless"), FileType::CharacterDevice, mode, zero).unwrap();
    mknodat(CWD, tree.join("disk"), FileType::BlockDevice, mode, makedev(7, 250)).unwrap();
    fs::write(tree.join("owned"), "").unwrap();
    std::os::unix::fs::chown(tree.join("owned"), Some(65_534), Some(1000)).unwrap();
    let (archive, _) = place.store(place.backup(&["/"], &[])).await;
    let back = offered(&place, &archive).await;
    let device = back.join("endless").symlink_metadata().unwrap();
    assert!(device.file_type().is_char_device() && device.rdev() == zero);
    assert!(back.join("disk").symlink_metadata().unwrap().file_type().is_block_device());
    let owned = back.join("owned").metadata().unwrap();
    assert_eq!((owned.uid(), owned.gid()), (65_534, 1000));
    // They are not opened, which would come to no end.
    assert_eq!(verified(&place, &archive).await, [""; 0]);
    std::os::unix::fs::chown(back.join("owned"), Some(0), Some(1000)).unwrap();
    assert_eq!(
        verified(&place, &archive).await,
        ["The owner of /owned is 0:1000, not 65534:1000."]
    );
}

/// What comes out of the command, and what is then said.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_whole_tree_of_files_fails_the_backup() {
    for (script, said) in [
        ("true", "ends too early"),
        ("tar -c /bin/sh | head -c 5000", "ends too early"),
        ("exec cat /dev/urandom", "damaged header"),
        ("head -c 10240 /dev/zero", "has no entries"),
        // Twice the same name.
        ("cd /etc && tar -c passwd passwd passwd", "Of 3 files and directories of the container 2"),
        // Upwards, and through a link.
        ("cd /etc && tar -cP ../etc/passwd", "cannot be stored as it is: tar: "),
        (
            "cd $(mktemp -d) && ln -s /var/tmp out && tar -cf a.tar out && rm out && mkdir out && \
             touch out/planted-by-a-test && tar -rf a.tar out/planted-by-a-test && cat a.tar; rm -r $PWD",
            "cannot be stored as it is: tar: ",
        ),
    ] {
        let place = Place::with(Some(script), ContainerFormat::Tree).await;
        let mut guest = place.begin().await;
        let reports = Reports::default();
        let copied = guest.backup_container(place.backup(&["/"], &[]), &reports, &place.call);
        let result = tokio::time::timeout(LIMIT, copied).await.unwrap();
        let error = result.unwrap_err();
        assert!(error.message.contains(said), "{script}: {error}");
        guest.abort("it failed", &place.call).await.unwrap();
        assert!(place.provider.list(&place.call).await.unwrap().is_empty());
        assert_eq!(place.leftovers(), Vec::<OsString>::new(), "{script}");
    }
    assert!(!Path::new("/var/tmp/planted-by-a-test").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_that_the_storage_s_file_system_does_not_have_fails_the_backup() {
    // The year 2500, and half of the last second that ext4 has.
    for (millis, script) in [
        (
            16_725_225_600_000,
            "cd $(mktemp -d) && touch x && tar -c --format=posix --mtime=@16725225600 x; rm -r $PWD",
        ),
        (
            15_032_385_535_500,
            "cd $(mktemp -d) && touch x && tar -c --format=posix --mtime=@15032385535.5 x; rm -r $PWD",
        ),
    ] {
        let place = Place::with(Some(script), ContainerFormat::Tree).await;
        let time = std::time::UNIX_EPOCH + Duration::from_millis(millis);
        let store = fs::File::open(place.dir.path().join("store")).unwrap();
        store.set_modified(time).unwrap();
        if store.metadata().unwrap().modified().unwrap() == time {
            eprintln!("skipped: needs a file system without this time");
            continue;
        }
        let mut guest = place.begin().await;
        let backup = place.backup(&["/"], &[]);
        let error = guest.backup_container(backup, &Reports::default(), &place.call).await;
        let error = error.unwrap_err();
        assert!(error.message.contains("cannot be stored as it is: x was changed 1"), "{error}");
        guest.abort("it failed", &place.call).await.unwrap();
        // In a tar archive it has any time.
        Place::with(Some(script), ContainerFormat::Tar)
            .await
            .store(place.backup(&["/"], &[]))
            .await;
    }
}

/// A file system in memory.
struct Memory(PathBuf);

impl Memory {
    fn new(at: PathBuf, size: &str) -> Self {
        let mut mount = Command::new("mount");
        let options = format!("size={size}");
        mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&at);
        assert!(mount.status().unwrap().success(), "{}", at.display());
        Self(at)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_without_room_is_told_as_that() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can mount");
        return;
    }
    // It dies of the pipe that nobody reads, or says so.
    let says = "trap '' PIPE; cd $(mktemp -d) && head -c 9M /dev/urandom >large && tar -c .; code=$?; rm -r $PWD; exit $code";
    for format in [ContainerFormat::Tar, ContainerFormat::Tree] {
        for instead in [None, Some(says)] {
            let place = Place::with(instead, format).await;
            let _full = Memory::new(place.dir.path().join("store"), "4m");
            place.provider.activate(&place.call).await.unwrap();
            let mut noise = fs::File::open("/dev/urandom").unwrap().take(9 << 20);
            let mut large = fs::File::create(place.tree().join("large")).unwrap();
            std::io::copy(&mut noise, &mut large).unwrap();
            let mut guest = place.begin().await;
            let backup = place.backup(&["/"], &[]);
            let error = guest.backup_container(backup, &Reports::default(), &place.call).await;
            let error = error.unwrap_err();
            let why = error.source.as_ref().map_or(String::new(), ToString::to_string);
            let said = format!("{}: {why}", error.message);
            assert_eq!(error.kind, Kind::NoSpace, "{format:?} {instead:?}: {said}");
            for words in ["/store/.tmp", "No space left on device"] {
                assert!(said.contains(words), "{format:?} {instead:?}: {said}");
            }
            guest.abort("it failed", &place.call).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_dropped_half_way_leaves_nothing() {
    let script =
        "cd $(mktemp -d) && seq 1000 | xargs touch && tar -c . && rm -r $PWD && exec sleep 1000";
    let place = Place::with(Some(script), ContainerFormat::Tree).await;
    let mut guest = place.begin().await;
    let reports = Reports::default();
    let copied = guest.backup_container(place.backup(&["/"], &[]), &reports, &place.call);
    assert!(tokio::time::timeout(Duration::from_millis(500), copied).await.is_err());
    guest.abort("cancelled", &place.call).await.unwrap();
    assert_eq!(place.leftovers(), Vec::<OsString>::new());
}

/// Not a test of its own: what a child process runs.
#[tokio::test(flavor = "multi_thread")]
async fn child_process() {
    let Ok(folder) = std::env::var(CHILD_STORAGE) else { return };
    let id = std::env::var(CHILD_COMMIT).unwrap().parse().unwrap();
    // The test's directories; its own ones are not used.
    let mut place = place().await;
    let path = Path::new(&folder).join("store");
    let provider = DirectoryProvider::new(DirectoryOptions { path, tools: ToolPaths::default() });
    place.provider = provider.with_container_format(ContainerFormat::Tree);
    let tree = Path::new(&folder).join("tree");
    let backup =
        ContainerBackup { tree: tree.clone(), host_tree: tree, ..place.backup(&["/"], &[]) };
    let mut guest = place.begin().await;
    guest.backup_container(backup, &Reports::default(), &place.call).await.unwrap();
    guest.commit(id, &place.call).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_killed_at_any_step_leaves_a_whole_archive_or_none() {
    let mut committed = 0;
    for step in 1..=STEPS_MAX {
        let place = place().await;
        make_files(&place.tree());
        let id = Uuid::new_v4();
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "tree::child_process", "--nocapture"]).stdout(Stdio::null());
        child.env(CHILD_STORAGE, place.dir.path()).env(CHILD_COMMIT, id.to_string());
        let ended = child.env(KILL_AT, step.to_string()).status().unwrap();
        assert!(ended.success() || ended.signal() == Some(9), "step {step}: {ended}");
        // As the next process begins.
        place.provider.activate(&place.call).await.unwrap();
        let list = place.provider.list(&place.call).await.unwrap();
        match place.provider.commit_outcome(id, &place.call).await.unwrap() {
            CommitOutcome::Committed { archive } => {
                assert_eq!((list.len(), &list[0].name), (1, &archive), "step {step}");
                assert_eq!(verified(&place, &archive).await, [""; 0], "step {step}");
                committed += 1;
            }
            CommitOutcome::NotCommitted => assert!(list.is_empty(), "step {step}: {list:?}"),
            CommitOutcome::Pending => panic!("step {step}: pending"),
        }
        // A program that it was just starting has its locks for a moment longer.
        let until = Instant::now() + LIMIT;
        while !place.leftovers().is_empty() && Instant::now() < until {
            place.provider.activate(&place.call).await.unwrap();
        }
        assert_eq!(place.leftovers(), Vec::<OsString>::new(), "step {step}");
        if ended.success() {
            assert!(step > 8 && committed > 1, "{step} steps, {committed} with an archive");
            return;
        }
    }
    panic!("more than {STEPS_MAX} steps");
}
