// SPDX-License-Identifier: MIT OR Apache-2.0
//! Notices that the point in time is lost while the provider copies.

use std::time::Duration;

use qmp_client::backup::{self, AccessState, AccessStatus, BrokenEvent};
use qmp_client::{Error, EventItem, EventStream, Session};

use super::{VmDriver, target_id};
use crate::guest::{GuestError, Task};
use crate::task_log::clean;

/// How often the state is asked for: events can be lost.
const POLL: Duration = Duration::from_secs(5);

/// What one look at the access gave.
enum Look {
    Fine,
    Lost(GuestError),
}

impl VmDriver {
    pub(super) async fn do_watch(&mut self, task: Task<'_>) -> GuestError {
        let Some((session, mut events)) = self.session.clone().zip(self.events.take()) else {
            // A guest without disks has nothing to lose.
            return std::future::pending().await;
        };
        if !self.access_begun {
            return std::future::pending().await;
        }
        let lost = self.watch_access(&session, &mut events, task).await;
        self.events = Some(events);
        lost
    }

    async fn watch_access(
        &self,
        session: &Session,
        events: &mut EventStream,
        task: Task<'_>,
    ) -> GuestError {
        loop {
            let look = tokio::select! {
                item = events.next() => match item {
                    None => Look::Lost(self.gone()),
                    Some(EventItem::Event(event)) => match BrokenEvent::from_event(&event) {
                        Ok(Some(broken)) => self.judge(&broken, task),
                        Ok(None) | Err(_) => Look::Fine,
                    },
                    Some(EventItem::Lagged(_)) => self.poll(session).await,
                },
                () = tokio::time::sleep(POLL) => self.poll(session).await,
            };
            if let Look::Lost(error) = look {
                return error;
            }
        }
    }

    fn judge(&self, broken: &BrokenEvent, task: Task<'_>) -> Look {
        if broken.target_id != target_id(&self.options.storage) {
            return Look::Fine;
        }
        if broken.state == AccessState::Degraded {
            // Reads of what is lost fail; whether the provider needs it is seen then.
            let reason = clean(&broken.error);
            task.sink.warn(&format!("the snapshot of '{}' is incomplete: {reason}", broken.device));
            return Look::Fine;
        }
        Look::Lost(lost(&broken.device, &broken.error))
    }

    async fn poll(&self, session: &Session) -> Look {
        match backup::query(session).await {
            Ok(all) => {
                let target = target_id(&self.options.storage);
                match all.iter().find(|status| status.target_id == target) {
                    Some(status) => broken_device(status),
                    None => Look::Lost(GuestError::Refused(
                        "Somebody else ended the backup access in QEMU.".to_owned(),
                    )),
                }
            }
            Err(Error::Disconnected) => Look::Lost(self.gone()),
            // A QEMU that is busy answers later; the transfer has a bound of its own.
            Err(error) => {
                tracing::warn!(%error, "the state of the backup access is not known");
                Look::Fine
            }
        }
    }
}

fn broken_device(status: &AccessStatus) -> Look {
    let broken = |state: &AccessState| matches!(state, AccessState::Broken | AccessState::Closing);
    match status.devices.iter().find(|device| broken(&device.state)) {
        Some(device) => {
            let reason = device.error.as_deref().unwrap_or("no reason is known");
            Look::Lost(lost(&device.device, reason))
        }
        None => Look::Fine,
    }
}

fn lost(device: &str, reason: &str) -> GuestError {
    GuestError::Broken { device: clean(device), reason: clean(reason) }
}
