// SPDX-License-Identifier: MIT OR Apache-2.0
//! What of a container's tree is backed up, as lists of names that every tool understands.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, fstat, openat, statat};

use crate::excludes::{Excludes, Reached};

/// For the names of a directory.
const NAMES_BYTES: usize = 64 << 10;
/// The longest path that is looked at.
const PATH_BYTES_MAX: usize = 64 << 10;

/// Before names that are taken without what is in them, and before those that are taken with it.
const ALONE: &[u8] = b"--no-recursion\0";
const WITH_ALL: &[u8] = b"--recursion\0";

/// What is backed up, in a directory of two files. They have names relative to the tree (`.`, `./etc`), each
/// followed by a zero byte.
///
/// | file | has |
/// |---|---|
/// | `selected` | what is taken: after an item `--no-recursion` directories without what is in them, after `--recursion` files, and directories with all that is in them on their file system; `tar` reads it by `--one-file-system --null --no-verbatim-files-from --no-unquote --files-from=selected` |
/// | `excluded` | what is left out, for a provider that walks by itself; nothing else of the tree is |
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Selection {
    /// How many names patterns left out; what is in a directory that was left out is not counted.
    pub excluded: u64,
}

impl Selection {
    /// The file with what is taken, as `tar` reads it.
    pub const SELECTED: &str = "selected";
    /// The file with what is left out, with all that is in it.
    pub const EXCLUDED: &str = "excluded";

    /// Makes the directory `target` with the lists for `tree`, which nobody changes and whose volumes are at
    /// `mounts` (as the container sees them). May block.
    ///
    /// # Errors
    /// The tree cannot be walked, or the lists cannot be written.
    pub fn write(
        target: &Path,
        tree: &Path,
        mounts: &[&Path],
        excludes: &Excludes,
    ) -> io::Result<Self> {
        Self::write_watched(target, tree, mounts, excludes, &mut || Ok(()))
    }

    /// The same for a tree whose walk may take long: `watch` is called before each name that is looked at, and ends
    /// the walk by an error.
    ///
    /// # Errors
    /// Those of [`Self::write`] and of `watch`.
    pub fn write_watched(
        target: &Path,
        tree: &Path,
        mounts: &[&Path],
        excludes: &Excludes,
        watch: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<Self> {
        std::fs::create_dir(target)?;
        let list = |name| File::create_new(target.join(name)).map(BufWriter::new);
        let tree = File::open(tree)?.into();
        let mut walk = Walk {
            own: file_systems(&tree, mounts)?,
            tree,
            selected: list(Self::SELECTED)?,
            own_selected: Vec::new(),
            excluded: list(Self::EXCLUDED)?,
            count: 0,
            stack: Vec::new(),
            path: PathBuf::new(),
            taken: Vec::new(),
        };
        walk.run(excludes.root(), watch)?;
        walk.finish()?;
        Ok(Self { excluded: walk.count })
    }
}

/// Those of the mount points that begin another file system: a walk does not come to them by itself.
fn file_systems(tree: &OwnedFd, mounts: &[&Path]) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for mount in mounts {
        let inner = mount.strip_prefix("/").unwrap_or(mount);
        let Some(around) = inner.parent() else { continue };
        let device = |path: &Path| -> io::Result<u64> {
            let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
            Ok(statat(tree, path, AtFlags::SYMLINK_NOFOLLOW)?.st_dev)
        };
        if device(inner)? != device(around)? {
            found.push(inner.to_owned());
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// A directory that is being walked. Its path is that of the walk: each of a deep tree has a longer one, and all of them
/// together could be more than memory has room for.
struct Frame {
    reached: Reached,
    device: u64,
    /// What is still to be looked at, the last one first.
    rest: Vec<(CString, FileType)>,
    /// Where it begins in what is taken.
    from: usize,
    /// Something in it is left out.
    is_broken: bool,
}

/// What is taken of a directory.
enum Taken {
    /// A name of it.
    Name(Take, CString),
    /// A directory of it alone, of which the following is taken.
    Enter(CString),
    /// That was all of it.
    Leave,
}

/// A directory that is the root of the tree or of another file system, and what is taken of it.
struct Root {
    path: PathBuf,
    how: Take,
    taken: Vec<Taken>,
}

/// How a name is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Take {
    Alone,
    WithAll,
}

struct Walk {
    tree: OwnedFd,
    own: Vec<PathBuf>,
    selected: BufWriter<File>,
    /// What is taken of other file systems than the root's, which comes last.
    own_selected: Vec<Root>,
    excluded: BufWriter<File>,
    count: u64,
    stack: Vec<Frame>,
    /// Of the last one on the stack.
    path: PathBuf,
    /// Of those on the stack, in order.
    taken: Vec<Taken>,
}

impl Walk {
    fn run(&mut self, root: Reached, watch: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        if root.is_idle() {
            self.take_below(Path::new(""));
            return self.select(&[Root::whole(PathBuf::new())]);
        }
        let tree = openat(&self.tree, ".", directory_flags(), Mode::empty())?;
        let frame = Frame::open(&tree, root)?;
        self.begin(frame, CString::default());
        while let Some(mut frame) = self.stack.pop() {
            watch()?;
            match frame.rest.pop() {
                None => self.end(frame)?,
                Some((name, kind)) => self.visit(frame, &name, kind)?,
            }
        }
        Ok(())
    }

    fn visit(&mut self, mut frame: Frame, name: &CString, kind: FileType) -> io::Result<()> {
        let path = self.path.join(text(name));
        let is_directory = kind == FileType::Directory;
        let Some(reached) = frame.reached.enter(name.to_bytes(), is_directory) else {
            write_name(&mut self.excluded, &path)?;
            self.count += 1;
            frame.is_broken = true;
            self.stack.push(frame);
            return Ok(());
        };
        if !is_directory {
            self.taken.push(Taken::Name(Take::WithAll, name.clone()));
            self.stack.push(frame);
            return Ok(());
        }
        let is_own = self.own.contains(&path);
        // What cannot be opened or read is the provider's to find: it knows what is to be done then.
        let opened = open_directory(&self.tree, &path).and_then(|dir| Ok((fstat(&dir)?, dir)));
        match opened {
            Ok((stat, _)) if stat.st_dev != frame.device && !is_own => {
                self.taken.push(Taken::Name(Take::Alone, name.clone()));
            }
            Ok((_, dir)) if !reached.is_idle() => {
                if let Ok(below) = Frame::open(&dir, reached) {
                    self.stack.push(frame);
                    self.begin(below, name.clone());
                    self.path = path;
                    return Ok(());
                }
                self.taken.push(Taken::Name(Take::WithAll, name.clone()));
            }
            _ => {
                self.take_below(&path);
                if is_own {
                    self.own_selected.push(Root::whole(path));
                } else {
                    self.taken.push(Taken::Name(Take::WithAll, name.clone()));
                }
            }
        }
        self.stack.push(frame);
        Ok(())
    }

    /// What a directory has comes right after it, as in a walk that leaves nothing out: so whoever unpacks that
    /// sets its times when nothing comes any more.
    fn end(&mut self, frame: Frame) -> io::Result<()> {
        let Frame { from, is_broken, .. } = frame;
        let is_own = self.own.contains(&self.path);
        if let Some(above) = self.stack.last_mut().filter(|_| !is_own) {
            above.is_broken |= is_broken;
            self.path.pop();
            if is_broken {
                self.taken.push(Taken::Leave);
            } else {
                self.taken.truncate(from + 1);
                if let Some(Taken::Enter(name)) = self.taken.pop() {
                    self.taken.push(Taken::Name(Take::WithAll, name));
                }
            }
            return Ok(());
        }
        let how = if is_broken { Take::Alone } else { Take::WithAll };
        // Without the directory itself.
        let taken = self.taken.drain(from..).skip(1).filter(|_| is_broken).collect();
        let root = Root { path: self.path.clone(), how, taken };
        self.path.pop();
        if self.stack.is_empty() {
            return self.select(&[root]);
        }
        // A file system of its own is no part of the walk around it, and so leaves that whole.
        self.own_selected.push(root);
        Ok(())
    }

    fn begin(&mut self, mut frame: Frame, name: CString) {
        frame.from = self.taken.len();
        self.taken.push(Taken::Enter(name));
        self.stack.push(frame);
    }

    /// The file systems below a directory in which nothing is left out.
    fn take_below(&mut self, path: &Path) {
        let below = self.own.iter().filter(|own| *own != path && own.starts_with(path));
        self.own_selected.extend(below.map(|own| Root::whole(own.clone())));
    }

    fn finish(&mut self) -> io::Result<()> {
        let mut own = std::mem::take(&mut self.own_selected);
        // One that is mounted in another one comes after it.
        own.sort_by(|a, b| a.path.cmp(&b.path));
        self.select(&own)?;
        self.selected.flush()?;
        self.excluded.flush()
    }

    fn select(&mut self, roots: &[Root]) -> io::Result<()> {
        let mut list = List { selected: &mut self.selected, how: None };
        for root in roots {
            list.name(root.how, &root.path)?;
            let mut path = root.path.clone();
            for taken in &root.taken {
                match taken {
                    Taken::Name(how, name) => list.name(*how, &path.join(text(name)))?,
                    Taken::Enter(name) => {
                        path.push(text(name));
                        list.name(Take::Alone, &path)?;
                    }
                    Taken::Leave => drop(path.pop()),
                }
            }
        }
        Ok(())
    }
}

/// The list of what is taken.
struct List<'a> {
    selected: &'a mut BufWriter<File>,
    /// How the last name is.
    how: Option<Take>,
}

impl List<'_> {
    fn name(&mut self, how: Take, path: &Path) -> io::Result<()> {
        if self.how.replace(how) != Some(how) {
            self.selected.write_all(if how == Take::Alone { ALONE } else { WITH_ALL })?;
        }
        write_name(self.selected, path)
    }
}

impl Root {
    fn whole(path: PathBuf) -> Self {
        Self { path, how: Take::WithAll, taken: Vec::new() }
    }
}

fn text(name: &CString) -> &OsStr {
    OsStr::from_bytes(name.to_bytes())
}

impl Frame {
    fn open(dir: &OwnedFd, reached: Reached) -> io::Result<Self> {
        let mut rest = names(dir)?;
        rest.sort_by(|a, b| b.0.cmp(&a.0));
        let device = fstat(dir)?.st_dev;
        Ok(Self { reached, device, rest, from: 0, is_broken: false })
    }
}

fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

/// Name by name, so that paths may be of any length and no link is followed.
fn open_directory(tree: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    if path.as_os_str().len() > PATH_BYTES_MAX {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    let mut at = openat(tree, ".", directory_flags(), Mode::empty())?;
    for name in path {
        at = openat(&at, name, directory_flags(), Mode::empty())?;
    }
    Ok(at)
}

fn names(dir: impl AsFd) -> io::Result<Vec<(CString, FileType)>> {
    let mut found = Vec::new();
    let mut buffer = Vec::with_capacity(NAMES_BYTES);
    let mut entries = RawDir::new(&dir, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        let kind = match entry.file_type() {
            // Some file systems do not tell it here.
            FileType::Unknown => statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)
                .map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode)),
            kind => kind,
        };
        found.push((name.to_owned(), kind));
    }
    Ok(found)
}

fn write_name(list: &mut BufWriter<File>, path: &Path) -> io::Result<()> {
    list.write_all(b".")?;
    if !path.as_os_str().is_empty() {
        list.write_all(b"/")?;
        list.write_all(path.as_os_str().as_bytes())?;
    }
    list.write_all(b"\0")
}
