// SPDX-License-Identifier: MIT OR Apache-2.0
//! Entries, one after the other.

use std::io::{self, Read};

use crate::Limits;
use crate::entry::{Entry, Kind, Region, Time};
use crate::error::{ArchiveError, Result, refused};
use crate::header::{BLOCK, Format, Header};
use crate::number::id;
use crate::path::clean;
use crate::pax::{self, Pax};
use crate::source::Source;
use crate::sparse;

/// What a write gets at once.
const PIECE_BYTES: usize = 256 << 10;
/// Longest target of a symbolic link that Linux has.
const TARGET_BYTES_MAX: usize = 4095;
/// All ones: a size that did not fit its field.
const SIZE_OVERFLOW: i128 = 0o77_777_777_777;

/// Reads a tar archive.
#[derive(Debug)]
pub struct Reader<R> {
    source: Source<R>,
    limits: Limits,
    entries: u64,
    data_bytes: u64,
    /// Of the current entry, and its padding.
    left: u64,
    padding: u64,
    is_over: bool,
    /// For data on their way.
    buffer: Vec<u8>,
}

/// What was read before the header of an entry.
#[derive(Debug, Default)]
struct Extensions {
    pax: Option<Pax>,
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Extensions {
    fn is_empty(&self) -> bool {
        self.pax.is_none() && self.long_path.is_none() && self.long_link.is_none()
    }
}

impl<R: Read> Reader<R> {
    /// Reads from the begin of an archive, decompressed.
    pub fn new(inner: R, limits: Limits) -> Self {
        let source = Source::new(inner);
        Self {
            source,
            limits,
            entries: 0,
            data_bytes: 0,
            left: 0,
            padding: 0,
            is_over: false,
            buffer: vec![0; PIECE_BYTES],
        }
    }

    /// How many entries there were so far.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// The next entry; none at the end, which is only an end if the archive says so.
    ///
    /// # Errors
    /// [`ArchiveError`]; the archive cannot be read on then.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        if self.is_over {
            return Ok(None);
        }
        self.source.skip(self.left.saturating_add(self.padding))?;
        (self.left, self.padding) = (0, 0);
        let mut extensions = Extensions::default();
        loop {
            let header = Header(self.source.block()?);
            if header.0.iter().all(|byte| *byte == 0) {
                return self.end(&extensions).map(|()| None);
            }
            if !header.has_its_checksum() {
                return self.source.damaged("the checksum of a header is wrong");
            }
            if !self.take_extension(&header, &mut extensions)? {
                return self.entry(&header, extensions).map(Some);
            }
        }
    }

    fn end(&mut self, extensions: &Extensions) -> Result<()> {
        if !extensions.is_empty() {
            return self.source.damaged("an extended header describes nothing");
        }
        if self.source.block()?.iter().any(|byte| *byte != 0) {
            return self.source.damaged("an empty block is followed by something");
        }
        self.is_over = true;
        self.source.drain()
    }

    /// Takes a header that is not an entry but describes the next one; false for an entry.
    fn take_extension(&mut self, header: &Header, extensions: &mut Extensions) -> Result<bool> {
        let is_twice = match header.typeflag() {
            b'x' | b'X' => {
                let bytes = self.extension(header)?;
                match Pax::parse(&bytes, self.limits.regions) {
                    Ok(pax) => extensions.pax.replace(pax).is_some(),
                    Err(why) => return self.source.damaged(why),
                }
            }
            b'L' => extensions.long_path.replace(self.long_name(header)?).is_some(),
            b'K' => extensions.long_link.replace(self.long_name(header)?).is_some(),
            b'g' => {
                let bytes = self.extension(header)?;
                if let Err(why) = pax::check_global(&bytes) {
                    return self.source.damaged(why);
                }
                false
            }
            // The name of the archive itself.
            b'V' => {
                let size = header.size();
                if size != Some(0) {
                    return self.source.damaged("a label has data");
                }
                false
            }
            _ => return Ok(false),
        };
        if is_twice {
            return self.source.damaged("one entry has two extended headers");
        }
        Ok(true)
    }

    /// The data of an extended header.
    fn extension(&mut self, header: &Header) -> Result<Vec<u8>> {
        let size = header.size().and_then(|size| usize::try_from(size).ok());
        let Some(size) = size else { return self.source.damaged("a header has no size") };
        if size > self.limits.header_bytes {
            let why = format!("an extended header of {size} bytes");
            return Err(ArchiveError::TooMuch(why));
        }
        let bytes = self.source.bytes(size)?;
        self.source.skip(padding(size as u64))?;
        Ok(bytes)
    }

    fn long_name(&mut self, header: &Header) -> Result<Vec<u8>> {
        let mut bytes = self.extension(header)?;
        if bytes.last() == Some(&0) {
            bytes.pop();
        }
        Ok(bytes)
    }

    fn entry(&mut self, header: &Header, extensions: Extensions) -> Result<Entry> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            let why = format!("more than {} entries", self.limits.entries);
            return Err(ArchiveError::TooMuch(why));
        }
        let Extensions { pax, long_path, long_link } = extensions;
        let mut pax = pax.unwrap_or_default();
        let raw = raw_path(header, &mut pax, long_path)?;
        let path = clean(&raw, self.limits.path_bytes)?;
        let stored = stored_size(header, &pax).or_else(|why| refused(&raw, why))?;
        let link = match (pax.link.take(), long_link) {
            (Some(_), Some(_)) => return refused(&raw, "it has two targets"),
            (Some(link), None) | (None, Some(link)) => link,
            (None, None) => header.link().to_vec(),
        };
        let kind = self.kind(header, &raw, &link, stored, &mut pax)?;
        let meta = numbers(header, &pax).ok_or_else(|| ArchiveError::Refused {
            path: crate::shown(&raw),
            why: "its owner, mode or time is no number that a file can have".to_owned(),
        })?;
        if path.is_empty() && kind != Kind::Directory {
            return refused(&raw, "the root is no directory");
        }
        let Numbers { mode, uid, gid, mtime } = meta;
        Ok(Entry {
            path,
            kind,
            mode,
            uid,
            gid,
            mtime,
            atime: pax.atime,
            xattrs: pax.xattrs,
            access_acl: pax.access_acl,
            default_acl: pax.default_acl,
            is_acl_cut: pax.is_acl_cut,
        })
    }

    fn kind(
        &mut self,
        header: &Header,
        raw: &[u8],
        link: &[u8],
        stored: u64,
        pax: &mut Pax,
    ) -> Result<Kind> {
        let typeflag = header.typeflag();
        // Before there was a type for them.
        let is_directory = matches!(typeflag, 0 | b'0') && raw.ends_with(b"/");
        if matches!(typeflag, 0 | b'0' | b'7' | b'S') && !is_directory {
            return self.file(header, raw, stored, pax);
        }
        if pax.sparse.is_sparse() {
            return refused(raw, "something that is no file is sparse");
        }
        // Refused below by what they are.
        let is_part = matches!(typeflag, b'M' | b'D');
        if stored != 0 && !is_part {
            return refused(raw, "something that has no data has a size");
        }
        let device = || header.device().ok_or("its device numbers are none");
        match typeflag {
            _ if is_directory => Ok(Kind::Directory),
            b'5' => Ok(Kind::Directory),
            b'1' => Ok(Kind::HardLink(clean(link, self.limits.path_bytes)?)),
            b'2' if link.is_empty() || link.len() > TARGET_BYTES_MAX || link.contains(&0) => {
                refused(raw, "its target is none that a link can have")
            }
            b'2' => Ok(Kind::Symlink(link.to_vec())),
            b'6' => Ok(Kind::Fifo),
            b'3' => {
                let (major, minor) = device().or_else(|why| refused(raw, why))?;
                Ok(Kind::CharDevice { major, minor })
            }
            b'4' => {
                let (major, minor) = device().or_else(|why| refused(raw, why))?;
                Ok(Kind::BlockDevice { major, minor })
            }
            b'M' => refused(raw, "it is continued from another archive"),
            b'D' => refused(raw, "it is of an incremental archive"),
            other => refused(raw, format!("its type '{}' is not known", other.escape_ascii())),
        }
    }

    fn file(&mut self, header: &Header, raw: &[u8], stored: u64, pax: &mut Pax) -> Result<Kind> {
        self.data_bytes = self.data_bytes.saturating_add(stored);
        if self.data_bytes > self.limits.data_bytes {
            return Err(ArchiveError::TooMuchData {
                path: crate::shown(raw),
                limit_bytes: self.limits.data_bytes,
            });
        }
        // First of all, so that nothing that follows forgets it.
        (self.left, self.padding) = (stored, padding(stored));
        let (size, regions) = self.map(header, raw, stored, pax)?;
        if size > self.limits.file_bytes {
            return Err(ArchiveError::TooMuch(format!("a file of {size} bytes")));
        }
        sparse::check(&regions, size, self.left).or_else(|why| refused(raw, why))?;
        Ok(Kind::File { size, regions })
    }

    /// The size of a file with its holes, and where its data are.
    fn map(
        &mut self,
        header: &Header,
        raw: &[u8],
        stored: u64,
        pax: &mut Pax,
    ) -> Result<(u64, Vec<Region>)> {
        let records = &mut pax.sparse;
        if header.typeflag() == b'S' {
            if header.format() != Format::Gnu || records.is_sparse() {
                return refused(raw, "its kind of a sparse file is not known");
            }
            return sparse::read_old_gnu(&mut self.source, header, self.limits.regions);
        }
        if !records.is_sparse() {
            let whole = Region { offset: 0, len: stored };
            return Ok((stored, if stored == 0 { Vec::new() } else { vec![whole] }));
        }
        let Some(size) = records.size else { return refused(raw, "a sparse file has no size") };
        match (records.major.unwrap_or(0), records.minor.unwrap_or(0)) {
            (0, 0 | 1) => {
                let count = records.blocks.unwrap_or(records.regions.len() as u64);
                if count != records.regions.len() as u64 {
                    return refused(raw, "the map of a sparse file is not complete");
                }
                Ok((size, std::mem::take(&mut records.regions)))
            }
            (1, 0) if !records.has_map => {
                let regions_max = self.limits.regions;
                let (regions, taken) = sparse::read_map(&mut self.source, stored, regions_max)?;
                self.left -= taken;
                Ok((size, regions))
            }
            (major, minor) => {
                refused(raw, format!("sparse files of the format {major}.{minor} are not known"))
            }
        }
    }

    /// Hands on the data of the entry that was read last, with their places in the file.
    ///
    /// # Errors
    /// [`ArchiveError`], also [`ArchiveError::Write`] with what `write` says.
    pub fn copy_data(
        &mut self,
        regions: &[Region],
        mut write: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> Result<()> {
        for region in regions {
            let mut done = 0;
            while done < region.len {
                let left = usize::try_from(region.len - done).unwrap_or(usize::MAX);
                let piece = &mut self.buffer[..left.min(PIECE_BYTES)];
                if self.left < piece.len() as u64 {
                    return self.source.damaged("a file has more pieces than data");
                }
                self.source.exact(piece)?;
                self.left -= piece.len() as u64;
                write(region.offset + done, piece).map_err(ArchiveError::Write)?;
                done += piece.len() as u64;
            }
        }
        Ok(())
    }
}

/// Bytes up to the next whole block.
fn padding(size: u64) -> u64 {
    let block = BLOCK as u64;
    (block - size % block) % block
}

/// The path, wherever it stands.
fn raw_path(header: &Header, pax: &mut Pax, long_path: Option<Vec<u8>>) -> Result<Vec<u8>> {
    match (pax.sparse.name.take(), pax.path.take(), long_path) {
        (_, Some(path), Some(_)) => refused(&path, "it has two paths"),
        // In place of a path that only tells old programs that the file is sparse.
        (Some(name), ..) => Ok(name),
        (None, Some(path), None) | (None, None, Some(path)) => Ok(path),
        (None, None, None) => Ok(header.path()),
    }
}

/// How many bytes follow the header. Where two sizes are named they must agree.
fn stored_size(header: &Header, pax: &Pax) -> std::result::Result<u64, &'static str> {
    let own = header.size().ok_or("its size is no number")?;
    let Some(size) = pax.size else {
        return u64::try_from(own).map_err(|_| "its size is no number").and_then(in_range);
    };
    if own != 0 && own != SIZE_OVERFLOW && own != i128::from(size) {
        return Err("it has two sizes");
    }
    in_range(size)
}

fn in_range(size: u64) -> std::result::Result<u64, &'static str> {
    if size <= i64::MAX as u64 { Ok(size) } else { Err("its size is larger than any file") }
}

struct Numbers {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: Time,
}

fn numbers(header: &Header, pax: &Pax) -> Option<Numbers> {
    let secs = |value: Option<i128>| i64::try_from(value?).ok();
    let mtime = match pax.mtime {
        Some(mtime) => mtime,
        None => Time { secs: secs(header.mtime())?, nanos: 0 },
    };
    Some(Numbers {
        // Old programs have the type of the file in it, too.
        mode: u32::try_from(header.mode()?).ok()? & 0o7777,
        uid: pax.uid.or_else(|| id(header.uid()?))?,
        gid: pax.gid.or_else(|| id(header.gid()?))?,
        mtime,
    })
}
