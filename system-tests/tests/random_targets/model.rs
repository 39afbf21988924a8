// SPDX-License-Identifier: MIT OR Apache-2.0
//! What each sector of a disk may hold: the oracle of a run.

use anyhow::{Result, ensure};

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;

/// A sector full of one byte.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sector {
    value: u8,
    /// It was discarded: it is zero, or for some time still what it was.
    maybe_zero: bool,
}

impl Sector {
    pub(super) fn accepts(self, byte: u8) -> bool {
        byte == self.value || (self.maybe_zero && byte == 0)
    }
}

/// All sectors of a disk that the oracle knows.
#[derive(Debug, Clone)]
pub(super) struct Disk(Vec<Sector>);

impl Disk {
    pub(super) fn new(bytes: u64) -> Self {
        Self(vec![Sector::default(); (bytes / SECTOR) as usize])
    }

    fn part(&mut self, offset: u64, len: u64) -> &mut [Sector] {
        &mut self.0[(offset / SECTOR) as usize..((offset + len) / SECTOR) as usize]
    }

    pub(super) fn fill(&mut self, value: u8, offset: u64, len: u64) {
        self.part(offset, len).fill(Sector { value, maybe_zero: false });
    }

    pub(super) fn discard(&mut self, offset: u64, len: u64) {
        for sector in self.part(offset, len) {
            sector.maybe_zero = true;
        }
    }

    pub(super) fn sectors(&self) -> &[Sector] {
        &self.0
    }

    /// Checks what was read at an offset. A sector that was discarded before may turn out to be
    /// either; from now on it is what it turned out to be.
    pub(super) fn check_and_settle(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let values = decode(offset, data)?;
        for (index, (sector, value)) in
            self.part(offset, data.len() as u64).iter_mut().zip(values).enumerate()
        {
            let at = offset + index as u64 * SECTOR;
            ensure!(sector.accepts(value), "byte {at} is {value:#x}, not {sector:x?}");
            *sector = Sector { value, maybe_zero: false };
        }
        Ok(())
    }

    /// Checks what was read of the guest's own disk, which may be discarded later still.
    pub(super) fn check(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.clone().check_and_settle(offset, data)
    }
}

/// The byte of each sector of what was read.
pub(super) fn decode(offset: u64, data: &[u8]) -> Result<Vec<u8>> {
    let mut values = Vec::with_capacity(data.len() / SECTOR as usize);
    for (index, sector) in data.chunks(SECTOR as usize).enumerate() {
        let at = offset + index as u64 * SECTOR;
        ensure!(sector.iter().all(|&byte| byte == sector[0]), "the sector at {at} is torn");
        values.push(sector[0]);
    }
    Ok(values)
}
