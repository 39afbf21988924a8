// SPDX-License-Identifier: MIT OR Apache-2.0
//! One pass over a tree: several workers, each with one directory at a time.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use provider_api::Reached;
use rustix::fs::{AtFlags, FileType, Mode, Stat, fstat, mkdirat, statat};

use super::attributes::{At, Looks, give, read};
use super::entry::{Begun, Place, begin, fill};
use super::links::{LINK_BYTES, Link, Links};
use super::paths::{Dir, Paths};
use super::stamp::{Key, Known, NAMES_MAX};
use super::{
    Buffers, Control, CopyError, DirectoryEnd, Fault, PassReport, SKIPPED_MAX, Skipped, TreeCopy,
    VANISHED, deep, take_away,
};

/// More workers than that only wait for the disk.
const WORKERS_MAX: usize = 8;

/// A directory that is to be walked.
struct Job {
    dir: Dir,
    /// Its number, by which it is told from one that has taken its name.
    ino: u64,
    /// Its name in the directory above.
    key: Key,
    /// Its copy was made by the first pass, from this very directory.
    is_known: bool,
    /// What is left out in it.
    reached: Reached,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Job>,
    busy: usize,
    failed: Option<CopyError>,
}

/// What a pass leaves behind.
#[derive(Default)]
pub(super) struct Outcome {
    pub(super) report: PassReport,
    /// What was found at which name, in pieces.
    pub(super) names: Vec<Vec<(Key, Known)>>,
    pub(super) paths: Paths,
    pub(super) ends: Vec<DirectoryEnd>,
    pub(super) broken: Vec<u64>,
}

/// One pass over one volume.
pub(super) struct Pass<'a> {
    tree: &'a TreeCopy,
    control: &'a Control,
    /// Only in the second pass: whether what cannot be read is skipped.
    second: Option<bool>,
    device: u64,
    links: Links,
    paths: Paths,
    /// How many names were found.
    found: AtomicUsize,
    moved: AtomicU64,
    queue: Mutex<Queue>,
    wake: Condvar,
}

impl<'a> Pass<'a> {
    /// Walks the whole tree.
    pub(super) fn run(
        tree: &'a TreeCopy,
        control: &'a Control,
        second: Option<bool>,
    ) -> Result<Outcome, CopyError> {
        let root = fstat(&tree.source).map_err(|errno| Fault::source(errno).at(Path::new("")))?;
        let job = Job {
            dir: Dir::ROOT,
            ino: root.st_ino,
            key: tree.memory.key(0, c""),
            is_known: true,
            reached: tree.reached.clone(),
        };
        let pass = Self {
            tree,
            control,
            second,
            device: root.st_dev,
            links: Links::default(),
            paths: Paths::default(),
            found: AtomicUsize::new(0),
            moved: AtomicU64::new(0),
            queue: Mutex::new(Queue { waiting: vec![job], ..Queue::default() }),
            wake: Condvar::new(),
        };
        let workers = std::thread::available_parallelism().map_or(2, usize::from);
        let mut outcome = Outcome::default();
        std::thread::scope(|scope| {
            let work = || Worker::new(&pass).run();
            let running: Vec<_> =
                (0..workers.clamp(2, WORKERS_MAX)).map(|_| scope.spawn(work)).collect();
            for worker in running {
                let done = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                outcome.report.add(done.report);
                outcome.names.extend(done.names);
                outcome.ends.extend(done.ends);
                outcome.broken.extend(done.broken);
            }
        });
        let queue = pass.queue.into_inner().unwrap_or_else(PoisonError::into_inner);
        outcome.paths = pass.paths;
        queue.failed.map_or(Ok(outcome), Err)
    }

    /// The next directory; none when all are done, or one has failed.
    fn next(&self) -> Option<Job> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if queue.failed.is_some() {
                return None;
            }
            if let Some(job) = queue.waiting.pop() {
                queue.busy += 1;
                return Some(job);
            }
            if queue.busy == 0 {
                return None;
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn done(&self, result: Result<Vec<Job>, CopyError>) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.busy -= 1;
        match result {
            Ok(jobs) => queue.waiting.extend(jobs),
            Err(error) => {
                queue.failed.get_or_insert(error);
            }
        }
        drop(queue);
        self.wake.notify_all();
    }
}

/// A directory that is being walked.
struct Walked {
    dir: Dir,
    /// The number of its copy, by which its names are remembered: a directory that was moved meanwhile may have two
    /// copies, of which one is not whole.
    copy: u64,
    source: OwnedFd,
    target: OwnedFd,
    is_known: bool,
    reached: Reached,
}

impl Walked {
    fn place<'a>(&'a self, name: &'a CStr) -> Place<'a> {
        Place { source: self.source.as_fd(), target: self.target.as_fd(), name }
    }
}

struct Worker<'a> {
    pass: &'a Pass<'a>,
    buffers: Buffers,
    names: Vec<(Key, Known)>,
    outcome: Outcome,
}

impl<'a> Worker<'a> {
    fn new(pass: &'a Pass<'a>) -> Self {
        Self { pass, buffers: Buffers::new(), names: Vec::new(), outcome: Outcome::default() }
    }

    fn run(mut self) -> Outcome {
        while let Some(job) = self.pass.next() {
            let dir = job.dir;
            let walked = match self.walk(job) {
                Err(fault) => self.leave_out(dir, fault).map(|()| Vec::new()),
                Ok(jobs) => Ok(jobs),
            };
            self.pass.done(walked);
        }
        self.outcome.names.push(std::mem::take(&mut self.names));
        self.outcome
    }

    /// Decides what a fault means: only in the second pass a file must be readable, and cannot vanish.
    fn tolerate(&mut self, fault: Fault, path: &Path) -> Result<(), CopyError> {
        match (fault, self.pass.second) {
            (Fault::Vanished | Fault::Source(_), None) => Ok(()),
            (Fault::Source(error), Some(true)) => {
                self.skip(path.to_owned(), &error.to_string());
                Ok(())
            }
            (Fault::Vanished, Some(true)) => {
                self.skip(path.to_owned(), VANISHED);
                Ok(())
            }
            (fault, _) => Err(fault.at(path)),
        }
    }

    fn skip(&mut self, path: PathBuf, why: &str) {
        let report = &mut self.outcome.report;
        report.skipped_count += 1;
        if report.skipped.len() < SKIPPED_MAX {
            let path = self.pass.tree.mount_point.join(path);
            report.skipped.push(Skipped { path, why: why.to_owned() });
        }
    }

    /// Of a directory that cannot be read nothing stays that the first pass may have copied.
    fn leave_out(&mut self, dir: Dir, fault: Fault) -> Result<(), CopyError> {
        let Pass { tree, second, ref paths, .. } = *self.pass;
        let path = paths.path(dir);
        let Some((around, name)) = paths.place(dir).filter(|_| second.is_some()) else {
            return if second.is_some() {
                Err(fault.at(&path))
            } else {
                self.tolerate(fault, &path)
            };
        };
        self.tolerate(fault, &path)?;
        let target = deep::open_directory(&tree.target, &paths.path(around))
            .map_err(|error| Fault::writing(&error).at(&path))?;
        self.take_away(&target, &name).map_err(|fault| fault.at(&path))
    }

    fn remember(&mut self, key: Key, known: Known) {
        // More would be forgotten in the end.
        if self.pass.found.fetch_add(1, Ordering::Relaxed) < NAMES_MAX {
            self.names.push((key, known));
        }
    }

    fn walk(&mut self, job: Job) -> Result<Vec<Job>, Fault> {
        let Pass { tree, control, second, ref paths, .. } = *self.pass;
        control.go_on()?;
        let path = paths.path(job.dir);
        #[cfg(test)]
        (control.at_directory.0)(&path);
        let open = |root| {
            deep::open_directory(root, &path).map_err(|error| {
                let errno = error.raw_os_error().map(rustix::io::Errno::from_raw_os_error);
                errno.map_or_else(|| Fault::Source(error), Fault::source)
            })
        };
        let source = match open(&tree.source) {
            Err(Fault::Source(error)) if error.kind() == std::io::ErrorKind::CrossesDevices => {
                // Something of the host is mounted here.
                self.foreign(path);
                return Ok(Vec::new());
            }
            other => other?,
        };
        let stat = fstat(&source).map_err(Fault::source)?;
        if stat.st_ino != job.ino || stat.st_dev != self.pass.device {
            return Err(Fault::Vanished);
        }
        let target =
            deep::open_directory(&tree.target, &path).map_err(|error| Fault::writing(&error))?;
        let copy = fstat(&target).map_err(|errno| Fault::target("look at a directory", errno))?;
        let now = tree.memory.known(&stat);
        let is_unchanged =
            second.is_some() && job.is_known && tree.memory.is_unchanged(job.key, now);
        if !is_unchanged {
            let attributes = read(At::Open(source.as_fd()), &mut self.buffers)?;
            let end = DirectoryEnd {
                dir: job.dir,
                copy: copy.st_ino,
                looks: Looks::of(&stat),
                attributes,
            };
            control.keep(end.bytes())?;
            self.outcome.ends.push(end);
        }
        // Only now: one whose attributes could not be read is looked at again.
        if second.is_none() {
            self.remember(job.key, now);
        }
        let names = deep::names(&source, &mut self.buffers.names).map_err(Fault::Source)?;
        let Job { dir, is_known, reached, .. } = job;
        let dir = Walked { dir, copy: copy.st_ino, source, target, is_known, reached };
        if second.is_some() && is_known && !is_unchanged {
            self.remove_others(&dir, &names)?;
        }
        let mut jobs = Vec::new();
        for name in names {
            control.go_on()?;
            control.entries.fetch_add(1, Ordering::Relaxed);
            self.outcome.report.entries += 1;
            match self.visit(&dir, &name) {
                Ok(job) => jobs.extend(job),
                Err(fault) => {
                    if let Err(error) = self.tolerate(fault, &paths.path_of(dir.dir, &name)) {
                        self.pass.done_early(error);
                        return Ok(Vec::new());
                    }
                    if second.is_some() {
                        // What the first pass has copied is no more to be had than it.
                        self.take_away(&dir.target, &name)?;
                    }
                }
            }
        }
        Ok(jobs)
    }

    /// Removes from the copy what is not in the container any more.
    fn remove_others(&mut self, dir: &Walked, names: &[CString]) -> Result<(), Fault> {
        let there: HashSet<&CStr> = names.iter().map(CString::as_c_str).collect();
        let copied = deep::names(&dir.target, &mut self.buffers.names)
            .map_err(|error| Fault::writing(&error))?;
        for name in copied {
            if !there.contains(name.as_c_str()) {
                self.take_away(&dir.target, &name)?;
            }
        }
        Ok(())
    }

    fn take_away(&mut self, target: &OwnedFd, name: &CStr) -> Result<(), Fault> {
        let number = self.pass.moved.fetch_add(1, Ordering::Relaxed);
        if take_away(target, name, &self.pass.tree.gone, number)? {
            self.outcome.report.removed += 1;
        }
        Ok(())
    }

    /// One name of a directory; a directory is walked later.
    fn visit(&mut self, dir: &Walked, name: &CStr) -> Result<Option<Job>, Fault> {
        let stat = statat(&dir.source, name, AtFlags::SYMLINK_NOFOLLOW).map_err(Fault::source)?;
        let memory = &self.pass.tree.memory;
        let key = memory.key(dir.copy, name);
        let now = memory.known(&stat);
        let may_be_known = self.pass.second.is_some() && dir.is_known;
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let Some(reached) = dir.reached.enter(name.to_bytes(), is_directory) else {
            self.outcome.report.excluded += 1;
            if may_be_known {
                // It may have been another kind of file.
                self.take_away(&dir.target, name)?;
            }
            return Ok(None);
        };
        if is_directory {
            let is_known = may_be_known && memory.is_same_file(key, now);
            return self.visit_directory(dir, name, &stat, (key, is_known, reached));
        }
        if stat.st_dev != self.pass.device {
            self.foreign(self.pass.paths.path_of(dir.dir, name));
            return Ok(None);
        }
        let has_links = stat.st_nlink > 1;
        let is_broken = has_links && self.pass.tree.broken.contains(&stat.st_ino);
        if may_be_known && !is_broken && memory.is_unchanged(key, now) {
            if has_links {
                self.keep_link(dir, name, &stat)?;
            }
            return Ok(None);
        }
        if may_be_known {
            self.take_away(&dir.target, name)?;
        }
        self.copy(dir, name, &stat)?;
        if self.pass.second.is_none() {
            self.remember(key, now);
        }
        Ok(None)
    }

    fn visit_directory(
        &mut self,
        dir: &Walked,
        name: &CStr,
        stat: &Stat,
        (key, is_known, reached): (Key, bool, Reached),
    ) -> Result<Option<Job>, Fault> {
        let below = self.pass.paths.add(dir.dir, name, self.pass.control)?;
        if !is_known {
            if self.pass.second.is_some() && dir.is_known {
                self.take_away(&dir.target, name)?;
            }
            mkdirat(&dir.target, name, Mode::RWXU)
                .map_err(|errno| Fault::making("make a directory", errno))?;
        }
        if stat.st_dev != self.pass.device {
            // Else only root could look into it.
            give(At::Named(dir.target.as_fd(), name), Looks::of(stat), &[])?;
            self.foreign(self.pass.paths.path(below));
            return Ok(None);
        }
        Ok(Some(Job { dir: below, ino: stat.st_ino, key, is_known, reached }))
    }

    fn foreign(&mut self, path: PathBuf) {
        if self.outcome.report.foreign.len() < SKIPPED_MAX {
            self.outcome.report.foreign.push(self.pass.tree.mount_point.join(path));
        }
    }

    /// A name whose file has not changed. If another of its names had to be copied again, both become one.
    fn keep_link(&mut self, dir: &Walked, name: &CStr, stat: &Stat) -> Result<(), Fault> {
        let mut links = self.pass.links.lock();
        let Some(link) = links.get_mut(&stat.st_ino) else {
            links.insert(stat.st_ino, Link::new(dir.dir, name, false));
            return self.pass.control.keep(LINK_BYTES + name.to_bytes().len());
        };
        if link.is_broken {
            // This one is the first pass's, and whole: what follows may be linked to it.
            *link = Link::new(dir.dir, name, false);
        }
        if !link.is_new {
            return Ok(());
        }
        self.outcome.report.removed += 1;
        rustix::fs::unlinkat(&dir.target, name, AtFlags::empty())
            .map_err(|errno| Fault::target("remove an old file", errno))?;
        self.pass.control.keep(LINK_BYTES + name.to_bytes().len())?;
        link.add(&self.pass.tree.target, &self.pass.paths, (dir.dir, dir.place(name)))
    }

    fn copy(&mut self, dir: &Walked, name: &CStr, stat: &Stat) -> Result<(), Fault> {
        let place = dir.place(name);
        let has_links = stat.st_nlink > 1;
        let begun = if has_links {
            self.pass.control.keep(LINK_BYTES + name.to_bytes().len())?;
            let mut links = self.pass.links.lock();
            if let Some(link) = links.get_mut(&stat.st_ino) {
                if link.is_broken {
                    let text = "another name of it could not be read";
                    return Err(Fault::Source(std::io::Error::other(text)));
                }
                return link.add(&self.pass.tree.target, &self.pass.paths, (dir.dir, place));
            }
            let begun = begin(place, stat, &mut self.buffers)?;
            links.insert(stat.st_ino, Link::new(dir.dir, name, true));
            begun
        } else {
            begin(place, stat, &mut self.buffers)?
        };
        if let Begun::Content { source, target } = begun {
            let mut bytes = 0;
            let control = self.pass.control;
            let filled = fill(&source, &target, stat, control, &mut self.buffers, &mut bytes);
            self.outcome.report.copied_bytes += bytes;
            if let Err(fault) = filled {
                return self.give_up(dir, name, stat, fault);
            }
        }
        self.outcome.report.copied += 1;
        Ok(())
    }

    /// Nothing stays of a copy that is not complete.
    fn give_up(
        &mut self,
        dir: &Walked,
        name: &CStr,
        stat: &Stat,
        fault: Fault,
    ) -> Result<(), Fault> {
        if !matches!(fault, Fault::Source(_) | Fault::Vanished) {
            return Err(fault);
        }
        if stat.st_nlink == 1 {
            self.take_away(&dir.target, name)?;
            return Err(fault);
        }
        self.outcome.broken.push(stat.st_ino);
        let paths = &self.pass.paths;
        let names = self.pass.links.break_up(stat.st_ino, &self.pass.tree.target, paths)?;
        if self.pass.second == Some(true) {
            for other in
                names.iter().filter(|other| other.dir != dir.dir || other.name.as_c_str() != name)
            {
                let path = paths.path_of(other.dir, &other.name);
                self.skip(path, "another name of it could not be read");
            }
        }
        Err(fault)
    }
}

impl Pass<'_> {
    /// Ends the pass with an error that belongs to a file within a directory.
    fn done_early(&self, error: CopyError) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.failed.get_or_insert(error);
    }
}
