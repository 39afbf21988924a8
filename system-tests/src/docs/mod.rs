// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs the sessions that a document shows, and compares what comes of them with what it shows.
//!
//! Two kinds of fenced blocks are sessions; a document has no others:
//!
//! * `console`: lines that begin with `$ ` go to one shell, those with `> ` go on with them;
//! * `qmp`: lines that begin with `(QEMU) ` are commands as `qmp-shell` takes them; an empty one shows
//!   the events since the last, as it does there. `$ qmp-shell -p SOCKET` in a `console` block says where.
//!
//! Everything between two commands is output and must come again. What is another one in each run
//! (listed in `unify.rs`) may differ: names are bound to those of this run when they first appear, and
//! replaced in every later command. So a document shows real output, and its reader can type what
//! it says.
//!
//! With `BLESS_DOCS=1` the output in the document is replaced by that of this run.

mod blocks;
mod monitor;
mod python;
mod shell;
mod unify;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use blocks::{Document, Kind, Step};
use monitor::Monitor;
use shell::Shell;
use unify::Names;

/// The folder that documents work in; the test's own stands for it.
const FOLDER: &str = "/tmp/backup-demo";
/// Where documents, read at the top of the checkout, have the patched programs.
const PROGRAMS: &str = "$PWD/target/qemu/bin";
/// How a document connects to a monitor.
const QMP_SHELL: &str = "qmp-shell -p ";

/// What came of one command.
#[derive(Debug, Default)]
struct Outcome {
    /// As the document should show it.
    output: String,
    /// How it differs from what the document shows.
    difference: Option<String>,
    /// What would be wrong however the document shows it.
    fault: Option<String>,
}

/// A run of a document.
struct Run {
    shell: Shell,
    monitor: Option<Monitor>,
    names: Names,
    folder: PathBuf,
    programs: PathBuf,
    /// Members of the replies and events of the extension.
    members: BTreeSet<String>,
}

/// Runs a document.
///
/// # Errors
/// Something it shows is not so. All differences are named, up to the first that makes going on
/// impossible.
pub async fn check(document: &Path, folder: &Path) -> Result<()> {
    let text = fs::read_to_string(document)
        .with_context(|| format!("{}: cannot read", document.display()))?;
    let mut doc = Document::parse(&text)?;
    let programs = crate::qemu::bin_dir()?;
    let mut shell = Shell::start(crate::qemu::workspace())?;
    if text.contains("\n$ vzdump ") {
        shell.run(&installed(&programs)?)?;
    }
    let mut run = Run {
        shell,
        monitor: None,
        names: Names::default(),
        folder: folder.to_owned(),
        programs,
        members: BTreeSet::new(),
    };
    let (mut differences, mut faults) = (Vec::new(), Vec::new());
    for step in doc.steps.clone() {
        let shown = doc.output(&step);
        let outcome = run.step(&step, &shown).await;
        let outcome = outcome.with_context(|| {
            format!("{}, line {}: {}", document.display(), step.line, step.command)
        })?;
        let at = |what: String| format!("line {}: {what}", step.line);
        differences.extend(outcome.difference.map(at));
        faults.extend(outcome.fault.map(at));
        doc.replace(&step, outcome.output);
    }
    let unexplained = run.members.iter().filter(|member| !text.contains(&format!("`{member}`")));
    faults.extend(unexplained.map(|member| format!("no sentence explains `{member}`")));
    if std::env::var_os("BLESS_DOCS").is_some() {
        fs::write(document, doc.text())
            .with_context(|| format!("{}: cannot write", document.display()))?;
    } else if !differences.is_empty() {
        let advice =
            "if the document is to follow, run this with BLESS_DOCS=1 and read what changed";
        faults.extend(differences);
        faults.push(advice.to_owned());
    }
    ensure!(faults.is_empty(), "{}:\n{}", document.display(), faults.join("\n"));
    Ok(())
}

/// The command after which `vzdump` and its QEMU are there, as if they were installed.
fn installed(programs: &Path) -> Result<String> {
    let program = crate::vzdump::find_program()?;
    let folder = program.parent().context("no folder of vzdump")?.display();
    Ok(format!("export PATH='{folder}':\"$PATH\" VZDUMP_QEMU_BIN='{}'", programs.display()))
}

impl Run {
    /// Runs one command.
    async fn step(&mut self, step: &Step, shown: &str) -> Result<Outcome> {
        let command = self.real(&step.command);
        match step.kind {
            Kind::Shell => match command.strip_prefix(QMP_SHELL) {
                Some(socket) => {
                    // A monitor has one client.
                    self.monitor = None;
                    let monitor = Monitor::connect(Path::new(socket.trim())).await?;
                    let banner = monitor.banner();
                    self.monitor = Some(monitor);
                    Ok(self.compare_text(shown, &banner))
                }
                None => {
                    let output = self.shell.run(&command)?;
                    let fault = (output.status != 0 && output.text.is_empty())
                        .then(|| format!("it fails ({}) without a word", output.status));
                    Ok(Outcome { fault, ..self.compare_text(shown, &output.text) })
                }
            },
            Kind::Qmp => self.qmp(&command, shown).await,
        }
    }

    async fn qmp(&mut self, command: &str, shown: &str) -> Result<Outcome> {
        let monitor = self.monitor.as_mut().context("no `$ qmp-shell -p SOCKET` came before")?;
        let is_events = command.is_empty();
        let expected: Vec<Value> = if is_events {
            shown.lines().map(python::parse).collect::<Result<_>>()?
        } else {
            let messages = serde_json::Deserializer::from_str(shown).into_iter();
            messages.collect::<Result<_, _>>().context("what is shown is not JSON")?
        };
        let found = if is_events {
            monitor.events(expected.len()).await?
        } else {
            vec![monitor.execute(command).await?]
        };
        let found: Vec<Value> = found
            .iter()
            .map(|message| serde_json::from_str(&self.shown(&message.to_string())))
            .collect::<Result<_, _>>()?;
        for message in &found {
            if command.contains("backup-access") || is_events {
                collect_members(message, &mut self.members);
            }
        }
        let merged = unify::all(&expected, &found, &mut self.names);
        let output = if merged.difference.is_none() {
            // As it is, because the order of members means nothing.
            shown.to_owned()
        } else {
            let print = if is_events { python::print } else { unify::pretty };
            let messages: Vec<String> = merged.values.iter().map(print).collect();
            messages.join("\n")
        };
        Ok(Outcome { output, difference: merged.difference, fault: None })
    }

    fn compare_text(&self, shown: &str, found: &str) -> Outcome {
        let found = self.names.to_document(&self.shown(found));
        if unify::same_text(shown, &found) {
            return Outcome { output: shown.to_owned(), ..Outcome::default() };
        }
        let difference = Some(format!("shown is\n{shown}\nand this came:\n{found}"));
        Outcome { output: found, difference, fault: None }
    }

    /// A command of the document with the paths and names of this run.
    fn real(&self, command: &str) -> String {
        let command = command.replace(PROGRAMS, &self.programs.display().to_string());
        self.names.to_run(&command.replace(FOLDER, &self.folder.display().to_string()))
    }

    /// Output of this run with the paths of the document.
    fn shown(&self, output: &str) -> String {
        output.replace(&self.folder.display().to_string(), FOLDER)
    }
}

fn collect_members(value: &Value, members: &mut BTreeSet<String>) {
    const FRAME: &[&str] =
        &["return", "class", "desc", "event", "data", "timestamp", "seconds", "microseconds"];
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                if !FRAME.contains(&name.as_str()) {
                    members.insert(name.clone());
                }
                collect_members(value, members);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| collect_members(value, members)),
        _ => {}
    }
}

/// An answer as `qmp-shell` shows it.
fn answer(result: Result<Value, qmp_client::Error>) -> Result<Value> {
    match result {
        Ok(value) => Ok(json!({ "return": value })),
        Err(qmp_client::Error::Qmp { class, desc, .. }) => {
            Ok(json!({ "error": { "class": class, "desc": desc } }))
        }
        Err(error) => bail!(error),
    }
}
