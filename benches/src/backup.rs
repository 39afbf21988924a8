// SPDX-License-Identifier: MIT OR Apache-2.0
//! One backup by a provider, with the calls and in the order that the host has.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use provider_api::{
    Access, BitmapMode, BitmapRequest, Call, GuestBackup, GuestInfo, GuestKind, JobInfo, Progress,
    Provider, Uuid, VmBackup, Volume, VolumeInfo,
};

use crate::source::Snapshot;

const DEVICE: &str = "scsi0";
const GUEST: u32 = 100;

/// What a backup brought.
#[derive(Debug, Clone, PartialEq)]
pub struct Made {
    /// From the start of the job to its end.
    pub seconds: f64,
    /// The archive's name.
    pub archive: String,
}

/// Takes what is reported, as cheaply as can be.
struct Silent;

impl Progress for Silent {
    fn report(&self, _device: &str, _done_bytes: u64, _total_bytes: u64, _zero_bytes: u64) {}
    fn log(&self, _line: &str) {}
}

/// Backs a snapshot up and commits. It must become an increment if that is `wanted`, else a full backup.
///
/// # Errors
/// The provider fails, wants another kind of backup, or did not look at all of it.
pub async fn back_up(
    provider: &dyn Provider,
    snapshot: &Snapshot,
    wanted: BitmapMode,
    start_time_s: i64,
) -> Result<Made> {
    let call = Call::default();
    let begin = Instant::now();
    let mut job = provider.start_job(JobInfo { start_time_s }, &call).await?;
    let info = GuestInfo { kind: GuestKind::Qemu, id: GUEST, name: None, start_time_s };
    let mut guest = job.start_guest(info, &call).await?;
    let archive = match copy(guest.as_mut(), snapshot, wanted, start_time_s).await {
        Ok(()) => guest.commit(Uuid::new_v4(), &call).await?.archive,
        Err(error) => {
            guest.abort("the copy failed", &call).await?;
            job.finish(&call).await?;
            return Err(error);
        }
    };
    job.finish(&call).await?;
    Ok(Made { seconds: begin.elapsed().as_secs_f64(), archive })
}

async fn copy(
    guest: &mut dyn GuestBackup,
    snapshot: &Snapshot,
    wanted: BitmapMode,
    start_time_s: i64,
) -> Result<()> {
    let call = Call::default();
    let size_bytes = snapshot.size_bytes;
    let info = VolumeInfo { device: DEVICE.to_owned(), size_bytes, volume_id: None };
    let requests = guest.plan_volumes(&[info], &call).await?;
    let is_increment = wanted == BitmapMode::Reuse;
    ensure!(
        matches!(requests[..], [BitmapRequest::Use { .. }]) == is_increment,
        "it wants {requests:?}, but {wanted:?} was to be measured"
    );
    let expected = if is_increment {
        snapshot.dirty_bytes.context("nothing was changed")?
    } else {
        size_bytes
    };
    let access = Access::Nbd {
        socket: snapshot.socket.clone(),
        export: snapshot.export().to_owned(),
        bitmap: Some(snapshot.bitmap().to_owned()),
    };
    let volume = Volume {
        device: DEVICE.to_owned(),
        size_bytes,
        access,
        bitmap_mode: wanted,
        bitmap_action: if is_increment { "used" } else { "new" }.to_owned(),
        generation: Some(format!("generation-{start_time_s}")),
        dirty_bytes: Some(expected),
    };
    let config = b"name: bench\n".to_vec();
    let backup = VmBackup { config, firewall: None, volumes: vec![volume] };
    let moved = guest.backup_vm(backup, &Silent, &call).await?;
    let looked_at = moved.total_bytes;
    ensure!(looked_at == expected, "it looked at {looked_at} of {expected} bytes");
    Ok(())
}

/// What a file, or all files in a folder, take on the disk.
///
/// # Errors
/// It cannot be read.
pub fn stored_bytes(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let meta = path.symlink_metadata().with_context(|| format!("no {}", path.display()))?;
    let mut bytes = meta.blocks() * 512;
    if meta.is_dir() {
        for entry in std::fs::read_dir(path)? {
            bytes += stored_bytes(&entry?.path())?;
        }
    }
    Ok(bytes)
}
