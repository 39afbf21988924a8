// SPDX-License-Identifier: MIT OR Apache-2.0
//! The configuration of a restored container. What an archive says is untrusted: a configuration can name
//! programs, devices and directories of the host, and ids that are root there.

use std::collections::BTreeMap;

use vzdump_core::config::container::CtConfig;
use vzdump_core::config::guest::split_numbered;
use vzdump_core::restore::{add_unused, identity};

use super::CtRestoreOptions;
use super::old::Fates;
use crate::CtError;

/// Begins the keys of lines that are LXC's own, of which each counts.
const RAW_PREFIX: &str = "lxc.";

/// What the configuration is made from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Merge<'a> {
    /// Values of the mounts that are restored, by their keys.
    pub(super) volumes: &'a BTreeMap<String, String>,
    pub(super) options: &'a CtRestoreOptions,
    /// The container that is replaced.
    pub(super) old: Option<(&'a CtConfig, &'a Fates)>,
}

/// Makes the new configuration from the archive's; returns what was changed, in words.
pub(super) fn rewrite(
    archived: &CtConfig,
    merge: Merge<'_>,
) -> Result<(CtConfig, Vec<String>), CtError> {
    let mut warnings = Vec::new();
    let mut config = CtConfig::parse(&archived.lines().for_backup().to_string());
    drop_doubles(&mut config)?;
    for entry in archived.mounts()? {
        let stays = merge.old.and_then(|(_, fates)| fates.stays.get(&entry.key));
        if let Some(value) = merge.volumes.get(&entry.key).or(stays) {
            config.lines_mut().set(&entry.key, value)?;
        } else if !(entry.is_bind() && merge.options.allow_raw_config) {
            config.lines_mut().remove(&entry.key);
            warnings.push(match entry.is_bind() {
                true => reaches_the_host(&entry.key, &entry.volume),
                false => format!("dropped '{}': it is not in the archive", entry.key),
            });
        }
    }
    drop_raw(&mut config, merge, &mut warnings);
    if archived.is_unprivileged() {
        config.lines_mut().set("unprivileged", "1")?;
    }
    if merge.options.unique {
        identity::renew(config.lines_mut())?;
    }
    if config.lines_mut().remove("template") {
        warnings.push("dropped 'template': the restored container is none".to_owned());
    }
    if let Some((_, fates)) = merge.old {
        add_unused(config.lines_mut(), &fates.unused).map_err(CtError::Invalid)?;
    }
    check_ids(&config, merge.options)?;
    // That it makes sense.
    config.mounts()?;
    Ok((config, warnings))
}

fn reaches_the_host(key: &str, value: &str) -> String {
    format!(
        "dropped '{key}: {value}': it gives the container access to the host; use \
         --allow-raw-config to keep it"
    )
}

/// Drops lines that reach the host, unless that is asked for or the container that is replaced has them.
fn drop_raw(config: &mut CtConfig, merge: Merge<'_>, warnings: &mut Vec<String>) {
    if merge.options.allow_raw_config {
        return;
    }
    let mut lines: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (key, value) in config.lines().pairs() {
        let is_device = matches!(split_numbered(key), Some(("dev", _)));
        if key.starts_with(RAW_PREFIX) || key == "hookscript" || is_device {
            lines.entry(key.to_owned()).or_default().push(value.to_owned());
        }
    }
    for (key, values) in lines {
        // What the container has today the administrator of this host has allowed.
        let has = |value: &String| {
            merge.old.is_some_and(|(old, _)| old.lines().pairs().any(|has| has == (&key, value)))
        };
        if !values.iter().all(has) {
            config.lines_mut().remove(&key);
            warnings.extend(values.iter().map(|value| reaches_the_host(&key, value)));
        }
    }
}

/// Of a key that is there more than once the last counts; the others could hide something.
fn drop_doubles(config: &mut CtConfig) -> Result<(), CtError> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for (key, _) in config.lines().pairs().filter(|(key, _)| !key.starts_with(RAW_PREFIX)) {
        *counts.entry(key.to_owned()).or_default() += 1;
    }
    for key in counts.into_iter().filter(|(_, count)| *count > 1).map(|(key, _)| key) {
        if let Some(value) = config.lines().get(&key).map(str::to_owned) {
            config.lines_mut().remove(&key);
            config.lines_mut().set(&key, &value)?;
        }
    }
    Ok(())
}

/// Root of the host is nobody in a container unless that is asked for, whatever lines were kept.
fn check_ids(config: &CtConfig, options: &CtRestoreOptions) -> Result<(), CtError> {
    let ids = config.id_map()?;
    if options.privileged || !(ids.is_empty() || ids.iter().any(|range| range.host_id == 0)) {
        return Ok(());
    }
    Err(CtError::Invalid(
        "The archive is of a privileged container, whose root is root on this host, too. Use \
         --privileged if you trust all that is in it."
            .to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARCHIVED: &str = "hostname: web\nlxc.idmap: u 0 0 65536\nlxc.idmap: g 0 0 65536\n\
         hookscript: local:a\nlxc.mount.entry: /etc srv none bind\ndev0: /dev/sda\n\
         unused0: local:200/x.raw\nrootfs: /\nrootfs: local:200/a.raw,size=1G\n\
         mp0: /data,mp=/data\nmp1: local:200/b.raw,mp=/b\ntemplate: 1\nlock: backup\n";

    fn merged(
        options: &CtRestoreOptions,
        old: Option<(&CtConfig, &Fates)>,
    ) -> Result<(String, Vec<String>), CtError> {
        let volumes = [("rootfs".to_owned(), "local:300/n.raw,size=1G".to_owned())].into();
        let merge = Merge { volumes: &volumes, options, old };
        let (config, warnings) = rewrite(&CtConfig::parse(ARCHIVED), merge)?;
        Ok((config.to_string(), warnings))
    }

    #[test]
    fn what_reaches_the_host_is_dropped_and_ids_are_the_usual_ones() {
        let (config, warnings) = merged(&CtRestoreOptions::default(), None).unwrap();
        assert_eq!(config, "hostname: web\nrootfs: local:300/n.raw,size=1G\nunprivileged: 1\n");
        assert_eq!(warnings.len(), 8, "{warnings:?}");
        assert_eq!(CtConfig::parse(&config).id_map().unwrap()[0].host_id, 100_000);
    }

    #[test]
    fn raw_lines_alone_make_nobody_root_of_the_host() {
        let raw = CtRestoreOptions { allow_raw_config: true, ..CtRestoreOptions::default() };
        let refused = merged(&raw, None).unwrap_err().to_string();
        assert!(refused.contains("Use --privileged"), "{refused}");
        let both = CtRestoreOptions { privileged: true, ..raw };
        let (config, _) = merged(&both, None).unwrap();
        for line in ["lxc.mount.entry: /etc srv", "mp0: /data,mp=/data", "dev0:", "hookscript:"] {
            assert!(config.contains(line), "{line}: {config}");
        }
        assert!(!config.contains("mp1") && !config.contains("unused0"), "{config}");
    }

    #[test]
    fn a_container_that_is_replaced_keeps_what_its_administrator_allowed() {
        let old = CtConfig::parse(
            "lxc.mount.entry: /etc srv none bind\ndev0: /dev/sdb\nrootfs: local:300/o.raw\n",
        );
        let fates = Fates {
            stays: [("mp0".to_owned(), "/data,mp=/data".to_owned())].into(),
            unused: ["local:300/u.raw".to_owned()].into(),
            ..Fates::default()
        };
        let (config, _) = merged(&CtRestoreOptions::default(), Some((&old, &fates))).unwrap();
        assert_eq!(
            config,
            "hostname: web\nlxc.mount.entry: /etc srv none bind\nmp0: /data,mp=/data\n\
             rootfs: local:300/n.raw,size=1G\nunprivileged: 1\nunused0: local:300/u.raw\n"
        );
    }

    #[test]
    fn network_addresses_are_new_on_demand() {
        let archived = CtConfig::parse(
            "rootfs: local:200/a.raw\nunprivileged: 1\n\
             net0: name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:00:01,type=veth\n",
        );
        let options = CtRestoreOptions { unique: true, ..CtRestoreOptions::default() };
        let volumes = [("rootfs".to_owned(), "local:300/n.raw".to_owned())].into();
        let merge = Merge { volumes: &volumes, options: &options, old: None };
        let net = rewrite(&archived, merge).unwrap().0.lines().get("net0").unwrap().to_owned();
        assert!(!net.contains("BC:24:11:00:00:01"), "{net}");
        assert!(net.starts_with("name=eth0,bridge=vmbr0,hwaddr="), "{net}");
    }
}
