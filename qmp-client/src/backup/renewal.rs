// SPDX-License-Identifier: MIT OR Apache-2.0
//! The task that renews the lease of an access.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use tracing::warn;

use super::renew_within;
use crate::{Error, Session};

/// How renewing stands.
#[derive(Debug, Clone)]
enum Standing {
    Good,
    /// The last renewal was not answered in time; the next one may be.
    Late(Arc<Error>),
    /// There will be no other renewal.
    Lost(Arc<Error>),
}

/// Renews the lease of an access until it is dropped.
#[derive(Debug)]
pub(super) struct Renewal {
    task: JoinHandle<()>,
    standing: watch::Receiver<Standing>,
}

impl Renewal {
    /// Starts to renew, three times per lease.
    pub(super) fn start(session: Session, target_id: String, lease_s: u32) -> Self {
        let (sender, standing) = watch::channel(Standing::Good);
        let lease = Duration::from_secs(lease_s.into());
        Self { task: tokio::spawn(keep_renewing(session, target_id, lease, sender)), standing }
    }

    /// Why the last renewal failed.
    pub(super) fn error(&self) -> Option<Arc<Error>> {
        match &*self.standing.borrow() {
            Standing::Good => None,
            Standing::Late(error) | Standing::Lost(error) => Some(Arc::clone(error)),
        }
    }

    /// Waits until there will be no other renewal.
    pub(super) async fn lost(&self) -> Arc<Error> {
        let mut standing = self.standing.clone();
        let lost = standing.wait_for(|standing| matches!(standing, Standing::Lost(_))).await;
        match lost.as_deref() {
            Ok(Standing::Lost(error)) => Arc::clone(error),
            // The task was dropped with its runtime.
            _ => Arc::new(Error::Disconnected),
        }
    }
}

impl Drop for Renewal {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep_renewing(
    session: Session,
    target_id: String,
    lease: Duration,
    standing: watch::Sender<Standing>,
) {
    let mut ticks = interval(lease / 3);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first one is due at once, and the lease has just begun.
    ticks.tick().await;
    loop {
        ticks.tick().await;
        // QEMU counts a renewal that it has received and not got round to, so it is not lost when
        // its answer is late.
        let (now, is_over) = match renew_within(&session, &target_id, lease).await {
            Ok(()) => (Standing::Good, false),
            Err(error) => {
                warn!(target_id, %error, "cannot renew the lease of a backup access");
                let is_late = error.is_timeout();
                let error = Arc::new(error);
                (if is_late { Standing::Late(error) } else { Standing::Lost(error) }, !is_late)
            }
        };
        standing.send_replace(now);
        if is_over {
            return;
        }
    }
}
