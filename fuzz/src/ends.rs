// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs both ends of a connection in one thread, so that a run depends on its bytes alone.

use std::{future::Future, time::Duration};

/// Only a hang takes so long.
const HANG: Duration = Duration::from_secs(10);

/// Runs both ends until they are through.
///
/// # Panics
/// They hang.
pub fn run(both: impl Future<Output = ()>) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async { tokio::time::timeout(HANG, both).await.expect("it hangs") });
}
