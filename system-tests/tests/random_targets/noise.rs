// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that never rests: requests in flight whenever disks are switched, in a part of the disk
//! that nobody compares.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use bytes::Bytes;
use provider_nbd::Client;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::JoinHandle;

const MAX_BYTES: u64 = 64 << 10;

/// The guest; ended when told to or dropped.
pub(super) struct Noise {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Result<u64>>,
}

impl Noise {
    /// Begins between these two offsets.
    pub(super) fn start(client: Client, seed: u64, start: u64, end: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            let mut rng = StdRng::seed_from_u64(!seed);
            let mut count = 0_u64;
            while !told.load(Ordering::Relaxed) {
                let offset = rng.random_range(start..end) / 512 * 512;
                let len = (rng.random_range(1..=MAX_BYTES) / 512 * 512).clamp(512, end - offset);
                if rng.random_bool(0.2) {
                    client.trim(offset, len).await?;
                } else {
                    let data = vec![count.to_le_bytes()[0]; usize::try_from(len)?];
                    client.write(offset, Bytes::from(data), false).await?;
                }
                count += 1;
            }
            Ok(count)
        });
        Self { stop, task }
    }

    /// Ends it; how many requests it made.
    pub(super) async fn stop(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        (&mut self.task).await?
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        self.task.abort();
    }
}
