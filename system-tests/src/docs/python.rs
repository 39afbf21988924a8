// SPDX-License-Identifier: MIT OR Apache-2.0
//! Events as `qmp-shell` prints them: dictionaries of Python, one in a line.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use serde_json::{Map, Value};

/// The order in which QEMU sends the members of an event.
const ORDER: [&str; 3] = ["timestamp", "event", "data"];

/// Reads one.
pub(super) fn parse(line: &str) -> Result<Value> {
    let mut json = String::with_capacity(line.len());
    let mut chars = line.chars();
    let mut word = String::new();
    while let Some(c) = chars.next() {
        if c.is_alphabetic() {
            word.push(c);
            continue;
        }
        json.push_str(match std::mem::take(&mut word).as_str() {
            "True" => "true",
            "False" => "false",
            "None" => "null",
            other => other,
        });
        if c == '\'' || c == '"' {
            let mut text = String::new();
            loop {
                match chars.next().context("a text does not end")? {
                    '\\' => text.push(chars.next().context("a text ends with \\")?),
                    end if end == c => break,
                    other => text.push(other),
                }
            }
            json.push_str(&Value::String(text).to_string());
        } else {
            json.push(c);
        }
    }
    serde_json::from_str(&json).with_context(|| format!("not an event: {line}"))
}

/// Writes one.
pub(super) fn print(value: &Value) -> String {
    let mut out = String::new();
    put(value, &mut out);
    out
}

fn put(value: &Value, out: &mut String) {
    match value {
        Value::Null => out.push_str("None"),
        Value::Bool(true) => out.push_str("True"),
        Value::Bool(false) => out.push_str("False"),
        Value::Number(number) => drop(write!(out, "{number}")),
        Value::String(text) => put_text(text, out),
        Value::Array(values) => {
            out.push('[');
            for (index, value) in values.iter().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                put(value, out);
            }
            out.push(']');
        }
        Value::Object(members) => {
            out.push('{');
            for (index, name) in in_order(members).into_iter().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                put_text(name, out);
                out.push_str(": ");
                put(&members[name], out);
            }
            out.push('}');
        }
    }
}

fn in_order(members: &Map<String, Value>) -> Vec<&str> {
    let mut names: Vec<&str> = members.keys().map(String::as_str).collect();
    names.sort_by_key(|name| ORDER.iter().position(|first| first == name).unwrap_or(ORDER.len()));
    names
}

fn put_text(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        if c == quote || c == '\\' {
            out.push('\\');
        }
        out.push(c);
    }
    out.push(quote);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_are_read_and_written_as_python_does() {
        let line = "{'timestamp': {'seconds': 5}, 'event': 'X_Y', 'data': {'a': [True, None], \
            'b': \"device 'd'\", 'c': 'both \\' and \"', 'd': False, 'e': -1}}";
        let value = json!({ "timestamp": { "seconds": 5 }, "event": "X_Y", "data": {
            "a": [true, null], "b": "device 'd'", "c": "both ' and \"", "d": false, "e": -1 } });
        assert_eq!(parse(line).unwrap(), value);
        assert_eq!(print(&value), line);
        for bad in ["{'a': ", "{'a", "{'a': x}", "{'a': 'b\\"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
