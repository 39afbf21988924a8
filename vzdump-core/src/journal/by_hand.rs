// SPDX-License-Identifier: MIT OR Apache-2.0
//! What somebody does by hand with a guest that an interrupted backup had shut down or paused.

use provider_api::GuestKind;

use super::recover::read_if_there;
use super::{Entry, append_to, list};
use crate::job::{backup_lock_path, guest_words};
use crate::layout::Layout;
use crate::lock::FileLock;

/// Writes down that the guest was started or stopped by hand: from now on it is its administrator's matter
/// whether it runs, and no recovery lets it run again. Nothing while a task works on the guest, which sees to
/// that itself.
pub async fn settled(layout: &Layout, kind: GuestKind, id: u32) {
    let journals = list(layout, Some((kind, id))).unwrap_or_default();
    if journals.is_empty() {
        return;
    }
    // No task may write to the journals meanwhile.
    let path = backup_lock_path(layout, kind, id);
    let Ok(_lock) = FileLock::try_acquire(&path, &guest_words(kind, id)) else { return };
    for path in journals {
        let record = read_if_there(&path).ok().flatten();
        if record.is_some_and(|record| record.held.is_some())
            && let Err(error) = append_to(&path, Entry::Resumed).await
        {
            tracing::warn!(id, %error, "the next task of this guest may start it again");
        }
    }
}
