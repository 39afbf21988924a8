// SPDX-License-Identifier: GPL-2.0-or-later
//! The fleecing filter: sits above the source, saves old data before a guest request passes.
//!
//! The driver's C callbacks are in `qemu/driver.rs`; the engine that decides is `fleece`. This
//! file joins them and offers what `access` needs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use fleece::{ByteRange, Discard, Engine, Errno, Geometry, Group, NeedMap, OnError, Stats};

use crate::fault;
use crate::filter_io::FilterIo;
use crate::qemu::blocker::OpBlocker;
use crate::qemu::cached::CachedFile;
use crate::qemu::child::Child;
use crate::qemu::coroutine::{Busy, CoGraph, Waiting};
use crate::qemu::graph::Bds;
use crate::qemu::main_loop::MainLoop;
use crate::qemu::memory::{Block, Pool};
use crate::qemu::reflink::SharedFiles;
use crate::qemu::seal::Seal;
use crate::qemu::{coroutine, driver, main_loop, try_guard};

/// Name of the filter's driver. Options at open: `file` (the source) and `target` (the fleecing
/// image), both node names.
pub const FILTER_DRIVER: &str = "backup-fleecing";
/// Name of the snapshot's driver. Option at open: `file` (the filter's node name).
pub const SNAPSHOT_DRIVER: &str = "backup-snapshot";

/// Smallest unit in which the fleecing image's space is given back, in bytes.
const MIN_SEGMENT_BYTES: u64 = 1 << 20;

const NO_REFLINK: &str = "reflink-size needs the disk and its fleecing image as raw files on one \
                          filesystem that can share blocks, such as XFS or btrfs";

/// How a filter is set up by `access`.
pub struct Settings {
    /// RAM for old data in bytes; 0 makes guest requests wait for the fleecing image.
    pub buffer_bytes: u64,
    /// What the devices of one setup share: a limit on their RAM for old data.
    pub group: Option<Arc<Group>>,
    /// At most so much of the fleecing image is used; none means that it is as large as the disk.
    pub fleecing_limit_bytes: Option<u64>,
    /// Captures of at least so many bytes share the disk's blocks with the fleecing image.
    pub share_from_bytes: Option<u64>,
    /// RAM for the states and positions of old data.
    pub metadata_limit_bytes: u64,
    /// Without progress for so long the snapshot breaks.
    pub timeout_ms: u64,
    /// What an error before the end of a guest request does.
    pub on_error: OnError,
    /// No guest device promises zeroes after a discard, so discards may be carried out later.
    pub postpone_discards: bool,
    /// What the reader needs; none means all.
    pub need: Option<Box<dyn NeedMap>>,
    /// Why other commands on the disk are refused meanwhile.
    pub reason: String,
    /// Called from any thread when the snapshot became degraded or broken.
    pub notify: Box<dyn Fn() + Send + Sync>,
    /// Called in the main loop when the filter's node closes; again after a panic.
    pub on_close: Box<dyn Fn() + Send>,
}

type OnClose = Box<dyn Fn() + Send>;

/// The state of one filter node.
pub struct Filter {
    node: Bds,
    source: Child,
    target: Child,
    /// Whether the filter claims its permissions on the source.
    active: AtomicBool,
    engine: OnceLock<Engine<Waiting, Block>>,
    pool: OnceLock<Pool>,
    /// The source's page cache, where it has one.
    cached: OnceLock<CachedFile>,
    /// The two files, if old data is shared.
    shared: OnceLock<SharedFiles>,
    postpone_discards: AtomicBool,
    notify: OnceLock<Box<dyn Fn() + Send + Sync>>,
    on_close: Mutex<Option<OnClose>>,
    reason: OnceLock<String>,
    /// Refuses commands on the filter itself. Only while it has a snapshot node, because it must be
    /// gone when the filter's node is deleted.
    blocker: Mutex<Option<OpBlocker>>,
    /// Keeps disk and fleecing image as they are, as long as the filter is there.
    seal: OnceLock<Seal>,
}

impl std::fmt::Debug for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Filter").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Filter {
    /// The state of a node that was just opened.
    pub(crate) fn new(node: Bds, source: Child, target: Child) -> Self {
        Self {
            node,
            source,
            target,
            active: AtomicBool::new(false),
            engine: OnceLock::new(),
            pool: OnceLock::new(),
            cached: OnceLock::new(),
            shared: OnceLock::new(),
            postpone_discards: AtomicBool::new(false),
            notify: OnceLock::new(),
            on_close: Mutex::new(None),
            reason: OnceLock::new(),
            blocker: Mutex::new(None),
            seal: OnceLock::new(),
        }
    }

    pub(crate) fn node(&self) -> Bds {
        self.node
    }

    pub(crate) fn source(&self) -> Child {
        self.source
    }

    pub(crate) fn target(&self) -> Child {
        self.target
    }

    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    pub(crate) fn notify(&self) {
        if let Some(notify) = self.notify.get() {
            notify();
        }
    }

    pub(crate) fn pool(&self) -> Option<&Pool> {
        self.pool.get()
    }

    pub(crate) fn cached(&self) -> Option<&CachedFile> {
        self.cached.get()
    }

    pub(crate) fn shared(&self) -> Option<&SharedFiles> {
        self.shared.get()
    }

    /// Bytes of one granule, once configured.
    pub(crate) fn granule_bytes(&self) -> Option<u64> {
        Some(self.engine.get()?.geometry().granule())
    }

    /// Runs `f` for a guest request. After a panic the snapshot is broken and the request passes.
    fn for_guest<T>(
        &self,
        point: &'static str,
        graph: &CoGraph<'_>,
        pass: T,
        f: impl FnOnce(&Engine<Waiting, Block>, &FilterIo<'_>) -> T,
    ) -> T {
        let Some(engine) = self.engine.get() else { return pass };
        let io = FilterIo::with_graph(self, graph);
        let run = || {
            fault::point(point);
            f(engine, &io)
        };
        try_guard(run).unwrap_or_else(|| {
            self.break_after_panic();
            pass
        })
    }

    /// Saves what a guest request on `range` would overwrite. An error is the request's.
    pub(crate) fn before_write(&self, graph: &CoGraph<'_>, range: ByteRange) -> Result<(), Errno> {
        self.for_guest("before_write", graph, Ok(()), |engine, io| engine.before_write(io, range))
    }

    /// As [`Filter::before_write`], for zeroes.
    pub(crate) fn before_zeroes(&self, graph: &CoGraph<'_>, range: ByteRange) -> Result<(), Errno> {
        self.for_guest("before_zeroes", graph, Ok(()), |engine, io| {
            engine.before_write_zeroes(io, range)
        })
    }

    /// How much of a long write of zeroes may go down at once, and whether
    /// [`Filter::before_zeroes`] is due before that.
    pub(crate) fn next_part(&self, graph: &CoGraph<'_>, range: ByteRange) -> (u64, bool) {
        let unit = self.source.discard_unit();
        self.for_guest("next_part", graph, (range.len(), false), |engine, _| {
            engine.next_part(range, unit)
        })
    }

    /// How much of a guest's discard of `whole_bytes` to treat alike, and how; none when discards
    /// must be captured like writes.
    pub(crate) fn next_discard(
        &self,
        graph: &CoGraph<'_>,
        rest: ByteRange,
        whole_bytes: u64,
    ) -> Option<(u64, Discard)> {
        if !self.postpone_discards.load(Ordering::Acquire) {
            return None;
        }
        let pass = (rest.len(), Discard::Pass);
        self.for_guest("next_discard", graph, Some(pass), |engine, _| {
            engine.next_discard(rest, whole_bytes).ok()
        })
    }

    fn break_after_panic(&self) {
        if let Some(engine) = self.engine.get() {
            // A guest's write may pass now that would have made an older one void.
            engine.void_discards();
            let io = FilterIo::after_panic(self);
            let text = "internal error (panic) in the fleecing filter".to_owned();
            if try_guard(|| engine.break_snapshot(&io, text, Errno::EIO)).is_none() {
                engine.deactivate();
            }
        }
    }

    /// Runs `f` for QEMU; a panic breaks the snapshot.
    pub(crate) fn or_break(&self, f: impl FnOnce(&Self)) {
        if try_guard(|| f(self)).is_none() {
            self.break_after_panic();
        }
    }

    /// Runs `f` for the reader; a panic breaks the snapshot and fails the request.
    pub(crate) fn for_reader<T>(
        &self,
        graph: &CoGraph<'_>,
        f: impl FnOnce(&Engine<Waiting, Block>, &FilterIo<'_>) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let engine = self.engine.get().ok_or(Errno::EIO)?;
        let io = FilterIo::with_graph(self, graph);
        let run = || {
            fault::point("reader");
            f(engine, &io)
        };
        try_guard(run).unwrap_or_else(|| {
            self.break_after_panic();
            Err(Errno::EIO)
        })
    }

    /// Starts a background coroutine that writes old data to the fleecing image.
    pub(crate) fn spawn_flusher(&self) {
        let node = self.node;
        coroutine::spawn(node, move |here| {
            let Some(filter) = driver::filter_of(node) else { return };
            let Some(engine) = filter.engine.get() else { return };
            let flushed = try_guard(|| {
                fault::point("flusher");
                // The lock is held for one batch, and not yet taken when there is none: whoever
                // changes the graph waits for neither long.
                while let Some(batch) = engine.next_batch(&FilterIo::without_io(filter)) {
                    let graph = here.lock_graph();
                    engine.flush(&FilterIo::with_graph(filter, &graph), batch);
                }
            });
            if flushed.is_none() {
                engine.flusher_died();
                filter.break_after_panic();
            }
        });
    }

    /// Starts a background coroutine that does the guest's postponed discards, if there are any.
    fn spawn_postponed(&'static self, engine: &'static Engine<Waiting, Block>) {
        let Some(announced) = engine.announce_postponed(&FilterIo::without_io(self)) else {
            return;
        };
        let node = self.node;
        coroutine::spawn(node, move |here| {
            // In another thread it begins later: until then the teardown must not begin to drain.
            let _announced = announced;
            let Some(filter) = driver::filter_of(node) else { return };
            let Some(engine) = filter.engine.get() else { return };
            let discard = || {
                fault::point("postponed_discards");
                engine.do_postponed(&FilterIo::with_own_lock(filter, here));
            };
            if try_guard(discard).is_none() {
                filter.break_after_panic();
            }
        });
    }

    pub(crate) fn drain_begin(&self) {
        fault::point(if self.is_active() { "drain_begin_active" } else { "drain_begin" });
        if let Some(engine) = self.engine.get() {
            engine.quiesce();
        }
    }

    /// Not here: the end of a drain may come inside a change of the graph, and a flusher would wait
    /// for its end while a new drain waits for the flusher.
    pub(crate) fn drain_end(&self) {
        fault::point(if self.is_active() { "drain_end_active" } else { "drain_end" });
        let Some(engine) = self.engine.get() else { return };
        // Whoever reopens a node drains it.
        if let Some(text) = self.seal.get().zip(MainLoop::current()).and_then(|(s, m)| s.broken(m))
            && engine.stats().error.is_none()
        {
            engine.break_snapshot(&FilterIo::without_io(self), text, Errno::EIO);
        }
        if !engine.resume() {
            return;
        }
        let (node, busy) = (self.node, Busy::new(self.node));
        main_loop::schedule_in_polls(Box::new(move |_| {
            if let Some(filter) = driver::filter_of(node) {
                filter.or_break(Self::kick);
            }
            drop(busy);
        }));
    }

    fn kick(&self) {
        if let Some(engine) = self.engine.get() {
            engine.kick(&FilterIo::without_io(self));
        }
    }

    /// A snapshot node was opened above. Main loop.
    pub(crate) fn snapshot_opened(&self) {
        let blocker = MainLoop::current()
            .zip(self.reason.get())
            .map(|(main_loop, reason)| OpBlocker::new(main_loop, self.node, reason));
        *self.blocker.lock().unwrap_or_else(PoisonError::into_inner) = blocker;
    }

    /// The snapshot node closes. Main loop.
    pub(crate) fn snapshot_closes(&self) {
        *self.blocker.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The node closes. May be called again when it panicked.
    pub(crate) fn closing(&self) {
        fault::point("filter_close");
        let on_close = self.on_close.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(on_close) = on_close.as_ref() {
            on_close();
        }
    }
}

fn filter(node: Bds) -> Result<&'static Filter, String> {
    driver::filter_of(node).ok_or_else(|| format!("the node is not a {FILTER_DRIVER} node"))
}

/// Prepares a filter that was just opened. Main loop.
///
/// # Errors
/// A sentence when the devices need larger granules than supported, a block job is at work on them,
/// or there is no memory.
pub fn configure(main_loop: MainLoop, node: Bds, settings: Settings) -> Result<(), String> {
    let filter = filter(node)?;
    let configured = || "the filter is configured already".to_owned();
    let below = [filter.source.node(), filter.target.node()];
    let seal =
        Seal::new(main_loop, node, below, &settings.reason).map_err(|error| error.to_string())?;
    filter.seal.set(seal).map_err(|_| configured())?;
    filter.reason.set(settings.reason).map_err(|_| configured())?;
    let alignment = filter.source.common_alignment(filter.target);
    let segment_bytes = filter.target.cluster_bytes().next_power_of_two().max(MIN_SEGMENT_BYTES);
    let engine = Engine::new(fleece::Settings {
        geometry: Geometry::new(filter.source.size_bytes(), alignment)?,
        buffer_bytes: settings.buffer_bytes,
        timeout_ns: settings.timeout_ms.saturating_mul(1_000_000),
        image_bytes: filter.target.size_bytes(),
        segment_bytes,
        fleecing_limit_bytes: settings.fleecing_limit_bytes,
        share_from_bytes: settings.share_from_bytes,
        metadata_limit_bytes: settings.metadata_limit_bytes,
        on_error: settings.on_error,
        group: settings.group.map(|group| group.join(kick_later(node))),
        need: settings.need,
    })
    .map_err(|fleece::OutOfMemory| "no memory for the states of granules".to_owned())?;
    if settings.share_from_bytes.is_some() {
        let (source, image) = (filter.source.node(), filter.target.node());
        let shared = SharedFiles::of(main_loop, source, image, engine.geometry().granule())
            .map_err(|error| format!("{NO_REFLINK}: {error}"))?;
        filter.shared.set(shared).map_err(|_| configured())?;
    }
    if let Some(cached) = CachedFile::of(main_loop, filter.source.node()) {
        filter.cached.set(cached).map_err(|_| configured())?;
    }
    filter.pool.set(Pool::new(node, settings.buffer_bytes)).map_err(|_| configured())?;
    filter.engine.set(engine).map_err(|_| configured())?;
    filter.notify.set(settings.notify).map_err(|_| configured())?;
    filter.postpone_discards.store(settings.postpone_discards, Ordering::Release);
    *filter.on_close.lock().unwrap_or_else(PoisonError::into_inner) = Some(settings.on_close);
    Ok(())
}

/// What another disk calls, in any thread, when this one should look after its buffer.
fn kick_later(node: Bds) -> Box<dyn Fn() + Send + Sync> {
    let name = MainLoop::current().map(|main_loop| node.node_name(main_loop)).unwrap_or_default();
    Box::new(move || {
        let name = name.clone();
        main_loop::schedule_in_polls(Box::new(move |main_loop| {
            if let Some(filter) = Bds::find(main_loop, &name).and_then(driver::filter_of) {
                filter.or_break(Filter::kick);
            }
        }));
    })
}

/// Starts or stops capturing and claiming permissions. Main loop, everything drained, immediately
/// before the filter is put above its source or taken away again: permissions change with that.
///
/// # Errors
/// The filter is to start and cannot: it broke before.
pub fn set_active(node: Bds, active: bool) -> Result<(), String> {
    let filter = filter(node)?;
    if active
        && let Some(engine) = filter.engine.get()
        && let Some((text, _)) = engine.stats().error
    {
        return Err(text);
    }
    filter.active.store(active, Ordering::Release);
    if let Some(engine) = filter.engine.get() {
        if active {
            engine.activate();
        } else {
            engine.deactivate();
        }
    }
    Ok(())
}

/// The counters of a filter.
pub fn stats(node: Bds) -> Stats {
    filter(node)
        .ok()
        .and_then(|filter| filter.engine.get())
        .map_or_else(Stats::default, Engine::stats)
}

/// Begins the teardown: nothing is captured any more, background I/O stops, waiting guest requests
/// go on, snapshot reads fail, and postponed discards are done.
pub fn begin_close(node: Bds) {
    if let Ok(filter) = filter(node)
        && let Some(engine) = filter.engine.get()
    {
        engine.close(&FilterIo::without_io(filter));
        filter.spawn_postponed(engine);
    }
}

/// Requests of the filter's own that are still in flight.
pub fn io_in_flight(node: Bds) -> u64 {
    filter(node).ok().and_then(|filter| filter.engine.get()).map_or(0, Engine::io_in_flight)
}

/// How long the oldest of those has been in flight.
pub fn oldest_io(node: Bds) -> Option<Duration> {
    let filter = filter(node).ok()?;
    let oldest_ns = filter.engine.get()?.oldest_io_ns(&FilterIo::without_io(filter))?;
    Some(Duration::from_nanos(oldest_ns))
}

/// Breaks the snapshot when it makes no progress; called every second.
pub fn check_timeout(node: Bds) {
    if let Ok(filter) = filter(node)
        && let Some(engine) = filter.engine.get()
    {
        filter.or_break(|filter| engine.check_timeout(&FilterIo::without_io(filter)));
    }
}

/// From now on discards are captured like writes.
pub fn capture_discards(node: Bds) {
    if let Ok(filter) = filter(node) {
        filter.postpone_discards.store(false, Ordering::Release);
    }
}

/// Gives RAM back that the buffer has not used for a while, until then; called every second.
pub fn give_back_idle_ram(node: Bds, until: Instant) {
    if let Ok(filter) = filter(node)
        && let Some(pool) = filter.pool.get()
    {
        pool.give_back_idle(until);
    }
}
