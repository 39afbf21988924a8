// SPDX-License-Identifier: MIT OR Apache-2.0
//! Paths of an archive, made to stay below the root of the tree.

use crate::error::{Result, refused};

/// Longest name of a file that Linux has.
pub const NAME_BYTES_MAX: usize = 255;

/// The path without `.`, doubled slashes and a slash at its begin or end: what is absolute is meant from the
/// tree's root.
///
/// # Errors
/// It leads upwards, or could not be the path of a file.
pub fn clean(raw: &[u8], bytes_max: usize) -> Result<Vec<u8>> {
    if raw.is_empty() {
        return refused(raw, "it has no name");
    }
    if raw.contains(&0) {
        return refused(raw, "its path has a zero byte");
    }
    let mut path = Vec::with_capacity(raw.len());
    for name in raw.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => continue,
            b".." => return refused(raw, "its path leads upwards ('..')"),
            _ if name.len() > NAME_BYTES_MAX => return refused(raw, "its name is too long"),
            _ => {}
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
    }
    if path.len() > bytes_max {
        return refused(raw, format!("its path has more than {bytes_max} bytes"));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_the_root() {
        for (raw, path) in [
            ("./", ""),
            ("/", ""),
            ("./a//b/./c/", "a/b/c"),
            ("/etc/passwd", "etc/passwd"),
            ("..a/b..", "..a/b.."),
        ] {
            assert_eq!(clean(raw.as_bytes(), 100).unwrap(), path.as_bytes(), "{raw}");
        }
        let long = [b'a'; 256];
        let deep = b"a/".repeat(60);
        for raw in [&b""[..], b"..", b"a/../../b", b"../a", b"a/..", b"a\0b", &long, &deep] {
            assert!(clean(raw, 100).is_err(), "{raw:?}");
        }
    }
}
