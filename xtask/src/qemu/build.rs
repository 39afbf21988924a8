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
/// Written when configure has succeeded.
const CONFIGURED: &str = "configured";

/// Runs QEMU's configure, once per tree.
pub(crate) fn configure(paths: &Paths, tree: &Tree, recipe: &Recipe) -> Result<()> {
    let build = tree.build();
    if build.join(CONFIGURED).is_file() {
        return Ok(());
    }
    let python = python_with_meson(paths)?;
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

/// A Python whose meson is new enough: the system's, else one in a virtual environment in the cache.
fn python_with_meson(paths: &Paths) -> Result<PathBuf> {
    // Debian's own: another one first in PATH may lack what Debian's packages add.
    let debian = PathBuf::from("/usr/bin/python3");
    let system = if debian.is_file() { debian } else { PathBuf::from("python3") };
    let venv = paths.cache.join("meson-venv");
    let in_venv = venv.join("bin/python3");
    for python in [&system, &in_venv] {
        if has_meson(python) {
            return Ok(python.clone());
        }
    }
    let log = paths.logs().join("meson.log");
    let step = |name: &str, command: Command| {
        let limit = Duration::from_secs(600);
        Step { name, log: log.clone(), show: Show::Progress, limit }.run(command)
    };
    let mut make = Command::new(&system);
    make.args(["-m", "venv", "--clear"]).arg(&venv);
    step("make a virtual environment for meson", make)?;
    let mut pip = Command::new(&in_venv);
    let (major, minor) = MESON_MIN;
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    // pycotap: only trees without Debian's patches ask for it.
    pip.args([&format!("meson>={major}.{minor},<2"), "pycotap"]);
    step("install meson into it", pip)?;
    Ok(in_venv)
}

fn has_meson(python: &Path) -> bool {
    let script = "import importlib.metadata as m; print(m.version('meson'))";
    output(Command::new(python).args(["-c", script]))
        .ok()
        .and_then(|version| parse_version(&version))
        .is_some_and(|version| version >= MESON_MIN)
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim().split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert!(parse_version("1.10.0\n").unwrap() > MESON_MIN);
        assert!(parse_version("1.0.1").unwrap() < MESON_MIN);
        assert_eq!(parse_version("unknown"), None);
    }
}
