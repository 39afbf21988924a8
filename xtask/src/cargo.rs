// SPDX-License-Identifier: MIT OR Apache-2.0
//! cargo itself, and the parts of the toolchain that the checks need.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::paths::Paths;
use crate::run::{Show, Step, in_path, output};

/// The folder with the patched QEMU programs, for everything that runs them.
pub(crate) const QEMU_BIN_ENV: &str = "VZDUMP_QEMU_BIN";

/// The cargo that runs us, in the checkout.
pub(crate) fn cargo(paths: &Paths, args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(&paths.root);
    // Whatever else is cached, such as the guest of the tests, goes beside our trees.
    command.env("VZDUMP_CACHE", &paths.cache);
    // What is built is run from there, whatever this user has set for other checkouts.
    command.env("CARGO_TARGET_DIR", paths.root.join("target")).env_remove("CARGO_BUILD_TARGET");
    // What `cargo run` set for us is not for others.
    for name in ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_PKG_NAME"] {
        command.env_remove(name);
    }
    command
}

/// Builds programs, given by cargo's options, and shows how far that is.
pub(crate) fn build(paths: &Paths, name: &str, log: &str, programs: &[&str]) -> Result<()> {
    Step {
        name,
        log: paths.logs().join(log),
        show: Show::Progress,
        limit: Duration::from_secs(3600),
    }
    .run(cargo(paths, &[&["build"], programs].concat()))
}

/// Whether a cargo subcommand is installed.
pub(crate) fn has_subcommand(paths: &Paths, name: &str) -> bool {
    output(cargo(paths, &[name, "--version"]).env_remove("RUSTC_WRAPPER")).is_ok()
}

/// rustfmt and clippy are separate parts of a toolchain: gets them from rustup where it can.
pub(crate) fn ensure_components(paths: &Paths) -> Result<()> {
    let missing: Vec<&str> = [("fmt", "rustfmt"), ("clippy", "clippy")]
        .iter()
        .filter(|(subcommand, _)| !has_subcommand(paths, subcommand))
        .map(|(_, component)| *component)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let advice = format!("rustup component add {}", missing.join(" "));
    if in_path("rustup") {
        eprintln!("missing in the Rust toolchain: {}; running `{advice}`", missing.join(" "));
        if output(Command::new("rustup").args(["component", "add"]).args(&missing)).is_ok() {
            return Ok(());
        }
    }
    bail!("the Rust toolchain lacks {}: run `{advice}`", missing.join(" and "));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_built_where_they_are_run_from() {
        let paths = Paths::find().unwrap();
        let command = cargo(&paths, &["build"]);
        let set = |name: &str| command.get_envs().find(|(key, _)| *key == name).map(|(_, v)| v);
        let target = paths.root.join("target");
        assert_eq!(set("CARGO_TARGET_DIR"), Some(Some(target.as_os_str())));
        assert_eq!(set("CARGO_BUILD_TARGET"), Some(None));
    }
}
