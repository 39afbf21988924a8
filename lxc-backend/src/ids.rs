// SPDX-License-Identifier: MIT OR Apache-2.0
//! User namespaces that only say which id is which.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use provider_api::IdMapRange;

/// First id on the host of what a command sees of a privileged container: ids that nobody has there, so that
/// the command, though it is root to itself, owns nothing of the host.
const FOREIGN_BASE: u32 = 0x7000_0000;
const FOREIGN_COUNT: u32 = u32::MAX - FOREIGN_BASE - 1;

/// The ids of commands that see a privileged container as its root.
pub(crate) fn foreign_ids() -> Vec<IdMapRange> {
    let range = |is_group| IdMapRange {
        is_group,
        container_id: 0,
        host_id: FOREIGN_BASE,
        count: FOREIGN_COUNT,
    };
    vec![range(false), range(true)]
}

/// The same map in the other direction: what is on disk is shown as the container sees it.
pub(crate) fn reversed(ranges: &[IdMapRange]) -> Vec<IdMapRange> {
    let turn = |range: &IdMapRange| IdMapRange {
        container_id: range.host_id,
        host_id: range.container_id,
        ..*range
    };
    ranges.iter().map(turn).collect()
}

/// A user namespace with these ids. It exists as long as the descriptor.
pub(crate) fn user_namespace(ranges: &[IdMapRange]) -> io::Result<OwnedFd> {
    // `cat` answers only once it runs in the new namespace.
    let mut child = Command::new("unshare")
        .args(["--user", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let made = describe(&mut child, ranges);
    drop(child.stdin.take());
    let _ = child.kill();
    child.wait()?;
    made
}

fn describe(child: &mut Child, ranges: &[IdMapRange]) -> io::Result<OwnedFd> {
    let (Some(input), Some(output)) = (&mut child.stdin, &mut child.stdout) else {
        return Err(io::Error::other("no pipes"));
    };
    let gone = |_| io::Error::other("no user namespace could be made (unshare --user)");
    input.write_all(b"\n").map_err(gone)?;
    output.read_exact(&mut [0]).map_err(gone)?;
    let proc = format!("/proc/{}", child.id());
    for (file, is_group) in [("uid_map", false), ("gid_map", true)] {
        let mut map = String::new();
        for range in ranges.iter().filter(|range| range.is_group == is_group) {
            let IdMapRange { container_id, host_id, count, .. } = range;
            let _ = writeln!(map, "{container_id} {host_id} {count}");
        }
        // The kernel takes a map in one piece only.
        std::fs::write(format!("{proc}/{file}"), map)?;
    }
    Ok(File::open(format!("{proc}/ns/user"))?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reversed_map_leads_back() {
        let ranges = foreign_ids();
        assert_eq!(reversed(&reversed(&ranges)), ranges);
        assert_eq!(reversed(&ranges)[0].container_id, FOREIGN_BASE);
    }
}
