// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a file has besides its content and mode: owners, extended attributes, access control lists, file
//! capabilities. Set where the kit may, read and compared everywhere.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, lchown};
use std::path::Path;

use rustix::fs::{XattrFlags, lgetxattr, llistxattr, lsetxattr};
use rustix::io::Errno;

const CAPABILITY: &str = "security.capability";
const ACL: &str = "system.posix_acl_access";
const DEFAULT_ACL: &str = "system.posix_acl_default";
const USER: &str = "user.";
/// Of all names of a file, and of one value; Linux has no more.
const ATTRIBUTE_BYTES_MAX: usize = 64 << 10;
/// `cap_net_bind_service=p`, as version 2 of the kernel's `vfs_cap_data`.
const CAPABILITY_VALUE: [u8; 20] = [0, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// A user and a group that own something; neither is root nor, most likely, anybody.
const OWNER: (u32, u32) = (1234, 5678);

/// Attributes by their names.
pub(crate) type Attributes = BTreeMap<String, Vec<u8>>;

/// Gives some entries of the kit's tree what they have to keep. What could not be set, in words.
pub(crate) fn decorate(root: &Path) -> io::Result<Vec<&'static str>> {
    let mut lacking = Vec::new();
    if rustix::process::geteuid().is_root() {
        for name in ["etc/empty", "etc/dangling", "var/lib/empty", "var/fifo"] {
            match lchown(root.join(name), Some(OWNER.0), Some(OWNER.1)) {
                // Without this number in its user namespace, or on NFS, root cannot.
                Err(error) if is_impossible(&error) => {
                    lacking.push("owners");
                    break;
                }
                other => other?,
            }
        }
        // A change of the owner takes such a bit away.
        fs::set_permissions(root.join("etc/empty"), fs::Permissions::from_mode(0o4711))?;
        set(
            root,
            "var/sparse",
            (CAPABILITY, &CAPABILITY_VALUE),
            &mut lacking,
            "file capabilities",
        )?;
    } else {
        lacking.push("owners and file capabilities (they need root)");
    }
    let user = ("user.kit", &b"a value\0 of bytes\xff"[..]);
    set(root, "etc/hostname", user, &mut lacking, "extended attributes")?;
    set(root, "home/a b", user, &mut lacking, "extended attributes")?;
    set(root, "home/a b/--help", (ACL, &acl()), &mut lacking, "access control lists")?;
    set(root, "var/lib/empty", (DEFAULT_ACL, &acl()), &mut lacking, "access control lists")?;
    Ok(lacking)
}

/// Sets an attribute, unless the file system has none of the kind.
fn set(
    root: &Path,
    name: &str,
    (attribute, value): (&str, &[u8]),
    lacking: &mut Vec<&'static str>,
    what: &'static str,
) -> io::Result<()> {
    let set = lsetxattr(root.join(name), attribute, value, XattrFlags::empty());
    match set.map_err(io::Error::from) {
        Ok(()) => Ok(()),
        Err(error) if is_impossible(&error) => {
            if !lacking.contains(&what) {
                lacking.push(what);
            }
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Whether this cannot be done here at all.
fn is_impossible(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    errno.is_some_and(|errno| [Errno::OPNOTSUPP, Errno::PERM, Errno::INVAL].contains(&errno))
}

/// A list in the kernel's form: beside owner, group and others one more user may read.
fn acl() -> Vec<u8> {
    const READ: u16 = 4;
    const WRITE: u16 = 2;
    const NOBODY: u32 = u32::MAX;
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    let entries: [(u16, u16, u32); 5] = [
        (0x01, READ | WRITE, NOBODY),
        (0x02, READ, OWNER.0),
        (0x04, READ, NOBODY),
        (0x10, READ, NOBODY),
        (0x20, 0, NOBODY),
    ];
    for (tag, rights, id) in entries {
        bytes.extend(tag.to_le_bytes().into_iter().chain(rights.to_le_bytes()));
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// The attributes of a file that a backup keeps; a link is not followed.
pub(crate) fn read(path: &Path) -> io::Result<Attributes> {
    let mut names = vec![0; ATTRIBUTE_BYTES_MAX];
    let length = match llistxattr(path, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(Attributes::new()),
        Err(error) => return Err(error.into()),
    };
    let mut found = Attributes::new();
    for name in names[..length].split(|byte| *byte == 0) {
        let Ok(name) = std::str::from_utf8(name) else { continue };
        if !(name.starts_with(USER) || [CAPABILITY, ACL, DEFAULT_ACL].contains(&name)) {
            continue;
        }
        let mut value = vec![0; ATTRIBUTE_BYTES_MAX];
        let c_name = CString::new(name).map_err(io::Error::other)?;
        let length = lgetxattr(path, c_name, &mut value[..])?;
        value.truncate(length);
        found.insert(name.to_owned(), value);
    }
    Ok(found)
}

/// What is wrong with attributes that came back, in words.
pub(crate) fn difference(expected: &Attributes, found: &Attributes) -> Option<&'static str> {
    let differs = |name: &&String| expected.get(*name) != found.get(*name);
    let name = expected.keys().chain(found.keys()).find(differs)?;
    Some(match name.as_str() {
        CAPABILITY => "has other file capabilities, or has lost them",
        ACL | DEFAULT_ACL => "has another access control list, or has lost it",
        _ => "has other extended attributes, or has lost them",
    })
}
