// SPDX-License-Identifier: MIT OR Apache-2.0
//! Manual pages and shell completions, made from the options themselves.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Cli;
use crate::output;

/// Prints the completion of a shell.
pub(crate) fn completion(shell: Shell) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "vzdump", &mut script);
    output::raw(&String::from_utf8_lossy(&script));
    ExitCode::SUCCESS
}

/// Writes a manual page for the program and for each command into a directory.
pub(crate) fn manual(dir: &Path) -> anyhow::Result<ExitCode> {
    clap_mangen::generate_to(Cli::command(), dir)
        .with_context(|| format!("cannot write the manual pages into '{}'", dir.display()))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every option of every command, each with the path of its command.
    fn options(command: &clap::Command, path: &str, found: &mut Vec<(String, String)>) {
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            if let Some(long) = argument.get_long() {
                found.push((path.to_owned(), long.to_owned()));
            }
        }
        for inner in command.get_subcommands() {
            options(inner, &format!("{path}-{}", inner.get_name()), found);
        }
    }

    #[test]
    fn each_option_is_in_its_manual_page_and_in_the_completions() {
        let dir = tempfile::tempdir().unwrap();
        manual(dir.path()).unwrap();
        let mut all = Vec::new();
        options(&Cli::command(), "vzdump", &mut all);
        assert!(all.len() > 40, "only {} options were found", all.len());
        let mut bash = Vec::new();
        clap_complete::generate(Shell::Bash, &mut Cli::command(), "vzdump", &mut bash);
        let bash = String::from_utf8(bash).unwrap();
        for (page, option) in all {
            let text = std::fs::read_to_string(dir.path().join(format!("{page}.1"))).unwrap();
            // As roff writes it.
            let written = format!("\\-\\-{}", option.replace('-', "\\-"));
            assert!(text.contains(&written), "{page}: {written} is missing in\n{text}");
            assert!(bash.contains(&format!("--{option}")), "{option}");
        }
        assert!(bash.contains("snapshot suspend stop"), "the modes are completed");
        let help = Cli::command().term_width(100).render_help().to_string();
        let signals = help.lines().skip_while(|line| !line.starts_with("Signals:"));
        let lines: Vec<_> = signals.collect();
        let is_full = |line: &&str| line.len() > 80;
        assert!(lines[..lines.len() - 1].iter().all(is_full), "{lines:#?}");
        let main = std::fs::read_to_string(dir.path().join("vzdump.1")).unwrap();
        assert!(main.contains("Exit codes") && main.contains("255"), "{main}");
    }
}
