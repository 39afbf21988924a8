// SPDX-License-Identifier: MIT OR Apache-2.0
//! Configures a tree and lets ninja build the programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::PROGRAMS;
use super::tree::{Recipe, Tree};
use crate::paths::Paths;
use crate::run::{Show, Step, output};

/// QEMU's own lower bound.
const MESON_MIN: (u32, u32) = (1, 5);
const MESON: &str = "meson";
/// Groups of Python packages that configure always wants.
const PYTHON_GROUPS: &[&str] = &["meson", "tooling"];
/// Written when configure has succeeded.
const CONFIGURED: &str = "configured";

/// Runs QEMU's configure, once per tree.
pub(crate) fn configure(paths: &Paths, tree: &Tree, recipe: &Recipe) -> Result<()> {
    let build = tree.build();
    if build.join(CONFIGURED).is_file() {
        return Ok(());
    }
    let python = python_for(paths, tree)?;
    // A half-made one confuses meson.
    if build.exists() {
        fs::remove_dir_all(&build)
            .with_context(|| format!("{}: cannot remove", build.display()))?;
    }
    fs::create_dir_all(&build).with_context(|| format!("{}: cannot create", build.display()))?;
    let mut command = Command::new(tree.src().join("configure"));
    command.arg(format!("--python={}", python.display())).args(&recipe.options).current_dir(&build);
    Step {
        name: "configure QEMU",
        log: paths.logs().join("qemu-configure.log"),
        show: Show::Progress,
        limit: Duration::from_secs(1800),
    }
    .run(command)?;
    fs::write(build.join(CONFIGURED), "").context("cannot mark the build as configured")
}

/// Builds all programs; when nothing changed this is ninja and cargo finding that out.
pub(crate) fn compile(paths: &Paths, tree: &Tree) -> Result<()> {
    let mut command = Command::new("ninja");
    command.arg("-C").arg(tree.build()).args(PROGRAMS).env_remove("NINJA_STATUS");
    for_build_sh(&mut command, paths, tree);
    Step {
        name: "build QEMU",
        log: paths.logs().join("qemu-build.log"),
        show: Show::Progress,
        limit: Duration::from_secs(2 * 3600),
    }
    .run(command)
}

/// The environment that qemu-ext/meson/build.sh expects.
pub(crate) fn for_build_sh(command: &mut Command, paths: &Paths, tree: &Tree) {
    command
        .env("QEMU_EXT_DIR", paths.root.join("qemu-ext"))
        // In the checkout: cargo tells changed sources by their time stamps, and would take another
        // checkout's library for ours.
        .env("QEMU_EXT_TARGET_DIR", paths.root.join("target/qemu-ext").join(tree.name()))
        // Would move or change what it looks for.
        .env_remove("QEMU_EXT_FEATURES")
        .env_remove("CARGO_BUILD_TARGET")
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("MAKEFLAGS");
}

/// A Python with a new enough meson and what else the tree's configure asks for: the system's, else
/// one in a virtual environment in the cache.
fn python_for(paths: &Paths, tree: &Tree) -> Result<PathBuf> {
    let file = tree.src().join("pythondeps.toml");
    let text =
        fs::read_to_string(&file).with_context(|| format!("{}: cannot read", file.display()))?;
    let wanted = python_packages(&text);
    // Debian's own: another one first in PATH may lack what Debian's packages add.
    let debian = PathBuf::from("/usr/bin/python3");
    let system = if debian.is_file() { debian } else { PathBuf::from("python3") };
    let venv = paths.cache.join("meson-venv");
    let in_venv = venv.join("bin/python3");
    for python in [&system, &in_venv] {
        if has_packages(python, &wanted) {
            return Ok(python.clone());
        }
    }
    let log = paths.logs().join("meson.log");
    let step = |name: &str, command: Command| {
        let limit = Duration::from_secs(600);
        Step { name, log: log.clone(), show: Show::Progress, limit }.run(command)
    };
    if !has_packages(&in_venv, &[]) {
        let mut make = Command::new(&system);
        make.args(["-m", "venv", "--clear"]).arg(&venv);
        step("make a virtual environment for meson", make)?;
    }
    let mut pip = Command::new(&in_venv);
    let (major, minor) = MESON_MIN;
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    pip.arg(format!("meson>={major}.{minor},<2")).args(wanted.iter().filter(|name| *name != MESON));
    step(&format!("install {} into it", wanted.join(", ")), pip)?;
    Ok(in_venv)
}

/// What configure asks for in any case, from its list `pythondeps.toml`: `name = { … }` under
/// `[group]`. What comes with the tree (`path = …`) and pip itself need not be there.
fn python_packages(list: &str) -> Vec<String> {
    let mut group = "";
    let mut names = vec![MESON.to_string()];
    for line in list.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            group = name;
        } else if PYTHON_GROUPS.contains(&group)
            && let Some((name, value)) = line.split_once('=')
        {
            let name = name.trim().trim_matches('"');
            if !value.contains("path =") && name != "pip" && name != MESON {
                names.push(name.to_string());
            }
        }
    }
    names
}

/// Whether a Python has packages of these names, meson not too old.
fn has_packages(python: &Path, names: &[String]) -> bool {
    let script =
        "import importlib.metadata as m, sys; [print(n, m.version(n)) for n in sys.argv[1:]]";
    let Ok(versions) = output(Command::new(python).args(["-c", script]).args(names)) else {
        return false;
    };
    let meson = versions.lines().find_map(|line| line.strip_prefix("meson "));
    meson.is_none_or(|version| parse_version(version).is_some_and(|version| version >= MESON_MIN))
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim().split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_says_which_python_packages_it_wants() {
        let list = "[meson]\nmeson = { accepted = \">=1.5.0\" }\n#pycotap = { accepted = \"1\" }\n\
            [docs]\nsphinx = { accepted = \"3\" }\n[tooling]\n\"qemu.qmp\" = { accepted = \"1\" }\n\
            \"qemu\" = { path = \"python/\" }\n\"pip\" = { accepted = \"1\" }\n";
        assert_eq!(python_packages(list), ["meson", "qemu.qmp"]);
        assert_eq!(python_packages("[meson]\npycotap = { }\n"), ["meson", "pycotap"]);
        assert_eq!(python_packages(""), ["meson"]);
    }

    #[test]
    fn versions_compare_as_numbers() {
        assert!(parse_version("1.10.0\n").unwrap() > MESON_MIN);
        assert!(parse_version("1.0.1").unwrap() < MESON_MIN);
        assert_eq!(parse_version("unknown"), None);
    }
}
