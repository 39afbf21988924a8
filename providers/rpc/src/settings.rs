// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a storage says about itself in `storage.cfg` and in its file of secrets, checked against the
//! properties that the plugin declares.

use std::collections::HashSet;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use provider_api::{Error, Kind, Property, PropertyKind, Result};
use rustix::fs::OFlags;
use serde_json::{Map, Value, json};

use crate::wire::shorten;

/// Longest file of secrets; what it becomes as JSON fits into a pipe.
const SECRETS_BYTES_MAX: usize = 8 << 10;
/// Most properties that a plugin may declare.
pub(crate) const PROPERTIES_MAX: usize = 100;

fn invalid(why: String) -> Error {
    Error::new(Kind::Invalid, why)
}

/// Checks what a plugin declares.
pub(crate) fn check_declared(properties: &[Property]) -> std::result::Result<(), String> {
    if properties.len() > PROPERTIES_MAX {
        return Err(format!(
            "declares {} properties; {PROPERTIES_MAX} are the limit",
            properties.len()
        ));
    }
    let mut names = HashSet::new();
    for Property { name, .. } in properties {
        let bytes = name.as_bytes();
        let is_name = bytes.first().is_some_and(u8::is_ascii_lowercase)
            && bytes.len() <= 32
            && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-');
        if !is_name {
            let name = shorten(name, 40);
            return Err(format!("declares the property '{name}', which cannot be a name"));
        }
        if !names.insert(name) {
            return Err(format!("declares the property '{name}' twice"));
        }
    }
    Ok(())
}

/// The values of a storage's properties, and of its secrets.
pub(crate) struct Settings {
    pub(crate) properties: Value,
    /// JSON text; empty values are not among them.
    pub(crate) secrets: String,
}

/// Checks a storage's properties against those declared, and reads its secrets.
pub(crate) fn read(
    storage: &str,
    given: &[(String, String)],
    secrets_path: &Path,
    declared: &[Property],
) -> Result<Settings> {
    let properties = plain(storage, given, secrets_path, declared)?;
    let secrets = secret(storage, secrets_path, declared)?;
    let fault = |name: &str, place: &str| {
        Err(invalid(format!("The storage '{storage}' needs the property '{name}' in {place}.")))
    };
    for property in declared.iter().filter(|property| property.required) {
        if property.sensitive && !secrets.contains_key(&property.name) {
            let place = secrets_path.display();
            return fault(&property.name, &format!("{place}, as a line '{}: …'", property.name));
        }
        if !property.sensitive && !properties.contains_key(&property.name) {
            return fault(&property.name, "storage.cfg");
        }
    }
    Ok(Settings { properties: properties.into(), secrets: Value::from(secrets).to_string() })
}

fn plain(
    storage: &str,
    given: &[(String, String)],
    secrets_path: &Path,
    declared: &[Property],
) -> Result<Map<String, Value>> {
    let mut values = Map::new();
    for (name, text) in given {
        let Some(property) = declared.iter().find(|property| property.name == *name) else {
            let known: Vec<_> = declared.iter().map(|property| property.name.as_str()).collect();
            return Err(invalid(format!(
                "The storage '{storage}' has the property '{}', which its provider does not know; it \
                 knows: {}.",
                shorten(name, 40),
                if known.is_empty() { "none".to_owned() } else { known.join(", ") }
            )));
        };
        if property.sensitive {
            return Err(invalid(format!(
                "The property '{name}' of the storage '{storage}' is a secret; move it from \
                 storage.cfg to {} (mode 0600), as a line '{name}: …'.",
                secrets_path.display()
            )));
        }
        let value = value(property, text).map_err(|why| {
            invalid(format!("The property '{name}' of the storage '{storage}' {why}."))
        })?;
        if values.insert(name.clone(), value).is_some() {
            return Err(invalid(format!(
                "The storage '{storage}' has the property '{name}' twice."
            )));
        }
    }
    Ok(values)
}

/// The value as it is on the wire.
fn value(property: &Property, text: &str) -> std::result::Result<Value, String> {
    match property.kind {
        PropertyKind::Text if text.is_empty() => Err("has no value".to_owned()),
        PropertyKind::Text => Ok(json!(text)),
        PropertyKind::Path if Path::new(text).is_absolute() => Ok(json!(text)),
        PropertyKind::Path => Err("has to be an absolute path".to_owned()),
        PropertyKind::Number => match text.parse::<u64>() {
            Ok(number) => Ok(json!(number.to_string())),
            Err(_) => Err("has to be a whole number".to_owned()),
        },
        // As everywhere in storage.cfg, a name without a value is a switch that is on.
        PropertyKind::Flag => match text {
            "" | "1" | "yes" | "on" | "true" => Ok(json!(true)),
            "0" | "no" | "off" | "false" => Ok(json!(false)),
            _ => Err("has to be 0 or 1".to_owned()),
        },
    }
}

fn secret(storage: &str, path: &Path, declared: &[Property]) -> Result<Map<String, Value>> {
    let mut values = Map::new();
    if !declared.iter().any(|property| property.sensitive) {
        return Ok(values);
    }
    let Some(text) = read_private(path)? else { return Ok(values) };
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        // Never quotes a line: it may be a secret.
        let fault = |why: &str| invalid(format!("{} line {}: {why}.", path.display(), index + 1));
        let (name, text) = line.split_once(':').ok_or_else(|| fault("it is not 'name: value'"))?;
        let property = declared.iter().find(|p| p.sensitive && p.name == name.trim());
        let property = property.ok_or_else(|| {
            fault(&format!("the provider of '{storage}' has no secret of that name"))
        })?;
        let value = value(property, text.trim())
            .map_err(|why| fault(&format!("the property '{}' {why}", property.name)))?;
        if values.insert(property.name.clone(), value).is_some() {
            return Err(fault(&format!("the property '{}' is there twice", property.name)));
        }
    }
    Ok(values)
}

/// Reads a file that nobody else may read; none if there is none.
fn read_private(path: &Path) -> Result<Option<String>> {
    let failed =
        |error| Error::io(format!("Cannot read the secrets in {}.", path.display()), error);
    let mut options = std::fs::OpenOptions::new();
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    options.read(true).custom_flags(i32::try_from(flags.bits()).unwrap_or(0));
    let file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let meta = file.metadata().map_err(failed)?;
    let own = [0, rustix::process::geteuid().as_raw()].contains(&meta.uid());
    if !meta.is_file() || meta.mode() & 0o077 != 0 || !own {
        return Err(invalid(format!(
            "The secrets in {} can be read by others, or do not belong to root; make it a file of root \
             with the mode 0600.",
            path.display()
        )));
    }
    let mut text = String::new();
    let limit = u64::try_from(SECRETS_BYTES_MAX).unwrap_or(u64::MAX);
    file.take(limit + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() > SECRETS_BYTES_MAX {
        let place = path.display();
        return Err(invalid(format!("{place} has more than {SECRETS_BYTES_MAX} bytes.")));
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn property(name: &str, kind: PropertyKind, required: bool, sensitive: bool) -> Property {
        Property { name: name.into(), kind, required, sensitive, description: String::new() }
    }

    fn declared() -> Vec<Property> {
        vec![
            property("path", PropertyKind::Path, true, false),
            property("level", PropertyKind::Number, false, false),
            property("fast", PropertyKind::Flag, false, false),
            property("password", PropertyKind::Text, true, true),
        ]
    }

    fn read_with(given: &[(&str, &str)], secrets: Option<(&str, u32)>) -> Result<Settings> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.pw");
        if let Some((text, mode)) = secrets {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        }
        let given: Vec<_> = given.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect();
        read("store", &given, &path, &declared())
    }

    #[test]
    fn good_settings_become_json() {
        let given = [("path", "/x"), ("level", "18446744073709551615"), ("fast", "")];
        let secrets = Some(("# mine\n\npassword: a: b \n", 0o600));
        let settings = read_with(&given, secrets).unwrap();
        let expected = json!({"path": "/x", "level": "18446744073709551615", "fast": true});
        assert_eq!(settings.properties, expected);
        assert_eq!(settings.secrets, r#"{"password":"a: b"}"#);
    }

    /// Properties, the secrets' text and mode, and a part of the error.
    type Case<'a> = (&'a [(&'a str, &'a str)], Option<(&'a str, u32)>, &'a str);

    #[test]
    fn bad_settings_are_named() {
        let good = Some(("password: hush\n", 0o600));
        let cases: &[Case<'_>] = &[
            (&[("path", "/x"), ("colour", "red")], good, "'colour', which its provider does not"),
            (&[], good, "needs the property 'path' in storage.cfg"),
            (&[("path", "x")], good, "'path' of the storage 'store' has to be an absolute path"),
            (
                &[("path", "/x"), ("level", "-1")],
                good,
                "'level' of the storage 'store' has to be a",
            ),
            (&[("path", "/x"), ("fast", "maybe")], good, "has to be 0 or 1"),
            (&[("path", "/x"), ("path", "/y")], good, "'path' twice"),
            (
                &[("path", "/x"), ("password", "hush")],
                good,
                "'password' of the storage 'store' is a",
            ),
            (&[("path", "/x")], None, "needs the property 'password' in /"),
            (&[("path", "/x")], Some(("password: hush\n", 0o640)), "can be read by others"),
            (&[("path", "/x")], Some(("hush\n", 0o600)), "line 1: it is not 'name: value'"),
            (&[("path", "/x")], Some(("other: hush\n", 0o600)), "no secret of that name"),
        ];
        for (given, secrets, fault) in cases {
            let error = read_with(given, *secrets).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains(fault), "{error:?} instead of {fault:?}");
            assert!(!error.contains("hush"), "a secret is shown: {error}");
        }
    }

    #[test]
    fn declarations_are_checked() {
        assert!(check_declared(&declared()).is_ok());
        let twice = [declared(), declared()].concat();
        assert!(check_declared(&twice).unwrap_err().contains("'path' twice"));
        for bad in ["", "Path", "1x", "a_b", &"x".repeat(33)] {
            let bad = [property(bad, PropertyKind::Text, false, false)];
            assert!(check_declared(&bad).is_err());
        }
    }
}
