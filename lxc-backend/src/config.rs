// SPDX-License-Identifier: MIT OR Apache-2.0
//! From a container's configuration to the one that LXC reads.

use std::fmt::Write as _;
use std::path::Path;

use vzdump_core::config::OptionList;
use vzdump_core::config::container::{CtConfig, is_mount_key};
use vzdump_core::config::guest::split_numbered;

use crate::CtError;

/// What LXC's package says of all containers, and of unprivileged ones.
const COMMON: &str = "/usr/share/lxc/config/common.conf";
const USERNS: &str = "/usr/share/lxc/config/userns.conf";
/// Keys without an effect on how a container runs, or with one that others give them.
const NO_EFFECT: [&str; 22] = [
    "description",
    "tags",
    "onboot",
    "startup",
    "ostype",
    "unprivileged",
    "lock",
    "protection",
    "template",
    "digest",
    "parent",
    "snapstate",
    "hookscript",
    "console",
    "tty",
    "cmode",
    "swap",
    "cpuunits",
    "nameserver",
    "searchdomain",
    "timezone",
    "debug",
];

/// LXC's configuration, and what of the container's it does not heed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LxcConfig {
    /// The file's content.
    pub text: String,
    /// Keys that are known and not put into effect.
    pub ignored: Vec<String>,
    /// Keys that nobody knows.
    pub unknown: Vec<String>,
}

/// Which hierarchy of cgroups limits memory and processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cgroups {
    /// The old one.
    V1,
    /// The unified one.
    V2,
}

impl Cgroups {
    /// Those of this host.
    #[must_use]
    pub fn of_host() -> Self {
        let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        if unified { Self::V2 } else { Self::V1 }
    }
}

/// Translates a configuration. `rootfs` is where the container's files are mounted for LXC.
///
/// # Errors
/// [`CtError::Invalid`] names the line that makes no sense.
pub fn translate(config: &CtConfig, rootfs: &Path, cgroups: Cgroups) -> Result<LxcConfig, CtError> {
    let mut out = LxcConfig { text: String::new(), ignored: Vec::new(), unknown: Vec::new() };
    let mut line = |key: &str, value: &str| {
        let _ = writeln!(out.text, "{key} = {value}");
    };
    let includes = [(COMMON, true), (USERNS, config.is_unprivileged())];
    for (path, is_wanted) in includes {
        if is_wanted && Path::new(path).exists() {
            line("lxc.include", path);
        }
    }
    line("lxc.rootfs.path", &format!("dir:{}", rootfs.display()));
    if let Some(hostname) = config.hostname() {
        line("lxc.uts.name", plain(hostname, "hostname")?);
    }
    for range in config.id_map()? {
        let kind = if range.is_group { "g" } else { "u" };
        let value = format!("{kind} {} {} {}", range.container_id, range.host_id, range.count);
        line("lxc.idmap", &value);
    }
    let mut networks = 0;
    for (key, value) in config.lines().pairs() {
        match key {
            "arch" => line("lxc.arch", plain(value, key)?),
            "memory" => memory(value, cgroups, &mut line)?,
            "cores" | "cpulimit" | "features" | "net0" if value.is_empty() => {}
            "hostname" => {}
            _ if is_mount_key(key) || key.starts_with("lxc.") => {}
            _ if is_numbered(key, "net") => {
                network(networks, key, value, &mut line)?;
                networks += 1;
            }
            _ => {}
        }
    }
    if networks == 0 {
        line("lxc.net.0.type", "empty");
    }
    for (key, value) in config.raw().filter(|(key, _)| *key != "lxc.idmap") {
        line(key, value);
    }
    for (key, _) in config.lines().pairs() {
        let is_used = matches!(key, "arch" | "memory" | "hostname")
            || is_mount_key(key)
            || key.starts_with("lxc.")
            || is_numbered(key, "net");
        if is_used {
            continue;
        }
        let is_known = NO_EFFECT.contains(&key)
            || matches!(key, "cores" | "cpulimit" | "features")
            || is_numbered(key, "unused");
        let list = if is_known { &mut out.ignored } else { &mut out.unknown };
        list.push(key.to_owned());
    }
    Ok(out)
}

/// The bridges of the host that a container is to be connected to, with their keys.
pub(crate) fn bridges(config: &CtConfig) -> Vec<(String, String)> {
    let networks = config.lines().pairs().filter(|(key, _)| is_numbered(key, "net"));
    let bridge = |(key, value): (&str, &str)| {
        let list = OptionList::parse(value).ok()?;
        Some((key.to_owned(), list.get("bridge")?.to_owned()))
    };
    networks.filter_map(bridge).collect()
}

fn is_numbered(key: &str, prefix: &str) -> bool {
    matches!(split_numbered(key), Some((p, _)) if p == prefix)
}

/// A word that ends no line and begins none.
fn plain<'a>(value: &'a str, key: &str) -> Result<&'a str, CtError> {
    let is_plain = value.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:/".contains(&b));
    if is_plain && !value.is_empty() {
        return Ok(value);
    }
    Err(CtError::Invalid(format!("'{key}: {value}' has characters that are not allowed there.")))
}

fn memory(value: &str, cgroups: Cgroups, line: &mut impl FnMut(&str, &str)) -> Result<(), CtError> {
    let fault = || CtError::Invalid(format!("'memory: {value}' is no number of MiB."));
    let mib: u64 = value.parse().map_err(|_| fault())?;
    let bytes = mib.checked_mul(1 << 20).filter(|bytes| *bytes > 0).ok_or_else(fault)?;
    let key = match cgroups {
        Cgroups::V1 => "lxc.cgroup.memory.limit_in_bytes",
        Cgroups::V2 => "lxc.cgroup2.memory.max",
    };
    line(key, &bytes.to_string());
    Ok(())
}

/// `net0: name=eth0,bridge=vmbr0,hwaddr=…,ip=10.0.0.2/24,gw=10.0.0.1`
fn network(
    index: u32,
    key: &str,
    value: &str,
    line: &mut impl FnMut(&str, &str),
) -> Result<(), CtError> {
    let list = OptionList::parse(value).map_err(CtError::Invalid)?;
    let mut set = |name: &str, value: &str| line(&format!("lxc.net.{index}.{name}"), value);
    set("type", "veth");
    for (option, name) in
        [("bridge", "link"), ("name", "name"), ("hwaddr", "hwaddr"), ("mtu", "mtu")]
    {
        if let Some(value) = list.get(option) {
            set(name, plain(value, key)?);
        }
    }
    for (ip, gw, address, gateway) in [
        ("ip", "gw", "ipv4.address", "ipv4.gateway"),
        ("ip6", "gw6", "ipv6.address", "ipv6.gateway"),
    ] {
        // What the container sets by itself begins with a letter: dhcp, auto, manual.
        if let Some(value) = list.get(ip).filter(|v| v.starts_with(|c: char| c.is_ascii_hexdigit()))
        {
            if value.contains('/') {
                set(address, plain(value, key)?);
            }
            if let Some(value) = list.get(gw) {
                set(gateway, plain(value, key)?);
            }
        }
    }
    set("flags", "up");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(text: &str) -> LxcConfig {
        let config = CtConfig::parse(text);
        translate(&config, Path::new("/root"), Cgroups::V1).unwrap()
    }

    #[test]
    fn a_configuration_becomes_lxc_s() {
        let lxc = translated(
            "arch: amd64\nhostname: web\nmemory: 64\nrootfs: local:200/a.raw\nunprivileged: 1\n\
             net0: name=eth0,bridge=br0,ip=10.0.0.2/24,gw=10.0.0.1,type=veth\n\
             mp0: local:200/b.raw,mp=/srv\nunused0: local:200/c.raw\nfuture: 1\n\
             lxc.mount.auto: proc:rw\n",
        );
        for line in [
            "lxc.rootfs.path = dir:/root\n",
            "lxc.uts.name = web\n",
            "lxc.idmap = u 0 100000 65536\n",
            "lxc.idmap = g 0 100000 65536\n",
            "lxc.cgroup.memory.limit_in_bytes = 67108864\n",
            "lxc.net.0.link = br0\n",
            "lxc.net.0.ipv4.address = 10.0.0.2/24\n",
            "lxc.net.0.ipv4.gateway = 10.0.0.1\n",
            "lxc.mount.auto = proc:rw\n",
        ] {
            assert!(lxc.text.contains(line), "{line}: {}", lxc.text);
        }
        assert_eq!(lxc.unknown, ["future"]);
        assert!(!lxc.text.contains("/srv"), "volumes are mounted before LXC starts");
        assert!(translated("rootfs: local:200/a.raw\n").text.contains("lxc.net.0.type = empty\n"));
    }

    #[test]
    fn a_value_cannot_begin_a_line_of_its_own() {
        for bad in ["hostname: a b", "arch: x=y", "memory: many", "net0: bridge=a b,name=x"] {
            let config = CtConfig::parse(&format!("rootfs: local:200/a.raw\n{bad}\n"));
            assert!(translate(&config, Path::new("/r"), Cgroups::V2).is_err(), "{bad}");
        }
    }
}
