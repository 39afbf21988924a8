// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask qemu --export DIR`: what a distribution adds to its QEMU package so that it builds the
//! extension without a network; how to use it is in docs/patched-qemu.md.

mod manifest;
mod vendor;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::paths::Paths;
use crate::run::{Show, Step, output};

/// The folder in QEMU's source, as the patch to its `meson.build` names it.
const COMPONENT: &str = "backup-ext";
const PATCH: &str = "backup-access.patch";
/// The crates that are built inside QEMU, dependencies first.
const MEMBERS: &[&str] = &["qemu-ext/fleece", "qemu-ext/sys", "qemu-ext"];
/// What of each is built; tests and benchmarks stay here.
const PARTS: &[&str] = &["src", "csrc", "build.rs"];
/// Says in the patch's header what it is, as Debian's DEP-3 wants it.
const PATCH_HEADER: &str = "\
Description: Backup access: fleecing filter and QMP commands, written in Rust
 Builds the static library in backup-ext with cargo, links it wherever block
 devices are managed, and adds the QAPI module backup-access. Of C files it
 changes nbd/server.c only: a client that connects while everything is drained
 waits, as others do.
Forwarded: not-needed
";

/// Writes everything into the new folder `out`.
pub(super) fn run(paths: &Paths, out: &Path) -> Result<()> {
    if out.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("{}: is not empty; name a new folder", out.display());
    }
    let ext = paths.root.join("qemu-ext");
    let component = out.join(COMPONENT);
    fs::create_dir_all(&component)
        .with_context(|| format!("{}: cannot create", component.display()))?;
    let component = component
        .canonicalize()
        .with_context(|| format!("{}: cannot resolve", component.display()))?;
    write(&out.join(PATCH), &patch(&ext)?)?;
    sources(paths, &component)?;
    vendor::run(paths, &component)?;
    pack(paths, &component)?;
    println!(
        "{}:\n  {PATCH}  the patch, for debian/patches/series, git apply or patch -p1\n  {COMPONENT}/  \
         goes into QEMU's source beside meson.build\n  {COMPONENT}.tar.xz  the same, as a component \
         tarball of a Debian source package\nHow to use them: docs/patched-qemu.md",
        out.display()
    );
    Ok(())
}

/// The patch to QEMU's own files, with the QAPI file as a new one.
fn patch(ext: &Path) -> Result<String> {
    let changes = read(&ext.join("meson/qemu.patch"))?;
    let (_, changes) = changes.split_at(changes.find("--- a/").context("qemu.patch: no change")?);
    let schema = read(&ext.join("qapi/backup-access.json"))?;
    let mut text = format!("{PATCH_HEADER}\n{changes}");
    let lines: Vec<&str> = schema.lines().collect();
    let _ = write!(
        text,
        "--- /dev/null\n+++ b/qapi/backup-access.json\n@@ -0,0 +1,{} @@\n",
        lines.len()
    );
    for line in lines {
        let _ = writeln!(text, "+{line}");
    }
    Ok(text)
}

/// The crates that are built inside QEMU, as a workspace of their own.
fn sources(paths: &Paths, component: &Path) -> Result<()> {
    let mut used = BTreeSet::new();
    for member in MEMBERS {
        let (from, to) = (paths.root.join(member), component.join(member));
        let text = read(&from.join("Cargo.toml"))?;
        let text = manifest::member(&text);
        used.extend(manifest::from_workspace(&text));
        fs::create_dir_all(&to).with_context(|| format!("{}: cannot create", to.display()))?;
        write(&to.join("Cargo.toml"), &text)?;
        for part in PARTS.iter().filter(|part| from.join(part).exists()) {
            copy(&from.join(part), &to)?;
        }
    }
    let workspace = manifest::workspace(&read(&paths.root.join("Cargo.toml"))?, MEMBERS, &used);
    write(&component.join("Cargo.toml"), &workspace)?;
    for name in ["Cargo.lock", "LICENSES", "qemu-ext/README.md"] {
        copy(&paths.root.join(name), component)?;
    }
    let script = component.join("build.sh");
    write(&script, &read(&paths.root.join("qemu-ext/meson/build.sh"))?)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("{}: cannot make executable", script.display()))
}

/// One archive with sorted names, no owners and one time: the same content gives the same archive.
fn pack(paths: &Paths, component: &Path) -> Result<()> {
    let folder = component.parent().context("the export has no folder")?;
    let mut command = Command::new("tar");
    command.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"]);
    command.args(["--mode=u+rw,go+r-w,a+X", "--mtime=@0", "--format=gnu", "-cJf"]);
    command.arg(folder.join(format!("{COMPONENT}.tar.xz"))).arg("-C").arg(folder).arg(COMPONENT);
    Step {
        name: "pack them",
        log: paths.logs().join("qemu-export-pack.log"),
        show: Show::Progress,
        limit: Duration::from_secs(1200),
    }
    .run(command)
}

/// Copies a file or folder into a folder.
fn copy(from: &Path, into: &Path) -> Result<()> {
    output(Command::new("cp").arg("-R").arg(from).arg(into))
        .with_context(|| format!("{}: cannot copy", from.display()))?;
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("{}: cannot read", path.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("{}: cannot write", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything but the crates of others, which cargo would have to fetch.
    #[test]
    fn the_patch_and_the_sources_fit_together() {
        let paths = Paths::find().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let text = patch(&paths.root.join("qemu-ext")).unwrap();
        write(&dir.path().join("p"), &text).unwrap();
        // `patch` makes the new file from it, byte for byte; the changed files are missing here.
        let _ = Command::new("patch")
            .args(["-p1", "--force", "--silent", "-i", "p"])
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert_eq!(
            read(&dir.path().join("qapi/backup-access.json")).unwrap(),
            read(&paths.root.join("qemu-ext/qapi/backup-access.json")).unwrap()
        );
        assert!(text.contains(&format!("{COMPONENT}/build.sh")));
        for file in text.lines().filter_map(|line| line.strip_prefix("+++ b/")) {
            let is_told_of = !file.ends_with(".c") || PATCH_HEADER.contains(file);
            assert!(is_told_of, "the header does not tell of {file}");
        }

        sources(&paths, dir.path()).unwrap();
        for member in MEMBERS {
            assert!(dir.path().join(member).join("src/lib.rs").is_file(), "{member}");
        }
        assert!(!dir.path().join("qemu-ext/fleece/tests").exists());
        let text = read(&dir.path().join("Cargo.toml")).unwrap();
        assert!(text.contains("panic = \"unwind\""), "{text}");
        assert!(!text.contains("tokio"), "{text}");
    }

    #[test]
    fn nothing_is_written_into_a_folder_with_files() {
        let paths = Paths::find().unwrap();
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("mine"), "x").unwrap();
        assert!(run(&paths, dir.path()).is_err());
        assert_eq!(dir.path().read_dir().unwrap().count(), 1);
    }
}
