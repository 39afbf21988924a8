// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is printed: text for people or one JSON document for programs, and failures.

use std::io::Write;

use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde_json::{Value, json};
use vzdump_host::{HostError, chain};

use crate::args::Format;

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct Failure {
    /// One line.
    message: String,
    /// What to do, where that is known.
    advice: Option<String>,
}

impl From<HostError> for Failure {
    fn from(error: HostError) -> Self {
        Self { message: chain(&error), advice: error.advice() }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { message: format!("{error:#}"), advice: None }
    }
}

/// Where results go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    format: Format,
}

impl Output {
    pub(crate) fn new(format: Format) -> Self {
        Self { format }
    }

    pub(crate) fn is_json(self) -> bool {
        self.format == Format::Json
    }

    /// Prints a result in the one form or the other.
    pub(crate) fn result(self, value: &Value, text: impl FnOnce() -> String) {
        if self.is_json() { line(&value.to_string()) } else { raw(&text()) }
    }

    /// Prints why a command failed.
    pub(crate) fn failure(self, failure: &Failure) {
        if self.is_json() {
            let value = json!({ "error": failure.message, "advice": failure.advice });
            line(&value.to_string());
        }
        let mut text = format!("ERROR: {}\n", failure.message);
        if let Some(advice) = &failure.advice {
            text.push_str(&format!("       {advice}\n"));
        }
        // Nothing is left to be done when even this cannot be written.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

/// Prints one line.
pub(crate) fn line(text: &str) {
    raw(&format!("{text}\n"));
}

/// Prints text as it is. A reader that has gone away (`| head`) is no error.
pub(crate) fn raw(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// Prints a notice beside the result.
pub(crate) fn warning(text: &str) {
    let _ = writeln!(std::io::stderr(), "WARN: {text}");
}

/// A table without lines around its cells.
pub(crate) fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(header.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    // A cell has a margin on both sides; the first one would indent the whole table.
    let lines = lines.iter().map(|line| line.strip_prefix(' ').unwrap_or(line));
    lines.map(|line| format!("{line}\n")).collect()
}

/// Makes text of an archive safe for a terminal: no control characters but line breaks and tabs.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && !"\n\t".contains(c) { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_columns_and_no_margin() {
        let rows = vec![vec!["100".into(), "a".into()], vec!["7".into(), String::new()]];
        assert_eq!(table(&["ID", "NAME"], rows), "ID   NAME\n100  a\n7\n");
    }

    #[test]
    fn an_archives_text_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[2J\n\tb\r"), "a\u{fffd}[2J\n\tb\u{fffd}");
    }
}
