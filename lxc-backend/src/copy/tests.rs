// SPDX-License-Identifier: MIT OR Apache-2.0
//! Trees are copied in two passes and compared in all that a backup keeps. Needs root, for owners and devices.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use proptest::prelude::*;
use provider_api::Excludes;
use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat};

use super::*;

/// Longer than the granularity of times, with which changes cannot be seen.
const SETTLE: Duration = Duration::from_millis(2200);

struct Place {
    dir: tempfile::TempDir,
    excludes: Excludes,
    copy: Option<TreeCopy>,
}

impl Place {
    /// Not in /tmp, which may be a file system without attributes.
    fn new() -> Option<Self> {
        Self::within("/var/tmp")
    }

    fn within(around: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let dir = tempfile::tempdir_in(around).unwrap();
        for name in ["tree", "copies"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        Some(Self { dir, excludes: Excludes::default(), copy: None })
    }

    fn tree(&self) -> PathBuf {
        self.dir.path().join("tree")
    }

    fn begin(&mut self) -> PassReport {
        self.begin_with(&Control::default())
    }

    fn begin_with(&mut self, control: &Control) -> PassReport {
        let open = |name| File::open(self.dir.path().join(name)).unwrap().into();
        let mut copy =
            TreeCopy::new(open("tree"), &open("copies"), "c", self.excludes.root()).unwrap();
        let report = copy.first(control).unwrap();
        self.copy = Some(copy);
        report
    }

    fn end(&mut self) -> PassReport {
        let mut copy = self.copy.take().unwrap();
        let report = copy.second(&Control::default(), false).unwrap();
        copy.finish().unwrap();
        report
    }

    fn assert_same(&self) {
        let (tree, copy) = (described(&self.tree()), described(&self.dir.path().join("copies/c")));
        for (path, what) in &tree {
            assert_eq!(copy.get(path), Some(what), "{}", path.display());
        }
        let more: Vec<_> = copy.keys().filter(|path| !tree.contains_key(*path)).collect();
        assert!(more.is_empty(), "not in the tree: {more:?}");
    }
}

/// What is done before a directory with this path is opened.
pub(super) struct AtDirectory(pub(super) Box<dyn Fn(&Path) + Send + Sync>);

impl Default for AtDirectory {
    fn default() -> Self {
        Self(Box::new(|_| ()))
    }
}

/// All that a backup keeps of a tree, as text.
fn described(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut first_names = BTreeMap::new();
    let mut waiting = vec![PathBuf::new()];
    while let Some(below) = waiting.pop() {
        let path = root.join(&below);
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            waiting.extend(
                fs::read_dir(&path).unwrap().map(|entry| below.join(entry.unwrap().file_name())),
            );
        }
        let content = match meta.file_type() {
            // Too much to read, all of it holes.
            kind if kind.is_file() && meta.size() > 1 << 30 => format!("{} blocks", meta.blocks()),
            kind if kind.is_file() => blake3::hash(&fs::read(&path).unwrap()).to_hex().to_string(),
            kind if kind.is_symlink() => format!("{:?}", fs::read_link(&path).unwrap()),
            _ => String::new(),
        };
        let size = if meta.is_dir() { 0 } else { meta.size() };
        found.insert(
            below.clone(),
            format!(
                "{:o} {}:{} {} {}.{} {size} {content} {:?}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.rdev(),
                meta.mtime(),
                meta.mtime_nsec(),
                attributes_of(&path),
            ),
        );
        if !meta.is_dir() && meta.nlink() > 1 {
            first_names.entry(meta.ino()).or_insert_with(Vec::new).push(below);
        }
    }
    for mut names in first_names.into_values() {
        names.sort();
        for name in &names {
            found.get_mut(name).unwrap().push_str(&format!(" one of {names:?}"));
        }
    }
    found
}

fn attributes_of(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut list = vec![0; 4096];
    let count = rustix::fs::llistxattr(path, &mut list[..]).unwrap_or(0);
    list.truncate(count);
    let names = list.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut found: Vec<_> = names
        .map(|name| {
            let mut value = vec![0; 4096];
            let count = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            (String::from_utf8_lossy(name).into_owned(), value[..count].to_vec())
        })
        .collect();
    found.sort();
    found
}

fn run(program: &str, arguments: &[&str], path: &Path) {
    let status = Command::new(program).args(arguments).arg(path).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

/// One of everything that is odd.
fn make_odd_things(tree: &Path) {
    let at = |name: &str| tree.join(name);
    fs::create_dir_all(at("a/b/c")).unwrap();
    fs::write(at("a/plain"), "text").unwrap();
    fs::write(at("a/suid"), "text").unwrap();
    chown(at("a/suid"), Some(100_007), Some(100_008)).unwrap();
    fs::set_permissions(at("a/suid"), fs::Permissions::from_mode(0o6751)).unwrap();
    for name in ["a/one", "a/b/two", "three"] {
        if name != "a/one" {
            fs::hard_link(at("a/one"), at(name)).unwrap();
        } else {
            fs::write(at(name), "linked").unwrap();
        }
    }
    symlink("/nowhere/at/all", at("a/link")).unwrap();
    fs::hard_link(at("a/link"), at("a/b/link too")).unwrap();
    rustix::fs::lsetxattr(at("a/link"), "trusted.of-a-link", b"v", XattrFlags::empty()).unwrap();
    let node = |name: &str, kind, number| {
        mknodat(CWD, at(name), kind, Mode::from_raw_mode(0o640), number).unwrap();
    };
    node("fifo", FileType::Fifo, 0);
    node("socket", FileType::Socket, 0);
    node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    node("block", FileType::BlockDevice, rustix::fs::makedev(7, 0));
    node("a/whiteout", FileType::CharacterDevice, 0);
    let sparse = File::create(at("sparse")).unwrap();
    sparse.set_len(1 << 25).unwrap();
    sparse.write_all_at(b"in the middle", 1 << 24).unwrap();
    File::create(at("empty with a size")).unwrap().set_len(1 << 34).unwrap();
    fs::write(at(&"n".repeat(255)), "long").unwrap();
    fs::write(tree.join(std::ffi::OsString::from_vec(vec![b'x', 0xff, b'\n', 0x80])), "bytes")
        .unwrap();
    let capability = [1_u8, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    rustix::fs::lsetxattr(at("a/plain"), "security.capability", &capability, XattrFlags::empty())
        .unwrap();
    rustix::fs::lsetxattr(at("three"), "user.a", &[0, 1, 2, 255], XattrFlags::empty()).unwrap();
    rustix::fs::lsetxattr(at("a"), "trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
    run("setfacl", &["-m", "u:100033:rwx,g:44:r"], &at("a/plain"));
    run("setfacl", &["-d", "-m", "u:100033:rx"], &at("a/b"));
    fs::write(at("a/b/c/deep"), "deep").unwrap();
    fs::set_permissions(at("a/b/c"), fs::Permissions::from_mode(0o1770)).unwrap();
    let set_time = |name: &str, nanos: u64| {
        let time = UNIX_EPOCH + Duration::from_nanos(nanos);
        File::open(at(name)).unwrap().set_modified(time).unwrap();
    };
    set_time("a/plain", 1_000_000_000_123_456_789);
    set_time("a/b", 987_654_321);
}

#[test]
fn everything_odd_is_copied_and_nothing_is_copied_twice() {
    let Some(mut place) = Place::new() else { return };
    let tree = place.tree();
    make_odd_things(&tree);
    std::thread::sleep(SETTLE);
    let first = place.begin();
    assert!(first.copied >= 14 && first.copied_bytes < 1 << 20, "{first:?}");
    let second = place.end();
    assert_eq!((second.copied, second.removed, second.copied_bytes), (0, 0, 0), "{second:?}");
    place.assert_same();
    let blocks = fs::metadata(place.dir.path().join("copies/c/sparse")).unwrap().blocks();
    assert!(blocks < 1000, "sparse: {blocks} blocks");
}

#[test]
fn what_changes_after_the_first_pass_is_copied_again() {
    let Some(mut place) = Place::new() else { return };
    let tree = place.tree();
    make_odd_things(&tree);
    let at = |name: &str| tree.join(name);
    fs::create_dir_all(at("moved/in/x")).unwrap();
    fs::write(at("moved/in/x/same"), "same").unwrap();
    fs::hard_link(at("moved/in/x/same"), at("same too")).unwrap();
    for name in ["to-dir", "gone", "stays", "same-size", "old time"] {
        fs::write(at(name), "before").unwrap();
    }
    fs::create_dir(at("to-file")).unwrap();
    fs::write(at("to-file/within"), "").unwrap();
    std::thread::sleep(SETTLE);
    place.begin();
    fs::rename(at("moved/in"), at("moved/out")).unwrap();
    fs::remove_file(at("to-dir")).unwrap();
    fs::create_dir(at("to-dir")).unwrap();
    fs::write(at("to-dir/new"), "new").unwrap();
    fs::remove_dir_all(at("to-file")).unwrap();
    symlink("x", at("to-file")).unwrap();
    fs::remove_file(at("gone")).unwrap();
    fs::write(at("same-size"), "after!").unwrap();
    let time = fs::metadata(at("old time")).unwrap().modified().unwrap();
    fs::write(at("old time"), "after!").unwrap();
    File::open(at("old time")).unwrap().set_modified(time).unwrap();
    // One name less, and one more of another file; and new ones where defaults are inherited.
    fs::remove_file(at("three")).unwrap();
    fs::hard_link(at("stays"), at("a/b/stays too")).unwrap();
    fs::write(at("a/b/inherits"), "new").unwrap();
    fs::create_dir(at("a/b/inherits too")).unwrap();
    fs::set_permissions(at("a"), fs::Permissions::from_mode(0o711)).unwrap();
    rustix::fs::lremovexattr(at("a"), "trusted.overlay.opaque").unwrap();
    fs::remove_file(at("fifo")).unwrap();
    let report = place.end();
    assert!(report.copied < report.entries / 2, "{report:?}");
    place.assert_same();
}

/// Such a directory is at two places of the copy, and at the one where it is in the end only half of it.
#[test]
fn a_directory_that_is_moved_away_and_back_is_whole() {
    let Some(mut place) = Place::new() else { return };
    let tree = place.tree();
    fs::create_dir_all(tree.join("a/P/S/deeper")).unwrap();
    fs::create_dir(tree.join("b")).unwrap();
    fs::write(tree.join("a/P/S/file"), "content").unwrap();
    std::thread::sleep(SETTLE);
    let is_moved = Arc::new((Mutex::new(false), Condvar::new()));
    let within = tree.clone();
    let control = Control {
        at_directory: AtDirectory(Box::new(move |path| {
            let mut moved = is_moved.0.lock().unwrap();
            match path.to_str().unwrap() {
                "a/P/S" if !*moved => {
                    fs::rename(within.join("a/P"), within.join("b/P")).unwrap();
                    *moved = true;
                    is_moved.1.notify_all();
                }
                // There are two workers at least.
                "b" => drop(is_moved.1.wait_while(moved, |moved| !*moved).unwrap()),
                _ => {}
            }
        })),
        ..Control::default()
    };
    place.begin_with(&control);
    let copies = place.dir.path().join("copies/c");
    assert!(copies.join("b/P/S/file").exists() && !copies.join("a/P/S/file").exists());
    fs::rename(tree.join("b/P"), tree.join("a/P")).unwrap();
    place.end();
    place.assert_same();
}

/// Where the copy is, times may be fewer than in the container.
#[test]
fn times_that_the_copy_cannot_have_are_told() {
    let Some(mut place) = Place::within("/dev/shm") else { return };
    let late = UNIX_EPOCH + Duration::from_secs(1 << 36);
    let tree = place.tree();
    File::create(tree.join("late")).unwrap().set_modified(late).unwrap();
    let has = |path: &Path| fs::metadata(path).unwrap().modified().unwrap() == late;
    let elsewhere = tempfile::tempdir_in("/var/tmp").unwrap();
    let probe = elsewhere.path().join("probe");
    File::create(&probe).unwrap().set_modified(late).unwrap();
    if !has(&tree.join("late")) || has(&probe) {
        eprintln!("skipped: needs two file systems, one of which has less times");
        return;
    }
    let open = |path: &Path| OwnedFd::from(File::open(path).unwrap());
    let root = place.excludes.root();
    let mut copy = TreeCopy::new(open(&tree), &open(elsewhere.path()), "c", root).unwrap();
    let error = copy.first(&Control::default()).unwrap_err().to_string();
    assert!(error.contains("cannot keep the times of a file ('/late'"), "{error}");
    place.begin();
    assert!(has(&place.dir.path().join("copies/c/late")));
}

/// Nothing runs then: a file system that says so is damaged, and what the first pass has copied is old.
#[test]
fn what_vanishes_in_the_second_pass_is_told_and_left_out() {
    let Some(mut place) = Place::new() else { return };
    let tree = place.tree();
    fs::create_dir_all(tree.join("dir/sub")).unwrap();
    fs::write(tree.join("dir/sub/file"), "old").unwrap();
    place.begin();
    let control = || {
        let tree = tree.clone();
        let vanish = move |path: &Path| {
            if path == Path::new("dir/sub") {
                let _ = fs::rename(tree.join("dir/sub"), tree.join("elsewhere"));
            }
        };
        Control { at_directory: AtDirectory(Box::new(vanish)), ..Control::default() }
    };
    let copy = place.copy.as_mut().unwrap();
    let error = copy.second(&control(), false).unwrap_err();
    assert!(error.to_string().contains("'/dir/sub' of the container: it is not there"), "{error}");
    fs::rename(tree.join("elsewhere"), tree.join("dir/sub")).unwrap();
    let report = copy.second(&control(), true).unwrap();
    assert_eq!((report.skipped_count, report.skipped.len()), (1, 1), "{report:?}");
    place.copy.take().unwrap().finish().unwrap();
    assert!(!place.dir.path().join("copies/c/dir/sub").exists());
}

/// A chain of directories has a path for each, the longest of which is as long as all of it.
#[test]
fn deep_directories_take_memory_by_their_number_only() {
    let Some(mut place) = Place::within("/dev/shm") else { return };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut dir = OwnedFd::from(File::open(place.tree()).unwrap());
    for _ in 0..4000 {
        mkdirat(&dir, "d", Mode::RWXU).unwrap();
        dir = openat(&dir, "d", flags, Mode::empty()).unwrap();
    }
    let control = Control::default();
    place.begin_with(&control);
    let kept = control.kept.load(Ordering::Relaxed);
    assert!(kept < 4000 * 300, "{kept} bytes");
    place.end();
    let too_much = Control { kept: AtomicUsize::new(KEPT_BYTES_MAX), ..Control::default() };
    fs::create_dir(place.dir.path().join("more")).unwrap();
    let open = |name| File::open(place.dir.path().join(name)).unwrap().into();
    let mut copy = TreeCopy::new(open("tree"), &open("more"), "c", place.excludes.root()).unwrap();
    assert!(matches!(copy.first(&too_much), Err(CopyError::TooMany)));
    for name in ["tree", "copies", "more"] {
        vzdump_core::temp_tree::remove(&place.dir.path().join(name)).unwrap();
    }
}

/// In both passes, and whatever a name was in the first one.
#[test]
fn what_is_left_out_is_not_copied() {
    let Some(mut place) = Place::new() else { return };
    place.excludes = Excludes::parse(&["/tmp/?*", "only/", "*.bak"]).unwrap();
    let tree = place.tree();
    let make = |name: &str| {
        fs::create_dir_all(tree.join(name).parent().unwrap()).unwrap();
        fs::write(tree.join(name), name).unwrap();
    };
    for name in ["tmp/x/y", "a/only", "a/x.bak", "b/only/in", "moved/tmp/x"] {
        make(name);
    }
    fs::hard_link(tree.join("a/x.bak"), tree.join("a/kept")).unwrap();
    let first = place.begin();
    // The directory of `only`, of `/tmp`'s content, and the copy of an editor.
    assert_eq!(first.excluded, 3, "{first:?}");
    fs::remove_file(tree.join("a/only")).unwrap();
    make("a/only/in");
    fs::remove_dir_all(tree.join("b/only")).unwrap();
    make("b/only");
    fs::remove_dir_all(tree.join("tmp")).unwrap();
    fs::rename(tree.join("moved/tmp"), tree.join("tmp")).unwrap();
    place.end();
    let copy = described(&place.dir.path().join("copies/c"));
    let names: Vec<_> = copy.keys().map(|path| path.to_str().unwrap()).collect();
    assert_eq!(names, ["", "a", "a/kept", "b", "b/only", "moved", "tmp"]);
}

#[test]
fn paths_longer_than_the_kernel_takes_are_copied() {
    let Some(mut place) = Place::new() else { return };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut dir = OwnedFd::from(File::open(place.tree()).unwrap());
    for _ in 0..30 {
        let name = "d".repeat(250);
        mkdirat(&dir, name.as_str(), Mode::RWXU).unwrap();
        dir = openat(&dir, name.as_str(), flags, Mode::empty()).unwrap();
    }
    let made = openat(&dir, "file", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
    File::from(made).set_len(10).unwrap();
    place.begin();
    let report = place.end();
    assert_eq!((report.entries, report.copied), (31, 1), "{report:?}");
    let at = std::iter::repeat_n("d".repeat(250), 30).collect::<PathBuf>();
    let copy = OwnedFd::from(File::open(place.dir.path().join("copies/c")).unwrap());
    let last = deep::open_directory(&copy, &at).unwrap();
    assert_eq!(rustix::fs::statat(&last, "file", AtFlags::empty()).unwrap().st_size, 10);
    drop((dir, copy, last));
    for name in ["tree", "copies"] {
        vzdump_core::temp_tree::remove(&place.dir.path().join(name)).unwrap();
    }
}

/// What cannot be read is an error of the second pass, or is left out and told.
#[test]
fn what_cannot_be_read_fails_or_is_skipped() {
    let Some(mut place) = Place::new() else { return };
    fs::write(place.tree().join("file"), "text").unwrap();
    let mut dir = OwnedFd::from(File::open(place.tree()).unwrap());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // Longer than any path that is followed.
    for _ in 0..=deep::PATH_BYTES_MAX / 250 {
        mkdirat(&dir, "d".repeat(250), Mode::RWXU).unwrap();
        dir = openat(&dir, "d".repeat(250), flags, Mode::empty()).unwrap();
    }
    drop(dir);
    let first = place.begin();
    assert_eq!(first.skipped_count, 0, "it may just have gone: {first:?}");
    let copy = place.copy.as_mut().unwrap();
    let error = copy.second(&Control::default(), false).unwrap_err();
    assert!(matches!(error, CopyError::Source { .. }), "{error}");
    let report = copy.second(&Control::default(), true).unwrap();
    assert_eq!((report.skipped_count, report.skipped.len()), (1, 1), "{report:?}");
    assert!(report.skipped[0].why.contains("longer than"), "{report:?}");
    place.copy.take().unwrap().finish().unwrap();
    assert_eq!(fs::read(place.dir.path().join("copies/c/file")).unwrap(), b"text");
    for name in ["tree", "copies"] {
        vzdump_core::temp_tree::remove(&place.dir.path().join(name)).unwrap();
    }
}

#[test]
fn a_target_without_room_and_a_cancelled_copy_are_told() {
    let Some(place) = Place::new() else { return };
    fs::write(place.tree().join("big"), vec![7; 4 << 20]).unwrap();
    let small = place.dir.path().join("small");
    fs::create_dir(&small).unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=1m", "none"], &small);
    let open = |path: &Path| OwnedFd::from(File::open(path).unwrap());
    let copied = TreeCopy::new(open(&place.tree()), &open(&small), "c", Excludes::default().root())
        .and_then(|mut copy| copy.first(&Control::default()));
    let cancelled = Control::default();
    cancelled.cancel();
    let ended = TreeCopy::new(
        open(&place.tree()),
        &open(&place.dir.path().join("copies")),
        "c",
        Excludes::default().root(),
    )
    .and_then(|mut copy| copy.first(&cancelled));
    run("umount", &["--lazy"], &small);
    let error = copied.unwrap_err();
    assert!(error.is_full() && error.to_string().contains("'/big'"), "{error}");
    assert!(matches!(ended, Err(CopyError::Cancelled)));
}

/// A change of a tree: which one, of what, and where to.
#[derive(Debug, Clone)]
enum Change {
    Write(u8, u8, u16),
    Remove(u8),
    Rename(u8, u8),
    Link(u8, u8),
    MakeDirectory(u8),
    Attribute(u8, u8),
    Mode(u8, u8),
    Symlink(u8),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (any::<u8>(), any::<u8>(), 0..3000_u16).prop_map(|(a, b, c)| Change::Write(a, b, c)),
        2 => any::<u8>().prop_map(Change::Remove),
        3 => (any::<u8>(), any::<u8>()).prop_map(|(a, b)| Change::Rename(a, b)),
        3 => (any::<u8>(), any::<u8>()).prop_map(|(a, b)| Change::Link(a, b)),
        2 => any::<u8>().prop_map(Change::MakeDirectory),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(a, b)| Change::Attribute(a, b)),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(a, b)| Change::Mode(a, b)),
        1 => any::<u8>().prop_map(Change::Symlink),
    ]
}

/// Of few paths, so that changes meet.
fn path_of(number: u8) -> PathBuf {
    let names = ["a", "b", "c"];
    let depth = usize::from(number % 3) + 1;
    (0..depth).map(|level| names[usize::from(number / 3) / 3_usize.pow(level as u32) % 3]).collect()
}

/// What is not possible changes nothing.
fn apply(tree: &Path, change: &Change) {
    let at = |number: &u8| tree.join(path_of(*number));
    match change {
        Change::Write(path, byte, size) => {
            drop(fs::write(at(path), vec![*byte; usize::from(*size)]));
        }
        Change::Remove(path) => {
            let path = at(path);
            if path.is_dir() && !path.is_symlink() {
                drop(fs::remove_dir_all(path));
            } else {
                drop(fs::remove_file(path));
            }
        }
        Change::Rename(from, to) => drop(fs::rename(at(from), at(to))),
        Change::Link(from, to) => drop(fs::hard_link(at(from), at(to))),
        Change::MakeDirectory(path) => drop(fs::create_dir_all(at(path))),
        Change::Attribute(path, value) => {
            let flags = XattrFlags::empty();
            let _ = rustix::fs::lsetxattr(at(path), "trusted.v", &[*value], flags);
        }
        Change::Mode(path, mode) if !at(path).is_symlink() => {
            let mode = fs::Permissions::from_mode(0o700 | u32::from(*mode));
            drop(fs::set_permissions(at(path), mode));
        }
        Change::Mode(..) => {}
        Change::Symlink(path) => drop(symlink("target", at(path))),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3, ..ProptestConfig::default() })]

    /// The trees of one case are made together, so that the wait for their times is one; in RAM, because each
    /// copy begins with writing out what its file system has.
    #[test]
    fn any_tree_after_any_changes_is_the_same_in_the_copy(
        cases in prop::collection::vec(
            (prop::collection::vec(change(), 0..40), prop::collection::vec(change(), 0..12)),
            60,
        ),
    ) {
        let mut places: Vec<Place> = cases.iter().filter_map(|_| Place::within("/dev/shm")).collect();
        for (place, (before, _)) in places.iter().zip(&cases) {
            before.iter().for_each(|change| apply(&place.tree(), change));
        }
        std::thread::sleep(SETTLE);
        for (place, (_, after)) in places.iter_mut().zip(&cases) {
            place.begin();
            after.iter().for_each(|change| apply(&place.tree(), change));
            place.end();
            place.assert_same();
        }
    }
}
