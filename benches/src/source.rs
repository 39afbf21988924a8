// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest's disk for measuring providers: a qcow2 image with a dirty bitmap, served by `qemu-nbd` as a
//! snapshot would be. It cannot be written, so nothing is released, and every reader gets the same.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use provider_nbd::{Client, Options};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use tokio::process::{Child, Command};

use crate::child;

/// Unit of what is zero, and of what an increment finds changed.
pub const PIECE_BYTES: u64 = 1 << 20;
const BITMAP: &str = "b0";
const EXPORT: &str = "disk";
const GRANULARITY_BYTES: &str = "65536";
const START_WITHIN: Duration = Duration::from_secs(20);
const IMAGE_WITHIN: Duration = Duration::from_secs(1800);
const END_WITHIN: Duration = Duration::from_secs(60);
const SEED: u64 = 2;

/// A disk image with a bitmap.
#[derive(Debug)]
pub struct Image {
    bin: PathBuf,
    folder: PathBuf,
    path: PathBuf,
    size_bytes: u64,
    dirty_bytes: Option<u64>,
}

impl Image {
    /// Makes one in `folder` from a raw file, with its zeroes written out; `bin` has QEMU's programs.
    ///
    /// # Errors
    /// There is no space, or a program is missing.
    pub async fn create(bin: &Path, folder: &Path, name: &str, raw: &Path) -> Result<Self> {
        let path = folder.join(name).with_extension("qcow2");
        let mut convert = Command::new(bin.join("qemu-img"));
        convert.args(["convert", "-S", "0", "-f", "raw", "-O", "qcow2"]).arg(raw).arg(&path);
        child::run(&mut convert, IMAGE_WITHIN).await?;
        let mut bitmap = Command::new(bin.join("qemu-img"));
        bitmap.args(["bitmap", "--add", "-g", GRANULARITY_BYTES]).arg(&path).arg(BITMAP);
        child::run(&mut bitmap, IMAGE_WITHIN).await?;
        let size_bytes = raw.metadata()?.len();
        let (bin, folder) = (bin.to_owned(), folder.to_owned());
        Ok(Self { bin, folder, path, size_bytes, dirty_bytes: None })
    }

    /// Writes random data to `dirty_bytes` of it, in pieces that are spread evenly; the bitmap notes that.
    ///
    /// # Errors
    /// The server does not start, or fails.
    pub async fn change(&mut self, dirty_bytes: u64) -> Result<()> {
        let pieces = dirty_bytes / PIECE_BYTES;
        ensure!(pieces > 0 && dirty_bytes <= self.size_bytes, "no such part of the disk");
        // Without --persistent it ends, and stores the bitmap, after its last client.
        let mut server = Server::start(self, &["--discard=unmap"]).await?;
        let mut random = SmallRng::seed_from_u64(SEED);
        let mut data = vec![0; PIECE_BYTES as usize];
        for piece in 0..pieces {
            random.fill_bytes(&mut data);
            let offset = piece * (self.size_bytes / PIECE_BYTES) / pieces * PIECE_BYTES;
            server.client.write(offset, Bytes::copy_from_slice(&data), false).await?;
        }
        server.client.flush().await?;
        server.client.disconnect().await?;
        let ended = tokio::time::timeout(END_WITHIN, server.process.wait()).await;
        let status = ended.context("qemu-nbd does not end")??;
        ensure!(status.success(), "qemu-nbd ended with {status}");
        self.dirty_bytes = Some(pieces * PIECE_BYTES);
        Ok(())
    }

    /// Serves it, with its bitmap, until the result is dropped.
    ///
    /// # Errors
    /// The server does not start.
    pub async fn serve(&self) -> Result<Snapshot> {
        let bitmap = format!("--bitmap={BITMAP}");
        let arguments = ["--persistent", "--read-only", "--shared=32", &bitmap];
        let Server { process, client, socket } = Server::start(self, &arguments).await?;
        client.disconnect().await?;
        let dirty_bytes = self.dirty_bytes;
        Ok(Snapshot { process, socket, size_bytes: self.size_bytes, dirty_bytes })
    }
}

/// A server, and a first connection to it.
struct Server {
    process: Child,
    client: Client,
    socket: PathBuf,
}

impl Server {
    async fn start(image: &Image, arguments: &[&str]) -> Result<Self> {
        let socket = image.path.with_extension("sock");
        // One of a server before; a socket cannot be made where something is.
        let _ = std::fs::remove_file(&socket);
        let program = image.bin.join("qemu-nbd");
        let mut process = Command::new(&program)
            .args(["--format=qcow2", "--export-name", EXPORT, "--socket"])
            .arg(&socket)
            .args(arguments)
            .arg(&image.path)
            .current_dir(&image.folder)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}; run ./x qemu first", program.display()))?;
        let deadline = Instant::now() + START_WITHIN;
        loop {
            match Client::connect_unix(&socket, EXPORT, Options::default()).await {
                Ok(client) => return Ok(Self { process, client, socket }),
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(_) => {}
            }
            if let Some(status) = process.try_wait()? {
                bail!("qemu-nbd ended with {status}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// An image that is being served.
#[derive(Debug)]
pub struct Snapshot {
    process: Child,
    /// Where the export is.
    pub socket: PathBuf,
    /// Size of the disk.
    pub size_bytes: u64,
    /// What the bitmap marks; none if it was never told to.
    pub dirty_bytes: Option<u64>,
}

impl Snapshot {
    /// Name of the export.
    #[must_use]
    pub const fn export(&self) -> &'static str {
        EXPORT
    }

    /// Name of the bitmap.
    #[must_use]
    pub const fn bitmap(&self) -> &'static str {
        BITMAP
    }

    /// For copying tools.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///{EXPORT}?socket={}", self.socket.display())
    }

    /// Ends the server; its work then counts as its parent's, so not while anything is measured.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub async fn end(mut self) -> Result<()> {
        self.process.kill().await.context("cannot end qemu-nbd")
    }

    /// The server's process, whose work is not that of the reader.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.id()
    }
}

/// A copy of a raw file in which every second piece is zero.
///
/// # Errors
/// There is no space.
pub fn half_zero(full: &Path, copy: &Path) -> Result<()> {
    let failed = || format!("cannot make {}", copy.display());
    let mut input = std::fs::File::open(full).with_context(failed)?;
    let mut output = std::fs::File::create(copy).with_context(failed)?;
    let size_bytes = input.metadata()?.len();
    output.set_len(size_bytes).with_context(failed)?;
    let mut piece = Vec::new();
    for offset in (0..size_bytes).step_by(2 * PIECE_BYTES as usize) {
        input.seek(SeekFrom::Start(offset))?;
        output.seek(SeekFrom::Start(offset))?;
        piece.clear();
        (&input).take(PIECE_BYTES).read_to_end(&mut piece).with_context(failed)?;
        output.write_all(&piece).with_context(failed)?;
    }
    output.sync_all().with_context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_second_piece_is_zero() {
        let folder = tempfile::tempdir().unwrap();
        let [full, half] = ["full", "half"].map(|name| folder.path().join(name));
        std::fs::write(&full, vec![7; 3 << 20]).unwrap();
        half_zero(&full, &half).unwrap();
        let content = std::fs::read(&half).unwrap();
        let pieces: Vec<bool> =
            content.chunks(PIECE_BYTES as usize).map(|piece| piece.contains(&7)).collect();
        assert_eq!(pieces, [true, false, true]);
        assert_eq!(content.iter().filter(|byte| **byte == 7).count(), 2 << 20);
    }
}
