// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that can read each block before it writes it, which fio cannot: without any filter that
//! is what capturing old data costs at least.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::{Bytes, BytesMut};
use provider_nbd::{Client, Options};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngCore, SeedableRng};
use tokio::task::JoinSet;

use crate::sample::Outcome;
use crate::stats::percentile;

const REQUEST_WITHIN: Duration = Duration::from_secs(100);
const MARGIN: Duration = Duration::from_secs(120);

/// What it does: each block once.
#[derive(Debug, Clone)]
pub struct Load {
    /// Read each block before it is written.
    pub read_first: bool,
    /// In sequence, not in random order.
    pub sequential: bool,
    /// Size of a request.
    pub block_bytes: u64,
    /// Requests in flight.
    pub depth: u32,
    /// Running time, unless all blocks are written before.
    pub seconds: u32,
    /// Same seed, same order.
    pub seed: u64,
}

struct Shared {
    client: Client,
    order: Vec<u32>,
    next: AtomicUsize,
    deadline: Instant,
    data: Bytes,
    load: Load,
}

impl Load {
    /// Runs it.
    ///
    /// # Errors
    /// A request fails.
    pub async fn run(&self, socket: &Path, export: &str) -> Result<Outcome> {
        let options = Options { timeout: Some(REQUEST_WITHIN), ..Options::default() };
        let client = Client::connect_unix(socket, export, options).await?;
        let order = self.order(client.size_bytes())?;
        let mut data = vec![0; self.block_bytes as usize];
        SmallRng::seed_from_u64(self.seed).fill_bytes(&mut data);
        let begin = Instant::now();
        let shared = Arc::new(Shared {
            client,
            order,
            next: AtomicUsize::new(0),
            deadline: begin + Duration::from_secs(self.seconds.into()),
            data: data.into(),
            load: self.clone(),
        });
        let mut tasks = JoinSet::new();
        for _ in 0..self.depth {
            let shared = Arc::clone(&shared);
            tasks.spawn(async move { shared.work().await });
        }
        let all = async {
            let mut latencies = Vec::new();
            while let Some(done) = tasks.join_next().await {
                latencies.extend(done.context("the load generator panicked")??);
            }
            anyhow::Ok(latencies)
        };
        let limit = Duration::from_secs(self.seconds.into()) + MARGIN;
        let latencies =
            tokio::time::timeout(limit, all).await.context("the load generator does not end")??;
        let took = begin.elapsed();
        shared.client.clone().disconnect().await.context("the load generator's connection")?;
        self.outcome(latencies, took)
    }

    fn order(&self, size_bytes: u64) -> Result<Vec<u32>> {
        let count = u32::try_from(size_bytes / self.block_bytes).context("too large a disk")?;
        let mut order: Vec<u32> = (0..count).collect();
        if !self.sequential {
            order.shuffle(&mut SmallRng::seed_from_u64(self.seed));
        }
        Ok(order)
    }

    fn outcome(&self, mut latencies: Vec<u64>, took: Duration) -> Result<Outcome> {
        latencies.sort_unstable();
        let ios = latencies.len() as u64;
        if ios == 0 {
            bail!("the load generator did nothing");
        }
        let us = |part: f64| percentile(&latencies, part).unwrap_or_default() as f64 / 1000.0;
        let total: u64 = latencies.iter().sum();
        Ok(Outcome {
            ios,
            writes: ios,
            bytes: ios * self.block_bytes,
            written_bytes: ios * self.block_bytes,
            seconds: took.as_secs_f64(),
            mean_us: total as f64 / ios as f64 / 1000.0,
            p99_us: us(0.99),
            p999_us: us(0.999),
        })
    }
}

impl Shared {
    /// One of the requests in flight: latencies in nanoseconds.
    async fn work(&self) -> Result<Vec<u64>> {
        let mut latencies = Vec::new();
        let mut buffer = BytesMut::with_capacity(self.data.len());
        loop {
            let begin = Instant::now();
            if begin >= self.deadline {
                break;
            }
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(block) = self.order.get(number) else { break };
            let offset = u64::from(*block) * self.load.block_bytes;
            if self.load.read_first {
                buffer.clear();
                buffer = self.client.read_into(offset, self.data.len(), buffer).await?;
            }
            self.client.write(offset, self.data.clone(), false).await?;
            latencies.push(u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX));
        }
        Ok(latencies)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(sequential: bool) -> Load {
        Load { read_first: true, sequential, block_bytes: 4096, depth: 1, seconds: 1, seed: 3 }
    }

    #[test]
    fn every_block_is_visited_once() {
        let mut order = load(false).order(4096 * 1000 + 5).unwrap();
        assert_ne!(order, load(true).order(4096 * 1000).unwrap());
        assert_eq!(order, load(false).order(4096 * 1000).unwrap());
        order.sort_unstable();
        assert_eq!(order, load(true).order(4096 * 1000).unwrap());
    }

    #[test]
    fn outcomes_sum_up() {
        let outcome = load(false).outcome(vec![3000, 1000], Duration::from_secs(2)).unwrap();
        assert_eq!((outcome.ios, outcome.written_bytes), (2, 8192));
        assert_eq!((outcome.mean_us, outcome.p99_us, outcome.seconds), (2.0, 3.0, 2.0));
        assert!(load(false).outcome(Vec::new(), Duration::from_secs(1)).is_err());
    }
}
