// SPDX-License-Identifier: MIT OR Apache-2.0
//! Extents of a metadata context, and the loop that gets all of a range.

use std::collections::VecDeque;

use crate::{Client, Error, Result};

/// The well-known metadata contexts and their flags.
pub mod context {
    /// What is allocated.
    pub const BASE_ALLOCATION: &str = "base:allocation";
    /// `base:allocation`: not allocated.
    pub const HOLE: u64 = 1;
    /// `base:allocation`: reads as zeroes.
    pub const ZERO: u64 = 2;
    /// QEMU: how deep in the backing chain the data is; the flags are the depth.
    pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
    /// QEMU dirty bitmap: changed.
    pub const DIRTY: u64 = 1;

    /// Name of the context of a QEMU dirty bitmap.
    #[must_use]
    pub fn dirty_bitmap(bitmap: &str) -> String {
        format!("qemu:dirty-bitmap:{bitmap}")
    }
}

/// Bytes asked for at once. A server may look at all of them before it answers, so that much
/// larger ranges would make the time of one request hard to limit.
const STEP: u64 = 64 << 30;

/// A range with the same flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins.
    pub offset: u64,
    /// How long it is in bytes, never 0.
    pub len: u64,
    /// What the context says about it, see [`context`].
    pub flags: u64,
}

impl Extent {
    /// Where it ends.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// All extents of a range, in order and without gaps; neighbours with the same flags are joined.
///
/// Made by [`Client::extents`]. Holds the extents of one answer at a time.
#[derive(Debug)]
pub struct Extents {
    client: Client,
    context: String,
    /// Where the next query begins.
    position: u64,
    end: u64,
    /// A range whose end does not fit 64 bits.
    overflow: bool,
    waiting: VecDeque<Extent>,
}

impl Extents {
    pub(crate) fn new(client: Client, context: &str, offset: u64, len: u64) -> Self {
        Self {
            client,
            context: context.to_owned(),
            position: offset,
            end: offset.saturating_add(len),
            overflow: offset.checked_add(len).is_none(),
            waiting: VecDeque::new(),
        }
    }

    /// The next extent, or `None` after the whole range was covered. Can be called again after a
    /// time-out or when its future was dropped; it goes on where it was.
    ///
    /// # Errors
    /// As [`Client::block_status`], and if the server makes no progress.
    pub async fn next(&mut self) -> Result<Option<Extent>> {
        // An extent is complete when another follows it: its neighbour in the next answer may
        // continue it.
        while self.waiting.len() < 2 && (self.position < self.end || self.overflow) {
            self.query().await?;
        }
        Ok(self.waiting.pop_front())
    }

    async fn query(&mut self) -> Result<()> {
        let len = if self.overflow { u64::MAX } else { (self.end - self.position).min(STEP) };
        let answer = self.client.block_status(&self.context, self.position, len).await?;
        let before = self.position;
        for extent in answer {
            self.position = extent.end();
            match self.waiting.back_mut() {
                Some(last) if last.flags == extent.flags => last.len += extent.len,
                _ => self.waiting.push_back(extent),
            }
        }
        if self.position <= before {
            return Err(Error::Protocol("block status makes no progress".to_owned()));
        }
        Ok(())
    }
}
