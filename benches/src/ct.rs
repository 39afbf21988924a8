// SPDX-License-Identifier: MIT OR Apache-2.0
//! A container with files of this host, and copies of them: by `vzdump`, and by tools that read its volume.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::scratch::Scratch;

const CT: &str = "200";
/// How long an image that was unmounted may be written out.
const RELEASE_WITHIN: Duration = Duration::from_secs(60);
/// How long a program of LXC may take, and how often a container is asked to freeze.
const LXC_SECONDS: &str = "5";
const FREEZE_TRIES: u32 = 10;

/// A tool that is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// `tar | zstd -T2` at the level that the provider uses.
    TarZstd,
    /// `rsync -aHAXS` into an empty directory.
    Rsync,
    /// `borg create` into a new repository, with zstd.
    Borg,
    /// `restic backup` into a new repository.
    Restic,
}

impl Tool {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::TarZstd, Self::Rsync, Self::Borg, Self::Restic];

    /// In reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TarZstd => "tar | zstd -T2",
            Self::Rsync => "rsync",
            Self::Borg => "borg",
            Self::Restic => "restic",
        }
    }

    /// What is to be ready before the time is measured.
    const fn before(self) -> &'static str {
        match self {
            Self::TarZstd | Self::Rsync => "mkdir \"$OUT\"",
            Self::Borg => "borg init -e none \"$OUT\"",
            Self::Restic => "restic -q init",
        }
    }

    const fn script(self) -> &'static str {
        match self {
            Self::TarZstd => {
                "tar --acls --xattrs --xattrs-include=user.* --xattrs-include=security.capability \
                 --sparse --numeric-owner --one-file-system -C \"$TREE\" -cf - . | \
                 zstd -q -T2 -3 -o \"$OUT/tree.tar.zst\" && sync \"$OUT/tree.tar.zst\""
            }
            Self::Rsync => "rsync -aHAXSx --numeric-ids \"$TREE/\" \"$OUT/\" && sync -f \"$OUT\"",
            Self::Borg => "cd \"$TREE\" && borg create -x --compression zstd,3 \"$OUT::a\" .",
            Self::Restic => "cd \"$TREE\" && restic -q backup -x .",
        }
    }
}

/// A host of its own with one container, which is ended when this is dropped.
#[derive(Debug)]
pub struct Container {
    vzdump: PathBuf,
    folder: Scratch,
    /// Bytes of its files.
    pub data_bytes: u64,
    /// How many these are, with symbolic links.
    pub files: u64,
}

impl Container {
    /// Makes a container with files from below `tree`, of at most so many bytes.
    ///
    /// # Errors
    /// Something is missing or fails, for example without root.
    pub fn new(vzdump: &Path, folder: &Path, tree: &Path, data_bytes: u64) -> Result<Self> {
        let folder = Scratch::new(folder, "ct-")?;
        let mut this = Self { vzdump: vzdump.to_owned(), folder, data_bytes: 0, files: 0 };
        for dir in ["etc", "store", "mounted"] {
            fs::create_dir(this.path(dir))?;
        }
        let storages = format!("directory: store\n\tpath {}\n", this.path("store").display());
        fs::write(this.path("etc/storage.cfg"), storages)?;
        let template = this.make_template(tree, data_bytes)?;
        let size = format!("{}M", (this.data_bytes >> 20) * 3 / 2 + 256);
        let template_name = template.display().to_string();
        this.run(&["ct", "create", CT, "--template", &template_name, "--size", &size])?;
        fs::remove_file(template)?;
        Ok(this)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Busybox, a program that writes, and files of the host.
    fn make_template(&mut self, tree: &Path, data_bytes: u64) -> Result<PathBuf> {
        let stage = self.path("stage");
        for name in ["bin", "sbin", "proc", "sys", "dev", "etc", "tmp", "root", "data"] {
            fs::create_dir_all(stage.join(name))?;
        }
        let busybox = "/usr/bin/busybox";
        fs::copy(busybox, stage.join("bin/busybox")).with_context(|| format!("no {busybox}"))?;
        for name in ["sh", "sleep", "mv", "cat", "expr"] {
            std::os::unix::fs::symlink("busybox", stage.join("bin").join(name))?;
        }
        std::os::unix::fs::symlink("../bin/busybox", stage.join("sbin/init"))?;
        fs::write(stage.join("etc/inittab"), "::respawn:/bin/sh /writer\n")?;
        fs::write(stage.join("writer"), WRITER)?;
        let mut names = Vec::new();
        let mut find = Command::new("find");
        find.arg(tree).args(["-xdev", "(", "-type", "f", "-o", "-type", "l", ")"]);
        let found = output(find.args(["-printf", "%s %P\\0"]))?;
        for entry in found.split(|byte| *byte == 0).filter(|entry| !entry.is_empty()) {
            let space = entry.iter().position(|byte| *byte == b' ').context("find says nothing")?;
            let size: u64 = std::str::from_utf8(&entry[..space])?.parse()?;
            if self.data_bytes + size <= data_bytes {
                self.data_bytes += size;
                self.files += 1;
                names.extend(&entry[space + 1..]);
                names.push(0);
            }
        }
        let script = "tar -C \"$0\" --null -T - -cf - | tar -C \"$1\" -xf -";
        let mut copy = Command::new("sh");
        copy.args(["-c", script]).arg(tree).arg(stage.join("data")).stdin(Stdio::piped());
        let mut copying = copy.spawn().context("cannot run tar")?;
        copying.stdin.take().context("no pipe")?.write_all(&names)?;
        ensure!(copying.wait()?.success(), "tar could not copy files of {}", tree.display());
        let template = self.path("template.tar");
        output(Command::new("tar").arg("-C").arg(&stage).arg("-cf").arg(&template).arg("."))?;
        fs::remove_dir_all(stage)?;
        Ok(template)
    }

    fn run(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = Command::new(&self.vzdump);
        command.arg("--root").arg(self.folder.path()).args(arguments).args(["--output", "json"]);
        let text = output(&mut command)?;
        let values = serde_json::Deserializer::from_slice(&text).into_iter::<Value>();
        values.last().context("vzdump said nothing")?.context("vzdump said no JSON")
    }

    /// Seconds of a whole backup, from the start of the program to its end; and the milliseconds of the second
    /// copy in the mode suspend.
    ///
    /// # Errors
    /// It failed.
    pub fn backup(&self, mode: &str) -> Result<(f64, Option<f64>)> {
        let store = self.path("store");
        fs::remove_dir_all(&store)?;
        fs::create_dir(&store)?;
        let started = Instant::now();
        let report = self.run(&["backup", CT, "--mode", mode, "--stdexcludes", "0"])?;
        let seconds = started.elapsed().as_secs_f64();
        let guest = &report["guests"][0];
        ensure!(guest["result"] == "committed", "not committed: {report}");
        let log = fs::read_to_string(guest["log_path"].as_str().context("no log")?)?;
        let second = log.lines().find_map(|line| {
            line.split_once("second copy: ")?
                .1
                .split_once(" in ")?
                .1
                .split_once(" ms")?
                .0
                .parse()
                .ok()
        });
        Ok((seconds, second))
    }

    /// Seconds that a tool takes for the files of the container, which is down.
    ///
    /// # Errors
    /// It failed, or has copied less than there is.
    pub fn copy(&self, tool: Tool) -> Result<f64> {
        let image = self.path("state/storage/images/200/vm-200-disk-0.raw");
        let mounted = self.path("mounted");
        output(Command::new("mount").args(["-o", "loop,ro,noload"]).arg(&image).arg(&mounted))?;
        let copied = self.copy_from(tool, &mounted);
        output(Command::new("umount").arg(&mounted))?;
        // The next one mounts it, too.
        let deadline = Instant::now() + RELEASE_WITHIN;
        loop {
            let used = output(Command::new("losetup").arg("-j").arg(&image))?;
            if used.is_empty() {
                break;
            }
            ensure!(Instant::now() < deadline, "{} stays in use", image.display());
            std::thread::sleep(Duration::from_millis(20));
        }
        copied
    }

    fn copy_from(&self, tool: Tool, tree: &Path) -> Result<f64> {
        let out = self.path("out");
        remove(&out)?;
        let shell = |script: &str| {
            let mut command = Command::new("bash");
            command.args(["-e", "-o", "pipefail", "-c", script]);
            command.env("TREE", tree).env("OUT", &out).env("HOME", self.folder.path());
            command.env("RESTIC_REPOSITORY", &out).env("RESTIC_PASSWORD", "bench");
            command.env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
            output(&mut command).map(drop)
        };
        shell(tool.before())?;
        let started = Instant::now();
        shell(tool.script())?;
        let seconds = started.elapsed().as_secs_f64();
        let size = output(Command::new("du").args(["-s", "-B1"]).arg(&out))?;
        let size: u64 = String::from_utf8_lossy(&size)
            .split_whitespace()
            .next()
            .and_then(|word| word.parse().ok())
            .context("du says no number")?;
        ensure!(size > self.data_bytes / 20, "{} has stored {size} bytes only", tool.name());
        remove(&out)?;
        Ok(seconds)
    }

    /// Lets the container run.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(&self) -> Result<()> {
        self.run(&["ct", "start", CT]).map(drop)
    }

    /// LXC asks the old cgroups once, and waits for ever for a process that waits for the child of its vfork; asked
    /// again, they freeze it.
    fn freeze(&self) -> Result<()> {
        let mut frozen = self.lxc("lxc-freeze");
        for _ in 1..FREEZE_TRIES {
            if frozen.is_ok() {
                break;
            }
            frozen = self.lxc("lxc-freeze");
        }
        frozen
    }

    fn lxc(&self, program: &str) -> Result<()> {
        let mut command = Command::new("timeout");
        command.args([LXC_SECONDS, program, "-P"]).arg(self.path("run/lxc"));
        output(command.args(["-n", CT])).map(drop)
    }

    /// Milliseconds of the second of two passes of rsync, in which the container is frozen.
    ///
    /// # Errors
    /// A tool failed; the container is not frozen then.
    pub fn rsync_frozen(&self) -> Result<f64> {
        let status = self.run(&["ct", "status", CT])?;
        let tree = format!("/proc/{}/root/", status["pid"].as_u64().context("it does not run")?);
        let out = self.path("out");
        remove(&out)?;
        let rsync = || {
            let mut command = Command::new("rsync");
            command.args(["-aHAXSx", "--numeric-ids", "--delete", "--inplace", &tree]).arg(&out);
            // Files that vanish while the container runs are no fault.
            let status = command.stderr(Stdio::null()).status().context("cannot run rsync")?;
            match status.code() {
                Some(0 | 24) => Ok(()),
                _ => bail!("rsync failed: {status}"),
            }
        };
        rsync()?;
        let frozen = self.freeze();
        let started = Instant::now();
        let copied = frozen.and_then(|()| rsync());
        let milliseconds = started.elapsed().as_secs_f64() * 1e3;
        self.lxc("lxc-unfreeze")?;
        copied?;
        remove(&out)?;
        Ok(milliseconds)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // What is left is said by the program itself.
        let _ = self.run(&["ct", "stop", CT, "--now"]);
        let _ = Command::new("umount").arg("-q").arg(self.path("mounted")).status();
    }
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

fn output(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().display().to_string();
    let output = command.output().with_context(|| format!("cannot run {name}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} failed: {}", said.trim());
    Ok(output.stdout)
}

/// Changes a file a hundred times a second.
const WRITER: &str = "n=0\n\
    while :; do n=$(expr $n + 1); echo $n > /root/a.new; mv /root/a.new /root/a; sleep 0.01; done\n";
