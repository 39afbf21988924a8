// SPDX-License-Identifier: MIT OR Apache-2.0
//! The property `nodes` of a storage, the hosts that have it: `storage.cfg` may be the same file on all of them.

use vzdump_core::config::ConfigError;
use vzdump_core::config::storage::{StorageConfig, StorageSection};

/// What switches a storage off.
const DISABLE_KEY: &str = "disable";

/// The hosts that have a storage, if the host with the name `own` is none of them. An empty list restricts
/// nothing.
fn other_hosts<'a>(section: &'a StorageSection, own: &str) -> Option<&'a str> {
    let list = section.get("nodes")?;
    // As Proxmox VE separates lists.
    let is_mark = |c: char| c.is_whitespace() || ",;".contains(c);
    let mut names = list.split(is_mark).filter(|name| !name.is_empty()).peekable();
    names.peek()?;
    names.all(|name| name != own).then_some(list)
}

/// The list with every storage switched off that the host with the name `own` does not have, so that nothing
/// else has to ask for it.
///
/// # Errors
/// [`ConfigError::Invalid`], which a list that was read is not.
pub(crate) fn switch_off_others(
    storages: &StorageConfig,
    own: &str,
) -> Result<StorageConfig, ConfigError> {
    let mut here = StorageConfig::default();
    for mut section in storages.sections() {
        if other_hosts(&section, own).is_some() {
            section.properties.push((DISABLE_KEY.to_owned(), "1".to_owned()));
        }
        here.add(&section)?;
    }
    Ok(here)
}

/// Why a storage that is switched off is not used.
pub(crate) fn why_off(section: &StorageSection) -> String {
    let (id, own) = (&section.id, crate::own_name());
    match other_hosts(section, &own) {
        Some(list) => format!(
            "The storage '{id}' is for other hosts: storage.cfg has 'nodes {list}', and this is '{own}'."
        ),
        None => format!("The storage '{id}' is disabled in storage.cfg."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storage_of_other_hosts_is_switched_off_and_nothing_else_is_changed() {
        let text = "dir: every\n\tpath /a b\n\nbtrfs: mine\n\tpath /b\n\tnocow\n\tnodes one,here;two\n\n\
                    dir: empty\n\tpath /c\n\tnodes\n\ndirectory: theirs\n\tpath /d\n\tnodes one, here2\n\n\
                    odd: off\n\tdisable\n";
        let config = StorageConfig::parse(text).unwrap();
        let here = switch_off_others(&config, "here").unwrap();
        let off = |section: &StorageSection| section.is_disabled();
        let states: Vec<_> = here.sections().iter().map(off).collect();
        assert_eq!(states, [false, false, false, true, true]);
        let mut sections = here.sections();
        sections[3].properties.pop();
        assert_eq!(sections, config.sections());
    }
}
