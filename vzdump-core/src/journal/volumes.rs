// SPDX-License-Identifier: MIT OR Apache-2.0
//! The volumes of a guest that is being made: journalled before they are made, removed again unless
//! the guest comes to be.

use std::time::Duration;

use super::{Entry, Journal, JournalError};
use crate::job::{JobContext, chain};
use crate::storage::{ImageFormat, Storage, StorageError, VolumeId};
use crate::vm::backup::free_volume;

/// How often a name that was free is lost to somebody else.
const ATTEMPTS: u32 = 100;

/// Why a volume was not made.
#[derive(Debug, thiserror::Error)]
pub enum NewVolumeError {
    /// The storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// A task's journal and the volumes it has made so far.
///
/// Dropping it leaves both to the recovery.
#[derive(Debug)]
pub struct NewVolumes {
    /// The journal.
    pub journal: Journal,
    volumes: Vec<VolumeId>,
}

impl NewVolumes {
    /// Nothing is made yet.
    #[must_use]
    pub fn new(journal: Journal) -> Self {
        Self { journal, volumes: Vec::new() }
    }

    /// Makes a disk under the first free name. May be dropped at any point.
    ///
    /// # Errors
    /// [`NewVolumeError`].
    pub async fn allocate(
        &mut self,
        ctx: &JobContext,
        storage: &dyn Storage,
        guest_id: u32,
        format: ImageFormat,
        size_bytes: u64,
    ) -> Result<VolumeId, NewVolumeError> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let name = storage.free_name(guest_id, format).await?;
            let volume = VolumeId::new(storage.id(), guest_id, &name, format)?;
            self.journal.append(Entry::Volume { volume: volume.to_string() }).await?;
            self.volumes.push(volume.clone());
            match storage.allocate(&ctx.tools, guest_id, &name, format, size_bytes).await {
                Err(StorageError::Exists { .. }) if attempt < ATTEMPTS => {
                    self.forget(&volume).await?;
                }
                Err(error @ StorageError::Exists { .. }) => {
                    self.forget(&volume).await?;
                    return Err(error.into());
                }
                other => return Ok(other?),
            }
        }
    }

    /// Somebody was faster: it is not ours to remove.
    async fn forget(&mut self, volume: &VolumeId) -> Result<(), JournalError> {
        self.volumes.retain(|ours| ours != volume);
        self.journal.append(Entry::Forget { volume: volume.to_string() }).await
    }

    /// Removes the volumes; returns what could not be removed, and stays in the journal.
    pub async fn free(&mut self, ctx: &JobContext) -> Vec<String> {
        let mut problems = Vec::new();
        while let Some(volume) = self.volumes.pop() {
            problems.extend(free_within(ctx, &volume, ctx.limits.undo).await.err());
        }
        problems
    }
}

/// Frees a volume in bounded time; one that is not there is no error.
///
/// # Errors
/// Why it is still there, in words.
pub async fn free_within(
    ctx: &JobContext,
    volume: &VolumeId,
    limit: Duration,
) -> Result<(), String> {
    match tokio::time::timeout(limit, free_volume(&ctx.storages, volume)).await {
        Ok(freed) => freed.map_err(|error| chain(&error)),
        Err(_) => Err(format!(
            "the volume '{volume}' could not be removed within {} seconds: its storage hangs",
            limit.as_secs()
        )),
    }
}
