// SPDX-License-Identifier: MIT OR Apache-2.0
//! Results of a case, and tables of them for people.

use serde::Serialize;

use crate::cases::Case;
use crate::goals::Verdict;
use crate::sample::{Metric, Sample};
use crate::setup_time::SetupTimes;
use crate::stats::{Estimate, estimate, ratio};

/// The runs of one case: by mode, in the order of the rounds.
#[derive(Debug, Clone, Serialize)]
pub struct CaseResult {
    /// What was run.
    pub case: Case,
    /// By mode and round; a failed run is `None`.
    pub samples: Vec<Vec<Option<Sample>>>,
    /// The offered rates of the rounds, where one is offered.
    pub rates: Vec<u32>,
    /// What failed.
    pub errors: Vec<String>,
}

impl CaseResult {
    /// Nothing yet.
    #[must_use]
    pub fn new(case: Case) -> Self {
        let samples = vec![Vec::new(); case.modes.len()];
        Self { case, samples, rates: Vec::new(), errors: Vec::new() }
    }

    /// Adds the run of a mode in the next round.
    pub fn add(&mut self, mode: usize, sample: Option<Sample>) {
        self.samples[mode].push(sample);
    }

    fn values(&self, mode: &str, of: impl Fn(&Sample) -> Option<f64>) -> Vec<Option<f64>> {
        let index = self.case.modes.iter().position(|known| known.name == mode);
        index.map_or_else(Vec::new, |index| {
            self.samples[index].iter().map(|sample| of(sample.as_ref()?)).collect()
        })
    }

    /// The median of a number.
    #[must_use]
    pub fn median(&self, mode: &str, of: impl Fn(&Sample) -> Option<f64>) -> Option<Estimate> {
        let values: Vec<f64> = self.values(mode, of).into_iter().flatten().collect();
        estimate(&values)
    }

    /// The ratio of a number between two modes.
    #[must_use]
    pub fn ratio(&self, metric: Metric, mode: &str, against: &str) -> Option<Estimate> {
        let of = |mode| self.values(mode, |sample| metric.of(sample));
        ratio(&of(mode), &of(against))
    }
}

impl CaseResult {
    /// The ratio of the CPU time that ours adds to a request to what QEMU's filter adds: without
    /// that of the server, which both have.
    #[must_use]
    pub fn added_cpu(&self) -> Option<Estimate> {
        let of = |mode| self.values(mode, |sample| Metric::Cpu.of(sample));
        let none = of("none");
        let added = |mode| -> Vec<Option<f64>> {
            of(mode).iter().zip(&none).map(|(with, without)| Some((*with)? - (*without)?)).collect()
        };
        ratio(&added("ours"), &added("c"))
    }
}

/// A table with aligned columns.
#[derive(Debug, Default)]
pub struct Table {
    /// The first one is the head.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// Only a head.
    #[must_use]
    pub fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(ToString::to_string).collect()] }
    }

    fn widths(&self) -> Vec<usize> {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |row: &Vec<String>, n: usize| row.get(n).map_or(0, |cell| cell.chars().count());
        (0..columns).map(|n| self.rows.iter().map(|row| width(row, n)).max().unwrap_or(0)).collect()
    }

    /// The first column to the left, all others to the right.
    #[must_use]
    pub fn text(&self, markdown: bool) -> String {
        let widths = self.widths();
        let (edge, gap) = if markdown { ("| ", " | ") } else { ("", "  ") };
        let mut text = String::new();
        for (number, row) in self.rows.iter().enumerate() {
            let cells: Vec<String> = row
                .iter()
                .zip(&widths)
                .enumerate()
                .map(
                    |(n, (cell, width))| {
                        if n == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
                    },
                )
                .collect();
            let line = format!("{edge}{}{}", cells.join(gap), if markdown { " |" } else { "" });
            text.push_str(line.trim_end());
            text.push('\n');
            if number == 0 && markdown {
                let rules: Vec<&str> =
                    (0..row.len()).map(|n| if n == 0 { "---" } else { "---:" }).collect();
                text.push_str(&format!("| {} |\n", rules.join(" | ")));
            }
        }
        text
    }
}

/// A number with three digits that matter.
#[must_use]
pub fn number(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(value) if value.abs() >= 100.0 => format!("{value:.0}"),
        Some(value) if value.abs() >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

/// A median with its interval.
#[must_use]
pub fn with_range(value: Option<Estimate>) -> String {
    value.map_or_else(
        || "-".into(),
        |found| {
            let [median, low, high] =
                [found.median, found.low, found.high].map(|v| number(Some(v)));
            format!("{median} [{low}, {high}]")
        },
    )
}

/// One case: a line for each mode, then the ratios.
#[must_use]
pub fn case_text(result: &CaseResult, markdown: bool) -> String {
    let mut text = format!("\n{}{}\n\n", if markdown { "### " } else { "== " }, result.case.name);
    let mut table = Table::new(&[
        "mode",
        "IOPS",
        "MB/s",
        "mean µs",
        "p99 µs",
        "p99.9 µs",
        "w-amp",
        "r-amp",
        "reader MB/s",
        "CPU µs/IO",
        "RAM MB",
        "peak MB",
    ]);
    for mode in &result.case.modes {
        let median =
            |of: &dyn Fn(&Sample) -> Option<f64>| result.median(mode.name, of).map(|e| e.median);
        let metric = |metric: Metric| number(median(&|sample| metric.of(sample)));
        let guest_mb_s = |sample: &Sample| {
            (sample.guest.ios > 0).then(|| sample.guest.bytes as f64 / 1e6 / sample.guest.seconds)
        };
        table.rows.push(vec![
            mode.name.to_owned(),
            metric(Metric::Iops),
            number(median(&guest_mb_s)),
            metric(Metric::Mean),
            metric(Metric::P99),
            metric(Metric::P999),
            number(median(&|sample| sample.write_amplification)),
            number(median(&|sample| sample.read_amplification)),
            metric(Metric::Reader),
            metric(Metric::Cpu),
            number(median(&|sample| Some(sample.resident_mb))),
            number(median(&|sample| Some(sample.peak_mb))),
        ]);
    }
    text.push_str(&table.text(markdown));
    text.push('\n');
    text.push_str(&ratios_text(result, markdown));
    if let Some(added) = result.added_cpu().filter(|_| !result.case.work.on_disk()) {
        let added = with_range(Some(added));
        text.push_str(&format!("\nCPU added by the filter, ours / c: {added}\n"));
    }
    if !result.rates.is_empty() {
        text.push_str(&format!("\noffered requests per second, by round: {:?}\n", result.rates));
    }
    for error in &result.errors {
        text.push_str(&format!("\nFAILED {error}\n"));
    }
    text
}

const COMPARED: &[(&str, &str)] = &[
    ("ours", "none"),
    ("ours", "c"),
    ("c", "none"),
    ("ours-gen", "ceiling"),
    ("ours", "ceiling"),
    ("none-gen", "none"),
    ("ours-gen", "ours"),
];

fn ratios_text(result: &CaseResult, markdown: bool) -> String {
    use Metric::{Cpu, FleecingPerWrite, Iops, Mean, P99, P999, Reader};
    let metrics = [Iops, Mean, P99, P999, Reader, Cpu, FleecingPerWrite];
    let used: Vec<Metric> = metrics
        .into_iter()
        .filter(|metric| COMPARED.iter().any(|(a, b)| result.ratio(*metric, a, b).is_some()))
        .collect();
    let mut head = vec!["ratio"];
    head.extend(used.iter().map(|metric| metric.name()));
    let mut table = Table::new(&head);
    let mut confidence = None;
    for (a, b) in COMPARED {
        let found: Vec<_> = used.iter().map(|metric| result.ratio(*metric, a, b)).collect();
        if let Some(first) = found.iter().flatten().next() {
            confidence = confidence.or(Some((first.confidence, first.count)));
            let mut row = vec![format!("{a} / {b}")];
            row.extend(found.into_iter().map(with_range));
            table.rows.push(row);
        }
    }
    let mut text = table.text(markdown);
    if let Some((confidence, rounds)) = confidence {
        let per_cent = confidence * 100.0;
        text.push_str(&format!(
            "\nmedians of {rounds} rounds; ratios paired by round [interval of the median, {per_cent:.0} %]\n"
        ));
    }
    text
}

/// The time all guest I/O is held.
#[must_use]
pub fn setup_text(setup: &SetupTimes, markdown: bool) -> String {
    let mut text = format!(
        "\n{}setup of 8 disks of 1 TiB with bitmaps\n\n",
        if markdown { "### " } else { "== " }
    );
    let mut table = Table::new(&["drained", "median ms", "longest ms"]);
    for (name, values) in [("8 disks, bitmaps", &setup.large_ms), ("empty", &setup.empty_ms)] {
        let longest = values.iter().copied().fold(0.0, f64::max);
        let median = estimate(values).map(|found| found.median);
        table.rows.push(vec![
            name.into(),
            format!("{:.3}", median.unwrap_or(0.0)),
            format!("{longest:.3}"),
        ]);
    }
    text.push_str(&table.text(markdown));
    if let Some(found) = setup.difference_ms {
        text.push_str(&format!(
            "\ndifference: {:.3} ms [{:.3}, {:.3}], {} runs\n",
            found.median, found.low, found.high, found.count
        ));
    }
    text
}

/// The goals.
#[must_use]
pub fn goals_text(verdicts: &[Verdict], markdown: bool) -> String {
    let mut text = format!("\n{}goals\n\n", if markdown { "### " } else { "== " });
    let mut table = Table::new(&["goal", "wanted", "measured", "reached"]);
    for verdict in verdicts {
        let reached = match verdict.reached {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "not measured",
        };
        let measured = verdict.measured.map_or_else(
            || "-".into(),
            |m| format!("{:.3} [{:.3}, {:.3}]", m.median, m.low, m.high),
        );
        table.rows.push(vec![
            verdict.goal.clone(),
            verdict.bound.clone(),
            measured,
            reached.into(),
        ]);
    }
    text.push_str(&table.text(markdown));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_and_become_markdown() {
        let mut table = Table::new(&["a", "µs"]);
        table.rows.push(vec!["long".into(), "1".into()]);
        assert_eq!(table.text(false), "a     µs\nlong   1\n");
        assert_eq!(table.text(true), "| a    | µs |\n| --- | ---: |\n| long |  1 |\n");
    }

    #[test]
    fn numbers_are_short() {
        let shown = [Some(1234.5), Some(12.34), Some(0.123), None].map(number);
        assert_eq!(shown, ["1234", "12.3", "0.12", "-"]);
    }

    #[test]
    fn added_cpu_leaves_the_server_out() {
        let case = crate::cases::all().into_iter().find(|case| !case.work.on_disk()).unwrap();
        let mut result = CaseResult::new(case);
        for (mode, cpu) in [10.0, 14.0, 13.0].into_iter().enumerate() {
            let cpu_us_per_io = Some(cpu);
            result.add(mode, Some(Sample { cpu_us_per_io, ..Sample::default() }));
        }
        assert_eq!(result.added_cpu().unwrap().median, 0.75);
        assert!(case_text(&result, false).contains("ours / c: 0.75"));
    }

    #[test]
    fn an_empty_case_has_a_table() {
        let case = crate::cases::all().swap_remove(0);
        let text = case_text(&CaseResult::new(case), false);
        assert!(text.contains("ours-gen") && text.contains("4k-qd16/direct/raw/limited/1g"));
    }
}
