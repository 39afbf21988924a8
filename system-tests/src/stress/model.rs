// SPDX-License-Identifier: MIT OR Apache-2.0
//! What each sector may hold: the oracle of a run.
//!
//! Every sector that is written carries the number of the request and its own number, so that a
//! sector read back says where it came from. Requests in flight never overlap. At the point in
//! time a sector holds the last request completed before the setup command, or one that was in
//! flight while it ran.
//!
//! A trim is advice: its sectors are zero, or for some time still what they were.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail};

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;
/// The value of a sector of zeroes.
pub(super) const ZERO: u64 = 0;

pub(super) struct Model(Mutex<State>);

struct State {
    /// Last completed value of each sector.
    values: Vec<u64>,
    /// What trimmed sectors may hold instead.
    untrimmed: HashMap<u64, u64>,
    /// Waits for the requests in flight that overlap it; no new one does.
    reserved: Option<Range<u64>>,
    /// Requests in flight, by their number.
    in_flight: HashMap<u64, Range<u64>>,
    next: u64,
    /// At the point in time: the completed values, and what else a sector may hold.
    frozen: Vec<u64>,
    also: HashMap<u64, Vec<u64>>,
    freezing: bool,
    /// What a sector of the snapshot turned out to hold; it may not change any more.
    seen: HashMap<u64, u64>,
}

/// A request: its sectors are locked until it is done.
#[derive(Debug)]
pub(super) struct Ticket {
    number: u64,
    pub(super) sectors: Range<u64>,
    /// What its sectors will hold.
    pub(super) value: u64,
    trim: bool,
}

/// What a request does to its sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    Write,
    Zero,
    Trim,
}

impl Model {
    pub(super) fn new(sectors: u64) -> Self {
        Self(Mutex::new(State {
            values: vec![ZERO; sectors as usize],
            untrimmed: HashMap::new(),
            reserved: None,
            in_flight: HashMap::new(),
            next: 1,
            frozen: Vec::new(),
            also: HashMap::new(),
            freezing: false,
            seen: HashMap::new(),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn sectors(&self) -> u64 {
        self.state().values.len() as u64
    }

    /// Begins a request, unless one in flight or a reservation overlaps it.
    pub(super) fn begin(&self, sectors: Range<u64>, effect: Effect) -> Option<Ticket> {
        let mut state = self.state();
        if state.reserved.as_ref().is_some_and(|reserved| overlap(reserved, &sectors)) {
            return None;
        }
        state.begin(sectors, effect)
    }

    /// Keeps new requests away from a range, so that a large one finds its turn; one at a time.
    pub(super) fn reserve(&self, sectors: &Range<u64>) -> bool {
        let mut state = self.state();
        let free = state.reserved.is_none();
        if free {
            state.reserved = Some(sectors.clone());
        }
        free
    }

    /// Begins the request whose range is reserved, once nothing in flight overlaps it.
    pub(super) fn begin_reserved(&self, effect: Effect) -> Option<Ticket> {
        let mut state = self.state();
        let sectors = state.reserved.clone()?;
        let ticket = state.begin(sectors, effect)?;
        state.reserved = None;
        Some(ticket)
    }

    /// The request is complete.
    pub(super) fn complete(&self, ticket: &Ticket) {
        let mut state = self.state();
        state.in_flight.remove(&ticket.number);
        for sector in ticket.sectors.clone() {
            let old = std::mem::replace(&mut state.values[sector as usize], ticket.value);
            if !ticket.trim {
                state.untrimmed.remove(&sector);
            } else if old != ZERO {
                state.untrimmed.insert(sector, old);
            }
        }
    }

    /// Immediately before the setup command is sent. The values of requests in flight are their
    /// numbers or zero, so both are allowed.
    pub(super) fn begin_point_in_time(&self) {
        let mut state = self.state();
        state.frozen = state.values.clone();
        state.also.clear();
        state.seen.clear();
        state.freezing = true;
        let in_flight: Vec<_> =
            state.in_flight.iter().map(|(number, sectors)| (*number, sectors.clone())).collect();
        for (number, sectors) in in_flight {
            state.allow(&sectors, number);
            state.allow(&sectors, ZERO);
        }
        let untrimmed: Vec<_> = state.untrimmed.iter().map(|(&at, &old)| (at, old)).collect();
        for (sector, old) in untrimmed {
            state.allow(&(sector..sector + 1), old);
        }
    }

    /// Immediately after its reply.
    pub(super) fn end_point_in_time(&self) {
        self.state().freezing = false;
    }

    /// Checks sectors read from the snapshot.
    pub(super) fn check_snapshot(&self, first: u64, data: &[u8]) -> Result<()> {
        let mut state = self.state();
        for (index, bytes) in data.chunks(SECTOR as usize).enumerate() {
            let sector = first + index as u64;
            let value = decode(sector, bytes)?;
            state.check_value(sector, value)?;
            let seen = *state.seen.entry(sector).or_insert(value);
            if seen != value {
                bail!("sector {sector} of the snapshot changed from request {seen} to {value}");
            }
        }
        Ok(())
    }

    /// Checks a copy of the whole snapshot, by the values of its sectors.
    pub(super) fn check_values(&self, values: &[u64]) -> Result<()> {
        let state = self.state();
        (0_u64..).zip(values).try_for_each(|(sector, &value)| state.check_value(sector, value))
    }

    /// Checks that sectors which block status called zero may be zero.
    pub(super) fn check_zero(&self, sectors: Range<u64>) -> Result<()> {
        let state = self.state();
        for sector in sectors {
            let also = state.also.get(&sector).is_some_and(|also| also.contains(&ZERO));
            if state.frozen[sector as usize] != ZERO && !also {
                bail!("block status calls sector {sector} of the snapshot zero, but it holds data");
            }
        }
        Ok(())
    }

    /// Checks sectors read from the guest's disk while nothing is in flight.
    pub(super) fn check_disk(&self, first: u64, data: &[u8]) -> Result<()> {
        let state = self.state();
        for (index, bytes) in data.chunks(SECTOR as usize).enumerate() {
            let sector = first + index as u64;
            let (value, expected) = (decode(sector, bytes)?, state.values[sector as usize]);
            if value != expected && state.untrimmed.get(&sector) != Some(&value) {
                bail!("sector {sector} of the guest's disk holds request {value}, not {expected}");
            }
        }
        Ok(())
    }

    /// Checks the disk of a daemon that has ended: each sector holds the last completed request, or
    /// one that was in flight if it was killed.
    pub(super) fn check_ended_disk(&self, disk: &File) -> Result<()> {
        let state = self.state();
        let mut bytes = [0; SECTOR as usize];
        for (sector, &expected) in (0_u64..).zip(&state.values) {
            disk.read_exact_at(&mut bytes, sector * SECTOR)?;
            let value = decode(sector, &bytes)?;
            let in_flight = |(number, sectors): (&u64, &Range<u64>)| {
                sectors.contains(&sector) && (value == *number || value == ZERO)
            };
            let old = state.untrimmed.get(&sector) == Some(&value);
            if value != expected && !old && !state.in_flight.iter().any(in_flight) {
                bail!("sector {sector} of the disk holds request {value}, not {expected}");
            }
        }
        Ok(())
    }
}

impl State {
    fn begin(&mut self, sectors: Range<u64>, effect: Effect) -> Option<Ticket> {
        if self.in_flight.values().any(|other| overlap(other, &sectors)) {
            return None;
        }
        let number = self.next;
        self.next += 1;
        let value = if effect == Effect::Write { number } else { ZERO };
        self.in_flight.insert(number, sectors.clone());
        if self.freezing {
            self.allow(&sectors, value);
        }
        Some(Ticket { number, sectors, value, trim: effect == Effect::Trim })
    }

    /// Whether a sector may have held this at the point in time.
    fn check_value(&self, sector: u64, value: u64) -> Result<()> {
        let expected = self.frozen[sector as usize];
        let also = self.also.get(&sector).is_some_and(|also| also.contains(&value));
        if value != expected && !also {
            bail!("sector {sector} of the snapshot holds request {value}, not {expected}");
        }
        Ok(())
    }

    fn allow(&mut self, sectors: &Range<u64>, value: u64) {
        for sector in sectors.clone() {
            self.also.entry(sector).or_default().push(value);
        }
    }
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    other.start < one.end && one.start < other.end
}

/// The content of sectors that carry a value.
pub(super) fn encode(sectors: &Range<u64>, value: u64) -> Vec<u8> {
    let mut data = Vec::with_capacity(((sectors.end - sectors.start) * SECTOR) as usize);
    for sector in sectors.clone() {
        for word in words(sector, value) {
            data.extend_from_slice(&word.to_le_bytes());
        }
    }
    data
}

fn words(sector: u64, value: u64) -> impl Iterator<Item = u64> {
    let mix = value.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ sector;
    (0..SECTOR / 8).map(move |index| match index {
        0 => value,
        1 => sector,
        _ => mix.wrapping_add(index),
    })
}

pub(super) fn decode(sector: u64, bytes: &[u8]) -> Result<u64> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(ZERO);
    }
    let mut found =
        bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or([0; 8])));
    let value = found.next().unwrap_or(ZERO);
    let rest = std::iter::once(value).chain(found);
    if !rest.eq(words(sector, value)) {
        bail!("sector {sector} is torn or belongs elsewhere (it begins with request {value})");
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::{Effect, Model, ZERO, encode};

    #[test]
    fn new_data_torn_sectors_and_foreign_sectors_are_found() {
        let model = Model::new(16);
        let first = model.begin(0..8, Effect::Write).unwrap();
        model.complete(&first);
        let racing = model.begin(4..6, Effect::Write).unwrap();
        assert!(model.begin(5..7, Effect::Write).is_none(), "requests in flight must not overlap");
        model.begin_point_in_time();
        model.end_point_in_time();
        model.complete(&racing);
        let later = model.begin(0..2, Effect::Write).unwrap();
        model.complete(&later);

        model.check_snapshot(0, &encode(&(0..4), first.value)).unwrap();
        model.check_snapshot(4, &encode(&(4..6), racing.value)).unwrap();
        assert!(model.check_snapshot(4, &encode(&(4..6), first.value)).is_err(), "it changed");
        assert!(model.check_snapshot(0, &encode(&(0..1), later.value)).is_err(), "new data");
        assert!(model.check_snapshot(3, &encode(&(2..3), first.value)).is_err(), "foreign sector");
        let mut torn = encode(&(2..3), first.value);
        torn[300] ^= 1;
        assert!(model.check_snapshot(2, &torn).is_err(), "torn");
        assert!(model.check_zero(0..1).is_err());
        model.check_zero(8..16).unwrap();
        let trim = model.begin(0..1, Effect::Trim).unwrap();
        model.complete(&trim);
        model.check_disk(0, &encode(&(0..1), later.value)).unwrap();
        model.check_disk(0, &[0; 512]).unwrap();
        assert!(model.check_disk(0, &encode(&(0..1), first.value)).is_err(), "older than the trim");
        assert!(model.reserve(&(0..16)) && !model.reserve(&(0..1)));
        assert!(model.begin(0..1, Effect::Write).is_none(), "the range is reserved");
        let large = model.begin_reserved(Effect::Zero).unwrap();
        model.complete(&large);
        assert!(
            model.check_disk(0, &encode(&(0..1), later.value)).is_err(),
            "zeroes are no advice"
        );
        assert_eq!(later.sectors, 0..2);
        assert_ne!(later.value, ZERO);
    }
}
