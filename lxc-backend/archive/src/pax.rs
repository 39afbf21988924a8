// SPDX-License-Identifier: MIT OR Apache-2.0
//! Extended headers: records `<length> <key>=<value>` about the entry that follows.

use crate::acl;
use crate::entry::{Region, Time};
use crate::number::{decimal, id, time};
use crate::sparse;

/// Longest name and value of an attribute that Linux has.
const XATTR_NAME_BYTES_MAX: usize = 255;
const XATTR_VALUE_BYTES_MAX: usize = 64 << 10;
/// The most attributes of one file that can be read: Linux lists names of 64 KiB together, and none has fewer
/// bytes than `user.x` with its end.
const XATTRS_MAX: usize = (64 << 10) / 7;

/// What an extended header says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Pax {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) mtime: Option<Time>,
    pub(crate) atime: Option<Time>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) access_acl: Option<Vec<u8>>,
    pub(crate) default_acl: Option<Vec<u8>>,
    pub(crate) is_acl_cut: bool,
    access_text: Option<Vec<u8>>,
    default_text: Option<Vec<u8>>,
    pub(crate) sparse: SparseRecords,
}

/// GNU's records of a sparse file.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct SparseRecords {
    pub(crate) major: Option<u64>,
    pub(crate) minor: Option<u64>,
    pub(crate) name: Option<Vec<u8>>,
    /// `size` or `realsize`: with holes.
    pub(crate) size: Option<u64>,
    pub(crate) blocks: Option<u64>,
    /// Format 0.0, one record each, and 0.1, one record for all.
    pub(crate) regions: Vec<Region>,
    /// Of format 0.0: an offset whose length is still to come.
    pub(crate) offset: Option<u64>,
    pub(crate) has_map: bool,
}

impl SparseRecords {
    pub(crate) fn is_sparse(&self) -> bool {
        *self != Self::default()
    }
}

impl Pax {
    /// Reads a header. Errors are words.
    pub(crate) fn parse(bytes: &[u8], regions_max: usize) -> Result<Self, String> {
        let mut pax = Self::default();
        for record in Records(bytes) {
            let (key, value) = record?;
            pax.take(key, value, regions_max)
                .map_err(|why| format!("the record '{}' {why}", crate::shown(key)))?;
        }
        if pax.sparse.offset.is_some() {
            return Err("the map of a sparse file is cut off".to_owned());
        }
        pax.check_names()?;
        let texts = [pax.access_text.take(), pax.default_text.take()];
        let [access, default] = texts;
        pax.access_acl = pax.list(access, b"system.posix_acl_access")?;
        pax.default_acl = pax.list(default, b"system.posix_acl_default")?;
        Ok(pax)
    }

    /// A list of permissions: as the kernel has it if the archive has it so, too, because the words may have names
    /// of users that nobody here knows.
    fn list(&mut self, text: Option<Vec<u8>>, raw: &[u8]) -> Result<Option<Vec<u8>>, String> {
        let list = if let Some(at) = self.xattrs.iter().position(|(name, _)| name == raw) {
            let (_, value) = self.xattrs.remove(at);
            Some(acl::from_value(value))
        } else {
            text.map(|text| acl::from_text(&text))
        };
        let list = list.transpose().map_err(|why| format!("the list of permissions {why}"))?;
        self.is_acl_cut |= list.as_ref().is_some_and(|list| list.is_cut);
        Ok(list.map(|list| list.value))
    }

    fn take(&mut self, key: &[u8], value: &[u8], regions_max: usize) -> Result<(), String> {
        let number = || decimal(value).ok_or_else(|| "is no number".to_owned());
        let owner = || decimal(value).and_then(id).ok_or_else(|| "is no id".to_owned());
        let moment = || time(value).ok_or_else(|| "is no time".to_owned());
        match key {
            b"path" => once(&mut self.path, value.to_vec()),
            b"linkpath" => once(&mut self.link, value.to_vec()),
            b"size" => once(&mut self.size, number()?),
            b"uid" => once(&mut self.uid, owner()?),
            b"gid" => once(&mut self.gid, owner()?),
            b"mtime" => once(&mut self.mtime, moment()?),
            b"atime" => once(&mut self.atime, moment()?),
            b"SCHILY.acl.access" => once(&mut self.access_text, value.to_vec()),
            b"SCHILY.acl.default" => once(&mut self.default_text, value.to_vec()),
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    return self.take_xattr(name, value);
                }
                if let Some(name) = key.strip_prefix(b"GNU.sparse.") {
                    return self.sparse.take(name, value, regions_max);
                }
                if key.starts_with(b"GNU.") {
                    return Err("is not known".to_owned());
                }
                // Names of owners, comments, and what other programs note for themselves.
                Ok(())
            }
        }
    }

    fn take_xattr(&mut self, name: &[u8], value: &[u8]) -> Result<(), String> {
        let name = decoded(name);
        let is_name = !name.is_empty() && name.len() <= XATTR_NAME_BYTES_MAX && !name.contains(&0);
        if !is_name || value.len() > XATTR_VALUE_BYTES_MAX {
            return Err("is no attribute that a file can have".to_owned());
        }
        if self.xattrs.len() >= XATTRS_MAX {
            return Err(format!("is one of more than {XATTRS_MAX} attributes"));
        }
        self.xattrs.push((name, value.to_vec()));
        Ok(())
    }

    /// That no attribute is there twice. Sorted, because there may be thousands.
    fn check_names(&self) -> Result<(), String> {
        let mut names: Vec<&[u8]> = self.xattrs.iter().map(|(name, _)| name.as_slice()).collect();
        names.sort_unstable();
        match names.windows(2).find(|two| two[0] == two[1]) {
            Some(two) => Err(format!("the attribute '{}' is there twice", crate::shown(two[0]))),
            None => Ok(()),
        }
    }
}

impl SparseRecords {
    fn take(&mut self, name: &[u8], value: &[u8], regions_max: usize) -> Result<(), String> {
        let number = || decimal(value).ok_or_else(|| "is no number".to_owned());
        match name {
            b"major" => once(&mut self.major, number()?),
            b"minor" => once(&mut self.minor, number()?),
            b"name" => once(&mut self.name, value.to_vec()),
            b"size" | b"realsize" => once(&mut self.size, number()?),
            b"numblocks" => once(&mut self.blocks, number()?),
            b"offset" => {
                self.has_map = true;
                once(&mut self.offset, number()?)
            }
            b"numbytes" => {
                let Some(offset) = self.offset.take() else {
                    return Err("has no offset".to_owned());
                };
                sparse::push(&mut self.regions, Region { offset, len: number()? }, regions_max)
            }
            b"map" if self.has_map => Err("is there twice".to_owned()),
            b"map" => {
                self.has_map = true;
                self.regions = sparse::parse_map(value, regions_max)?;
                Ok(())
            }
            _ => Err("is not known".to_owned()),
        }
    }
}

fn once<T>(place: &mut Option<T>, value: T) -> Result<(), String> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err("is there twice".to_owned()),
    }
}

/// GNU tar writes `=` and `%` in the name of an attribute as numbers.
fn decoded(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, after)) = rest.split_first() {
        match rest {
            [b'%', b'3', b'D', more @ ..] => (out.push(b'='), rest = more).1,
            [b'%', b'2', b'5', more @ ..] => (out.push(b'%'), rest = more).1,
            _ => (out.push(first), rest = after).1,
        }
    }
    out
}

/// Whether a global header says nothing that matters: a comment, as those of `git archive`.
pub(crate) fn check_global(bytes: &[u8]) -> Result<(), String> {
    for record in Records(bytes) {
        let (key, _) = record?;
        if key != b"comment" {
            let key = crate::shown(key);
            return Err(format!("the record '{key}' is meant for all entries, which is refused"));
        }
    }
    Ok(())
}

struct Records<'a>(&'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = Result<(&'a [u8], &'a [u8]), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let record = split_record(self.0);
        match record {
            Some((key, value, rest)) => {
                self.0 = rest;
                Some(Ok((key, value)))
            }
            None => {
                self.0 = &[];
                Some(Err("the extended header is malformed".to_owned()))
            }
        }
    }
}

/// Key, value, and what follows the record.
fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(12).position(|byte| *byte == b' ')?;
    let len = usize::try_from(decimal(&bytes[..space])?).ok()?;
    let (record, rest) = bytes.split_at_checked(len)?;
    let body = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    (equals > 0).then(|| (&body[..equals], &body[equals + 1..], rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let mut len = body + body.to_string().len();
        if len.to_string().len() > body.to_string().len() {
            len += 1;
        }
        let mut bytes = format!("{len} {key}=").into_bytes();
        bytes.extend(value);
        bytes.push(b'\n');
        assert_eq!(bytes.len(), len);
        bytes
    }

    fn parse(records: &[(&str, &[u8])]) -> Result<Pax, String> {
        let bytes: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
        Pax::parse(&bytes, 3)
    }

    #[test]
    fn values_may_hold_anything_but_make_sense() {
        let pax = parse(&[
            ("path", b"a\nb=\xff"),
            ("mtime", b"-1.5"),
            ("uid", b"65536"),
            ("SCHILY.xattr.user.a%3Db%25", b"\0\n=x"),
            ("SCHILY.acl.access", b"user::rwx,group::r-x,other::r-x"),
            ("uname", b"whoever"),
        ])
        .unwrap();
        assert_eq!(pax.path.unwrap(), b"a\nb=\xff");
        assert_eq!(pax.mtime, Some(Time { secs: -2, nanos: 500_000_000 }));
        assert_eq!(pax.uid, Some(65536));
        assert_eq!(pax.xattrs, [(b"user.a=b%".to_vec(), b"\0\n=x".to_vec())]);
    }

    #[test]
    fn tricks_are_refused() {
        let cases: [&[(&str, &[u8])]; 13] = [
            &[("size", b"-1")],
            &[("size", b"99999999999999999999")],
            &[("size", b"1"), ("size", b"2")],
            &[("path", b"a"), ("path", b"b")],
            &[("uid", b"4294967295")],
            &[("gid", b"4294967296")],
            &[("mtime", b"1e9")],
            &[("GNU.sparse.offset", b"0")],
            &[("GNU.sparse.numbytes", b"0")],
            &[("GNU.sparse.map", b"0,1"), ("GNU.sparse.map", b"0,1")],
            &[("GNU.sparse.map", b"0,1,1,1,2,1,3,1")],
            &[("GNU.future", b"1")],
            &[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.a", b"2")],
        ];
        for case in cases {
            assert!(parse(case).is_err(), "{case:?}");
        }
        for bad in
            [&b"6 a=\n"[..], b"x a=b\n", b"7 a=b\n", b"6 ab\n\n", b"6 =abc", b"999 a=b\n", b"3 \n"]
        {
            assert!(Pax::parse(bad, 3).is_err(), "{bad:?}");
        }
        check_global(&record("comment", b"e83c5163316f89bfbde7d9ab23ca2e25604af290")).unwrap();
        for key in ["path", "size", "uid", "mtime", "SCHILY.xattr.user.a"] {
            assert!(check_global(&record(key, b"1")).is_err(), "{key}");
        }
    }
}
