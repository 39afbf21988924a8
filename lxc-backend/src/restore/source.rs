// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a provider offers for a restore: opened with care, because it may be anything.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::time::Duration;

use provider_api::Compression;

use crate::CtError;
use crate::runtime::beside;
use crate::unpack::Codec;

/// For a provider to open its end of a FIFO.
const OPEN_LIMIT: Duration = Duration::from_secs(120);

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
