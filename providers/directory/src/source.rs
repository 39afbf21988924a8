// SPDX-License-Identifier: MIT OR Apache-2.0
//! The snapshot of one disk, as its NBD export shows it.

use std::sync::atomic::{AtomicBool, Ordering};

use provider_api::{Access, BitmapMode, Error, Kind, Result, Volume};
use provider_nbd::{Client, Options, context};

use crate::areas::{Area, Work};
use crate::call::{corrupt, invalid};
use crate::limits::{CONNECTIONS, NBD_TIMEOUT, READ_BYTES, TRIM_BYTES};
use crate::store::Chunk;

/// The export of one disk.
#[derive(Debug)]
pub(crate) struct Source {
    client: Client,
    device: String,
    /// The context to ask which areas are dirty; none if all of the disk is looked at.
    bitmap_context: Option<String>,
    has_allocation: bool,
    trim_is_off: AtomicBool,
}

impl Source {
    /// Connects, and checks that the export is the disk that was announced.
    pub(crate) async fn connect(volume: &Volume) -> Result<Self> {
        let Access::Nbd { socket, export, bitmap } = &volume.access else {
            return Err(invalid(format!("Disk {} is not offered over NBD.", volume.device)));
        };
        let bitmap_context = match (volume.bitmap_mode, bitmap) {
            (BitmapMode::Reuse, Some(name)) => Some(context::dirty_bitmap(name)),
            (BitmapMode::Reuse, None) => {
                return Err(invalid(format!("Disk {} comes without its bitmap.", volume.device)));
            }
            _ => None,
        };
        let connect = |allocation: bool| {
            let base = allocation.then(|| context::BASE_ALLOCATION.to_owned());
            let options = Options {
                contexts: base.into_iter().chain(bitmap_context.clone()).collect(),
                connections: CONNECTIONS,
                // Zeroes are skipped by their extents; an error must not cost the connection.
                whole_reads: true,
                timeout: Some(NBD_TIMEOUT),
            };
            Client::connect_unix(socket, export, options)
        };
        let (client, has_allocation) = match connect(true).await {
            Err(provider_nbd::Error::ContextMissing { context: missing })
                if missing == context::BASE_ALLOCATION =>
            {
                (connect(false).await, false)
            }
            other => (other, true),
        };
        let client = client.map_err(|e| failed(&volume.device, "opened", e))?;
        if client.size_bytes() != volume.size_bytes {
            return Err(corrupt(format!(
                "The export of disk {} has {} bytes, the disk {}.",
                volume.device,
                client.size_bytes(),
                volume.size_bytes
            )));
        }
        Ok(Self {
            client,
            device: volume.device.clone(),
            bitmap_context,
            has_allocation,
            trim_is_off: AtomicBool::new(false),
        })
    }

    /// The areas of `window` to be looked at: the dirty ones, or all.
    pub(crate) async fn areas(&self, window: Area) -> Result<Vec<Area>> {
        match &self.bitmap_context {
            None => Ok(vec![window]),
            Some(name) => self.marked(name, window, context::DIRTY).await,
        }
    }

    /// The areas of `window` that are known to be zero.
    pub(crate) async fn zeroes(&self, window: Area) -> Result<Vec<Area>> {
        if self.has_allocation {
            self.marked(context::BASE_ALLOCATION, window, context::ZERO).await
        } else {
            Ok(Vec::new())
        }
    }

    async fn marked(&self, name: &str, window: Area, flag: u64) -> Result<Vec<Area>> {
        let mut extents = self.client.extents(name, window.start, window.length_bytes());
        let mut found = Vec::new();
        let failed = |e| failed(&self.device, "examined", e);
        while let Some(extent) = extents.next().await.map_err(failed)? {
            if extent.flags & flag != 0 {
                found.push(Area::new(extent.offset, extent.end().min(window.end)));
            }
        }
        Ok(found)
    }

    /// Reads the data of one piece of work, with all its requests in flight at once.
    pub(crate) async fn read(
        &self,
        work: &Work,
    ) -> Result<Vec<Chunk<impl AsRef<[u8]> + Send + 'static>>> {
        let pieces = work.runs.iter().flat_map(|run| &run.pieces).filter(|piece| !piece.is_zero);
        let reads = pieces.flat_map(|piece| piece.area.split(READ_BYTES)).map(|area| async move {
            let length = usize::try_from(area.length_bytes())
                .map_err(|_| invalid("A read is larger than the memory."))?;
            let data = self
                .client
                .read(area.start, length)
                .await
                .map_err(|e| failed(&self.device, "read", e))?;
            Ok::<_, Error>(Chunk { offset: area.start, data })
        });
        futures_util::future::try_join_all(reads).await
    }

    /// Tells the snapshot that what was stored is no longer needed. A saving, not a duty: after
    /// the first failure it is left. Returns that failure, once.
    pub(crate) async fn release(&self, work: &Work) -> Option<provider_nbd::Error> {
        for run in &work.runs {
            for area in run.area.split(TRIM_BYTES) {
                if self.trim_is_off.load(Ordering::Relaxed) {
                    return None;
                }
                if let Err(error) = self.client.trim(area.start, area.length_bytes()).await {
                    let was_off = self.trim_is_off.swap(true, Ordering::Relaxed);
                    return (!was_off).then_some(error);
                }
            }
        }
        None
    }

    /// Closes the connections. Failing to do so loses nothing.
    pub(crate) async fn close(self) {
        if let Err(error) = self.client.disconnect().await {
            tracing::debug!("Disk {}: closing its export failed: {error}", self.device);
        }
    }
}

fn failed(device: &str, what: &str, error: provider_nbd::Error) -> Error {
    let message = format!("The snapshot of disk {device} cannot be {what}: {error}.");
    Error::with_source(Kind::Io, message, error)
}
