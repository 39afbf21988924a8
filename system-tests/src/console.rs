// SPDX-License-Identifier: MIT OR Apache-2.0
//! Follows the log of a guest's serial console.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::{Stop, tail};

/// More console output than this means that something goes round in circles.
const LOG_LIMIT_BYTES: u64 = 16 << 20;
/// Lines that mean that nothing good will follow.
const FATAL: [&str; 4] = ["Kernel panic", "CHECK FAILED", "ERROR ", "blk_update_request"];

/// One guest's console log; remembers how far it was read.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    text: String,
    seen: usize,
}

/// What the guest said about its writing since it was last asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecordsSeen {
    /// The last record, 0 when nothing was said.
    pub last: u64,
    /// The longest single write.
    pub longest_stall: Duration,
}

impl Console {
    /// Follows this file, which need not exist yet, from its present end.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn from_end_of(path: &Path) -> Result<Self> {
        let mut console = Self::from_start_of(path);
        console.refresh()?;
        console.seen = console.text.len();
        Ok(console)
    }

    /// Follows this file, which need not exist yet, from its start.
    #[must_use]
    pub fn from_start_of(path: &Path) -> Self {
        Self { path: path.to_owned(), text: String::new(), seen: 0 }
    }

    /// The next complete line that contains `needle`; what was said before it is passed over.
    ///
    /// # Errors
    /// The line does not come in time, or the guest reports a failure instead.
    pub fn wait_for(&mut self, needle: &str, timeout: Duration, stop: &Stop) -> Result<String> {
        let [line] = self.wait_for_each([needle], timeout, stop)?;
        Ok(line)
    }

    /// One line for each needle, in whatever order they come; others are passed over.
    ///
    /// # Errors
    /// A line does not come in time, or the guest reports a failure instead.
    pub fn wait_for_each<const N: usize>(
        &mut self,
        needles: [&str; N],
        timeout: Duration,
        stop: &Stop,
    ) -> Result<[String; N]> {
        let what = format!("{needles:?} on the console {}", self.path.display());
        let mut found = needles.map(|_| None);
        let waited = stop.wait_for(&what, timeout, || {
            self.refresh()?;
            while let Some(line) = self.next_line() {
                let wanted = needles.iter().position(|needle| line.contains(needle));
                match wanted.and_then(|index| found.get_mut(index)) {
                    Some(slot) => *slot = Some(line),
                    None if is_fatal(&line) => bail!("the guest says: {line}"),
                    None => {}
                }
                if found.iter().all(Option::is_some) {
                    return Ok(Some(()));
                }
            }
            Ok(None)
        });
        waited.with_context(|| format!("the console ends with:\n{}", tail(&self.text)))?;
        Ok(found.map(Option::unwrap_or_default))
    }

    /// What the guest said about its records since the last call of any method here.
    ///
    /// # Errors
    /// The log cannot be read, or the guest reports a failure.
    pub fn records(&mut self) -> Result<RecordsSeen> {
        self.refresh()?;
        let mut seen = RecordsSeen::default();
        while let Some(line) = self.next_line() {
            if let Some((last, stall)) = parse_records(&line) {
                seen.last = seen.last.max(last);
                seen.longest_stall = seen.longest_stall.max(stall);
            } else if is_fatal(&line) {
                bail!("the guest says: {line}");
            }
        }
        Ok(seen)
    }

    /// Waits until the guest reports a record of at least this number on both disks.
    ///
    /// # Errors
    /// It does not happen in time, or the guest reports a failure.
    pub fn wait_for_record(
        &mut self,
        number: u64,
        timeout: Duration,
        stop: &Stop,
    ) -> Result<RecordsSeen> {
        let mut all = RecordsSeen::default();
        let what = format!("record {number} on the console {}", self.path.display());
        let done = stop.wait_for(&what, timeout, || {
            let seen = self.records()?;
            all.last = all.last.max(seen.last);
            all.longest_stall = all.longest_stall.max(seen.longest_stall);
            Ok((all.last >= number).then_some(all))
        });
        done.with_context(|| format!("the console ends with:\n{}", tail(&self.text)))
    }

    fn refresh(&mut self) -> Result<()> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", self.path.display()));
            }
        };
        let had = self.text.len() as u64;
        if file.metadata()?.len() < had {
            // A new start of the machine began the file anew.
            self.text.clear();
            self.seen = 0;
        }
        file.seek(SeekFrom::Start(self.text.len() as u64))?;
        let mut bytes = Vec::new();
        file.take(LOG_LIMIT_BYTES).read_to_end(&mut bytes)?;
        // The console speaks ASCII; other bytes must not shift our position in the file.
        self.text
            .extend(bytes.iter().map(|byte| if byte.is_ascii() { char::from(*byte) } else { '?' }));
        if self.text.len() as u64 > LOG_LIMIT_BYTES {
            bail!("{} grows beyond {LOG_LIMIT_BYTES} bytes", self.path.display());
        }
        Ok(())
    }

    fn next_line(&mut self) -> Option<String> {
        let (line, _) = self.text[self.seen..].split_once('\n')?;
        let line = line.to_owned();
        self.seen += line.len() + 1;
        Some(line.trim_end_matches('\r').to_owned())
    }
}

fn is_fatal(line: &str) -> bool {
    FATAL.iter().any(|fatal| line.contains(fatal))
}

fn parse_records(line: &str) -> Option<(u64, Duration)> {
    let rest = &line[line.find("RECORDS ")?..];
    let value = |key: &str| {
        rest.split_whitespace().find_map(|word| word.strip_prefix(key))?.parse::<u64>().ok()
    };
    Some((value("last=")?, Duration::from_micros(value("stall_us=")?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const SOON: Duration = Duration::from_millis(50);

    #[test]
    fn lines_are_seen_once_whole_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let (mut console, stop) = (Console::from_end_of(&path).unwrap(), Stop::default());
        assert!(console.wait_for("READY", SOON, &stop).is_err());
        let mut file = File::create(&path).unwrap();
        file.write_all(b"noise\r\nGUEST READY\r\nRECORDS last=7 stall_us=1500 STALL").unwrap();
        assert_eq!(console.wait_for("READY", SOON, &stop).unwrap(), "GUEST READY");
        assert_eq!(console.records().unwrap(), RecordsSeen::default());
        let both = console.wait_for_each(["STALL", "READY"], SOON, &stop);
        assert!(both.is_err(), "the line is not complete");
        file.write_all(b" max_ms=2\r\nRECORDS last=9 stall_us=20 STALL max_ms=2\r\n").unwrap();
        let seen = RecordsSeen { last: 9, longest_stall: Duration::from_micros(1500) };
        assert_eq!(console.records().unwrap(), seen);
        file.write_all(b"CHECK FAILED last_a=1\r\n").unwrap();
        assert!(format!("{:?}", console.records()).contains("CHECK FAILED"));
    }

    #[test]
    fn a_file_begun_anew_is_read_from_its_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        std::fs::write(&path, "first start of the machine\nRECORDS last=4 stall_us=1 x\n").unwrap();
        let mut console = Console::from_end_of(&path).unwrap();
        std::fs::write(&path, "GUEST READY\n").unwrap();
        assert!(console.wait_for("READY", SOON, &Stop::default()).is_ok());
    }
}
