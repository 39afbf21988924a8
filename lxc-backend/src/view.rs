// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tree that a provider reads: a container's volumes, frozen, each at the container's own place.
//!
//! It is there twice, because ids are shown in two ways:
//!
//! ```text
//! <dir>/host     what the container calls 0 is 0: for a provider in our process, and for readers
//! <dir>/mapped   ids that are the container's within the user namespace of a mapped root
//! ```

use std::fs::{self, File};
use std::io;
use std::io::{Read as _, Seek as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use provider_api::IdMapRange;

use crate::CtError;
use crate::attach::{
    attach, detached, detached_with_nested, nearest_above, open_below, open_or_make_below,
    open_place,
};
use crate::holder::Holder;
use crate::ids::{foreign_ids, reversed, user_namespace};
use crate::runtime::root_of;
use crate::system::MountAttributes;
use crate::tool::{command, run};

/// A file system that was not ended in order takes a while.
const MOUNT_LIMIT: Duration = Duration::from_secs(120);
/// For the kernel to give up a mount that ended, with what is still to be written.
pub(crate) const RELEASE_LIMIT: Duration = Duration::from_secs(60);
const RELEASE_POLL: Duration = Duration::from_millis(10);

/// A volume of the tree.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// Its key in the configuration.
    pub(crate) key: String,
    /// Where it is in the container.
    pub(crate) mount_point: PathBuf,
    /// A directory, or a raw image.
    pub(crate) path: PathBuf,
    /// Whether it is an image.
    pub(crate) is_image: bool,
}

/// The tree, for as long as it lives.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) holder: Holder,
    /// Images that are mounted.
    images: Vec<PathBuf>,
    /// A directory of ours; what is in it is only seen by `holder`.
    pub(crate) dir: PathBuf,
    /// In which a mapped root runs.
    pub(crate) user_namespace: Arc<OwnedFd>,
    /// Whether ids on disk are those that the container sees.
    pub(crate) is_privileged: bool,
}

/// What a view is to be.
#[derive(Debug, Clone)]
pub(crate) struct ViewOptions {
    /// The new volumes of a container, which can be changed through the mapped tree, those of a privileged
    /// one through the other, too; what is missing of their mount points is made.
    pub(crate) writable: bool,
    /// What the images are.
    pub(crate) origin: Origin,
    /// Only the tree with the ids that are on disk, for file systems that can show no others; with all that is
    /// mounted in it.
    pub(crate) is_plain: bool,
}

/// What an image is, which says how its file system can be mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A volume.
    Volume,
    /// The copy of a volume that was not mounted. If that was not unmounted in order, as after a power failure, what was
    /// written last is in its journal alone, so it is not mounted without.
    Copy,
    /// The copy of a volume whose file system was frozen: everything is in its place, but it looks as if it were in use.
    FrozenCopy,
}

impl View {
    /// Mounts everything. `dir` exists, is empty, and is only used as a place. May block.
    pub(crate) fn open(
        dir: &Path,
        parts: &[Part],
        ids: &[IdMapRange],
        options: ViewOptions,
    ) -> Result<Self, CtError> {
        let at =
            |error: io::Error| CtError::at("make a user namespace for the container's ids")(error);
        let inner = if ids.is_empty() { foreign_ids() } else { ids.to_vec() };
        let user_namespace = Arc::new(user_namespace(&inner).map_err(at)?);
        // On disk a privileged container has its own ids, an unprivileged one those of the host.
        let (host_ids, mapped_ids) = if ids.is_empty() {
            (None, Some(Arc::clone(&user_namespace)))
        } else {
            let shown = crate::ids::user_namespace(&reversed(ids)).map_err(at)?;
            (Some(Arc::new(shown)), None)
        };
        let holder = Holder::start("ct-view").map_err(CtError::at("make a mount namespace"))?;
        let (place, parts) = (dir.to_owned(), parts.to_vec());
        let owner = root_of(ids);
        let images = parts.iter().filter(|part| part.is_image).map(|part| part.path.clone());
        let images: Vec<PathBuf> = images.collect();
        holder
            .run(move || {
                stage(&place, &parts, &options)?;
                if options.writable {
                    make_places(&place, &parts, owner)?;
                }
                // Of a privileged container's root the files are the host's root's.
                let host_is_writable = options.writable && host_ids.is_none();
                if options.is_plain {
                    return compose_plain(&place, &parts);
                }
                compose(&place, "host", &parts, host_ids.as_deref(), host_is_writable)?;
                compose(&place, "mapped", &parts, mapped_ids.as_deref(), options.writable)
            })
            .map_err(CtError::at("mount the container's files"))??;
        let is_privileged = ids.is_empty();
        Ok(Self { holder, images, dir: dir.to_owned(), user_namespace, is_privileged })
    }

    /// Ends the view, and waits until the kernel has given its images up. May block.
    pub(crate) fn close(self) -> Result<(), CtError> {
        let images = self.images.clone();
        drop(self);
        wait_until_unmounted(&images)
    }

    /// The tree with the container's ids, as this process reaches it.
    pub(crate) fn host_tree(&self) -> PathBuf {
        self.holder.outside(&self.dir.join("host"))
    }
}

/// Where a part is before it is in the trees.
fn staged(dir: &Path, part: &Part) -> PathBuf {
    if part.is_image { dir.join("volumes").join(&part.key) } else { part.path.clone() }
}

fn stage(dir: &Path, parts: &[Part], options: &ViewOptions) -> Result<(), CtError> {
    let fault =
        |error: io::Error| CtError::at("prepare the mounts of the container's files")(error);
    let mode = Some("mode=0711,size=1m");
    mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), mode)
        .map_err(|errno| fault(errno.into()))?;
    for name in ["host", "mapped", "volumes"] {
        fs::create_dir(dir.join(name)).map_err(fault)?;
    }
    for part in parts.iter().filter(|part| part.is_image) {
        let stage = staged(dir, part);
        fs::create_dir(&stage).map_err(fault)?;
        mount_image(&part.path, &stage, !options.writable, options.origin)?;
    }
    Ok(())
}

/// Makes the mount points within new volumes, and gives the container what its file systems began with.
fn make_places(dir: &Path, parts: &[Part], owner: (u32, u32)) -> Result<(), CtError> {
    for part in parts {
        let at = |error: io::Error| {
            CtError::at(format!("make the place '{}'", part.mount_point.display()))(error)
        };
        let lost_and_found = staged(dir, part).join("lost+found");
        if part.is_image && lost_and_found.is_dir() {
            std::os::unix::fs::chown(&lost_and_found, Some(owner.0), Some(owner.1)).map_err(at)?;
        }
        let above = nearest_above(parts, |one| one.mount_point.as_path(), &part.mount_point);
        let Some(above) = above else { continue };
        let root = File::open(staged(dir, above)).map_err(at)?;
        let below = part.mount_point.strip_prefix(&above.mount_point).unwrap_or(Path::new(""));
        open_or_make_below(root.as_fd(), below, owner).map_err(at)?;
    }
    Ok(())
}

fn compose(
    dir: &Path,
    tree: &str,
    parts: &[Part],
    ids: Option<&OwnedFd>,
    writable: bool,
) -> Result<(), CtError> {
    let root = dir.join(tree);
    for part in parts {
        let at = |error: io::Error| {
            let doing = format!("show '{}' at '{}'", part.key, part.mount_point.display());
            CtError::at(doing)(error)
        };
        let attributes = MountAttributes { read_only: !writable, inert: true };
        let mounted = detached(&staged(dir, part), attributes, ids.map(|ids| ids.as_fd()));
        let mounted = mounted.map_err(at)?;
        let opened = File::open(&root).map_err(at)?;
        let above = nearest_above(parts, |one| one.mount_point.as_path(), &part.mount_point);
        let target = match above {
            Some(above) => {
                let around = (above.key.as_str(), Path::new("/"));
                open_place(opened.as_fd(), around, &part.mount_point)
            }
            None => open_below(opened.as_fd(), &part.mount_point),
        };
        attach(&mounted, target.map_err(at)?.as_fd()).map_err(at)?;
    }
    Ok(())
}

/// A directory as it is, which a provider may have put together of several mounts.
fn compose_plain(dir: &Path, parts: &[Part]) -> Result<(), CtError> {
    let root = dir.join("host");
    for part in parts {
        let at = CtError::at(format!("show '{}'", part.path.display()));
        let show = || {
            let attributes = MountAttributes { read_only: true, inert: true };
            let mounted = detached_with_nested(&staged(dir, part), attributes)?;
            attach(&mounted, File::open(&root)?.as_fd())
        };
        show().map_err(at)?;
    }
    Ok(())
}

/// A file system that raw images have.
struct FileSystem {
    name: &'static str,
    /// What it has at this offset.
    magic: (u64, &'static [u8]),
    /// Mounts it beside the one that it is a copy of.
    beside: Option<&'static str>,
    /// Mounts it as it is, without a look at its journal.
    as_it_is: &'static str,
}

const FILE_SYSTEMS: [FileSystem; 2] = [
    FileSystem { name: "ext4", magic: (1080, b"\x53\xef"), beside: None, as_it_is: "noload" },
    FileSystem { name: "xfs", magic: (0, b"XFSB"), beside: Some("nouuid"), as_it_is: "norecovery" },
];

/// Mounts the file system of a raw image, through a loop device that ends with the mount.
pub(crate) fn mount_image(
    image: &Path,
    target: &Path,
    read_only: bool,
    origin: Origin,
) -> Result<(), CtError> {
    let doing = || format!("mount the image '{}'", image.display());
    wait_for_release(image, RELEASE_LIMIT).map_err(CtError::at(doing()))?;
    let found = file_system(image).map_err(CtError::at(doing()))?.ok_or_else(|| {
        CtError::Invalid(format!(
            "'{}' has no file system that containers have here (ext4, xfs).",
            image.display()
        ))
    })?;
    let mut options = vec!["loop", if read_only { "ro" } else { "rw" }];
    if origin != Origin::Volume {
        options.extend(found.beside);
    }
    if origin == Origin::FrozenCopy {
        options.push(found.as_it_is);
    }
    let mut mount = command("mount", ["-n", "-t", found.name, "-o", &options.join(","), "--"]);
    mount.arg(image).arg(target);
    run(&mount, MOUNT_LIMIT).map(drop).map_err(|error| {
        let advice = if read_only && origin != Origin::FrozenCopy {
            "; if it was not unmounted in order, starting the container once mends it"
        } else {
            ""
        };
        CtError::at(doing())(format!("{error}{advice}"))
    })
}

/// Waits until the kernel has given images up. May block.
pub(crate) fn wait_until_unmounted(images: &[PathBuf]) -> Result<(), CtError> {
    images.iter().try_for_each(|image| {
        wait_for_release(image, RELEASE_LIMIT)
            .map_err(CtError::at(format!("unmount the image '{}'", image.display())))
    })
}

/// Waits until an image is not used by another mount. Two of one image would destroy its file system; one
/// that ended a moment ago is still being written out.
pub(crate) fn wait_for_release(image: &Path, limit: Duration) -> io::Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let Some(device) = loop_device_of(image)? else { return Ok(()) };
        if Instant::now() >= deadline {
            let text = format!("it is in use ({device}): is it mounted elsewhere?");
            return Err(io::Error::other(text));
        }
        std::thread::sleep(RELEASE_POLL);
    }
}

/// The loop device that an image is attached to.
fn loop_device_of(image: &Path) -> io::Result<Option<String>> {
    let image = image.canonicalize()?;
    for entry in fs::read_dir("/sys/block")? {
        // Devices come and go meanwhile.
        let Ok(entry) = entry else { continue };
        let file = entry.path().join("loop/backing_file");
        if let Ok(text) = fs::read_to_string(file)
            && Path::new(text.trim_end_matches('\n')) == image
        {
            return Ok(Some(entry.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

fn file_system(image: &Path) -> io::Result<Option<&'static FileSystem>> {
    let mut file = File::open(image)?;
    for system in &FILE_SYSTEMS {
        let (offset, magic) = system.magic;
        let mut found = vec![0; magic.len()];
        file.seek(io::SeekFrom::Start(offset))?;
        match file.read_exact(&mut found) {
            Ok(()) if found == magic => return Ok(Some(system)),
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error),
            _ => {}
        }
    }
    Ok(None)
}
