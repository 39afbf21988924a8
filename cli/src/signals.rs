// SPDX-License-Identifier: MIT OR Apache-2.0
//! Signals become a cancelled token, so that every task ends in order.

use std::process::exit;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use vzdump_host::CancellationToken;

use crate::output;

/// How long after an interrupted task its last lines may take to be read.
const LAST_LINES_WITHIN: Duration = Duration::from_secs(5);
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// The exit code of a failure.
const FAILURE: i32 = 1;

/// Cancels the returned token at the first interrupt, quit, termination or hang-up. Further ones
/// change nothing: cleaning up is bounded, and cutting it short would leave its work to the next
/// run. Only when nothing but printing is left, to somebody who does not read, they end the program. Signals that
/// are ignored stay so (`nohup`).
pub(crate) fn cancel_on_signal() -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let ignored = ignored_signals();
    let watch = |kind: SignalKind| match ignored >> (kind.as_raw_value() - 1) & 1 {
        0 => signal(kind).map(Some),
        _ => Ok(None),
    };
    let mut interrupt = watch(SignalKind::interrupt())?;
    let mut terminate = watch(SignalKind::terminate())?;
    let mut hang_up = watch(SignalKind::hangup())?;
    let mut quit = watch(SignalKind::quit())?;
    let cancel = token.clone();
    tokio::spawn(async move {
        loop {
            let name = tokio::select! {
                () = next(&mut interrupt) => "interrupted",
                () = next(&mut terminate) => "asked to terminate",
                () = next(&mut hang_up) => "terminal closed",
                () = next(&mut quit) => "asked to quit",
            };
            if output::is_only_printing_left() {
                exit(FAILURE);
            }
            if !cancel.is_cancelled() {
                cancel.cancel();
                tokio::spawn(end_unread());
            }
            // It may have to wait for its reader.
            tokio::task::spawn_blocking(move || {
                output::warning(&format!("{name}: ending in order"));
            });
        }
    });
    Ok(token)
}

/// Ends the program when its last lines are not read.
async fn end_unread() {
    while !output::is_only_printing_left() {
        tokio::time::sleep(LOOK_AGAIN_AFTER).await;
    }
    tokio::time::sleep(LAST_LINES_WITHIN).await;
    exit(FAILURE);
}

async fn next(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// The signals that whoever started this program has it ignore: a bit for each, the first one for signal 1.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
