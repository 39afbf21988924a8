// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a task tells people: log lines in vzdump's form, and progress.
//!
//! A task writes to a [`TaskSink`] and knows nothing of terminals, files or JSON. [`FileLog`] keeps
//! the lines of one guest's task, [`Tee`] feeds two sinks, and the functions below format sizes,
//! durations and whole lines as administrators' scripts expect to find them.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use serde::Serialize;

/// The longest line that is kept of untrusted text, in characters.
const LINE_CHARS_MAX: usize = 2000;

/// Weight of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// What happens.
    Info,
    /// Something is odd, the task goes on.
    Warn,
    /// The task, or a part of it, failed.
    Error,
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Info => "INFO",
            Self::Warn => "WARN",
            Self::Error => "ERROR",
        })
    }
}

/// How far a task's transfer is.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Progress {
    /// Number of the guest.
    pub guest_id: u32,
    /// Bytes dealt with so far.
    pub done_bytes: u64,
    /// Bytes to be dealt with.
    pub total_bytes: u64,
    /// Bytes among those done that were zero.
    pub zero_bytes: u64,
    /// Bytes that need not be dealt with, because an earlier backup has them.
    pub reused_bytes: u64,
    /// Time since the transfer began, in milliseconds.
    pub elapsed_ms: u64,
    /// Time until it ends if it goes on as so far, in milliseconds; none if that is not known.
    pub left_ms: Option<u64>,
    /// Bytes read per second since the last report.
    pub read_bytes_per_s: u64,
    /// Bytes that were not zero, per second since the last report.
    pub write_bytes_per_s: u64,
    /// The disks, as far as they are known one by one.
    pub disks: Vec<DiskProgress>,
}

/// How far the transfer of one disk is.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DiskProgress {
    /// Device name.
    pub device: String,
    /// Bytes dealt with so far.
    pub done_bytes: u64,
    /// Bytes to be dealt with.
    pub total_bytes: u64,
    /// Bytes among those done that were zero.
    pub zero_bytes: u64,
    /// Bytes read per second since the last report.
    pub read_bytes_per_s: u64,
    /// Bytes that were not zero, per second since the last report.
    pub write_bytes_per_s: u64,
}

impl Progress {
    /// Whole percent done, 0 to 100; a task with nothing to do is done.
    pub fn percent(&self) -> u8 {
        if self.total_bytes == 0 || self.done_bytes >= self.total_bytes {
            return 100;
        }
        let percent = u128::from(self.done_bytes) * 100 / u128::from(self.total_bytes);
        u8::try_from(percent).unwrap_or(100)
    }

    /// Bytes among those done that had to be stored.
    pub fn sent_bytes(&self) -> u64 {
        self.done_bytes.saturating_sub(self.zero_bytes)
    }

    /// The line of this progress: ` 10% (4.6 GiB of 41.8 GiB) in 1m, read: …, write: …`.
    pub fn line(&self) -> String {
        format!(
            "{:3}% ({} of {}) in {}, read: {}/s, write: {}/s",
            self.percent(),
            size(self.done_bytes),
            size(self.total_bytes),
            duration(Duration::from_millis(self.elapsed_ms)),
            size(self.read_bytes_per_s),
            size(self.write_bytes_per_s),
        )
    }
}

/// Where a task's lines and progress go. Called from any task; must not block for long.
pub trait TaskSink: Send + Sync {
    /// One line, without line break.
    fn line(&self, level: Level, text: &str);
    /// Progress of the transfer; called about once a second, and is not a line.
    fn progress(&self, progress: &Progress);
    /// No more progress of this guest's transfer is to come, whether it succeeded or not.
    fn transfer_ended(&self, _guest_id: u32) {}
    /// One line about one of several guests that are worked on at the same time.
    fn guest_line(&self, guest_id: u32, level: Level, text: &str) {
        self.line(level, &format!("{guest_id}: {text}"));
    }

    /// A line of weight [`Level::Info`].
    fn info(&self, text: &str) {
        self.line(Level::Info, text);
    }
    /// A line of weight [`Level::Warn`].
    fn warn(&self, text: &str) {
        self.line(Level::Warn, text);
    }
    /// A line of weight [`Level::Error`].
    fn error(&self, text: &str) {
        self.line(Level::Error, text);
    }
}

/// Swallows everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoLog;

impl TaskSink for NoLog {
    fn line(&self, _level: Level, _text: &str) {}
    fn progress(&self, _progress: &Progress) {}
}

/// Says of every line which guest it is about, because those of several guests mix.
pub struct GuestLines<'a> {
    sink: &'a dyn TaskSink,
    guest_id: u32,
}

impl<'a> GuestLines<'a> {
    /// Lines about this guest, for a sink of several guests.
    pub fn new(sink: &'a dyn TaskSink, guest_id: u32) -> Self {
        Self { sink, guest_id }
    }
}

impl TaskSink for GuestLines<'_> {
    fn line(&self, level: Level, text: &str) {
        self.sink.guest_line(self.guest_id, level, text);
    }
    fn progress(&self, progress: &Progress) {
        self.sink.progress(progress);
    }
    fn transfer_ended(&self, guest_id: u32) {
        self.sink.transfer_ended(guest_id);
    }
}

/// Gives everything to two sinks.
pub struct Tee<'a>(
    /// The first to be told.
    pub &'a dyn TaskSink,
    /// The second to be told.
    pub &'a dyn TaskSink,
);

impl TaskSink for Tee<'_> {
    fn line(&self, level: Level, text: &str) {
        self.0.line(level, text);
        self.1.line(level, text);
    }
    fn progress(&self, progress: &Progress) {
        self.0.progress(progress);
        self.1.progress(progress);
    }
    fn transfer_ended(&self, guest_id: u32) {
        self.0.transfer_ended(guest_id);
        self.1.transfer_ended(guest_id);
    }
}

/// The log file of one guest's task, written anew by each task.
pub struct FileLog {
    /// `None` once a write failed: a full disk must not fail a backup.
    file: Mutex<Option<File>>,
}

impl FileLog {
    /// Creates the file, or empties it, readable by its owner only. The caller holds the guest's lock.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path) -> std::io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt as _;
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        // Appending, so that the lines of two tasks by mistake mix but do not overwrite each other.
        let file = File::options().append(true).create(true).mode(0o640).open(path)?;
        file.set_len(0)?;
        Ok(Self { file: Mutex::new(Some(file)) })
    }
}

impl TaskSink for FileLog {
    fn line(&self, level: Level, text: &str) {
        let now = jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S");
        let text = format!("{now} {level}: {}\n", clean(text));
        let Ok(mut guard) = self.file.lock() else { return };
        if let Some(file) = guard.as_mut()
            && let Err(error) = file.write_all(text.as_bytes())
        {
            tracing::warn!(%error, "the task log cannot be written; it ends here");
            *guard = None;
        }
    }

    /// A file keeps the percent lines only, and those come as lines.
    fn progress(&self, _progress: &Progress) {}
}

/// Makes untrusted text fit for one log line: no control characters, bounded.
pub fn clean(text: &str) -> String {
    let mut out: String = text
        .trim_end()
        .chars()
        .take(LINE_CHARS_MAX)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.trim_end().chars().nth(LINE_CHARS_MAX).is_some() {
        out.push('…');
    }
    out
}

/// A size with binary unit and one decimal: `4.6 GiB`.
pub fn size(bytes: u64) -> String {
    size_with(bytes, 1)
}

/// A size with binary unit and two decimals: `2.21 GiB`.
pub fn size_exact(bytes: u64) -> String {
    size_with(bytes, 2)
}

fn size_with(bytes: u64, decimals: usize) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // 1023.96 KiB would be shown as "1024.0 KiB".
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.decimals$} {}", UNITS[unit])
}

/// A size as it is written in a guest's configuration: `170G`, `528K`, or plain bytes.
pub fn size_config(bytes: u64) -> String {
    for (shift, suffix) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return format!("{}{suffix}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// A duration as in progress lines: `42s`, `1m`, `1h 2m 3s`.
pub fn duration(elapsed: Duration) -> String {
    let total_s = elapsed.as_secs();
    let parts = [
        (total_s / 86_400, "d"),
        (total_s / 3600 % 24, "h"),
        (total_s / 60 % 60, "m"),
        (total_s % 60, "s"),
    ];
    let shown: Vec<String> =
        parts.iter().filter(|(n, _)| *n > 0).map(|(n, unit)| format!("{n}{unit}")).collect();
    if shown.is_empty() { "0s".to_owned() } else { shown.join(" ") }
}

/// A duration as in the last line of a task: `00:00:23`.
pub fn clock(elapsed: Duration) -> String {
    let total_s = elapsed.as_secs();
    format!("{:02}:{:02}:{:02}", total_s / 3600, total_s / 60 % 60, total_s % 60)
}

/// Bytes per second over a duration; a duration of zero counts as one millisecond.
pub fn rate(bytes: u64, elapsed: Duration) -> u64 {
    let ms = elapsed.as_millis().max(1);
    u64::try_from(u128::from(bytes) * 1000 / ms).unwrap_or(u64::MAX)
}

/// `transferred 2.21 GiB in 23 seconds (98.4 MiB/s)`.
pub fn transferred(bytes: u64, elapsed: Duration) -> String {
    let seconds = match elapsed.as_secs() {
        0 => "<1 seconds".to_owned(),
        s => format!("{s} seconds"),
    };
    format!("transferred {} in {seconds} ({}/s)", size_exact(bytes), size(rate(bytes, elapsed)))
}

/// The state of a disk's dirty bitmap as vzdump words it, from QEMU's `bitmap-action`.
pub fn bitmap_status(action: &str, dirty_bytes: Option<u64>, size_bytes: u64) -> String {
    match (action, dirty_bytes) {
        ("not-used", _) => "disabled".to_owned(),
        ("not-used-removed", _) => "disabled (old bitmap cleared)".to_owned(),
        ("new", _) => "created new".to_owned(),
        ("used", Some(0)) => "OK (drive clean)".to_owned(),
        ("used", Some(dirty)) => format!("OK ({} of {} dirty)", size(dirty), size(size_bytes)),
        ("used", None) => "OK".to_owned(),
        ("invalid", _) => "existing bitmap was invalid and has been cleared".to_owned(),
        ("missing-recreated", _) => "expected bitmap was missing and has been recreated".to_owned(),
        (other, _) => format!("unknown ({})", clean(other)),
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! A sink that keeps what it is told.

    use super::{Level, Mutex, Progress, TaskSink};

    /// Keeps every line, as `LEVEL: text`.
    #[derive(Debug, Default)]
    pub(crate) struct MemoryLog(pub(crate) Mutex<Vec<String>>);

    impl MemoryLog {
        /// All lines so far, joined.
        pub(crate) fn text(&self) -> String {
            self.0.lock().expect("no test panics while it logs").join("\n")
        }
    }

    impl TaskSink for MemoryLog {
        fn line(&self, level: Level, text: &str) {
            self.0.lock().expect("no test panics while it logs").push(format!("{level}: {text}"));
        }
        fn progress(&self, _progress: &Progress) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(size(0), "0.0 B");
        assert_eq!(size(4_939_212_390), "4.6 GiB");
        assert_eq!(size(1024 * 1024 - 1), "1.0 MiB");
        assert_eq!(size(u64::MAX), "16.0 EiB");
        assert_eq!(size_exact(2_372_969_431), "2.21 GiB");
    }

    #[test]
    fn sizes_of_configurations_are_exact() {
        assert_eq!(size_config(170 << 30), "170G");
        assert_eq!(size_config(528 << 10), "528K");
        assert_eq!(size_config(1000), "1000");
        assert_eq!(size_config(0), "0");
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(duration(Duration::from_secs(60)), "1m");
        assert_eq!(duration(Duration::from_secs(3723)), "1h 2m 3s");
        assert_eq!(duration(Duration::from_millis(999)), "0s");
        assert_eq!(clock(Duration::from_secs(23)), "00:00:23");
        assert_eq!(clock(Duration::from_secs(360_061)), "100:01:01");
    }

    #[test]
    fn progress_lines_are_vzdumps() {
        let progress = Progress {
            guest_id: 100,
            done_bytes: 4_939_212_390,
            total_bytes: 44_882_408_243,
            zero_bytes: 0,
            elapsed_ms: 60_000,
            read_bytes_per_s: 362_073_292,
            write_bytes_per_s: 360_710_144,
            ..Progress::default()
        };
        assert_eq!(
            progress.line(),
            " 11% (4.6 GiB of 41.8 GiB) in 1m, read: 345.3 MiB/s, write: 344.0 MiB/s"
        );
        // Nothing to do is done; more done than announced is still 100.
        assert_eq!(Progress::default().percent(), 100);
        let more = Progress { done_bytes: 9, total_bytes: 3, ..progress.clone() };
        assert_eq!(more.percent(), 100);
        assert_eq!(
            Progress { done_bytes: u64::MAX - 1, total_bytes: u64::MAX, ..progress }.percent(),
            99
        );
    }

    #[test]
    fn the_last_lines_are_vzdumps() {
        assert_eq!(
            transferred(2_372_969_431, Duration::from_secs(23)),
            "transferred 2.21 GiB in 23 seconds (98.4 MiB/s)"
        );
        assert_eq!(transferred(0, Duration::ZERO), "transferred 0.00 B in <1 seconds (0.0 B/s)");
    }

    #[test]
    fn bitmap_actions_have_vzdumps_words() {
        assert_eq!(
            bitmap_status("used", Some(29_742_648_525), 170 << 30),
            "OK (27.7 GiB of 170.0 GiB dirty)"
        );
        assert_eq!(bitmap_status("used", Some(0), 1), "OK (drive clean)");
        assert_eq!(bitmap_status("new", Some(7), 7), "created new");
        assert_eq!(bitmap_status("later\n", None, 1), "unknown (later)");
    }

    #[test]
    fn untrusted_text_cannot_break_a_line() {
        assert_eq!(clean("a\nERROR: b\u{1b}[2J\n"), "a ERROR: b [2J");
        assert_eq!(clean(&"x".repeat(3000)).chars().count(), LINE_CHARS_MAX + 1);
    }

    #[test]
    fn a_log_file_is_written_anew() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log/qemu-100.log");
        for text in ["first", "second"] {
            let log = FileLog::create(&path).expect("a log");
            log.warn(text);
        }
        let text = std::fs::read_to_string(&path).expect("the log");
        assert!(text.ends_with(" WARN: second\n") && !text.contains("first"), "{text}");
    }
}
