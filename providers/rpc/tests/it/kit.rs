// SPDX-License-Identifier: MIT OR Apache-2.0
//! The examples under the conformance kit. Its disks are sparse files here, without a storage daemon, so
//! the checks that need disks that fail are left out; `vzdump provider check` runs those, too.

use std::sync::Arc;

use provider_api::{CancellationToken, Provider};
use provider_kit::{Factory, KitOptions, NoObserver, Outcome, check};
use provider_rpc::RpcProvider;

use crate::bench::Bench;

const CHECKS: [&str; 21] = [
    "describe",
    "activate",
    "status",
    "unknown",
    "full",
    "incremental",
    "fine-increment",
    "empty-increment",
    "sizes",
    "changed-disks",
    "abort",
    "crash",
    "commit-outcome",
    "concurrent",
    "notes",
    "protect",
    "remove",
    "remove-meanwhile",
    "container",
    "container-command",
    "container-exclude",
];

/// Runs the checks; returns how many passed.
async fn passed(bench: &Bench) -> usize {
    let options = bench.options.clone();
    let factory: Factory = Arc::new(move || {
        let options = options.clone();
        Box::pin(async move {
            let started = RpcProvider::start(options).await;
            started.map(|p| Arc::new(p) as Arc<dyn Provider>).map_err(|error| error.to_string())
        })
    });
    let only = CHECKS.map(str::to_owned).to_vec();
    let options = KitOptions { only, size_bytes: 1 << 20, ..KitOptions::default() };
    let report = check(factory, options, &NoObserver, &CancellationToken::new()).await;
    for check in &report.checks {
        println!("{:18} {:6} ms {:?}", check.name, check.elapsed_ms, check.outcome);
    }
    assert!(report.is_success(), "{report:#?}");
    let passed = |outcome: &Outcome| matches!(outcome, Outcome::Passed { .. });
    report.checks.iter().filter(|check| passed(&check.outcome)).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_in_python_conforms() {
    let bench = Bench::with_example("python/file-store.py");
    assert_eq!(passed(&bench).await, CHECKS.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_in_rust_conforms() {
    // Neither increments, nor notes, nor protection, nor containers.
    assert_eq!(passed(&Bench::in_rust()).await, CHECKS.len() - 8);
}
