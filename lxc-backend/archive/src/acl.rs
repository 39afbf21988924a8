// SPDX-License-Identifier: MIT OR Apache-2.0
//! POSIX access control lists: from the words of an archive to what the kernel takes.

use crate::number::decimal;

const VERSION: u32 = 2;
const TAG_USER_OBJ: u16 = 0x01;
const TAG_USER: u16 = 0x02;
const TAG_GROUP_OBJ: u16 = 0x04;
const TAG_GROUP: u16 = 0x08;
const TAG_MASK: u16 = 0x10;
const TAG_OTHER: u16 = 0x20;
const NO_ID: u32 = u32::MAX;
/// Of one line of the value: tag, permissions and id.
const LINE_BYTES: usize = 8;
const NOBODY: u32 = 65_534;
/// The most lines of a list.
const LINES_MAX: usize = 8192;

/// One line of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Line {
    tag: u16,
    id: u32,
    permissions: u16,
}

/// A list of permissions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List {
    /// The value of the extended attribute.
    pub value: Vec<u8>,
    /// Whether lines were dropped that are for nobody: the kernel shows ids as [`u32::MAX`] that a container does not
    /// have, and takes no such line back. Nobody in the container can be whom it meant.
    pub is_cut: bool,
}

/// The list for words such as `user::rwx,user:1000:r--,…`, with commas or line
/// breaks. A name of a user counts only with its number behind it (`user:bin:r--:2`).
///
/// # Errors
/// In words, to follow what the list is called.
pub fn from_text(text: &[u8]) -> Result<List, String> {
    let mut lines = Vec::new();
    let mut is_cut = false;
    for part in text.split(|byte| matches!(byte, b',' | b'\n')) {
        // What follows is the effect that the mask has.
        let part = part.split(|byte| *byte == b'#').next().unwrap_or_default().trim_ascii();
        if part.is_empty() {
            continue;
        }
        if lines.len() >= LINES_MAX {
            return Err(format!("has more than {LINES_MAX} lines"));
        }
        let line = parse(part);
        let line = line.ok_or_else(|| format!("has the bad line '{}'", crate::shown(part)))?;
        if is_for_nobody(line.tag, line.id) {
            is_cut = true;
        } else {
            lines.push(line);
        }
    }
    lines.sort_unstable();
    check(&lines)?;
    let mut value = VERSION.to_le_bytes().to_vec();
    for Line { tag, id, permissions } in lines {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    Ok(List { value, is_cut })
}

fn is_for_nobody(tag: u16, id: u32) -> bool {
    [TAG_USER, TAG_GROUP].contains(&tag) && id == NO_ID
}

/// The list for the value of the attribute, whose lines are the kernel's to check.
///
/// # Errors
/// In words, to follow what the list is called.
pub(crate) fn from_value(mut value: Vec<u8>) -> Result<List, String> {
    if value.len() % LINE_BYTES != 4 {
        return Err("is none".to_owned());
    }
    let lines = value.split_off(4);
    let kept = lines.chunks_exact(LINE_BYTES).filter(|line| match line {
        [t0, t1, _, _, id @ ..] => {
            let id = id.try_into().map_or(0, u32::from_le_bytes);
            !is_for_nobody(u16::from_le_bytes([*t0, *t1]), id)
        }
        _ => true,
    });
    let before = 4 + lines.len();
    value.extend(kept.flatten());
    let is_cut = value.len() < before;
    if value.len() < 4 + 3 * LINE_BYTES {
        return Err("is none".to_owned());
    }
    Ok(List { value, is_cut })
}

fn parse(line: &[u8]) -> Option<Line> {
    let line = line.strip_prefix(b"default:").or(line.strip_prefix(b"d:")).unwrap_or(line);
    let mut fields: Vec<&[u8]> = line.split(|byte| *byte == b':').collect();
    let name = *fields.first()?;
    // `other::r--`, and in short `other:r--`.
    if fields.len() == 2 {
        fields.insert(1, b"");
    }
    let (qualifier, permissions) = (*fields.get(1)?, permissions(fields.get(2)?)?);
    let number = match (qualifier, fields.get(3)) {
        (_, Some(number)) => Some(decimal(number)?.try_into().ok()?),
        // Names that are the same everywhere, so that a program may have written them for numbers.
        (b"root", None) => Some(0),
        (b"nobody" | b"nogroup", None) => Some(NOBODY),
        (b"", None) => None,
        (number, None) => Some(decimal(number)?.try_into().ok()?),
    };
    let tag = match (name, number) {
        (b"user" | b"u", None) => TAG_USER_OBJ,
        (b"user" | b"u", Some(_)) => TAG_USER,
        (b"group" | b"g", None) => TAG_GROUP_OBJ,
        (b"group" | b"g", Some(_)) => TAG_GROUP,
        (b"mask" | b"m", None) => TAG_MASK,
        (b"other" | b"o", None) => TAG_OTHER,
        _ => return None,
    };
    (fields.len() <= 4).then_some(Line { tag, id: number.unwrap_or(NO_ID), permissions })
}

fn permissions(text: &[u8]) -> Option<u16> {
    text.iter().try_fold(0, |sum, byte| match byte {
        b'r' => Some(sum | 4),
        b'w' => Some(sum | 2),
        b'x' => Some(sum | 1),
        b'-' => Some(sum),
        _ => None,
    })
}

/// As the kernel wants it: the three plain lines once, nobody twice, a mask if somebody is named.
fn check(lines: &[Line]) -> Result<(), String> {
    let count = |tag: u16| lines.iter().filter(|line| line.tag == tag).count();
    let is_whole = [TAG_USER_OBJ, TAG_GROUP_OBJ, TAG_OTHER].iter().all(|tag| count(*tag) == 1);
    let names_somebody = count(TAG_USER) + count(TAG_GROUP) > 0;
    let is_twice =
        lines.windows(2).any(|pair| (pair[0].tag, pair[0].id) == (pair[1].tag, pair[1].id));
    if !is_whole || is_twice || (names_somebody && count(TAG_MASK) != 1) {
        return Err("is no list of permissions".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_become_what_the_kernel_takes() {
        let list = from_text(
            b"user::rw-,group::r--,user:bin:r-x:2,user:1000:r--\t#effective:---,mask::rwx,other::---",
        )
        .unwrap();
        let expected: [(u16, u16, u32); 6] = [
            (TAG_USER_OBJ, 6, NO_ID),
            (TAG_USER, 5, 2),
            (TAG_USER, 4, 1000),
            (TAG_GROUP_OBJ, 4, NO_ID),
            (TAG_MASK, 7, NO_ID),
            (TAG_OTHER, 0, NO_ID),
        ];
        let mut bytes = vec![2, 0, 0, 0];
        for (tag, permissions, id) in expected {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(permissions.to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
        assert_eq!(list, List { value: bytes.clone(), is_cut: false });
        assert_eq!(from_value(bytes).unwrap(), list);
        let named = from_text(b"u::r,g::r,o::r,m::r,u:nobody:r,g:nogroup:r,u:root:r").unwrap();
        let numbers = from_text(b"u::r,g::r,o::r,m::r,u:65534:r,g:65534:r,u:0:r").unwrap();
        assert_eq!(named, numbers);
        let short = from_text(b"u::rwx\ng::rx\no:r\n").unwrap();
        assert_eq!(short, from_text(b"user::rwx,group::r-x,other::r--").unwrap());
    }

    #[test]
    fn a_line_for_nobody_is_dropped_whatever_form_it_has() {
        let cut = from_text(
            b"user::rwx,user:4294967295:r--,user:bin:rwx:2,group::r-x,group:4294967295:r--,\
              group:4294967295:rwx,mask::rwx,other::---",
        );
        let cut = cut.unwrap();
        let whole = from_text(b"user::rwx,user:2:rwx,group::r-x,mask::rwx,other::---").unwrap();
        assert_eq!((cut.is_cut, &cut.value), (true, &whole.value));
        let mut value = whole.value.clone();
        value.extend([8, 0, 5, 0, 255, 255, 255, 255]);
        assert_eq!(from_value(value).unwrap(), cut);
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for bad in [
            "",
            "user::rwx,group::r-x",
            "user::rwx,group::r-x,other::r--,other::r--",
            "user::rwx,group::r-x,other::r--,user:1:r--",
            "user::rwx,group::r-x,other::r--,mask::r--,user:1:r--,user:1:rw-",
            "user::rwx,group::r-x,other::q--",
            "user::rwx,group::r-x,other::r--,mask::r--,user:somebody:r--",
            "user::rwx,group::r-x,other::r--,mask:5:r--",
            "user::rwx,group::r-x,other::r--,x",
        ] {
            assert!(from_text(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
