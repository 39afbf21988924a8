// SPDX-License-Identifier: GPL-2.0-or-later
//! The engine's world inside QEMU: coroutines, and I/O on the filter's two children.

use std::cell::Cell;
use std::sync::OnceLock;
use std::time::Instant;

use fleece::{Device, Errno, Fetch, Io};

use crate::fault;
use crate::filter::Filter;
use crate::qemu::child::Child;
use crate::qemu::coroutine::{self, CoGraph, InCoroutine, Waiting};
use crate::qemu::iovec::IoSlice;
use crate::qemu::memory::Block;

/// So many parts of one snapshot read are read side by side.
const FETCH_WIDTH: usize = 16;

/// How an I/O comes by the graph lock.
#[derive(Debug, Clone, Copy)]
enum Graph<'a> {
    /// The caller holds it.
    Held(&'a CoGraph<'a>),
    /// A background coroutine takes it around each I/O.
    PerIo(InCoroutine),
    /// There is none, and no I/O: the snapshot is ended or watched, or a flusher looks for work.
    NoIo,
    /// As [`Graph::NoIo`], after a panic of the caller: it will not park.
    Panicked,
}

/// One caller's view of a filter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FilterIo<'a> {
    filter: &'a Filter,
    graph: Graph<'a>,
}

impl<'a> FilterIo<'a> {
    /// For whoever holds the graph lock: a driver callback, or a flusher during a batch.
    pub(crate) fn with_graph(filter: &'a Filter, graph: &'a CoGraph<'a>) -> Self {
        Self { filter, graph: Graph::Held(graph) }
    }

    /// For a background coroutine that does one I/O after the other.
    pub(crate) fn with_own_lock(filter: &'a Filter, here: InCoroutine) -> Self {
        Self { filter, graph: Graph::PerIo(here) }
    }

    /// For whoever does no I/O.
    pub(crate) fn without_io(filter: &'a Filter) -> Self {
        Self { filter, graph: Graph::NoIo }
    }

    /// For whoever breaks the snapshot because it panicked itself.
    pub(crate) fn after_panic(filter: &'a Filter) -> Self {
        Self { filter, graph: Graph::Panicked }
    }

    fn io<T>(
        &self,
        f: impl FnOnce(&CoGraph<'_>, Child, Child) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let (source, target) = (self.filter.source(), self.filter.target());
        match self.graph {
            Graph::Held(graph) => f(graph, source, target),
            Graph::PerIo(here) => f(&here.lock_graph(), source, target),
            Graph::NoIo | Graph::Panicked => Err(Errno::EIO),
        }
    }
}

impl Io for FilterIo<'_> {
    type Task = Waiting;
    type Block = Block;
    type Buf = IoSlice;

    fn now_ns(&self) -> u64 {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }

    fn current(&self) -> Waiting {
        Waiting::current()
    }

    fn park(&self) {
        coroutine::park();
    }

    fn unpark(&self, task: Waiting) {
        // It may have panicked between publishing itself and parking.
        if !(matches!(self.graph, Graph::Panicked) && task.is_current()) {
            task.wake();
        }
    }

    fn spawn_flusher(&self) {
        fault::point("spawn_flusher");
        self.filter.spawn_flusher();
    }

    fn notify(&self) {
        fault::point("notify");
        self.filter.notify();
    }

    fn alloc(&self, len: usize) -> Option<Block> {
        self.filter.pool()?.take(len)
    }

    fn read_source(
        &self,
        offset: u64,
        block: &mut Block,
        at: usize,
        len: usize,
    ) -> Result<(), Errno> {
        fault::point("read_source");
        let part = block.as_mut().get_mut(at..at + len).ok_or(Errno::EIO)?;
        if self.filter.cached().is_some_and(|cached| cached.read(offset, part)) {
            return Ok(());
        }
        self.io(|graph, source, _| source.read(graph, offset, block, at, len))
    }

    fn fetch(&self, parts: &[Fetch], buf: &mut IoSlice) -> Result<(), Errno> {
        fault::point("fetch");
        self.io(|graph, source, target| {
            let buf = &*buf;
            let read = |part: &Fetch| {
                fault::point("read_part");
                let child = match part.device {
                    Device::Source => source,
                    Device::Log => target,
                };
                child.read_into(graph, part.offset, part.len, buf, part.at)
            };
            if let [only] = parts {
                return read(only);
            }
            let done = Cell::new(0);
            let error = Cell::new(None);
            coroutine::for_each(
                graph,
                parts.len(),
                FETCH_WIDTH,
                &|index| match read(&parts[index]) {
                    Ok(()) => done.set(done.get() + 1),
                    Err(errno) => error.set(error.get().or(Some(errno))),
                },
            );
            match error.get() {
                Some(errno) => Err(errno),
                None if done.get() == parts.len() => Ok(()),
                None => Err(Errno::EIO),
            }
        })
    }

    fn source_is_zero(&self, offset: u64, len: u64) -> Result<(u64, bool), Errno> {
        fault::point("source_is_zero");
        self.io(|graph, source, _| source.is_zero(graph, offset, len))
    }

    fn write_log(&self, offset: u64, parts: &[&[u8]]) -> Result<(), Errno> {
        fault::point("write_log");
        self.io(|graph, _, target| target.write(graph, offset, parts))
    }

    fn discard_source(&self, offset: u64, len: u64) {
        fault::point("discard_source");
        // A wish of the guest that it was told is fulfilled: there is nobody to report to. Without
        // a writing user there is nobody who wishes any more.
        let _ = self.io(|graph, source, _| {
            if source.may_write(graph) { source.discard(graph, offset, len) } else { Ok(()) }
        });
    }

    fn share_source(&self, offset: u64, log_offset: u64, len: u64) -> Result<(), Errno> {
        fault::point("share_source");
        let files = self.filter.shared().ok_or(Errno::EIO)?;
        self.io(|graph, _, _| {
            let share = || files.share(offset, log_offset, len);
            let shared = coroutine::in_worker(graph, share).ok_or(Errno::EIO)?;
            shared.map_err(|error| Errno(error.raw_os_error().unwrap_or(Errno::EIO.0)))
        })
    }

    fn discard_log(&self, offset: u64, len: u64) {
        fault::point("discard_log");
        // Only space is at stake: an image that cannot discard just stays as large as it is.
        let _ = self.io(|graph, _, target| target.discard(graph, offset, len));
    }

    fn copy_into(&self, buf: &mut IoSlice, at: usize, data: &[u8]) {
        fault::point("copy_into");
        buf.copy_from(at, data);
    }

    fn zero_into(&self, buf: &mut IoSlice, at: usize, len: usize) {
        buf.zero(at, len);
    }
}
