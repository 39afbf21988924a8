// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a call of the contract obeys its token and deadline, and how it does blocking work.

use std::future::Future;
use std::time::Instant;

use provider_api::{Call, Error, Kind, Result};

/// Runs `work` until it ends, the call is cancelled or its deadline passes. `what` names the work
/// in the error.
pub(crate) async fn limited<T>(
    call: &Call,
    what: &str,
    work: impl Future<Output = Result<T>> + Send,
) -> Result<T> {
    let deadline = async {
        match call.deadline {
            Some(at) => tokio::time::sleep_until(at.into()).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        () = call.cancel.cancelled() => {
            Err(Error::new(Kind::Cancelled, format!("{what} was cancelled.")))
        }
        () = deadline => {
            Err(Error::new(Kind::Cancelled, format!("{what} did not end before its deadline.")))
        }
        result = work => result,
    }
}

/// Whether the call should end now.
pub(crate) fn check(call: &Call, what: &str) -> Result<()> {
    if call.cancel.is_cancelled() {
        return Err(Error::new(Kind::Cancelled, format!("{what} was cancelled.")));
    }
    if call.deadline.is_some_and(|at| Instant::now() >= at) {
        return Err(Error::new(
            Kind::Cancelled,
            format!("{what} did not end before its deadline."),
        ));
    }
    Ok(())
}

/// Runs file work on a blocking thread. Dropping the future does not stop the work: it must be
/// short, or harmless when nobody waits for it any more.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::with_source(
            Kind::Other,
            "A file operation of the directory provider ended without a result.",
            error,
        )),
    }
}

/// An error of kind `Invalid`.
pub(crate) fn invalid(message: impl Into<String>) -> Error {
    Error::new(Kind::Invalid, message)
}

/// An error of kind `Corrupt`.
pub(crate) fn corrupt(message: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, message)
}
