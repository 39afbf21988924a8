// SPDX-License-Identifier: MIT OR Apache-2.0
//! Opens the view of a backup and lists what is read of it. The thread that does so goes on when nobody waits for it
//! any more, and as long as it does the images of the volumes are in use.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use provider_api::{Excludes, IdMapRange, Selection};
use vzdump_core::layout::make_private_dir;

use crate::CtError;
use crate::devices::Devices;
use crate::runtime::{Busy, beside};
use crate::view::{Part, View, ViewOptions};

/// What is to be opened.
pub(crate) struct Wanted {
    /// A directory of ours around the next two, which do not exist yet.
    pub(crate) private: PathBuf,
    /// Where the view is.
    pub(crate) dir: PathBuf,
    /// Where the lists are.
    pub(crate) lists: PathBuf,
    pub(crate) parts: Vec<Part>,
    pub(crate) ids: Vec<IdMapRange>,
    pub(crate) options: ViewOptions,
    pub(crate) excludes: Excludes,
}

/// A view that is being opened.
#[derive(Default)]
pub(crate) struct Opening {
    /// Held by the thread that opens it, also when nobody waits for that any more.
    busy: Busy,
    /// There when everything is mounted.
    view: Arc<Mutex<Option<View>>>,
    walk: Arc<Walk>,
}

/// How far a walk over the files is, and whether it is to end.
#[derive(Default)]
struct Walk {
    names: AtomicU64,
    is_cancelled: AtomicBool,
}

impl Walk {
    /// Before each name.
    fn pass(&self) -> io::Result<()> {
        if self.is_cancelled.load(Ordering::Relaxed) {
            return Err(io::Error::other("it was cancelled"));
        }
        self.names.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Opening {
    /// Opens the view and lists what is read of it. Gives up when nothing moves for as long as `stall`; [`Self::close`]
    /// ends what is then still under way.
    pub(crate) async fn open(
        &self,
        wanted: Wanted,
        stall: Duration,
    ) -> Result<(View, Selection, Devices), CtError> {
        let (view, walk) = (Arc::clone(&self.view), Arc::clone(&self.walk));
        let work = self.busy.beside(move || open_and_list(&wanted, &view, &walk));
        let (selection, devices) = self.watched(work, stall).await?;
        let view = held(&self.view).take().ok_or(CtError::Cancelled)?;
        Ok((view, selection, devices))
    }

    async fn watched<T>(
        &self,
        work: impl Future<Output = Result<T, CtError>>,
        stall: Duration,
    ) -> Result<T, CtError> {
        let mut work = std::pin::pin!(work);
        let mut last = 0;
        loop {
            if let Ok(ended) = tokio::time::timeout(stall, work.as_mut()).await {
                return ended;
            }
            let names = self.walk.names.load(Ordering::Relaxed);
            if names == last {
                return Err(CtError::Invalid(format!(
                    "Mounting the container's volumes and listing their files has not got on for {} seconds, after \
                     {names} names: does their storage answer?",
                    stall.as_secs()
                )));
            }
            last = names;
        }
    }

    /// Ends what is under way, and the view if nobody has taken it.
    pub(crate) async fn close(&self) -> Result<(), CtError> {
        self.walk.is_cancelled.store(true, Ordering::Relaxed);
        self.busy.settle().await;
        let view = held(&self.view).take();
        match view {
            Some(view) => beside(move || view.close()).await,
            None => Ok(()),
        }
    }
}

fn held(view: &Mutex<Option<View>>) -> MutexGuard<'_, Option<View>> {
    view.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open_and_list(
    wanted: &Wanted,
    place: &Mutex<Option<View>>,
    walk: &Walk,
) -> Result<(Selection, Devices), CtError> {
    if walk.is_cancelled.load(Ordering::Relaxed) {
        return Err(CtError::Cancelled);
    }
    make_private_dir(&wanted.private)?;
    make_private_dir(&wanted.dir)?;
    let Wanted { dir, lists, parts, ids, options, excludes, .. } = wanted;
    let view = View::open(dir, parts, ids, options.clone())?;
    let tree = view.host_tree();
    // Before the walk, during which it may have to be closed.
    *held(place) = Some(view);
    let mounts: Vec<_> = parts.iter().map(|part| part.mount_point.as_path()).collect();
    let fault = || CtError::at("list the container's files");
    let selection = Selection::write_watched(lists, &tree, &mounts, excludes, &mut || walk.pass())
        .map_err(fault())?;
    let mut devices = Devices::default();
    // A privileged container may have any.
    for mount in mounts.iter().filter(|_| !ids.is_empty()) {
        let root = tree.join(mount.strip_prefix("/").unwrap_or(mount));
        devices.look(&root, mount, excludes, &mut || walk.pass()).map_err(fault())?;
    }
    Ok((selection, devices))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::Origin;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
    }

    #[test]
    fn a_walk_may_take_long_as_long_as_it_gets_on() {
        let stall = Duration::from_millis(500);
        let opening = Opening::default();
        let slow = async {
            for _ in 0..8 {
                tokio::time::sleep(stall / 4).await;
                opening.walk.pass().unwrap();
            }
            Ok(8)
        };
        let ended = runtime().block_on(opening.watched(slow, stall));
        assert_eq!(ended.unwrap(), 8, "twice as long as nothing may move");
        let stuck = std::future::pending::<Result<(), CtError>>();
        let error = runtime().block_on(opening.watched(stuck, stall)).unwrap_err();
        assert!(error.to_string().contains("after 8 names"), "{error}");
    }

    #[test]
    fn what_nobody_waits_for_is_ended_and_unmounted() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir_all(tree.join("a/b")).unwrap();
        let part =
            Part { key: "rootfs".to_owned(), mount_point: "/".into(), path: tree, is_image: false };
        let wanted = |name: &str| Wanted {
            private: dir.path().join(name),
            dir: dir.path().join(name).join("view"),
            lists: dir.path().join(name).join("lists"),
            parts: vec![part.clone()],
            ids: Vec::new(),
            options: ViewOptions { writable: false, origin: Origin::Volume, is_plain: true },
            excludes: Excludes::parse(&["*.log"]).unwrap(),
        };
        let stall = Duration::from_secs(60);
        runtime().block_on(async {
            let opening = Opening::default();
            let (view, ..) = opening.open(wanted("whole"), stall).await.unwrap();
            assert!(view.host_tree().join("a/b").is_dir());
            view.close().unwrap();
            let opening = Opening::default();
            // The thread has its work, and nobody is left who would take the view.
            tokio::select! {
                biased;
                _ = opening.open(wanted("left"), stall) => panic!("it takes a while"),
                () = std::future::ready(()) => {}
            }
            opening.close().await.unwrap();
            assert!(held(&opening.view).is_none());
            assert!(opening.busy.has_ended(), "its thread has ended");
            assert!(opening.open(wanted("late"), stall).await.is_err(), "it is closed");
        });
    }
}
