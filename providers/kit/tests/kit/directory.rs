// SPDX-License-Identifier: MIT OR Apache-2.0
//! The directory provider keeps the contract.

use std::sync::Arc;

use provider_api::Provider;
use provider_directory::{DirectoryOptions, DirectoryProvider, ToolPaths};
use provider_kit::{Factory, KitOptions, NoObserver, check, factory};

use crate::{failed, shown};

fn directory(path: &std::path::Path) -> Factory {
    let path = path.to_owned();
    factory(move || {
        let options = DirectoryOptions { path: path.clone(), tools: ToolPaths::default() };
        let provider: Arc<dyn Provider> = Arc::new(DirectoryProvider::new(options));
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
