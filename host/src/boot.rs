// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests whether archives boot, and remembers what came of it.
//!
//! The results are kept by the host, whatever the provider can, see [`crate::results`].

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use vzdump_core::restore::{BootOptions, BootReport, boot_archive};

use crate::{CancellationToken, Host, HostError, TaskSink};

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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Booted {
    /// When, in seconds since the epoch.
    pub time_s: i64,
    /// From the start until the guest was ready, in milliseconds; none if it was not.
    pub ready_ms: Option<u64>,
    /// A picture of its display then, if it has one.
    #[serde(default)]
    pub screenshot: Option<PathBuf>,
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
            let archive = self.resolve_archive(text).await?;
            // Before anything is begun, also for the last one.
            let provider = self.providers.get_for_task(&archive.storage, cancel).await?;
            archives.push((archive, provider));
        }
        let ctx = self.context()?;
        let mut reports = Vec::new();
        for (archive, provider) in archives {
            let volid = archive.to_string();
            let options = BootOptions {
                timeout: request.timeout,
                console: request.console.clone(),
                allow_raw_config: request.allow_raw_config,
                screenshot: Some(self.picture_path(&volid)),
            };
            let name = archive.name.as_str();
            let test = boot_archive(&ctx, provider.as_ref(), name, &options, sink, cancel);
            let report = BootReport { archive: volid.clone(), ..Box::pin(test).await };
            if !report.is_untested {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let booted = Booted {
                    time_s: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
                    ready_ms: report.ready_ms,
                    screenshot: report.screenshot.clone(),
                };
                self.keep([(volid, booted)]).await?;
            }
            reports.push(report);
        }
        Ok(reports)
    }

    /// Where the picture of an archive's guest goes: beside the logs of tasks.
    fn picture_path(&self, volid: &str) -> PathBuf {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
        let name: String = volid.chars().map(plain).collect();
        self.layout.log_dir().join(format!("boot-{name}.png"))
    }
}
