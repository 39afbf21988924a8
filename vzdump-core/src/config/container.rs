// SPDX-License-Identifier: MIT OR Apache-2.0
//! A container's configuration file, `lxc/<id>.conf`: the same lines as a VM's, with other keys.
//!
//! ```text
//! hostname: web
//! unprivileged: 1
//! rootfs: local:200/vm-200-disk-0.raw,size=8G
//! mp0: local:200/vm-200-disk-1.raw,mp=/srv,backup=1
//! mp1: /data,mp=/data                 a directory of the host: never in a backup
//! lxc.idmap: u 0 100000 65536         lines for LXC itself
//! ```

use std::fmt;
use std::path::{Component, Path, PathBuf};

use provider_api::IdMapRange;

use super::guest::{VmConfig, split_numbered};
use super::{ConfigError, OptionList, parse_bool};

/// The first host id of an unprivileged container that names no other, as in Proxmox VE.
pub const ID_BASE: u32 = 100_000;
/// How many ids such a container has.
pub const ID_COUNT: u32 = 65_536;
/// The key of the root file system.
pub const ROOTFS: &str = "rootfs";
/// The most mount points, as in Proxmox VE.
pub const MOUNT_POINTS_MAX: u32 = 256;
/// Begins the keys of lines that are LXC's own.
const RAW_PREFIX: &str = "lxc.";
/// The line that says how ids are kept on the host.
const IDMAP_KEY: &str = "lxc.idmap";

/// A container's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CtConfig(VmConfig);

/// What is mounted in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// The key: `rootfs`, `mp0`.
    pub key: String,
    /// A volume, or an absolute path of the host.
    pub volume: String,
    /// Where it is in the container; `/` for `rootfs`.
    pub mount_point: PathBuf,
    /// The other items.
    pub options: OptionList,
}

impl MountEntry {
    fn parse(key: &str, value: &str) -> Result<Self, ConfigError> {
        let fault = |why: &str| ConfigError::Invalid(format!("The mount '{key}: {value}': {why}"));
        let mut options = OptionList::parse(value).map_err(|why| fault(&why))?;
        let volume = options.first.take().or_else(|| options.get("volume").map(str::to_owned));
        let volume = volume.ok_or_else(|| fault("no volume is named."))?;
        options.remove("volume");
        let mount_point = match (key, options.get("mp")) {
            (ROOTFS, _) => PathBuf::from("/"),
            (_, Some(path)) => clean_mount_point(path).ok_or_else(|| {
                fault("'mp' must be an absolute path in the container, without '..'.")
            })?,
            (_, None) => return Err(fault("'mp' is missing: where is it in the container?")),
        };
        options.remove("mp");
        Ok(Self { key: key.to_owned(), volume, mount_point, options })
    }

    /// Whether it is a directory or device of the host, which no backup includes.
    #[must_use]
    pub fn is_bind(&self) -> bool {
        self.volume.starts_with('/')
    }

    /// Whether a backup includes it.
    #[must_use]
    pub fn backup(&self) -> bool {
        !self.is_bind() && (self.key == ROOTFS || self.options.flag("backup", false))
    }

    /// Whether the container cannot write to it.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.options.flag("ro", false)
    }

    /// The value of the key, as the configuration has it.
    #[must_use]
    pub fn to_value(&self) -> String {
        let mut list = OptionList { first: Some(self.volume.clone()), named: Vec::new() };
        if self.key != ROOTFS {
            list.set("mp", &self.mount_point.display().to_string());
        }
        list.named.extend(self.options.named.iter().cloned());
        list.to_string()
    }
}

/// A path that stays below the container's root, without `.` and doubled slashes.
fn clean_mount_point(text: &str) -> Option<PathBuf> {
    let mut clean = PathBuf::from("/");
    let below = text.strip_prefix('/')?.trim_start_matches('/');
    for part in Path::new(below).components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::CurDir => {}
            _ => return None,
        }
    }
    (clean != Path::new("/")).then_some(clean)
}

/// Whether a key names something that is mounted in the container.
#[must_use]
pub fn is_mount_key(key: &str) -> bool {
    key == ROOTFS || matches!(split_numbered(key), Some(("mp", n)) if n < MOUNT_POINTS_MAX)
}

impl CtConfig {
    /// Reads the text of a configuration.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        Self(VmConfig::parse(text))
    }

    /// Reads a configuration from an archive.
    ///
    /// # Errors
    /// [`ConfigError::NotText`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, ConfigError> {
        Ok(Self(VmConfig::from_bytes(bytes)?))
    }

    /// Reads a configuration file; a missing one is `None`.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn read(path: &Path) -> Result<Option<Self>, ConfigError> {
        Ok(VmConfig::read(path)?.map(Self))
    }

    /// What has nothing to do with containers: keys, comments, sections, writing.
    #[must_use]
    pub fn lines(&self) -> &VmConfig {
        &self.0
    }

    /// The same, to be changed.
    pub fn lines_mut(&mut self) -> &mut VmConfig {
        &mut self.0
    }

    /// The container's host name.
    #[must_use]
    pub fn hostname(&self) -> Option<&str> {
        self.0.get("hostname")
    }

    /// Whether the container's root is none on the host.
    #[must_use]
    pub fn is_unprivileged(&self) -> bool {
        self.0.get("unprivileged").and_then(parse_bool) == Some(true)
            || self.raw().any(|(key, _)| key == IDMAP_KEY)
    }

    /// The lines that are LXC's own, in their order.
    pub fn raw(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.pairs().filter(|(key, _)| key.starts_with(RAW_PREFIX))
    }

    /// How the container's ids are kept on the host; empty for a privileged one.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] names the `lxc.idmap` line that makes no sense.
    pub fn id_map(&self) -> Result<Vec<IdMapRange>, ConfigError> {
        let mut ranges = Vec::new();
        for (_, value) in self.raw().filter(|(key, _)| *key == IDMAP_KEY) {
            let fault = || {
                let text = "is none of 'u|g <id in the container> <id on the host> <count>'.";
                ConfigError::Invalid(format!("'{IDMAP_KEY}: {value}' {text}"))
            };
            ranges.push(parse_range(value).ok_or_else(fault)?);
        }
        if ranges.is_empty() && self.is_unprivileged() {
            let range = |is_group| IdMapRange {
                is_group,
                container_id: 0,
                host_id: ID_BASE,
                count: ID_COUNT,
            };
            ranges.extend([range(false), range(true)]);
        }
        Ok(ranges)
    }

    /// What is mounted: the root file system first, then by mount point, parents before children.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] names the entry that makes no sense, or says that there is no
    /// `rootfs`.
    pub fn mounts(&self) -> Result<Vec<MountEntry>, ConfigError> {
        let mut mounts: Vec<MountEntry> = Vec::new();
        for (key, value) in self.0.pairs().filter(|(key, _)| is_mount_key(key)) {
            let mount = MountEntry::parse(key, value)?;
            match mounts.iter_mut().find(|other| other.key == key) {
                Some(other) => *other = mount,
                None => mounts.push(mount),
            }
        }
        if !mounts.iter().any(|mount| mount.key == ROOTFS) {
            return Err(ConfigError::Invalid("The container has no 'rootfs'.".to_owned()));
        }
        mounts.sort_by(|a, b| a.mount_point.cmp(&b.mount_point));
        if let Some(pair) =
            mounts.windows(2).find(|pair| pair[0].mount_point == pair[1].mount_point)
        {
            return Err(ConfigError::Invalid(format!(
                "'{}' and '{}' are mounted at the same place '{}'.",
                pair[0].key,
                pair[1].key,
                pair[0].mount_point.display()
            )));
        }
        Ok(mounts)
    }
}

fn parse_range(value: &str) -> Option<IdMapRange> {
    let mut words = value.split_ascii_whitespace();
    let is_group = match words.next()? {
        "u" => false,
        "g" => true,
        _ => return None,
    };
    let mut number = || words.next()?.parse::<u32>().ok();
    let (container_id, host_id, count) = (number()?, number()?, number()?);
    let fits = |first: u32| first.checked_add(count - 1).is_some_and(|last| last < u32::MAX);
    (words.next().is_none() && count > 0 && fits(container_id) && fits(host_id))
        .then_some(IdMapRange { is_group, container_id, host_id, count })
}

impl fmt::Display for CtConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = "#web server\n\
        arch: amd64\n\
        hostname: web\n\
        mp1: local:200/vm-200-disk-2.raw,mp=/srv/data,backup=1,size=1G\n\
        mp0: local:200/vm-200-disk-1.raw,mp=//srv/./,ro=1\n\
        mp2: /data,mp=/data,backup=1\n\
        rootfs: volume=local:200/vm-200-disk-0.raw,size=8G\n\
        unprivileged: 1\n\
        lxc.mount.auto: proc:rw\n\
        \n\
        [before]\n\
        rootfs: local:200/old.raw\n";

    #[test]
    fn mounts_are_in_the_order_in_which_they_are_mounted() {
        let config = CtConfig::parse(SAMPLE);
        assert_eq!(config.to_string(), SAMPLE);
        let mounts = config.mounts().unwrap();
        let seen: Vec<_> = mounts
            .iter()
            .map(|m| (m.key.as_str(), m.mount_point.to_str().unwrap(), m.backup(), m.is_bind()))
            .collect();
        assert_eq!(
            seen,
            [
                ("rootfs", "/", true, false),
                ("mp2", "/data", false, true),
                ("mp0", "/srv", false, false),
                ("mp1", "/srv/data", true, false),
            ]
        );
        assert!(mounts[2].is_read_only());
        assert_eq!(mounts[0].volume, "local:200/vm-200-disk-0.raw");
        assert_eq!(
            mounts[3].to_value(),
            "local:200/vm-200-disk-2.raw,mp=/srv/data,backup=1,size=1G"
        );
        assert_eq!(config.raw().collect::<Vec<_>>(), [("lxc.mount.auto", "proc:rw")]);
    }

    #[test]
    fn a_mount_point_cannot_leave_the_container() {
        for bad in ["mp=/a/../../etc", "mp=etc", "mp=/", "ro=1", "mp=/.."] {
            let text = format!("rootfs: local:200/a.raw\nmp0: local:200/b.raw,{bad}\n");
            assert!(CtConfig::parse(&text).mounts().is_err(), "{bad}");
        }
        assert!(CtConfig::parse("hostname: a\n").mounts().is_err(), "no rootfs");
        let twice = "rootfs: local:200/a.raw\nmp0: b:1/b.raw,mp=/x\nmp1: b:1/c.raw,mp=/x/\n";
        assert!(CtConfig::parse(twice).mounts().is_err(), "two at one place");
    }

    #[test]
    fn ids_are_mapped_as_the_configuration_says() {
        let range = |is_group, container_id, host_id, count| IdMapRange {
            is_group,
            container_id,
            host_id,
            count,
        };
        let map = |text: &str| CtConfig::parse(text).id_map();
        assert_eq!(map("hostname: a\n").unwrap(), []);
        assert_eq!(
            map(SAMPLE).unwrap(),
            [range(false, 0, 100_000, 65_536), range(true, 0, 100_000, 65_536)]
        );
        let own = "lxc.idmap: u 0 200000 1000\nlxc.idmap: g 0 200000 1000\n";
        assert!(CtConfig::parse(own).is_unprivileged());
        assert_eq!(
            map(own).unwrap(),
            [range(false, 0, 200_000, 1000), range(true, 0, 200_000, 1000)]
        );
        for bad in ["x 0 1 1", "u 0 1", "u 0 1 0", "u 0 4294967295 2", "u 0 1 1 1"] {
            assert!(map(&format!("lxc.idmap: {bad}\n")).is_err(), "{bad}");
        }
    }
}
