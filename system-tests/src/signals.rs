// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs that run VMs end in order when a signal comes.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures_util::future::select_all;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::process::Stop;

/// How long stopping VMs and removing their files may take after a signal.
pub const CLEAN_WITHIN: Duration = Duration::from_secs(120);

/// How work ended.
#[derive(Debug)]
pub enum Ended {
    /// By itself, or by a panic.
    Done(Result<()>),
    /// A signal came, and the VMs are stopped.
    Stopped,
    /// A signal came, and the work goes on after [`CLEAN_WITHIN`] all the same: the VMs may still use their files.
    Stuck,
}

/// Does work that blocks, which is asked to stop when a signal comes.
///
/// # Errors
/// The signals cannot be listened for.
pub fn until_signal(work: impl FnOnce(&Stop) -> Result<()> + Send + 'static) -> Result<Ended> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        let mut signals = listen()?;
        let stop = Stop::default();
        let asked = stop.clone();
        let mut work = tokio::task::spawn_blocking(move || work(&asked));
        let signal = select_all(signals.iter_mut().map(|signal| Box::pin(signal.recv())));
        tokio::select! {
            ended = &mut work => return Ok(Ended::Done(ended.context("it crashed").flatten())),
            _ = signal => {}
        }
        stop.request();
        // The terminal may be gone.
        let _ = writeln!(std::io::stderr(), "\nStopping the VMs…");
        Ok(match tokio::time::timeout(CLEAN_WITHIN, work).await {
            Ok(Ok(Ok(()))) => Ended::Done(Ok(())),
            Ok(Ok(Err(_of_the_signal))) => Ended::Stopped,
            Ok(Err(crash)) => Ended::Done(Err(crash).context("it crashed")),
            Err(_) => Ended::Stuck,
        })
    });
    runtime.shutdown_background();
    ended
}

/// The signals that end it; not SIGHUP where that is ignored, as `nohup` has it.
fn listen() -> Result<Vec<Signal>> {
    let mut kinds = vec![SignalKind::interrupt(), SignalKind::terminate()];
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).map(str::trim);
    // The first signal is the lowest bit.
    if ignored.and_then(|mask| u64::from_str_radix(mask, 16).ok()).is_none_or(|mask| mask & 1 == 0)
    {
        kinds.push(SignalKind::hangup());
    }
    kinds.into_iter().map(|kind| signal(kind).context("cannot listen for signals")).collect()
}
