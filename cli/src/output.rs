// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is printed: text for people or one JSON document for programs, and failures.

use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde_json::{Value, json};
use vzdump_host::{HostError, chain};

use crate::args::Format;

/// Whether nothing but printing is left to be done.
static ONLY_PRINTING: AtomicBool = AtomicBool::new(false);
/// Whether something could not be printed.
static IS_INCOMPLETE: AtomicBool = AtomicBool::new(false);

/// Says that nothing but printing is left: a signal may end the program now, if nobody reads.
pub(crate) fn only_printing_is_left() {
    ONLY_PRINTING.store(true, Ordering::Relaxed);
}

pub(crate) fn is_only_printing_left() -> bool {
    ONLY_PRINTING.load(Ordering::Relaxed)
}

/// Whether standard output does not have all that was to be there.
pub(crate) fn is_incomplete() -> bool {
    IS_INCOMPLETE.load(Ordering::Relaxed)
}

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
    /// What is printed are events, with the result as the last one.
    is_task: bool,
}

impl Output {
    pub(crate) fn new(format: Format, is_task: bool) -> Self {
        Self { format, is_task }
    }

    pub(crate) fn is_json(self) -> bool {
        self.format == Format::Json
    }

    /// Prints a result in the one form or the other.
    pub(crate) fn result(self, value: &Value, text: impl FnOnce() -> String) {
        only_printing_is_left();
        if self.is_json() { line(&value.to_string()) } else { raw(&text()) }
    }

    /// Prints why a command failed.
    pub(crate) fn failure(self, failure: &Failure) {
        only_printing_is_left();
        if self.is_json() {
            let mut value = json!({ "error": failure.message, "advice": failure.advice });
            if self.is_task {
                value["event"] = json!("result");
                value["success"] = json!(false);
            }
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

/// Prints text as it is. A reader that has gone away (`| head`) is no error; a full disk is, and told once.
pub(crate) fn raw(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    if let Err(error) = written
        && error.kind() != ErrorKind::BrokenPipe
        && !IS_INCOMPLETE.swap(true, Ordering::Relaxed)
    {
        let _ = writeln!(std::io::stderr(), "ERROR: cannot write the output: {error}");
    }
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

/// Text of an archive, made safe if it goes to a terminal; files and programs get what the archive has.
pub(crate) fn archived(text: &str) -> String {
    if std::io::stdout().is_terminal() { printable(text) } else { text.to_owned() }
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
