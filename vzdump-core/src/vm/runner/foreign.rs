// SPDX-License-Identifier: MIT OR Apache-2.0
//! Before QEMU is started: bitmaps that missed writes to their disk are not believed.

use super::RunnerError;
use crate::config::guest::{DiskEntry, VmConfig};
use crate::storage::{StorageSet, distrust_bitmaps};
use crate::tools::Tools;

/// Has QEMU drop the bitmaps of disks that somebody has written while it did not run; a sentence for each of them. Of
/// `only` these disks, or of all.
///
/// # Errors
/// [`RunnerError::Bitmaps`].
pub(super) async fn distrust_written(
    tools: &Tools,
    storages: &StorageSet,
    id: u32,
    config: &VmConfig,
    only: Option<&[String]>,
) -> Result<Vec<String>, RunnerError> {
    let mut notices = Vec::new();
    let is_wanted = |disk: &DiskEntry| only.is_none_or(|keys| keys.contains(&disk.key));
    for disk in config.disks()?.into_iter().filter(|disk| !disk.is_cdrom && is_wanted(disk)) {
        // One that cannot be found is told, with its reason, by whoever needs it.
        let (Ok(image), Ok(Some(data))) =
            (storages.resolve(&disk.volume), storages.resolve_data(&disk.volume))
        else {
            continue;
        };
        let is_written = distrust_bitmaps(tools, image, data).await;
        if is_written.map_err(|source| RunnerError::Bitmaps { id, source })? {
            notices.push(format!(
                "the data of the disk '{}' was changed while its QEMU did not run: its bitmaps are \
                 dropped, and the next backup reads all of it",
                disk.key
            ));
        }
    }
    Ok(notices)
}
