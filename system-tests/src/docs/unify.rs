// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compares what a document shows with what came, and tells apart what may differ.

use serde::Serialize as _;
use serde_json::{Map, Value, ser::PrettyFormatter};

/// Members whose text is another one in each run, but the same wherever it is meant.
const NAMES: &[&str] = &["node-name", "bitmap-node-name", "bitmap-name", "generation"];
/// Members that say how long something took or when it was, and what depends on that.
const TIMES: &[&str] = &[
    "delay-histogram",
    "delay-max-ns",
    "delay-p50-ns",
    "delay-p99-ns",
    "delay-p999-ns",
    "delay-total-ns",
    "drained-ns",
    "lease-left",
    "metadata",
    "microseconds",
    "seconds",
    "start-time",
    "writes-delayed",
];
/// Beginnings of lines that differ between versions of programs.
const VERSIONS: &[&str] = &["Connected to QEMU "];

/// Pairs of a name in the document and a name in this run.
#[derive(Debug, Default)]
pub(super) struct Names(Vec<(String, String)>);

impl Names {
    /// Notes that the two are the same; false if either is paired with another already.
    fn pair(&mut self, document: &str, run: &str) -> bool {
        match self.0.iter().find(|(doc, name)| doc == document || name == run) {
            Some((doc, name)) => doc == document && name == run,
            None => {
                self.0.push((document.to_owned(), run.to_owned()));
                true
            }
        }
    }

    /// A text of the document with the names of this run.
    pub(super) fn to_run(&self, text: &str) -> String {
        replace(text, self.0.iter().map(|(doc, run)| (doc.as_str(), run.as_str())))
    }

    /// A text of this run with the names of the document.
    pub(super) fn to_document(&self, text: &str) -> String {
        replace(text, self.0.iter().map(|(doc, run)| (run.as_str(), doc.as_str())))
    }
}

/// Replaces all at once, so that nothing is replaced in what was put in.
fn replace<'a>(text: &str, pairs: impl Iterator<Item = (&'a str, &'a str)> + Clone) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let pair = pairs.clone().filter(|(from, _)| rest.starts_with(from));
        match pair.max_by_key(|(from, _)| from.len()) {
            Some((from, to)) if !from.is_empty() => {
                out.push_str(to);
                rest = &rest[from.len()..];
            }
            _ => {
                out.push(first);
                rest = &rest[first.len_utf8()..];
            }
        }
    }
    out
}

/// What came, as the document should show it.
#[derive(Debug)]
pub(super) struct Merged {
    pub(super) values: Vec<Value>,
    /// The first difference.
    pub(super) difference: Option<String>,
}

/// Compares messages: what came, with the document's names and times.
pub(super) fn all(shown: &[Value], found: &[Value], names: &mut Names) -> Merged {
    let mut walk = Walk { names, difference: None };
    let shown_all = Value::Array(shown.to_vec());
    let found_all = Value::Array(found.to_vec());
    let merged = walk.value(Some(&shown_all), &found_all, "", "");
    let values = if let Value::Array(values) = merged { values } else { Vec::new() };
    Merged { values, difference: walk.difference }
}

struct Walk<'a> {
    names: &'a mut Names,
    difference: Option<String>,
}

impl Walk<'_> {
    fn value(&mut self, shown: Option<&Value>, found: &Value, member: &str, path: &str) -> Value {
        if TIMES.contains(&member)
            && let Some(shown) = shown
            && std::mem::discriminant(shown) == std::mem::discriminant(found)
        {
            return shown.clone();
        }
        match (shown, found) {
            (_, Value::Object(found)) => {
                let shown = shown.and_then(Value::as_object);
                Value::Object(self.object(shown, found, path))
            }
            (_, Value::Array(found)) => {
                let shown: &[Value] = shown.and_then(Value::as_array).map_or(&[], Vec::as_slice);
                if shown.len() != found.len() {
                    self.differs(path, &format!("{} items", shown.len()), &found.len());
                }
                let each = found.iter().enumerate().map(|(index, found)| {
                    self.value(shown.get(index), found, "", &format!("{path}[{index}]"))
                });
                Value::Array(each.collect())
            }
            (Some(Value::String(shown)), Value::String(found)) => {
                let paired = NAMES.contains(&member) && self.names.pair(shown, found);
                let found = self.names.to_document(found);
                if !paired && found != *shown {
                    self.differs(path, shown, &found);
                }
                Value::String(found)
            }
            (shown, Value::String(found)) => {
                let found = self.names.to_document(found);
                self.differs(path, &show(shown), &found);
                Value::String(found)
            }
            (shown, found) => {
                if shown != Some(found) {
                    self.differs(path, &show(shown), found);
                }
                found.clone()
            }
        }
    }

    fn object(
        &mut self,
        shown: Option<&Map<String, Value>>,
        found: &Map<String, Value>,
        path: &str,
    ) -> Map<String, Value> {
        let gone = shown.into_iter().flatten().find(|(name, _)| !found.contains_key(*name));
        if let Some((name, value)) = gone {
            self.differs(&format!("{path}.{name}"), value, &"nothing");
        }
        let mut merged = Map::new();
        for (name, found) in found {
            let shown = shown.and_then(|shown| shown.get(name));
            let value = self.value(shown, found, name, &format!("{path}.{name}"));
            merged.insert(name.clone(), value);
        }
        merged
    }

    fn differs(
        &mut self,
        path: &str,
        shown: &dyn std::fmt::Display,
        found: &dyn std::fmt::Display,
    ) {
        let text = || format!("{}: {shown} is shown, {found} came", path.trim_start_matches('.'));
        self.difference.get_or_insert_with(text);
    }
}

fn show(value: Option<&Value>) -> String {
    value.map_or_else(|| "nothing".to_owned(), Value::to_string)
}

/// A reply as `qmp-shell -p` prints it.
pub(super) fn pretty(value: &Value) -> String {
    let mut out = Vec::new();
    let formatter = PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    value.serialize(&mut serializer).expect("JSON values always serialise");
    String::from_utf8(out).expect("JSON is text")
}

/// A line of a table without the time in its last column.
fn without_time(line: &str) -> &str {
    let time =
        line.strip_suffix(" ms").map(|rest| rest.trim_end_matches(|c: char| c.is_ascii_digit()));
    time.unwrap_or(line)
}

/// Whether texts are the same but for versions of programs, and times in the last columns of tables.
pub(super) fn same_text(shown: &str, found: &str) -> bool {
    let general = |line: &str| {
        let version = VERSIONS.iter().find(|version| line.starts_with(**version));
        version
            .map_or_else(|| without_time(line.trim_end()).to_owned(), |&version| version.to_owned())
    };
    shown.lines().map(general).eq(found.lines().map(general))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn compare(shown: Value, found: Value, names: &mut Names) -> (Value, Option<String>) {
        let merged = all(&[shown], &[found], names);
        (merged.values[0].clone(), merged.difference)
    }

    #[test]
    fn names_are_bound_once_and_used_from_then_on() {
        let mut names = Names::default();
        let shown = json!({ "node-name": "ba-1", "generation": "g1", "size": 5, "drained-ns": 7 });
        let found = json!({ "node-name": "ba-x", "generation": "h1", "size": 5, "drained-ns": 9 });
        assert_eq!(compare(shown.clone(), found, &mut names), (shown, None));
        assert_eq!(names.to_run("use ba-1 and g1"), "use ba-x and h1");
        assert_eq!(names.to_document("h1 of ba-x"), "g1 of ba-1");
        // The same name again is the same thing, another one is another.
        let (_, what) =
            compare(json!({ "generation": "g1" }), json!({ "generation": "h2" }), &mut names);
        assert!(what.unwrap().contains("generation"));
        let (_, what) =
            compare(json!({ "generation": "g2" }), json!({ "generation": "h1" }), &mut names);
        assert!(what.is_some());
        let (_, what) =
            compare(json!({ "desc": "g1 is bad" }), json!({ "desc": "h1 is bad" }), &mut names);
        assert_eq!(what, None);
    }

    #[test]
    fn everything_else_must_be_the_same() {
        let cases = [
            (json!({ "size": 5 }), json!({ "size": 6 })),
            (json!({ "size": 5 }), json!({ "size": "5" })),
            (json!({ "size": 5 }), json!({})),
            (json!({}), json!({ "size": 5 })),
            (json!([1]), json!([1, 2])),
            (json!([1, 2]), json!([1])),
            (json!({ "drained-ns": 5 }), json!({ "drained-ns": "5" })),
            (json!({ "device": "a" }), json!({ "device": "b" })),
        ];
        for (shown, found) in cases {
            let (merged, what) = compare(shown.clone(), found.clone(), &mut Names::default());
            assert_eq!(merged, found);
            assert!(what.is_some(), "{shown} {found}");
        }
        assert!(all(&[], &[json!(1)], &mut Names::default()).difference.is_some());
    }

    #[test]
    fn texts_differ_in_versions_and_times_only() {
        assert!(same_text("full  passed  40 ms", "full  passed  1040 ms"));
        assert!(!same_text("full  passed  40 ms", "full  FAILED  40 ms"));
        assert!(!same_text("40 ms", "40 s"));
        assert!(same_text("a\nConnected to QEMU 10.0.13", "a\nConnected to QEMU 10.2.2"));
        assert!(!same_text("a\nb", "a\nc"));
        assert!(!same_text("a\nb", "a"));
    }
}
