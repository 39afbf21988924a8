// SPDX-License-Identifier: MIT OR Apache-2.0
//! A thread with a mount namespace of its own. What is mounted in it exists for nobody else, and no
//! longer than the thread and the commands it has started.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

type Work = Box<dyn FnOnce() + Send>;

/// A thread that does one thing after the other in its mount namespace. Dropping it ends the thread, and
/// kills the commands it has started.
#[derive(Debug)]
pub(crate) struct Holder {
    work: Option<mpsc::Sender<Work>>,
    thread: Option<std::thread::JoinHandle<()>>,
    tid: i32,
}

impl Holder {
    /// Starts one; needs root.
    pub(crate) fn start(name: &str) -> io::Result<Self> {
        let (work, queue) = mpsc::channel::<Work>();
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let entered = enter_own_namespace();
            let is_in = entered.is_ok();
            let _ = ready.send(entered.map(|()| rustix::thread::gettid().as_raw_nonzero().get()));
            if is_in {
                queue.into_iter().for_each(|work| work());
            }
        })?;
        let tid = is_ready.recv().map_err(io::Error::other)??;
        Ok(Self { work: Some(work), thread: Some(thread), tid })
    }

    /// Does something in the namespace and waits for it, which may block.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let gone = || io::Error::other("the thread with the mounts is gone");
        let (sender, result) = mpsc::channel();
        let work: Work = Box::new(move || drop(sender.send(work())));
        self.work.as_ref().ok_or_else(gone)?.send(work).map_err(|_| gone())?;
        result.recv().map_err(|_| gone())
    }

    /// How this process and those that may look into it see a path of the namespace.
    pub(crate) fn outside(&self, path: &Path) -> PathBuf {
        let root = format!("/proc/{}/task/{}/root", std::process::id(), self.tid);
        Path::new(&root).join(path.strip_prefix("/").unwrap_or(path))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.work.take());
        if let Some(thread) = self.thread.take() {
            // It only panicked if work of it did, which `run` has told.
            let _ = thread.join();
        }
    }
}

fn enter_own_namespace() -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
    // What the host mounts and unmounts still shows, what is mounted here does not.
    let flags = MsFlags::MS_SLAVE | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mounted_in_a_holder_is_seen_only_there_and_ends_with_it() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let holder = Holder::start("holder").unwrap();
        let inside = path.clone();
        let mounted = holder.run(move || -> io::Result<()> {
            mount(Some("tmpfs"), &inside, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
            std::fs::write(inside.join("file"), "inside")
        });
        mounted.unwrap().unwrap();
        assert!(!path.join("file").exists());
        let outside = holder.outside(&path).join("file");
        assert_eq!(std::fs::read_to_string(&outside).unwrap(), "inside");
        drop(holder);
        assert!(!outside.exists());
        std::fs::remove_dir(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
    }
}
