// SPDX-License-Identifier: MIT OR Apache-2.0
//! The crates of others that the extension needs, as a folder that cargo builds from without a
//! network (`cargo vendor`), made fit for a distribution's source package.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::write;
use crate::cargo::cargo;
use crate::paths::Paths;
use crate::run::{Show, Step, output};

/// The machines that a crate may be needed for: those of Linux distributions. Crates for others
/// (Windows above all) stay as empty stubs, which cargo wants to see but never builds.
const PLATFORMS: &[&str] = &[
    "x86_64-unknown-linux-gnu",
    "aarch64-unknown-linux-gnu",
    "i686-unknown-linux-gnu",
    "armv7-unknown-linux-gnueabihf",
    "loongarch64-unknown-linux-gnu",
    "powerpc64le-unknown-linux-gnu",
    "riscv64gc-unknown-linux-gnu",
    "s390x-unknown-linux-gnu",
];
const FOLDER: &str = "vendor";
const CHECKSUMS: &str = ".cargo-checksum.json";
/// Tells cargo to take crates from the folder, and never to use the network.
const CONFIG: &str = "\
# Written by `cargo xtask qemu --export`: the crates are in this source package.
[source.crates-io]
replace-with = \"vendored\"

[source.vendored]
directory = \"vendor\"

[net]
offline = true
";

/// Puts the crates that the workspace in `dir` needs beside it, and a list of them.
pub(super) fn run(paths: &Paths, dir: &Path) -> Result<()> {
    // Without --locked: of this checkout's Cargo.lock only a part is needed.
    let mut command = cargo(paths, &["vendor", "--quiet"]);
    command.arg("--manifest-path").arg(dir.join("Cargo.toml")).arg(dir.join(FOLDER));
    command.current_dir(dir);
    Step {
        name: "collect the crates",
        log: paths.logs().join("qemu-export.log"),
        show: Show::Progress,
        limit: Duration::from_secs(1200),
    }
    .run(command)?;
    same_versions(paths, dir)?;
    fs::create_dir_all(dir.join(".cargo")).context("cannot create .cargo")?;
    write(&dir.join(".cargo/config.toml"), CONFIG)?;

    let needed = needed(paths, dir)?;
    let folder = dir.join(FOLDER);
    for entry in folders(&folder)? {
        let is_needed = needed.contains_key(&Package::of(&entry)?);
        clean(&entry)?;
        if !is_needed {
            stub(&entry)?;
        }
    }
    write(&dir.join("CRATES"), &list(&needed))?;
    // The same once more, now that stubs stand for some crates.
    self::needed(paths, dir)?;
    Ok(())
}

/// The exported crates are those that this checkout is tested with.
fn same_versions(paths: &Paths, dir: &Path) -> Result<()> {
    let read = |dir: &Path| {
        let path = dir.join("Cargo.lock");
        fs::read_to_string(&path).with_context(|| format!("{}: cannot read", path.display()))
    };
    let ours = locked(&read(&paths.root)?);
    let theirs = locked(&read(dir)?);
    match theirs.iter().find(|package| !ours.contains(package)) {
        None => Ok(()),
        Some(Package(name, version)) => {
            bail!("{name} {version} is not in Cargo.lock: run `cargo update --workspace` first")
        }
    }
}

/// The packages of a Cargo.lock.
fn locked(text: &str) -> Vec<Package> {
    let value = |stanza: &str, key: &str| {
        stanza.lines().find_map(|line| {
            line.strip_prefix(key)?.strip_prefix(" = ").map(|v| v.trim_matches('"').to_string())
        })
    };
    let stanzas = text.split("[[package]]").skip(1);
    stanzas.filter_map(|s| Some(Package(value(s, "name")?, value(s, "version")?))).collect()
}

/// What a crate is under, and whether it is in the programs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Needed {
    licence: String,
    linked: bool,
}

/// Name and version of a crate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Package(String, String);

impl Package {
    /// What a vendored folder holds, read from the manifest that cargo normalized.
    fn of(folder: &Path) -> Result<Self> {
        let path = folder.join("Cargo.toml");
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{}: cannot read", path.display()))?;
        let package = text.split("[package]").nth(1).unwrap_or_default();
        let value = |key: &str| {
            package.lines().find_map(|line| {
                let value = line.strip_prefix(key)?.trim_start().strip_prefix('=')?;
                Some(value.trim().trim_matches('"').to_string())
            })
        };
        match (value("name"), value("version")) {
            (Some(name), Some(version)) => Ok(Self(name, version)),
            _ => bail!("{}: no name and version in it", path.display()),
        }
    }
}

/// The crates of others that are built on any of the platforms, each with its licence; asked of
/// cargo with an empty home and no network, as a package's build would.
fn needed(paths: &Paths, dir: &Path) -> Result<BTreeMap<Package, Needed>> {
    let home = empty_home(dir)?;
    let mut command = cargo(paths, &["metadata", "--format-version", "1", "--locked", "--offline"]);
    for platform in PLATFORMS {
        command.args(["--filter-platform", platform]);
    }
    command.current_dir(dir).env("CARGO_HOME", &home);
    let text = output(&mut command).context("the exported crates are not complete");
    let _ = fs::remove_dir_all(&home);
    packages(&serde_json::from_str(&text?).context("cargo metadata printed something unexpected")?)
}

/// A home for cargo that is no part of the result.
fn empty_home(dir: &Path) -> Result<PathBuf> {
    let home = dir.with_extension("cargo-home");
    fs::create_dir_all(&home).with_context(|| format!("{}: cannot create", home.display()))?;
    Ok(home)
}

/// Those of the packages in cargo's metadata that are resolved for the platforms and not ours.
fn packages(metadata: &Value) -> Result<BTreeMap<Package, Needed>> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let nodes =
        metadata["resolve"]["nodes"].as_array().context("cargo metadata resolved nothing")?;
    let resolved: Vec<&str> = nodes.iter().filter_map(|node| node["id"].as_str()).collect();
    let all = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let ours = all.iter().filter(|package| package["source"].is_null());
    let linked = linked(nodes, ours.filter_map(|package| package["id"].as_str()).collect());
    Ok(all
        .iter()
        .filter(|package| !package["source"].is_null())
        .filter_map(|package| {
            let id = package["id"].as_str().filter(|id| resolved.contains(id))?;
            let needed = Needed { licence: text(&package["license"]), linked: linked.contains(id) };
            Some((Package(text(&package["name"]), text(&package["version"])), needed))
        })
        .collect())
}

/// The packages that are reached from `ours` without a step that is for build scripts only.
fn linked<'a>(nodes: &'a [Value], ours: Vec<&'a str>) -> BTreeSet<&'a str> {
    let mut found = BTreeSet::new();
    let mut queue = ours;
    while let Some(id) = queue.pop() {
        if !found.insert(id) {
            continue;
        }
        let node = nodes.iter().find(|node| node["id"] == id);
        let steps = node.and_then(|node| node["deps"].as_array()).into_iter().flatten();
        let normal = |step: &&Value| {
            step["dep_kinds"].as_array().into_iter().flatten().any(|kind| kind["kind"].is_null())
        };
        queue.extend(steps.filter(normal).filter_map(|step| step["pkg"].as_str()));
    }
    found
}

fn folders(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("{}: cannot read", dir.display()))?;
    let mut folders: Vec<PathBuf> =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    Ok(folders)
}

/// Leaves of a crate that is never built only what cargo reads of it.
fn stub(folder: &Path) -> Result<()> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("{}: cannot read", folder.display()))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let keep = path.file_name().is_some_and(|name| name == "Cargo.toml" || name == CHECKSUMS);
        if keep {
            continue;
        }
        let removed =
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.with_context(|| format!("{}: cannot remove", path.display()))?;
    }
    fs::create_dir_all(folder.join("src")).context("cannot create src of a stub")?;
    write(&folder.join("src/lib.rs"), "")?;
    change_checksums(folder, |_| false)
}

/// Removes what packaging tools would remove or change later (`dh_clean` deletes `*.orig` and `*~`,
/// files of git change a checkout), and compiled code, which no source package may have.
fn clean(folder: &Path) -> Result<()> {
    change_checksums(folder, |name| {
        let file = folder.join(name);
        belongs(name) || (file.is_file() && fs::remove_file(&file).is_err())
    })
}

/// Whether a file of a crate can stay in a source package.
fn belongs(name: &str) -> bool {
    let last = name.rsplit('/').next().unwrap_or_default();
    let endings = [".orig", ".rej", ".bak", "~", ".dll", ".exe", ".lib", ".a", ".so"];
    !(last.starts_with(".git") || endings.iter().any(|ending| last.ends_with(ending)))
}

/// Keeps only these files in the crate's list of checksums: cargo complains about a file that is
/// listed and not there, not about one that is not listed.
fn change_checksums(folder: &Path, keep: impl Fn(&str) -> bool) -> Result<()> {
    let path = folder.join(CHECKSUMS);
    let bad = || format!("{}: not a list of checksums", path.display());
    let text = fs::read_to_string(&path).with_context(bad)?;
    let mut checksums: Value = serde_json::from_str(&text).with_context(bad)?;
    let files = checksums["files"].as_object_mut().with_context(bad)?;
    files.retain(|name, _| keep(name));
    write(&path, &checksums.to_string())
}

/// For the distribution's copyright file.
fn list(packages: &BTreeMap<Package, Needed>) -> String {
    let mut text = String::from(
        "# The crates in vendor that are built: name, version, licence. Those marked \"linked\" become a\n\
         # part of QEMU's programs, the others run while it is built.\n",
    );
    for (Package(name, version), needed) in packages {
        let linked = if needed.linked { " (linked)" } else { "" };
        let _ = writeln!(text, "{name} {version}: {}{linked}", needed.licence);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stub_keeps_what_cargo_reads() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        fs::create_dir_all(file("src/deep")).unwrap();
        for (name, text) in [
            ("Cargo.toml", "[package]\nname = \"a\"\nversion = \"1.2.3\"\n"),
            (
                CHECKSUMS,
                r#"{"files":{"Cargo.toml":"1","Cargo.toml.orig":"2","src/lib.rs":"3",".gitignore":"4"},
                   "package":"5"}"#,
            ),
            ("Cargo.toml.orig", "old"),
            (".gitignore", "x"),
            ("src/lib.rs", "code"),
            ("src/deep/more.rs", "code"),
        ] {
            fs::write(file(name), text).unwrap();
        }
        assert_eq!(Package::of(dir.path()).unwrap(), Package("a".into(), "1.2.3".into()));
        clean(dir.path()).unwrap();
        let checksums = |key: &str| {
            let text = fs::read_to_string(file(CHECKSUMS)).unwrap();
            serde_json::from_str::<Value>(&text).unwrap()[key].clone()
        };
        assert_eq!(checksums("files"), serde_json::json!({ "Cargo.toml": "1", "src/lib.rs": "3" }));
        assert!(!file("Cargo.toml.orig").exists() && !file(".gitignore").exists());

        stub(dir.path()).unwrap();
        assert_eq!((checksums("files"), checksums("package")), (serde_json::json!({}), "5".into()));
        assert!(file("Cargo.toml").is_file() && !file("src/deep").exists());
        assert_eq!(fs::read_to_string(file("src/lib.rs")).unwrap(), "");
    }

    #[test]
    fn leftovers_and_compiled_code_do_not_belong() {
        for name in ["Cargo.toml.orig", ".gitignore", "a/.github", "tests/x.dll", "lib/x.a", "b~"] {
            assert!(!belongs(name), "{name}");
        }
        for name in ["src/lib.rs", "Cargo.toml", "README.md", "data.json", "src/a"] {
            assert!(belongs(name), "{name}");
        }
    }

    #[test]
    fn only_what_is_resolved_and_not_ours_is_needed() {
        let metadata = serde_json::json!({
            "packages": [
                { "id": "a", "name": "a", "version": "1", "source": "registry", "license": "MIT" },
                { "id": "w", "name": "w", "version": "1", "source": "registry", "license": "MIT" },
                { "id": "b", "name": "b", "version": "1", "source": "registry", "license": "MIT" },
                { "id": "c", "name": "c", "version": "1", "source": "registry", "license": "MIT" },
                { "id": "o", "name": "ours", "version": "1", "source": null, "license": "MIT" },
            ],
            "resolve": { "nodes": [
                { "id": "o", "deps": [{ "pkg": "a", "dep_kinds": [{ "kind": null }] },
                                      { "pkg": "b", "dep_kinds": [{ "kind": "build" }] }] },
                { "id": "b", "deps": [{ "pkg": "c", "dep_kinds": [{ "kind": null }] }] },
                { "id": "a" }, { "id": "c" },
            ] },
        });
        let needed = packages(&metadata).unwrap();
        let list = list(&needed);
        let lines: Vec<&str> = list.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(lines, ["a 1: MIT (linked)", "b 1: MIT", "c 1: MIT"]);
    }
}
