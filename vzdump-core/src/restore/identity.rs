// SPDX-License-Identifier: MIT OR Apache-2.0
//! A new identity for a restored guest: what two guests must not share when both run.

use provider_api::Uuid;

use crate::config::guest::{VmConfig, split_numbered};
use crate::config::{ConfigError, OptionList};

/// Gives a guest new network addresses and a new SMBIOS UUID.
///
/// # Errors
/// A value that cannot be in a configuration.
pub fn renew(config: &mut VmConfig) -> Result<(), ConfigError> {
    let pairs: Vec<(String, String)> =
        config.pairs().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    for (key, value) in pairs {
        let is_net = matches!(split_numbered(&key), Some(("net", _)));
        if is_net && let Ok(mut list) = OptionList::parse(&value) {
            list.named.iter_mut().filter(|(_, value)| is_mac(value)).for_each(|(_, value)| {
                *value = new_mac();
            });
            config.set(&key, &list.to_string())?;
        }
    }
    // Firmware shows it as the machine's serial number; without one QEMU has none to share.
    if let Some(mut list) = config.get("smbios1").and_then(|value| OptionList::parse(value).ok())
        && list.get("uuid").is_some()
    {
        list.set("uuid", &Uuid::new_v4().to_string());
        config.set("smbios1", &list.to_string())?;
    }
    Ok(())
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    let is_byte =
        |part: &&str| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    parts.len() == 6 && parts.iter().all(is_byte)
}

/// A random address of the range that everybody may use.
fn new_mac() -> String {
    let mut bytes = [0; 6];
    // The last bytes of a version 4 UUID are random throughout.
    bytes.copy_from_slice(&Uuid::new_v4().as_bytes()[10..]);
    // Locally administered, and of one machine.
    bytes[0] = bytes[0] & 0xfc | 0x02;
    bytes.map(|byte| format!("{byte:02X}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_guests_must_not_share_is_new() {
        let text = "net0: virtio=BC:24:11:00:00:01,bridge=vmbr0\n\
                    net1: model=e1000,macaddr=BC:24:11:00:00:02\nnet2: virtio\n\
                    smbios1: uuid=11111111-1111-4111-8111-111111111111,serial=x\n";
        let mut config = VmConfig::parse(text);
        renew(&mut config).unwrap();
        for (key, name) in [("net0", "virtio"), ("net1", "macaddr")] {
            let list = OptionList::parse(config.get(key).unwrap()).unwrap();
            let mac = list.get(name).unwrap();
            assert!(is_mac(mac) && !text.contains(mac), "{mac}");
            let first = u8::from_str_radix(&mac[..2], 16).unwrap();
            assert_eq!(first & 3, 2, "{mac}");
        }
        assert!(config.get("net0").unwrap().ends_with(",bridge=vmbr0"));
        assert_eq!(config.get("net2"), Some("virtio"));
        let smbios = config.get("smbios1").unwrap();
        assert!(!smbios.contains("1111-1111") && smbios.ends_with(",serial=x"), "{smbios}");
    }

    #[test]
    fn addresses_are_all_different() {
        let all: std::collections::HashSet<String> = (0..100).map(|_| new_mac()).collect();
        assert_eq!(all.len(), 100);
        assert!(!is_mac("00:11:22:33:44") && !is_mac("00:11:22:33:44:5g"));
    }
}
