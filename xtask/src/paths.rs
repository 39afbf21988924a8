// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where things are: the checkout, its target folder, and the cache that outlives checkouts.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The folders every chore works in.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    /// Top of the checkout.
    pub(crate) root: PathBuf,
    /// Sources, build trees and logs shared by all checkouts of this user.
    pub(crate) cache: PathBuf,
    /// What belongs to QEMU in the checkout: programs, and where they were built.
    qemu: PathBuf,
}

impl Paths {
    pub(crate) fn find() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = manifest.parent().context("xtask has no parent folder")?;
        // A moved checkout keeps its compiled xtask: the working directory then says where it is.
        let root = if root.join("Cargo.toml").is_file() {
            root.to_path_buf()
        } else {
            env::current_dir().context("no current directory")?
        };
        let cache = cache_dir(|name| env::var_os(name).map(PathBuf::from), env::home_dir());
        let qemu = root.join("target/qemu");
        Ok(Self { root, cache, qemu })
    }

    /// The same checkout with another QEMU beside the default one.
    pub(crate) fn with_second_qemu(&self, name: &str) -> Self {
        Self { qemu: self.root.join(format!("target/qemu-{name}")), ..self.clone() }
    }

    /// What belongs to QEMU in the checkout.
    pub(crate) fn qemu(&self) -> &Path {
        &self.qemu
    }

    /// The patched programs.
    pub(crate) fn qemu_bin(&self) -> PathBuf {
        self.qemu().join("bin")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.cache.join("log")
    }
}

/// `$VZDUMP_CACHE`, else `$XDG_CACHE_HOME/vzdump-build`, else `~/.cache/vzdump-build`; without any of
/// them a folder that survives a reboot.
fn cache_dir(var: impl Fn(&str) -> Option<PathBuf>, home: Option<PathBuf>) -> PathBuf {
    let absolute = |path: &PathBuf| path.is_absolute();
    if let Some(dir) = var("VZDUMP_CACHE").filter(absolute) {
        return dir;
    }
    let base = var("XDG_CACHE_HOME")
        .filter(absolute)
        .or_else(|| home.filter(absolute).map(|home| home.join(".cache")));
    match base {
        Some(base) => base.join("vzdump-build"),
        None => {
            let uid = rustix::process::getuid().as_raw();
            PathBuf::from(format!("/var/tmp/vzdump-build-{uid}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(vars: &[(&str, &str)], home: Option<&str>) -> String {
        let var = |name: &str| {
            vars.iter().find(|(key, _)| *key == name).map(|(_, value)| PathBuf::from(value))
        };
        cache_dir(var, home.map(PathBuf::from)).display().to_string()
    }

    #[test]
    fn the_cache_is_outside_the_checkout() {
        assert_eq!(dir(&[("VZDUMP_CACHE", "/c"), ("XDG_CACHE_HOME", "/x")], Some("/h")), "/c");
        assert_eq!(dir(&[("XDG_CACHE_HOME", "/x")], Some("/h")), "/x/vzdump-build");
        assert_eq!(dir(&[], Some("/h")), "/h/.cache/vzdump-build");
        assert!(dir(&[], None).starts_with("/var/tmp/vzdump-build-"));
    }

    #[test]
    fn relative_folders_are_not_used() {
        assert_eq!(
            dir(&[("VZDUMP_CACHE", ""), ("XDG_CACHE_HOME", "x")], Some("/h")),
            "/h/.cache/vzdump-build"
        );
    }
}
