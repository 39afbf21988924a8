// SPDX-License-Identifier: MIT OR Apache-2.0
//! Frozen disks as files.
//!
//! With QEMU's storage daemon each disk is a FUSE export over the kit's own NBD server: reads of clean
//! and released areas fail, holes punched are releases, and everything is noted. Without it a sparse file
//! is offered, which has the same content and notices nothing.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use provider_api::{
    Access, BoxFuture, Call, DirtyRegions, NextRegions, Region, RegionPage, Result, Volume,
};
use tokio::process::{Child, Command};

use crate::disk::{Frozen, GRANULE};

/// How long the daemon may take until its files are there.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Regions on one page: few, so that a provider meets several pages.
const PAGE_REGIONS: usize = 5;

/// Regions of one disk, computed once.
#[derive(Debug)]
struct Regions(Vec<Region>);

impl Regions {
    /// What a provider must read, with zeroes marked.
    fn of(frozen: &Frozen) -> Self {
        let mut regions: Vec<Region> = Vec::new();
        for (n, bytes) in frozen.content.chunks(GRANULE as usize).enumerate() {
            let offset = n as u64 * GRANULE;
            let is_wanted = match (&frozen.dirty, frozen.mode) {
                (Some(dirty), provider_api::BitmapMode::Reuse) => {
                    dirty[(offset / frozen.granule_bytes) as usize]
                }
                _ => true,
            };
            if !is_wanted {
                continue;
            }
            let zero = bytes.iter().all(|byte| *byte == 0);
            let length_bytes = bytes.len() as u64;
            match regions.last_mut() {
                Some(last) if last.offset + last.length_bytes == offset && last.zero == zero => {
                    last.length_bytes += length_bytes;
                }
                _ => regions.push(Region { offset, length_bytes, zero }),
            }
        }
        Self(regions)
    }

    fn page_now(&self, offset: u64) -> RegionPage {
        let begin = self.0.partition_point(|region| region.offset < offset);
        let end = self.0.len().min(begin + PAGE_REGIONS);
        let next = match self.0.get(end) {
            Some(region) => NextRegions::From { offset: region.offset },
            None => NextRegions::End { total_bytes: self.0.iter().map(|r| r.length_bytes).sum() },
        };
        RegionPage { regions: self.0[begin..end].to_vec(), next }
    }
}

impl DirtyRegions for Regions {
    fn page<'a>(&'a self, offset: u64, _call: &'a Call) -> BoxFuture<'a, Result<RegionPage>> {
        Box::pin(std::future::ready(Ok(self.page_now(offset))))
    }
}

/// The files of one point in time.
#[derive(Debug)]
pub(crate) struct FileOffer {
    paths: Vec<PathBuf>,
    daemon: Option<Child>,
}

impl FileOffer {
    /// Makes the files in `dir` and puts them in place of the volumes' NBD exports.
    pub(crate) async fn open(
        dir: &Path,
        socket: &Path,
        daemon: Option<&Path>,
        frozen: &[Frozen],
        volumes: &mut [Volume],
    ) -> std::result::Result<Self, String> {
        let mut offer = Self { paths: Vec::new(), daemon: None };
        for (volume, frozen) in volumes.iter_mut().zip(frozen) {
            let path = dir.join(format!("{}.disk", volume.device));
            let content: &[u8] = if daemon.is_some() { &[] } else { &frozen.content };
            std::fs::write(&path, content)
                .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
            offer.paths.push(path.clone());
            let regions = Arc::new(Regions::of(frozen));
            volume.access = Access::File { path, regions };
        }
        if let Some(daemon) = daemon {
            offer.start(daemon, socket, volumes, frozen).await?;
        }
        Ok(offer)
    }

    async fn start(
        &mut self,
        daemon: &Path,
        socket: &Path,
        volumes: &[Volume],
        frozen: &[Frozen],
    ) -> std::result::Result<(), String> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(daemon);
        for (volume, path) in volumes.iter().zip(&self.paths) {
            let device = &volume.device;
            command.arg("--blockdev").arg(format!(
                "driver=nbd,node-name=n-{device},server.type=unix,server.path={},export={device},\
                 discard=unmap",
                socket.display()
            ));
            command.arg("--export").arg(format!(
                "type=fuse,id=e-{device},node-name=n-{device},mountpoint={},writable=on,growable=off",
                path.display()
            ));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.kill_on_drop(true).spawn();
        self.daemon = Some(child.map_err(|e| format!("cannot run {}: {e}", daemon.display()))?);
        let until = Instant::now() + START_LIMIT;
        // The empty file becomes the disk when the export is there.
        while !self.all_have_sizes(frozen) {
            if let Some(child) = &mut self.daemon
                && let Ok(Some(status)) = child.try_wait()
            {
                return Err(format!("{} ended ({status})", daemon.display()));
            }
            if Instant::now() > until {
                return Err(format!("{} offers no files", daemon.display()));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    fn all_have_sizes(&self, frozen: &[Frozen]) -> bool {
        let has_size = |(path, frozen): (&PathBuf, &Frozen)| {
            std::fs::metadata(path).is_ok_and(|meta| meta.len() == frozen.content.len() as u64)
        };
        self.paths.iter().zip(frozen).all(has_size)
    }

    /// Withdraws the files.
    pub(crate) async fn close(mut self) {
        if let Some(mut child) = self.daemon.take() {
            // A polite end unmounts the files.
            if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok())
                && let Some(pid) = rustix::process::Pid::from_raw(pid)
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
            if tokio::time::timeout(START_LIMIT, child.wait()).await.is_err() {
                let _ = child.kill().await;
            }
        }
        self.remove();
    }

    fn remove(&mut self) {
        for path in std::mem::take(&mut self.paths) {
            // After a killed daemon a dead mount covers the file.
            let _ = rustix::mount::unmount(&path, rustix::mount::UnmountFlags::DETACH);
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!("Cannot remove {}: {error}", path.display());
            }
        }
    }
}

/// A check that failed half way withdraws nothing itself.
impl Drop for FileOffer {
    fn drop(&mut self) {
        if let Some(child) = &mut self.daemon {
            // Fails only if it is gone already.
            let _ = child.start_kill();
        }
        self.remove();
    }
}
