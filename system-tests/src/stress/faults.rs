// SPDX-License-Identifier: MIT OR Apache-2.0
//! Faults below a run: the disk or its fleecing image is served by nbdkit, which fails, delays or
//! stops requests once it is told to; or the image has no room left.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::process::Guarded;
use crate::storage::{LIMIT, Storage, until};

/// What goes wrong below a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Some reads of the disk fail; the guest reads nothing meanwhile.
    DiskReads,
    /// Some reads and writes of the fleecing image fail.
    Image,
    /// Disk and fleecing image are slow. That is no error.
    Delays,
    /// The fleecing image finds no room.
    Full,
    /// The fleecing image stops in the middle.
    Stall,
}

impl Fault {
    pub(crate) const ALL: [Self; 5] =
        [Self::DiskReads, Self::Image, Self::Stall, Self::Full, Self::Delays];

    /// Whether the reader may meet errors.
    pub(crate) fn loses(self) -> bool {
        self != Self::Delays
    }

    /// Whether the snapshot may break; what else is lost is single granules.
    pub(crate) fn breaks(self) -> bool {
        matches!(self, Self::Image | Self::Full | Self::Stall)
    }

    pub(crate) fn serves_disk(self) -> bool {
        matches!(self, Self::DiskReads | Self::Delays)
    }

    pub(crate) fn serves_image(self) -> bool {
        matches!(self, Self::Image | Self::Delays | Self::Stall)
    }

    fn disk_options(self) -> &'static [&'static str] {
        match self {
            Self::DiskReads => &["--filter=error", "error-pread=EIO", "error-pread-rate=3%"],
            Self::Delays => &["--filter=delay", "delay-read=2ms", "delay-write=1ms"],
            _ => &[],
        }
    }

    fn image_options(self) -> &'static [&'static str] {
        match self {
            Self::Image => &[
                "--filter=error",
                "error-pwrite=EIO",
                "error-pwrite-rate=20%",
                "error-pread=EIO",
                "error-pread-rate=3%",
            ],
            Self::Delays => &["--filter=delay", "delay-read=3ms", "delay-write=10ms"],
            Self::Stall => &["--filter=pause"],
            _ => &[],
        }
    }
}

/// The servers of a run's faults; ended when dropped.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    servers: Vec<Guarded>,
    fault: Option<Fault>,
    folder: std::path::PathBuf,
    control: Option<UnixStream>,
}

impl Faults {
    pub(crate) fn new(fault: Option<Fault>, folder: &Path) -> Self {
        Self { fault, folder: folder.to_owned(), ..Self::default() }
    }

    /// Serves a file instead of having QEMU open it; the description of its node.
    pub(crate) async fn serve(
        &mut self,
        storage: &Storage,
        name: &str,
        disk: bool,
    ) -> Result<Value> {
        let Some(fault) = self.fault else { anyhow::bail!("nothing is served in this run") };
        let socket = storage.path(&format!("{name}.nbd"));
        let control = storage.path(&format!("{name}.control"));
        for path in [&socket, &control] {
            // An earlier server may have left it.
            drop(std::fs::remove_file(path));
        }
        let options = if disk { fault.disk_options() } else { fault.image_options() };
        let mut command = Command::new("nbdkit");
        command
            .args(["--foreground", "--exit-with-parent", "--log=null", "--threads=16", "--unix"])
            .arg(&socket);
        let (filters, parameters): (Vec<&str>, _) =
            options.iter().partition(|option| option.starts_with("--"));
        command.args(filters).arg("file").arg(storage.path(name)).args(parameters);
        if options.contains(&"--filter=error") {
            command.arg(format!("error-file={}", self.switch().display()));
        }
        if options.contains(&"--filter=pause") {
            command.arg(format!("pause-control={}", control.display()));
        }
        let mut server = Guarded::spawn(command.stdin(Stdio::null()))?;
        until("nbdkit listens", async || {
            ensure!(server.try_wait()?.is_none(), "nbdkit has ended");
            Ok(socket.exists())
        })
        .await?;
        if control.exists() {
            self.control = Some(UnixStream::connect(&control).await?);
        }
        self.servers.push(server);
        Ok(json!({ "driver": "nbd", "server": { "type": "unix", "path": socket } }))
    }

    /// While this file exists, requests fail.
    fn switch(&self) -> std::path::PathBuf {
        self.folder.join("fail")
    }

    /// From now on things go wrong.
    pub(crate) async fn begin(&mut self) -> Result<()> {
        if matches!(self.fault, Some(Fault::DiskReads | Fault::Image)) {
            File::create(self.switch())?;
        }
        self.tell(b'p').await
    }

    /// From now on all is well again.
    pub(crate) async fn end(&mut self) -> Result<()> {
        if self.switch().exists() {
            std::fs::remove_file(self.switch())?;
        }
        self.tell(b'r').await
    }

    async fn tell(&mut self, command: u8) -> Result<()> {
        let Some(control) = &mut self.control else { return Ok(()) };
        control.write_all(&[command]).await?;
        let answer = tokio::time::timeout(LIMIT, control.read_u8()).await??;
        ensure!(answer == command.to_ascii_uppercase(), "nbdkit answers {answer:#x}");
        Ok(())
    }
}
