// SPDX-License-Identifier: MIT OR Apache-2.0
//! File calls beside the tasks: a storage that hangs must stop neither a time limit nor a
//! cancellation, which only work while a task waits.

use std::io;

/// Does something that may block. Dropping the future leaves the work to its thread, which drops
/// the result.
///
/// # Errors
/// Those of the work; or it was not begun, because the program ends.
pub async fn run<T, W>(work: W) -> io::Result<T>
where
    T: Send + 'static,
    W: FnOnce() -> io::Result<T> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(io::Error::other(error)),
        },
    }
}
