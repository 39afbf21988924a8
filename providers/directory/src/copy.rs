// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies one disk from its snapshot into the archive.
//!
//! ```text
//! block status ─► work ─► read ─► zeroes, hash, write ─► release ─► checksums, progress
//!  (a window)     ╰──── many at once, memory bounded per guest ───╯   (in order)
//! ```

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use provider_api::{BitmapMode, Error, Kind, Progress, Result, Transferred, Volume};
use tokio::sync::Semaphore;

use crate::areas::{Area, Work, plan};
use crate::call::{blocking, corrupt, invalid};
use crate::chain::Chain;
use crate::checksums::{ChecksumWriter, Line};
use crate::image::Image;
use crate::limits::{BLOCKS_IN_FLIGHT, IN_FLIGHT_BYTES, WINDOW_BYTES};
use crate::manifest::{Disk, checksums_file, image_file};
use crate::source::Source;
use crate::store::store;

/// Unit of the memory budget; its semaphore counts in 32 bits.
const BUDGET_UNIT_BYTES: u64 = 4096;

/// The memory that the disks of one guest share.
#[derive(Debug, Clone)]
pub(crate) struct Budget(Arc<Semaphore>);

impl Budget {
    pub(crate) fn new() -> Self {
        let units = usize::try_from(IN_FLIGHT_BYTES / BUDGET_UNIT_BYTES).expect("a small number");
        Self(Arc::new(Semaphore::new(units)))
    }
}

/// What the tasks of one disk share.
#[derive(Debug)]
struct Copy {
    source: Source,
    image: Arc<Image>,
    budget: Budget,
    size_bytes: u64,
    /// Bytes found to be looked at so far.
    found_bytes: AtomicU64,
    /// Bytes that must be found in the end.
    expected_bytes: u64,
}

/// One piece of work, done.
struct Done {
    lines: Vec<Line>,
    looked_at_bytes: u64,
    moved: Transferred,
    trim_failure: Option<provider_nbd::Error>,
}

/// Copies one disk into `directory`. `base` is the chain that an increment builds upon.
pub(crate) async fn copy_disk(
    volume: &Volume,
    directory: &Path,
    base: Option<Chain>,
    budget: Budget,
    progress: &dyn Progress,
) -> Result<Disk> {
    let base = match volume.bitmap_mode {
        BitmapMode::Reuse => Some(base.ok_or_else(|| {
            invalid(format!(
                "Disk {} comes with a bitmap, but no archive that it could build upon was planned.",
                volume.device
            ))
        })?),
        BitmapMode::None | BitmapMode::New => None,
    };
    let expected_bytes = match (&base, volume.dirty_bytes) {
        (None, _) => volume.size_bytes,
        (Some(_), Some(bytes)) => bytes,
        (Some(_), None) => {
            return Err(invalid(format!(
                "Disk {} comes without the number of its dirty bytes.",
                volume.device
            )));
        }
    };
    let base_archive = base.as_ref().map(|chain| chain.top_archive().to_owned());
    log_start(volume, base_archive.as_deref(), expected_bytes, progress);

    let source = Source::connect(volume).await?;
    let (image, checksums) = create_files(volume, directory, base).await?;
    let copy = Arc::new(Copy {
        source,
        image: Arc::new(image),
        budget,
        size_bytes: volume.size_bytes,
        found_bytes: AtomicU64::new(0),
        expected_bytes,
    });
    let (transferred, checksums) = copy_all(&copy, volume, checksums, progress).await?;
    copy.check_sum(&volume.device)?;

    let Copy { source, image, .. } = Arc::into_inner(copy).ok_or_else(still_in_use)?;
    source.close().await;
    let image = Arc::into_inner(image).ok_or_else(still_in_use)?;
    let (file_size_bytes, checksums) =
        blocking(move || Ok((image.finish()?, checksums.finish()?))).await?;
    Ok(Disk {
        device: volume.device.clone(),
        size_bytes: volume.size_bytes,
        file_size_bytes,
        base: base_archive,
        generation: volume.generation.clone().filter(|_| volume.bitmap_mode != BitmapMode::None),
        bitmap_action: volume.bitmap_action.clone(),
        transferred,
        checksums,
    })
}

fn still_in_use() -> Error {
    Error::new(Kind::Other, "An image is still in use after its copy; this is a program error.")
}

fn log_start(volume: &Volume, base: Option<&str>, expected_bytes: u64, progress: &dyn Progress) {
    let device = &volume.device;
    let action = &volume.bitmap_action;
    progress.log(&match base {
        Some(base) => format!(
            "{device}: increment on {base}, {expected_bytes} of {} bytes are dirty",
            volume.size_bytes
        ),
        None => format!("{device}: full backup of {expected_bytes} bytes (bitmap: {action})"),
    });
}

async fn create_files(
    volume: &Volume,
    directory: &Path,
    base: Option<Chain>,
) -> Result<(Image, ChecksumWriter)> {
    let image_path = directory.join(image_file(&volume.device));
    let checksums_path = directory.join(checksums_file(&volume.device));
    let device = volume.device.clone();
    let size_bytes = volume.size_bytes;
    blocking(move || {
        let image = Image::create(&image_path, &device, size_bytes, base.as_ref())?;
        Ok((image, ChecksumWriter::create(&checksums_path)?))
    })
    .await
}

async fn copy_all(
    copy: &Arc<Copy>,
    volume: &Volume,
    mut checksums: ChecksumWriter,
    progress: &dyn Progress,
) -> Result<(Transferred, ChecksumWriter)> {
    let mut moved = Transferred::default();
    let device = &volume.device;
    progress.report(device, 0, copy.expected_bytes, 0);
    let done = works(Arc::clone(copy)).map(|work| perform(Arc::clone(copy), work));
    let mut done = Box::pin(done.buffered(BLOCKS_IN_FLIGHT));
    while let Some(step) = done.try_next().await? {
        moved.total_bytes += step.looked_at_bytes;
        moved.read_bytes += step.moved.read_bytes;
        moved.zero_bytes += step.moved.zero_bytes;
        moved.written_bytes += step.moved.written_bytes;
        checksums = checksums.add(step.lines).await?;
        if let Some(error) = step.trim_failure {
            progress.log(&format!(
                "{device}: what was stored cannot be released in the snapshot, going on: {error}"
            ));
        }
        progress.report(device, moved.total_bytes, copy.expected_bytes, moved.zero_bytes);
    }
    Ok((moved, checksums))
}

/// All work of a disk, window by window, so that only one window's extents are in memory.
fn works(copy: Arc<Copy>) -> impl Stream<Item = Result<Work>> + Send {
    stream::try_unfold((copy, 0, VecDeque::new()), async |(copy, mut start, mut waiting)| {
        loop {
            if let Some(work) = waiting.pop_front() {
                return Ok(Some((work, (copy, start, waiting))));
            }
            if start >= copy.size_bytes {
                return Ok(None);
            }
            let window = Area::new(start, copy.size_bytes.min(start + WINDOW_BYTES));
            waiting = copy.window(window).await?.into();
            start = window.end;
        }
    })
}

async fn perform(copy: Arc<Copy>, work: Result<Work>) -> Result<Done> {
    let work = work?;
    let data_bytes = work.data_bytes();
    let units = u32::try_from(data_bytes.div_ceil(BUDGET_UNIT_BYTES))
        .map_err(|_| invalid("A piece of work is larger than the memory budget."))?;
    let permit = Arc::clone(&copy.budget.0)
        .acquire_many_owned(units)
        .await
        .map_err(|e| Error::with_source(Kind::Other, "The memory budget is gone.", e))?;
    let chunks = copy.source.read(&work).await?;
    let image = Arc::clone(&copy.image);
    let (stored, work) = blocking(move || {
        let stored = store(&image, &work, &chunks)?;
        // The image is given back before the result: its last user must be able to close it.
        drop((image, chunks, permit));
        Ok((stored, work))
    })
    .await?;
    let trim_failure = copy.source.release(&work).await;
    Ok(Done {
        lines: stored.lines,
        looked_at_bytes: stored.zero_bytes + stored.written_bytes,
        moved: Transferred {
            total_bytes: 0,
            read_bytes: data_bytes,
            zero_bytes: stored.zero_bytes,
            written_bytes: stored.written_bytes,
        },
        trim_failure,
    })
}

impl Copy {
    async fn window(&self, window: Area) -> Result<Vec<Work>> {
        let areas = self.source.areas(window).await?;
        let (Some(first), Some(last)) = (areas.first(), areas.last()) else {
            return Ok(Vec::new());
        };
        let zeroes = self.source.zeroes(Area::new(first.start, last.end)).await?;
        let found: u64 = areas.iter().map(|area| area.length_bytes()).sum();
        self.found_bytes.fetch_add(found, Ordering::Relaxed);
        Ok(plan(&areas, &zeroes))
    }

    /// The bitmap may have been read wrongly, or be another one: then the archive would miss
    /// changes.
    fn check_sum(&self, device: &str) -> Result<()> {
        let found = self.found_bytes.load(Ordering::Relaxed);
        if found == self.expected_bytes {
            return Ok(());
        }
        Err(corrupt(format!(
            "The bitmap of disk {device} shows {found} dirty bytes, QEMU announced {}; the \
             increment would be wrong. Make a full backup.",
            self.expected_bytes
        )))
    }
}
