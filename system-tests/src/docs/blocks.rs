// SPDX-License-Identifier: MIT OR Apache-2.0
//! The fenced blocks of a document: which lines are commands and which are output.

use std::ops::Range;

use anyhow::{Result, bail, ensure};

/// Who runs a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A shell.
    Shell,
    /// A monitor.
    Qmp,
}

/// One command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) kind: Kind,
    /// Where it is, counted from 1.
    pub(super) line: usize,
    /// Without its prompts.
    pub(super) command: String,
    /// The lines of its output, counted from 0.
    output: Range<usize>,
}

/// A document in lines.
#[derive(Debug)]
pub(super) struct Document {
    lines: Vec<String>,
    pub(super) steps: Vec<Step>,
    /// New output, in the order of the document.
    replaced: Vec<(Range<usize>, String)>,
}

impl Document {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let mut steps: Vec<Step> = Vec::new();
        let mut block: Option<(Kind, usize)> = None;
        for (index, line) in lines.iter().enumerate() {
            let number = index + 1;
            match (block, line.strip_prefix("```")) {
                (None, Some("console")) => block = Some((Kind::Shell, steps.len())),
                (None, Some("qmp")) => block = Some((Kind::Qmp, steps.len())),
                (None, Some(other)) => bail!("line {number}: nothing runs a block of '{other}'"),
                (Some(_), Some("")) => block = None,
                (Some(_), Some(_)) => bail!("line {number}: a block begins in a block"),
                (None, None) => {}
                (Some((kind, first)), None) => {
                    let begun = steps.len() > first;
                    add_line(&mut steps, kind, line, index, begun)?;
                }
            }
        }
        ensure!(block.is_none(), "the last block does not end");
        ensure!(!steps.is_empty(), "there is nothing to run");
        Ok(Self { lines, steps, replaced: Vec::new() })
    }

    /// The output that is shown for a command.
    pub(super) fn output(&self, step: &Step) -> String {
        self.lines[step.output.clone()].join("\n")
    }

    /// Notes what is to be shown instead.
    pub(super) fn replace(&mut self, step: &Step, output: String) {
        self.replaced.push((step.output.clone(), output));
    }

    /// The document with what was noted.
    pub(super) fn text(&self) -> String {
        let mut lines: Vec<&str> = Vec::with_capacity(self.lines.len());
        let mut next = 0;
        for (range, output) in &self.replaced {
            lines.extend(self.lines[next..range.start].iter().map(String::as_str));
            lines.extend(output.lines());
            next = range.end;
        }
        lines.extend(self.lines[next..].iter().map(String::as_str));
        lines.join("\n") + "\n"
    }
}

fn add_line(
    steps: &mut Vec<Step>,
    kind: Kind,
    line: &str,
    index: usize,
    begun: bool,
) -> Result<()> {
    let command = match kind {
        Kind::Shell => line.strip_prefix("$ "),
        Kind::Qmp if line == "(QEMU)" => Some(""),
        Kind::Qmp => line.strip_prefix("(QEMU) "),
    };
    if let Some(command) = command {
        let output = index + 1..index + 1;
        steps.push(Step { kind, line: index + 1, command: command.to_owned(), output });
        return Ok(());
    }
    let Some(step) = steps.last_mut().filter(|_| begun) else {
        bail!("line {}: output without a command", index + 1);
    };
    match line.strip_prefix("> ") {
        Some(more) if kind == Kind::Shell && step.output.is_empty() => {
            step.command.push('\n');
            step.command.push_str(more);
            step.output = index + 1..index + 1;
        }
        _ => step.output.end = index + 1,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Text.\n\n```console\n$ one\n$ two \\\n>   more\nout\n\nput\n```\n\n\
        ```qmp\n(QEMU) stop\n{}\n(QEMU)\n```\nEnd.\n";

    #[test]
    fn commands_and_their_output_are_told_apart() {
        let doc = Document::parse(TEXT).unwrap();
        let found: Vec<_> = doc
            .steps
            .iter()
            .map(|step| (step.kind, step.line, step.command.as_str(), doc.output(step)))
            .collect();
        let expected = [
            (Kind::Shell, 4, "one", String::new()),
            (Kind::Shell, 5, "two \\\n  more", "out\n\nput".to_owned()),
            (Kind::Qmp, 13, "stop", "{}".to_owned()),
            (Kind::Qmp, 15, "", String::new()),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn replaced_output_is_all_that_changes() {
        let mut doc = Document::parse(TEXT).unwrap();
        for step in doc.steps.clone() {
            let output = doc.output(&step);
            doc.replace(&step, output);
        }
        assert_eq!(doc.text(), TEXT);
        doc.replaced.clear();
        for (step, output) in doc.steps.clone().iter().zip(["new", "", "a\nb", "c"]) {
            doc.replace(step, output.to_owned());
        }
        let expected = TEXT.replace("one\n", "one\nnew\n").replace("out\n\nput\n", "");
        let expected = expected.replace("{}\n", "a\nb\n").replace("(QEMU)\n", "(QEMU)\nc\n");
        assert_eq!(doc.text(), expected);
    }

    #[test]
    fn what_nothing_runs_is_refused() {
        for text in [
            "```sh\nrm -r /\n```\n",
            "```console\nout\n```\n",
            "```console\n$ one\n```\n```console\nout\n```\n",
            "```console\n$ one\n",
            "no block\n",
        ] {
            assert!(Document::parse(text).is_err(), "{text}");
        }
    }
}
