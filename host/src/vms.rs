// SPDX-License-Identifier: MIT OR Apache-2.0
//! What VMs are doing.

use serde::Serialize;
use vzdump_core::vm::runner::{self, RunnerError, VmStatus};

use crate::{Host, HostError, chain};

/// A VM in the list of all.
#[derive(Debug, Clone, Serialize)]
pub struct VmState {
    /// What it is doing; with a problem, as far as that could be found out.
    #[serde(flatten)]
    pub status: VmStatus,
    /// Why not all of it is known.
    pub problem: Option<String>,
}

impl From<VmStatus> for VmState {
    fn from(status: VmStatus) -> Self {
        Self { status, problem: None }
    }
}

impl Host {
    /// Tells what a VM is doing.
    ///
    /// # Errors
    /// [`HostError::Runner`].
    pub async fn vm_status(&self, id: u32) -> Result<VmStatus, HostError> {
        Ok(runner::status(&self.layout, id).await?)
    }

    /// Tells what all VMs are doing. What is wrong with one of them is a problem in its entry.
    ///
    /// # Errors
    /// [`HostError::Config`] when it cannot be found out which VMs there are.
    pub async fn vm_list(&self) -> Result<Vec<VmState>, HostError> {
        let mut all = Vec::new();
        for id in runner::list_ids(&self.layout)? {
            match runner::status(&self.layout, id).await {
                Ok(status) => all.push(status.into()),
                // Removed since the numbers were listed.
                Err(RunnerError::NoConfig { .. }) => {}
                Err(error) => all.push(self.unknown_state(id, &error)),
            }
        }
        Ok(all)
    }

    fn unknown_state(&self, id: u32, error: &RunnerError) -> VmState {
        // Its QEMU is found without its configuration; if that is what failed, the problem says so.
        let process = runner::find_process(&self.layout, id).ok().flatten();
        let status = VmStatus {
            id,
            name: None,
            running: process.is_some(),
            process,
            qmp_status: None,
            qemu_version: None,
        };
        VmState { status, problem: Some(chain(error)) }
    }
}
