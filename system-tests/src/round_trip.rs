// SPDX-License-Identifier: MIT OR Apache-2.0
//! Trees of files that go through the backup of a running container and a restore, and what came back of them.
//! Needs root, and Debian's packages lxc and busybox-static.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use serde_json::Value;

use crate::debian;
use crate::fidelity::{Comparison, compare_all, make_odd_tree};
use crate::loopfs::{Kind, LoopFs};
use crate::process::{Stop, run};
use crate::vzdump::{TASK_WITHIN, Vzdump};

/// For what a tool does with one tree.
const TOOL_WITHIN: Duration = Duration::from_secs(300);
/// For containers and their copies; sparse.
const DISK_BYTES: u64 = 8 << 30;
/// Where the tree is in the container. Nothing in it writes there.
const PLACE: &str = "tree";
const SOURCE: u32 = 200;

/// What goes through a round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tree {
    /// Everything that files can be.
    Odd,
    /// What `debootstrap` makes.
    Debian,
}

impl Tree {
    /// As it is asked for.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Odd => "odd",
            Self::Debian => "debian",
        }
    }

    const fn volume_size(self) -> &'static str {
        match self {
            Self::Odd => "128M",
            Self::Debian => "900M",
        }
    }

    fn make(self, at: &Path, is_privileged: bool, stop: &Stop) -> Result<()> {
        match self {
            Self::Odd => {
                make_odd_tree(at).context("the tree of odd things cannot be made")?;
                if is_privileged {
                    // Only there they come back.
                    let mode = Mode::from_raw_mode(0o640);
                    for (name, kind, device) in [
                        ("contents/null", FileType::CharacterDevice, makedev(1, 3)),
                        ("contents/loop", FileType::BlockDevice, makedev(7, 0)),
                    ] {
                        mknodat(CWD, at.join(name), kind, mode, device)?;
                    }
                }
                Ok(())
            }
            Self::Debian => {
                let mut tar = Command::new("tar");
                tar.args(["--numeric-owner", "--xattrs", "--xattrs-include=*", "-C"]).arg(at);
                tar.arg("-xpf").arg(debian::template(stop)?);
                run(&mut tar, TOOL_WITHIN, stop).map(drop)
            }
        }
    }
}

/// What came of one way of a tree.
#[derive(Debug)]
pub struct Trip {
    /// How it went: the mode of the backup, or that it was unpacked from the archive of GNU tar.
    pub way: String,
    /// With the tree as it was made.
    pub comparison: Comparison,
}

/// A host with one container that has a tree in it; the container is ended when this is dropped.
pub struct Host {
    root: PathBuf,
    tree: PathBuf,
    vzdump: Vzdump,
    stop: Stop,
    is_privileged: bool,
    /// XFS: a file system with snapshots of raw images, so that each mode is what it says.
    disk: LoopFs,
}

impl Host {
    /// Makes the tree, and a running container of it below the directory `dir`.
    ///
    /// # Errors
    /// Something is missing or fails.
    pub fn new(dir: &Path, tree: Tree, is_privileged: bool, stop: &Stop) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "containers need root");
        let root = dir.join("host");
        // An unprivileged container's root must get through all of the directories.
        for (path, mode) in [(dir.to_owned(), 0o755), (root.join("archives"), 0o700)] {
            fs::create_dir_all(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        }
        let disk = LoopFs::with_size(Kind::Xfs, DISK_BYTES)?;
        let storages = format!(
            "directory: store\n\tpath {}\ndir: fast\n\tpath {}\n\tcontent images\n",
            root.join("archives").display(),
            disk.path().display()
        );
        fs::create_dir_all(root.join("etc"))?;
        fs::write(root.join("etc/storage.cfg"), storages)?;
        let vzdump = Vzdump::find(&root, false, stop)?;
        let stage = dir.join("stage");
        make_busybox(&stage)?;
        let made = stage.join(PLACE);
        fs::create_dir(&made)?;
        tree.make(&made, is_privileged, stop)?;
        let this = Self { root, tree: made, vzdump, stop: stop.clone(), is_privileged, disk };
        this.create(&stage, &dir.join("template.tar"), tree.volume_size())?;
        Ok(this)
    }

    fn create(&self, stage: &Path, template: &Path, size: &str) -> Result<()> {
        let mut tar = Command::new("tar");
        // As GNU tar packs it, which is no part of this repository.
        tar.args(["--create", "--format=posix", "--sparse", "--numeric-owner", "--acls"]);
        tar.args(["--xattrs", "--xattrs-include=*", "--file"]).arg(template);
        run(tar.arg("--directory").arg(stage).arg("."), TOOL_WITHIN, &self.stop)?;
        let (id, template) = (SOURCE.to_string(), template.display().to_string());
        let mut create = vec!["ct", "create", &id, "--template", &template, "--size", size];
        create.extend(["--storage", "fast"]);
        create.extend(self.is_privileged.then_some("--privileged"));
        self.vzdump.run(&create, TASK_WITHIN)?;
        self.vzdump.run(&["ct", "start", &id], TASK_WITHIN)?;
        Ok(())
    }

    /// What the container itself has got of the tree.
    ///
    /// # Errors
    /// A tree cannot be read.
    pub fn unpacked(&self) -> Result<Trip> {
        let status = self.vzdump.run(&["ct", "status", &SOURCE.to_string()], TASK_WITHIN)?;
        let inside = PathBuf::from(format!("/proc/{}/root/{PLACE}", status["pid"]));
        Ok(Trip { way: "unpacked".to_owned(), comparison: self.compare(&inside)? })
    }

    /// Backs the running container up in a mode, restores the archive as another container, and looks at that.
    ///
    /// # Errors
    /// The backup or the restore failed, or has warned of something.
    pub fn there_and_back(&self, mode: &str, id: u32) -> Result<Trip> {
        let source = SOURCE.to_string();
        let report = self.vzdump.run(&["backup", &source, "--mode", mode], TASK_WITHIN)?;
        let guest = &report["guests"][0];
        ensure!(guest["result"] == "committed", "not committed: {report}");
        // For example that it was done in another mode.
        let warnings = guest["warnings"].as_array().context("no list of warnings")?;
        let is_odd =
            |text: &Value| text.as_str().is_none_or(|text| !text.contains("is privileged"));
        ensure!(!warnings.iter().any(is_odd), "the backup warned: {report}");
        let archive = guest["archive"].as_str().context("no archive")?;
        let (volid, new) = (format!("store:backup/{archive}"), id.to_string());
        let mut restore = vec!["restore", volid.as_str(), &new, "--storage", "fast"];
        restore.extend(self.is_privileged.then_some("--privileged"));
        let report = self.vzdump.run(&restore, TASK_WITHIN)?;
        let warnings = report["warnings"].as_array().context("no list of warnings")?;
        ensure!(warnings.is_empty(), "the restore warned: {report}");
        let image = self.disk.path().join(format!("images/{id}/vm-{id}-disk-0.raw"));
        let mounted = Mounted::new(&image, &self.root.join(format!("look-{id}")), &self.stop)?;
        let comparison = self.compare(&mounted.0.join(PLACE))?;
        Ok(Trip { way: format!("backup --mode {mode}"), comparison })
    }

    fn compare(&self, place: &Path) -> Result<Comparison> {
        let ids = if self.is_privileged { 0 } else { 100_000 };
        compare_all(&self.tree, place, ids)
            .with_context(|| format!("cannot compare with {}", place.display()))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let stop = ["ct", "stop", &SOURCE.to_string(), "--now"];
        let _ = self.vzdump.uninterrupted().finish(&stop, TASK_WITHIN);
    }
}

/// A raw image, mounted to be looked at.
struct Mounted(PathBuf);

impl Mounted {
    fn new(image: &Path, at: &Path, stop: &Stop) -> Result<Self> {
        fs::create_dir_all(at)?;
        let mut mount = Command::new("mount");
        run(mount.args(["-o", "loop,ro"]).arg(image).arg(at), TOOL_WITHIN, stop)?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// What is enough for a container that does nothing.
fn make_busybox(dir: &Path) -> Result<()> {
    for name in ["bin", "sbin", "proc", "sys", "dev", "etc", "tmp", "root"] {
        fs::create_dir_all(dir.join(name))?;
    }
    let busybox = "/usr/bin/busybox";
    fs::copy(busybox, dir.join("bin/busybox")).with_context(|| format!("no {busybox}"))?;
    for name in ["sh", "sleep"] {
        symlink("busybox", dir.join("bin").join(name))?;
    }
    symlink("../bin/busybox", dir.join("sbin/init"))?;
    Ok(fs::write(dir.join("etc/inittab"), "::respawn:/bin/sleep 3600\n")?)
}
