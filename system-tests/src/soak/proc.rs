// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kernel knows about a process: memory, descriptors, threads.

use anyhow::{Context as _, Result};

/// Memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// All that is resident, mapped files included.
    pub(crate) resident_bytes: u64,
    /// The part of it that no file is behind.
    pub(crate) anonymous_bytes: u64,
}

pub(crate) fn memory(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let bytes = |name: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        Ok(kib.with_context(|| format!("no {name} in {path}"))? * 1024)
    };
    Ok(Memory { resident_bytes: bytes("VmRSS:")?, anonymous_bytes: bytes("RssAnon:")? })
}

/// What the open descriptors are, sorted.
pub(super) fn descriptors(pid: u32) -> Result<Vec<String>> {
    let mut open = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        // It may be closed right now.
        let Ok(link) = std::fs::read_link(entry?.path()) else { continue };
        let text = link.to_string_lossy();
        // The numbers of sockets and pipes say nothing.
        let kind = text.split_once(":[").map_or(&*text, |(kind, _)| kind);
        open.push(kind.to_owned());
    }
    open.sort();
    Ok(open)
}

pub(super) fn threads(pid: u32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/task"))?.count())
}
