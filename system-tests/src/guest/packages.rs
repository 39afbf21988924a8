// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fetches Debian packages and unpacks them; nothing is installed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::{Stop, run};

const ASK_WITHIN: Duration = Duration::from_secs(60);
const FETCH_WITHIN: Duration = Duration::from_secs(600);
const UNPACK_WITHIN: Duration = Duration::from_secs(120);

/// The file name, with the version, of the package that apt would fetch now.
pub(super) fn file_name(package: &str, stop: &Stop) -> Result<String> {
    let mut command = apt("apt-get");
    command.args(["download", "--print-uris", package]);
    let output = run(&mut command, ASK_WITHIN, stop)
        .with_context(|| format!("apt does not know {package}: run apt-get update"))?;
    // 'http://mirror/pool/….deb' name_version_arch.deb size checksum
    let name = output.lines().find_map(|line| line.split_whitespace().nth(1));
    let name = name.with_context(|| format!("apt names no file for {package}: {output}"))?;
    if name.contains('/') || !name.ends_with(".deb") {
        bail!("apt names an odd file for {package}: {name:?}");
    }
    Ok(name.to_owned())
}

/// The package that a meta package stands for, by the start of its name.
pub(super) fn dependency(meta: &str, prefix: &str, stop: &Stop) -> Result<String> {
    let mut command = apt("apt-cache");
    command.args(["depends", "--important", meta]);
    let output = run(&mut command, ASK_WITHIN, stop)
        .with_context(|| format!("apt does not know {meta}: run apt-get update"))?;
    output
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
        .with_context(|| format!("{meta} depends on no package {prefix}…"))
}

/// Fetches the package lists; needs root.
pub(super) fn update_lists(stop: &Stop) -> Result<()> {
    run(apt("apt-get").args(["-q", "update"]), FETCH_WITHIN, stop).map(drop)
}

/// Fetches packages into a folder and unpacks all of them into `root`.
pub(super) fn unpack(
    packages: &[&str],
    debs: &Path,
    root: &Path,
    stop: &Stop,
) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(debs)?;
    // As root, apt fetches as a user without rights on our cache unless told otherwise.
    let mut command = apt("apt-get");
    command.args(["-q", "-o", "APT::Sandbox::User=root", "download"]).args(packages);
    run(command.current_dir(debs), FETCH_WITHIN, stop)
        .with_context(|| format!("cannot fetch {}", packages.join(" ")))?;
    let mut fetched = Vec::new();
    for entry in std::fs::read_dir(debs)? {
        let deb = entry?.path();
        if deb.extension() == Some(OsStr::new("deb")) {
            run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(root), UNPACK_WITHIN, stop)?;
            fetched.push(deb);
        }
    }
    Ok(fetched)
}

/// The names a package depends on (of alternatives the first).
pub(super) fn depends_of(deb: &Path, stop: &Stop) -> Result<Vec<String>> {
    let mut command = Command::new("dpkg-deb");
    let output = run(command.arg("-f").arg(deb).arg("Depends"), ASK_WITHIN, stop)?;
    let names = output.split(',').filter_map(|item| item.split_whitespace().next());
    Ok(names.map(|name| name.trim_end_matches(":any").to_owned()).collect())
}

fn apt(program: &str) -> Command {
    let mut command = Command::new(program);
    // The output is read by us, not by a person.
    command.env("LC_ALL", "C");
    command
}
