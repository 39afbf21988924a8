// SPDX-License-Identifier: MIT OR Apache-2.0
//! Looks for what is missing or left over, and cleans up after dead tasks.

use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use provider_api::Call;
use serde::Serialize;
use vzdump_core::journal;
use vzdump_core::journal::recover::{Recovered, recover_all};
use vzdump_core::vm::leftovers::{self, Swept};

use crate::{CancellationToken, Host, HostError, TaskSink, chain, size};

/// A storage that does not tell its space in this time does not work.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);
/// Removing large leftovers takes its time.
const ACTIVATE_TIMEOUT: Duration = Duration::from_secs(600);

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
    /// Fleecing images that no task knew any more and what became of them, if that was asked for.
    pub swept: Option<Swept>,
}

impl DoctorReport {
    /// Whether nothing is missing and nothing is left over.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        let clean = match &self.recovered {
            Some(recovered) => recovered.left.is_empty(),
            None => self.pending.iter().all(|pending| pending.alive),
        };
        let swept = self.swept.as_ref().is_none_or(|swept| swept.problems.is_empty());
        clean && swept && self.checks.iter().all(|check| check.ok)
    }
}

impl Host {
    /// Checks programs and storages and lists unfinished tasks; with `fix`, cleans up after those
    /// whose process is dead.
    ///
    /// # Errors
    /// [`HostError::Journal`] when the journals cannot be listed.
    pub async fn doctor(&self, fix: bool, sink: &dyn TaskSink) -> Result<DoctorReport, HostError> {
        let paths = journal::list(&self.layout, None)?;
        let pending = paths.into_iter().filter_map(pending).collect();
        let (mut recovered, mut swept) = (None, None);
        let mut checks = self.check_tools();
        if fix {
            let ctx = self.context()?;
            recovered = Some(Box::pin(recover_all(&ctx, sink)).await?);
            swept = Some(Box::pin(leftovers::remove_all(&ctx, sink)).await);
            Box::pin(vzdump_core::restore::sweep_boots(&ctx)).await;
            let left = Box::pin(vzdump_core::vm::tpm::sweep(&self.layout)).await;
            let check = |found| Check { name: "end left TPMs".to_owned(), ok: false, found };
            checks.extend(left.into_iter().map(check));
            // Only now, because what is left in a storage tells the recovery what had become of it.
            checks.extend(self.activate_storages().await);
        }
        checks.extend(self.check_storages().await);
        checks.push(self.check_fleecing().await?);
        Ok(DoctorReport { checks, pending, recovered, swept })
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

    /// Has every provider remove what dead tasks left in its storage; returns what failed.
    async fn activate_storages(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        for id in self.providers.backup_ids() {
            let Ok(provider) = self.providers.get(&id).await else { continue };
            let activate =
                within(ACTIVATE_TIMEOUT, |call| async move { provider.activate(&call).await });
            if let Err(found) = activate.await {
                checks.push(Check { name: format!("clean up storage {id}"), ok: false, found });
            }
        }
        checks
    }

    /// Whether images are left that no task knows.
    async fn check_fleecing(&self) -> Result<Check, HostError> {
        let left = Box::pin(leftovers::find(&self.context()?)).await;
        let (ok, found) = match left {
            Ok(left) if left.is_empty() => (true, "none is left over".to_owned()),
            Ok(left) => {
                let names: Vec<String> = left.iter().map(ToString::to_string).collect();
                (false, format!("left over: {}; `--fix` removes them", names.join(", ")))
            }
            Err(problem) => (false, problem),
        };
        Ok(Check { name: "fleecing images".to_owned(), ok, found })
    }

    async fn check_storages(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        for id in self.providers.backup_ids() {
            let found = match self.providers.get(&id).await {
                Err(error) => Err(error),
                Ok(provider) => {
                    within(STATUS_TIMEOUT, |call| async move { provider.status(&call).await })
                        .await
                        .map(|status| {
                            let (used, total) = (size(status.used_bytes), size(status.total_bytes));
                            format!("{used} of {total} used")
                        })
                }
            };
            let ok = found.is_ok();
            let found = found.unwrap_or_else(|error| error);
            checks.push(Check { name: format!("storage {id}"), ok, found });
        }
        checks
    }
}

/// One call of a provider that may not answer.
async fn within<T, F>(limit: Duration, work: impl FnOnce(Call) -> F) -> Result<T, String>
where
    F: Future<Output = provider_api::Result<T>>,
{
    let deadline = Instant::now().checked_add(limit);
    let call = Call { cancel: CancellationToken::new(), deadline };
    match tokio::time::timeout(limit, work(call)).await {
        Ok(result) => result.map_err(|error| chain(&error)),
        Err(_) => Err(format!("it does not answer within {} s", limit.as_secs())),
    }
}

fn pending(path: PathBuf) -> Option<Pending> {
    match journal::recover::read_if_there(&path) {
        Ok(None) => None,
        Ok(Some(record)) => Some(Pending {
            journal: path,
            guest_id: Some(record.begin.guest_id),
            alive: record.begin.owner.is_alive(),
            problem: None,
        }),
        Err(error) => Some(Pending {
            guest_id: journal::guest_in_name(&path),
            alive: false,
            problem: Some(chain(&error)),
            journal: path,
        }),
    }
}
