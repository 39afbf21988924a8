// SPDX-License-Identifier: MIT OR Apache-2.0
//! The directory provider keeps the contract.

use std::sync::Arc;

use provider_api::Provider;
use provider_directory::{ContainerFormat, DirectoryOptions, DirectoryProvider, ToolPaths};
use provider_kit::{Factory, KitOptions, NoObserver, check, factory};

use crate::{failed, shown};

fn directory(path: &std::path::Path) -> Factory {
    with_format(path, ContainerFormat::Tar)
}

fn with_format(path: &std::path::Path, format: ContainerFormat) -> Factory {
    let path = path.to_owned();
    factory(move || {
        let options = DirectoryOptions { path: path.clone(), tools: ToolPaths::default() };
        let provider: Arc<dyn Provider> =
            { Arc::new(DirectoryProvider::new(options).with_container_format(format)) };
        Ok(provider)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_directory_provider_passes() {
    let dir = tempfile::Builder::new().prefix("kit-dir").tempdir().unwrap();
    let storage = dir.path().join("storage");
    let options = KitOptions { data_dir: Some(storage.clone()), ..KitOptions::default() };
    let report = check(directory(&storage), options, &NoObserver, &Default::default()).await;
    println!("{}", shown(&report));
    assert_eq!(failed(&report), [""; 0], "{}", shown(&report));
    assert_eq!(report.left, [""; 0]);
    // Nothing of the kit stays.
    let call = provider_api::Call::default();
    let provider = directory(&storage)().await.unwrap();
    assert_eq!(provider.list(&call).await.unwrap().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_directory_provider_passes_with_containers_as_trees() {
    let dir = tempfile::Builder::new().prefix("kit-dir").tempdir().unwrap();
    let storage = dir.path().join("storage");
    let made = with_format(&storage, ContainerFormat::Tree);
    let all = provider_kit::check_names();
    let names = all.into_iter().map(|(name, _)| name.to_owned());
    let only: Vec<_> = names.filter(|name| name.starts_with("container")).collect();
    assert!(only.len() > 3, "{only:?}");
    let count = only.len();
    let options = KitOptions { data_dir: Some(storage.clone()), only, ..KitOptions::default() };
    let report = check(made, options, &NoObserver, &Default::default()).await;
    assert_eq!(failed(&report), [""; 0], "{}", shown(&report));
    let is_passed = |check: &&provider_kit::CheckResult| {
        matches!(check.outcome, provider_kit::Outcome::Passed { .. })
    };
    assert_eq!(report.checks.iter().filter(is_passed).count(), count, "{}", shown(&report));
    assert_eq!(report.left, [""; 0]);
}
