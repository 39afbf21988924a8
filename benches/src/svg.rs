// SPDX-License-Identifier: MIT OR Apache-2.0
//! Plots: lines over time, and bars with their intervals.

use std::fmt::Write;

use crate::stats::Estimate;

const WIDTH: f64 = 900.0;
const LINE_HEIGHT: f64 = 420.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 50.0;
/// Distinct for most people who see colours differently.
const COLOURS: &[&str] = &["#888888", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00"];
const BAR: f64 = 14.0;
const LABELS: f64 = 300.0;

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

struct Drawing {
    text: String,
}

impl Drawing {
    fn new(height: f64, title: &str) -> Self {
        let text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        );
        let mut drawing = Self { text };
        drawing.label(WIDTH / 2.0, 20.0, "middle", title);
        drawing
    }

    fn add(&mut self, arguments: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = self.text.write_fmt(arguments);
        self.text.push('\n');
    }

    fn label(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let text = escape(text);
        self.add(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), style: &str) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.add(format_args!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" {style}/>"
        ));
    }

    fn legend(&mut self, names: &[&str]) {
        let mut x = LEFT;
        for (index, name) in names.iter().enumerate() {
            let fill = colour(index);
            self.add(format_args!(
                "<rect x=\"{x:.1}\" y=\"30\" width=\"10\" height=\"10\" fill=\"{fill}\"/>"
            ));
            self.label(x + 14.0, 39.0, "start", name);
            x += 34.0 + 7.0 * name.chars().count() as f64;
        }
    }

    fn end(mut self) -> String {
        self.text.push_str("</svg>\n");
        self.text
    }
}

/// Lines over time; the other axis is logarithmic. `mark` is a moment with a name.
#[must_use]
pub fn lines(
    title: &str,
    unit: &str,
    lines: &[(&str, &[(f64, f64)])],
    mark: (f64, &str),
) -> String {
    let mut drawing = Drawing::new(LINE_HEIGHT, title);
    let points = || lines.iter().flat_map(|(_, points)| points.iter()).filter(|(_, y)| *y > 0.0);
    let end = points().map(|(x, _)| *x).fold(mark.0, f64::max).max(1.0);
    let least = points().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
    let most = points().map(|(_, y)| *y).fold(0.0, f64::max);
    let first = if least.is_finite() { least.log10().floor() as i32 } else { 0 };
    let last = if most > 0.0 { (most.log10().ceil() as i32).max(first + 1) } else { first + 1 };
    let x_of = |x: f64| LEFT + x / end * (WIDTH - LEFT - RIGHT);
    let y_of = |y: f64| {
        let part = (y.log10() - f64::from(first)) / f64::from(last - first);
        LINE_HEIGHT - BOTTOM - part * (LINE_HEIGHT - TOP - BOTTOM)
    };
    for power in first..=last {
        let y = y_of(10f64.powi(power));
        drawing.line((LEFT, y), (WIDTH - RIGHT, y), "stroke=\"#dddddd\"");
        drawing.label(LEFT - 6.0, y + 4.0, "end", &format!("{}", 10f64.powi(power)));
    }
    let step = (end / 10.0).ceil().max(1.0);
    let mut second = 0.0;
    while second <= end {
        drawing.label(x_of(second), LINE_HEIGHT - BOTTOM + 18.0, "middle", &format!("{second}"));
        second += step;
    }
    drawing.label(WIDTH / 2.0, LINE_HEIGHT - 10.0, "middle", "seconds");
    drawing.label(LEFT, TOP - 4.0, "end", unit);
    let x = x_of(mark.0);
    let bottom = LINE_HEIGHT - BOTTOM;
    drawing.line((x, TOP), (x, bottom), "stroke=\"black\" stroke-dasharray=\"4 3\"");
    drawing.label(x + 4.0, TOP + 10.0, "start", mark.1);
    for (index, (_, points)) in lines.iter().enumerate() {
        let path: Vec<String> = points
            .iter()
            .filter(|(_, y)| *y > 0.0)
            .map(|(x, y)| format!("{:.1},{:.1}", x_of(*x), y_of(*y)))
            .collect();
        let (path, stroke) = (path.join(" "), colour(index));
        drawing.add(format_args!(
            "<polyline points=\"{path}\" fill=\"none\" stroke=\"{stroke}\" stroke-width=\"1.5\"/>"
        ));
    }
    let names: Vec<&str> = lines.iter().map(|(name, _)| *name).collect();
    drawing.legend(&names);
    drawing.end()
}

/// Bars in groups, with the interval of each.
#[must_use]
pub fn bars(title: &str, names: &[&str], groups: &[(&str, Vec<Option<Estimate>>)]) -> String {
    let rows: usize = groups.iter().map(|(_, bars)| bars.len() + 1).sum();
    let height = TOP + rows as f64 * BAR + 20.0;
    let mut drawing = Drawing::new(height, title);
    let all = groups.iter().flat_map(|(_, bars)| bars.iter().flatten());
    let most = all.map(|bar| bar.high).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let x_of = |value: f64| LABELS + value / most * (WIDTH - LABELS - 80.0);
    let mut y = TOP;
    for (label, bars) in groups {
        let middle = y + bars.len() as f64 * BAR / 2.0 + 4.0;
        drawing.label(LABELS - 8.0, middle, "end", label);
        for (index, bar) in bars.iter().enumerate() {
            if let Some(bar) = bar {
                let (width, fill) = (x_of(bar.median) - LABELS, colour(index));
                drawing.add(format_args!(
                    "<rect x=\"{LABELS}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"{fill}\"/>",
                    BAR - 2.0
                ));
                let at = y + BAR / 2.0 - 1.0;
                drawing.line((x_of(bar.low), at), (x_of(bar.high), at), "stroke=\"black\"");
                let text = if bar.median >= 100.0 {
                    format!("{:.0}", bar.median)
                } else {
                    format!("{:.2}", bar.median)
                };
                drawing.label(x_of(bar.high) + 4.0, y + BAR - 3.0, "start", &text);
            }
            y += BAR;
        }
        y += BAR;
    }
    drawing.legend(names);
    drawing.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_drawn_within_the_picture() {
        let points = [(0.1, 100.0), (20.0, 5000.0), (21.0, 0.0)];
        let svg = lines("a < b", "µs", &[("ours", &points)], (10.0, "backup"));
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("a &lt; b") && svg.contains("backup"));
        let path = svg.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(path.split(' ').count(), 2, "{path}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn nothing_to_draw_is_no_error() {
        assert!(lines("t", "µs", &[], (0.0, "")).ends_with("</svg>\n"));
        assert!(bars("t", &[], &[]).ends_with("</svg>\n"));
    }

    #[test]
    fn bars_show_their_interval() {
        let bar = Estimate { median: 2.0, low: 1.0, high: 4.0, confidence: 0.75, count: 3 };
        let svg = bars("t", &["none", "c"], &[("case", vec![None, Some(bar)])]);
        assert_eq!(svg.matches("stroke=\"black\"").count(), 1);
        assert!(svg.contains(">2.00</text>") && svg.contains(colour(1)));
    }
}
