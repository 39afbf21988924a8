// SPDX-License-Identifier: MIT OR Apache-2.0
//! The removal of a subvolume with those that are within it, as systemd makes them in a container by itself: the
//! kernel removes none that has others.
//!
//! What is within it is found and removed by number, never by a path, which somebody may have mounted something on.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::Command;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

use super::{BTRFS, btrfs, btrfs_says};
use crate::storage::StorageError;

/// The most that are removed with one subvolume.
const NESTED_MAX: usize = 10_000;
/// What the program says of a subvolume with others in it.
const NOT_EMPTY: &str = "not empty";
/// What it says of one that is in a subvolume which cannot be written to.
const READ_ONLY: &str = "Read-only file system";

/// Removes a subvolume with all that is in it. Returns when the removal is durable.
pub(super) fn delete_whole(path: &Path) -> Result<(), StorageError> {
    match delete(path) {
        Err(StorageError::Btrfs { message, .. }) if message.contains(NOT_EMPTY) => {
            delete_nested(path)?;
            delete(path)
        }
        other => other,
    }
}

fn delete(path: &Path) -> Result<(), StorageError> {
    let mut command = Command::new(BTRFS);
    command.args(["subvolume", "delete", "--commit-after", "--"]).arg(path);
    btrfs(command, "subvolume delete", path)
}

fn delete_nested(path: &Path) -> Result<(), StorageError> {
    let own = own_number(path)?;
    let mut command = Command::new(BTRFS);
    command.args(["subvolume", "list", "--"]).arg(path);
    let nested = below(own, &btrfs_says(command, "subvolume list", path)?);
    if nested.len() > NESTED_MAX {
        return Err(StorageError::Btrfs {
            doing: "subvolume delete",
            path: path.to_owned(),
            message: format!(
                "{} subvolumes are within it: remove them by `btrfs subvolume delete`",
                nested.len()
            ),
        });
    }
    let around = place_of(path, own)?;
    for Nested { number, parent } in nested {
        // The list is text with names in it, which may look like other lines.
        if place_of(path, number).is_ok_and(|place| !is_within(&place, &around)) {
            continue;
        }
        match delete_number(path, number) {
            Err(StorageError::Btrfs { message, .. }) if message.contains(READ_ONLY) => {
                make_writable(path, own, parent)?;
                delete_number(path, number)?;
            }
            other => other?,
        }
    }
    Ok(())
}

fn delete_number(path: &Path, number: u64) -> Result<(), StorageError> {
    let mut command = Command::new(BTRFS);
    command.args(["subvolume", "delete", "--subvolid", &number.to_string()]).arg(path);
    btrfs(command, "subvolume delete --subvolid", path)
}

fn own_number(path: &Path) -> Result<u64, StorageError> {
    let mut command = Command::new(BTRFS);
    command.args(["inspect-internal", "rootid"]).arg(path);
    let said = btrfs_says(command, "inspect-internal rootid", path)?;
    said.trim().parse().map_err(|_| StorageError::Btrfs {
        doing: "inspect-internal rootid",
        path: path.to_owned(),
        message: format!("'{said}' is no number"),
    })
}

/// Where a subvolume is on the file system that `path` is on.
fn place_of(path: &Path, number: u64) -> Result<String, StorageError> {
    let mut command = Command::new(BTRFS);
    command.args(["inspect-internal", "subvolid-resolve", &number.to_string()]).arg(path);
    btrfs_says(command, "inspect-internal subvolid-resolve", path)
}

/// Whether a place is below another.
fn is_within(place: &str, around: &str) -> bool {
    Path::new(place).strip_prefix(around).is_ok_and(|below| below.components().next().is_some())
}

/// Makes a subvolume writable that is the one at `path`, of this number, or is within it.
fn make_writable(path: &Path, own: u64, number: u64) -> Result<(), StorageError> {
    let (whole, around) = (place_of(path, number)?, place_of(path, own)?);
    let fault =
        |source: io::Error| StorageError::Io { what: "look at", path: path.to_owned(), source };
    let below = Path::new(&whole)
        .strip_prefix(&around)
        .map_err(|error| fault(io::Error::other(error.to_string())))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(|e| fault(e.into()))?;
    // Not through a link, nor to what is mounted in it.
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    let found = openat2(&top, below, flags, Mode::empty(), how).map_err(|e| fault(e.into()))?;
    let found_path = format!("/proc/{}/fd/{}", std::process::id(), found.as_raw_fd());
    let mut command = Command::new(BTRFS);
    // By force, because one that was received loses its mark as such.
    command.args(["property", "set", "-f", "-t", "subvol", &found_path, "ro", "false"]);
    btrfs(command, "property set", path)
}

/// A subvolume and the one it is directly in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Nested {
    number: u64,
    parent: u64,
}

/// Those within a subvolume, each before the one it is in. Of lines such as
/// `ID 259 gen 12 top level 257 path srv/a`.
fn below(own: u64, list: &str) -> Vec<Nested> {
    let mut children: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for line in list.lines() {
        let words: Vec<&str> = line.splitn(8, ' ').collect();
        if let ["ID", number, "gen", _, "top", "level", parent, ..] = words[..]
            && let (Ok(number), Ok(parent)) = (number.parse(), parent.parse())
        {
            children.entry(parent).or_default().push(number);
        }
    }
    let mut found = Vec::new();
    let (mut seen, mut queue) = (BTreeSet::from([own]), vec![own]);
    while let Some(parent) = queue.pop() {
        for &number in children.get(&parent).into_iter().flatten() {
            if seen.insert(number) {
                found.push(Nested { number, parent });
                queue.push(number);
            }
        }
    }
    // Each was found after the one it is in.
    found.reverse();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_below_another_one() {
        assert!(is_within("images/200/S/srv/a", "images/200/S"));
        for other in ["images/200/S", "images/200/S2/srv", "images/201/S/srv", "images"] {
            assert!(!is_within(other, "images/200/S"), "{other}");
        }
    }

    #[test]
    fn only_what_is_within_is_found_the_deepest_first() {
        let list = "ID 256 gen 7 top level 5 path images/200/S\n\
            ID 257 gen 7 top level 256 path srv/a b path x\n\
            ID 258 gen 7 top level 257 path srv/a b/S\n\
            ID 300 gen 7 top level 5 path images/201/S\n\
            ID 301 gen 7 top level 300 path images/201/S/srv\n\
            ID 260 gen 7 top level 256 path d/x\n";
        let numbers: Vec<u64> = below(256, list).iter().map(|nested| nested.number).collect();
        let at = |number| numbers.iter().position(|one| *one == number).unwrap();
        assert_eq!(numbers.len(), 3, "{numbers:?}");
        assert!(at(258) < at(257) && at(260) < 3);
        assert!(below(258, list).is_empty());
        // Nonsense does not go on for ever.
        assert_eq!(
            below(1, "ID 1 gen 1 top level 2 path a\nID 2 gen 1 top level 1 path b").len(),
            1
        );
    }
}
