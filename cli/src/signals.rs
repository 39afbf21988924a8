// SPDX-License-Identifier: MIT OR Apache-2.0
//! Signals become a cancelled token, so that every task ends in order.

use tokio::signal::unix::{Signal, SignalKind, signal};
use vzdump_host::CancellationToken;

/// Cancels the returned token at the first interrupt, quit, termination or hang-up. Further ones
/// change nothing: cleaning up is bounded, and cutting it short would leave its work to the next
/// run.
pub(crate) fn cancel_on_signal() -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut quit = signal(SignalKind::quit())?;
    let cancel = token.clone();
    tokio::spawn(async move {
        loop {
            let name = any(&mut interrupt, &mut terminate, &mut hang_up, &mut quit).await;
            crate::output::warning(&format!("{name}: ending in order"));
            cancel.cancel();
        }
    });
    Ok(token)
}

async fn any(
    interrupt: &mut Signal,
    terminate: &mut Signal,
    hang_up: &mut Signal,
    quit: &mut Signal,
) -> &'static str {
    tokio::select! {
        _ = interrupt.recv() => "interrupted",
        _ = terminate.recv() => "asked to terminate",
        _ = hang_up.recv() => "terminal closed",
        _ = quit.recv() => "asked to quit",
    }
}
