// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM with disks and backups of it: by `vzdump`, and by plain copying tools that read the same kind
//! of snapshot over NBD.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use qmp_client::{Options, Session};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::child;
use crate::scratch::Scratch;

/// The number of the VM.
const VM: &str = "100";
const IMAGES: &str = "images";
const BACKUPS: &str = "backups";
const TARGET: &str = "bench";
const VM_WITHIN: Duration = Duration::from_secs(120);
/// What one copy of everything may take.
const COPY_WITHIN: Duration = Duration::from_secs(1800);
const QMP_WITHIN: Duration = Duration::from_secs(120);
/// One write through QEMU's own test commands.
const WRITE_BYTES: u64 = 16 << 20;

/// Where the programs are.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The folder of the patched QEMU.
    pub qemu: PathBuf,
    /// `vzdump` itself.
    pub vzdump: PathBuf,
}

/// What a disk begins with.
#[derive(Debug, Clone)]
pub enum Content {
    /// A copy of this file.
    File(PathBuf),
    /// Zeroes, of this size in bytes.
    Empty(u64),
}

/// How the content of a snapshot gets into a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// `nbdcopy` into a raw file.
    NbdcopyRaw,
    /// `nbdcopy` into a qcow2 file behind `qemu-nbd`.
    NbdcopyQcow2,
    /// `qemu-img convert` into a raw file.
    ConvertRaw,
    /// `qemu-img convert` into a qcow2 file.
    ConvertQcow2,
}

impl Tool {
    /// In reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NbdcopyRaw => "nbdcopy raw",
            Self::NbdcopyQcow2 => "nbdcopy qcow2",
            Self::ConvertRaw => "convert raw",
            Self::ConvertQcow2 => "convert qcow2",
        }
    }

    const fn format(self) -> &'static str {
        match self {
            Self::NbdcopyRaw | Self::ConvertRaw => "raw",
            Self::NbdcopyQcow2 | Self::ConvertQcow2 => "qcow2",
        }
    }
}

/// What `vzdump` says of its own backup.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backup {
    /// From the start of the program to its end.
    pub seconds: f64,
    /// What it read of the disks.
    pub read_bytes: u64,
}

/// An installation with one VM, which is ended when this is dropped.
#[derive(Debug)]
struct Installation {
    programs: Programs,
    folder: Scratch,
}

/// A running VM.
#[derive(Debug)]
pub struct Vm {
    session: Session,
    home: Installation,
}

impl Vm {
    /// Makes and starts a VM in a new folder in `folder`; disks that are copies of files come first.
    /// Its guest does nothing.
    ///
    /// # Errors
    /// Something is missing or fails.
    pub async fn start(programs: &Programs, folder: &Path, disks: &[Content]) -> Result<Self> {
        let folder = Scratch::new(folder, "vm-")?;
        let [etc, images, backups] = ["etc", IMAGES, BACKUPS].map(|name| folder.path().join(name));
        for made in [&etc, &images, &backups] {
            fs::create_dir(made).with_context(|| format!("cannot make {}", made.display()))?;
        }
        let storages = format!(
            "dir: {IMAGES}\n\tpath {}\n\tcontent images\n\ndirectory: {BACKUPS}\n\tpath {}\n",
            images.display(),
            backups.display()
        );
        fs::write(etc.join("storage.cfg"), storages).context("cannot write storage.cfg")?;
        let mut create = vzdump(programs, folder.path());
        create.args(["vm", "create", VM, "--memory", "64", "--storage", IMAGES]);
        for disk in disks {
            match disk {
                Content::File(path) => create.arg("--disk-from").arg(path),
                Content::Empty(bytes) => create.arg("--disk").arg(bytes.to_string()),
            };
        }
        child::run(&mut create, COPY_WITHIN).await.context("cannot make the VM")?;
        let home = Installation { programs: programs.clone(), folder };
        child::run(home.vzdump().args(["vm", "start", VM]), VM_WITHIN)
            .await
            .context("cannot start the VM")?;
        // `vzdump` uses the other two.
        let socket = home.path("run/vm").join(VM).join("qmp-spare.sock");
        let options = Options { command_timeout: QMP_WITHIN, ..Options::default() };
        let session = Session::connect(&socket, options)
            .await
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        Ok(Self { session, home })
    }

    async fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        let answer = self.session.execute_raw(command, arguments, None).await;
        answer.with_context(|| format!("{command} failed"))
    }

    /// Writes a pattern to a part of a disk, as the guest's device.
    ///
    /// # Errors
    /// QEMU fails to.
    pub async fn write(&self, disk: usize, pattern: u8, offset: u64, bytes: u64) -> Result<()> {
        let end = offset + bytes;
        let mut at = offset;
        while at < end {
            let now = WRITE_BYTES.min(end - at);
            let command = format!(
                "qemu-io -d /machine/peripheral/virtio{disk}/virtio-backend \
                 \"write -q -P {pattern} {at} {now}\""
            );
            let said = self.execute("human-monitor-command", json!({ "command-line": command }));
            let said = said.await?;
            ensure!(said.as_str() == Some(""), "writing to the disk: {said}");
            at += now;
        }
        Ok(())
    }

    /// Has `vzdump` back the VM up.
    ///
    /// # Errors
    /// The backup fails.
    pub async fn backup(&self) -> Result<Backup> {
        let begin = Instant::now();
        let mut command = self.home.vzdump();
        command.args(["backup", VM, "--storage", BACKUPS, "--output", "json"]);
        let printed = child::run(&mut command, COPY_WITHIN).await?;
        let seconds = begin.elapsed().as_secs_f64();
        let last = printed.trim_end().lines().next_back().context("vzdump printed nothing")?;
        let result: Value = serde_json::from_str(last).context("vzdump's result")?;
        let read = result["guests"][0]["transferred"]["read_bytes"].as_u64();
        let read_bytes = read.with_context(|| format!("no read_bytes in {last}"))?;
        Ok(Backup { seconds, read_bytes })
    }

    /// Forgets all backups: the next one is a full one.
    ///
    /// # Errors
    /// They cannot be deleted.
    pub fn forget_backups(&self) -> Result<()> {
        for entry in fs::read_dir(self.home.path(BACKUPS))? {
            let path = entry?.path();
            if path.is_dir() { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
        }
        Ok(())
    }

    /// Copies the snapshot of one disk into a new file by a tool, durably. How many seconds that
    /// took, without making and ending the snapshot.
    ///
    /// # Errors
    /// Something fails.
    pub async fn copy(&self, tool: Tool, disk: usize, size_bytes: u64) -> Result<f64> {
        let image = self.home.path("fleecing.raw");
        File::create(&image)?.set_len(size_bytes)?;
        let node = json!({ "driver": "raw", "node-name": "bench-fleecing",
                           "file": { "driver": "file", "filename": image } });
        self.execute("blockdev-add", node).await?;
        let device =
            json!({ "device": format!("drive-virtio{disk}"), "fleecing": "bench-fleecing" });
        let request = json!({ "target-id": TARGET, "devices": [device] });
        let infos = self.execute("backup-access-setup", request).await?;
        let socket = self.home.path("nbd");
        let server = json!({ "addr": { "type": "unix", "data": { "path": socket } }, "max-connections": 16 });
        self.execute("nbd-server-start", server).await?;
        let export = json!({ "type": "nbd", "id": "bench", "name": "bench",
                             "node-name": infos[0]["node-name"] });
        self.execute("block-export-add", export).await?;
        let out = self.home.path("out");
        let uri = format!("nbd+unix:///bench?socket={}", socket.display());
        let seconds = copy_to(tool, &self.home.programs.qemu, &uri, &out, size_bytes).await;
        let end = json!({ "target-id": TARGET, "success": false });
        self.execute("backup-access-teardown", end).await?;
        self.execute("nbd-server-stop", json!({})).await?;
        self.execute("blockdev-del", json!({ "node-name": "bench-fleecing" })).await?;
        fs::remove_file(&image)?;
        if out.exists() {
            fs::remove_file(&out)?;
        }
        seconds
    }
}

/// Copies an export into a new file of the format that the tool writes, durably. How many seconds that took;
/// `bin` is the folder of the patched QEMU.
///
/// # Errors
/// A program is missing or fails.
pub async fn copy_to(tool: Tool, bin: &Path, uri: &str, out: &Path, bytes: u64) -> Result<f64> {
    let mut create = Command::new(bin.join("qemu-img"));
    create.args(["create", "-q", "-f", tool.format()]).arg(out).arg(bytes.to_string());
    child::run(&mut create, VM_WITHIN).await?;
    let mut command = match tool {
        Tool::NbdcopyRaw => {
            let mut command = Command::new("nbdcopy");
            command.args(["--flush", "--destination-is-zero", "--"]).arg(uri).arg(out);
            command
        }
        Tool::NbdcopyQcow2 => {
            let mut command = Command::new("nbdcopy");
            command.args(["--flush", "--destination-is-zero", "--"]).arg(uri).arg("[");
            command.arg(bin.join("qemu-nbd")).args(["-f", "qcow2", "--cache=writeback"]);
            command.arg(out).arg("]");
            command
        }
        Tool::ConvertRaw | Tool::ConvertQcow2 => {
            let mut command = Command::new(bin.join("qemu-img"));
            command.args(["convert", "-n", "--target-is-zero", "-f", "raw", "-O"]);
            command.arg(tool.format()).arg(uri).arg(out);
            command
        }
    };
    let begin = Instant::now();
    child::run(&mut command, COPY_WITHIN).await?;
    // `qemu-nbd` may still be closing the file; it has flushed it.
    File::open(out)?.sync_all()?;
    Ok(begin.elapsed().as_secs_f64())
}

impl Installation {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn vzdump(&self) -> Command {
        vzdump(&self.programs, self.folder.path())
    }
}

impl Drop for Installation {
    /// No QEMU may stay, also after a failure; the folder goes next.
    fn drop(&mut self) {
        let mut stop = self.vzdump();
        let stop = stop.as_std_mut().args(["vm", "stop", VM, "--now"]);
        match stop.stdout(std::process::Stdio::null()).status() {
            Ok(status) if status.success() => {}
            other => {
                eprintln!("FAILED to stop the VM in {}: {other:?}", self.folder.path().display());
            }
        }
    }
}

fn vzdump(programs: &Programs, root: &Path) -> Command {
    let mut command = Command::new(&programs.vzdump);
    command.arg("--root").arg(root).arg("--qemu-bin").arg(&programs.qemu);
    command
}

/// Where the folder of a VM may be: the path of a socket has at most 107 bytes.
///
/// # Errors
/// The path is too long.
pub fn check_folder(folder: &Path) -> Result<()> {
    let longest = folder.join("vm-123456/run/vm/100/qmp-backup.sock");
    let bytes = longest.as_os_str().len();
    if bytes > 107 {
        bail!("'{}' is too long for sockets below it; --folder names another", folder.display());
    }
    Ok(())
}
