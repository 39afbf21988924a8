// SPDX-License-Identifier: MIT OR Apache-2.0
//! Verifies one archive through its provider: with progress, and an end if nothing moves any more.

use std::time::Duration;

use provider_api::{Call, CancellationToken, Error, Kind, Provider, VerifyOptions, VerifyReport};

use crate::job::Limits;
use crate::job::progress::Meter;
use crate::task_log::TaskSink;

/// What a provider gets to obey when it is cancelled; it obeys between two blocks.
const GRACE: Duration = Duration::from_secs(120);

/// Verifies an archive. `guest_id` is the guest it is of, for the progress.
///
/// # Errors
/// Those of [`Provider::verify`], and [`Kind::Cancelled`] when the provider does not go on.
pub async fn verify(
    provider: &dyn Provider,
    archive: &str,
    guest_id: u32,
    options: &VerifyOptions,
    limits: &Limits,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> provider_api::Result<VerifyReport> {
    let call = Call { cancel: cancel.child_token(), deadline: None };
    let _end = call.cancel.clone().drop_guard();
    let meter = Meter::new(guest_id, 0, sink);
    let stalled = async {
        tokio::select! {
            () = meter.run_until_stalled(limits.transfer_stall) => {}
            () = async {
                cancel.cancelled().await;
                tokio::time::sleep(GRACE).await;
            } => {}
        }
    };
    let report = tokio::select! {
        biased;
        report = provider.verify(archive, options, &meter, &call) => report?,
        () = stalled => return Err(Error::new(
            Kind::Cancelled,
            format!("The verification of {archive} does not go on."),
        )),
    };
    meter.end();
    Ok(report)
}
