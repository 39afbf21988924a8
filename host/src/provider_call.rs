// SPDX-License-Identifier: MIT OR Apache-2.0
//! Calls of a provider that copy nothing: bounded, whatever the storage does.

use std::time::{Duration, Instant};

use provider_api::Call;

use crate::{CancellationToken, HostError};

/// Reading or changing what is known of archives must not take longer.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The limits that the provider is told.
pub(crate) fn call() -> Call {
    Call { cancel: CancellationToken::new(), deadline: Instant::now().checked_add(TIMEOUT) }
}

/// For a provider that does not obey its deadline.
pub(crate) async fn in_time<T>(
    work: impl Future<Output = provider_api::Result<T>>,
) -> provider_api::Result<T> {
    match tokio::time::timeout(TIMEOUT, work).await {
        Ok(result) => result,
        Err(_) => Err(provider_api::Error::new(
            provider_api::Kind::Cancelled,
            format!("It does not answer within {} s.", TIMEOUT.as_secs()),
        )),
    }
}

/// For `map_err`: the error of a storage's provider.
pub(crate) fn fault(storage: &str) -> impl FnOnce(provider_api::Error) -> HostError {
    let storage = storage.to_owned();
    move |source| HostError::Provider { storage, source }
}
