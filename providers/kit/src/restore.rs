// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads an archive back as the host does, trusting nothing, and compares each byte.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use provider_api::{Provider, VmRestore, VolumeSource};
use provider_nbd::{Client, Options};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

use crate::bench::{Ctx, Made};
use crate::fault::{Checked, Fault, clean, ensure, words};
use crate::machine::Truth;
use crate::random::Random;

/// Read at once.
const PIECE_BYTES: usize = 1 << 20;
/// An answer of an export must come in this time.
const NBD_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest name of an export, from the protocol.
const EXPORT_BYTES_MAX: usize = 4096;

/// A disk's content as it is offered.
enum Source {
    File(Arc<File>),
    Nbd(Client),
}

impl Ctx {
    /// Restores all disks of an archive and compares them with the truth.
    pub(crate) async fn check_restore(&self, provider: &dyn Provider, made: &Made) -> Checked {
        self.restore(provider, &made.archive, &made.truth)
            .await
            .map_err(|fault| fault.at(&format!("Restore of {}", made.archive)))
    }

    /// The same, if the provider restores at all.
    pub(crate) async fn check_still_restores(
        &self,
        provider: &dyn Provider,
        made: &Made,
    ) -> Checked {
        if provider.describe().capabilities.vm_restore {
            return self.check_restore(provider, made).await;
        }
        Ok(())
    }

    /// Reads pieces of the first disk in any order, again, and at once.
    pub(crate) async fn read_at_random(&self, provider: &dyn Provider, made: &Made) -> Checked {
        let Some((device, truth)) = made.truth.first() else { return Ok(()) };
        let call = self.call();
        let begun = provider.restore_vm_init(&made.archive, &call);
        let mut restore = self.expect("restore_vm_init", begun).await?;
        let dir = self.bench.private_dir()?;
        let offered = self.expect("volume_init", restore.volume_init(device, &dir, &call)).await;
        let compared = match &offered {
            Ok(source) => compare_at_random(source, &dir, truth).await,
            Err(_) => Ok(()),
        };
        let cleaned = self.expect("volume_cleanup", restore.volume_cleanup(device, &call)).await;
        self.expect("cleanup", restore.cleanup(&call)).await?;
        offered?;
        compared.and(cleaned)
    }

    pub(crate) async fn restore(
        &self,
        provider: &dyn Provider,
        archive: &str,
        truth: &Truth,
    ) -> Checked {
        let ((), restored) = self.restore_during(provider, archive, truth, async || ()).await?;
        restored
    }

    /// The same, with something else done once it has begun. Gives what came of that, and of the restore.
    pub(crate) async fn restore_during<T>(
        &self,
        provider: &dyn Provider,
        archive: &str,
        truth: &Truth,
        meanwhile: impl AsyncFnOnce() -> T,
    ) -> Checked<(T, Checked)> {
        let call = self.call();
        let begun = provider.restore_vm_init(archive, &call);
        let mut restore = self.expect("restore_vm_init", begun).await?;
        let dir = self.bench.private_dir()?;
        let done = meanwhile().await;
        let compared = self.compare_all(restore.as_mut(), truth, &dir).await;
        let call = self.call();
        let cleaned = self.expect("cleanup", restore.cleanup(&call)).await;
        // What a provider left in it is not needed any more.
        let _ = std::fs::remove_dir_all(&dir);
        Ok((done, compared.and(cleaned)))
    }

    async fn compare_all(&self, restore: &mut dyn VmRestore, truth: &Truth, dir: &Path) -> Checked {
        let devices = restore.devices().to_vec();
        ensure(devices.len() == truth.len(), || {
            format!("It has {} disks, not {}.", devices.len(), truth.len())
        })?;
        for (device, content) in truth {
            let sizes = devices.iter().filter(|d| d.device == *device).map(|d| d.size_bytes);
            let sizes: Vec<u64> = sizes.collect();
            ensure(sizes == [content.len() as u64], || {
                format!("Disk {device} has the sizes {sizes:?}, not {} bytes.", content.len())
            })?;
            let call = self.call();
            let offered = self.answer("volume_init", restore.volume_init(device, dir, &call)).await;
            let compared = match offered {
                Ok(Ok(source)) => self.compare(&source, dir, device, content).await,
                Ok(Err(error)) => Err(Fault::new(format!("volume_init fails: {}", words(&error)))),
                Err(fault) => Err(fault),
            };
            let call = self.call();
            let cleaned =
                self.expect("volume_cleanup", restore.volume_cleanup(device, &call)).await;
            compared.and(cleaned)?;
        }
        Ok(())
    }

    async fn compare(
        &self,
        source: &VolumeSource,
        dir: &Path,
        device: &str,
        truth: &Arc<Vec<u8>>,
    ) -> Checked {
        let at = |fault: Fault| fault.at(&format!("disk {device}"));
        let limit = self.bench.options.call_limit.min(NBD_TIMEOUT);
        let (source, size_bytes) = open(source, dir, limit).await.map_err(at)?;
        ensure(size_bytes == truth.len() as u64, || {
            format!(
                "The archive announces {} bytes for disk {device}, and what it offers has {size_bytes}.",
                truth.len()
            )
        })?;
        for (n, expected) in truth.chunks(PIECE_BYTES).enumerate() {
            let offset = n * PIECE_BYTES;
            let found = read(&source, offset as u64, expected.len()).await.map_err(at)?;
            if found != expected {
                let differs = found.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(0);
                return Err(Fault::new(format!(
                    "Disk {device} differs from what was backed up, first at byte {}.",
                    offset + differs
                ))
                .advise("This is wrong data: find out which step of the backup stored it."));
            }
        }
        if let Source::Nbd(client) = source {
            // All was read; a server that does not say goodbye is no fault.
            let _ = client.disconnect().await;
        }
        Ok(())
    }
}

async fn compare_at_random(source: &VolumeSource, dir: &Path, truth: &[u8]) -> Checked {
    ensure(matches!(source, VolumeSource::NbdUnix { .. }), || {
        "A disk that can be read at random must be offered over NBD.".to_owned()
    })?;
    let (source, _) = open(source, dir, NBD_TIMEOUT).await?;
    let mut random = Random::new(7);
    for _ in 0..16 {
        let reads: Vec<(usize, usize)> = (0..8)
            .map(|_| {
                let begin = random.below(truth.len() as u64 / 512) as usize * 512;
                let most = (truth.len() - begin).min(128 << 10) / 512;
                (begin, (1 + random.below(most as u64) as usize) * 512)
            })
            .collect();
        let all = reads.iter().map(|(at, length)| read(&source, *at as u64, *length));
        for (found, (at, length)) in join_all(all).await.into_iter().zip(&reads) {
            ensure(found? == truth[*at..at + length], || {
                format!("{length} bytes at {at} are not what was backed up.")
            })?;
        }
    }
    Ok(())
}

async fn open(source: &VolumeSource, dir: &Path, limit: Duration) -> Checked<(Source, u64)> {
    match source {
        VolumeSource::Path(path) => open_file(path),
        VolumeSource::NbdUnix { socket, export } => open_export(socket, export, dir, limit).await,
        _ => Err(Fault::new("It offers the disk in a way that the kit does not know.")),
    }
}

fn open_file(path: &Path) -> Checked<(Source, u64)> {
    let shown = clean(&path.display().to_string());
    ensure(path.is_absolute(), || format!("The path {shown} is not absolute."))?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let failed = |error: std::io::Error| {
        Fault::new(format!("The host cannot open {shown}: {error}."))
            .advise("A path must not lead through symbolic links.")
    };
    let fd = openat2(CWD, path, flags, Mode::empty(), resolve).map_err(|e| failed(e.into()))?;
    let file = File::from(fd);
    let meta = file.metadata().map_err(failed)?;
    let kind = meta.file_type();
    ensure(kind.is_file() || kind.is_block_device(), || {
        format!("{shown} is neither a regular file nor a block device.")
    })?;
    let size_bytes = if kind.is_file() {
        meta.len()
    } else {
        rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|e| failed(e.into()))?
    };
    Ok((Source::File(Arc::new(file)), size_bytes))
}

async fn open_export(
    socket: &Path,
    export: &str,
    dir: &Path,
    limit: Duration,
) -> Checked<(Source, u64)> {
    let shown = clean(&socket.display().to_string());
    ensure(socket.parent() == Some(dir) && socket.file_name().is_some(), || {
        format!("The socket {shown} is not in the private directory of the restore.")
    })?;
    let meta = std::fs::symlink_metadata(socket)
        .map_err(|error| Fault::new(format!("The socket {shown} cannot be used: {error}.")))?;
    ensure(meta.file_type().is_socket(), || format!("{shown} is no socket."))?;
    ensure(export.len() <= EXPORT_BYTES_MAX && !export.contains('\0'), || {
        "The name of the export is not allowed.".to_owned()
    })?;
    let options = Options { timeout: Some(limit), ..Options::default() };
    let client = Client::connect_unix(socket, export, options).await;
    let client = client
        .map_err(|e| Fault::new(format!("The export cannot be used: {}", clean(&e.to_string()))))?;
    let size_bytes = client.size_bytes();
    Ok((Source::Nbd(client), size_bytes))
}

async fn read(source: &Source, offset: u64, length: usize) -> Checked<Vec<u8>> {
    let failed = |why: String| {
        Fault::new(format!("Its content cannot be read at {offset}: {}", clean(&why)))
    };
    match source {
        Source::Nbd(client) => {
            let data = client.read(offset, length).await.map_err(|e| failed(e.to_string()))?;
            Ok(data.to_vec())
        }
        Source::File(file) => {
            let file = Arc::clone(file);
            let read = tokio::task::spawn_blocking(move || {
                let mut data = vec![0; length];
                file.read_exact_at(&mut data, offset).map(|()| data)
            });
            let read = read.await.map_err(|e| failed(e.to_string()))?;
            read.map_err(|e| failed(e.to_string()))
        }
    }
}
