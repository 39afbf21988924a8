// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table at the end of the demo.

use std::fmt;
use std::time::Duration;

use crate::lab::Backup;

const TITLES: [&str; 7] = [
    "step",
    "size",
    "transferred",
    "time",
    "longest stall (QEMU)",
    "longest stall (guest)",
    "result",
];

/// One step: its name and what was measured, empty where nothing was.
#[derive(Debug, Clone, Default)]
pub struct Row([String; TITLES.len()]);

impl Row {
    /// A step that took this long and went well.
    #[must_use]
    pub fn new(step: &str, took: Duration) -> Self {
        let mut row = Self::default();
        row.0[0] = step.to_owned();
        row.0[3] = format!("{:.1} s", took.as_secs_f64());
        row.0[6] = "ok".to_owned();
        row
    }

    /// A backup.
    #[must_use]
    pub fn of_backup(step: &str, backup: &Backup) -> Self {
        let mut row = Self::new(step, backup.duration).size(backup.disks_bytes);
        row.0[2] = bytes(backup.read_bytes);
        row.0[4] = millis(backup.longest_delay);
        row
    }

    /// With the size of the disks.
    #[must_use]
    pub fn size(mut self, size_bytes: u64) -> Self {
        self.0[1] = bytes(size_bytes);
        self
    }

    /// With the longest write the guest saw.
    #[must_use]
    pub fn stall(mut self, longest: Duration) -> Self {
        self.0[5] = millis(longest);
        self
    }

    /// With another result than "ok".
    #[must_use]
    pub fn result(mut self, text: &str) -> Self {
        self.0[6] = text.to_owned();
        self
    }
}

/// Rows under titles; printed as text.
#[derive(Debug, Clone, Default)]
pub struct Table(Vec<Row>);

impl Table {
    /// Adds a step.
    pub fn add(&mut self, row: Row) {
        self.0.push(row);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let titles = Row(TITLES.map(str::to_owned));
        let rows = || std::iter::once(&titles).chain(&self.0);
        let mut widths = [0; TITLES.len()];
        for row in rows() {
            for (width, cell) in widths.iter_mut().zip(&row.0) {
                *width = (*width).max(cell.chars().count());
            }
        }
        for (index, row) in rows().enumerate() {
            let mut line = String::new();
            for (column, (cell, width)) in row.0.iter().zip(widths).enumerate() {
                // Numbers stand at the right, words at the left.
                if (1..6).contains(&column) {
                    line.push_str(&format!("{cell:>width$}  "));
                } else {
                    line.push_str(&format!("{cell:<width$}  "));
                }
            }
            writeln!(out, "{}", line.trim_end())?;
            if index == 0 {
                let total: usize = widths.iter().sum::<usize>() + 2 * (widths.len() - 1);
                writeln!(out, "{}", "-".repeat(total))?;
            }
        }
        Ok(())
    }
}

/// A number of bytes for people.
#[must_use]
pub fn bytes(count: u64) -> String {
    format!("{:.1} MiB", count as f64 / f64::from(1 << 20))
}

fn millis(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::default();
        table.add(Row::new("one", Duration::from_millis(1500)).size(3 << 19));
        table.add(Row::new("another", Duration::from_secs(100)).stall(Duration::from_micros(900)));
        let text = table.to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[2].contains("1.5 MiB") && lines[2].contains("  1.5 s"), "{text}");
        assert_eq!(lines[2].find(" s "), lines[3].find(" s "), "{text}");
        assert_eq!(lines[0].find("result"), lines[3].rfind("ok"), "{text}");
    }
}
