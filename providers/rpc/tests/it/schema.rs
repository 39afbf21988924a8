// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every message of both sides keeps to the JSON Schema, and so do the examples of the documentation.

use std::collections::{BTreeSet, HashMap};

use jsonschema::Validator;
use provider_rpc::Direction;
use serde_json::{Value, json};

const SCHEMA: &str = include_str!("../../../../docs/provider-protocol.schema.json");
const DOCUMENT: &str = include_str!("../../../../docs/provider-protocol.md");

/// The schema, once as it is, and once without members that it does not name.
pub(crate) struct Schema {
    message: Validator,
    whole: Value,
    results: HashMap<String, Validator>,
}

/// Forbids what is not named, so that an undocumented member is noticed.
fn strict(schema: &mut Value) {
    match schema {
        Value::Object(members) => {
            let is_closed = members.contains_key("additionalProperties");
            let is_named = members.get("properties").is_some_and(Value::is_object);
            // The `if` and the envelopes name only a part.
            if is_named && !is_closed && members.get("type") == Some(&json!("object")) {
                members.insert("additionalProperties".to_owned(), json!(false));
            }
            members.values_mut().for_each(strict);
        }
        Value::Array(items) => items.iter_mut().for_each(strict),
        _ => {}
    }
}

impl Schema {
    pub(crate) fn new() -> Self {
        let mut whole: Value = serde_json::from_str(SCHEMA).unwrap();
        strict(&mut whole);
        // Results are told by their requests only.
        let message = jsonschema::validator_for(&whole).unwrap();
        let names: Vec<_> = whole["$defs"].as_object().unwrap().keys().cloned().collect();
        let mut results = HashMap::new();
        for name in names.iter().filter_map(|name| name.strip_suffix(".result")) {
            let mut one = whole.clone();
            one.as_object_mut().unwrap().remove("oneOf");
            one["$ref"] = json!(format!("#/$defs/{name}.result"));
            results.insert(name.to_owned(), jsonschema::validator_for(&one).unwrap());
        }
        Self { message, whole, results }
    }

    fn methods(&self) -> BTreeSet<String> {
        let names = self.whole["$defs"].as_object().unwrap().keys();
        names.filter_map(|name| name.strip_suffix(".params")).map(str::to_owned).collect()
    }

    /// Checks messages in the order they were seen, and returns the methods among them. An answer is told to
    /// the request of the other side with its id.
    pub(crate) fn check<'a>(
        &self,
        messages: impl IntoIterator<Item = (Option<Direction>, &'a str)>,
    ) -> BTreeSet<String> {
        let (mut asked, mut seen) = (HashMap::new(), BTreeSet::new());
        for (direction, line) in messages {
            let message: Value = serde_json::from_str(line).unwrap();
            if let Err(error) = self.message.validate(&message) {
                panic!("{error}\n{line}\n{:#?}", self.why(&message));
            }
            let other = |direction| match direction {
                Direction::ToPlugin => Direction::FromPlugin,
                Direction::FromPlugin => Direction::ToPlugin,
            };
            let id = message["id"].to_string();
            if let Some(method) = message["method"].as_str() {
                seen.insert(method.trim_start_matches("$/").to_owned());
                asked.insert((direction, id), method.to_owned());
            } else if let Some(result) = message.get("result") {
                let method = &asked[&(direction.map(other), id)];
                let validator = &self.results[method];
                if let Err(error) = validator.validate(result) {
                    panic!("{error} in the result of {method}\n{line}");
                }
            }
        }
        seen
    }

    /// The faults of the one form that a message must have had.
    fn why(&self, message: &Value) -> Vec<String> {
        let mut one = self.whole.clone();
        one.as_object_mut().unwrap().remove("oneOf");
        let Some(method) = message["method"].as_str() else { return Vec::new() };
        let name = method.trim_start_matches("$/");
        one["$ref"] = json!(format!("#/$defs/{name}.params"));
        let validator = jsonschema::validator_for(&one).unwrap();
        validator.iter_errors(&message["params"]).map(|error| error.to_string()).collect()
    }
}

#[test]
fn every_message_has_an_example_in_the_document_that_keeps_to_the_schema() {
    let schema = Schema::new();
    let mut seen = BTreeSet::new();
    for block in DOCUMENT.split("```json\n").skip(1) {
        let block = block.split("```").next().unwrap();
        // An error without its request is an example, too.
        seen.extend(schema.check(block.lines().map(|line| (None, line))));
    }
    assert_eq!(seen, schema.methods(), "messages without an example");
}

#[test]
fn the_schema_finds_faults() {
    let schema = Schema::new();
    let good = json!({"jsonrpc": "2.0", "id": 1, "method": "commit",
        "params": {"guest": "g", "id": "0b0a6c3c-2f6c-4f0a-9d64-9a0f3f1f2b11"}});
    assert!(schema.message.is_valid(&good));
    for (place, value) in [
        ("/jsonrpc", json!("1.0")),
        ("/id", json!(null)),
        ("/method", json!("made.up")),
        ("/params/id", json!("4711")),
        ("/params/guest", json!(7)),
        ("/params", json!({"guest": "g"})),
        ("/params", json!({"guest": "g", "id": good["params"]["id"], "more": 1})),
    ] {
        let mut bad = good.clone();
        *bad.pointer_mut(place).unwrap() = value;
        assert!(!schema.message.is_valid(&bad), "{bad}");
    }
    for (name, is_good) in
        [("a/b..c", true), ("...", true), ("a/../b", false), ("a/", false), (".", false)]
    {
        let result = json!({"archives": [name]});
        assert_eq!(schema.results["unreadable"].is_valid(&result), is_good, "{name}");
    }
    assert!(!schema.results["status"].is_valid(&json!({"total_bytes": 1, "used_bytes": "1"})));
}
