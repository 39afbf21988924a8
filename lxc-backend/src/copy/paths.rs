// SPDX-License-Identifier: MIT OR Apache-2.0
//! The directories of a pass, by their numbers: each has its name and the number of the one around it, because whole
//! paths of a container that wants it so would fill the memory.

use std::ffi::{CStr, CString, OsStr};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use super::{Control, Fault, deep};

/// About what one costs beside its name: its entry here, and the job that walks it.
const ENTRY_BYTES: usize = 128;

/// A directory below the root of the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dir(u32);

impl Dir {
    pub(super) const ROOT: Self = Self(0);
}

#[derive(Debug)]
struct Entry {
    around: Dir,
    name: CString,
    /// Of the whole path.
    path_bytes: usize,
}

/// All of them but the root.
#[derive(Debug, Default)]
pub(super) struct Paths(Mutex<Vec<Entry>>);

impl Paths {
    /// One more, with this name in that one.
    pub(super) fn add(&self, around: Dir, name: &CStr, control: &Control) -> Result<Dir, Fault> {
        let name = name.to_owned();
        control.keep(ENTRY_BYTES + name.as_bytes().len())?;
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = entry(&entries, around).map_or(0, |entry| entry.path_bytes + 1);
        let path_bytes = before + name.as_bytes().len();
        if path_bytes > deep::PATH_BYTES_MAX {
            let text = format!("its path is longer than {} bytes", deep::PATH_BYTES_MAX);
            return Err(Fault::Source(std::io::Error::other(text)));
        }
        entries.push(Entry { around, name, path_bytes });
        u32::try_from(entries.len()).map(Dir).map_err(|_| Fault::TooMany)
    }

    /// The path below the root.
    pub(super) fn path(&self, dir: Dir) -> PathBuf {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut names = Vec::new();
        let mut at = dir;
        while let Some(entry) = entry(&entries, at) {
            names.push(entry.name.as_bytes());
            at = entry.around;
        }
        names.reverse();
        OsStr::from_bytes(&names.join(&b'/')).into()
    }

    /// The one around it and its name; none of the root.
    pub(super) fn place(&self, dir: Dir) -> Option<(Dir, CString)> {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entry(&entries, dir).map(|entry| (entry.around, entry.name.clone()))
    }

    /// The path of something in it.
    pub(super) fn path_of(&self, dir: Dir, name: &CStr) -> PathBuf {
        deep::join(&self.path(dir), name)
    }
}

fn entry(entries: &[Entry], dir: Dir) -> Option<&Entry> {
    entries.get(usize::try_from(dir.0.checked_sub(1)?).ok()?)
}
