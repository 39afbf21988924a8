// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs the program `vzdump` as a user would: one command line at a time, with JSON for machines.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process::{Collected, Finished, Stop, tail};
use crate::qemu;

/// Names the program to use instead of the one of this build.
const PROGRAM_VARIABLE: &str = "VZDUMP_BIN";
/// Longest backup or restore of the small guest, on two busy cores.
pub const TASK_WITHIN: Duration = Duration::from_secs(600);

/// The program with the options that all commands share.
#[derive(Debug, Clone)]
pub struct Vzdump {
    program: PathBuf,
    root: PathBuf,
    qemu_bin: PathBuf,
    show: bool,
    stop: Stop,
}

impl Vzdump {
    /// Finds the program; `show` prints every command line that is run.
    ///
    /// # Errors
    /// The program or the patched QEMU has not been built; the text says how.
    pub fn find(root: &Path, show: bool, stop: &Stop) -> Result<Self> {
        Ok(Self {
            program: find_program()?,
            root: root.to_owned(),
            qemu_bin: qemu::bin_dir()?,
            show,
            stop: stop.clone(),
        })
    }

    /// Has a command find the program, and the program QEMU, as if they were installed.
    pub fn installed<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let folders = self.program.parent().map(Path::to_owned).into_iter();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let others: Vec<_> = std::env::split_paths(&path).collect();
        // Fails for a colon in a path, which no checkout has that cargo can build.
        let path = std::env::join_paths(folders.chain(others)).unwrap_or(path);
        command.env("PATH", path).env("VZDUMP_QEMU_BIN", &self.qemu_bin)
    }

    /// The same program that cannot be interrupted, for cleaning up.
    #[must_use]
    pub fn uninterrupted(&self) -> Self {
        Self { stop: Stop::default(), ..self.clone() }
    }

    /// Starts a command.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn spawn(&self, arguments: &[&str]) -> Result<Collected> {
        self.spawn_with(arguments, &[])
    }

    /// Starts a command with more in its environment.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn spawn_with(
        &self,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Collected> {
        if self.show {
            println!("   $ {}", self.line(arguments));
        }
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(&self.root).args(arguments).args(["--output", "json"]);
        command.env("VZDUMP_QEMU_BIN", &self.qemu_bin).envs(environment.iter().copied());
        Collected::spawn(&mut command)
    }

    /// Runs a command to its end, whatever that is.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn finish(&self, arguments: &[&str], timeout: Duration) -> Result<Finished> {
        self.spawn(arguments)?.finish(timeout, &self.stop)
    }

    /// Runs a command that must succeed, and returns what it printed for machines.
    ///
    /// # Errors
    /// It failed, did not end in time, or printed something else.
    pub fn run(&self, arguments: &[&str], timeout: Duration) -> Result<Value> {
        let what = format!("vzdump {}", arguments.join(" "));
        let finished = self.finish(arguments, timeout)?.success(&what)?;
        last_json(&finished.stdout).with_context(|| format!("{what} printed no JSON"))
    }

    /// The command line as it can be typed.
    #[must_use]
    pub fn line(&self, arguments: &[&str]) -> String {
        let program = self.program.strip_prefix(qemu::workspace()).unwrap_or(&self.program);
        let mut line = format!("{} --root {}", program.display(), self.root.display());
        for argument in arguments {
            let quote = if argument.contains(' ') { "'" } else { "" };
            line.push_str(&format!(" {quote}{argument}{quote}"));
        }
        line
    }
}

/// The last JSON value of an output; progress may come before it.
///
/// # Errors
/// The output ends with something that is no JSON.
pub fn last_json(output: &str) -> Result<Value> {
    let mut last = None;
    for value in serde_json::Deserializer::from_str(output).into_iter::<Value>() {
        let said = || format!("not JSON: {}", tail(output));
        last = Some(value.with_context(said)?);
    }
    last.context("nothing was printed")
}

/// The `vzdump` of this program's own profile: tests need the kill points of a debug build, the
/// demo shows the release build.
pub(crate) fn find_program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(PROGRAM_VARIABLE).filter(|value| *value != OsString::new())
    {
        return Ok(path.into());
    }
    let (profile, option) =
        if cfg!(debug_assertions) { ("debug", "") } else { ("release", "--release ") };
    let path = qemu::workspace().join("target").join(profile).join("vzdump");
    if !path.is_file() {
        bail!("vzdump is not built: run cargo build {option}-p vzdump");
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_counts_and_noise_is_refused() {
        let output = "{\"percent\":1}\n{\"percent\":2}\n{\n \"done\": true\n}\n";
        assert_eq!(last_json(output).unwrap()["done"], true);
        assert!(last_json("").is_err());
        assert!(last_json("{\"a\":1}\nerror: x").is_err());
    }
}
