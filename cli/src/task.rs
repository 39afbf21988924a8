// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a task tells while it runs: log lines and a progress bar, or one JSON event per line.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use vzdump_host::{Level, Progress, TaskSink, clean, duration};

use crate::output::{self, Output};

/// Lines and states of progress that wait to be shown: more than gathers when somebody reads them.
const QUEUE_LEN: usize = 4096;

/// Shows a task's lines and progress. It never holds up the task: a terminal that is stopped, or a reader that does not
/// read, would keep a guest down. What finds no room meanwhile is left out, and the gap is told.
pub(crate) struct Screen {
    is_json: bool,
    on_terminal: bool,
    /// Only warnings and errors are shown.
    is_quiet: bool,
    shown: Option<Shown>,
    lost_lines: Arc<AtomicU64>,
}

/// The thread that writes.
struct Shown {
    events: SyncSender<Event>,
    thread: JoinHandle<()>,
}

enum Event {
    /// A line of one of several guests, or of the only one.
    Line(Option<u32>, Level, String),
    Progress(Progress),
    TransferEnded(u32),
}

impl Screen {
    pub(crate) fn new(output: Output, is_quiet: bool) -> Self {
        let is_json = output.is_json();
        let on_terminal = std::io::stderr().is_terminal() && std::io::stdout().is_terminal();
        let on_terminal = !is_json && !is_quiet && on_terminal;
        let lost_lines = Arc::new(AtomicU64::new(0));
        let printer =
            Printer { is_json, lost_lines: Arc::clone(&lost_lines), ..Printer::default() };
        let (events, queue) = sync_channel(QUEUE_LEN);
        let thread = std::thread::spawn(move || printer.run(&queue));
        let shown = Some(Shown { events, thread });
        Self { is_json, on_terminal, is_quiet, shown, lost_lines }
    }

    /// Whether there was room.
    fn send(&self, event: Event) -> bool {
        self.shown.as_ref().is_some_and(|shown| shown.events.try_send(event).is_ok())
    }

    fn show(&self, guest_id: Option<u32>, level: Level, text: &str) {
        if self.is_quiet && level == Level::Info {
            return;
        }
        if !self.send(Event::Line(guest_id, level, clean(text))) {
            self.lost_lines.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        output::only_printing_is_left();
        if let Some(Shown { events, thread }) = self.shown.take() {
            drop(events);
            // A panic there has been told by itself.
            let _ = thread.join();
        }
    }
}

impl TaskSink for Screen {
    fn line(&self, level: Level, text: &str) {
        self.show(None, level, text);
    }

    fn guest_line(&self, guest_id: u32, level: Level, text: &str) {
        self.show(Some(guest_id), level, text);
    }

    fn progress(&self, progress: &Progress) {
        if !self.is_quiet && (self.is_json || self.on_terminal) {
            self.send(Event::Progress(progress.clone()));
        }
    }

    fn transfer_ended(&self, guest_id: u32) {
        self.send(Event::TransferEnded(guest_id));
    }
}

/// Writes what was sent, in its order.
#[derive(Default)]
struct Printer {
    is_json: bool,
    /// Lines that found no room.
    lost_lines: Arc<AtomicU64>,
    screen: MultiProgress,
    /// Those of the guests whose transfers run.
    bars: BTreeMap<u32, ProgressBar>,
}

impl Printer {
    fn run(mut self, queue: &Receiver<Event>) {
        for event in queue {
            self.tell_gap();
            match event {
                Event::Line(guest_id, level, text) => self.line(guest_id, level, &text),
                Event::Progress(progress) if self.is_json => {
                    output::line(&progress_event(&progress).to_string());
                }
                Event::Progress(progress) => self.progress(&progress),
                Event::TransferEnded(guest_id) => self.transfer_ended(guest_id),
            }
        }
        self.tell_gap();
        self.bars.values().for_each(ProgressBar::finish_and_clear);
    }

    fn tell_gap(&self) {
        let lost = self.lost_lines.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let text =
                format!("{lost} lines are left out here, because the output was not read in time");
            self.line(None, Level::Warn, &text);
        }
    }

    /// Shows a line; `guest_id` is given if lines of several guests mix.
    fn line(&self, guest_id: Option<u32>, level: Level, text: &str) {
        if self.is_json {
            let mut event = json!({ "event": "log", "level": level, "message": text });
            if let Some(id) = guest_id {
                event["guest_id"] = json!(id);
            }
            return output::line(&event.to_string());
        }
        if !self.bars.is_empty() && is_percent_line(text) {
            return;
        }
        let mark = guest_id.map(|id| format!("{id}: ")).unwrap_or_default();
        let line = format!("{level}: {mark}{text}");
        if self.bars.is_empty() {
            output::line(&line);
        } else {
            self.screen.suspend(|| output::line(&line));
        }
    }

    fn progress(&mut self, progress: &Progress) {
        if progress.done_bytes >= progress.total_bytes {
            // Another disk may follow; until then there is nothing to show.
            return self.transfer_ended(progress.guest_id);
        }
        let bar = self.bars.entry(progress.guest_id).or_insert_with(|| {
            let bar = self.screen.add(ProgressBar::new(0).with_style(style()));
            bar.set_prefix(format!("{}: ", progress.guest_id));
            bar
        });
        bar.set_length(progress.total_bytes);
        bar.set_message(bar_message(progress));
        bar.set_position(progress.done_bytes);
    }

    fn transfer_ended(&mut self, guest_id: u32) {
        if let Some(bar) = self.bars.remove(&guest_id) {
            bar.finish_and_clear();
            self.screen.remove(&bar);
        }
    }
}

fn style() -> ProgressStyle {
    let template = "{prefix}{percent:>3}% [{bar:30}] {binary_bytes} of {binary_total_bytes} {msg}";
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// Whether a line only says how far the transfer is, which a bar shows better.
fn is_percent_line(text: &str) -> bool {
    let text = text.trim_start();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    (1..=2).contains(&digits) && text[digits..].starts_with("% (")
}

fn bar_message(progress: &Progress) -> String {
    let rate = vzdump_host::size(progress.read_bytes_per_s);
    match progress.left_ms {
        Some(ms) => format!("{rate}/s ({} left)", duration(Duration::from_millis(ms))),
        None => format!("{rate}/s"),
    }
}

fn progress_event(progress: &Progress) -> Value {
    let mut event = json!(progress);
    event["event"] = json!("progress");
    event["percent"] = json!(progress.percent());
    event["sent_bytes"] = json!(progress.sent_bytes());
    event
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
    fn an_event_has_what_a_program_needs_to_show() {
        let progress = Progress {
            guest_id: 100,
            done_bytes: 50,
            total_bytes: 200,
            zero_bytes: 20,
            left_ms: Some(63_000),
            read_bytes_per_s: 2048,
            ..Progress::default()
        };
        let event = progress_event(&progress);
        let members = ["guest_id", "percent", "sent_bytes", "left_ms", "reused_bytes"];
        let values: Vec<_> = members.iter().map(|member| event[member].as_u64()).collect();
        assert_eq!(values, [Some(100), Some(25), Some(30), Some(63_000), Some(0)]);
        assert!(event["disks"].is_array());
        assert_eq!(bar_message(&progress), "2.0 KiB/s (1m 3s left)");
    }

    #[test]
    fn percent_lines_are_told_from_others() {
        assert!(is_percent_line(" 10% (4.6 GiB of 41.8 GiB) in 1m"));
        assert!(!is_percent_line("100% (4.6 GiB of 4.6 GiB) in 1m"), "the last one is a result");
        assert!(!is_percent_line("include disk 'scsi0'"));
        assert!(!is_percent_line("10 % of what"));
        assert!(!is_percent_line(""));
    }
}
