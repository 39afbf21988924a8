// SPDX-License-Identifier: MIT OR Apache-2.0
//! Takes what `qmp-shell` takes and gives what it shows.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use qmp_client::{Event, EventItem, EventStream, Options, Session};
use serde_json::{Map, Value, json};
use tokio::time::timeout;

use super::answer;

/// How long a command, or an event that must come, may take.
const LIMIT: Duration = Duration::from_secs(60);
/// For an event that must not come.
const QUIET: Duration = Duration::from_millis(300);

/// A connection; events are kept from its beginning.
#[derive(Debug)]
pub(super) struct Monitor {
    session: Session,
    events: EventStream,
}

impl Monitor {
    pub(super) async fn connect(socket: &Path) -> Result<Self> {
        let session = Session::connect(socket, Options::default()).await?;
        let events = session.events();
        Ok(Self { session, events })
    }

    pub(super) fn banner(&self) -> String {
        let version = self.session.version();
        format!("Welcome to the QMP low-level shell!\nConnected to QEMU {version}")
    }

    /// Executes a line of the form `command key=value key.part=value`.
    pub(super) async fn execute(&self, line: &str) -> Result<Value> {
        let (command, arguments) = parse(line)?;
        let result = self.session.execute_raw(&command, arguments, Some(LIMIT)).await;
        match result {
            // It ends before it answers, sometimes.
            Err(qmp_client::Error::Disconnected) if command == "quit" => answer(Ok(json!({}))),
            result => answer(result),
        }
    }

    /// The events since the last call: waits for so many, and for more of them only a moment.
    pub(super) async fn events(&mut self, expected: usize) -> Result<Vec<Value>> {
        let mut found = Vec::new();
        loop {
            let limit = if found.len() < expected { LIMIT } else { QUIET };
            match timeout(limit, self.events.next()).await {
                Ok(Some(EventItem::Event(event))) => found.push(message(&event)),
                Ok(Some(EventItem::Lagged(lost))) => bail!("{lost} events are lost"),
                Ok(None) | Err(_) => return Ok(found),
            }
        }
    }
}

fn message(event: &Event) -> Value {
    let (seconds, microseconds) = (event.timestamp.seconds, event.timestamp.microseconds);
    let timestamp = json!({ "seconds": seconds, "microseconds": microseconds });
    let mut message = json!({ "event": event.name, "timestamp": timestamp });
    if !event.data.is_null() {
        message["data"] = event.data.clone();
    }
    message
}

/// A line as `qmp-shell` reads it.
fn parse(line: &str) -> Result<(String, Value)> {
    let mut words = words(line)?.into_iter();
    let command = words.next().context("an empty command")?;
    let mut arguments = Map::new();
    for word in words {
        let (key, text) = word.split_once('=').with_context(|| format!("'{word}' has no ="))?;
        let mut object = &mut arguments;
        let mut parts: Vec<&str> = key.split('.').collect();
        let last = parts.pop().unwrap_or_default();
        for part in parts {
            let inner = object.entry(part).or_insert_with(|| json!({}));
            object = inner.as_object_mut().with_context(|| format!("'{key}' has two meanings"))?;
        }
        let before = object.insert(last.to_owned(), value(text)?);
        ensure!(before.is_none(), "'{key}' is there twice");
    }
    Ok((command, Value::Object(arguments)))
}

/// Words are separated by space that is not between quotes; the quotes stay.
fn words(line: &str) -> Result<Vec<String>> {
    let mut words = vec![String::new()];
    let mut quote = None;
    let mut escaped = false;
    for c in line.chars() {
        if quote.is_none() && c.is_whitespace() {
            words.push(String::new());
            continue;
        }
        quote = match quote {
            None if c == '"' || c == '\'' => Some(c),
            Some(open) if c == open && !escaped => None,
            quote => quote,
        };
        escaped = quote.is_some() && c == '\\' && !escaped;
        words.last_mut().context("there is always one")?.push(c);
    }
    ensure!(quote.is_none(), "a quote does not end: {line}");
    words.retain(|word| !word.is_empty());
    Ok(words)
}

fn value(text: &str) -> Result<Value> {
    if let Ok(number) = text.parse::<i64>() {
        return Ok(json!(number));
    }
    match text.to_ascii_lowercase().as_str() {
        "true" => return Ok(json!(true)),
        "false" => return Ok(json!(false)),
        _ => {}
    }
    if text.starts_with(['{', '[']) {
        return serde_json::from_str(text).with_context(|| format!("not JSON: {text}"));
    }
    Ok(json!(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_as_qmp_shell_does() {
        let line = "do it=1 yes=True list=[{\"a\":\"b\"}] a.b.c=x a.b.d=-2 text=a,b:c=d ";
        let expected = json!({ "it": 1, "yes": true, "list": [{ "a": "b" }],
            "a": { "b": { "c": "x", "d": -2 } }, "text": "a,b:c=d" });
        assert_eq!(parse(line).unwrap(), ("do".to_owned(), expected));
        let spaced = parse("do x=[\"a \\\" b\"]").unwrap();
        assert_eq!(spaced.1, json!({ "x": ["a \" b"] }));
        assert_eq!(parse("do").unwrap().1, json!({}));
        for bad in ["", "do it", "do a=1 a=2", "do a=1 a.b=2", "do a=[1", "do a=\"b"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
