// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether a tree of files came back as it was: a tree of odd things, and a comparison of two trees.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, SeekFrom, Timespec, Timestamps, UTIME_OMIT, XattrFlags,
    lgetxattr, llistxattr, lsetxattr, makedev, mknodat, seek, utimensat,
};
use rustix::io::Errno;

/// A name that is no UTF-8, and has what breaks lines and patterns.
const ODD_NAME: &[u8] = b"no \xff\xfe UTF-8\n*?[a]\\";
/// The kernel's values: version 2, owner, user 1000, group, mask, others.
fn acl(named: u32) -> Vec<u8> {
    let mut value = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(1, 6, u32::MAX), (2, 4, named), (4, 4, u32::MAX), (16, 6, u32::MAX), (32, 0, u32::MAX)]
    {
        value.extend(u16::to_le_bytes(tag));
        value.extend(u16::to_le_bytes(permissions));
        value.extend(u32::to_le_bytes(id));
    }
    value
}

/// A file capability of version 2: `cap_net_raw=ep`.
fn capability() -> Vec<u8> {
    let words = [0x0200_0001_u32, 1 << 13, 0, 0, 0];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn set_times(path: &Path, secs: i64, nanos: i64) -> io::Result<()> {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: secs, tv_nsec: nanos },
    };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Makes the tree of odd things below a directory. Needs root.
///
/// # Errors
/// A file cannot be made.
pub fn make_odd_tree(root: &Path) -> io::Result<()> {
    make_names(root)?;
    make_contents(root)?;
    make_metadata(root)?;
    // Last, because what is made in a directory changes its time.
    for (name, secs) in [("owners", -86_400 * 365), ("modes", 1), ("empty", 13_569_465_600)] {
        set_times(&root.join(name), secs, 123_456_789)?;
    }
    Ok(())
}

fn make_names(root: &Path) -> io::Result<()> {
    fs::create_dir(root.join("empty"))?;
    fs::create_dir(root.join("names"))?;
    let names = root.join("names");
    fs::write(names.join(OsString::from_vec(ODD_NAME.to_vec())), "odd")?;
    fs::write(names.join("l".repeat(255)), "long")?;
    fs::write(names.join(" -rf "), "an option?")?;
    let mut deep = names.clone();
    for _ in 0..14 {
        deep.push("d".repeat(250));
        fs::create_dir(&deep)?;
    }
    fs::write(deep.join("deep"), "deep")?;
    for (name, target) in [
        ("dangling", "nowhere".to_owned()),
        ("absolute", "/etc/shadow".to_owned()),
        ("upwards", "../../../../../etc".to_owned()),
        ("long", "t/".repeat(2000)),
    ] {
        std::os::unix::fs::symlink(target, names.join(name))?;
    }
    std::os::unix::fs::lchown(names.join("dangling"), Some(1234), Some(4321))?;
    set_times(&names.join("dangling"), 1_000_000_000, 1)
}

fn make_contents(root: &Path) -> io::Result<()> {
    let dir = root.join("contents");
    fs::create_dir_all(dir.join("other/place"))?;
    fs::write(dir.join("nothing"), "")?;
    let large: Vec<u8> =
        (0..3_000_001_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(dir.join("large"), large)?;
    fs::hard_link(dir.join("large"), dir.join("other/place/same"))?;
    fs::hard_link(dir.join("large"), root.join("names/same, too"))?;
    let sparse = |name: &str, islands: &[(u64, usize)], len: u64| -> io::Result<()> {
        let file = File::create(dir.join(name))?;
        for (offset, len) in islands {
            file.write_all_at(&vec![0xa5; *len], *offset)?;
        }
        file.set_len(len)
    };
    sparse("hole", &[], 64 << 20)?;
    sparse("hole-first", &[(8 << 20, 10)], (8 << 20) + 10)?;
    sparse("hole-last", &[(0, 4096)], 1 << 30)?;
    let islands: Vec<(u64, usize)> = (0..200).map(|n| (n << 17, 4096)).collect();
    sparse("islands", &islands, 200 << 17)?;
    mknodat(CWD, dir.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o620), 0)?;
    mknodat(CWD, dir.join("whiteout"), FileType::CharacterDevice, Mode::empty(), makedev(0, 0))?;
    std::os::unix::fs::symlink("large", dir.join("link"))?;
    fs::hard_link(dir.join("link"), dir.join("other/link"))
}

fn make_metadata(root: &Path) -> io::Result<()> {
    let owners = root.join("owners");
    fs::create_dir(&owners)?;
    for id in [0, 1, 1000, 65_534, 65_535] {
        let path = owners.join(id.to_string());
        fs::write(&path, "owned")?;
        std::os::unix::fs::chown(&path, Some(id), Some(65_535 - id))?;
    }
    let modes = root.join("modes");
    fs::create_dir(&modes)?;
    for mode in [0, 0o444, 0o4755, 0o2755, 0o6711, 0o1644, 0o777] {
        let path = modes.join(format!("{mode:o}"));
        fs::write(&path, "mode")?;
        std::os::unix::fs::chown(&path, Some(33), Some(33))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        set_times(&path, 1_700_000_000 + i64::from(mode), 999_999_999)?;
        let path = modes.join(format!("dir-{mode:o}"));
        fs::create_dir(&path)?;
        fs::write(path.join("inside"), "inside")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    let dir = root.join("attributes");
    fs::create_dir(&dir)?;
    let file = dir.join("file");
    fs::write(&file, "attributes")?;
    for (name, value) in [
        ("user.text", &b"value"[..]),
        ("user.empty", b""),
        ("user.a=b%", b"\0\n=\xff"),
        ("user.long", &[7; 2000]),
    ] {
        lsetxattr(&file, name, value, XattrFlags::empty())?;
    }
    let capable = dir.join("capable");
    fs::write(&capable, "capable")?;
    lsetxattr(&capable, "security.capability", &capability(), XattrFlags::empty())?;
    lsetxattr(&file, "system.posix_acl_access", &acl(1000), XattrFlags::empty())?;
    let inherits = dir.join("inherits");
    fs::create_dir(&inherits)?;
    fs::write(inherits.join("before"), "made before the list")?;
    lsetxattr(&inherits, "system.posix_acl_default", &acl(1001), XattrFlags::empty())?;
    lsetxattr(&inherits, "user.of-a-directory", b"1", XattrFlags::empty())?;
    Ok(())
}

/// What there is to a file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    size: u64,
    device: u64,
    target: Option<PathBuf>,
    content: Option<blake3::Hash>,
    /// Bytes that are not holes.
    data_bytes: u64,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same file.
    same_as: PathBuf,
}

/// What two trees were compared in.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// What the first tree has, by kind: each file counts for all that it is.
    pub kinds: BTreeMap<&'static str, u64>,
    /// A line each; none if the second tree is as the first.
    pub differences: Vec<String>,
}

/// Differences of two trees, a line each; none if the second is as the first. `ids` is what is added to ids on
/// the way from the first to the second. Needs root.
///
/// # Errors
/// A tree cannot be read.
pub fn compare(first: &Path, second: &Path, ids: u32) -> io::Result<Vec<String>> {
    Ok(compare_all(first, second, ids)?.differences)
}

/// The same with what was compared.
///
/// # Errors
/// A tree cannot be read.
pub fn compare_all(first: &Path, second: &Path, ids: u32) -> io::Result<Comparison> {
    let (before, after) = (look(first)?, look(second)?);
    let mut differences = Vec::new();
    for (path, was) in &before {
        let shown = path.display();
        let Some(is) = after.get(path) else {
            differences.push(format!("{shown}: missing"));
            continue;
        };
        let was = shifted(was, ids);
        let mut differs = |what: &str, was: String, is: String| {
            if was != is {
                differences.push(format!("{shown}: {what}: {was} became {is}"));
            }
        };
        differs("kind", was.kind.to_owned(), is.kind.to_owned());
        differs("mode", format!("{:o}", was.mode), format!("{:o}", is.mode));
        differs("owner", format!("{:?}", was.owner), format!("{:?}", is.owner));
        differs("time", format!("{:?}", was.mtime), format!("{:?}", is.mtime));
        differs("size", was.size.to_string(), is.size.to_string());
        differs("device", was.device.to_string(), is.device.to_string());
        differs("target", format!("{:?}", was.target), format!("{:?}", is.target));
        differs("content", format!("{:?}", was.content), format!("{:?}", is.content));
        differs("attributes", format!("{:?}", was.xattrs), format!("{:?}", is.xattrs));
        differs("links", was.same_as.display().to_string(), is.same_as.display().to_string());
        // File systems round to their blocks; a hole that was filled is far larger.
        if is.data_bytes > was.data_bytes + (64 << 10) {
            differs("data", was.data_bytes.to_string(), is.data_bytes.to_string());
        }
    }
    let more = after.keys().filter(|path| !before.contains_key(*path));
    differences.extend(more.map(|path| format!("{}: was not there", path.display())));
    Ok(Comparison { kinds: kinds(&before), differences })
}

fn kinds(seen: &BTreeMap<PathBuf, Seen>) -> BTreeMap<&'static str, u64> {
    let mut kinds = BTreeMap::new();
    for (path, one) in seen {
        let has = |name: &[u8]| one.xattrs.keys().any(|key| key.starts_with(name));
        let is_file = one.kind == "file";
        for (kind, is_one) in [
            (one.kind, true),
            ("another name of a file", one.same_as != *path),
            ("with holes", is_file && one.data_bytes < one.size / 4096 * 4096),
            ("with an access control list", has(b"system.posix_acl_")),
            ("with a capability", has(b"security.capability")),
            ("with attributes user.*", has(b"user.")),
            ("setuid, setgid or sticky", one.mode & 0o7000 != 0),
            ("of another owner than root", one.owner != (0, 0)),
            ("with nanoseconds", one.mtime.1 != 0),
            ("with a name that is no UTF-8", path.to_str().is_none()),
            ("with a path beyond 255 bytes", path.as_os_str().len() > 255),
        ] {
            *kinds.entry(kind).or_default() += u64::from(is_one);
        }
    }
    kinds.retain(|_, count| *count > 0);
    kinds
}

/// As it is stored for a container whose ids begin there.
fn shifted(seen: &Seen, ids: u32) -> Seen {
    let mut seen = seen.clone();
    seen.owner = (seen.owner.0 + ids, seen.owner.1 + ids);
    for (name, value) in &mut seen.xattrs {
        if ids > 0 && name == b"security.capability" && value.len() == 20 {
            // Version 3 names the root of the namespace.
            value[3] = 3;
            value.extend(ids.to_le_bytes());
        }
        if name.starts_with(b"system.posix_acl_") {
            for line in value[4..].chunks_exact_mut(8) {
                let id = u32::from_le_bytes([line[4], line[5], line[6], line[7]]);
                if id != u32::MAX {
                    line[4..].copy_from_slice(&(id + ids).to_le_bytes());
                }
            }
        }
    }
    seen
}

fn look(root: &Path) -> io::Result<BTreeMap<PathBuf, Seen>> {
    let mut seen = BTreeMap::new();
    let mut first_of = BTreeMap::new();
    let mut paths = Vec::new();
    walk(root, &PathBuf::new(), &mut paths)?;
    paths.sort();
    for path in paths {
        let file = root.join(&path);
        let meta = fs::symlink_metadata(&file)?;
        let same_as =
            first_of.entry((meta.dev(), meta.ino())).or_insert_with(|| path.clone()).clone();
        let kind = meta.file_type();
        let is_file = kind.is_file();
        let is_device = kind.is_char_device() || kind.is_block_device();
        let one = Seen {
            kind: match () {
                () if is_file => "file",
                () if kind.is_dir() => "directory",
                () if kind.is_symlink() => "link",
                () if kind.is_fifo() => "fifo",
                () if kind.is_char_device() => "character device",
                () if kind.is_block_device() => "block device",
                () => "socket",
            },
            mode: meta.mode() & 0o7777,
            owner: (meta.uid(), meta.gid()),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            size: if kind.is_dir() { 0 } else { meta.len() },
            device: if is_device { meta.rdev() } else { 0 },
            target: if kind.is_symlink() { Some(fs::read_link(&file)?) } else { None },
            content: if is_file { Some(hash(&file)?) } else { None },
            data_bytes: if is_file { data_bytes(&file)? } else { 0 },
            xattrs: xattrs(&file)?,
            same_as,
        };
        seen.insert(path, one);
    }
    Ok(seen)
}

/// All paths but `lost+found`, which belongs to the file system.
fn walk(root: &Path, below: &Path, paths: &mut Vec<PathBuf>) -> io::Result<()> {
    paths.push(below.to_owned());
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        if path.as_os_str().as_bytes() == b"lost+found" {
            continue;
        }
        if entry.file_type()?.is_dir() {
            walk(root, &path, paths)?;
        } else {
            paths.push(path);
        }
    }
    Ok(())
}

/// Only what is no hole is read.
fn hash(path: &Path) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    for_data(path, |file, offset, len| {
        let mut buffer = vec![0; 1 << 16];
        let mut at = offset;
        while at < offset + len {
            let piece = buffer.len().min(usize::try_from(offset + len - at).unwrap_or(usize::MAX));
            file.read_exact_at(&mut buffer[..piece], at)?;
            // Zeros count as a hole, wherever a file system puts its borders.
            for (number, block) in buffer[..piece].chunks(512).enumerate() {
                if block.iter().any(|byte| *byte != 0) {
                    hasher.update(&(at + number as u64 * 512).to_le_bytes());
                    hasher.update(block);
                }
            }
            at += piece as u64;
        }
        Ok(())
    })?;
    Ok(hasher.finalize())
}

fn data_bytes(path: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for_data(path, |_, _, len| {
        sum += len;
        Ok(())
    })?;
    Ok(sum)
}

fn for_data(
    path: &Path,
    mut each: impl FnMut(&File, u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let file = File::open(path)?;
    let end = file.metadata()?.len();
    let mut at = 0;
    while at < end {
        let start = match seek(&file, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => return Ok(()),
            other => other?,
        };
        // From a whole block on, so that the pieces of two file systems are comparable.
        at = seek(&file, SeekFrom::Hole(start))?;
        each(&file, start / 512 * 512, at - start / 512 * 512)?;
    }
    Ok(())
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0; 64 << 10];
    let len = llistxattr(path, &mut names[..])?;
    let mut found = BTreeMap::new();
    for name in names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 64 << 10];
        let len = lgetxattr(path, name, &mut value[..])?;
        value.truncate(len);
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Change = (&'static str, fn(&Path));

    fn small_tree(root: &Path) {
        fs::create_dir(root.join("dir")).unwrap();
        fs::write(root.join("dir/file"), "text").unwrap();
        fs::write(root.join("twin"), "twin").unwrap();
        fs::hard_link(root.join("twin"), root.join("dir/twin")).unwrap();
        std::os::unix::fs::symlink("target", root.join("link")).unwrap();
        File::create(root.join("sparse")).unwrap().set_len(1 << 20).unwrap();
        lsetxattr(root.join("dir/file"), "user.a", b"1", XattrFlags::empty()).unwrap();
        lsetxattr(root.join("twin"), "system.posix_acl_access", &acl(5), XattrFlags::empty())
            .unwrap();
        for name in ["dir/file", "dir", "twin", "link", "sparse", ""] {
            set_times(&root.join(name), 1_000_000_000, 5).unwrap();
        }
    }

    /// Each changes one thing; those that change a time on the way set it back.
    const CHANGES: [Change; 13] = [
        ("mode", |root| {
            fs::set_permissions(root.join("dir/file"), fs::Permissions::from_mode(0o4644)).unwrap();
        }),
        ("owner", |root| std::os::unix::fs::lchown(root.join("link"), Some(1), None).unwrap()),
        ("owner", |root| std::os::unix::fs::lchown(root.join("dir"), None, Some(1)).unwrap()),
        ("time", |root| set_times(&root.join("dir/file"), 1_000_000_000, 6).unwrap()),
        ("time", |root| set_times(&root.join("dir"), 1_000_000_001, 5).unwrap()),
        ("content", |root| {
            fs::write(root.join("dir/file"), "tex_").unwrap();
            set_times(&root.join("dir/file"), 1_000_000_000, 5).unwrap();
        }),
        ("size", |root| {
            File::options()
                .write(true)
                .open(root.join("sparse"))
                .unwrap()
                .set_len(1 << 19)
                .unwrap();
            set_times(&root.join("sparse"), 1_000_000_000, 5).unwrap();
        }),
        ("data", |root| {
            fs::write(root.join("sparse"), vec![0; 1 << 20]).unwrap();
            set_times(&root.join("sparse"), 1_000_000_000, 5).unwrap();
        }),
        ("target", |root| {
            fs::remove_file(root.join("link")).unwrap();
            std::os::unix::fs::symlink("tarGet", root.join("link")).unwrap();
            set_times(&root.join("link"), 1_000_000_000, 5).unwrap();
            set_times(root, 1_000_000_000, 5).unwrap();
        }),
        ("links", |root| {
            fs::copy(root.join("twin"), root.join("copy")).unwrap();
            lsetxattr(root.join("copy"), "system.posix_acl_access", &acl(5), XattrFlags::empty())
                .unwrap();
            set_times(&root.join("copy"), 1_000_000_000, 5).unwrap();
            fs::rename(root.join("copy"), root.join("twin")).unwrap();
            set_times(root, 1_000_000_000, 5).unwrap();
        }),
        ("attributes", |root| {
            lsetxattr(root.join("dir/file"), "user.a", b"2", XattrFlags::empty()).unwrap();
        }),
        ("attributes", |root| {
            lsetxattr(root.join("twin"), "system.posix_acl_access", &acl(6), XattrFlags::empty())
                .unwrap();
        }),
        ("missing", |root| {
            fs::remove_file(root.join("link")).unwrap();
            set_times(root, 1_000_000_000, 5).unwrap();
        }),
    ];

    #[test]
    fn every_change_is_found_and_named() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        for (what, change) in CHANGES {
            // Not in /tmp, which may have no extended attributes.
            let dirs = [(); 2].map(|()| tempfile::tempdir_in("/var/tmp").unwrap());
            dirs.iter().for_each(|dir| small_tree(dir.path()));
            let [first, second] = &dirs;
            let same = compare_all(first.path(), second.path(), 0).unwrap();
            assert_eq!(same.differences, [""; 0]);
            for (kind, count) in [("file", 4), ("directory", 2), ("link", 1), ("with holes", 1)] {
                assert_eq!(same.kinds[kind], count, "{kind}: {same:?}");
            }
            change(second.path());
            let found = compare(first.path(), second.path(), 0).unwrap();
            assert!(!found.is_empty(), "{what} was not found");
            assert!(found.iter().all(|line| line.contains(what)), "{what}: {found:?}");
            assert!(!compare(second.path(), first.path(), 0).unwrap().is_empty() || what == "data");
        }
    }
}
