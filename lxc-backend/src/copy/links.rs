// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files with several names: in the copy they are one file, too.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, linkat, unlinkat};

use super::entry::Place;
use super::paths::{Dir, Paths};
use super::{Fault, deep};

/// About what one name costs beside its bytes.
pub(super) const LINK_BYTES: usize = 112;

/// A name in the copy.
#[derive(Debug, Clone)]
pub(super) struct Name {
    pub(super) dir: Dir,
    pub(super) name: CString,
}

/// The copy of a file with several names, in this pass.
#[derive(Debug)]
pub(super) struct Link {
    /// Its names that this pass has made; or one that it has found.
    names: Vec<Name>,
    /// Whether this pass has made it.
    pub(super) is_new: bool,
    /// Whether its content could not be read.
    pub(super) is_broken: bool,
}

/// All of them, by the numbers of the files in the container.
#[derive(Debug, Default)]
pub(super) struct Links(Mutex<HashMap<u64, Link>>);

impl Links {
    pub(super) fn lock(&self) -> MutexGuard<'_, HashMap<u64, Link>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes all names that a file has got whose content could not be read; tells them.
    pub(super) fn break_up(
        &self,
        ino: u64,
        target: &OwnedFd,
        paths: &Paths,
    ) -> Result<Vec<Name>, Fault> {
        let mut links = self.lock();
        let Some(link) = links.get_mut(&ino) else { return Ok(Vec::new()) };
        link.is_broken = true;
        let names = std::mem::take(&mut link.names);
        for name in &names {
            let removed = match deep::open_directory(target, &paths.path(name.dir)) {
                Ok(dir) => unlinkat(&dir, name.name.as_c_str(), AtFlags::empty()),
                Err(error) => return Err(Fault::writing(&error)),
            };
            match removed {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(errno) => return Err(Fault::target("remove an incomplete file", errno)),
            }
        }
        Ok(names)
    }
}

impl Link {
    pub(super) fn new(dir: Dir, name: &CStr, is_new: bool) -> Self {
        let name = Name { dir, name: name.to_owned() };
        Self { names: vec![name], is_new, is_broken: false }
    }

    /// Gives the copy one more name.
    pub(super) fn add(
        &mut self,
        target: &OwnedFd,
        paths: &Paths,
        (dir, place): (Dir, Place<'_>),
    ) -> Result<(), Fault> {
        let Some(first) = self.names.first() else { return Err(Fault::Vanished) };
        let made = if first.dir == dir {
            linkat(place.target, first.name.as_c_str(), place.target, place.name, AtFlags::empty())
        } else {
            let around = deep::open_directory(target, &paths.path(first.dir))
                .map_err(|error| Fault::writing(&error))?;
            linkat(&around, first.name.as_c_str(), place.target, place.name, AtFlags::empty())
        };
        made.map_err(|errno| Fault::making("make a hard link", errno))?;
        if self.is_new {
            self.names.push(Name { dir, name: place.name.to_owned() });
        }
        Ok(())
    }
}
