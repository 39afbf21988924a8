// SPDX-License-Identifier: GPL-2.0-or-later
//! Snapshot reads and block status. Nothing is frozen: a reader reads the source, looks again, and
//! takes what was saved meanwhile from its copy.

use std::ops::{ControlFlow, Range};

use crate::engine::{Engine, LOOK_BYTES};
use crate::mask::{Mask, words};
use crate::range::{ByteRange, PIECE_BYTES, REGION_GRANULES};
use crate::table::{Granule, Locked};
use crate::watch::What;
use crate::{Device, Errno, Fetch, Io};

/// Gaps of at most this many bytes are read over: that is cheaper than another request.
const SOURCE_GAP_BYTES: u64 = 64 << 10;

/// Block status looks at so many runs of granules at most before it answers: guest requests wait
/// for the region's lock meanwhile.
const MAX_STATUS_RUNS: u32 = 1024;

/// How a run of the snapshot is stored, for block status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stored {
    /// Only the source knows.
    Source,
    /// Known to be zero.
    Zero,
    /// Data, or an area whose reads fail.
    Data,
}

/// Calls `f` with runs of granules of equal state, in order, until it says stop.
fn each_run<T>(
    state: &Locked<'_, T>,
    local: Range<u32>,
    mut f: impl FnMut(Range<u32>, Granule) -> ControlFlow<()>,
) {
    for (word, mask) in words(local) {
        let base = word as u32 * 64;
        let all = base + mask.trailing_zeros()..base + 64 - mask.leading_zeros();
        let (done, kept) = (state.done(word) & mask, state.kept(word) & mask);
        let uniform = if done == 0 && state.discarding.is_empty() {
            Some(Granule::Source)
        } else if done == mask && kept == 0 {
            Some(Granule::Gone)
        } else {
            None
        };
        let ended = match uniform {
            Some(granule) => f(all, granule),
            None => all.into_iter().try_for_each(|at| f(at..at + 1, state.granule(at))),
        };
        if ended.is_break() {
            return;
        }
    }
}

/// Collects what a read must fetch.
struct Plan {
    base: u64,
    parts: Vec<Fetch>,
    /// Whether the last part may be extended over a gap: nothing else is read into it.
    open: bool,
}

impl Plan {
    fn add_source(&mut self, bytes: ByteRange) {
        if let Some(last) = self.parts.last_mut().filter(|_| self.open) {
            let end = last.offset + last.len as u64;
            if bytes.start - end <= SOURCE_GAP_BYTES {
                last.len = (bytes.end - last.offset) as usize;
                return;
            }
        }
        self.push(Device::Source, bytes.start, bytes);
        self.open = true;
    }

    fn add_log(&mut self, offset: u64, bytes: ByteRange) {
        self.open = false;
        let at = (bytes.start - self.base) as usize;
        if let Some(last) = self.parts.last_mut()
            && last.device == Device::Log
            && last.offset + last.len as u64 == offset
            && last.at + last.len == at
        {
            last.len += bytes.len() as usize;
            return;
        }
        self.push(Device::Log, offset, bytes);
    }

    fn push(&mut self, device: Device, offset: u64, bytes: ByteRange) {
        let at = (bytes.start - self.base) as usize;
        self.parts.push(Fetch { device, offset, len: bytes.len() as usize, at });
    }
}

impl<T: Send, B: AsRef<[u8]> + AsMut<[u8]> + Send + Sync> Engine<T, B> {
    /// Reads the snapshot.
    ///
    /// # Errors
    /// `EPERM` for clean or released areas, `EIO` for lost ones and a lost snapshot; else the
    /// devices' errors.
    pub fn read<I: Io<Task = T, Block = B>>(
        &self,
        io: &I,
        range: ByteRange,
        buf: &mut I::Buf,
    ) -> Result<(), Errno> {
        self.still_there()?;
        for piece in range.pieces(PIECE_BYTES) {
            let read = self.read_piece(io, range.start, piece, buf);
            // Last of all, also after an error: whoever passes without capture does so after this
            // changed, and then no state means anything.
            self.still_there()?;
            read?;
        }
        Ok(())
    }

    fn read_piece<I: Io<Task = T, Block = B>>(
        &self,
        io: &I,
        base: u64,
        piece: ByteRange,
        buf: &mut I::Buf,
    ) -> Result<(), Errno> {
        // Granules whose final data is in the buffer.
        let mut have = Mask::default();
        let mut parts = self.first_look(base, piece, &mut have)?;
        // A granule goes from the source to RAM to the log and stays there: three looks suffice.
        loop {
            if !parts.is_empty() {
                self.fetch(io, &parts, buf)?;
            }
            parts = self.look_again(io, base, piece, &mut have, buf)?;
            if parts.is_empty() {
                return Ok(());
            }
        }
    }

    fn still_there(&self) -> Result<(), Errno> {
        if self.is_capturing() { Ok(()) } else { Err(Errno::EIO) }
    }

    fn fetch<I: Io<Task = T, Block = B>>(
        &self,
        io: &I,
        parts: &[Fetch],
        buf: &mut I::Buf,
    ) -> Result<(), Errno> {
        match parts.iter().find(|part| part.device == Device::Log) {
            Some(log) => self.watched(io, What::ReadLog, log.offset, || io.fetch(parts, buf)),
            None => io.fetch(parts, buf),
        }
    }

    /// Calls `f` with the parts of a piece and their states.
    fn look(
        &self,
        piece: ByteRange,
        mut f: impl FnMut(Range<u64>, ByteRange, Granule) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut result = Ok(());
        for (index, local) in self.geometry.by_region(self.geometry.cover(piece)) {
            let first = index as u64 * REGION_GRANULES;
            let mut visit = |local: Range<u32>, granule| {
                let granules = first + u64::from(local.start)..first + u64::from(local.end);
                let bytes = self.geometry.bytes(granules.clone()).intersect(piece);
                result = f(granules, bytes, granule);
                if result.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            };
            match self.table.region(index) {
                // Readers leave no trace: their notes would use up what captures need.
                None => {
                    let _ = self.table.each_untouched_run(index, local, &mut visit);
                }
                Some(region) => each_run(&region.lock(), local, visit),
            }
            result?;
        }
        Ok(())
    }

    /// What must be fetched from the devices. Log reads of it count as done.
    fn first_look(
        &self,
        base: u64,
        piece: ByteRange,
        have: &mut Mask,
    ) -> Result<Vec<Fetch>, Errno> {
        let first = self.geometry.cover(piece).start;
        let mut plan = Plan { base, parts: Vec::new(), open: false };
        self.look(piece, |granules, bytes, granule| {
            match granule {
                Granule::Source => plan.add_source(bytes),
                Granule::Log(position) => {
                    have.insert((granules.start - first) as usize);
                    plan.add_log(self.log_offset(position, bytes.start), bytes);
                }
                Granule::Ram(_) | Granule::Zero => {}
                Granule::Gone => return Err(Errno::EPERM),
                Granule::Lost => return Err(Errno::EIO),
            }
            Ok(())
        })?;
        Ok(plan.parts)
    }

    fn log_offset(&self, position: u64, byte: u64) -> u64 {
        let granule = self.geometry.granule();
        position * granule + byte % granule
    }

    /// Looks at the piece again after a fetch: takes from RAM what was saved meanwhile, and returns
    /// what must still be read from the log.
    fn look_again<I: Io<Task = T, Block = B>>(
        &self,
        io: &I,
        base: u64,
        piece: ByteRange,
        have: &mut Mask,
        buf: &mut I::Buf,
    ) -> Result<Vec<Fetch>, Errno> {
        let first = self.geometry.cover(piece).start;
        let granule_bytes = self.geometry.granule();
        let mut plan = Plan { base, parts: Vec::new(), open: false };
        self.look(piece, |granules, bytes, granule| {
            let index = (granules.start - first) as usize;
            match granule {
                // Not captured, so no guest request to it was submitted before this look.
                Granule::Source => {}
                // Positions are never used again: what was read from there is right if the
                // granule still lives.
                Granule::Ram(_) | Granule::Zero | Granule::Log(_) if have.contains(index) => {}
                Granule::Ram(id) => {
                    let (block, begin) = self.ram.lock().block(id).ok_or(Errno::EIO)?;
                    let from =
                        (granules.start - begin) * granule_bytes + bytes.start % granule_bytes;
                    let data = &block.as_ref().as_ref()[from as usize..];
                    io.copy_into(buf, (bytes.start - base) as usize, &data[..bytes.len() as usize]);
                    have.insert(index);
                }
                Granule::Zero => {
                    io.zero_into(buf, (bytes.start - base) as usize, bytes.len() as usize);
                    have.insert(index);
                }
                Granule::Log(position) => {
                    have.insert(index);
                    plan.add_log(self.log_offset(position, bytes.start), bytes);
                }
                Granule::Gone => return Err(Errno::EPERM),
                Granule::Lost => return Err(Errno::EIO),
            }
            Ok(())
        })?;
        Ok(plan.parts)
    }

    /// Whether the snapshot is known to be zero from `range.start`, and for how many bytes the
    /// answer holds. Clean, released and lost areas are data.
    ///
    /// # Errors
    /// `EIO` when the snapshot is lost; else the source's error.
    pub fn is_zero(
        &self,
        io: &impl Io<Task = T, Block = B>,
        range: ByteRange,
    ) -> Result<(u64, bool), Errno> {
        let range = range.intersect(ByteRange::at(range.start, LOOK_BYTES));
        loop {
            self.still_there()?;
            let (len, stored) = self.stored(range)?;
            match stored {
                Stored::Zero => return Ok((len, true)),
                Stored::Data => return Ok((len, false)),
                Stored::Source => {}
            }
            let (known, zero) = io.source_is_zero(range.start, len)?;
            // The guest may have written or discarded meanwhile: only what is still not captured
            // can be believed. Each turn of the loop means that more of it was captured.
            let (still, stored) = self.stored(ByteRange::at(range.start, known))?;
            if stored == Stored::Source {
                return Ok((still, zero));
            }
        }
    }

    /// How the snapshot is stored from `range.start` on, and for how many bytes that holds.
    fn stored(&self, range: ByteRange) -> Result<(u64, Stored), Errno> {
        let mut end = range.start;
        let mut kind = None;
        let mut runs = 0;
        // An error only ends the walk.
        let _ = self.look(range, |_, bytes, granule| {
            let this = match granule {
                Granule::Source => Stored::Source,
                Granule::Zero => Stored::Zero,
                // A hole where reads fail could be taken for zeroes by a client that merges an
                // increment.
                Granule::Ram(_) | Granule::Log(_) | Granule::Gone | Granule::Lost => Stored::Data,
            };
            runs += 1;
            if *kind.get_or_insert(this) != this || runs > MAX_STATUS_RUNS {
                return Err(Errno::EIO);
            }
            end = bytes.end;
            Ok(())
        });
        self.still_there()?;
        Ok((end - range.start, kind.ok_or(Errno::ENOMEM)?))
    }
}
