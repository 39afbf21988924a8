// SPDX-License-Identifier: MIT OR Apache-2.0
//! Containers: making, starting and stopping them.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use lxc_backend::create::{self, CtCreateOptions, CtCreated};
use lxc_backend::runtime::{self, CtStatus, Started, Stopped};

use crate::{CancellationToken, Host, HostError, TaskSink};

/// Runs a subcommand that this program starts itself with, for work in namespaces of its own; none if
/// the arguments name none. To be called before the process has a second thread.
#[must_use]
pub fn run_hidden(args: &[OsString]) -> Option<ExitCode> {
    let (name, rest) = args.get(1..)?.split_first()?;
    match name.to_str()? {
        lxc_backend::SANDBOX_SUBCOMMAND => Some(lxc_backend::run_sandbox(rest)),
        lxc_backend::GUARD_SUBCOMMAND => Some(lxc_backend::run_guard(rest)),
        _ => None,
    }
}

impl Host {
    /// Makes a container. Should be awaited to its end; cancel it by the token.
    ///
    /// # Errors
    /// [`HostError::Container`]; nothing is left behind then.
    pub async fn ct_create(
        &self,
        id: u32,
        options: &CtCreateOptions,
        sink: &dyn TaskSink,
        cancel: &CancellationToken,
    ) -> Result<CtCreated, HostError> {
        Ok(Box::pin(create::create(&self.context()?, id, options, sink, cancel)).await?)
    }

    /// Starts a container.
    ///
    /// # Errors
    /// [`HostError::Container`]; nothing is left running then.
    pub async fn ct_start(&self, id: u32) -> Result<Started, HostError> {
        Ok(runtime::start(&self.layout, &self.storages, id).await?)
    }

    /// Stops a container: asks it to shut down, and ends it when the time is over.
    ///
    /// # Errors
    /// [`HostError::Container`].
    pub async fn ct_stop(&self, id: u32, wait: Duration) -> Result<Stopped, HostError> {
        Ok(runtime::stop(&self.layout, id, wait).await?)
    }

    /// Tells what a container is doing, or what all of them are.
    ///
    /// # Errors
    /// [`HostError::Container`].
    pub async fn ct_status(&self, id: Option<u32>) -> Result<Vec<CtStatus>, HostError> {
        let layout = self.layout.clone();
        let asked = vzdump_core::blocking::run(move || {
            Ok((|| {
                let ids = match id {
                    Some(id) => vec![id],
                    None => runtime::list_ids(&layout)?,
                };
                ids.into_iter().map(|id| runtime::status(&layout, id)).collect()
            })())
        });
        let asked: Result<_, lxc_backend::CtError> =
            asked.await.map_err(|error| HostError::Settings(error.to_string()))?;
        Ok(asked?)
    }
}
