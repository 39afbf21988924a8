// SPDX-License-Identifier: MIT OR Apache-2.0
//! The priority of this program's own disk access, set by the program `ionice` as vzdump does: the
//! system call has no safe wrapper that is kept up.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// How long `ionice` may take.
const LIMIT: Duration = Duration::from_secs(10);
/// The priority that gets what others leave.
const IDLE: u8 = 8;

/// Sets the priority of all threads there are; new ones inherit it.
///
/// # Errors
/// A sentence that says why it stays as it was.
pub(crate) async fn set(priority: u8) -> Result<(), String> {
    let failed = |why: String| format!("the priority of disk access stays as it was: {why}");
    let mut threads = Vec::new();
    let entries = std::fs::read_dir("/proc/self/task").map_err(|e| failed(e.to_string()))?;
    for entry in entries.flatten() {
        threads.push(entry.file_name());
    }
    let mut command = Command::new("ionice");
    if priority >= IDLE {
        command.args(["--class", "3"]);
    } else {
        command.args(["--class", "2", "--classdata", &priority.to_string()]);
    }
    // A thread that has ended meanwhile is no fault.
    command.args(["--ignore", "--pid"]).args(threads);
    command.stdin(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(LIMIT, command.output()).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(failed(format!("ionice: {said} ({})", output.status)))
        }
        Ok(Err(error)) => Err(failed(format!("ionice cannot be run: {error}"))),
        Err(_) => Err(failed("ionice does not end".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    #[tokio::test(flavor = "multi_thread")]
    async fn all_threads_get_the_priority() {
        for (priority, expected) in [(7, "best-effort: prio 7"), (8, "idle")] {
            super::set(priority).await.unwrap();
            for entry in std::fs::read_dir("/proc/self/task").unwrap() {
                let thread = entry.unwrap().file_name();
                let output =
                    std::process::Command::new("ionice").arg("-p").arg(thread).output().unwrap();
                assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), expected);
            }
        }
    }
}
