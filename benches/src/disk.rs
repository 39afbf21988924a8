// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest's disk, filled once and used by all runs, and the fleecing images.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::num::NonZeroU64;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use rustix::fs::{Advice, fadvise};
use tokio::process::Command;

use crate::cases::{Cache, Fleecing};
use crate::child;
use crate::scratch::Scratch;

const CHUNK_BYTES: usize = 4 << 20;
const CREATE_WITHIN: Duration = Duration::from_secs(30);
const SEED: u64 = 1;
/// RAM in memory-backed file systems of every Linux.
pub(crate) const TMPFS: &str = "/dev/shm";

/// A raw file full of random data.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The file.
    pub path: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// Whether all of it was read into single pages, and nothing has dropped them since.
    is_read: Arc<AtomicBool>,
}

impl Disk {
    /// A file that is there.
    #[must_use]
    pub fn at(path: PathBuf, size_bytes: u64) -> Self {
        Self { path, size_bytes, is_read: Arc::default() }
    }

    /// Finds the disk of this size in a folder, or makes it.
    ///
    /// # Errors
    /// There is no space for it.
    pub fn ensure(folder: &Path, size_bytes: u64) -> Result<Self> {
        let path = folder.join(format!("disk-{}m.raw", size_bytes >> 20));
        let disk = Self::at(path, size_bytes);
        if disk.path.metadata().is_ok_and(|meta| meta.len() == size_bytes) {
            return Ok(disk);
        }
        eprintln!("filling {} ({} MiB) once", disk.path.display(), size_bytes >> 20);
        let partial = disk.path.with_extension("partial");
        fill(&partial, size_bytes)
            .with_context(|| format!("cannot fill {}", partial.display()))
            .inspect_err(|_| drop(std::fs::remove_file(&partial)))?;
        std::fs::rename(&partial, &disk.path)
            .with_context(|| format!("cannot create {}", disk.path.display()))?;
        Ok(disk)
    }

    /// Brings the page cache into the state in which every run of a cache mode begins: nothing
    /// dirty, and nothing of the disk in it (`Direct`) or all of it, if there is RAM for that.
    ///
    /// It is read as by random reads, into single pages: read-ahead fills the cache with large folios,
    /// and then each small write makes one of those dirty as a whole, which costs more than any filter. What
    /// an earlier run has left there is single pages, too, so only what is missing is read.
    ///
    /// # Errors
    /// The disk cannot be read.
    pub fn settle(&self, cache: Cache) -> Result<()> {
        let mut file = OpenOptions::new().read(true).write(true).open(&self.path)?;
        file.sync_all()?;
        let fits = available_bytes().is_some_and(|free| free > self.size_bytes * 3 / 2);
        let all = NonZeroU64::new(self.size_bytes);
        let is_wanted = cache == Cache::Default && fits;
        if !self.is_read.swap(false, Ordering::Relaxed) || !is_wanted {
            fadvise(&file, 0, all, Advice::DontNeed)?;
        }
        if !is_wanted {
            return Ok(());
        }
        fadvise(&file, 0, all, Advice::Random)?;
        let mut chunk = vec![0; CHUNK_BYTES];
        while file.read(&mut chunk)? > 0 {}
        self.is_read.store(true, Ordering::Relaxed);
        Ok(())
    }
}

fn fill(path: &Path, size_bytes: u64) -> Result<()> {
    let mut file = File::create(path)?;
    let mut random = SmallRng::seed_from_u64(SEED);
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut left = size_bytes;
    while left > 0 {
        let now = left.min(CHUNK_BYTES as u64);
        random.fill_bytes(&mut chunk);
        file.write_all(&chunk[..now as usize])?;
        left -= now;
    }
    file.sync_all()?;
    Ok(())
}

/// RAM that programs and the page cache could use, and what the page cache uses already.
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// A fleecing image that goes away when dropped.
#[derive(Debug)]
pub struct FleecingFile {
    /// The file.
    pub path: PathBuf,
    /// What it occupied when it was new.
    empty_bytes: u64,
    _folder: Scratch,
}

impl FleecingFile {
    /// Creates one.
    ///
    /// # Errors
    /// There is no space, or `qemu-img` is missing.
    pub async fn create(
        kind: Fleecing,
        size_bytes: u64,
        bin: &Path,
        folder: &Path,
    ) -> Result<Self> {
        let parent = if kind.in_ram() { Path::new(TMPFS) } else { folder };
        let folder = Scratch::new(parent, "fleecing-")?;
        let path = folder.path().join("image");
        if kind.is_qcow2() {
            let mut create = Command::new(bin.join("qemu-img"));
            create.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg(size_bytes.to_string());
            child::run(&mut create, CREATE_WITHIN).await?;
        } else {
            sparse(&path, size_bytes)?;
        }
        let empty_bytes = occupied(&path)?;
        Ok(Self { path, empty_bytes, _folder: folder })
    }

    /// What was added since.
    ///
    /// # Errors
    /// The file is gone.
    pub fn added_bytes(&self) -> Result<u64> {
        Ok(occupied(&self.path)?.saturating_sub(self.empty_bytes))
    }
}

/// Creates an empty file of a size.
///
/// # Errors
/// The file system does not have such files.
pub fn sparse(path: &Path, size_bytes: u64) -> Result<()> {
    let file =
        File::create_new(path).with_context(|| format!("cannot create {}", path.display()))?;
    file.set_len(size_bytes).with_context(|| format!("{}: no such size", path.display()))
}

fn occupied(path: &Path) -> Result<u64> {
    let meta = path.metadata().with_context(|| format!("cannot look at {}", path.display()))?;
    Ok(meta.blocks() * 512)
}

/// Fails when a folder cannot hold the disk and what is captured of it.
///
/// # Errors
/// It cannot.
pub fn check_space(folder: &Path, disk_bytes: u64) -> Result<()> {
    let have = folder.join(format!("disk-{}m.raw", disk_bytes >> 20)).exists();
    let needed = if have { disk_bytes } else { disk_bytes * 2 } + (1 << 30);
    check_free(folder, needed, "--disk-size makes it smaller")
}

/// Checks that a folder has so much free space; `advice` says what else can be done.
///
/// # Errors
/// It has less.
pub fn check_free(folder: &Path, needed_bytes: u64, advice: &str) -> Result<()> {
    let space = rustix::fs::statvfs(folder)?;
    let free = space.f_bavail * space.f_frsize;
    ensure!(
        free >= needed_bytes,
        "{}: {} MiB free, the benchmark needs {} MiB; {advice}",
        folder.display(),
        free >> 20,
        needed_bytes >> 20
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_filled_once() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::ensure(folder.path(), 5 << 20).unwrap();
        let content = std::fs::read(&disk.path).unwrap();
        assert_eq!(content.len(), 5 << 20);
        assert!(content.chunks(4096).all(|granule| granule.iter().any(|byte| *byte != 0)));
        std::fs::write(&disk.path, vec![7; 5 << 20]).unwrap();
        Disk::ensure(folder.path(), 5 << 20).unwrap();
        assert_eq!(std::fs::read(&disk.path).unwrap()[0], 7);
        disk.settle(Cache::Default).unwrap();
        disk.settle(Cache::Direct).unwrap();
    }
}
