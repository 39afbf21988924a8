// SPDX-License-Identifier: MIT OR Apache-2.0
//! The backup client: reads an export in sequence, 1 MiB at a time, four in flight.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::BytesMut;
use provider_nbd::{Client, Options};
use tokio::task::JoinSet;

const PIECE_BYTES: u64 = 1 << 20;
const IN_FLIGHT: usize = 4;
const STOP_WITHIN: Duration = Duration::from_secs(30);
/// QEMU's default for a write that waits for the fleecing image is 45 s.
const REQUEST_WITHIN: Duration = Duration::from_secs(100);

/// A client that reads until it is stopped, again and again; with trimming, once.
#[derive(Debug)]
pub struct Reader {
    tasks: JoinSet<Result<()>>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    client: Client,
    next: AtomicU64,
    done_bytes: AtomicU64,
    begin: Instant,
    bytes_per_second: Option<u64>,
    trims: bool,
    stopped: std::sync::atomic::AtomicBool,
}

impl Reader {
    /// Starts it.
    ///
    /// # Errors
    /// There is no such export.
    pub async fn start(
        socket: &Path,
        export: &str,
        bytes_per_second: Option<u64>,
        trims: bool,
    ) -> Result<Self> {
        let options = Options { timeout: Some(REQUEST_WITHIN), ..Options::default() };
        let client = Client::connect_unix(socket, export, options).await?;
        let trims = trims && client.flags().can_trim;
        let shared = Arc::new(Shared {
            client,
            next: AtomicU64::new(0),
            done_bytes: AtomicU64::new(0),
            begin: Instant::now(),
            bytes_per_second,
            trims,
            stopped: false.into(),
        });
        let mut tasks = JoinSet::new();
        for _ in 0..IN_FLIGHT {
            let shared = Arc::clone(&shared);
            tasks.spawn(async move { shared.work().await });
        }
        Ok(Self { tasks, shared })
    }

    /// What it has read so far.
    #[must_use]
    pub fn done_bytes(&self) -> u64 {
        self.shared.done_bytes.load(Ordering::Relaxed)
    }

    /// Stops it.
    ///
    /// # Errors
    /// A read failed.
    pub async fn stop(mut self) -> Result<()> {
        self.shared.stopped.store(true, Ordering::Relaxed);
        let all = async {
            while let Some(done) = self.tasks.join_next().await {
                done.context("the backup client panicked")?.context("the backup client failed")?;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(STOP_WITHIN, all)
            .await
            .context("the backup client does not end")??;
        // QEMU does not survive a connected client when it moves its node to another thread.
        self.shared.client.clone().disconnect().await.context("the backup client's connection")
    }
}

impl Shared {
    async fn work(&self) -> Result<()> {
        let count = self.client.size_bytes() / PIECE_BYTES;
        let mut buffer = BytesMut::with_capacity(PIECE_BYTES as usize);
        while !self.stopped.load(Ordering::Relaxed) && count > 0 {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if self.trims && number >= count {
                break;
            }
            if let Some(rate) = self.bytes_per_second {
                let due = Duration::from_secs_f64((number * PIECE_BYTES) as f64 / rate as f64);
                tokio::time::sleep(due.saturating_sub(self.begin.elapsed())).await;
            }
            let offset = number % count * PIECE_BYTES;
            buffer.clear();
            buffer = self.client.read_into(offset, PIECE_BYTES as usize, buffer).await?;
            self.done_bytes.fetch_add(PIECE_BYTES, Ordering::Relaxed);
            if self.trims {
                self.client.trim(offset, PIECE_BYTES).await?;
            }
        }
        Ok(())
    }
}
