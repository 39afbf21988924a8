// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lets tests that boot a guest run one after the other, in threads as well as in processes.

use std::fs::{File, TryLockError};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::Stop;
use crate::qemu::workspace;

/// The longest test before us may take this long.
const TURN_WITHIN: Duration = Duration::from_secs(1200);

/// The right to use the processors; given back when dropped.
#[derive(Debug)]
pub struct Turn {
    _lock: File,
}

impl Turn {
    /// Waits until no other test holds it. An emulated guest needs a whole processor: several at
    /// once only make every one of them miss its time limits.
    ///
    /// # Errors
    /// The lock file cannot be used, or others take too long.
    pub fn wait(stop: &Stop) -> Result<Self> {
        let path = workspace().join("target/system-tests.lock");
        let lock =
            File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        stop.wait_for("end of the other system tests", TURN_WITHIN, || match lock.try_lock() {
            Ok(()) => Ok(Some(())),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).context("cannot lock"),
        })?;
        Ok(Self { _lock: lock })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A binary all of whose tests take turns, by its file's or folder's name.
    fn takes_turns(path: &std::path::Path) -> bool {
        let source = |path: &std::path::Path| {
            path.extension().is_some_and(|extension| extension == "rs")
                && fs::read_to_string(path).unwrap().contains("Turn::wait(")
        };
        let folder = path.is_dir() && path.join("site.rs").exists();
        if folder { source(&path.join("site.rs")) } else { source(path) }
    }

    /// Else a test that waits for its turn takes the place of one that could run.
    #[test]
    fn the_runner_knows_who_takes_turns() {
        let config = fs::read_to_string(workspace().join(".config/nextest.toml")).unwrap();
        let folder = workspace().join("system-tests/tests");
        let mut names = Vec::new();
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if takes_turns(&path) {
                names.push(path.file_stem().unwrap().to_str().unwrap().to_owned());
            }
        }
        names.sort();
        let list = config.split_once("binary(/^(").unwrap().1.split_once(")$/)").unwrap().0;
        assert_eq!(list.replace("\\\n", ""), names.join("|"));
    }
}
