// SPDX-License-Identifier: MIT OR Apache-2.0
//! Generates the wire types of the backup access commands from the one QAPI file that QEMU is
//! built with, too.
//!
//! Structs, commands and events go through `qapi-codegen`. Enums do not: its enums are closed, so
//! one value of a newer QEMU would make a whole reply unreadable. They are written by hand in
//! `src/backup/types.rs`; here only their values are listed, for the test that compares the two.

use std::{env, error::Error, fmt::Write as _, fs, path::Path};

use serde_json::Value;

const SCHEMA: &str = "../qemu-ext/qapi/backup-access.json";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={SCHEMA}");
    let out_dir = env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?;
    let out_dir = Path::new(&out_dir);
    let source = fs::read_to_string(SCHEMA).map_err(|e| format!("Cannot read {SCHEMA}: {e}"))?;

    let mut statements = String::new();
    let mut values = String::from("&[\n");
    for statement in serde_json::Deserializer::from_str(&as_json(&source)).into_iter::<Value>() {
        let statement = statement.map_err(|e| format!("{SCHEMA} is not readable: {e}"))?;
        match statement.get("enum").and_then(Value::as_str) {
            Some(name) => list_values(&mut values, name, &statement)?,
            None => writeln!(statements, "{statement}")?,
        }
    }

    // The generator only opens files of this name.
    fs::write(out_dir.join("qapi-schema.json"), statements)?;
    values.push(']');
    fs::write(out_dir.join("enum_values.rs"), values)?;
    let commands = "generated::ExtensionCommand".to_owned();
    qapi_codegen::codegen(out_dir, out_dir.join("backup_access.rs"), commands)?;
    Ok(())
}

/// QAPI's language is JSON with single quotes and `#` comments.
fn as_json(source: &str) -> String {
    source.lines().filter(|line| !line.trim_start().starts_with('#')).fold(
        String::with_capacity(source.len()),
        |mut json, line| {
            json.push_str(&line.replace('\'', "\""));
            json.push('\n');
            json
        },
    )
}

/// Writes `(name, &[values]),` for an enum; a value is a string or an object with a `name`.
fn list_values(out: &mut String, name: &str, statement: &Value) -> Result<(), Box<dyn Error>> {
    let values: Vec<&str> = statement["data"]
        .as_array()
        .ok_or_else(|| format!("{SCHEMA}: {name} has no values"))?
        .iter()
        .filter_map(|value| value.as_str().or_else(|| value["name"].as_str()))
        .collect();
    writeln!(out, "    (\"{name}\", &{values:?}),")?;
    Ok(())
}
