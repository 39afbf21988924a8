// SPDX-License-Identifier: MIT OR Apache-2.0
//! Plugins that lie, hang, flood and die.

use crate::bench::Bench;

/// Ends the plugins of a bench by SIGKILL.
pub(crate) fn kill(bench: &Bench) {
    for pid in pids(bench) {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// The processes that run this bench's plugin for this bench: its archives are in their messages only, so
/// they are told by being our children.
pub(crate) fn pids(bench: &Bench) -> Vec<i32> {
    let program = bench.options.program.to_str().unwrap();
    let own = std::process::id().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let read = |file: &str| std::fs::read_to_string(entry.path().join(file));
        let (Ok(line), Ok(status)) = (read("cmdline"), read("status")) else { continue };
        let is_ours = status.lines().any(|l| l.strip_prefix("PPid:").is_some_and(|p| p.trim() == own));
        if is_ours && line.split('\0').any(|word| word == program) {
            found.push(pid);
        }
    }
    found
}
