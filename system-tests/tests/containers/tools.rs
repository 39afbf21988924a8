// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tools that people back up with, run beside a real container's tree by both kinds of commands: what they saved
//! is the tree, entry by entry. A tool that cannot look at its tree may well succeed with nothing.

use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use ct_archive::{Kind, Limits, Reader};
use provider_api::Identity;
use vzdump_core::guest::BackupMode;
use vzdump_core::job::report::GuestResult;

use crate::backup::{back_up, provider};
use crate::scene::{Scene, wait_for};

/// Kind, permissions, owner and content of each file, by its path.
type Saved = BTreeMap<Vec<u8>, (String, u32, (u32, u32), blake3::Hash)>;

/// Reads what a tool has given back as a tar archive.
fn saved(tar: &Path) -> Saved {
    let mut reader = Reader::new(File::open(tar).unwrap(), Limits::default());
    let mut found = Saved::new();
    while let Some(entry) = reader.next_entry().unwrap() {
        let mut hasher = blake3::Hasher::new();
        let kind = match &entry.kind {
            Kind::File { size, regions } => {
                let copied = reader.copy_data(regions, |_, bytes| {
                    hasher.update(bytes);
                    Ok(())
                });
                copied.unwrap();
                format!("file of {size} bytes")
            }
            Kind::Symlink(target) => format!("link to {}", target.escape_ascii()),
            kind => format!("{kind:?}"),
        };
        let owner = (entry.uid, entry.gid);
        // Some programs do not say what permissions a link has.
        let mode = if kind.starts_with("link") { 0 } else { entry.mode };
        found.insert(entry.path, (kind, mode, owner, hasher.finalize()));
    }
    // The root itself, which not all of them keep.
    found.remove(&b""[..]);
    found
}

const TAR: &str = "tar --create --numeric-owner --format=posix --directory=/guest .";
const BORG: &str = "export BORG_BASE_DIR=/tmp/borg BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes\n\
     borg init --encryption none /tmp/repo >&2 && cd /guest && borg create --numeric-ids /tmp/repo::a . >&2 \
     && borg export-tar /tmp/repo::a -";
const RESTIC: &str = "export RESTIC_PASSWORD=x RESTIC_CACHE_DIR=/tmp/cache\n\
     restic init -q --repo /tmp/repo >&2 && cd /guest && restic backup -q --repo /tmp/repo . >&2 \
     && restic dump -q --repo /tmp/repo --archive tar latest /";

#[test]
fn tar_borg_and_restic_save_the_whole_tree_as_mapped_root_and_as_reader() {
    let scene = Scene::new();
    scene.create(200, &["--hostname", "web", "--mount", "/srv:32M"]);
    scene.run(&["ct", "start", "200"]);
    wait_for("both volumes are written", || scene.inside(200, "/srv/b").exists());
    let secret = scene.inside(200, "/root/secret");
    std::fs::write(&secret, "only for root").unwrap();
    std::os::unix::fs::chown(&secret, Some(101_000), Some(101_001)).unwrap();
    std::fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
    scene.run(&["ct", "stop", "200", "--now"]);
    wait_for("it is unmounted", || scene.leftovers().is_empty());
    let mut expected: Option<Saved> = None;
    for (tool, script) in [("tar", TAR), ("borg", BORG), ("restic", RESTIC)] {
        for identity in [Identity::MappedRoot, Identity::Reader] {
            let mut provider = provider(&scene, identity);
            provider.script = Some(format!("set -e; {script}"));
            let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
            assert_eq!(report.result, GuestResult::Committed, "{tool} as {identity:?}: {log}");
            let found = saved(&provider.tar(&report.archive.unwrap()));
            let (kind, mode, owner, _) = &found[&b"root/secret"[..]];
            assert_eq!(
                (kind.as_str(), *mode, *owner),
                ("file of 13 bytes", 0o600, (1000, 1001)),
                "{tool} as {identity:?}"
            );
            assert!(found.contains_key(&b"srv/b"[..]), "{tool} as {identity:?}: the volume");
            match &expected {
                None => expected = Some(found),
                Some(expected) => assert_eq!(found, *expected, "{tool} as {identity:?}"),
            }
        }
    }
    assert!(expected.is_some_and(|all| all.len() > 20), "there is something to save");
}
