// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commands that wait for a reply.
//!
//! An entry is made before the command is queued and goes when its reply comes, when its caller
//! gives up, or when the connection closes. Sticky entries stay when the caller gives up: their
//! command is sent in any case, and a command with descriptors holds its permit until QEMU has
//! answered, because QEMU keeps only the descriptors of the last message it read.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde_json::value::RawValue;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::{Error, Result};

/// What a peer made of a command.
#[derive(Debug)]
pub(crate) enum Reply {
    /// It succeeded.
    Return(Box<RawValue>),
    /// It failed.
    Error { class: String, desc: String },
    /// There is a reply, but it cannot be read.
    Unreadable(String),
}

/// How an entry behaves once its caller gives up.
#[derive(Debug)]
pub(crate) enum Keep {
    /// It goes; if the command is still queued, it is not sent.
    No,
    /// It stays until the reply.
    Sticky,
    /// It stays until the reply and holds the permit.
    WithPermit { _permit: OwnedSemaphorePermit },
}

#[derive(Debug)]
struct Entry {
    reply: oneshot::Sender<Reply>,
    keep: Keep,
}

/// The table; `None` inside once the connection is closed.
#[derive(Debug)]
pub(crate) struct Table {
    entries: Mutex<Option<HashMap<u64, Entry>>>,
}

impl Table {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { entries: Mutex::new(Some(HashMap::new())) })
    }

    /// Adds a command.
    pub(crate) fn register(self: &Arc<Self>, id: u64, keep: Keep) -> Result<Waiter> {
        let (sender, receiver) = oneshot::channel();
        let mut entries = self.lock();
        let entries = entries.as_mut().ok_or(Error::Disconnected)?;
        entries.insert(id, Entry { reply: sender, keep });
        Ok(Waiter { table: Arc::clone(self), id, receiver })
    }

    /// Hands a reply to whoever waits for it; false if nobody knows the id.
    pub(crate) fn complete(&self, id: u64, reply: Reply) -> bool {
        let entry = self.lock().as_mut().and_then(|entries| entries.remove(&id));
        let known = entry.is_some();
        if let Some(entry) = entry {
            // The receiver is gone if the caller of a sticky command gave up.
            let _ = entry.reply.send(reply);
        }
        known
    }

    /// Whether a queued command is still to be sent.
    pub(crate) fn is_wanted(&self, id: u64) -> bool {
        self.lock().as_ref().is_some_and(|entries| entries.contains_key(&id))
    }

    /// Drops all entries, so that every caller gets `Disconnected` now, and later ones at once.
    pub(crate) fn close(&self) {
        let entries = self.lock().take();
        drop(entries);
    }

    fn give_up(&self, id: u64) {
        let mut entries = self.lock();
        let Some(entries) = entries.as_mut() else { return };
        if entries.get(&id).is_some_and(|entry| matches!(entry.keep, Keep::No)) {
            entries.remove(&id);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<HashMap<u64, Entry>>> {
        // No code panics while holding it, so a poisoned table is still whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for the reply of one command; dropping it gives up.
#[derive(Debug)]
pub(crate) struct Waiter {
    table: Arc<Table>,
    id: u64,
    receiver: oneshot::Receiver<Reply>,
}

impl Waiter {
    pub(crate) async fn reply(&mut self) -> Result<Reply> {
        (&mut self.receiver).await.map_err(|_closed| Error::Disconnected)
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.table.give_up(self.id);
    }
}
