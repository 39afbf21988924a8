// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask qemu`: fetch, patch, configure, build and install the QEMU with the extension.
//!
//! Everything slow is kept in the cache, keyed by what it was made from, so that other checkouts
//! and later runs only do what changed.

mod build;
mod export;
mod faults;
mod install;
mod lock;
mod probe;
mod reference;
mod suite;
mod tree;

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::paths::Paths;

pub(crate) use reference::{Scope, check as check_reference};
pub(crate) use suite::Suite;

/// Which QEMU to build.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Options {
    /// Take this unpacked QEMU source tree (it stays as it is) instead of Debian's source package
    #[arg(long, value_name = "DIR")]
    pub(crate) source: Option<PathBuf>,
    /// Put what is built into target/qemu-NAME, beside the default one
    #[arg(long, value_name = "NAME", requires = "source", value_parser = suite::folder_name)]
    pub(crate) name: Option<String>,
    /// Take the source package of this suite of Debian (default: trixie), or of a series in it, as in
    /// sid:10.2; what is built goes into target/qemu-SUITE[-SERIES], beside the default one
    #[arg(long, value_name = "SUITE[:SERIES]", conflicts_with = "source")]
    pub(crate) suite: Option<Suite>,
    /// Ask Debian for a newer source package even if one is in the cache
    #[arg(long, conflicts_with = "source")]
    pub(crate) refresh: bool,
    /// Also the storage daemon with injected faults, target/qemu/faults, which only tests use
    #[arg(long)]
    pub(crate) faults: bool,
    /// Also QEMU's generated QMP references, as text in target/qemu/reference, checked for warnings
    #[arg(long)]
    pub(crate) reference: bool,
    /// Only say whether the tree given with --source has what the extension needs
    #[arg(long, requires = "source")]
    pub(crate) probe: bool,
    /// Build although the tree lacks something that the extension needs
    #[arg(long, conflicts_with = "probe")]
    pub(crate) force: bool,
    /// Build nothing; write into this new folder what a distribution adds to its package: the
    /// patch, the extension's sources and the crates it needs, see docs/patched-qemu.md
    #[arg(long, value_name = "DIR", conflicts_with_all = ["source", "suite", "refresh", "faults", "reference", "force"])]
    pub(crate) export: Option<PathBuf>,
}

impl Options {
    /// Whether this builds QEMU, for which packages must be installed.
    pub(crate) fn builds(&self) -> bool {
        !self.probe && self.export.is_none()
    }

    fn suite(&self) -> Suite {
        self.suite.clone().unwrap_or_default()
    }

    /// Where the result goes.
    fn paths(&self, paths: &Paths) -> Paths {
        match &self.name {
            Some(name) => paths.with_second_qemu(name),
            None => self.suite().paths(paths),
        }
    }
}

/// The programs that end up in target/qemu/bin, as ninja names them.
const PROGRAMS: &[&str] = &[
    "qemu-system-x86_64",
    "storage-daemon/qemu-storage-daemon",
    "qemu-img",
    "qemu-nbd",
    "qemu-io",
];

/// Does what the options ask for; without any it makes target/qemu/bin current.
pub(crate) fn run(paths: &Paths, options: &Options) -> Result<()> {
    if let Some(dir) = &options.export {
        return export::run(paths, dir);
    }
    if let Some(tree) = &options.source {
        probe::judge(&paths.root.join("qemu-ext"), tree, probe::Show::All, options.force)?;
    }
    if options.probe {
        return Ok(());
    }
    build_and_install(&options.paths(paths), options)
}

/// Puts the source package of a suite into the cache, if it is not there; an error says that this
/// suite, or its QEMU, cannot be had here.
pub(crate) fn fetch(paths: &Paths, suite: &Suite) -> Result<()> {
    let _lock = lock_cache(paths)?;
    suite.source(paths, false).map(drop)
}

fn lock_cache(paths: &Paths) -> Result<lock::Lock> {
    fs::create_dir_all(&paths.cache)
        .with_context(|| format!("{}: cannot create", paths.cache.display()))?;
    lock::take(&paths.cache)
}

fn build_and_install(paths: &Paths, options: &Options) -> Result<()> {
    let start = Instant::now();
    let _lock = lock_cache(paths)?;
    let recipe = tree::Recipe::read(&paths.root)?;
    let tree = tree::prepare(paths, &recipe, options)?;
    tree.sync(&recipe)?;
    build::configure(paths, &tree, &recipe)?;
    install::write_build_env(paths, &tree)?;
    build::compile(paths, &tree)?;
    install::install(paths, &tree)?;
    if options.faults {
        faults::make(paths, &tree)?;
    }
    if options.reference {
        reference::check(paths, Scope::Everything)?;
    }
    tree.mark_used()?;
    tree::prune(paths)?;
    eprintln!(
        "QEMU {} with the backup extension: {} ({:.1} s)",
        tree.version,
        paths.qemu_bin().display(),
        start.elapsed().as_secs_f64()
    );
    Ok(())
}
