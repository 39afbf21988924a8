// SPDX-License-Identifier: MIT OR Apache-2.0
//! Checks the provider of a storage with the conformance kit.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use provider_kit::{
    CheckResult, Factory, KitOptions, Observer, Outcome, Report, check_names, main_step_names,
};
use vzdump_core::job::Providers as _;
use vzdump_core::vm::runner;

use crate::real::{RealMaker, RealTrees};
use crate::{CancellationToken, Host, HostError, TaskSink, clean};

/// Opens the host anew, as another process would.
pub type OpenHost = Arc<dyn Fn() -> Result<Host, HostError> + Send + Sync>;

/// How to check a provider.
#[derive(Debug, Clone)]
pub struct KitRequest {
    /// The storage.
    pub storage: String,
    /// Only the checks with these names; all if it is empty.
    pub only: Vec<String>,
    /// Size of the disks in bytes; none for the usual one.
    pub size_bytes: Option<u64>,
    /// Length of the long chain; none for the usual one.
    pub chain_steps: Option<u32>,
    /// Number that makes the same disks again; none for a new one.
    pub seed: Option<u32>,
    /// Where the storage keeps its data; none for its property `path`.
    pub data_dir: Option<PathBuf>,
    /// Take disks of the patched QEMU in place of simulated ones, and make only the main steps.
    pub is_real: bool,
}

/// Checks the provider of a storage, with guests of its own that it makes up. Archives of others are left
/// alone. Must be awaited to its end; cancel it by the token.
///
/// # Errors
/// [`HostError::Storage`] for a storage that is none for backups, [`HostError::Settings`] for a check that
/// does not exist and for a QEMU that cannot be used; what the provider does wrong is in the report.
pub async fn check_provider(
    open: OpenHost,
    request: KitRequest,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> Result<Report, HostError> {
    let host = open()?;
    let storage = request.storage.clone();
    check_wanted(&request.only, request.is_real)?;
    // A storage that is not there is no fault of a provider.
    let provider = host.providers.get_for_task(&storage, cancel).await?;
    let can = provider.describe().capabilities;
    drop(provider);
    let mut options = KitOptions {
        only: request.only,
        seed: request.seed.unwrap_or_else(crate::random_seed).into(),
        used_guest_ids: runner::list_ids(&host.layout)?.into_iter().collect(),
        storage_daemon: host.tools.qemu_storage_daemon().ok().filter(|_| has_fuse()),
        data_dir: request.data_dir.or_else(|| host.data_dir(&storage)),
        ..KitOptions::default()
    };
    options.size_bytes = request.size_bytes.unwrap_or(options.size_bytes);
    options.chain_steps = request.chain_steps.unwrap_or(options.chain_steps);
    if request.is_real {
        if can.vm_nbd || can.vm_file {
            let maker = RealMaker::open(&host.tools, !can.vm_nbd).await?;
            options.machines = Some(Arc::new(maker));
        }
        let program = host.context()?.guard.program;
        options.trees = Some(Arc::new(RealTrees::new(program)));
    }
    drop(host);
    let factory: Factory = Arc::new(move || {
        let (open, storage) = (Arc::clone(&open), storage.clone());
        Box::pin(async move {
            let host = open().map_err(|error| crate::chain(&error))?;
            host.providers.provider(&storage).await
        })
    });
    Ok(provider_kit::check(factory, options, &Lines(sink), cancel).await)
}

/// Whether disks can be offered as files that fail where they must.
fn has_fuse() -> bool {
    Path::new("/dev/fuse").exists()
}

fn check_wanted(only: &[String], is_real: bool) -> Result<(), HostError> {
    let all: Vec<&str> = check_names().map(|(name, _)| name).collect();
    let names = if is_real { main_step_names().collect() } else { all.clone() };
    let Some(unknown) = only.iter().find(|name| !names.contains(&name.as_str())) else {
        return Ok(());
    };
    let why = if all.contains(&unknown.as_str()) {
        format!("The check '{unknown}' is not made with a real QEMU")
    } else {
        format!("There is no check '{}'", clean(unknown))
    };
    Err(HostError::Settings(format!("{why}; there are: {}.", names.join(", "))))
}

impl Host {
    /// Where a storage says that its data is.
    fn data_dir(&self, storage: &str) -> Option<PathBuf> {
        let section = self.storages.sections().iter().find(|section| section.id == storage)?;
        section.get("path").map(PathBuf::from).filter(|path: &PathBuf| Path::is_absolute(path))
    }
}

/// Tells of each check when it begins and when it fails.
struct Lines<'a>(&'a dyn TaskSink);

impl Observer for Lines<'_> {
    fn begins(&self, name: &str, number: usize, count: usize) {
        self.0.info(&format!("check {number} of {count}: {name}"));
    }

    fn ended(&self, result: &CheckResult) {
        if let Outcome::Failed { why, .. } = &result.outcome {
            self.0.error(&format!("check {} failed: {}", result.name, clean(why)));
        }
    }
}
