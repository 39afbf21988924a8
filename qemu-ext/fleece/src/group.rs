// SPDX-License-Identifier: GPL-2.0-or-later
//! A cap on the RAM for old data over several disks.
//!
//! Each disk has a share. Above half of the cap the disk with the largest share is urged to write
//! its oldest data to its fleecing image; disks that found no room are told when there is some.

use std::sync::Arc;

use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering};

/// Called from any thread, with locks of the caller held: it must only arrange for
/// [`crate::Engine::kick`] to be called soon.
type Wake = Box<dyn Fn() + Send + Sync>;

struct Share {
    used: AtomicU64,
    /// It is the largest share, and should shrink.
    urged: AtomicBool,
    /// It found no room.
    starving: AtomicBool,
    wake: Wake,
}

/// The cap of all disks of one backup access.
pub struct Group {
    limit: u64,
    used: AtomicU64,
    shares: Mutex<Vec<Arc<Share>>>,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl Group {
    /// A cap of `limit_bytes`.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Self {
        Self { limit: limit_bytes, used: AtomicU64::new(0), shares: Mutex::new(Vec::new()) }
    }

    /// A new disk under the cap. `wake` is called from any thread, with locks held: it must only
    /// arrange for [`crate::Engine::kick`] to be called soon.
    #[must_use]
    pub fn join(self: &Arc<Self>, wake: Box<dyn Fn() + Send + Sync>) -> Membership {
        let share = Arc::new(Share {
            used: AtomicU64::new(0),
            urged: AtomicBool::new(false),
            starving: AtomicBool::new(false),
            wake,
        });
        self.shares.lock().push(Arc::clone(&share));
        Membership { group: Arc::clone(self), share }
    }

    fn is_high(&self) -> bool {
        self.used.load(Ordering::Relaxed) > self.limit / 2
    }

    fn urge_fullest(&self) {
        let fullest = {
            let shares = self.shares.lock();
            shares.iter().max_by_key(|share| share.used.load(Ordering::Relaxed)).cloned()
        };
        if let Some(share) = fullest
            && !share.urged.swap(true, Ordering::Relaxed)
        {
            (share.wake)();
        }
    }

    fn wake_starving(&self) {
        let starving: Vec<Arc<Share>> = {
            let shares = self.shares.lock();
            let starving = |share: &&Arc<Share>| share.starving.swap(false, Ordering::Relaxed);
            shares.iter().filter(starving).cloned().collect()
        };
        for share in starving {
            (share.wake)();
        }
    }
}

/// One disk's place under a cap; ends when dropped.
pub struct Membership {
    group: Arc<Group>,
    share: Arc<Share>,
}

impl std::fmt::Debug for Membership {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Membership").field("group", &self.group).finish_non_exhaustive()
    }
}

impl Membership {
    /// Takes room; whether there was enough.
    pub(crate) fn try_reserve(&self, bytes: u64) -> bool {
        let group = &*self.group;
        let fits = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= group.limit);
        let taken = group.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok();
        if taken {
            self.share.used.fetch_add(bytes, Ordering::Relaxed);
        } else {
            self.share.starving.store(true, Ordering::Relaxed);
        }
        if group.is_high() || !taken {
            group.urge_fullest();
        }
        taken
    }

    /// Gives room back.
    pub(crate) fn release(&self, bytes: u64) {
        self.group.used.fetch_sub(bytes, Ordering::Relaxed);
        self.share.used.fetch_sub(bytes, Ordering::Relaxed);
        self.group.wake_starving();
    }

    /// Whether this disk should write its old data to its image although its own buffer is not
    /// full.
    pub(crate) fn is_urged(&self) -> bool {
        if !self.share.urged.load(Ordering::Relaxed) {
            return false;
        }
        let high = self.group.is_high();
        if !high {
            self.share.urged.store(false, Ordering::Relaxed);
        }
        high
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.group.shares.lock().retain(|share| !Arc::ptr_eq(share, &self.share));
        let left = self.share.used.swap(0, Ordering::Relaxed);
        self.group.used.fetch_sub(left, Ordering::Relaxed);
        self.group.wake_starving();
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::Group;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn the_fullest_is_urged_and_the_starving_are_told() {
        let group = Arc::new(Group::new(100));
        let woken: [Arc<AtomicU32>; 2] = Default::default();
        let members: Vec<_> = woken
            .iter()
            .map(|count| {
                let count = Arc::clone(count);
                group.join(Box::new(move || {
                    count.fetch_add(1, Ordering::Relaxed);
                }))
            })
            .collect();
        let count = |index: usize| woken[index].load(Ordering::Relaxed);
        assert!(members[0].try_reserve(40) && members[1].try_reserve(10));
        assert!(!members[0].is_urged());
        assert!(members[0].try_reserve(30));
        assert!(members[0].is_urged() && !members[1].is_urged());
        assert_eq!((count(0), count(1)), (1, 0));
        assert!(!members[1].try_reserve(30), "it would exceed the cap");
        members[0].release(30);
        assert_eq!(count(1), 1, "there is room again");
        assert!(!members[0].is_urged());
        drop(members);
        assert_eq!(group.used.load(Ordering::Relaxed), 0);
    }
}
