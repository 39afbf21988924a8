// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's source in the cache: fetched or copied, patched, and kept in step with this checkout.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

use super::{Options, probe};
use crate::apt;
use crate::paths::Paths;
use crate::run::{Show, Step};

/// Raised when this program changes what it makes of the same input.
const GENERATION: &str = "1";
/// Trees kept in the cache besides those used lately.
const KEEP_TREES: usize = 3;
const KEEP_FOR: Duration = Duration::from_secs(14 * 24 * 3600);
/// Written last into a tree: without it the tree is a left-over.
const READY: &str = "ready";
const USED: &str = "used";

/// What this checkout adds to QEMU.
pub(crate) struct Recipe {
    /// qemu-ext of this checkout.
    pub(crate) ext: PathBuf,
    /// Options of QEMU's configure.
    pub(crate) options: Vec<String>,
    patch: String,
    devices: String,
    schema: String,
    script: String,
}

impl Recipe {
    pub(crate) fn read(root: &Path) -> Result<Self> {
        let ext = root.join("qemu-ext");
        let read = |name: &str| {
            let path = ext.join(name);
            fs::read_to_string(&path).with_context(|| format!("{}: cannot read", path.display()))
        };
        let options = read("meson/configure.options")?
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(str::to_string)
            .collect();
        Ok(Self {
            options,
            patch: read("meson/qemu.patch")?,
            devices: read("meson/devices.mak")?,
            schema: read("qapi/backup-access.json")?,
            script: read("meson/build.sh")?,
            ext,
        })
    }

    /// Key of everything that a tree and its configuration are made from. The QAPI file and the
    /// Rust code are not in it: ninja rebuilds what depends on them.
    fn key(&self, source: &str, machine: &str) -> String {
        let mut hasher = blake3::Hasher::new();
        for part in
            [GENERATION, source, machine, &self.patch, &self.devices, &self.options.join("\n")]
        {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        hasher.finalize().to_hex()[..12].to_string()
    }
}

/// One patched tree in the cache, with the build made in it.
pub(crate) struct Tree {
    pub(crate) version: String,
    dir: PathBuf,
}

impl Tree {
    pub(crate) fn src(&self) -> PathBuf {
        self.dir.join("src")
    }

    pub(crate) fn build(&self) -> PathBuf {
        self.dir.join("build")
    }

    /// Identifies the tree, for what is made from it.
    pub(crate) fn name(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Copies what may change without a new tree; unchanged files keep their time stamps.
    pub(crate) fn sync(&self, recipe: &Recipe) -> Result<()> {
        write_if_changed(&self.src().join("qapi/backup-access.json"), &recipe.schema)?;
        let script = self.src().join("backup-ext/build.sh");
        write_if_changed(&script, &recipe.script)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("{}: cannot make executable", script.display()))
    }

    pub(crate) fn mark_used(&self) -> Result<()> {
        fs::write(self.dir.join(USED), "").with_context(|| format!("{}: cannot write", self.name()))
    }
}

fn write_if_changed(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("{}: cannot create", dir.display()))?;
    }
    fs::write(path, text).with_context(|| format!("{}: cannot write", path.display()))
}

/// Where a tree comes from.
enum Origin {
    Debian(apt::Source),
    Folder(PathBuf),
}

/// Finds or makes the tree for `options`.
pub(crate) fn prepare(paths: &Paths, recipe: &Recipe, options: &Options) -> Result<Tree> {
    let (origin, version, id) = match &options.source {
        Some(dir) => {
            let dir =
                dir.canonicalize().with_context(|| format!("{}: no such folder", dir.display()))?;
            let version = fs::read_to_string(dir.join("VERSION")).with_context(|| {
                format!("{}: not a QEMU source tree (no file VERSION)", dir.display())
            })?;
            let id = fingerprint(&dir)?;
            (Origin::Folder(dir), version.trim().to_string(), id)
        }
        None => {
            let source = options.suite().source(paths, options.refresh)?;
            let version = source.version.clone();
            (Origin::Debian(source), version.clone(), version)
        }
    };
    let machine = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = format!("{version}-{}", recipe.key(&id, &machine));
    let tree = Tree { version, dir: paths.cache.join("qemu").join(name) };
    if !tree.dir.join(READY).is_file() {
        make(paths, &tree, recipe, &origin, options)?;
    }
    Ok(tree)
}

/// Unpacks or copies, judges, then patches.
fn make(
    paths: &Paths,
    tree: &Tree,
    recipe: &Recipe,
    origin: &Origin,
    options: &Options,
) -> Result<()> {
    let log = paths.logs().join("qemu-source.log");
    if tree.dir.exists() {
        fs::remove_dir_all(&tree.dir)
            .with_context(|| format!("{}: cannot remove a left-over", tree.dir.display()))?;
    }
    fs::create_dir_all(&tree.dir)
        .with_context(|| format!("{}: cannot create", tree.dir.display()))?;
    match origin {
        Origin::Debian(source) => {
            apt::unpack(source, &tree.src(), &log)?;
            probe::judge(&recipe.ext, &tree.src(), probe::Show::Failed, options.force)?;
        }
        // Judged already, where it is.
        Origin::Folder(dir) => copy_folder(dir, &tree.src(), &log)?,
    }
    patch(paths, tree, recipe)?;
    let devices = tree.src().join("configs/devices/x86_64-softmmu/backup.mak");
    write_if_changed(&devices, &recipe.devices)?;
    fs::write(tree.dir.join(READY), "").context("cannot mark the tree as ready")
}

/// Applies our patch, except to a tree that has all of it.
fn patch(paths: &Paths, tree: &Tree, recipe: &Recipe) -> Result<()> {
    if probe::is_patched(&recipe.ext, &tree.src())? {
        return Ok(());
    }
    let mut command = Command::new("patch");
    command
        .args(["-p1", "--forward", "--batch", "-i"])
        .arg(recipe.ext.join("meson/qemu.patch"))
        .current_dir(tree.src());
    Step {
        name: "apply the patch",
        log: paths.logs().join("qemu-patch.log"),
        show: Show::Progress,
        limit: Duration::from_secs(60),
    }
    .run(command)
}

/// Copies a source tree without its history and without a build made in it.
fn copy_folder(from: &Path, to: &Path, log: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("{}: cannot create", to.display()))?;
    let mut command = Command::new("sh");
    command.args([
        "-c",
        r#"tar -C "$1" --anchored --exclude=./.git --exclude=./build -cf - . | tar -C "$2" -xf -"#,
        "copy",
    ]);
    command.arg(from).arg(to);
    let name = format!("copy {}", from.display());
    Step {
        name: &name,
        log: log.to_path_buf(),
        show: Show::Progress,
        limit: Duration::from_secs(1200),
    }
    .run(command)
}

/// Changes when a file of the tree is added, removed or written.
fn fingerprint(root: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let mut entries = fs::read_dir(&folder)
            .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
            .with_context(|| format!("{}: cannot read", folder.display()))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            let inside = path.strip_prefix(root).unwrap_or(&path);
            if inside == Path::new(".git") || inside == Path::new("build") {
                continue;
            }
            let meta =
                entry.metadata().with_context(|| format!("{}: cannot examine", path.display()))?;
            if meta.is_dir() {
                folders.push(path);
                continue;
            }
            hasher.update(inside.as_os_str().as_encoded_bytes());
            hasher.update(&[0]);
            for number in [meta.len().cast_signed(), meta.mtime(), meta.mtime_nsec()] {
                hasher.update(&number.to_le_bytes());
            }
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Removes trees that nobody used lately.
pub(crate) fn prune(paths: &Paths) -> Result<()> {
    let dir = paths.cache.join("qemu");
    let mut trees: Vec<(SystemTime, PathBuf)> = fs::read_dir(&dir)
        .with_context(|| format!("{}: cannot read", dir.display()))?
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .map(|entry| {
            let used = fs::metadata(entry.path().join(USED)).or_else(|_| entry.metadata());
            let time = used.and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            (time, entry.path())
        })
        .collect();
    trees.sort();
    let now = SystemTime::now();
    let spare = trees.len().saturating_sub(KEEP_TREES);
    for (used, tree) in &trees[..spare] {
        if now.duration_since(*used).is_ok_and(|age| age > KEEP_FOR) {
            eprintln!("    removing {} (not used for a while)", tree.display());
            if let Err(error) = fs::remove_dir_all(tree) {
                bail!("{}: cannot remove: {error}", tree.display());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe() -> Recipe {
        Recipe::read(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()).unwrap()
    }

    #[test]
    fn the_key_follows_source_machine_patch_and_options_only() {
        let mut recipe = recipe();
        let key = recipe.key("1.0", "m");
        assert_eq!(key, recipe.key("1.0", "m"));
        assert_ne!(key, recipe.key("1.1", "m"));
        assert_ne!(key, recipe.key("1.0", "n"));
        recipe.schema.push('\n');
        recipe.script.push('\n');
        assert_eq!(key, recipe.key("1.0", "m"));
        recipe.options.push("--enable-x".into());
        assert_ne!(key, recipe.key("1.0", "m"));
    }

    #[test]
    fn unchanged_files_keep_their_time_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree { version: "1".into(), dir: dir.path().to_path_buf() };
        let recipe = recipe();
        tree.sync(&recipe).unwrap();
        let schema = tree.src().join("qapi/backup-access.json");
        let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
        fs::File::options().write(true).open(&schema).unwrap().set_modified(old).unwrap();
        tree.sync(&recipe).unwrap();
        assert_eq!(fs::metadata(&schema).unwrap().modified().unwrap(), old);
    }

    #[test]
    fn a_fingerprint_sees_changes_but_not_builds() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("sub/file"), "a").unwrap();
        let before = fingerprint(dir.path()).unwrap();
        fs::create_dir(dir.path().join("build")).unwrap();
        fs::write(dir.path().join("build/object"), "a").unwrap();
        assert_eq!(before, fingerprint(dir.path()).unwrap());
        fs::write(dir.path().join("sub/file"), "ab").unwrap();
        assert_ne!(before, fingerprint(dir.path()).unwrap());
    }
}
