// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a task tells while it runs: log lines and a progress bar, or one JSON event per line.

use std::io::IsTerminal;
use std::sync::{Mutex, MutexGuard, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use vzdump_host::{Level, Progress, TaskSink, clean};

use crate::output::{self, Output};

/// Shows a task's lines and progress.
pub(crate) struct Screen {
    is_json: bool,
    on_terminal: bool,
    /// Only warnings and errors are shown.
    is_quiet: bool,
    /// There while a transfer runs.
    bar: Mutex<Option<ProgressBar>>,
}

impl Screen {
    pub(crate) fn new(output: Output, is_quiet: bool) -> Self {
        let is_json = output.is_json();
        let on_terminal = std::io::stderr().is_terminal() && std::io::stdout().is_terminal();
        Self {
            is_json,
            on_terminal: !is_json && !is_quiet && on_terminal,
            is_quiet,
            bar: Mutex::default(),
        }
    }

    fn bar(&self) -> MutexGuard<'_, Option<ProgressBar>> {
        self.bar.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn new_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    bar.set_style(style());
    bar
}

fn style() -> ProgressStyle {
    let template =
        "{percent:>3}% [{bar:30}] {binary_bytes} of {binary_total_bytes} {msg} (left: {eta})";
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

impl Drop for Screen {
    fn drop(&mut self) {
        if let Some(bar) = self.bar().take() {
            bar.finish_and_clear();
        }
    }
}

/// Whether a line only says how far the transfer is, which a bar shows better.
fn is_percent_line(text: &str) -> bool {
    let text = text.trim_start();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    (1..=2).contains(&digits) && text[digits..].starts_with("% (")
}

impl TaskSink for Screen {
    fn line(&self, level: Level, text: &str) {
        if self.is_quiet && level == Level::Info {
            return;
        }
        let text = clean(text);
        if self.is_json {
            let event = json!({ "event": "log", "level": level, "message": text });
            return output::line(&event.to_string());
        }
        let line = format!("{level}: {text}");
        match &*self.bar() {
            Some(_) if is_percent_line(&text) => {}
            Some(bar) => bar.suspend(|| output::line(&line)),
            None => output::line(&line),
        }
    }

    fn progress(&self, progress: &Progress) {
        if self.is_quiet {
            return;
        }
        if self.is_json {
            let mut event = json!(progress);
            event["event"] = json!("progress");
            event["percent"] = json!(progress.percent());
            return output::line(&event.to_string());
        }
        if !self.on_terminal {
            return;
        }
        let mut current = self.bar();
        if progress.done_bytes >= progress.total_bytes {
            // Another disk or guest may follow; until then there is nothing to show.
            if let Some(bar) = current.take() {
                bar.finish_and_clear();
            }
            return;
        }
        let bar = current.get_or_insert_with(new_bar);
        bar.set_length(progress.total_bytes);
        bar.set_message(format!("{}/s", vzdump_host::size(progress.read_bytes_per_s)));
        bar.set_position(progress.done_bytes);
    }
}

/// Shows what is odd about a task that people do not watch.
pub(crate) struct Notices;

impl TaskSink for Notices {
    fn line(&self, level: Level, text: &str) {
        if level != Level::Info {
            output::warning(&clean(text));
        }
    }

    fn progress(&self, _progress: &Progress) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_lines_are_told_from_others() {
        assert!(is_percent_line(" 10% (4.6 GiB of 41.8 GiB) in 1m"));
        assert!(!is_percent_line("100% (4.6 GiB of 4.6 GiB) in 1m"), "the last one is a result");
        assert!(!is_percent_line("include disk 'scsi0'"));
        assert!(!is_percent_line("10 % of what"));
        assert!(!is_percent_line(""));
    }
}
