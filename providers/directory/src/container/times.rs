// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which times a file can have. Of others the kernel makes the nearest ones and says nothing, so they are looked for
//! before anything is made.

use std::path::Path;

use provider_api::{Error, Result};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, stat, utimensat};
use rustix::io::Errno;

/// Seconds and nanoseconds.
pub(super) type Time = (i64, u32);

/// One that every file system has, if it has nanoseconds.
const WITH_NANOS: Time = (1, 123_456_789);

/// The times that a file system has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    first_s: i64,
    last_s: i64,
    has_nanos: bool,
}

impl Times {
    /// Finds out what the file system of a new directory has, whose own time becomes the present one.
    pub(super) fn of(directory: &Path) -> Result<Self> {
        let failed = |errno: Errno| {
            Error::io(format!("Cannot set times of {}.", directory.display()), errno.into())
        };
        let becomes = |time| becomes(directory, time).map_err(failed);
        let times = Self {
            first_s: becomes((i64::MIN, 0))?.0,
            last_s: becomes((i64::MAX, 0))?.0,
            has_nanos: becomes(WITH_NANOS)? == WITH_NANOS,
        };
        set(directory, Timespec { tv_sec: 0, tv_nsec: UTIME_NOW }).map_err(failed)?;
        Ok(times)
    }

    /// Whether a file can have this time.
    pub(super) fn include(&self, (secs, nanos): Time) -> bool {
        let Self { first_s, last_s, has_nanos } = *self;
        // The first and the last second have no parts.
        let has_parts = has_nanos && secs > first_s && secs < last_s;
        has_parts || nanos == 0 && (first_s..=last_s).contains(&secs)
    }

    /// In words.
    pub(super) fn shown(&self) -> String {
        let parts = if self.has_nanos { "" } else { ", in whole seconds" };
        format!("from {} to {}{parts}", self.first_s, self.last_s)
    }
}

/// What becomes of a time that a directory is given.
fn becomes(directory: &Path, (secs, nanos): Time) -> rustix::io::Result<Time> {
    set(directory, Timespec { tv_sec: secs, tv_nsec: nanos.into() })?;
    let found = stat(directory)?;
    Ok((found.st_mtime, u32::try_from(found.st_mtime_nsec).unwrap_or(0)))
}

fn set(directory: &Path, time: Timespec) -> rustix::io::Result<()> {
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, directory, &times, AtFlags::SYMLINK_NOFOLLOW)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_makes_another_time_of_is_not_included() {
        let dir = tempfile::tempdir().unwrap();
        let times = Times::of(dir.path()).unwrap();
        let edges = [times.first_s, times.last_s];
        let near = edges.into_iter().flat_map(|edge| {
            [edge.checked_sub(1), Some(edge), edge.checked_add(1)].into_iter().flatten()
        });
        let others = [i64::MIN, -1, 0, 1 << 31, 1 << 34, i64::MAX];
        for secs in near.chain(others) {
            for nanos in [0, 1, 999_999_999] {
                let time = (secs, nanos);
                let is_kept = becomes(dir.path(), time).unwrap() == time;
                assert_eq!(times.include(time), is_kept, "{time:?} {times:?}");
            }
        }
    }
}
