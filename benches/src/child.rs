// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs that are ended on every path and never waited for without a bound.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

/// What is kept of a program's output.
const OUTPUT_LIMIT_BYTES: u64 = 64 << 20;

/// A program whose output is collected; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
    output: JoinHandle<String>,
    complaint: JoinHandle<String>,
}

/// How a program ended and what it printed.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub output: String,
    /// Its standard error.
    pub complaint: String,
}

impl Running {
    /// Starts a program without input.
    ///
    /// # Errors
    /// It cannot be started; the text says which package has it where that is known.
    pub fn start(command: &mut Command) -> Result<Self> {
        let name = command.as_std().get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().with_context(|| missing(&name))?;
        let output = collect(child.stdout.take());
        let complaint = collect(child.stderr.take());
        Ok(Self { child, name, output, complaint })
    }

    /// Asks it to end and to print what it has so far.
    pub fn interrupt(&self) {
        let pid = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        if let Some(pid) = pid {
            // It may have ended by itself: then its result is there already.
            let _ = kill_process(pid, Signal::INT);
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end in time, and is killed.
    pub async fn finish(mut self, limit: Duration) -> Result<Finished> {
        let Ok(status) = tokio::time::timeout(limit, self.child.wait()).await else {
            bail!("{} did not end within {} s", self.name, limit.as_secs());
        };
        let status = status.with_context(|| format!("cannot wait for {}", self.name))?;
        let output = self.output.await.unwrap_or_default();
        let complaint = self.complaint.await.unwrap_or_default();
        Ok(Finished { status, output, complaint })
    }
}

/// Runs a program to its end.
///
/// # Errors
/// It is missing, fails, or does not end in time.
pub async fn run(command: &mut Command, limit: Duration) -> Result<String> {
    let running = Running::start(command)?;
    let name = running.name.clone();
    let finished = running.finish(limit).await?;
    if !finished.status.success() {
        let said = finished.complaint.trim().lines().next_back().unwrap_or_default().to_owned();
        bail!("{name} failed ({}): {said}", finished.status);
    }
    Ok(finished.output)
}

fn collect(pipe: Option<impl AsyncReadExt + Unpin + Send + 'static>) -> JoinHandle<String> {
    tokio::spawn(async move {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            // What was read before an error is what there is to show.
            let _ = pipe.take(OUTPUT_LIMIT_BYTES).read_to_end(&mut bytes).await;
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn missing(name: &str) -> String {
    let package = match name.rsplit('/').next().unwrap_or(name) {
        "fio" => "it comes with the Debian package fio",
        "nbdcopy" => "it comes with the Debian package libnbd-bin",
        "qemu-img" | "qemu-storage-daemon" => "run ./x qemu first",
        _ => return format!("cannot start {name}"),
    };
    format!("cannot start {name}; {package}")
}
