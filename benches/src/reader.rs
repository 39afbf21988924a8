// SPDX-License-Identifier: MIT OR Apache-2.0
//! The backup client: reads an export in sequence, 1 MiB at a time, four in flight.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::BytesMut;
use provider_nbd::{Client, Options};
use tokio::task::JoinSet;

const PIECE_BYTES: u64 = 1 << 20;
const IN_FLIGHT: usize = 4;
const PROBE_BYTES: usize = 4096;
const STOP_WITHIN: Duration = Duration::from_secs(30);
/// QEMU's default for a write that waits for the fleecing image is 45 s.
const REQUEST_WITHIN: Duration = Duration::from_secs(100);

/// A client that reads until it is stopped, again and again, or once.
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
    ended: OnceLock<Instant>,
    begin: Instant,
    bytes_per_second: Option<u64>,
    once: bool,
    trims: bool,
    stopped: std::sync::atomic::AtomicBool,
}

impl Reader {
    /// Starts it. If it `releases`, it reads everything once and releases what it has read; an export that
    /// cannot be released from, as a plain disk's, it reads once as well.
    ///
    /// # Errors
    /// There is no such export.
    pub async fn start(
        socket: &Path,
        export: &str,
        bytes_per_second: Option<u64>,
        releases: bool,
    ) -> Result<Self> {
        let client = connect(socket, export).await?;
        let trims = releases && client.flags().can_trim;
        let shared = Arc::new(Shared {
            client,
            next: AtomicU64::new(0),
            done_bytes: AtomicU64::new(0),
            ended: OnceLock::new(),
            begin: Instant::now(),
            bytes_per_second,
            once: releases,
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

    /// When it had read everything, if it reads once.
    #[must_use]
    pub fn ended(&self) -> Option<Instant> {
        self.shared.ended.get().copied()
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

/// Fails if an export cannot be read any more, as that of a snapshot that broke.
///
/// # Errors
/// It cannot.
pub async fn probe(socket: &Path, export: &str) -> Result<()> {
    let client = connect(socket, export).await?;
    client.read(0, PROBE_BYTES).await?;
    client.disconnect().await?;
    Ok(())
}

async fn connect(socket: &Path, export: &str) -> Result<Client> {
    let options = Options { timeout: Some(REQUEST_WITHIN), ..Options::default() };
    Ok(Client::connect_unix(socket, export, options).await?)
}

impl Shared {
    async fn work(&self) -> Result<()> {
        let count = self.client.size_bytes() / PIECE_BYTES;
        let mut buffer = BytesMut::with_capacity(PIECE_BYTES as usize);
        while !self.stopped.load(Ordering::Relaxed) && count > 0 {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if self.once && number >= count {
                break;
            }
            if let Some(rate) = self.bytes_per_second {
                let due = Duration::from_secs_f64((number * PIECE_BYTES) as f64 / rate as f64);
                tokio::time::sleep(due.saturating_sub(self.begin.elapsed())).await;
            }
            let offset = number % count * PIECE_BYTES;
            buffer.clear();
            buffer = self.client.read_into(offset, PIECE_BYTES as usize, buffer).await?;
            let before = self.done_bytes.fetch_add(PIECE_BYTES, Ordering::Relaxed);
            if self.once && before + PIECE_BYTES == count * PIECE_BYTES {
                self.ended.get_or_init(Instant::now);
            }
            if self.trims {
                self.client.trim(offset, PIECE_BYTES).await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use provider_nbd::Errno;
    use provider_nbd::server::{Export, ExportFuture, Refusal, Server};

    const PIECES: u64 = 3;

    /// A disk that cannot be released from; a broken one cannot be read either.
    struct Disk {
        is_broken: bool,
    }

    impl Export for Disk {
        fn size_bytes(&self) -> u64 {
            PIECES * PIECE_BYTES
        }

        fn read(&self, _offset: u64, len: usize) -> ExportFuture<'_, Bytes> {
            let broken = || Refusal::new(Errno::EIO, "the snapshot is broken");
            let answer = (!self.is_broken).then(|| Bytes::from(vec![7; len])).ok_or_else(broken);
            Box::pin(std::future::ready(answer))
        }
    }

    fn serve(folder: &Path, is_broken: bool) -> Server {
        let disk: Arc<dyn Export> = Arc::new(Disk { is_broken });
        Server::listen(folder.join("nbd"), [("reader", disk)]).unwrap()
    }

    /// Waits until something is so.
    async fn until(is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_so() {
            assert!(Instant::now() < deadline, "not within a minute");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn a_reader_that_releases_reads_once_what_cannot_be_released() {
        let folder = tempfile::tempdir().unwrap();
        let server = serve(folder.path(), false);
        let once = Reader::start(server.socket(), "reader", None, true).await.unwrap();
        let again = Reader::start(server.socket(), "reader", None, false).await.unwrap();
        until(|| once.ended().is_some()).await;
        until(|| again.done_bytes() >= 3 * PIECES * PIECE_BYTES).await;
        assert_eq!(again.ended(), None);
        assert_eq!(once.done_bytes(), PIECES * PIECE_BYTES);
        once.stop().await.unwrap();
        again.stop().await.unwrap();
    }

    #[tokio::test]
    async fn one_read_tells_whether_a_snapshot_is_broken() {
        for is_broken in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let server = serve(folder.path(), is_broken);
            assert_eq!(probe(server.socket(), "reader").await.is_err(), is_broken);
        }
    }
}
