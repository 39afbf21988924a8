// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a process used so far: CPU time, bytes to and from disks, memory.

use std::collections::HashMap;

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

/// User and system time of a process, of those it has started and of those they have, also after their
/// ends; without `others` and what these have started.
///
/// # Errors
/// The process is gone.
pub fn family_cpu_us(pid: u32, others: &[u32]) -> Result<u64> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    let mut ticks = HashMap::new();
    for entry in std::fs::read_dir("/proc").context("cannot read /proc")? {
        let Some(number) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // One that has just ended is counted by its parent.
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{number}/stat")) else { continue };
        let Some((parent, own_ticks)) = family(&stat) else { continue };
        children.entry(parent).or_default().push(number);
        ticks.insert(number, own_ticks);
    }
    let mut sum = *ticks.get(&pid).with_context(|| format!("no process {pid}"))?;
    let mut waiting = children.remove(&pid).unwrap_or_default();
    while let Some(next) = waiting.pop() {
        if !others.contains(&next) {
            sum += ticks.get(&next).copied().unwrap_or_default();
            waiting.extend(children.remove(&next).unwrap_or_default());
        }
    }
    Ok(sum * 1_000_000 / rustix::param::clock_ticks_per_second().max(1))
}

/// The parent, and the time of a process and of its children that were waited for.
fn family(stat: &str) -> Option<(u32, u64)> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: Option<u64> = (11..15).map(|n| fields.get(n)?.parse::<u64>().ok()).sum();
    Some((fields.get(1)?.parse().ok()?, ticks?))
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
    fn a_child_counts_unless_it_is_another_s() {
        let stat = "7 (a) b) S 4 7 7 0 -1 4194560 1 0 0 0 150 50 20 3 20 0 1 0 5 6 7";
        assert_eq!(family(stat), Some((4, 223)));
        let mut command = std::process::Command::new("sh");
        let mut child = command.args(["-c", "while :; do :; done"]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(300));
        let me = std::process::id();
        let without = family_cpu_us(me, &[child.id()]).unwrap();
        let with = family_cpu_us(me, &[]).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(with >= without + 10_000, "{with} {without}");
        // Waited for, its time is this process's.
        assert!(family_cpu_us(me, &[]).unwrap() >= with);
    }

    #[test]
    fn this_process_has_counters() {
        assert!(usage(std::process::id()).unwrap().resident_bytes > 0);
    }
}
