// SPDX-License-Identifier: MIT OR Apache-2.0
//! Notes and protection of an archive, as soon as it is there and nothing else is left to be undone.
//!
//! They are written down with the commit's id: an archive that was to be protected must not be pruned
//! by the next job because the process died between the commit and this.

use provider_api::{CancellationToken, GuestKind, Provider};
use serde::{Deserialize, Serialize};

use super::{BackupOptions, Limits, call_within, guest_words, in_time};
use crate::notes_template::{NotesTemplate, Variables};
use crate::task_log::TaskSink;

/// What the cluster's name is on a host that belongs to none.
const NO_CLUSTER: &str = "standalone node";

/// What an archive gets when it is committed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Its notes; none if it gets none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notes: Option<String>,
    /// Whether it is protected from removal.
    #[serde(default)]
    pub protected: bool,
}

impl Description {
    /// What the options want for a guest.
    ///
    /// # Errors
    /// The template of the notes makes no sense, in words.
    pub(super) fn of(
        options: &BackupOptions,
        kind: GuestKind,
        id: u32,
        name: Option<&str>,
    ) -> Result<Self, String> {
        let words = guest_words(kind, id);
        let expand = |template: &String| {
            let variables = Variables {
                guestname: name.unwrap_or(&words),
                vmid: id,
                node: &host_name(),
                cluster: NO_CLUSTER,
            };
            Ok::<_, String>(NotesTemplate::parse(template)?.expand(&variables))
        };
        let notes = options.notes.as_ref().map(expand).transpose()?;
        let notes = notes.filter(|notes| !notes.is_empty());
        Ok(Self { notes, protected: options.protected })
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Gives it to an archive. It can only warn: the backup has succeeded. Returns the warnings.
    pub(crate) async fn give(
        &self,
        provider: &dyn Provider,
        storage: &str,
        archive: &str,
        limits: &Limits,
        sink: &dyn TaskSink,
    ) -> Vec<String> {
        let task = Task { provider, storage, archive, limits, sink };
        let mut warnings = Vec::new();
        if let Some(notes) = &self.notes
            && let Err(error) = task.set_notes(notes).await
        {
            warnings.push(format!("the archive has no notes: {error}"));
        }
        if self.protected
            && let Err(error) = task.protect().await
        {
            warnings.push(format!("the archive is not protected: {error}"));
        }
        warnings.iter().for_each(|warning| sink.warn(warning));
        warnings
    }
}

struct Task<'a> {
    provider: &'a dyn Provider,
    storage: &'a str,
    archive: &'a str,
    limits: &'a Limits,
    sink: &'a dyn TaskSink,
}

impl Task<'_> {
    async fn set_notes(&self, notes: &str) -> Result<(), String> {
        if !self.provider.describe().capabilities.notes {
            return Err(format!(
                "the provider of the storage '{}' cannot keep notes",
                self.storage
            ));
        }
        self.sink.info("adding notes to backup");
        let call = call_within(&CancellationToken::new(), self.limits.provider_call);
        in_time(self.limits, self.provider.set_notes(self.archive, notes, &call)).await
    }

    async fn protect(&self) -> Result<(), String> {
        self.sink.info("marking backup as protected");
        let call = call_within(&CancellationToken::new(), self.limits.provider_call);
        in_time(self.limits, self.provider.set_protected(self.archive, true, &call)).await
    }
}

fn host_name() -> String {
    // Only fails without /proc; notes can do without it.
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}
