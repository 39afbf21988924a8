// SPDX-License-Identifier: MIT OR Apache-2.0
//! The backup access extension of QEMU: a frozen point in time of a running guest's disks.
//!
//! [`setup`], [`renew`], [`teardown`], [`query`], [`remove_bitmaps`], [`load_bitmap`] and
//! [`unload_bitmap`] are the bare commands. [`BackupAccess`] is a guard around the first three: it
//! renews the lease of its access, and is ended by `commit` or `abort`, and by a teardown as failure
//! when it is dropped.
//!
//! # After a crash of the host tool
//! An access outlives the process that set it up, if that is killed, until its lease is over; then
//! QEMU ends it as a failure. Whoever knows the target id and comes before finishes it:
//!
//! ```no_run
//! # async fn recover(was_committed: bool) -> qmp_client::Result<()> {
//! use qmp_client::{Options, Session, backup::BackupAccess};
//!
//! let session = Session::connect("/run/vm/100.qmp", Options::default()).await?;
//! if let Some(access) = BackupAccess::adopt(session, "store:100").await? {
//!     // Ask the store first: only a backup that is known to be committed was a success.
//!     if was_committed { access.commit().await? } else { access.abort().await? };
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Against a QEMU without the extension everything fails with [`Error::MissingFeature`].

mod access;
mod renewal;
mod types;

use std::time::Duration;

pub use access::BackupAccess;
pub use types::{
    AccessInfo, AccessState, AccessStatus, BitmapAction, BitmapMode, BrokenEvent, DelayBucket,
    Device, DeviceStatus, LoadBitmap, OnError, Readable, RemovedBitmap, SetupRequest,
    TeardownResult, TornDownEvent,
};

use crate::{Error, Result, Session, generated};

/// The extension as named in errors.
const FEATURE: &str = "the backup access extension (command backup-access-setup)";
/// How long [`setup`] waits. QEMU first waits for all guest I/O in flight, which has no bound.
const SETUP_TIMEOUT: Duration = Duration::from_secs(60);
/// How long [`renew`] waits.
const RENEW_TIMEOUT: Duration = Duration::from_secs(30);
/// QEMU waits up to the access's own timeout for its fleecing images; this comes on top of it.
const TEARDOWN_MARGIN: Duration = Duration::from_secs(60);
/// The lease of a [`BackupAccess`] whose request does not say another one, in seconds.
pub const DEFAULT_LEASE_S: u32 = 60;
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

/// Lets the lease of an access begin again. [`BackupAccess`] does that by itself.
///
/// # Errors
/// [`Error::MissingFeature`]; [`Error::Qmp`] if the target has no access, or one without a lease, or
/// one whose teardown has begun.
pub async fn renew(session: &Session, target: &str) -> Result<()> {
    renew_within(session, target, RENEW_TIMEOUT).await
}

async fn renew_within(session: &Session, target: &str, limit: Duration) -> Result<()> {
    let command = generated::backup_access_renew { target_id: target.to_owned() };
    session.execute_with_timeout(command, limit).await.map_err(explain)?;
    Ok(())
}

/// Removes the dirty bitmaps of a target, those of one device or of all disks; which ones. It is no
/// error if there are none.
///
/// # Errors
/// [`Error::MissingFeature`]; [`Error::Qmp`] if a bitmap is in use or its image is read-only
/// (nothing was removed then), or an image cannot remove its copy.
pub async fn remove_bitmaps(
    session: &Session,
    target: &str,
    device: Option<&str>,
) -> Result<Vec<RemovedBitmap>> {
    let command = generated::backup_access_bitmap_remove {
        target_id: target.to_owned(),
        device: device.map(str::to_owned),
    };
    let result = session.execute(command).await.map_err(explain)?;
    Ok(result.removed.into_iter().map(Into::into).collect())
}

/// Keeps the bitmap of a raw disk in a file, and takes over what the file has; whether it had a
/// bitmap. To be called before the guest starts.
///
/// # Errors
/// [`Error::MissingFeature`]; [`Error::Qmp`] if the file is not to be believed (QEMU crashed, or the
/// disk was changed since): the text says so, and the next backup must be a full one; also if the
/// disk was written to already, or cannot be used like this.
pub async fn load_bitmap(session: &Session, request: &LoadBitmap) -> Result<bool> {
    let result = session.execute(request.to_wire()).await.map_err(explain)?;
    Ok(result.loaded)
}

/// Seals the file of a disk's bitmap and lets the disk be deleted.
///
/// # Errors
/// [`Error::MissingFeature`]; [`Error::Qmp`] if no file is loaded, somebody may still write to the
/// disk, or the file cannot be written.
pub async fn unload_bitmap(session: &Session, device: &str, target: &str) -> Result<()> {
    let command = generated::backup_access_bitmap_unload {
        device: device.to_owned(),
        target_id: target.to_owned(),
    };
    session.execute(command).await.map(drop).map_err(explain)
}

/// The status of all accesses.
///
/// # Errors
/// [`Error::MissingFeature`] and those of every command.
pub async fn query(session: &Session) -> Result<Vec<AccessStatus>> {
    let status = session.execute(generated::query_backup_access {}).await.map_err(explain)?;
    Ok(status.into_iter().map(Into::into).collect())
}

/// The status of the access of a target; `None` if it has none.
///
/// # Errors
/// Those of [`query`].
pub async fn find(session: &Session, target: &str) -> Result<Option<AccessStatus>> {
    Ok(query(session).await?.into_iter().find(|status| status.target_id == target))
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
