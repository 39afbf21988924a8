// SPDX-License-Identifier: MIT OR Apache-2.0
//! What tests of archives have found, kept by this host in files of the state directory, by volume id.
//!
//! Whether an archive boots is kept here whatever the provider can, because it depends on the host. What a
//! verification found only if the provider does not remember it with the archive, as the contract asks it to:
//! it may not be able to, or not this time. What was found last counts, see [`last_verified`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use provider_api::Verified;
use serde::Serialize;
use serde::de::DeserializeOwned;
use vzdump_core::config::{read_text, write_atomically};
use vzdump_core::lock::FileLock;

use crate::boot::Booted;
use crate::{Host, HostError};

/// Results of one kind that are kept: the newest.
const RESULTS_MAX: usize = 10_000;
const LOCK_WITHIN: Duration = Duration::from_secs(10);

/// What is kept of an archive.
pub(crate) trait Kept: Serialize + DeserializeOwned {
    /// Begins the names of its files.
    const NAME: &'static str;
    /// When it was found.
    fn time_s(&self) -> i64;
    /// A file that goes with it.
    fn file(&self) -> Option<&PathBuf> {
        None
    }
}

impl Kept for Booted {
    const NAME: &'static str = "boot-results";
    fn time_s(&self) -> i64 {
        self.time_s
    }
    fn file(&self) -> Option<&PathBuf> {
        self.screenshot.as_ref()
    }
}

impl Kept for Verified {
    const NAME: &'static str = "verify-results";
    fn time_s(&self) -> i64 {
        self.time_s
    }
}

impl Host {
    fn results_path<T: Kept>(&self) -> PathBuf {
        self.layout.state().join(format!("{}.json", T::NAME))
    }

    /// The results by volume id. What cannot be read is as if it had not been tested.
    pub(crate) fn results<T: Kept>(&self) -> BTreeMap<String, T> {
        let text = read_text(&self.results_path::<T>()).ok().flatten();
        text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    }

    /// Keeps results, each in the place of an older one.
    pub(crate) async fn keep<T: Kept>(
        &self,
        new: impl IntoIterator<Item = (String, T)>,
    ) -> Result<(), HostError> {
        let mut new = new.into_iter().peekable();
        if new.peek().is_none() {
            return Ok(());
        }
        let lock = self.layout.lock_dir().join(format!("{}.lock", T::NAME));
        let _held = FileLock::acquire(&lock, "The list of tested archives", LOCK_WITHIN).await?;
        let mut results = self.results::<T>();
        for (volid, result) in new {
            let file = result.file().cloned();
            let old = results.insert(volid, result);
            forget(old.as_ref(), file.as_ref());
        }
        while results.len() > RESULTS_MAX {
            let oldest = results.iter().min_by_key(|(_, result)| result.time_s());
            let Some(oldest) = oldest.map(|(volid, _)| volid.clone()) else { break };
            forget(results.remove(&oldest).as_ref(), None);
        }
        let text = serde_json::to_vec_pretty(&results).unwrap_or_default();
        Ok(write_atomically(&self.results_path::<T>(), &text, false)?)
    }
}

/// What was found last of an archive that was made at `archive_s`. The provider goes before the host if
/// both are of the same second.
pub(crate) fn last_verified(
    archive_s: i64,
    of_provider: Option<Verified>,
    kept: Option<Verified>,
) -> Option<Verified> {
    // What was found before the archive was made is about another one of its name.
    let kept = kept.filter(|kept| kept.time_s >= archive_s);
    match (of_provider, kept) {
        (Some(remembered), Some(kept)) if kept.time_s > remembered.time_s => Some(kept),
        (remembered, kept) => remembered.or(kept),
    }
}

/// Removes the file of a result that is kept no more, unless a newer one has the same.
fn forget<T: Kept>(old: Option<&T>, stays: Option<&PathBuf>) {
    if let Some(path) = old.and_then(Kept::file).filter(|path| Some(*path) != stays) {
        // Somebody may have taken it away.
        let _ = std::fs::remove_file(path);
    }
}
