// SPDX-License-Identifier: MIT OR Apache-2.0
//! What each sector may hold: the oracle of a run.
//!
//! Every sector that is written carries the number of the request and its own number, so that a
//! sector read back says where it came from. Requests in flight never overlap. At a point in
//! time a sector holds the last request completed before the setup command, or one that was in
//! flight while it ran.
//!
//! A trim is advice: its sectors are zero, or for some time still what they were.
//!
//! A disk that keeps tables in RAM (qcow2) may lose what was not flushed when its process is killed:
//! each sector then holds something that it held since the last flush.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use anyhow::{Result, bail};

/// Bytes of a sector.
pub(crate) const SECTOR: u64 = 512;
/// The value of a sector of zeroes.
pub(crate) const ZERO: u64 = 0;

pub(crate) struct Model(Mutex<State>);

struct State {
    /// Last completed value of each sector.
    values: Vec<u64>,
    /// What trimmed sectors may hold instead.
    untrimmed: HashMap<u64, u64>,
    /// What sectors held before, and the number of flushes begun when they were overwritten, for a
    /// disk that may lose what was not flushed.
    unflushed: Option<HashMap<u64, Vec<(u64, u64)>>>,
    flushes: u64,
    /// Waits for the requests in flight that overlap it; no new one does.
    reserved: Option<Range<u64>>,
    /// Requests in flight, by their number.
    in_flight: HashMap<u64, Range<u64>>,
    next: u64,
    /// Points in time whose setup command is under way.
    moments: Vec<Weak<Mutex<Frozen>>>,
}

/// A point in time; clones are the same one.
#[derive(Clone)]
pub(crate) struct Moment(Arc<Mutex<Frozen>>);

#[derive(Default)]
struct Frozen {
    /// The completed values, and what else a sector may hold.
    values: Vec<u64>,
    also: HashMap<u64, Vec<u64>>,
    /// What a sector of the snapshot turned out to hold; it may not change any more.
    seen: HashMap<u64, u64>,
}

/// A request: its sectors are locked until it is done.
#[derive(Debug)]
pub(crate) struct Ticket {
    number: u64,
    pub(crate) sectors: Range<u64>,
    /// What its sectors will hold.
    pub(crate) value: u64,
    trim: bool,
}

/// What a request does to its sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    Write,
    Zero,
    Trim,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Model {
    pub(crate) fn new(sectors: u64) -> Self {
        Self(Mutex::new(State {
            values: vec![ZERO; sectors as usize],
            untrimmed: HashMap::new(),
            unflushed: None,
            flushes: 0,
            reserved: None,
            in_flight: HashMap::new(),
            next: 1,
            moments: Vec::new(),
        }))
    }

    /// The same for a disk that may lose what was not flushed.
    pub(crate) fn with_volatile_cache(sectors: u64) -> Self {
        let this = Self::new(sectors);
        this.state().unflushed = Some(HashMap::new());
        this
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.state().values.len() as u64
    }

    /// Begins a request, unless one in flight or a reservation overlaps it.
    pub(crate) fn begin(&self, sectors: Range<u64>, effect: Effect) -> Option<Ticket> {
        let mut state = self.state();
        if state.reserved.as_ref().is_some_and(|reserved| overlap(reserved, &sectors)) {
            return None;
        }
        state.begin(sectors, effect)
    }

    /// Keeps new requests away from a range, so that a large one finds its turn; one at a time.
    pub(crate) fn reserve(&self, sectors: &Range<u64>) -> bool {
        let mut state = self.state();
        let free = state.reserved.is_none();
        if free {
            state.reserved = Some(sectors.clone());
        }
        free
    }

    /// Begins the request whose range is reserved, once nothing in flight overlaps it.
    pub(crate) fn begin_reserved(&self, effect: Effect) -> Option<Ticket> {
        let mut state = self.state();
        let sectors = state.reserved.clone()?;
        let ticket = state.begin(sectors, effect)?;
        state.reserved = None;
        Some(ticket)
    }

    /// The request is complete.
    pub(crate) fn complete(&self, ticket: &Ticket) {
        let mut state = self.state();
        state.in_flight.remove(&ticket.number);
        let flushes = state.flushes;
        for sector in ticket.sectors.clone() {
            let old = std::mem::replace(&mut state.values[sector as usize], ticket.value);
            let untrimmed = state.untrimmed.get(&sector).copied();
            if let Some(unflushed) = &mut state.unflushed {
                let held = unflushed.entry(sector).or_default();
                held.extend([Some(old), untrimmed].into_iter().flatten().map(|v| (v, flushes)));
            }
            if !ticket.trim {
                state.untrimmed.remove(&sector);
            } else if old != ZERO {
                state.untrimmed.insert(sector, old);
            }
        }
    }

    /// Immediately before a flush is sent; to be given to [`Self::end_flush`].
    pub(crate) fn begin_flush(&self) -> u64 {
        let mut state = self.state();
        state.flushes += 1;
        state.flushes
    }

    /// The flush is complete: what was overwritten before it began is gone for good.
    pub(crate) fn end_flush(&self, flush: u64) {
        if let Some(unflushed) = &mut self.state().unflushed {
            unflushed.retain(|_, held| {
                held.retain(|&(_, flushes)| flushes >= flush);
                !held.is_empty()
            });
        }
    }

    /// Immediately before the setup command is sent. The values of requests in flight are their
    /// numbers or zero, so both are allowed.
    pub(crate) fn begin_point_in_time(&self) -> Moment {
        let mut state = self.state();
        let mut frozen = Frozen { values: state.values.clone(), ..Frozen::default() };
        for (&number, sectors) in &state.in_flight {
            frozen.allow(sectors, number);
            frozen.allow(sectors, ZERO);
        }
        for (&sector, &old) in &state.untrimmed {
            frozen.allow(&(sector..sector + 1), old);
        }
        let moment = Arc::new(Mutex::new(frozen));
        // Those of setups that failed are gone.
        state.moments.retain(|moment| moment.strong_count() > 0);
        state.moments.push(Arc::downgrade(&moment));
        Moment(moment)
    }

    /// Immediately after its reply.
    pub(crate) fn end_point_in_time(&self, moment: &Moment) {
        self.state().moments.retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(&moment.0)));
    }

    /// Checks sectors read from the guest's disk while nothing is in flight.
    pub(crate) fn check_disk(&self, first: u64, data: &[u8]) -> Result<()> {
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
    pub(crate) fn check_ended_disk(&self, disk: &File) -> Result<()> {
        let state = self.state();
        let mut bytes = [0; SECTOR as usize];
        for sector in 0..state.values.len() as u64 {
            disk.read_exact_at(&mut bytes, sector * SECTOR)?;
            state.check_ended(sector, decode(sector, &bytes)?, true)?;
        }
        Ok(())
    }

    /// Takes over sectors read from a disk whose daemon has ended, by another one. They must hold
    /// what [`Self::check_ended_disk`] allows, and nothing older after a clean end.
    pub(crate) fn resume(&self, first: u64, data: &[u8], clean: bool) -> Result<()> {
        let mut state = self.state();
        for (index, bytes) in data.chunks(SECTOR as usize).enumerate() {
            let sector = first + index as u64;
            let value = decode(sector, bytes)?;
            state.check_ended(sector, value, clean)?;
            state.values[sector as usize] = value;
        }
        Ok(())
    }

    /// All sectors have been taken over: nothing is in flight.
    pub(crate) fn resumed(&self) {
        let mut state = self.state();
        state.in_flight.clear();
        state.untrimmed.clear();
        state.reserved = None;
        if let Some(unflushed) = &mut state.unflushed {
            unflushed.clear();
        }
    }
}

impl Moment {
    /// Checks sectors read from the snapshot.
    pub(crate) fn check_snapshot(&self, first: u64, data: &[u8]) -> Result<()> {
        let mut frozen = lock(&self.0);
        for (index, bytes) in data.chunks(SECTOR as usize).enumerate() {
            let sector = first + index as u64;
            let value = decode(sector, bytes)?;
            frozen.check_value(sector, value)?;
            let seen = *frozen.seen.entry(sector).or_insert(value);
            if seen != value {
                bail!("sector {sector} of the snapshot changed from request {seen} to {value}");
            }
        }
        Ok(())
    }

    /// Checks a copy of the whole snapshot, by the values of its sectors.
    pub(crate) fn check_values(&self, values: &[u64]) -> Result<()> {
        let frozen = lock(&self.0);
        (0_u64..).zip(values).try_for_each(|(sector, &value)| frozen.check_value(sector, value))
    }

    /// Checks that sectors which block status called zero may be zero.
    pub(crate) fn check_zero(&self, sectors: Range<u64>) -> Result<()> {
        let frozen = lock(&self.0);
        for sector in sectors {
            let also = frozen.also.get(&sector).is_some_and(|also| also.contains(&ZERO));
            if frozen.values[sector as usize] != ZERO && !also {
                bail!("block status calls sector {sector} of the snapshot zero, but it holds data");
            }
        }
        Ok(())
    }
}

impl Frozen {
    /// Whether a sector may have held this at the point in time.
    fn check_value(&self, sector: u64, value: u64) -> Result<()> {
        let expected = self.values[sector as usize];
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

impl State {
    fn begin(&mut self, sectors: Range<u64>, effect: Effect) -> Option<Ticket> {
        if self.in_flight.values().any(|other| overlap(other, &sectors)) {
            return None;
        }
        let number = self.next;
        self.next += 1;
        let value = if effect == Effect::Write { number } else { ZERO };
        self.in_flight.insert(number, sectors.clone());
        for moment in self.moments.iter().filter_map(Weak::upgrade) {
            lock(&moment).allow(&sectors, value);
        }
        Some(Ticket { number, sectors, value, trim: effect == Effect::Trim })
    }

    /// Whether a sector may hold this after the end of its daemon.
    fn check_ended(&self, sector: u64, value: u64, clean: bool) -> Result<()> {
        let expected = self.values[sector as usize];
        let in_flight = |(number, sectors): (&u64, &Range<u64>)| {
            sectors.contains(&sector) && (value == *number || value == ZERO)
        };
        let unflushed = || {
            let held = self.unflushed.as_ref().and_then(|unflushed| unflushed.get(&sector));
            !clean && held.is_some_and(|held| held.iter().any(|&(old, _)| old == value))
        };
        let allowed = value == expected
            || self.untrimmed.get(&sector) == Some(&value)
            || self.in_flight.iter().any(in_flight)
            || unflushed();
        if !allowed {
            bail!("sector {sector} of the disk holds request {value}, not {expected}");
        }
        Ok(())
    }
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    other.start < one.end && one.start < other.end
}

/// The content of sectors that carry a value.
pub(crate) fn encode(sectors: &Range<u64>, value: u64) -> Vec<u8> {
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

pub(crate) fn decode(sector: u64, bytes: &[u8]) -> Result<u64> {
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
        let moment = model.begin_point_in_time();
        model.end_point_in_time(&moment);
        model.complete(&racing);
        let later = model.begin(0..2, Effect::Write).unwrap();
        model.complete(&later);

        moment.check_snapshot(0, &encode(&(0..4), first.value)).unwrap();
        moment.check_snapshot(4, &encode(&(4..6), racing.value)).unwrap();
        assert!(moment.check_snapshot(4, &encode(&(4..6), first.value)).is_err(), "it changed");
        assert!(moment.check_snapshot(0, &encode(&(0..1), later.value)).is_err(), "new data");
        assert!(moment.check_snapshot(3, &encode(&(2..3), first.value)).is_err(), "foreign sector");
        let mut torn = encode(&(2..3), first.value);
        torn[300] ^= 1;
        assert!(moment.check_snapshot(2, &torn).is_err(), "torn");
        assert!(moment.check_zero(0..1).is_err());
        moment.check_zero(8..16).unwrap();
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
    #[test]
    fn each_point_in_time_is_its_own() {
        let model = Model::new(8);
        let write = |sectors| {
            let ticket = model.begin(sectors, Effect::Write).unwrap();
            model.complete(&ticket);
            ticket.value
        };
        let first = write(0..8);
        let early = model.begin_point_in_time();
        let racing = write(0..1);
        model.end_point_in_time(&early);
        let second = write(1..2);
        let late = model.begin_point_in_time();
        drop(model.begin_point_in_time());
        model.end_point_in_time(&late);
        write(0..8);

        early.check_values(&[first; 8]).unwrap();
        early.check_values(&[racing, first]).unwrap();
        assert!(early.check_values(&[first, second]).is_err());
        late.check_values(&[racing, second, first]).unwrap();
        assert!(late.check_values(&[first]).is_err());
    }

    #[test]
    fn a_killed_disk_may_hold_what_was_not_flushed_and_nothing_else() {
        let written = |model: &Model| {
            let values = [(); 3].map(|()| {
                let ticket = model.begin(0..1, Effect::Write).unwrap();
                model.complete(&ticket);
                ticket.value
            });
            let in_flight = model.begin(1..2, Effect::Write).unwrap();
            (values, in_flight.value)
        };
        let resume = |model: &Model, sector: u64, value, clean| {
            model.resume(sector, &encode(&(sector..sector + 1), value), clean)
        };
        let model = Model::new(2);
        let (values, in_flight) = written(&model);
        assert!(resume(&model, 0, values[1], false).is_err(), "it has no cache of its own");
        resume(&model, 0, values[2], false).unwrap();
        resume(&model, 1, in_flight, true).unwrap();
        model.resumed();
        model.check_disk(1, &encode(&(1..2), in_flight)).unwrap();

        let model = Model::with_volatile_cache(2);
        let flush = model.begin_flush();
        let (values, _) = written(&model);
        model.end_flush(flush);
        assert!(resume(&model, 0, values[1], true).is_err(), "it ended cleanly");
        resume(&model, 0, values[1], false).unwrap();
        model.resumed();
        let (values, _) = written(&model);
        model.end_flush(model.begin_flush());
        assert!(resume(&model, 0, values[1], false).is_err(), "it was flushed");
        resume(&model, 0, values[2], false).unwrap();
    }
}
