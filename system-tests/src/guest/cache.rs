// SPDX-License-Identifier: MIT OR Apache-2.0
//! The folder outside the checkout where parts of guests are kept between runs.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

use crate::process::Stop;

/// Another build of the guest may be fetching packages meanwhile.
const LOCK_WITHIN: Duration = Duration::from_secs(600);
/// How many entries of one kind are kept.
const KEPT: usize = 4;

/// The locked cache folder; entries are made whole or not at all.
#[derive(Debug)]
pub(crate) struct Cache {
    dir: PathBuf,
    _lock: File,
}

impl Cache {
    /// Opens and locks the cache (`$VZDUMP_CACHE`, else the user's cache folder).
    pub(crate) fn open(stop: &Stop) -> Result<Self> {
        let dir = root()?.join("guest");
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let path = dir.join("lock");
        let lock =
            File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let what = format!("lock of {} (another build of the guest runs)", dir.display());
        stop.wait_for(&what, LOCK_WITHIN, || match lock.try_lock() {
            Ok(()) => Ok(Some(())),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).context("cannot lock the guest's cache"),
        })?;
        Ok(Self { dir, _lock: lock })
    }

    /// The entry `kind-key`; `fill` makes it in an empty folder when it is not there yet.
    pub(crate) fn entry(
        &self,
        kind: &str,
        key: &str,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let name = format!("{kind}-{key}");
        let entry = self.dir.join(&name);
        if entry.is_dir() {
            return Ok(entry);
        }
        let fresh = self.dir.join(format!("tmp-{name}"));
        remove(&fresh)?;
        fs::create_dir(&fresh).with_context(|| format!("cannot make {}", fresh.display()))?;
        if let Err(error) = fill(&fresh) {
            // The first failure is what the user must see.
            let _ = remove(&fresh);
            return Err(error);
        }
        fs::rename(&fresh, &entry).with_context(|| format!("cannot make {}", entry.display()))?;
        self.prune(kind, &entry)?;
        Ok(entry)
    }

    /// The newest entry of a kind, for a machine that cannot ask its package lists.
    pub(crate) fn newest(&self, kind: &str) -> Result<Option<PathBuf>> {
        Ok(self.by_age(kind)?.into_iter().next())
    }

    fn prune(&self, kind: &str, keep: &Path) -> Result<()> {
        for entry in self.by_age(kind)?.into_iter().skip(KEPT).filter(|entry| entry != keep) {
            remove(&entry)?;
        }
        Ok(())
    }

    fn by_age(&self, kind: &str) -> Result<Vec<PathBuf>> {
        let prefix = format!("{kind}-");
        let mut found: Vec<(SystemTime, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&self.dir).context("cannot list the guest's cache")? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                found.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        found.sort_by(|left, right| right.cmp(left));
        Ok(found.into_iter().map(|(_, path)| path).collect())
    }
}

fn root() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(dir) = set("VZDUMP_CACHE") {
        return Ok(dir.into());
    }
    if let Some(dir) = set("XDG_CACHE_HOME") {
        return Ok(PathBuf::from(dir).join("vzdump-build"));
    }
    let Some(home) = set("HOME") else { bail!("neither VZDUMP_CACHE nor HOME is set") };
    Ok(PathBuf::from(home).join(".cache/vzdump-build"))
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
