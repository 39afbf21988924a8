// SPDX-License-Identifier: MIT OR Apache-2.0
//! The layout of QAPI documentation that QEMU's generator insists on from 10.2 on; older ones take it
//! too. Checked here because the default QEMU would not notice.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Rule;

const MAX_COLUMNS: usize = 70;

/// Reads and checks the QAPI files among `files`.
pub(super) fn check(root: &Path, files: &[String]) -> Result<Rule> {
    let mut broken = Vec::new();
    for file in files.iter().filter(|file| file.contains("/qapi/") && file.ends_with(".json")) {
        let path = root.join(file);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{}: cannot read", path.display()))?;
        broken
            .extend(faults(&text).into_iter().map(|(line, what)| format!("{file}:{line}: {what}")));
    }
    Ok(Rule { name: "QAPI documentation is laid out as newer QEMU wants it", broken })
}

/// Line, from 1, and fault.
fn faults(text: &str) -> Vec<(usize, &'static str)> {
    let mut faults = Vec::new();
    // Examples are laid out as their protocol is.
    let (mut inside, mut example) = (false, false);
    for (index, line) in text.lines().enumerate() {
        if line.starts_with("##") {
            (inside, example) = (!inside, false);
            continue;
        }
        if !inside {
            continue;
        }
        let body = line.trim_start_matches('#');
        if body.trim_end().ends_with("::") {
            example = true;
            continue;
        }
        // Its lines are indented, what follows it is not.
        example &= body.trim().is_empty() || body.starts_with("   ");
        if example {
            continue;
        }
        let address = body.trim().starts_with("http") && !body.trim().contains(' ');
        if line.chars().count() > MAX_COLUMNS && !address {
            faults.push((index + 1, "longer than 70 columns"));
        }
        if one_space_after_sentence(body) {
            faults.push((index + 1, "sentences are two spaces apart"));
        }
    }
    faults
}

fn one_space_after_sentence(line: &str) -> bool {
    let chars: Vec<char> = line.chars().collect();
    let list_number = |at: usize| {
        let before: String = chars[..at].iter().collect();
        let before = before.trim();
        before.len() == 1 && before.starts_with(|c: char| c.is_ascii_digit())
    };
    let abbreviation = |at: usize| chars[..at].iter().collect::<String>().ends_with("e.g");
    chars.windows(3).enumerate().any(|(at, three)| {
        matches!(three[0], '.' | '!' | '?')
            && three[1] == ' '
            && (three[2].is_ascii_uppercase() || three[2].is_ascii_digit() || three[2] == '(')
            && !list_number(at)
            && !abbreviation(at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_documentation_is_checked() {
        let long = "x".repeat(80);
        let text = format!(
            "# Outside. {long}\n##\n# @a:\n#\n# {long}\n#\n# One. Two\n# One.  Two\n# e.g. A\n\
             # 1. First\n# v1.2 done\n# https://{long}\n# .. qmp-example::\n#\n#     -> {long}. A\n#\n\
             # {long}\n##\n{{ 'a': '{long}' }}\n"
        );
        let lines: Vec<usize> = faults(&text).iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [5, 7, 17]);
    }
}
