// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests whether archives boot, and remembers what came of it.
//!
//! The results are kept by the host, whatever the provider can: in one file of the state directory, by
//! volume id, the newest ones.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use vzdump_core::config::{read_text, write_atomically};
use vzdump_core::lock::FileLock;
use vzdump_core::restore::{BootOptions, BootReport, boot_archive};

use crate::{CancellationToken, Host, HostError, TaskSink};

/// Results that are kept.
const RESULTS_MAX: usize = 10_000;
const LOCK_WITHIN: Duration = Duration::from_secs(10);

/// Which archives to boot, and how.
#[derive(Debug, Clone)]
pub struct BootRequest {
    /// The archives: volume ids, or names that only one storage has.
    pub archives: Vec<String>,
    /// How long each guest may take.
    pub timeout: Duration,
    /// Text on the console that means it is ready; by default its agent must answer.
    pub console: Option<String>,
    /// Keep lines of the configurations that run code or open files of this host.
    pub allow_raw_config: bool,
}

/// What came of the last test of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Booted {
    /// When, in seconds since the epoch.
    pub time_s: i64,
    /// From the start until the guest was ready, in milliseconds; none if it was not.
    pub ready_ms: Option<u64>,
}

impl Host {
    /// Starts each archive as a throw-away VM and waits for its guest. What goes wrong with an archive is in
    /// its report. Must be awaited to its end; cancel it by the token.
    ///
    /// # Errors
    /// [`HostError::Archive`], [`HostError::Storage`] before anything is begun; [`HostError::Config`]
    /// when a result cannot be kept.
    pub async fn boot(
        &self,
        request: &BootRequest,
        sink: &dyn TaskSink,
        cancel: &CancellationToken,
    ) -> Result<Vec<BootReport>, HostError> {
        let mut archives = Vec::new();
        for text in &request.archives {
            archives.push(self.resolve_archive(text).await?);
        }
        let ctx = self.context()?;
        let mut reports = Vec::new();
        for archive in archives {
            let provider =
                self.providers.get(&archive.storage).await.map_err(HostError::Storage)?;
            let volid = archive.to_string();
            let options = BootOptions {
                timeout: request.timeout,
                console: request.console.clone(),
                allow_raw_config: request.allow_raw_config,
            };
            let name = archive.name.as_str();
            let test = boot_archive(&ctx, provider.as_ref(), name, &options, sink, cancel);
            let report = BootReport { archive: volid.clone(), ..Box::pin(test).await };
            if !report.is_untested {
                self.keep(volid, report.ready_ms).await?;
            }
            reports.push(report);
        }
        Ok(reports)
    }

    fn results_path(&self) -> PathBuf {
        self.layout.state().join("boot-results.json")
    }

    /// The results by volume id. What cannot be read is as if it had not been tested.
    pub(crate) fn boot_results(&self) -> BTreeMap<String, Booted> {
        let text = read_text(&self.results_path()).ok().flatten();
        text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    }

    async fn keep(&self, volid: String, ready_ms: Option<u64>) -> Result<(), HostError> {
        let lock = self.layout.lock_dir().join("boot-results.lock");
        let _held = FileLock::acquire(&lock, "The list of boot tests", LOCK_WITHIN).await?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut results = self.boot_results();
        results.insert(volid, Booted { time_s: i64::try_from(now).unwrap_or(i64::MAX), ready_ms });
        while results.len() > RESULTS_MAX {
            let oldest = results.iter().min_by_key(|(_, booted)| booted.time_s);
            let Some(oldest) = oldest.map(|(volid, _)| volid.clone()) else { break };
            results.remove(&oldest);
        }
        let text = serde_json::to_vec_pretty(&results).unwrap_or_default();
        Ok(write_atomically(&self.results_path(), &text, false)?)
    }
}
