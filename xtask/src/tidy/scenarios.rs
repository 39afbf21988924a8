// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests that `docs/scenarios.md` names exist: the page is worth nothing once it does not hold.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Rule;

const PAGE: &str = "docs/scenarios.md";

/// Compares the page with the Rust files among `files`.
pub(super) fn check(root: &Path, files: &[String]) -> Result<Rule> {
    let read = |file: &str| {
        let path = root.join(file);
        fs::read_to_string(&path).with_context(|| format!("{}: cannot read", path.display()))
    };
    let mut functions = BTreeSet::new();
    for file in files.iter().filter(|file| file.ends_with(".rs")) {
        functions.extend(functions_of(&read(file)?));
    }
    let mut broken = Vec::new();
    for (index, line) in read(PAGE)?.lines().enumerate() {
        let faults = faults(line, &functions);
        broken.extend(faults.into_iter().map(|what| format!("{PAGE}:{}: {what}", index + 1)));
    }
    Ok(Rule { name: "tests that the scenarios name exist", broken })
}

fn functions_of(text: &str) -> Vec<String> {
    let names = text.lines().filter_map(|line| {
        let (before, rest) = line.split_once("fn ")?;
        let is_function = before.split_whitespace().all(|word| {
            matches!(word, "async" | "pub" | "const" | "unsafe") || word.starts_with("pub(")
        });
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?;
        is_function.then(|| rest[..end].to_owned())
    });
    names.collect()
}

/// What is wrong with a line of the page; only rows with a number are looked at.
fn faults(line: &str, functions: &BTreeSet<String>) -> Vec<String> {
    let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
    let [number, _, _, tests] = cells[..] else { return Vec::new() };
    if !number.starts_with(|c: char| c.is_ascii_digit()) {
        return Vec::new();
    }
    let named: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
    if named.is_empty() {
        return vec![format!("scenario {number} has no test")];
    }
    let missing = named.into_iter().filter(|name| !functions.contains(*name));
    missing.map(|name| format!("there is no test '{name}'")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_without_a_test_and_tests_that_are_gone_are_found() {
        let text = "    async fn here() {}\nfn too() {}\n// fn not_this()\n";
        let functions: BTreeSet<String> = functions_of(text).into_iter().collect();
        assert_eq!(functions.len(), 2, "{functions:?}");
        let faults = |line| faults(line, &functions);
        assert!(faults("| 1 | a | b | `here`, `too` |").is_empty());
        assert!(faults("| no. | a | b | tests |").is_empty());
        assert_eq!(faults("| 2 | a | b | `here`, `gone` |"), ["there is no test 'gone'"]);
        assert_eq!(faults("| 3-4 | a | b |  |"), ["scenario 3-4 has no test"]);
    }
}
