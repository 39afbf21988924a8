// SPDX-License-Identifier: GPL-2.0-or-later
//! Leases, and the command `backup-access-renew`: an access whose client does not renew its lease
//! is torn down as a failure.
//!
//! A lease counts ticks of a timer that only the main loop itself runs, never a nested wait. A tick
//! counts only if renewals could have been handled since the one before: it came on time, and no
//! command of ours was under way. Whatever held renewals up for longer leaves a lease a second at
//! least. So a renewal that was sent in time is handled before the lease is over; see
//! `docs/design/0011-how-a-lease-counts-time.md`.

use std::time::{Duration, Instant};

use super::registry::{self, Operation};
use super::{status, teardown};
use crate::fault;
use crate::qemu::error::Error;
use crate::qemu::main_loop::{self, MainLoop};
use crate::qemu::timer::Timer;

const TICK_MS: u32 = 250;
const TICKS_PER_S: u32 = 1000 / TICK_MS;
/// A tick that comes later than this after the one before counts for nothing.
const ON_TIME: Duration = Duration::from_millis(2 * TICK_MS as u64);
/// A lease has so many ticks more than its seconds: it is never shorter than promised, and longer
/// than what a last tick that is still on time may hide. It has as many left after all that holds
/// renewals up for longer.
const GRACE_TICKS: u32 = TICKS_PER_S;
/// Between two tries to end an access while something is in the way.
const RETRY_TICKS: u32 = TICKS_PER_S;
/// As above when the try itself failed, which may have taken a while.
const RETRY_TICKS_AFTER_ERROR: u32 = 10 * TICKS_PER_S;

/// The lease of one access.
#[derive(Debug)]
pub(super) struct Lease {
    seconds: u32,
    ticks_left: u32,
    is_over: bool,
    /// How often the access could not be ended since.
    tries: u32,
}

impl Lease {
    /// A lease that begins now; none for 0 seconds.
    pub(super) fn new(seconds: u32) -> Option<Self> {
        let mut lease = Self { seconds, ticks_left: 0, is_over: false, tries: 0 };
        lease.begin();
        (seconds > 0).then_some(lease)
    }

    fn begin(&mut self) {
        self.ticks_left = self.seconds.saturating_mul(TICKS_PER_S).saturating_add(GRACE_TICKS);
    }

    /// Counts a tick; whether it was the last one.
    fn tick(&mut self) -> bool {
        self.ticks_left = self.ticks_left.saturating_sub(1);
        self.ticks_left == 0
    }

    /// Nobody could renew it for some time.
    fn held_up(&mut self) {
        if !self.is_over {
            self.ticks_left = self.ticks_left.max(GRACE_TICKS);
        }
    }

    /// Whole seconds left, rounded up.
    pub(super) fn left_s(&self) -> u32 {
        if self.is_over {
            return 0;
        }
        self.ticks_left.saturating_sub(GRACE_TICKS).div_ceil(TICKS_PER_S)
    }

    /// What is to be said about a lease that is over.
    pub(super) fn why_over(&self) -> Option<String> {
        let text = || format!("its lease of {} seconds ended without a renewal", self.seconds);
        self.is_over.then(text)
    }
}

/// What a tick says about the time since the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tick {
    /// Renewals could be handled.
    Counts,
    /// A command of ours may have held them up for a moment.
    Skipped,
    /// They were held up for longer.
    HeldUp,
}

/// The ticks of all leases.
#[derive(Debug)]
pub(super) struct Clock {
    timer: Option<Timer>,
    /// When the last tick came; none while there are no leases.
    last: Option<Instant>,
    /// A command of ours was under way at the last tick.
    was_busy: bool,
}

impl Clock {
    pub(super) const fn new() -> Self {
        Self { timer: None, last: None, was_busy: false }
    }

    fn arm(&self) {
        if let Some(timer) = &self.timer {
            timer.arm_in_ms(TICK_MS);
        }
    }

    /// Notes a tick.
    fn tick(&mut self, is_busy: bool) -> Tick {
        let now = Instant::now();
        let on_time = self.last.is_some_and(|last| now.duration_since(last) <= ON_TIME);
        let tick = match (on_time, self.was_busy, is_busy) {
            (false, _, _) | (true, true, true) => Tick::HeldUp,
            (true, false, false) => Tick::Counts,
            // Short commands, one after the other, do not keep a lease alive.
            (true, _, _) => Tick::Skipped,
        };
        (self.last, self.was_busy) = (Some(now), is_busy);
        tick
    }
}

/// Sees to it that leases are counted, if there are any.
pub(super) fn start_clock(main_loop: MainLoop) {
    let mut registry = registry::lock();
    if registry.accesses.iter().all(|access| access.lease.is_none()) {
        return;
    }
    let clock = &mut registry.lease_clock;
    if clock.timer.is_none() {
        clock.timer = Timer::new_outside_polls(main_loop, tick);
    }
    if clock.last.is_none() {
        clock.last = Some(Instant::now());
        clock.arm();
    }
}

/// Counts, and has accesses ended whose leases are over.
fn tick(_: MainLoop) {
    fault::point("lease_tick");
    let mut due = Vec::new();
    {
        let mut registry = registry::lock();
        if registry.accesses.iter().all(|access| access.lease.is_none()) {
            registry.lease_clock.last = None;
            return;
        }
        registry.lease_clock.arm();
        let is_busy = registry.is_busy();
        let tick = registry.lease_clock.tick(is_busy);
        for access in &mut registry.accesses {
            let Some(lease) = &mut access.lease else { continue };
            match tick {
                Tick::Counts if lease.tick() => due.push(access.target_id.clone()),
                Tick::Counts | Tick::Skipped => {}
                Tick::HeldUp => lease.held_up(),
            }
        }
    }
    for target_id in due {
        main_loop::schedule(Box::new(move |main_loop| end(main_loop, &target_id)));
    }
}

/// Tries to end an access whose lease is over. In the main loop itself.
fn end(main_loop: MainLoop, target_id: &str) {
    // The next tick asks again.
    let Ok(_operation) = Operation::begin("the teardown after the end of a lease") else { return };
    if !begin_end(target_id) {
        return;
    }
    fault::point("lease_end");
    match teardown::try_end(main_loop, target_id) {
        Ok(None) => {}
        Ok(Some(what)) => try_later(target_id, RETRY_TICKS, &what),
        Err(error) => try_later(target_id, RETRY_TICKS_AFTER_ERROR, &error.to_string()),
    }
}

/// The decision: from here on the lease is over. False if it was renewed since the tick.
fn begin_end(target_id: &str) -> bool {
    let mut registry = registry::lock();
    let Some(access) = registry.access(target_id) else { return false };
    let Some(lease) = access.lease.as_mut().filter(|lease| lease.ticks_left == 0) else {
        return false;
    };
    lease.is_over = true;
    access.closing = true;
    // QEMU exits: there is nothing left to take out.
    !access.end_reported
}

fn try_later(target_id: &str, ticks: u32, what: &str) {
    let mut registry = registry::lock();
    let Some(lease) = registry.access(target_id).and_then(|access| access.lease.as_mut()) else {
        return;
    };
    lease.ticks_left = ticks;
    lease.tries = lease.tries.saturating_add(1);
    let (tries, why) = (lease.tries, lease.why_over().unwrap_or_default());
    drop(registry);
    // Less and less often: an image may be stuck for days.
    if tries.is_power_of_two() {
        status::warn(&format!("target '{target_id}': {why}, but {what}; it is tried again"));
    }
}

/// Lets the lease of an access begin again. May be called from any thread.
///
/// # Errors
/// There is no such access, or none that can be renewed.
pub fn renew(target_id: &str) -> Result<(), Error> {
    fault::point("renew");
    let mut registry = registry::lock();
    let Some(access) = registry.access(target_id) else {
        let why = registry.why_gone(target_id).map(|why| format!(": {why}")).unwrap_or_default();
        return Err(Error::new(format!("target '{target_id}' has no backup access{why}")));
    };
    let lease = match &mut access.lease {
        Some(lease) if !access.closing => lease,
        lease => {
            let over = lease.as_ref().and_then(Lease::why_over);
            let why = over.map(|why| format!(": {why}")).unwrap_or_default();
            return Err(Error::new(if access.closing {
                format!("the backup access of target '{target_id}' is closing{why}")
            } else {
                format!("the backup access of target '{target_id}' has no lease")
            }));
        }
    };
    lease.begin();
    Ok(())
}
