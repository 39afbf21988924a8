// SPDX-License-Identifier: MIT OR Apache-2.0
//! The backup access extension of QEMU: a frozen point in time of a running guest's disks.
//!
//! [`setup`], [`teardown`] and [`query`] are the bare commands. [`BackupAccess`] is a guard around
//! them: it is ended by `commit` or `abort`, and by a teardown as failure when it is dropped.
//!
//! Against a QEMU without the extension everything fails with [`Error::MissingFeature`].

mod access;
mod types;

use std::time::Duration;

pub use access::BackupAccess;
pub use types::{
    AccessInfo, AccessState, AccessStatus, BitmapAction, BitmapMode, BrokenEvent, DelayBucket,
    Device, DeviceStatus, OnError, SetupRequest, TeardownResult,
};

use crate::{Error, Result, Session, generated};

/// The extension as named in errors.
const FEATURE: &str = "the backup access extension (command backup-access-setup)";
/// How long [`setup`] waits. QEMU first waits for all guest I/O in flight, which has no bound.
const SETUP_TIMEOUT: Duration = Duration::from_secs(60);
/// QEMU waits up to the access's own timeout for its fleecing images; this comes on top of it.
const TEARDOWN_MARGIN: Duration = Duration::from_secs(60);
/// QEMU's default for the timeout of an access.
const DEFAULT_ACCESS_TIMEOUT_S: u32 = 45;

/// Starts an access: returns one object per device, in the order of the request.
///
/// After [`Error::Timeout`] and [`Error::Disconnected`], or when the future is dropped, the access
/// may exist or come to exist: end it with [`teardown`], or use [`BackupAccess::setup`], which
/// sees to that.
///
/// # Errors
/// [`Error::MissingFeature`]; [`Error::Qmp`] if QEMU refuses (nothing has changed then).
pub async fn setup(session: &Session, request: &SetupRequest) -> Result<Vec<AccessInfo>> {
    let infos =
        session.execute_with_timeout(request.to_wire(), SETUP_TIMEOUT).await.map_err(explain)?;
    checked(request, infos)
}

/// Ends an access. May be repeated: an access that does not exist is no error.
///
/// # Errors
/// [`Error::MissingFeature`]; [`Error::Qmp`] if requests hang in a fleecing image or a foreign node
/// uses a snapshot node: the access stays and a later teardown may succeed.
pub async fn teardown(session: &Session, target: &str, success: bool) -> Result<TeardownResult> {
    let command = generated::backup_access_teardown { target_id: target.to_owned(), success };
    let limit = teardown_limit(DEFAULT_ACCESS_TIMEOUT_S);
    let result = session.execute_with_timeout(command, limit).await.map_err(explain)?;
    Ok(result.into())
}

/// The status of all accesses.
///
/// # Errors
/// [`Error::MissingFeature`] and those of every command.
pub async fn query(session: &Session) -> Result<Vec<AccessStatus>> {
    let status = session.execute(generated::query_backup_access {}).await.map_err(explain)?;
    Ok(status.into_iter().map(Into::into).collect())
}

fn explain(error: Error) -> Error {
    error.or_missing(FEATURE)
}

fn teardown_limit(access_timeout_s: u32) -> Duration {
    Duration::from_secs(access_timeout_s.into()) + TEARDOWN_MARGIN
}

/// The reply must match the request: callers pair the two by position.
fn checked(
    request: &SetupRequest,
    infos: Vec<generated::BackupAccessInfo>,
) -> Result<Vec<AccessInfo>> {
    let asked = request.devices.iter().map(|device| &device.device);
    if !asked.eq(infos.iter().map(|info| &info.device)) {
        let detail = "the result does not list the devices of the request";
        return Err(Error::protocol("backup-access-setup", detail));
    }
    Ok(infos.into_iter().map(Into::into).collect())
}
