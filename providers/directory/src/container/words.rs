// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `tar` says while it reads a container's files. There is no end to how much that may be, so each line is
//! judged as it passes.

use std::mem;
use std::sync::{Arc, Mutex, PoisonError};

use provider_api::{Error, IGNORED_MAX, IgnoredEntry, Kind, Result, StderrCopy};

/// What it says first on each line.
const TAR_PREFIX: &str = "tar: ";
/// What it says of a file that cannot be in an archive.
pub(super) const SOCKET: &str = ": socket ignored";
/// What it says of something that it cannot read, when that is no error.
const UNREADABLE: &str = ": Warning: ";
/// Then, of a file that it could open, but not read to its end, if the error comes with the first byte that it asks for.
const READ_ERROR: &str = "Read error at byte ";
/// And if it comes later; a count is between. Files do not really shrink here: nobody writes to what is backed up.
const SHRANK: &str = ": File shrank by ";
const PADDED: [&str; 2] = [" byte; padding with zeros", " bytes; padding with zeros"];
/// Then `Cannot`, a word of the call that failed, if it asked for attributes of a file that is in the archive.
const CANNOT: &str = "Cannot ";
const ATTRIBUTE_CALLS: [&str; 3] = ["acl", "xattr", "filecon"];
/// A file system that has no such attributes keeps none from being read.
const NO_ATTRIBUTES: &str = ": Operation not supported";
/// What is kept of the beginning and of the end of a line. Names may be longer.
const LINE_PART_BYTES: usize = 16 << 10;

/// What was said so far.
#[derive(Debug, Default)]
pub(super) struct Words {
    line: Vec<u8>,
    ignored: Vec<IgnoredEntry>,
    ignored_count: u64,
    /// The first line that says that a file was read only in part.
    in_part: Option<String>,
    /// The first one that says that something was not read, and no error.
    unread: Option<String>,
}

/// [`Words`] that a runner gives to.
#[derive(Debug, Clone, Default)]
pub(super) struct Listener(Arc<Mutex<Words>>);

impl Listener {
    pub(super) fn copy(&self) -> StderrCopy {
        let words = Arc::clone(&self.0);
        StderrCopy::new(move |bytes| {
            words.lock().unwrap_or_else(PoisonError::into_inner).take(bytes);
        })
    }

    /// What was said in all, once the command has ended.
    pub(super) fn finish(&self) -> Words {
        let mut words = mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        words.end_line();
        words
    }
}

impl Words {
    fn take(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend(piece);
            if self.line.len() > 2 * LINE_PART_BYTES {
                self.line.drain(LINE_PART_BYTES..self.line.len() - LINE_PART_BYTES);
            }
            if piece.ends_with(b"\n") {
                self.end_line();
            }
        }
    }

    fn end_line(&mut self) {
        let line = mem::take(&mut self.line);
        let line = String::from_utf8_lossy(&line);
        let text = line.trim_end_matches('\n');
        let text = text.strip_prefix(TAR_PREFIX).unwrap_or(text);
        // Users of the container choose the names, so only the end of a line is what it seems to be.
        if let Some(path) = text.strip_suffix(SOCKET) {
            self.ignore(in_container(path), "a socket");
        } else if is_padded(text) {
            self.in_part.get_or_insert_with(|| text.to_owned());
        // The last one: a name may say this, too.
        } else if let Some((path, why)) = text.rsplit_once(UNREADABLE) {
            let call = why.strip_prefix(CANNOT).and_then(|why| why.split_once(':'));
            let is_attribute = call
                .is_some_and(|(call, _)| ATTRIBUTE_CALLS.iter().any(|part| call.contains(part)));
            if is_attribute && why.ends_with(NO_ATTRIBUTES) {
                return;
            }
            if why.starts_with(READ_ERROR) {
                self.in_part.get_or_insert_with(|| text.to_owned());
            }
            if why.starts_with(CANNOT) {
                self.unread.get_or_insert_with(|| text.to_owned());
            }
            let path = in_container(path);
            let what = if is_attribute { format!("attributes of {path}") } else { path.to_owned() };
            self.ignore(&what, why);
        }
    }

    fn ignore(&mut self, path: &str, why: &str) {
        self.ignored_count += 1;
        if self.ignored.len() < IGNORED_MAX {
            self.ignored.push(IgnoredEntry { path: path.to_owned(), why: why.to_owned() });
        }
    }

    /// What is not in the archive, and how many that are in all.
    pub(super) fn ignored(self) -> (Vec<IgnoredEntry>, u64) {
        (self.ignored, self.ignored_count)
    }

    /// An error if what was stored is not what was asked for, though `tar` was content.
    pub(super) fn check(&self, skips_unreadable: bool) -> Result<()> {
        // Told to go on after errors, `tar` fills a file that it can read only the beginning of with zeros.
        if let Some(why) = &self.in_part {
            return Err(Error::new(
                Kind::Io,
                format!(
                    "A file can be read only in part, and would have zeros in the place of the rest: {why}. \
                     Mend it, or leave it out by a pattern."
                ),
            ));
        }
        match &self.unread {
            Some(why) if !skips_unreadable => Err(Error::new(
                Kind::Io,
                format!(
                    "Something of the container cannot be read: {why}. Mend it, leave it out by a pattern, or \
                     let what cannot be read be left out."
                ),
            )),
            _ => Ok(()),
        }
    }
}

/// Whether zeros are stored in the place of what was not read.
fn is_padded(text: &str) -> bool {
    let Some((_, rest)) = text.rsplit_once(SHRANK) else { return false };
    let count = PADDED.iter().find_map(|end| rest.strip_suffix(end));
    count.is_some_and(|count| !count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A path of the tree as the container has it.
fn in_container(path: &str) -> &str {
    path.strip_prefix('.').unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Words {
        let listener = Listener::default();
        let mut copy = listener.copy();
        // In pieces that care for no line.
        text.as_bytes().chunks(7).for_each(|piece| copy.give(piece));
        listener.finish()
    }

    #[test]
    fn sockets_are_named_and_other_words_are_not() {
        let (found, count) =
            said("tar: ./run/a b.sock: socket ignored\ntar: Removing leading `/'\n").ignored();
        assert_eq!(count, 1);
        assert_eq!((found[0].path.as_str(), found[0].why.as_str()), ("/run/a b.sock", "a socket"));
        // The last line may have no end.
        let (found, _) = said("tar: ./srv/a: Warning: Cannot open: Input/output error").ignored();
        let expected = ("/srv/a", "Cannot open: Input/output error");
        assert_eq!((found[0].path.as_str(), found[0].why.as_str()), expected);
    }

    #[test]
    fn a_file_that_is_read_in_part_is_not_filled_with_zeros() {
        let before = "tar: ./srv/a: Warning: Cannot open: Permission denied\n".repeat(2000);
        said(&before).check(true).unwrap();
        for words in [
            "Warning: Read error at byte 4096, while reading 512 bytes: Input/output error",
            "File shrank by 65536 bytes; padding with zeros",
            "File shrank by 1 byte; padding with zeros",
        ] {
            let name = "d/".repeat(30_000);
            for name in ["./srv/b", &name] {
                let words = said(&format!("{before}tar: {name}: {words}\n{before}"));
                let error = words.check(true).unwrap_err();
                assert!(error.message.contains("only in part"), "{error:?}");
            }
        }
        let (named, count) = said(&before).ignored();
        assert_eq!((named.len(), count), (IGNORED_MAX, 2000));
    }

    #[test]
    fn no_name_makes_a_backup_fail() {
        for name in [
            "x: File shrank by 1",
            "x: File shrank by 1 bytes; padding with zeros",
            "x: Read error at byte 1",
            "x: Warning: Read error at byte 1",
        ] {
            // As the name is, and as `tar` writes it.
            for name in [name.to_owned(), name.replace(':', r"\:")] {
                let words = said(&format!("tar: ./{name}: socket ignored\n"));
                words.check(false).unwrap();
                assert_eq!(words.ignored().0[0].path, format!("/{name}"));
                let why = "Cannot open: Permission denied";
                let words = said(&format!("tar: ./{name}: Warning: {why}\n"));
                words.check(true).unwrap();
                assert_eq!(words.ignored().0[0].path, format!("/{name}"));
                let words =
                    said(&format!("tar: ./{name}: File shrank by 7 bytes; padding with zeros"));
                assert!(words.check(true).is_err());
            }
        }
    }

    #[test]
    fn attributes_that_cannot_be_read_are_a_fault_unless_what_is_unreadable_is_skipped() {
        let socket = "tar: ./a: socket ignored\n";
        let words = said(&format!(
            "{socket}tar: ./srv/x: Warning: Cannot llistxattrat: Input/output error\n{socket}"
        ));
        words.check(true).unwrap();
        let error = words.check(false).unwrap_err();
        assert!(error.message.contains("./srv/x: Warning: Cannot llistxattrat"), "{error:?}");
        assert_eq!(words.ignored().0[1].path, "attributes of /srv/x");
        // A file system without such attributes is no fault.
        let words = said("tar: ./srv/x: Warning: Cannot llistxattrat: Operation not supported\n");
        words.check(false).unwrap();
        assert_eq!(words.ignored(), (Vec::new(), 0));
    }
}
