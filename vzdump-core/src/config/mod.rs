// SPDX-License-Identifier: MIT OR Apache-2.0
//! Proxmox VE's configuration files, read and written without loss.
//!
//! A file is kept as its lines, each with what it means; what is not understood stays as it is, and
//! writing gives back every byte that was not changed on purpose.

pub mod backup;
pub mod container;
pub mod guest;
pub mod jobs;
pub mod options;
pub mod storage;

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::{fs, process};

use rustix::fs::{CWD, RenameFlags, renameat_with};

pub use options::OptionList;

/// A fault in a configuration file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("Cannot read the configuration file '{path}'.")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file could not be written.
    #[error("Cannot write the configuration file '{path}'.")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What an archive holds is not text.
    #[error("The configuration is not text: byte {offset} is not UTF-8.")]
    NotText {
        /// First byte that is not.
        offset: usize,
    },
    /// The file is not text.
    #[error("The configuration file '{path}' is not text: byte {offset} is not UTF-8.")]
    FileNotText {
        /// The file.
        path: PathBuf,
        /// First byte that is not.
        offset: usize,
    },
    /// A line or a value makes no sense.
    #[error("{0}")]
    Invalid(String),
}

/// Largest configuration file that is read; real ones have a few KiB.
pub const CONFIG_MAX_BYTES: u64 = 4 << 20;

/// Reads a configuration file; a missing one is `None`.
///
/// # Errors
/// [`ConfigError::Read`], [`ConfigError::FileNotText`], [`ConfigError::Invalid`] for one too large.
pub fn read_text(path: &Path) -> Result<Option<String>, ConfigError> {
    let fault = |source| ConfigError::Read { path: path.to_owned(), source };
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fault(error)),
        Ok(meta) if meta.len() > CONFIG_MAX_BYTES => {
            return Err(ConfigError::Invalid(format!(
                "The configuration file '{}' has {} bytes; at most {CONFIG_MAX_BYTES} are read.",
                path.display(),
                meta.len()
            )));
        }
        Ok(_) => {}
    }
    let text = String::from_utf8(fs::read(path).map_err(fault)?).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        ConfigError::FileNotText { path: path.to_owned(), offset }
    })?;
    Ok(Some(text))
}

/// Takes bytes for text.
///
/// # Errors
/// [`ConfigError::NotText`].
pub fn to_text(bytes: Vec<u8>) -> Result<String, ConfigError> {
    String::from_utf8(bytes)
        .map_err(|error| ConfigError::NotText { offset: error.utf8_error().valid_up_to() })
}

/// Replaces a file in one step: after a crash it has the old content or the new one. With `create`
/// an existing file is an error instead.
///
/// # Errors
/// [`ConfigError::Write`]; its source is "already exists" for `create` on an existing file. After an
/// error everything is as it was before.
pub fn write_atomically(path: &Path, content: &[u8], create: bool) -> Result<(), ConfigError> {
    write_and_sync(path, content, create, |dir| fs::File::open(dir)?.sync_all())
}

fn write_and_sync(
    path: &Path,
    content: &[u8],
    create: bool,
    sync_dir: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<(), ConfigError> {
    let fault = |source| ConfigError::Write { path: path.to_owned(), source };
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir).map_err(fault)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = dir.join(format!(".{name}.{}.tmp", process::id()));
    let result = write_file(&temporary, content).and_then(|()| {
        let flags = if create { RenameFlags::NOREPLACE } else { RenameFlags::empty() };
        Ok(renameat_with(CWD, &temporary, CWD, path, flags)?)
    });
    if let Err(error) = result {
        // The first failure is what matters; a leftover has a name that nothing reads.
        let _ = fs::remove_file(&temporary);
        return Err(fault(error));
    }
    // No error, because the new file is there for everybody: a caller that undoes what it was
    // written for would free the disks of a guest that exists. Taking the file away again is not
    // safer: that may fail too, or be what is lost. What a power cut can cost now is this one
    // change; the disks stay.
    if let Err(error) = sync_dir(dir) {
        tracing::warn!(path = %path.display(), %error, "a change may be lost by a power cut");
    }
    Ok(())
}

fn write_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Splits text into lines that keep their ends, so that joining them gives the text back.
pub(crate) fn raw_lines(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive('\n')
}

/// Reads a boolean as Proxmox VE does.
#[must_use]
pub fn parse_bool(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "on" | "yes" | "true" => Some(true),
        "0" | "off" | "no" | "false" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_there_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("100.conf");
        let fails = |_: &Path| Err(io::Error::other("scripted"));
        write_and_sync(&path, b"one", true, fails).unwrap();
        assert_eq!(read_text(&path).unwrap().unwrap(), "one");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_is_replaced_in_one_step_and_created_only_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/100.conf");
        write_atomically(&path, b"one", true).unwrap();
        assert!(write_atomically(&path, b"two", true).is_err());
        assert_eq!(read_text(&path).unwrap().unwrap(), "one");
        write_atomically(&path, b"two", false).unwrap();
        assert_eq!(read_text(&path).unwrap().unwrap(), "two");
        assert_eq!(fs::read_dir(dir.path().join("a")).unwrap().count(), 1, "a leftover stayed");
        assert!(read_text(&dir.path().join("none")).unwrap().is_none());
    }

    #[test]
    fn a_file_that_is_not_text_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("105.conf");
        fs::write(&path, b"name: caf\xe9\n").unwrap();
        let error = read_text(&path).unwrap_err().to_string();
        assert!(error.contains("105.conf' is not text: byte 9"), "{error}");
    }
}
