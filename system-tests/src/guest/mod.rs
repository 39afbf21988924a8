// SPDX-License-Identifier: MIT OR Apache-2.0
//! Builds the small Linux guest of the demo and the tests: a Debian kernel and one initramfs.
//!
//! Kernel, busybox and guest agent come from Debian packages that are fetched and unpacked, never
//! installed; the record program is compiled as a static program. Everything is kept in a cache
//! outside the checkout, so that only the first build takes long (about 30 MB to fetch).

pub(crate) mod cache;
mod initramfs;
mod kernel;
mod lz4;
mod packages;
mod program;
pub mod secrets;
mod unpack;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::{Stop, run};
use cache::Cache;
use initramfs::Initramfs;

const KERNEL_META: &str = "linux-image-cloud-amd64";
const INIT: &str = include_str!("init.sh");
const SHUTDOWN: &str = include_str!("shutdown.sh");
/// What the power button does: busybox' acpid runs this.
const POWER_BUTTON: &str = "etc/acpi/PWRF/00000080";
const LIBRARIES: &str = "lib/x86_64-linux-gnu";
const LDD_WITHIN: Duration = Duration::from_secs(10);
/// Kernel options: messages on the serial line, a panic ends the machine. Its check of the timer panics when an
/// emulated guest gets too little of a busy processor.
pub const KERNEL_OPTIONS: &str = "console=ttyS0 panic=-1 quiet no_timer_check";

/// A bootable guest.
#[derive(Debug, Clone)]
pub struct GuestImage {
    /// The kernel, for QEMU's `-kernel`.
    pub kernel: PathBuf,
    /// The initial file system, for QEMU's `-initrd`.
    pub initrd: PathBuf,
}

impl GuestImage {
    /// Builds the guest, or finds it in the cache.
    ///
    /// # Errors
    /// A package cannot be fetched, or a tool is missing; the text says what to install.
    pub fn build(stop: &Stop) -> Result<Self> {
        if std::env::consts::ARCH != "x86_64" {
            bail!("the guest is built for x86_64 hosts only");
        }
        let cache = Cache::open(stop)?;
        let kernel = kernel_entry(&cache, stop).context("cannot prepare the guest's kernel")?;
        let agent = agent_entry(&cache, stop).context("cannot prepare the guest agent")?;
        let busybox = busybox_entry(&cache, stop).context("cannot prepare busybox")?;
        let program = program::entry(&cache, stop).context("cannot build guest-records")?;
        let mut key = blake3::Hasher::new();
        for part in [&kernel, &agent, &busybox, &program] {
            key.update(part.as_os_str().as_encoded_bytes()).update(b"\0");
        }
        key.update(INIT.as_bytes()).update(SHUTDOWN.as_bytes());
        let key = &key.finalize().to_hex()[..16];
        let image = cache.entry("initrd", key, |to| {
            assemble(&kernel, &agent, &busybox, &program)?.write(&to.join("initrd"))
        });
        let initrd = image.context("cannot make the guest's initramfs")?.join("initrd");
        Ok(Self { kernel: kernel.join("vmlinux"), initrd })
    }
}

/// The cache's entry for a package; without package lists the newest one that is there.
fn package_entry(
    cache: &Cache,
    kind: &str,
    package: impl Fn() -> Result<String>,
    stop: &Stop,
    fill: impl FnOnce(&str, &Path) -> Result<()>,
) -> Result<PathBuf> {
    let name_and_file = || {
        let name = package()?;
        packages::file_name(&name, stop).map(|file| (name, file))
    };
    let (name, file) = match name_and_file() {
        Ok(known) => known,
        Err(error) => {
            if let Some(entry) = cache.newest(kind)? {
                return Ok(entry);
            }
            // A fresh system has no package lists yet.
            packages::update_lists(stop).map_err(|_| error)?;
            name_and_file()?
        }
    };
    let key = file.trim_end_matches(".deb").replace('%', "_");
    cache.entry(kind, &key, |to| fill(&name, to))
}

fn kernel_entry(cache: &Cache, stop: &Stop) -> Result<PathBuf> {
    let package = || packages::dependency(KERNEL_META, "linux-image-", stop);
    package_entry(cache, "kernel", package, stop, |package, to| {
        let root = to.join("root");
        packages::unpack(&[package], &to.join("debs"), &root, stop)?;
        kernel::take(&root, to, stop)?;
        clean(to)
    })
}

fn busybox_entry(cache: &Cache, stop: &Stop) -> Result<PathBuf> {
    let package = || Ok("busybox-static".to_owned());
    package_entry(cache, "busybox", package, stop, |package, to| {
        let root = to.join("root");
        packages::unpack(&[package], &to.join("debs"), &root, stop)?;
        let found = ["bin/busybox", "usr/bin/busybox"].map(|path| root.join(path));
        let found =
            found.iter().find(|path| path.is_file()).context("no busybox in the package")?;
        fs::copy(found, to.join("busybox"))?;
        clean(to)
    })
}

/// The agent with its libraries: those of this machine, else those of the packages it names.
fn agent_entry(cache: &Cache, stop: &Stop) -> Result<PathBuf> {
    let package = || Ok("qemu-guest-agent".to_owned());
    package_entry(cache, "agent", package, stop, |package, to| {
        let (root, debs) = (to.join("root"), to.join("debs"));
        let fetched = packages::unpack(&[package], &debs, &root, stop)?;
        let program = root.join("usr/sbin/qemu-ga");
        let mut libraries = libraries_of(&program, &root, stop)?;
        if libraries.missing {
            let deb = fetched.first().context("apt fetched no package")?;
            let names = packages::depends_of(deb, stop)?;
            let names: Vec<&str> =
                names.iter().map(String::as_str).filter(|name| *name != "libc6").collect();
            packages::unpack(&names, &debs.join("more"), &root, stop)?;
            libraries = libraries_of(&program, &root, stop)?;
        }
        if libraries.missing {
            bail!("libraries of the guest agent are missing: {}", libraries.listing);
        }
        fs::copy(&program, to.join("qemu-ga"))?;
        fs::create_dir(to.join("libraries"))?;
        for path in libraries.paths {
            let name = path.file_name().context("a library without name")?;
            fs::copy(&path, to.join("libraries").join(name))
                .with_context(|| format!("cannot copy {}", path.display()))?;
        }
        clean(to)
    })
}

struct Libraries {
    paths: Vec<PathBuf>,
    missing: bool,
    listing: String,
}

fn libraries_of(program: &Path, root: &Path, stop: &Stop) -> Result<Libraries> {
    let search = [root.join("usr").join(LIBRARIES), root.join(LIBRARIES)];
    let search = std::env::join_paths(search).context("odd path of the cache")?;
    let mut command = Command::new("ldd");
    command.arg(program).env("LD_LIBRARY_PATH", search).env("LC_ALL", "C");
    let listing = run(&mut command, LDD_WITHIN, stop)?;
    // "libX.so => /path (address)", or "/path (address)" for the loader.
    let words = listing.lines().filter_map(|line| {
        line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from)
    });
    let paths = words.collect();
    Ok(Libraries { paths, missing: listing.contains("not found"), listing })
}

fn clean(entry: &Path) -> Result<()> {
    for folder in ["root", "debs"] {
        fs::remove_dir_all(entry.join(folder)).context("cannot remove what was unpacked")?;
    }
    Ok(())
}

fn assemble(kernel: &Path, agent: &Path, busybox: &Path, program: &Path) -> Result<Initramfs> {
    let mut archive = Initramfs::new();
    for folder in ["proc", "sys", "run", "tmp", "mnt", "var/log", "usr/lib"] {
        archive.directory(folder);
    }
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("sbin/shutdown", 0o755, SHUTDOWN.as_bytes());
    archive.file(POWER_BUTTON, 0o755, SHUTDOWN.as_bytes());
    archive.copy("bin/busybox", &busybox.join("busybox"))?;
    archive.copy("sbin/guest-records", &program.join("guest-records"))?;
    archive.copy("sbin/qemu-ga", &agent.join("qemu-ga"))?;
    for (name, path) in listed(&kernel.join("modules"))? {
        archive.copy(&format!("modules/{name}"), &path)?;
    }
    for (name, path) in listed(&agent.join("libraries"))? {
        let folder = if name.starts_with("ld-linux") { "lib64" } else { LIBRARIES };
        archive.copy(&format!("{folder}/{name}"), &path)?;
    }
    Ok(archive)
}

fn listed(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let entry = entry?;
        found.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
    }
    found.sort();
    Ok(found)
}
