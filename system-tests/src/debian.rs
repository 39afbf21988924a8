// SPDX-License-Identifier: MIT OR Apache-2.0
//! A whole Debian for containers, made by `debootstrap` and kept outside of the checkout between runs: systemd, and a
//! service that writes. Needs root.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::guest::cache::Cache;
use crate::process::{Stop, run};

/// Changes with what is made here.
const RECIPE: u32 = 1;
const ASK_WITHIN: Duration = Duration::from_secs(60);
const MAKE_WITHIN: Duration = Duration::from_secs(900);
/// What would wait for something that containers here do not have.
const MASKED: [&str; 3] =
    ["sys-kernel-debug.mount", "systemd-udevd.service", "console-getty.service"];

/// Appends numbers to a file and, when that is on disk, to another one; tells what it has found at its start.
const WRITER: &str = r#"#!/bin/sh
a=/var/lib/writer/a b=/srv/b
mkdir -p /var/lib/writer
touch $a $b
echo "$(tail -n 1 $a) $(tail -n 1 $b)" > /root/found.new
mv /root/found.new /root/found
n=$(tail -n 1 $a)
while :; do
    n=$((${n:-0} + 1))
    echo $n >> $a; sync $a
    echo $n >> $b; sync $b
done
"#;

const UNIT: &str = "[Unit]\nDescription=Writes numbers\n\n[Service]\nExecStart=/usr/local/bin/writer\nRestart=always\n\n\
    [Install]\nWantedBy=multi-user.target\n";

/// The tar archive of the system.
///
/// # Errors
/// A tool is missing or fails, or apt knows no mirror.
pub fn template(stop: &Stop) -> Result<PathBuf> {
    let (mirror, codename) = mirror(stop)?;
    let cache = Cache::open(stop)?;
    let key = format!("{codename}-{}-{RECIPE}", std::env::consts::ARCH);
    let entry = cache.entry("debian", &key, |dir| make(dir, &mirror, &codename, stop))?;
    Ok(entry.join("debian.tar"))
}

/// Where this machine gets its packages from, and of which release.
fn mirror(stop: &Stop) -> Result<(String, String)> {
    let mut ask = Command::new("apt-get");
    ask.env("LC_ALL", "C").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(CODENAME) $(COMPONENT)",
    ]);
    let listed = run(ask.arg("Created-By: Packages"), ASK_WITHIN, stop)
        .context("apt knows no packages: run apt-get update")?;
    for line in listed.lines() {
        // The release itself, not its updates: these have a name of two parts.
        if let [uri, codename, "main"] = line.split_whitespace().collect::<Vec<_>>()[..]
            && !codename.contains('-')
        {
            return Ok((uri.to_owned(), codename.to_owned()));
        }
    }
    bail!("apt names no mirror of a release")
}

fn make(dir: &Path, mirror: &str, codename: &str, stop: &Stop) -> Result<()> {
    let root = dir.join("root");
    let mut debootstrap = Command::new("debootstrap");
    debootstrap
        .args(["--variant=minbase", "--include=systemd-sysv", codename])
        .arg(&root)
        .arg(mirror);
    run(&mut debootstrap, MAKE_WITHIN, stop).context("debootstrap failed")?;
    let writer = root.join("usr/local/bin/writer");
    fs::write(&writer, WRITER)?;
    fs::set_permissions(&writer, fs::Permissions::from_mode(0o755))?;
    let units = root.join("etc/systemd/system");
    fs::write(units.join("writer.service"), UNIT)?;
    fs::create_dir_all(units.join("multi-user.target.wants"))?;
    symlink("../writer.service", units.join("multi-user.target.wants/writer.service"))?;
    for name in MASKED {
        symlink("/dev/null", units.join(name))?;
    }
    // Devices are the container's own, and packages are not installed again.
    for name in ["dev", "var/cache/apt/archives", "var/lib/apt/lists"] {
        let path = root.join(name);
        fs::remove_dir_all(&path)?;
        fs::create_dir(&path)?;
    }
    let mut tar = Command::new("tar");
    tar.args(["--numeric-owner", "--xattrs", "-C"]).arg(&root).arg("-cf");
    run(tar.arg(dir.join("debian.tar")).arg("."), MAKE_WITHIN, stop)?;
    Ok(fs::remove_dir_all(root)?)
}
