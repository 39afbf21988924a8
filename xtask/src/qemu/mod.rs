// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask qemu`: fetch, patch, configure, build and install the QEMU with the extension.
//!
//! Everything slow is kept in the cache, keyed by what it was made from, so that other checkouts
//! and later runs only do what changed.

mod build;
mod faults;
mod install;
mod lock;
mod tree;

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::paths::Paths;

/// Which QEMU to build.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Options {
    /// Take this unpacked QEMU source tree (it stays as it is) instead of Debian's source package
    #[arg(long, value_name = "DIR")]
    pub(crate) source: Option<PathBuf>,
    /// Ask Debian for a newer source package even if one is in the cache
    #[arg(long, conflicts_with = "source")]
    pub(crate) refresh: bool,
    /// Also the storage daemon with injected faults, target/qemu/faults, which only tests use
    #[arg(long)]
    pub(crate) faults: bool,
}

/// The programs that end up in target/qemu/bin, as ninja names them.
const PROGRAMS: &[&str] = &[
    "qemu-system-x86_64",
    "storage-daemon/qemu-storage-daemon",
    "qemu-img",
    "qemu-nbd",
    "qemu-io",
];

/// Makes target/qemu/bin current.
pub(crate) fn run(paths: &Paths, options: &Options) -> Result<()> {
    let start = Instant::now();
    fs::create_dir_all(&paths.cache)
        .with_context(|| format!("{}: cannot create", paths.cache.display()))?;
    let _lock = lock::take(&paths.cache)?;
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
