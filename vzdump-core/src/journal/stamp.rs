// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which process has begun a task, or belongs to one.

use std::{fs, io};

use serde::{Deserialize, Serialize};

use crate::vm::process::VmProcess;

/// A process that can be told from any other one, also after a reboot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStamp {
    /// Its number and start time.
    #[serde(flatten)]
    pub process: VmProcess,
    /// The boot it belongs to.
    pub boot_id: String,
}

impl ProcessStamp {
    /// This process.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn current() -> io::Result<Self> {
        let pid = i32::try_from(std::process::id()).map_err(io::Error::other)?;
        let process = VmProcess::of_pid(pid)?;
        Self::of(process.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?)
    }

    /// A process of this boot.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn of(process: VmProcess) -> io::Result<Self> {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        Ok(Self { process, boot_id })
    }

    /// Whether the host has not been started again since. What cannot be read counts as that.
    pub fn is_of_this_boot(&self) -> bool {
        Self::current().is_ok_and(|own| own.boot_id == self.boot_id)
    }

    /// Whether this very process still runs. One that cannot be asked for counts as running,
    /// because what belongs to it must then not be touched.
    pub fn is_alive(&self) -> bool {
        match VmProcess::of_pid(self.process.pid) {
            Ok(Some(now)) => now == self.process && Self::of(now).is_ok_and(|now| now == *self),
            Ok(None) => false,
            Err(_) => true,
        }
    }
}
