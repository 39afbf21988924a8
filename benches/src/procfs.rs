// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a process used so far: CPU time, bytes to and from disks, memory.

use anyhow::{Context, Result};

/// Counters of one process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// User and system time of all threads.
    pub cpu_us: u64,
    /// Bytes fetched from disks.
    pub read_bytes: u64,
    /// Bytes sent to disks; with a page cache, bytes made dirty.
    pub write_bytes: u64,
    /// Memory in RAM now.
    pub resident_bytes: u64,
    /// Its maximum so far.
    pub peak_bytes: u64,
}

/// Reads the counters.
///
/// # Errors
/// The process is gone, or is another user's.
pub fn usage(pid: u32) -> Result<Usage> {
    let read = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    };
    let hz = rustix::param::clock_ticks_per_second();
    parse(&read("stat")?, &read("io")?, &read("status")?, hz)
        .context("/proc has a process in a form that is not known")
}

fn parse(stat: &str, io: &str, status: &str, hz: u64) -> Option<Usage> {
    // The name in parentheses may contain anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(Usage {
        cpu_us: ticks * 1_000_000 / hz.max(1),
        read_bytes: field(io, "read_bytes")?,
        write_bytes: field(io, "write_bytes")?,
        resident_bytes: field(status, "VmRSS")? * 1024,
        peak_bytes: field(status, "VmHWM")? * 1024,
    })
}

/// The number of a line `name: number …`.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_counters_of_a_process_with_an_odd_name() {
        let stat = "7 (a) b) c) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 1 0 5 6 7";
        let io =
            "rchar: 1\nwchar: 2\nread_bytes: 4096\nwrite_bytes: 8192\ncancelled_write_bytes: 0\n";
        let status = "Name:\tx\nVmHWM:\t    20 kB\nVmRSS:\t    10 kB\n";
        let expected = Usage {
            cpu_us: 2_000_000,
            read_bytes: 4096,
            write_bytes: 8192,
            resident_bytes: 10240,
            peak_bytes: 20480,
        };
        assert_eq!(parse(stat, io, status, 100), Some(expected));
        assert_eq!(parse("", io, status, 100), None);
    }

    #[test]
    fn this_process_has_counters() {
        assert!(usage(std::process::id()).unwrap().resident_bytes > 0);
    }
}
