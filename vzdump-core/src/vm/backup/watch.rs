// SPDX-License-Identifier: MIT OR Apache-2.0
//! Notices that the point in time is lost while the provider copies.

use std::sync::Arc;
use std::time::Duration;

use qmp_client::backup::{
    self, AccessState, AccessStatus, BackupAccess, BrokenEvent, TornDownEvent,
};
use qmp_client::{Error, Event, EventItem, EventStream, Session};

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
                    Some(EventItem::Event(event)) => self.look_at(session, &event, task).await,
                    Some(EventItem::Lagged(_)) => self.poll(session, None).await,
                },
                error = lease_lost(self.access.as_ref()) => match error.as_ref() {
                    Error::Disconnected => Look::Lost(self.gone()),
                    error => Look::Lost(GuestError::Refused(format!(
                        "The lease of the backup access cannot be renewed: {error}"
                    ))),
                },
                () = tokio::time::sleep(POLL) => self.poll(session, None).await,
            };
            if let Look::Lost(error) = look {
                return error;
            }
        }
    }

    async fn look_at(&self, session: &Session, event: &Event, task: Task<'_>) -> Look {
        if let Ok(Some(broken)) = BrokenEvent::from_event(event) {
            return self.judge(&broken, task);
        }
        if event.name == "SHUTDOWN" && event.data["guest"] == true {
            task.sink.info("the guest switches off; QEMU stays until the backup has ended");
            return Look::Fine;
        }
        match TornDownEvent::from_event(event) {
            // It may be about an earlier access of the target.
            Ok(Some(ended)) if ended.target_id == target_id(&self.options.storage) => {
                self.poll(session, ended.reason.as_deref()).await
            }
            _ => Look::Fine,
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
        Look::Lost(self.lost(&broken.device, &broken.error, broken.errno))
    }

    /// The device's first state that ends its snapshot, if there is one.
    fn broken_device(&self, status: &AccessStatus) -> Look {
        let broken =
            |state: &AccessState| matches!(state, AccessState::Broken | AccessState::Closing);
        match status.devices.iter().find(|device| broken(&device.state)) {
            Some(device) => {
                let reason = device.error.as_deref().unwrap_or("no reason is known");
                Look::Lost(self.lost(&device.device, reason, device.errno))
            }
            None => Look::Fine,
        }
    }

    /// Names what QEMU says with a number: a full storage must be told as one.
    fn lost(&self, device: &str, reason: &str, errno: Option<i64>) -> GuestError {
        let mut reason = clean(reason);
        if let Some(errno) = errno.and_then(|errno| i32::try_from(errno).ok()) {
            reason = format!("{reason}: {}", std::io::Error::from_raw_os_error(errno));
        }
        let place = self.disks.iter().position(|disk| disk.node() == device);
        if let Some(image) = place.and_then(|place| self.fleecing.get(place)) {
            reason = format!("{reason} (old data was kept in '{}')", image.volume);
        }
        GuestError::Broken { device: clean(device), reason }
    }

    /// Asks for the state. An access that is gone ended for this reason, if it is known.
    async fn poll(&self, session: &Session, why_gone: Option<&str>) -> Look {
        match backup::query(session).await {
            Ok(all) => {
                let target = target_id(&self.options.storage);
                match all.iter().find(|status| status.target_id == target) {
                    Some(status) => self.broken_device(status),
                    None => Look::Lost(ended_early(why_gone)),
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

/// As [`BackupAccess::lease_lost`]; never returns without an access.
async fn lease_lost(access: Option<&BackupAccess>) -> Arc<Error> {
    match access {
        Some(access) => access.lease_lost().await,
        None => std::future::pending().await,
    }
}

fn ended_early(reason: Option<&str>) -> GuestError {
    let reason = reason.map(|reason| format!(": {}", clean(reason))).unwrap_or_default();
    GuestError::Refused(format!("QEMU or somebody else ended the backup access{reason}."))
}
