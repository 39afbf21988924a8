// SPDX-License-Identifier: MIT OR Apache-2.0
//! nbdcopy as the backup client: how fast it reads everything.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::process::Command;

use crate::child;
use crate::fio::Job;
use crate::sample::Outcome;

/// What one pass over the disk may take.
const PASS_WITHIN: Duration = Duration::from_secs(600);
/// Longest time of the guest's job; it is interrupted before.
const GUEST_SECONDS: u32 = 3600;
const GUEST_BEGINS: Duration = Duration::from_millis(700);

/// Reads `reader` as a whole until at least `seconds` have passed, while the guest writes at a
/// rate; MB/s and what the guest saw.
///
/// # Errors
/// A program is missing or fails.
pub async fn run(
    socket: &Path,
    size_bytes: u64,
    seconds: u32,
    guest: Option<Job>,
) -> Result<(f64, Outcome)> {
    let guest = guest.map(|job| Job { seconds: GUEST_SECONDS, repeat: true, ..job });
    let running = guest.as_ref().map(|job| job.start(socket, "guest")).transpose()?;
    if running.is_some() {
        tokio::time::sleep(GUEST_BEGINS).await;
    }
    let uri = format!("nbd+unix:///reader?socket={}", socket.display());
    let begin = Instant::now();
    let mut bytes = 0;
    while begin.elapsed() < Duration::from_secs(seconds.into()) {
        let mut command = Command::new("nbdcopy");
        command.arg("--").arg(&uri).arg("null:");
        child::run(&mut command, PASS_WITHIN).await?;
        bytes += size_bytes;
    }
    let speed = bytes as f64 / 1e6 / begin.elapsed().as_secs_f64();
    let outcome = match (guest, running) {
        (Some(job), Some(running)) => {
            running.interrupt();
            job.collect(running).await.context("the guest beside nbdcopy")?
        }
        _ => Outcome::default(),
    };
    Ok((speed, outcome))
}
