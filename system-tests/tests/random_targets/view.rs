// SPDX-License-Identifier: MIT OR Apache-2.0
//! One snapshot as a backup client sees it, the copy that is made from it, and what is left of that
//! for the next backup.

use std::ops::Range;

use anyhow::{Context as _, Result, ensure};
use provider_nbd::{Client, Errno, context};
use serde_json::{Value, json};
use system_tests::storage::{Connection, LIMIT, Storage, refused};

use super::model::{Disk, SECTOR, decode};
use super::{DISKS, KNOWN_BYTES, fleecing};

const GRANULE: u64 = 4096;
const READ_BYTES: u64 = 1 << 20;

/// What a target keeps of a disk between backups.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// The byte of each sector in its last committed backup.
    copy: Option<Vec<u8>>,
    generation: Option<String>,
    /// Whether QEMU's bitmap covers what changed since.
    valid: bool,
}

impl Chain {
    /// A device of a request: most times with the bitmap.
    pub(super) fn device(&self, target: usize, disk: usize, mode: u32) -> Value {
        let mut device = json!({ "device": DISKS[disk], "fleecing": fleecing(target, disk) });
        match mode {
            0 => device["bitmap-mode"] = json!("none"),
            1 => device["bitmap-mode"] = json!("new"),
            2 => {}
            _ => {
                device["bitmap-mode"] = json!("use");
                if let Some(generation) = &self.generation {
                    device["generation"] = json!(generation);
                }
            }
        }
        device
    }
}

/// A snapshot that is exported and read.
pub(super) struct View {
    pub(super) disk: usize,
    client: Option<Client>,
    /// What it must show.
    at: Disk,
    /// What of the known part may be read: what changed, and was not released.
    readable: Vec<bool>,
    /// Becomes the copy of this backup, if it has a bitmap.
    copy: Vec<Option<u8>>,
    generation: Option<String>,
    action: String,
}

impl View {
    pub(super) async fn open(
        storage: &Storage,
        disk: usize,
        info: &Value,
        at: Disk,
        chain: &mut Chain,
    ) -> Result<Self> {
        let action = info["bitmap-action"].as_str().context("no action")?.to_owned();
        let generation = info["generation"].as_str().map(str::to_owned);
        let export = storage.export_snapshot(info).await?;
        let bitmap = info["bitmap-name"].as_str().map(context::dirty_bitmap);
        let contexts: Vec<&str> = bitmap.iter().map(String::as_str).collect();
        let connection = Connection { contexts: &contexts, timeout: LIMIT };
        let client = storage.client_with(&export, connection).await?;
        let granules = KNOWN_BYTES.div_ceil(GRANULE) as usize;
        let mut readable = vec![bitmap.is_none(); granules];
        if let Some(bitmap) = &bitmap {
            let mut extents = client.extents(bitmap, 0, KNOWN_BYTES);
            while let Some(extent) = extents.next().await? {
                if extent.flags & context::DIRTY != 0 {
                    readable[granules_of(extent.offset, extent.len)].fill(true);
                }
            }
        }
        let used = action == "used";
        // A bitmap that does not fit is replaced, and is worth what this backup becomes.
        if generation.is_some() {
            let asked_for = info_asks_for_use(&action);
            ensure!(!asked_for || used == chain.valid, "{action}, but valid is {}", chain.valid);
        }
        if used {
            check_coverage(&at, chain, &readable)?;
        } else {
            ensure!(readable.iter().all(|&readable| readable), "something is clean: {action}");
        }
        if action != "not-used" && !used {
            chain.valid = false;
        }
        let base = chain.copy.iter().filter(|_| used).flatten().map(|&byte| Some(byte));
        let mut copy: Vec<Option<u8>> = base.collect();
        copy.resize((KNOWN_BYTES / SECTOR) as usize, None);
        Ok(Self { disk, client: Some(client), at, readable, copy, generation, action })
    }

    pub(super) fn is_increment(&self) -> bool {
        self.action == "used"
    }

    fn client(&self) -> Result<&Client> {
        self.client.as_ref().context("it is disconnected")
    }

    /// Reads a range, or what of it may be read, and compares; the rest is refused.
    pub(super) async fn read(&mut self, offset: u64, len: u64) -> Result<()> {
        let granules = granules_of(offset, len);
        if self.readable[granules.clone()].iter().all(|&readable| readable) {
            return self.take(offset, len).await;
        }
        if self.readable[granules.clone()].iter().any(|&readable| readable) {
            return self.take_readable(granules).await;
        }
        refused(self.client()?, Errno::EPERM, offset, len).await
    }

    async fn take(&mut self, offset: u64, len: u64) -> Result<()> {
        let data = self.client()?.read(offset, usize::try_from(len)?).await?;
        self.at.check_and_settle(offset, &data)?;
        let sectors = self.copy.iter_mut().skip((offset / SECTOR) as usize);
        for (kept, value) in sectors.zip(decode(offset, &data)?) {
            *kept = Some(value);
        }
        Ok(())
    }

    /// Reads what may be read of some granules, run by run.
    async fn take_readable(&mut self, granules: Range<usize>) -> Result<()> {
        let mut at = granules.start;
        while at < granules.end {
            let run = self.readable[at..granules.end].iter().take_while(|&&r| r).count();
            if run == 0 {
                at += 1;
                continue;
            }
            let run = run.min((READ_BYTES / GRANULE) as usize);
            let (offset, len) = bytes_of(at..at + run);
            self.take(offset, len).await?;
            at += run;
        }
        Ok(())
    }

    /// Stores a range of whole granules, and releases it.
    pub(super) async fn release(&mut self, offset: u64, len: u64) -> Result<()> {
        let granules = granules_of(offset, len);
        self.take_readable(granules.clone()).await?;
        // The last granule goes on beyond the known part.
        let end = granules.end.min((KNOWN_BYTES / GRANULE) as usize);
        if granules.start < end {
            let (offset, len) = bytes_of(granules.start..end);
            self.client()?.trim(offset, len).await?;
            self.readable[granules.start..end].fill(false);
        }
        Ok(())
    }

    /// Reads all that is left: then the copy is that of the point in time.
    pub(super) async fn complete(&mut self) -> Result<()> {
        self.take_readable(0..self.readable.len()).await?;
        if self.generation.is_none() {
            return Ok(());
        }
        for (index, (kept, sector)) in self.copy.iter().zip(self.at.sectors()).enumerate() {
            let value = kept.with_context(|| format!("sector {index} was never read"))?;
            ensure!(sector.accepts(value), "sector {index} is {value:#x} in the copy: {sector:x?}");
        }
        Ok(())
    }

    pub(super) fn disconnect(&mut self) {
        self.client = None;
    }

    /// What the end of the access leaves.
    pub(super) fn settle(self, chains: &mut [Chain], success: bool) {
        let chain = &mut chains[self.disk];
        if success && self.generation.is_some() {
            chain.copy = Some(self.copy.into_iter().flatten().collect());
            chain.generation = self.generation;
            chain.valid = true;
        }
    }
}

/// Whether the action answers a request to use the bitmap.
fn info_asks_for_use(action: &str) -> bool {
    ["used", "invalid", "missing-recreated"].contains(&action)
}

/// What is not dirty has not changed since the last committed backup.
fn check_coverage(at: &Disk, chain: &Chain, dirty: &[bool]) -> Result<()> {
    let copy = chain.copy.as_ref().context("there is no copy")?;
    for (index, (&byte, sector)) in copy.iter().zip(at.sectors()).enumerate() {
        let covered = dirty[index * SECTOR as usize / GRANULE as usize];
        ensure!(covered || sector.accepts(byte), "sector {index} changed and is not dirty");
    }
    Ok(())
}

fn granules_of(offset: u64, len: u64) -> Range<usize> {
    let end = (offset + len).min(KNOWN_BYTES);
    (offset / GRANULE) as usize..end.div_ceil(GRANULE) as usize
}

/// The bytes of the known part in some granules.
fn bytes_of(granules: Range<usize>) -> (u64, u64) {
    let start = granules.start as u64 * GRANULE;
    (start, (granules.end as u64 * GRANULE).min(KNOWN_BYTES) - start)
}
