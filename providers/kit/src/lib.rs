// SPDX-License-Identifier: MIT OR Apache-2.0
//! The conformance kit: proves that a backup provider keeps the contract of `provider-api`.
//!
//! ```no_run
//! # async fn example(provider: std::sync::Arc<dyn provider_api::Provider>) {
//! use provider_kit::{KitOptions, NoObserver, check};
//!
//! // Makes the provider as a fresh process would; here one object for brevity.
//! let factory = provider_kit::factory(move || Ok(provider.clone()));
//! let report = check(factory, KitOptions::default(), &NoObserver, &Default::default()).await;
//! assert!(report.is_success());
//! # }
//! ```
//!
//! It does what the host does, on disks of its own that it simulates:
//!
//! ```text
//! disk model ─► snapshot: EPERM where clean or released ─► NBD (or files) ─► provider
//!     │              trims and reads are noted, faults come when ordered       │
//!     └──── the truth of each generation ───────── compared with ──── restore ◄┘
//! ```
//!
//! No QEMU is needed. What a provider says that it cannot do is not held against it. A storage may hold
//! other archives: the kit uses guest numbers that none of them has, and removes only what it made.

#![forbid(unsafe_code)]

mod attributes;
mod bench;
mod checks;
mod container;
mod disk;
mod fault;
mod file;
mod machine;
mod place;
mod random;
mod report;
mod restore;
mod run;
mod snapshot;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use provider_api::{BoxFuture, Provider};

pub use container::{ShownTree, TreeMaker};
pub use machine::{Change, Machine, MachineMaker};
pub use report::{CheckResult, Counts, Grade, Outcome, Report};
pub use run::{check, check_names, main_step_names};

/// Makes a provider as a fresh process would: it must share no memory with earlier ones.
pub type Factory =
    Arc<dyn Fn() -> BoxFuture<'static, Result<Arc<dyn Provider>, String>> + Send + Sync>;

/// A [`Factory`] of something that makes providers at once.
pub fn factory(
    make: impl Fn() -> Result<Arc<dyn Provider>, String> + Send + Sync + 'static,
) -> Factory {
    Arc::new(move || Box::pin(std::future::ready(make())))
}

/// Smallest size of the disks.
pub const SIZE_BYTES_MIN: u64 = 1 << 20;
/// Largest size of the disks; all of them is kept in memory several times.
pub const SIZE_BYTES_MAX: u64 = 1 << 30;

/// How to check.
#[derive(Clone)]
pub struct KitOptions {
    /// Size of the larger disks, [`SIZE_BYTES_MIN`] to [`SIZE_BYTES_MAX`].
    pub size_bytes: u64,
    /// Makes the same disks and changes again.
    pub seed: u64,
    /// Length of the long chain of increments.
    pub chain_steps: u32,
    /// Guest numbers begin here; those in use are left out.
    pub first_guest_id: u32,
    /// Guest numbers that the host uses.
    pub used_guest_ids: BTreeSet<u32>,
    /// Where the storage keeps its data, to damage a file of the kit's own archives in it.
    pub data_dir: Option<PathBuf>,
    /// Only checks whose names are here; all if it is empty.
    pub only: Vec<String>,
    /// Every call of the provider gets a deadline so far away.
    pub call_limit: Duration,
    /// Makes real machines instead of simulated ones; only the main steps are checked then.
    pub machines: Option<Arc<dyn MachineMaker>>,
    /// Shows trees of containers as a host does; only the main steps are checked then.
    pub trees: Option<Arc<dyn TreeMaker>>,
    /// QEMU's storage daemon, to offer disks as files that fail where they must.
    pub storage_daemon: Option<PathBuf>,
}

impl Default for KitOptions {
    fn default() -> Self {
        Self {
            size_bytes: 4 << 20,
            seed: 1,
            chain_steps: 30,
            first_guest_id: 900_000_000,
            used_guest_ids: BTreeSet::new(),
            data_dir: None,
            only: Vec::new(),
            call_limit: Duration::from_secs(60),
            machines: None,
            trees: None,
            storage_daemon: None,
        }
    }
}

impl KitOptions {
    /// Whether what is backed up is not simulated.
    pub(crate) fn is_real(&self) -> bool {
        self.machines.is_some() || self.trees.is_some()
    }
}

impl std::fmt::Debug for KitOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KitOptions")
            .field("size_bytes", &self.size_bytes)
            .field("seed", &self.seed)
            .field("only", &self.only)
            .finish_non_exhaustive()
    }
}

/// Is told how far the kit is.
pub trait Observer: Send + Sync {
    /// A check begins: its name, its number from 1, and how many there are.
    fn begins(&self, name: &str, number: usize, count: usize);
    /// It ended.
    fn ended(&self, result: &CheckResult);
}

/// An [`Observer`] that does not care.
#[derive(Debug, Clone, Copy)]
pub struct NoObserver;

impl Observer for NoObserver {
    fn begins(&self, _name: &str, _number: usize, _count: usize) {}
    fn ended(&self, _result: &CheckResult) {}
}
