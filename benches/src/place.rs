// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where a benchmark works, and until when: its folder for itself alone, QEMU's programs, signals.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// The folder for disks and sockets, by default `target/bench`. The lock keeps other runs away while
/// it is held.
///
/// # Errors
/// It cannot be made, or another benchmark runs in it.
pub fn folder(given: Option<&Path>) -> Result<(PathBuf, File)> {
    let folder = given.map_or_else(|| checkout().join("target/bench"), Path::to_owned);
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let folder = folder.canonicalize()?;
    let lock = File::create(folder.join("lock")).context("cannot create a lock")?;
    if lock.try_lock().is_err() {
        bail!("another benchmark runs in {}; --folder names another one", folder.display());
    }
    Ok((folder, lock))
}

/// The folder of the patched QEMU programs.
///
/// # Errors
/// There is none.
pub fn qemu(given: Option<&Path>) -> Result<PathBuf> {
    let bin = given.map_or_else(|| checkout().join("target/qemu/bin"), Path::to_owned);
    bin.canonicalize().with_context(|| format!("{}: run ./x qemu first", bin.display()))
}

/// Does the work unless SIGINT or SIGTERM come first.
///
/// # Errors
/// Those of the work, or which signal came.
pub async fn until_stopped<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut terminate = signal(SignalKind::terminate()).context("no signals")?;
    tokio::select! {
        result = Box::pin(work) => result,
        _ = tokio::signal::ctrl_c() => bail!("interrupted"),
        _ = terminate.recv() => bail!("terminated"),
    }
}
