// SPDX-License-Identifier: MIT OR Apache-2.0
//! Has the kernel read what `tar` is about to read.
//!
//! `tar` reads one small file after the other and waits for each, so a tree that is not in the page cache
//! costs it one turn of the disk per file. This walks the same tree in the same order, a bounded piece
//! ahead, and only asks for the data: nothing of a container comes into this process, and whatever fails is left
//! to `tar`, which tells of it.

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use rustix::fs::{Advice, CWD, Dir, FileType, Mode, OFlags, fadvise, fstat, openat};

use crate::limits::{AHEAD_BYTES, AHEAD_DEPTH_MAX, AHEAD_FILE_BYTES, AHEAD_FILES, AHEAD_NAMES_MAX};

/// How a directory is opened, and a file: through no link, and without a wait for what is no file.
const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const FILE: OFlags =
    OFlags::RDONLY.union(OFlags::NONBLOCK).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// How far `tar` is. What is said of it is only used to choose what to ask for.
#[derive(Debug, Default)]
pub(super) struct Position {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The name of the last entry, without `./` and without a slash at its end.
    name: Vec<u8>,
    has_ended: bool,
}

impl Position {
    /// `tar` has come to the entry of this name.
    pub(super) fn reach(&self, name: &[u8]) {
        let name = name.strip_prefix(b"./").unwrap_or(name);
        let name = name.strip_suffix(b"/").unwrap_or(name);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.name != name {
            state.name.clear();
            state.name.extend_from_slice(name);
            self.moved.notify_all();
        }
    }

    fn end(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).has_ended = true;
        self.moved.notify_all();
    }
}

/// Ends the reading when it is dropped.
#[derive(Debug)]
pub(super) struct EndOnDrop(pub(super) Arc<Position>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Goes through the walks of `tar` below `tree`, one after the other, until it has ended. May block.
pub(super) fn read_ahead(tree: &Path, walks: &[PathBuf], position: &Position) {
    for walk in walks {
        let Ok(root) = openat(CWD, tree.join(walk), DIRECTORY, Mode::empty()) else { continue };
        let Ok(stat) = fstat(&root) else { continue };
        let path = walk.as_os_str().as_bytes().to_vec();
        let mut reader = Reader {
            position,
            root: path.clone(),
            device: stat.st_dev,
            asked: VecDeque::new(),
            asked_bytes: 0,
        };
        if reader.begin().is_none() || reader.directory(&root, &path, 0).is_none() {
            return;
        }
    }
}

/// One walk. Its functions return nothing when it is over.
struct Reader<'a> {
    position: &'a Position,
    /// Where the walk begins, within the tree.
    root: Vec<u8>,
    device: u64,
    /// What was asked for and `tar` has not reached yet, in order.
    asked: VecDeque<(Vec<u8>, u64)>,
    asked_bytes: u64,
}

impl Reader<'_> {
    /// Waits until `tar` is in this walk, and not in one before.
    fn begin(&self) -> Option<()> {
        let mut state = self.position.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.has_ended && !is_below(&state.name, &self.root) {
            state = self.position.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        (!state.has_ended).then_some(())
    }

    fn directory(&mut self, dir: &OwnedFd, path: &[u8], depth: usize) -> Option<()> {
        for (name, kind) in sorted_names(dir) {
            let path = if path.is_empty() { name.clone() } else { [path, b"/", &name].concat() };
            match kind {
                FileType::Directory if depth < AHEAD_DEPTH_MAX => {
                    if self.is_passed(&path)? {
                        continue;
                    }
                    let name = OsStr::from_bytes(&name);
                    let Ok(inner) = openat(dir, name, DIRECTORY, Mode::empty()) else { continue };
                    if fstat(&inner).is_ok_and(|stat| stat.st_dev == self.device) {
                        self.directory(&inner, &path, depth + 1)?;
                    }
                }
                FileType::RegularFile => {
                    self.wait_for_room()?;
                    if !self.is_passed(&path)? {
                        let bytes = ask(dir, &name).unwrap_or(0);
                        self.asked_bytes += bytes;
                        self.asked.push_back((path, bytes));
                    }
                }
                _ => {}
            }
        }
        Some(())
    }

    /// Whether `tar` has left it behind.
    fn is_passed(&self, path: &[u8]) -> Option<bool> {
        let state = self.position.state.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = in_order(path, &state.name) == Ordering::Less && !is_below(&state.name, path);
        (!state.has_ended).then_some(passed)
    }

    fn wait_for_room(&mut self) -> Option<()> {
        let mut state = self.position.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if state.has_ended {
                return None;
            }
            while let Some((path, bytes)) = self.asked.front()
                && in_order(path, &state.name) != Ordering::Greater
            {
                self.asked_bytes -= bytes;
                self.asked.pop_front();
            }
            if self.asked.len() < AHEAD_FILES && self.asked_bytes < AHEAD_BYTES {
                return Some(());
            }
            state = self.position.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// In the order of `tar --sort=name`, which has a directory before what is in it.
fn in_order(one: &[u8], other: &[u8]) -> Ordering {
    one.split(|byte| *byte == b'/').cmp(other.split(|byte| *byte == b'/'))
}

/// Whether `name` lies within the directory `dir`.
fn is_below(name: &[u8], dir: &[u8]) -> bool {
    dir.is_empty() || name.strip_prefix(dir).is_some_and(|rest| rest.starts_with(b"/"))
}

/// The names of a directory with their kinds; none if there are too many to sort.
fn sorted_names(dir: &OwnedFd) -> Vec<(Vec<u8>, FileType)> {
    let Ok(entries) = Dir::read_from(dir) else { return Vec::new() };
    let mut names = Vec::new();
    for entry in entries {
        let Ok(entry) = entry else { return Vec::new() };
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        if names.len() == AHEAD_NAMES_MAX {
            return Vec::new();
        }
        names.push((name.to_vec(), entry.file_type()));
    }
    names.sort_unstable_by(|one, other| one.0.cmp(&other.0));
    names
}

/// Asks for the begin of a file; for the rest of a large one the kernel reads ahead by itself.
fn ask(dir: &OwnedFd, name: &[u8]) -> Option<u64> {
    let file = openat(dir, OsStr::from_bytes(name), FILE, Mode::empty()).ok()?;
    let blocks = u64::try_from(fstat(&file).ok()?.st_blocks).unwrap_or(0);
    let bytes = NonZeroU64::new(blocks.saturating_mul(512).min(AHEAD_FILE_BYTES))?;
    fadvise(&file, 0, Some(bytes), Advice::WillNeed).ok()?;
    Some(bytes.get())
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_order_is_that_of_tar() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a/z", "a-b/x", "a.b", "A/q/r", "b", "a/a/m", "a/a-m"] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let mut tar = Command::new("sh");
        tar.args(["-c", "tar -C \"$0\" --sort=name -cf - . | tar -tf -"]).arg(dir.path());
        let listed = String::from_utf8(tar.output().unwrap().stdout).unwrap();
        let names: Vec<&str> = listed
            .lines()
            .map(|line| line.trim_start_matches("./").trim_end_matches('/'))
            .filter(|name| !name.is_empty())
            .collect();
        assert_eq!(names.len(), 12, "{names:?}");
        for pair in names.windows(2) {
            let [one, other] = [pair[0].as_bytes(), pair[1].as_bytes()];
            assert_eq!(in_order(one, other), Ordering::Less, "{pair:?}");
        }
    }

    #[test]
    fn it_is_never_far_ahead_and_ends_when_it_is_told() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..AHEAD_FILES + 10 {
            std::fs::write(dir.path().join(format!("{number:06}")), "x").unwrap();
        }
        let position = Arc::new(Position::default());
        let (tree, shared) = (dir.path().to_owned(), Arc::clone(&position));
        let thread =
            std::thread::spawn(move || read_ahead(&tree, &[PathBuf::new()], shared.as_ref()));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!thread.is_finished(), "all of it at once");
        position.reach(b"./000020");
        thread.join().unwrap();
        // And when it has no room until then.
        let (tree, shared) = (dir.path().to_owned(), Arc::new(Position::default()));
        let ending = EndOnDrop(Arc::clone(&shared));
        let thread = std::thread::spawn(move || read_ahead(&tree, &[PathBuf::new()], &shared));
        drop(ending);
        thread.join().unwrap();
    }

    #[test]
    fn a_volume_within_the_tree_waits_for_its_turn() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("srv")).unwrap();
        std::fs::write(dir.path().join("srv/file"), "x").unwrap();
        let position = Arc::new(Position::default());
        let (tree, shared) = (dir.path().to_owned(), Arc::clone(&position));
        let walks = [PathBuf::from("srv")];
        let thread = std::thread::spawn(move || read_ahead(&tree, &walks, &shared));
        position.reach(b"./srv/");
        position.reach(b"./usr/a");
        std::thread::sleep(Duration::from_millis(100));
        assert!(!thread.is_finished(), "before tar was there");
        position.reach(b"./srv/a");
        thread.join().unwrap();
    }
}
