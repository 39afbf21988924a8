// SPDX-License-Identifier: MIT OR Apache-2.0
//! Looks for what is missing or left over, and cleans up after dead tasks.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use provider_api::Call;
use serde::Serialize;
use vzdump_core::journal::recover::{Recovered, recover_all};
use vzdump_core::journal::{self, JournalError};

use crate::{CancellationToken, Host, HostError, TaskSink, chain, size};

/// A storage that does not tell its space in this time does not work.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// What.
    pub name: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What was found.
    pub found: String,
}

/// The journal of a task that has not ended.
#[derive(Debug, Clone, Serialize)]
pub struct Pending {
    /// The journal.
    pub journal: PathBuf,
    /// The guest, if the journal can be read.
    pub guest_id: Option<u32>,
    /// Whether the task is still at work; if not, `doctor --fix` cleans up after it.
    pub alive: bool,
    /// Why the journal cannot be read.
    pub problem: Option<String>,
}

/// What was found, and what was done about it.
#[derive(Debug, Clone, Serialize)]
pub struct DoctorReport {
    /// Everything that was looked at.
    pub checks: Vec<Check>,
    /// Tasks that have not ended, before anything was done.
    pub pending: Vec<Pending>,
    /// What was cleaned up, if that was asked for.
    pub recovered: Option<Recovered>,
}

impl DoctorReport {
    /// Whether nothing is missing and nothing is left over.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        let clean = match &self.recovered {
            Some(recovered) => recovered.left.is_empty(),
            None => self.pending.iter().all(|pending| pending.alive),
        };
        clean && self.checks.iter().all(|check| check.ok)
    }
}

impl Host {
    /// Checks programs and storages and lists unfinished tasks; with `fix`, cleans up after those
    /// whose process is dead.
    ///
    /// # Errors
    /// [`HostError::Journal`] when the journals cannot be listed.
    pub async fn doctor(&self, fix: bool, sink: &dyn TaskSink) -> Result<DoctorReport, HostError> {
        let mut checks = self.check_tools();
        checks.extend(self.check_storages().await);
        let paths = journal::list(&self.layout, None)?;
        let pending = paths.into_iter().filter_map(pending).collect();
        let recovered = match fix {
            true => Some(Box::pin(recover_all(&self.context()?, sink)).await?),
            false => None,
        };
        Ok(DoctorReport { checks, pending, recovered })
    }

    fn check_tools(&self) -> Vec<Check> {
        let tools = &self.tools;
        [
            ("qemu-system-x86_64", tools.qemu_system()),
            ("qemu-img", tools.qemu_img()),
            ("qemu-nbd", tools.qemu_nbd()),
        ]
        .into_iter()
        .map(|(name, found)| {
            let ok = found.is_ok();
            let found = match found {
                Ok(path) => path.display().to_string(),
                Err(error) => error.to_string(),
            };
            Check { name: name.to_owned(), ok, found }
        })
        .collect()
    }

    async fn check_storages(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        for id in self.providers.backup_ids() {
            let found = match self.providers.get(&id) {
                Err(error) => Err(error),
                Ok(provider) => {
                    let call = Call {
                        cancel: CancellationToken::new(),
                        deadline: Instant::now().checked_add(STATUS_TIMEOUT),
                    };
                    match tokio::time::timeout(STATUS_TIMEOUT, provider.status(&call)).await {
                        Ok(Ok(status)) => Ok(format!(
                            "{} of {} used",
                            size(status.used_bytes),
                            size(status.total_bytes)
                        )),
                        Ok(Err(error)) => Err(chain(&error)),
                        Err(_) => Err("it does not answer".to_owned()),
                    }
                }
            };
            let ok = found.is_ok();
            let found = found.unwrap_or_else(|error| error);
            checks.push(Check { name: format!("storage {id}"), ok, found });
        }
        checks
    }
}

fn pending(path: PathBuf) -> Option<Pending> {
    match journal::read(&path) {
        Ok(record) => Some(Pending {
            journal: path,
            guest_id: Some(record.begin.guest_id),
            alive: record.begin.owner.is_alive(),
            problem: None,
        }),
        // Its task ended while we looked.
        Err(JournalError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            None
        }
        Err(error) => Some(Pending {
            journal: path,
            guest_id: None,
            alive: false,
            problem: Some(chain(&error)),
        }),
    }
}
