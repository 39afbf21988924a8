// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a provider offers for a restore: opened with care, because it may be anything.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use provider_api::{Call, CancellationToken, Compression};
use tokio::sync::mpsc;
use vzdump_core::job::JobContext;
use vzdump_core::task_log::TaskSink;

use crate::CtError;
use crate::place::{Archive, Place, unpack};
use crate::runner::Runner;
use crate::runtime::beside;
use crate::unpack::{Bounds, Codec, Unpacked};

/// For a provider to open its end of a FIFO.
const OPEN_LIMIT: Duration = Duration::from_secs(120);
/// How a command ends whose output is not taken any more, and how `tar` says that of its archive, if it lives on.
const ENDED_BY_SIGPIPE: i32 = 128 + 13;
const NOT_TAKEN: &str = "tar: -: ";

pub(super) fn codec_of(compression: Compression) -> Codec {
    match compression {
        Compression::None => Codec::None,
        Compression::Gz => Codec::Gz,
        Compression::Bz2 => Codec::Bz2,
        Compression::Xz => Codec::Xz,
        Compression::Zst => Codec::Zst,
    }
}

/// Opens what a provider offers: a file or a FIFO, and not by a link.
pub(super) async fn open(path: PathBuf) -> Result<File, CtError> {
    let doing = format!("open '{}', which the provider offers", path.display());
    let opening = beside(move || {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(&path).map_err(CtError::at(doing))?;
        let kind = file.metadata().map_err(CtError::at("look at it"))?.file_type();
        if kind.is_file() || kind.is_fifo() {
            return Ok(file);
        }
        Err(CtError::Invalid(format!("'{}' is neither a file nor a FIFO.", path.display())))
    });
    let late = || CtError::Invalid("The provider does not write its archive.".to_owned());
    tokio::time::timeout(OPEN_LIMIT, opening).await.map_err(|_| late())?
}

/// Where the files go.
pub(super) struct Files<'a> {
    pub(super) place: &'a Place,
    pub(super) runner: &'a Arc<Runner>,
    pub(super) lines: mpsc::Receiver<String>,
    pub(super) mounts: Vec<PathBuf>,
    pub(super) bounds: Bounds,
}

/// Copies a directory: one sandbox that sees nothing else packs it, the one of all restores unpacks it.
pub(super) async fn copy_directory(
    ctx: &JobContext,
    path: PathBuf,
    files: Files<'_>,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> Result<Unpacked, CtError> {
    let Files { place, runner, lines, mounts, bounds } = files;
    let looked_at = path.clone();
    let kind = beside(move || {
        let shown = looked_at.display().to_string();
        std::fs::symlink_metadata(&looked_at)
            .map_err(CtError::at(format!("look at '{shown}', which the provider offers")))
    });
    if !kind.await?.is_dir() {
        let path = path.display();
        return Err(CtError::Invalid(format!(
            "'{path}', which the provider offers, is no directory."
        )));
    }
    let (source, mut said) = place.show(ctx, path).await?;
    let copied = {
        let (reader, writer) = std::io::pipe().map_err(CtError::at("make a pipe"))?;
        let file = File::from(OwnedFd::from(reader));
        let archive = Archive { what: "the directory", file, codec: Codec::None, mounts, bounds };
        let call = Call { cancel: cancel.child_token(), deadline: None };
        let both = async {
            tokio::join!(
                source.pack(writer.into(), &call),
                unpack(runner, lines, archive, sink, cancel)
            )
        };
        tokio::pin!(both);
        loop {
            tokio::select! {
                both = &mut both => break both,
                Some(line) = said.recv() => sink.info(&line),
            }
        }
    };
    while let Ok(line) = said.try_recv() {
        sink.info(&line);
    }
    beside(move || crate::runner::close(source)).await?;
    let (packed, unpacked) = copied;
    let packed = match packed {
        Err(_) if cancel.is_cancelled() => return Err(CtError::Cancelled),
        other => other.map_err(CtError::at("read the directory"))?,
    };
    // The names of files do not begin so.
    let was_not_taken = packed.exit_code == ENDED_BY_SIGPIPE
        || packed.stderr_tail.lines().any(|line| line.starts_with(NOT_TAKEN));
    if packed.exit_code != 0 && !(was_not_taken && unpacked.is_err()) {
        return Err(CtError::at("read the directory")(packed.stderr_tail.trim().to_owned()));
    }
    unpacked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_provider_cannot_have_a_link_or_a_device_opened() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        assert!(open(link).await.is_err());
        assert!(open("/dev/null".into()).await.is_err());
        assert!(open(dir.path().to_owned()).await.is_err());
    }
}
