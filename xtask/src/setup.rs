// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask setup`: the Debian packages of the build, the tests and the demo.

use std::fs;

use anyhow::{Context, Result};

use crate::{apt, paths::Paths};

/// What `cargo xtask qemu` needs.
const BUILD: &[&str] = &[
    "build-essential",
    "debian-archive-keyring",
    "dpkg-dev",
    "libaio-dev",
    "libclang-dev",
    "libfdt-dev",
    "libfuse3-dev",
    "libglib2.0-dev",
    "libpixman-1-dev",
    "libpng-dev",
    "libseccomp-dev",
    "liburing-dev",
    "ninja-build",
    "patch",
    "pkg-config",
    // QEMU's configure makes a virtual environment of its own.
    "python3-venv",
    "xz-utils",
    "zlib1g-dev",
    // Firmware: the source package has none.
    "qemu-system-data",
    "seabios",
];

/// What the tests and the demo's guest are made of.
const TESTS: &[&str] = &[
    "acl",
    "attr",
    // Run beside containers, as people do.
    "borgbackup",
    "btrfs-progs",
    "busybox-static",
    "bzip2",
    "cpio",
    // A container with a whole system.
    "debootstrap",
    "e2fsprogs",
    "fuse3",
    "git",
    // The provider example in shell.
    "jq",
    "kmod",
    "libnbd-bin",
    "lxc",
    "lz4",
    "mount",
    "nbdkit",
    // UEFI for guests.
    "ovmf",
    "procps",
    // The generated QMP reference.
    "python3-sphinx",
    "qemu-utils",
    "restic",
    // TPMs for guests.
    "swtpm",
    "swtpm-tools",
    "xfsprogs",
    // Containers' archives.
    "zstd",
];

/// What only the benchmarks need.
const BENCHMARKS: &[&str] = &["fio", "rsync"];

/// Installs what is missing; silent and quick when nothing is.
pub(crate) fn run() -> Result<()> {
    install(&[BUILD, TESTS].concat())
}

/// The same with what the benchmarks need.
pub(crate) fn run_for_benchmarks() -> Result<()> {
    install(&[BUILD, TESTS, BENCHMARKS].concat())
}

fn install(names: &[&'static str]) -> Result<()> {
    let mut wanted = names.to_vec();
    wanted.extend(meson_package(&fs::read_to_string("/etc/os-release").unwrap_or_default()));
    let missing = apt::missing(&wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("missing Debian packages: {}", missing.join(" "));
    let log = Paths::find()?.logs().join("setup.log");
    apt::install(&missing, &log)
        .with_context(|| format!("install them by hand: apt-get install {}", missing.join(" ")))
}

/// QEMU wants meson 1.5: Debian has it from release 13 on, before that `xtask qemu` puts one into a
/// virtual environment.
fn meson_package(os_release: &str) -> Option<&'static str> {
    let value = |name: &str| {
        os_release
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"'))
    };
    let old = value("VERSION_ID")
        .and_then(|version| version.split('.').next()?.parse::<u32>().ok())
        .is_some_and(|version| version < 13);
    (value("ID") == Some("debian") && !old).then_some("meson")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meson_comes_from_where_it_is_new_enough() {
        assert_eq!(meson_package("ID=debian\nVERSION_ID=\"12\"\n"), None);
        assert_eq!(meson_package("ID=debian\nVERSION_ID=\"13\"\n"), Some("meson"));
        assert_eq!(meson_package("ID=debian\nVERSION_CODENAME=forky\n"), Some("meson"));
        assert_eq!(meson_package("ID=ubuntu\nVERSION_ID=\"24.04\"\n"), None);
    }
}
