// SPDX-License-Identifier: MIT OR Apache-2.0
//! The requests in flight on one connection, and what their answers are collected into.
//!
//! The table owns the buffers. A caller that drops its future therefore takes nothing away from
//! under the reader: the answer arrives, is checked like any other, and is thrown away.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{BufMut, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::wire::{Malformed, StatusPayload};
use crate::{Error, Extent, Result};

/// Requests in flight on one connection; more wait for a slot.
pub(crate) const MAX_IN_FLIGHT: usize = 64;

/// Separate pieces a read's answer may be in at one time. Servers answer in order or nearly so;
/// the limit bounds the bookkeeping against one that does not.
const MAX_PIECES: usize = 1024;

/// The answer to a request.
#[derive(Debug)]
pub(crate) enum Answer {
    /// It was done.
    Done,
    /// Data of a read.
    Data(BytesMut),
    /// Extents of a block status query.
    Status(Vec<Extent>),
}

/// What the answer is collected into.
#[derive(Debug)]
pub(crate) enum Body {
    /// Nothing but success or an error.
    Plain,
    /// Data.
    Read(ReadBody),
    /// Extents.
    Status(StatusBody),
}

/// One request in flight.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) command: u16,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) body: Body,
    /// The first error the server reported.
    pub(crate) error: Option<Error>,
    pub(crate) answer: oneshot::Sender<Result<Answer>>,
    /// Given back when the answer is complete, not when the caller loses interest: this is what
    /// bounds the table.
    pub(crate) _slot: OwnedSemaphorePermit,
}

impl Pending {
    /// Notes an error of the server. Only the first counts: the others follow from it.
    pub(crate) fn fail(&mut self, error: Error) {
        self.error.get_or_insert(error);
    }

    /// Ends the request after its last chunk.
    ///
    /// # Errors
    /// If the server said that it was done but left something out; the caller is told too.
    pub(crate) fn complete(self) -> Result<()> {
        let (result, fault) = match (self.error, self.body) {
            (Some(error), _) => (Err(error), None),
            (None, Body::Plain) => (Ok(Answer::Done), None),
            (None, Body::Read(body)) => split(body.finish().map(Answer::Data)),
            (None, Body::Status(body)) => split(body.finish().map(Answer::Status)),
        };
        // The caller may have gone away; that is its right.
        let _ = self.answer.send(result);
        fault.map_or(Ok(()), Err)
    }

    /// Ends the request because the connection must end.
    pub(crate) fn give_up(self, reason: &Error) {
        let _ = self.answer.send(Err(reason.clone()));
    }
}

/// A fault of the server concerns the caller and the connection.
fn split(result: std::result::Result<Answer, Malformed>) -> (Result<Answer>, Option<Error>) {
    match result {
        Ok(answer) => (Ok(answer), None),
        Err(bad) => (Err(bad.into()), Some(bad.into())),
    }
}

/// A read's buffer and which parts of it have arrived.
#[derive(Debug)]
pub(crate) struct ReadBody {
    /// `start` bytes of the caller's, then the answer.
    pub(crate) buf: BytesMut,
    start: usize,
    len: usize,
    /// Disjoint, sorted, never touching each other.
    arrived: Vec<(usize, usize)>,
}

/// Where the bytes of a data chunk go.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// At the end of the buffer.
    Append,
    /// At this index of the buffer, which is long enough already.
    At(usize),
}

impl ReadBody {
    /// A body for `len` bytes that are appended to `buf`.
    pub(crate) fn new(mut buf: BytesMut, len: usize) -> Self {
        buf.reserve(len);
        Self { start: buf.len(), buf, len, arrived: Vec::new() }
    }

    /// Notes that `len` bytes at `at`, relative to the request, arrive, and says where to put
    /// them.
    pub(crate) fn claim(&mut self, at: u64, len: u64) -> std::result::Result<Place, Malformed> {
        let out_of_range = Malformed("a chunk of a read lies outside of the request");
        let at = usize::try_from(at).map_err(|_| out_of_range)?;
        let len = usize::try_from(len).map_err(|_| out_of_range)?;
        let end = at.checked_add(len).filter(|&end| end <= self.len).ok_or(out_of_range)?;
        if len == 0 {
            return Err(Malformed("a chunk of a read is empty"));
        }
        self.note(at, end)?;
        let index = self.start + at;
        if index > self.buf.len() {
            // Ahead of its turn: what is left out is filled later, and must not be uninitialised.
            self.buf.put_bytes(0, index - self.buf.len());
        }
        Ok(if index == self.buf.len() { Place::Append } else { Place::At(index) })
    }

    fn note(&mut self, at: usize, end: usize) -> std::result::Result<(), Malformed> {
        let next = self.arrived.partition_point(|&(begin, _)| begin < at);
        let joins_before = next > 0 && {
            let before = self.arrived[next - 1].1;
            if before > at {
                return Err(Malformed("two chunks of a read overlap"));
            }
            before == at
        };
        let joins_after = match self.arrived.get(next) {
            Some(&(begin, _)) if begin < end => {
                return Err(Malformed("two chunks of a read overlap"));
            }
            Some(&(begin, _)) => begin == end,
            None => false,
        };
        match (joins_before, joins_after) {
            (true, true) => self.arrived[next - 1].1 = self.arrived.remove(next).1,
            (true, false) => self.arrived[next - 1].1 = end,
            (false, true) => self.arrived[next].0 = at,
            (false, false) if self.arrived.len() >= MAX_PIECES => {
                return Err(Malformed("the answer to a read is in too many pieces"));
            }
            (false, false) => self.arrived.insert(next, (at, end)),
        }
        Ok(())
    }

    /// Notes a hole: bytes that are zero and are not sent.
    pub(crate) fn hole(&mut self, at: u64, len: u64) -> std::result::Result<(), Malformed> {
        if self.claim(at, len)? == Place::Append {
            // `claim` has checked that it fits the request.
            self.buf.put_bytes(0, len as usize);
        }
        Ok(())
    }

    fn finish(self) -> std::result::Result<BytesMut, Malformed> {
        let complete = match self.arrived[..] {
            [] => self.len == 0,
            [(begin, end)] => begin == 0 && end == self.len,
            _ => false,
        };
        if complete {
            Ok(self.buf)
        } else {
            Err(Malformed("the answer to a read is shorter than the request"))
        }
    }
}

/// The extents of a block status query.
#[derive(Debug)]
pub(crate) struct StatusBody {
    offset: u64,
    end: u64,
    /// Id of the context the caller wants.
    wanted: u32,
    /// Ids that the answer may contain and has not contained yet.
    expected: Vec<u32>,
    extents: Vec<Extent>,
}

impl StatusBody {
    /// A body for the extents of `wanted`; the answer may contain those of `expected` too.
    pub(crate) fn new(offset: u64, len: u64, wanted: u32, expected: Vec<u32>) -> Self {
        Self { offset, end: offset + len, wanted, expected, extents: Vec::new() }
    }

    /// Takes one context's extents.
    pub(crate) fn take(&mut self, payload: &StatusPayload) -> std::result::Result<(), Malformed> {
        let Some(index) = self.expected.iter().position(|&id| id == payload.context) else {
            return Err(Malformed("a block status chunk is of a context that was not expected"));
        };
        self.expected.swap_remove(index);
        let wanted = payload.context == self.wanted;
        if wanted {
            self.extents.reserve_exact(payload.extents.len());
        }
        let mut position = self.offset;
        for &(len, flags) in &payload.extents {
            if len == 0 {
                return Err(Malformed("a block status extent is empty"));
            }
            if position >= self.end {
                return Err(Malformed("block status extents go on after the end of the request"));
            }
            // Only the last extent may reach over the end of the request; it is cut there.
            let end = position.saturating_add(len).min(self.end);
            if wanted {
                self.extents.push(Extent { offset: position, len: end - position, flags });
            }
            position = end;
        }
        Ok(())
    }

    fn finish(self) -> std::result::Result<Vec<Extent>, Malformed> {
        if self.extents.is_empty() {
            return Err(Malformed("a block status answer lacks the context that was asked for"));
        }
        Ok(self.extents)
    }
}

#[derive(Debug, Default)]
struct State {
    /// Why the connection ended, or is about to.
    closed: Option<Error>,
    map: HashMap<u64, Pending>,
    last_cookie: u64,
}

/// All requests in flight on one connection.
#[derive(Debug)]
pub(crate) struct Table {
    state: Mutex<State>,
    pub(crate) slots: Arc<Semaphore>,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::new(State::default()), slots: Arc::new(Semaphore::new(MAX_IN_FLIGHT)) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held; if it did, the map would still be in order.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a request and returns its cookie.
    pub(crate) fn insert(&self, pending: Pending) -> Result<u64> {
        let mut state = self.lock();
        if let Some(error) = &state.closed {
            return Err(error.clone());
        }
        state.last_cookie += 1;
        let cookie = state.last_cookie;
        state.map.insert(cookie, pending);
        Ok(cookie)
    }

    /// Takes a request out, while a chunk of its answer is read or for good.
    pub(crate) fn take(&self, cookie: u64) -> std::result::Result<Pending, Malformed> {
        self.lock()
            .map
            .remove(&cookie)
            .ok_or(Malformed("a reply names a request that is not in flight"))
    }

    /// Puts it back to wait for the next chunk.
    pub(crate) fn put_back(&self, cookie: u64, pending: Pending) {
        self.lock().map.insert(cookie, pending);
    }

    /// Admits no further request; those in flight go on.
    pub(crate) fn close_to_new(&self) {
        self.lock().closed.get_or_insert(Error::Disconnected);
    }

    /// Ends all requests in flight, and those that wait for a slot, with `error`.
    pub(crate) fn close(&self, error: Error) {
        let ended = {
            let mut state = self.lock();
            let reason = state.closed.get_or_insert(error).clone();
            (std::mem::take(&mut state.map), reason)
        };
        let (map, reason) = ended;
        for pending in map.into_values() {
            let _ = pending.answer.send(Err(reason.clone()));
        }
        self.slots.close();
    }

    /// Whether it takes no more requests.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed.is_some()
    }

    /// Why the connection ended.
    pub(crate) fn reason(&self) -> Error {
        self.lock().closed.clone().unwrap_or(Error::Disconnected)
    }
}

#[cfg(test)]
mod tests;
