// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's freezer of one container, through the files of its cgroup. `lxc-freeze` is not used: with either
//! kind of cgroup it may never end, and then `lxc-unfreeze` does not thaw
//! (`docs/design/0033-containers-are-frozen-through-their-cgroup.md`).

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::tool::Pauses;

/// What LXC calls the cgroup of a container, before its name.
const PAYLOAD: &str = "lxc.payload.";

/// The two kinds that Linux has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The controller `freezer` of the old cgroups.
    Controller,
    /// Every cgroup of version 2.
    Unified,
}

/// That of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Freezer {
    kind: Kind,
    dir: PathBuf,
}

impl Freezer {
    /// That of the container of this name, whose first process this is; none if that has ended.
    pub(crate) fn of(name: &str, pid: i32) -> Result<Option<Self>, String> {
        let words = |path: &str, error: &io::Error| format!("'{path}': {error}");
        let (mounts, cgroups) = ("/proc/self/mountinfo", format!("/proc/{pid}/cgroup"));
        let table = fs::read_to_string(mounts).map_err(|error| words(mounts, &error))?;
        match fs::read_to_string(&cgroups) {
            Ok(of_it) => find(&table, &of_it, name).map(Some),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(words(&cgroups, &error)),
        }
    }

    /// For [`Self::parse`] in another process.
    pub(crate) fn to_args(&self) -> [OsString; 2] {
        let kind = match self.kind {
            Kind::Controller => "controller",
            Kind::Unified => "unified",
        };
        [kind.into(), self.dir.clone().into()]
    }

    pub(crate) fn parse(kind: &OsStr, dir: &OsStr) -> Option<Self> {
        let kind = match kind.to_str()? {
            "controller" => Kind::Controller,
            "unified" => Kind::Unified,
            _ => return None,
        };
        Some(Self { kind, dir: dir.into() })
    }

    /// Ends when all of its processes are frozen. An error if that takes longer, or as soon as `check` says so: then
    /// some of them may be. One that waits for a disk that does not answer cannot be frozen. LXC is not told, and
    /// goes on to say that the container runs.
    pub(crate) fn freeze(
        &self,
        limit: Duration,
        mut check: impl FnMut() -> Result<(), String>,
    ) -> Result<(), String> {
        let deadline = Instant::now() + limit;
        // Processes freeze within moments; one that does file system work may take longer.
        let mut pauses = Pauses::new();
        loop {
            check()?;
            // Not only once: the controller forgets a process that was about to wait for its `vfork`.
            self.ask(true).map_err(|error| self.words(&error))?;
            if self.is_frozen().map_err(|error| self.words(&error))? {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(format!(
                    "some of its processes still run after {limit:?}: they wait for a disk or a server that does \
                     not answer"
                ));
            }
            std::thread::sleep(pauses.next_pause());
        }
    }

    /// Also of one that is not frozen, or has ended.
    pub(crate) fn thaw(&self) -> Result<(), String> {
        match self.ask(false) {
            Err(error) if !is_gone(&error) => Err(self.words(&error)),
            _ => Ok(()),
        }
    }

    pub(crate) fn is_frozen(&self) -> io::Result<bool> {
        Ok(match self.kind {
            Kind::Controller => fs::read_to_string(self.dir.join("freezer.state"))? == "FROZEN\n",
            Kind::Unified => {
                let events = fs::read_to_string(self.dir.join("cgroup.events"))?;
                events.lines().any(|line| line == "frozen 1")
            }
        })
    }

    fn ask(&self, freeze: bool) -> io::Result<()> {
        let (file, word) = match (self.kind, freeze) {
            (Kind::Controller, true) => ("freezer.state", "FROZEN"),
            (Kind::Controller, false) => ("freezer.state", "THAWED"),
            (Kind::Unified, true) => ("cgroup.freeze", "1"),
            (Kind::Unified, false) => ("cgroup.freeze", "0"),
        };
        // Not made if it is not there, as `fs::write` would.
        let mut options = fs::OpenOptions::new();
        io::Write::write_all(&mut options.write(true).open(self.dir.join(file))?, word.as_bytes())
    }

    fn words(&self, error: &io::Error) -> String {
        format!("its cgroup '{}': {error}", self.dir.display())
    }
}

/// The cgroup or the process has ended, before or after its file was opened.
fn is_gone(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    error.kind() == io::ErrorKind::NotFound || [libc::ENODEV, libc::ESRCH].map(Some).contains(&code)
}

/// Finds it by the kernel's tables: of the mounts, and of a process's cgroups. The old controller wins where it is
/// mounted, as LXC has the container in both then.
fn find(mounts: &str, cgroups: &str, name: &str) -> Result<Freezer, String> {
    for kind in [Kind::Controller, Kind::Unified] {
        let Some((root, place)) = mount_of(mounts, kind) else { continue };
        let Some(path) = cgroups.lines().find_map(|line| path_in(line, kind)) else { continue };
        let dir = payload(path, name).ok_or_else(|| {
            format!("its cgroup '{path}' is not one that LXC makes, as '/{PAYLOAD}{name}' is")
        })?;
        let below = dir.strip_prefix(root).map_err(|_| {
            format!(
                "its cgroup '{}' is not below '{root}', which is all of them that is mounted",
                dir.display()
            )
        })?;
        return Ok(Freezer { kind, dir: Path::new(place).join(below) });
    }
    Err("no cgroups with a freezer are mounted".into())
}

/// The part of a hierarchy that is mounted, and where: `36 25 0:31 /root /place opts … - type source superopts`.
fn mount_of(mounts: &str, kind: Kind) -> Option<(&str, &str)> {
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let is_it = match (kind, after.next()?) {
            (Kind::Controller, "cgroup") => {
                after.nth(1)?.split(',').any(|option| option == "freezer")
            }
            (Kind::Unified, "cgroup2") => true,
            _ => false,
        };
        let mut before = before.split(' ').skip(3);
        is_it.then_some((before.next()?, before.next()?))
    })
}

/// Of a line `number:controllers:path`.
fn path_in(line: &str, kind: Kind) -> Option<&str> {
    let (number, rest) = line.split_once(':')?;
    let (controllers, path) = rest.split_once(':')?;
    let is_it = match kind {
        Kind::Controller => controllers.split(',').any(|controller| controller == "freezer"),
        Kind::Unified => number == "0",
    };
    is_it.then_some(path)
}

/// The container's own cgroup, of whatever below it its first process has made and moved to. LXC appends a number to
/// a name that is taken.
fn payload(path: &str, name: &str) -> Option<PathBuf> {
    let is_it = |part: &str| {
        let rest = part.strip_prefix(PAYLOAD).and_then(|part| part.strip_prefix(name));
        let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        rest.is_some_and(|rest| rest.is_empty() || rest.strip_prefix('-').is_some_and(is_number))
    };
    let parts: Vec<&str> = path.split('/').collect();
    let at = parts.iter().position(|part| is_it(part))?;
    Some(PathBuf::from(parts[..=at].join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIFIED: &str = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    const HYBRID: &str = "30 29 0:27 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n\
        31 29 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
        32 29 0:29 / /sys/fs/cgroup/freezer rw shared:4 - cgroup cgroup rw,freezer\n";
    const IN_BOTH: &str = "9:name=systemd:/lxc.payload.200/init.scope\n6:freezer:/lxc.payload.200\n\
        0::/lxc.payload.200/init.scope\n";

    fn found(mounts: &str, cgroups: &str) -> Result<(Kind, String), String> {
        let freezer = find(mounts, cgroups, "200")?;
        Ok((freezer.kind, freezer.dir.display().to_string()))
    }

    #[test]
    fn the_controller_is_used_where_it_is_mounted() {
        let dir = "/sys/fs/cgroup/freezer/lxc.payload.200".to_owned();
        assert_eq!(found(HYBRID, IN_BOTH), Ok((Kind::Controller, dir)));
        // Known to the kernel, mounted nowhere: a container started with pure cgroup2 is in its root.
        let cgroups = "6:freezer:/\n0::/lxc.payload.200/init.scope\n";
        let dir = "/sys/fs/cgroup/lxc.payload.200".to_owned();
        assert_eq!(found(UNIFIED, cgroups), Ok((Kind::Unified, dir)));
    }

    #[test]
    fn a_cgroup_below_the_mounted_part_and_with_a_number_is_found() {
        let mounts = UNIFIED.replace(" / ", " /machine ");
        let dir = "/sys/fs/cgroup/lxc.payload.200-1".to_owned();
        let found_there = found(&mounts, "0::/machine/lxc.payload.200-1/system.slice\n");
        assert_eq!(found_there, Ok((Kind::Unified, dir)));
        let error = found(&mounts, "0::/other/lxc.payload.200\n").unwrap_err();
        assert!(error.contains("not below '/machine'"), "{error}");
    }

    #[test]
    fn what_is_not_the_containers_own_is_never_frozen() {
        for path in [
            "/",
            "/lxc.payload.2001",
            "/lxc.payload.200x",
            "/lxc.payload.20",
            "/lxc.payload.2002-1",
        ] {
            let error = found(UNIFIED, &format!("0::{path}\n")).unwrap_err();
            assert!(error.contains("lxc.payload.200'"), "{path}: {error}");
        }
        assert!(found("", IN_BOTH).unwrap_err().contains("no cgroups"));
    }

    #[test]
    fn the_words_of_either_kind_are_written_and_read() {
        let dir = tempfile::tempdir().unwrap();
        for (kind, file, words, frozen) in [
            (
                Kind::Controller,
                "freezer.state",
                ["FROZEN", "THAWED"],
                ("freezer.state", "FROZEN\n"),
            ),
            (
                Kind::Unified,
                "cgroup.freeze",
                ["1", "0"],
                ("cgroup.events", "populated 1\nfrozen 1\n"),
            ),
        ] {
            let freezer = Freezer { kind, dir: dir.path().to_owned() };
            assert!(freezer.ask(true).is_err() && !dir.path().join(file).exists());
            assert_eq!(freezer.thaw(), Ok(()), "of one that has ended");
            fs::write(dir.path().join(file), "      ").unwrap();
            for (freeze, word) in [true, false].into_iter().zip(words) {
                freezer.ask(freeze).unwrap();
                assert!(fs::read_to_string(dir.path().join(file)).unwrap().starts_with(word));
            }
            fs::write(dir.path().join(frozen.0), "FREEZING\nfrozen 0\n").unwrap();
            let error = freezer.freeze(Duration::from_millis(5), || Ok(())).unwrap_err();
            assert!(error.contains("still run after 5ms"), "{error}");
            fs::write(dir.path().join(frozen.0), frozen.1).unwrap();
            assert!(freezer.is_frozen().unwrap());
            fs::write(dir.path().join(file), "      ").unwrap();
            let error =
                freezer.freeze(Duration::from_secs(60), || Err("no guard".into())).unwrap_err();
            assert_eq!(
                (error.as_str(), &*fs::read(dir.path().join(file)).unwrap()),
                ("no guard", &b"      "[..])
            );
            let [kind, path] = freezer.to_args();
            assert_eq!(Freezer::parse(&kind, &path).unwrap(), freezer);
        }
    }
}
