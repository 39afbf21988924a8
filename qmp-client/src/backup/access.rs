// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guard around one access.
//!
//! QEMU executes the commands of a connection in order, so the guard relies on the order in which
//! commands are queued: a teardown queued by `drop` comes before every later command of the
//! session, and never meets a later access of the same target.
//!
//! When the connection breaks, nothing can be sent, and nothing is renewed: the access ends when its
//! lease is over, unless someone calls `teardown` before.

use std::{sync::Arc, time::Duration};

use tokio::{runtime::Handle, sync::oneshot, task::JoinHandle, time::timeout};
use tracing::{info, warn};

use super::{
    AccessInfo, AccessStatus, DEFAULT_ACCESS_TIMEOUT_S, DEFAULT_LEASE_S, SETUP_TIMEOUT,
    SetupRequest, TeardownResult, checked, explain, find, renew, renewal::Renewal, teardown_limit,
};
use crate::{Error, Result, Session, generated, session::Urgent};

const SETUP: &str = "backup-access-setup";
/// A setup whose caller gave up is followed for this long, to undo it if it succeeds after all.
const SETUP_OUTCOME_LIMIT: Duration = Duration::from_secs(15 * 60);

/// An active access. End it with [`Self::commit`] or [`Self::abort`]; dropping it ends it as a
/// failure, as far as the connection allows.
#[derive(Debug)]
#[must_use = "dropping it ends the access as a failure"]
pub struct BackupAccess {
    session: Session,
    target_id: String,
    infos: Vec<AccessInfo>,
    teardown_limit: Duration,
    /// None without a lease, and once a teardown was begun.
    renewal: Option<Renewal>,
    ended: bool,
}

impl BackupAccess {
    /// Starts an access and waits up to a minute for it. It has a lease, of
    /// [`DEFAULT_LEASE_S`] seconds unless the request says another one, which a task in the
    /// background renews three times as often as needed.
    ///
    /// When this fails or its future is dropped, no access of this call stays: if QEMU grants it
    /// later, it is ended from a task in the background. Until that has happened a new setup for
    /// the same target is refused.
    ///
    /// # Errors
    /// [`Error::MissingFeature`]; [`Error::Qmp`] if QEMU refuses; [`Error::Timeout`].
    pub async fn setup(session: Session, request: SetupRequest) -> Result<Self> {
        Self::setup_with_timeout(session, request, SETUP_TIMEOUT).await
    }

    /// As [`Self::setup`], with a limit. A guest that is frozen for the setup stays frozen for so
    /// long.
    ///
    /// # Errors
    /// As [`Self::setup`].
    pub async fn setup_with_timeout(
        session: Session,
        mut request: SetupRequest,
        limit: Duration,
    ) -> Result<Self> {
        request.lease_s.get_or_insert(DEFAULT_LEASE_S);
        let command = request.to_wire();
        let reply = session.start_urgent(&command)?;
        let (sender, receiver) = oneshot::channel();
        tokio::spawn(finish_setup(session, request, reply, sender));
        timeout(limit, receiver)
            .await
            .map_err(|_elapsed| Error::timeout(SETUP, limit))?
            .unwrap_or(Err(Error::Disconnected))
    }

    /// Takes over the access of a target that an earlier process set up and did not end, for
    /// example because it was killed; `None` if there is none.
    ///
    /// Nothing in QEMU changes by this but that the lease, if the access has one, begins again; it
    /// is renewed from then on. The guard is as that of a setup: dropped, it ends the
    /// access as a failure. Its [`Self::infos`] are empty, because QEMU does not repeat them;
    /// [`Self::status`] has the snapshot nodes, whose exports are still there. Which generation the
    /// access has only the earlier process knew.
    ///
    /// [`Self::commit`] if the backup is known to be committed, else [`Self::abort`]: then the
    /// bitmaps keep all changes since the last committed backup, and the next one is larger than
    /// need be but never wrong.
    ///
    /// # Errors
    /// Those of [`super::query`].
    pub async fn adopt(session: Session, target_id: impl Into<String>) -> Result<Option<Self>> {
        let target_id = target_id.into();
        let Some(status) = find(&session, &target_id).await? else { return Ok(None) };
        let mut renewal = None;
        if status.lease_left_s.is_some() {
            match renew(&session, &target_id).await {
                // Only now QEMU says how long it is.
                Ok(()) => {
                    let Some(status) = find(&session, &target_id).await? else { return Ok(None) };
                    renewal = status
                        .lease_left_s
                        .filter(|&seconds| seconds > 0)
                        .map(|seconds| Renewal::start(session.clone(), target_id.clone(), seconds));
                }
                // Its teardown has begun: all that can be done is to end it.
                Err(Error::Qmp { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Some(Self {
            session,
            target_id,
            infos: Vec::new(),
            // QEMU does not tell the access's own: a teardown that takes longer can be repeated.
            teardown_limit: teardown_limit(DEFAULT_ACCESS_TIMEOUT_S),
            renewal,
            ended: false,
        }))
    }

    /// What setup returned, in the order of the request; empty after [`Self::adopt`].
    #[must_use]
    pub fn infos(&self) -> &[AccessInfo] {
        &self.infos
    }

    /// The target.
    #[must_use]
    pub fn target_id(&self) -> &str {
        &self.target_id
    }

    /// The session it lives on.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Why the last renewal of the lease failed; `None` if it did not, or there is no lease.
    #[must_use]
    pub fn renewal_error(&self) -> Option<Arc<Error>> {
        self.renewal.as_ref()?.error()
    }

    /// Returns when the lease cannot be renewed any more, with the reason: the access is gone or
    /// about to end, or the connection is. Never returns otherwise, nor without a lease. That QEMU
    /// answers late is not final; see [`Self::renewal_error`]. Safe to cancel.
    pub async fn lease_lost(&self) -> Arc<Error> {
        match &self.renewal {
            Some(renewal) => renewal.lost().await,
            None => std::future::pending().await,
        }
    }

    /// Its present status; `None` if it is gone.
    ///
    /// # Errors
    /// Those of every command.
    pub async fn status(&self) -> Result<Option<AccessStatus>> {
        find(&self.session, &self.target_id).await
    }

    /// Ends the access after the backup was committed. Goes on when the future is dropped.
    ///
    /// # Errors
    /// Those of [`super::teardown`], which is also the way to try again: with `success`, because
    /// the backup stays committed.
    pub async fn commit(self) -> Result<TeardownResult> {
        self.end(true).await
    }

    /// Ends the access as a failure. Goes on when the future is dropped.
    ///
    /// # Errors
    /// Those of [`super::teardown`], which is also the way to try again.
    pub async fn abort(self) -> Result<TeardownResult> {
        self.end(false).await
    }

    async fn end(mut self, success: bool) -> Result<TeardownResult> {
        self.begin_teardown(success)?
            .await
            // The task does not panic: it was dropped with its runtime.
            .unwrap_or(Err(Error::Disconnected))
    }

    /// Queues the teardown now; the task holds the session open until it is answered.
    fn begin_teardown(&mut self, success: bool) -> Result<JoinHandle<Result<TeardownResult>>> {
        self.ended = true;
        self.renewal = None;
        let reply = self.queue_teardown(success)?;
        let limit = self.teardown_limit;
        Ok(tokio::spawn(finish_teardown(reply, limit)))
    }

    fn queue_teardown(&self, success: bool) -> Result<Urgent> {
        let target_id = self.target_id.clone();
        self.session.start_urgent(&generated::backup_access_teardown { target_id, success })
    }
}

impl Drop for BackupAccess {
    fn drop(&mut self) {
        self.renewal = None;
        if self.ended {
            return;
        }
        let target = self.target_id.clone();
        if Handle::try_current().is_err() {
            // Nobody can wait for the reply, but the writer's runtime may still send it.
            if let Err(error) = self.queue_teardown(false) {
                warn!(target_id = target, %error, "cannot end a dropped backup access");
            }
            return;
        }
        match self.begin_teardown(false) {
            Ok(task) => drop(tokio::spawn(async move {
                match task.await {
                    Ok(Ok(_)) => info!(target_id = target, "ended a dropped backup access"),
                    Ok(Err(error)) => {
                        warn!(target_id = target, %error, "cannot end a dropped backup access");
                    }
                    Err(_) => {}
                }
            })),
            Err(error) => {
                warn!(target_id = target, %error, "cannot end a dropped backup access");
            }
        }
    }
}

async fn finish_teardown(reply: Urgent, limit: Duration) -> Result<TeardownResult> {
    let result: generated::BackupAccessTeardownResult =
        reply.finish(limit).await.map_err(explain)?;
    Ok(result.into())
}

/// Follows a setup to its end, whether or not its caller still waits: the guard is made here, so
/// that a caller that has gone drops it.
async fn finish_setup(
    session: Session,
    request: SetupRequest,
    reply: Urgent,
    caller: oneshot::Sender<Result<BackupAccess>>,
) {
    let mut guard = BackupAccess {
        session,
        target_id: request.target_id.clone(),
        infos: Vec::new(),
        teardown_limit: teardown_limit(request.longest_timeout_s()),
        renewal: None,
        ended: false,
    };
    let outcome = match reply.finish(SETUP_OUTCOME_LIMIT).await {
        Ok(infos) => match checked(&request, infos) {
            Ok(infos) => {
                guard.infos = infos;
                let lease_s = request.lease_s.filter(|&seconds| seconds > 0);
                guard.renewal = lease_s.map(|seconds| {
                    Renewal::start(guard.session.clone(), guard.target_id.clone(), seconds)
                });
                Ok(guard)
            }
            // There is an access: the guard ends it.
            Err(error) => Err(error),
        },
        // The reply was a success that cannot be read, or none came: the guard ends what is there.
        Err(error @ (Error::Protocol { .. } | Error::Timeout { .. })) => Err(error),
        Err(error) => {
            // QEMU refused: an access of this target, if there is one, belongs to someone else.
            guard.ended = true;
            Err(explain(error))
        }
    };
    if let Err(Err(error)) = caller.send(outcome) {
        warn!(target_id = request.target_id, %error, "a setup nobody waits for failed");
    }
}
