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
