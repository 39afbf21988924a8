// SPDX-License-Identifier: MIT OR Apache-2.0
//! Judges an unknown QEMU tree before anything is built from it: does it have what the patch and the
//! extension want of it?
//!
//! The probes read text. They find what is missing, what has another number of parameters, and
//! where the patch does not fit; that a type has changed is found by the compiler.

mod headers;
#[cfg(test)]
mod tests;
mod wanted;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use headers::{Arity, Headers, Member};
use wanted::{Probe, Want};

/// The table's order.
const KINDS: &[&str] =
    &["patch", "file", "header", "qapi", "callback", "parameter", "member", "function", "name"];
/// Where each kind of QAPI definition may stand.
const QAPI_FOLDER: &str = "qapi";
/// What QEMU's build calls once it is patched.
const CALL: &str = "backup-ext/build.sh";

/// Which probes are shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Show {
    /// Each, as a table.
    All,
    /// Those that failed, if any did.
    Failed,
}

/// Judges `tree`, shows the outcome, and fails if a probe did and `force` does not overrule it; also if the
/// tree has another version of our patch, which nothing overrules.
pub(crate) fn judge(ext: &Path, tree: &Path, show: Show, force: bool) -> Result<()> {
    is_patched(ext, tree)?;
    let report = check(ext, tree)?;
    if show == Show::All || report.failed() > 0 {
        println!("{}", report.table(show));
    }
    if force { Ok(()) } else { report.verdict(tree) }
}

/// Whether `tree` has the patch, all of it as it is now; an error if it has a part of it or an older one.
pub(crate) fn is_patched(ext: &Path, tree: &Path) -> Result<bool> {
    let (mut there, mut missing) = (0, Vec::new());
    for probe in wanted::places(ext)? {
        let Want::Anchor { file, hunk } = probe.want else { continue };
        if tree.join(&file).is_file() && applies(tree, &hunk, &["--reverse"])? {
            there += 1;
        } else {
            missing.push(file);
        }
    }
    // The call that every version of the patch has had.
    let is_named =
        fs::read_to_string(tree.join("meson.build")).is_ok_and(|text| text.contains(CALL));
    if missing.is_empty() || (there == 0 && !is_named) {
        return Ok(missing.is_empty());
    }
    bail!(
        "{}: has another version of our patch, or only a part of it: not as the patch of this checkout \
         leaves them are {}. Start from an unpatched tree",
        tree.display(),
        missing.join(", ")
    )
}

/// The probes of one tree and how each ended.
struct Report {
    rows: Vec<Row>,
}

struct Row {
    kind: &'static str,
    name: String,
    purpose: String,
    /// What is wrong.
    failure: Option<String>,
}

/// Judges `tree` by what this checkout's extension, in `ext`, wants of it.
fn check(ext: &Path, tree: &Path) -> Result<Report> {
    let probes = wanted::read(ext)?;
    let roots: Vec<&str> = probes
        .iter()
        .filter_map(|probe| match &probe.want {
            Want::Header { names } => Some(names),
            _ => None,
        })
        .flatten()
        .map(String::as_str)
        .collect();
    let qapi = read_qapi(tree);
    let constants = headers::qapi_constants(&qapi);
    let judge = Judge { tree, headers: Headers::read(tree, &roots), qapi, constants };
    let mut rows = probes.iter().map(|probe| judge.row(probe)).collect::<Result<Vec<_>>>()?;
    rows.sort_by_key(|row| KINDS.iter().position(|kind| *kind == row.kind));
    Ok(Report { rows })
}

impl Report {
    /// How many probes failed.
    fn failed(&self) -> usize {
        self.rows.iter().filter(|row| row.failure.is_some()).count()
    }

    /// The table: every probe, or only those that failed.
    fn table(&self, show: Show) -> String {
        let shown = |row: &&Row| show == Show::All || row.failure.is_some();
        let rows: Vec<&Row> = self.rows.iter().filter(shown).collect();
        let width = |of: fn(&Row) -> usize| rows.iter().map(|row| of(row)).max().unwrap_or(0);
        let (kinds, names) = (width(|row| row.kind.len()), width(|row| row.name.len()));
        let mut text = String::new();
        for row in rows {
            let (verdict, note) = match &row.failure {
                None => ("ok", String::new()),
                Some(why) => ("FAILED", format!(": {why}")),
            };
            let line = format!(
                "{verdict:<6}  {:<kinds$}  {:<names$}  {}{note}",
                row.kind, row.name, row.purpose
            );
            let _ = writeln!(text, "{}", line.trim_end());
        }
        let _ = writeln!(text, "{} probes, {} failed", self.rows.len(), self.failed());
        text
    }

    /// Fails if a probe did.
    fn verdict(&self, tree: &Path) -> Result<()> {
        let failed = self.failed();
        if failed == 0 {
            return Ok(());
        }
        bail!(
            "{}: {failed} of {} probes failed (table above); this QEMU needs changes in qemu-ext, see \
             docs/patched-qemu.md. Nothing was built; --force builds in spite of it",
            tree.display(),
            self.rows.len()
        )
    }
}

/// Every QAPI file of the tree, one after the other.
fn read_qapi(tree: &Path) -> String {
    let Ok(entries) = fs::read_dir(tree.join(QAPI_FOLDER)) else { return String::new() };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    paths.sort();
    paths.iter().filter_map(|path| fs::read_to_string(path).ok()).collect()
}

struct Judge<'a> {
    tree: &'a Path,
    headers: Headers,
    qapi: String,
    /// Made from it.
    constants: HashSet<String>,
}

impl Judge<'_> {
    fn row(&self, probe: &Probe) -> Result<Row> {
        let (kind, name) = describe(&probe.want);
        let failure = self.failure(&probe.want)?;
        Ok(Row { kind, name, purpose: probe.purpose.clone(), failure })
    }

    /// What is wrong with one of the things that are wanted.
    fn failure(&self, want: &Want) -> Result<Option<String>> {
        Ok(match want {
            Want::Anchor { file, hunk } => self.anchor(file, hunk)?,
            Want::Line { file, text } => match fs::read_to_string(self.tree.join(file)) {
                Err(_) => Some("no such file".into()),
                Ok(content) if content.contains(text) => None,
                Ok(_) => Some(format!("not in {file}")),
            },
            Want::Header { names } => {
                let found = names.iter().any(|name| self.tree.join("include").join(name).is_file());
                (!found).then(|| "no such header in include".into())
            }
            Want::Function { name, arguments } => self.function(name, *arguments),
            Want::Name { name } => {
                let known = self.headers.has_name(name) || self.constants.contains(name);
                (!known).then(|| "declared in none of the headers".into())
            }
            Want::Member { structure, name } => self.member(structure, name),
            Want::Callback { structure, name, parameters } => {
                self.callback(structure, name, *parameters)
            }
            Want::Parameter { structure, callback, index, types } => {
                self.parameter(structure, callback, *index, types)
            }
            Want::Qapi { kind, name } => {
                let definition = format!("'{kind}': '{name}'");
                (!self.qapi.contains(&definition))
                    .then(|| format!("no {definition} in qapi/*.json"))
            }
        })
    }

    fn function(&self, name: &str, arguments: Option<usize>) -> Option<String> {
        let Some(found) = self.headers.function(name) else {
            return Some("declared in none of the headers".into());
        };
        let arguments = arguments?;
        if found.iter().any(|arity| arity.accepts(arguments)) {
            return None;
        }
        let takes: Vec<String> = found
            .iter()
            .map(|arity| match arity {
                Arity::Exactly(number) => number.to_string(),
                Arity::AtLeast(number) => format!("{number} or more"),
            })
            .collect();
        Some(format!("takes {} arguments, is called with {arguments}", takes.join(" or ")))
    }

    fn member(&self, structure: &str, name: &str) -> Option<String> {
        if !self.headers.has_structure(structure) {
            return Some(format!("no struct {structure} in the headers"));
        }
        let found = self.headers.member(structure, name).is_some();
        (!found).then(|| format!("struct {structure} has no such member"))
    }

    fn callback(&self, structure: &str, name: &str, parameters: usize) -> Option<String> {
        if let Some(failure) = self.member(structure, name) {
            return Some(failure);
        }
        match self.headers.member(structure, name)?.parameters() {
            None => Some("is not a pointer to a function".into()),
            Some(found) if found.len() != parameters => {
                Some(format!("takes {} parameters, ours takes {parameters}", found.len()))
            }
            Some(_) => None,
        }
    }

    fn parameter(
        &self,
        structure: &str,
        callback: &str,
        index: usize,
        types: &[&str],
    ) -> Option<String> {
        let parameters = self.headers.member(structure, callback).and_then(Member::parameters);
        let Some(found) = parameters.as_ref().and_then(|list| list.get(index)) else {
            return Some("there is no such parameter".into());
        };
        // `type name`: a parameter without a name would be a type alone.
        let known = types.iter().any(|known| {
            found == known || found.strip_prefix(known).is_some_and(|rest| rest.starts_with(' '))
        });
        (!known).then(|| format!("is \"{found}\", known are {}", types.join(", ")))
    }

    /// Whether one hunk of the patch fits as it is, as Debian's tools want it; a tree that has it
    /// already is fine.
    fn anchor(&self, file: &str, hunk: &str) -> Result<Option<String>> {
        if !self.tree.join(file).is_file() {
            return Ok(Some("no such file".into()));
        }
        let fits = applies(self.tree, hunk, &[])? || applies(self.tree, hunk, &["--reverse"])?;
        Ok((!fits).then(|| "the place to change is not found".into()))
    }
}

/// Whether a hunk fits into a tree as it is.
fn applies(tree: &Path, hunk: &str, options: &[&str]) -> Result<bool> {
    let mut child = Command::new("patch")
        .args(["-p1", "--fuzz=0", "--dry-run", "--force", "--silent"])
        .args(options)
        .current_dir(tree)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("patch: cannot start; install the package patch")?;
    if let Some(mut stdin) = child.stdin.take() {
        // A patch that ends early has failed; its exit code says so.
        let _ = std::io::Write::write_all(&mut stdin, hunk.as_bytes());
    }
    Ok(child.wait().context("patch: cannot wait for it")?.success())
}

/// Kind and name of a probe, for the table.
fn describe(want: &Want) -> (&'static str, String) {
    match want {
        Want::Anchor { file, .. } => ("patch", file.clone()),
        Want::Line { file, text } => ("file", format!("{file}: {text}")),
        Want::Header { names } => ("header", names.join(" or ")),
        Want::Function { name, .. } => ("function", name.clone()),
        Want::Name { name } => ("name", name.clone()),
        Want::Callback { structure, name, .. } => ("callback", format!("{structure}.{name}")),
        Want::Member { structure, name } => ("member", format!("{structure}.{name}")),
        Want::Parameter { structure, callback, index, .. } => {
            ("parameter", format!("{structure}.{callback} #{}", index + 1))
        }
        Want::Qapi { kind, name } => ("qapi", format!("{kind} {name}")),
    }
}
