// SPDX-License-Identifier: MIT OR Apache-2.0
//! What must be read of a disk that is offered as a file, in pages that cannot end unnoticed.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{BoxFuture, Call, Error, Kind, Result};

/// A part of a disk that belongs to the backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Where it begins on the disk, in bytes.
    pub offset: u64,
    /// Its length in bytes; never 0.
    pub length_bytes: u64,
    /// It reads as zeroes and need not be read.
    pub zero: bool,
}

/// How the regions go on after a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NextRegions {
    /// Ask again from this offset on.
    From {
        /// In bytes; beyond the offset of the page before.
        offset: u64,
    },
    /// These were the last.
    End {
        /// The sum of the lengths of all regions, in bytes.
        total_bytes: u64,
    },
}

/// Some regions, in order of their offsets, without overlap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionPage {
    /// The regions; may be empty on any page.
    pub regions: Vec<Region>,
    /// How it goes on.
    pub next: NextRegions,
}

/// What must be read of a disk. The same question may be asked again.
pub trait DirtyRegions: Send + Sync + std::fmt::Debug {
    /// A page of the regions from an offset on; the first is asked for with 0.
    fn page<'a>(&'a self, offset: u64, call: &'a Call) -> BoxFuture<'a, Result<RegionPage>>;
}

/// Walks over all pages of [`DirtyRegions`] and checks them: an end is only an end if the sum is right.
#[derive(Debug)]
pub struct RegionReader {
    source: Arc<dyn DirtyRegions>,
    size_bytes: u64,
    /// Where the next page begins; none after the end.
    next: Option<u64>,
    /// End of the last region.
    reached: u64,
    sum_bytes: u64,
}

impl RegionReader {
    /// A walk over the regions of a disk of this size.
    #[must_use]
    pub fn new(source: Arc<dyn DirtyRegions>, size_bytes: u64) -> Self {
        Self { source, size_bytes, next: Some(0), reached: 0, sum_bytes: 0 }
    }

    /// The regions of the next page; none after the end, which has been checked then.
    ///
    /// # Errors
    /// What [`DirtyRegions::page`] returns, and [`Kind::Corrupt`] for regions that are out of order,
    /// overlap, exceed the disk or do not add up to the sum that the end states.
    pub async fn next(&mut self, call: &Call) -> Result<Option<Vec<Region>>> {
        let Some(from) = self.next else { return Ok(None) };
        let page = self.source.page(from, call).await?;
        for region in &page.regions {
            self.take(region)?;
        }
        self.next = match page.next {
            NextRegions::From { offset } if offset > from && offset <= self.size_bytes => {
                Some(offset)
            }
            NextRegions::From { offset } => {
                return Err(corrupt(format!("a page at {from} is followed by one at {offset}")));
            }
            NextRegions::End { total_bytes } if total_bytes == self.sum_bytes => None,
            NextRegions::End { total_bytes } => {
                return Err(corrupt(format!(
                    "they have {} bytes in all, and their end states {total_bytes}",
                    self.sum_bytes
                )));
            }
        };
        Ok(Some(page.regions))
    }

    fn take(&mut self, region: &Region) -> Result<()> {
        let Region { offset, length_bytes, .. } = *region;
        let end = offset.checked_add(length_bytes);
        let Some(end) = end.filter(|&end| end <= self.size_bytes && length_bytes > 0) else {
            return Err(corrupt(format!("{length_bytes} bytes at {offset} are not on the disk")));
        };
        if offset < self.reached {
            return Err(corrupt(format!(
                "the one at {offset} comes after one up to {}",
                self.reached
            )));
        }
        self.reached = end;
        // Cannot overflow: they do not overlap and are on the disk.
        self.sum_bytes += length_bytes;
        Ok(())
    }

    /// Bytes of all regions so far.
    #[must_use]
    pub fn sum_bytes(&self) -> u64 {
        self.sum_bytes
    }
}

fn corrupt(why: String) -> Error {
    Error::new(Kind::Corrupt, format!("The regions to back up make no sense: {why}."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Pages(Vec<(u64, RegionPage)>);

    impl DirtyRegions for Pages {
        fn page<'a>(&'a self, offset: u64, _call: &'a Call) -> BoxFuture<'a, Result<RegionPage>> {
            let page =
                self.0.iter().find(|(from, _)| *from == offset).map(|(_, page)| page.clone());
            Box::pin(std::future::ready(page.ok_or_else(|| corrupt("no such page".to_owned()))))
        }
    }

    fn region(offset: u64, length_bytes: u64) -> Region {
        Region { offset, length_bytes, zero: false }
    }

    async fn walk(pages: Vec<(u64, RegionPage)>) -> Result<Vec<Region>> {
        let mut reader = RegionReader::new(Arc::new(Pages(pages)), 1000);
        let mut all = Vec::new();
        while let Some(regions) = reader.next(&Call::default()).await? {
            all.extend(regions);
        }
        Ok(all)
    }

    fn page(regions: &[Region], next: NextRegions) -> RegionPage {
        RegionPage { regions: regions.to_vec(), next }
    }

    #[tokio::test]
    async fn pages_are_walked_to_an_end_that_adds_up() {
        let end = NextRegions::End { total_bytes: 300 };
        let pages = vec![
            (0, page(&[region(0, 100)], NextRegions::From { offset: 500 })),
            (500, page(&[], NextRegions::From { offset: 800 })),
            (800, page(&[region(800, 200)], end)),
        ];
        assert_eq!(walk(pages).await.unwrap(), [region(0, 100), region(800, 200)]);
    }

    #[tokio::test]
    async fn regions_that_make_no_sense_are_errors() {
        let end = |total_bytes| NextRegions::End { total_bytes };
        let bad = [
            // An end that came too early.
            page(&[region(0, 100)], end(200)),
            page(&[], end(1)),
            // Out of order, overlapping, empty, beyond the disk, overflowing.
            page(&[region(500, 100), region(0, 100)], end(200)),
            page(&[region(0, 100), region(50, 100)], end(200)),
            page(&[region(0, 0)], end(0)),
            page(&[region(990, 20)], end(20)),
            page(&[region(u64::MAX, 2)], end(2)),
            // Pages that go round in circles.
            page(&[], NextRegions::From { offset: 0 }),
            page(&[], NextRegions::From { offset: 1001 }),
        ];
        for page in bad {
            let error = walk(vec![(0, page.clone())]).await.unwrap_err();
            assert_eq!(error.kind, Kind::Corrupt, "{page:?}");
        }
    }
}
