// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a set of C headers declares, read as text: no compiler and no configured tree is needed, so
//! that a tree can be judged before anything is built from it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A header that nothing includes twice, and no tree has as many.
const MAX_HEADERS: usize = 4000;

/// How many arguments something takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Arity {
    Exactly(usize),
    /// Variadic, or a macro without a list of its own.
    AtLeast(usize),
}

impl Arity {
    pub(super) fn accepts(self, arguments: usize) -> bool {
        match self {
            Self::Exactly(number) => number == arguments,
            Self::AtLeast(number) => number <= arguments,
        }
    }
}

/// One member of a structure: the tokens that declare it.
#[derive(Debug, Clone)]
pub(super) struct Member {
    tokens: Vec<String>,
}

impl Member {
    /// The parameters of a member that points to a function; `None` for any other.
    pub(super) fn parameters(&self) -> Option<Vec<String>> {
        let rest = self.tokens.get(pointer_at(&self.tokens)? + 3..)?;
        let (close, open) = (rest.first()?, rest.get(1)?);
        (close == ")" && open == "(").then(|| parameters(&rest[1..]))
    }
}

/// Everything that the headers declare at file level.
#[derive(Debug, Default)]
pub(super) struct Headers {
    functions: HashMap<String, BTreeSet<Arity>>,
    /// Macros, enumerators, types and variables.
    names: HashSet<String>,
    members: HashMap<String, HashMap<String, Member>>,
}

impl Headers {
    /// Reads the headers `roots` of a source tree and all of the tree's own that these include.
    /// What is not there (system headers, headers that the build makes) is left out.
    pub(super) fn read(tree: &Path, roots: &[&str]) -> Self {
        let mut headers = Self::default();
        let mut seen = HashSet::new();
        let mut queue: Vec<PathBuf> =
            roots.iter().filter_map(|name| find(tree, None, name)).collect();
        while let Some(path) = queue.pop() {
            if seen.len() >= MAX_HEADERS || !seen.insert(path.clone()) {
                continue;
            }
            let Ok(text) = fs::read_to_string(&path) else { continue };
            for name in headers.take(&text) {
                queue.extend(find(tree, path.parent(), &name));
            }
        }
        headers
    }

    /// Takes in one header; returns what it includes.
    pub(super) fn take(&mut self, text: &str) -> Vec<String> {
        let (code, directives) = split_directives(&without_comments(text));
        let mut includes = Vec::new();
        for line in directives {
            let line = line.trim_start_matches('#').trim_start();
            if let Some(rest) = line.strip_prefix("include") {
                includes.extend(
                    rest.trim()
                        .strip_prefix('"')
                        .and_then(|r| r.split_once('"'))
                        .map(|(name, _)| name.to_string()),
                );
            } else if let Some(rest) = line.strip_prefix("define") {
                self.define(rest.trim_start());
            }
        }
        for item in items(&tokens(&code)) {
            self.declare(item);
        }
        includes
    }

    fn define(&mut self, rest: &str) {
        let end = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
        let name = rest[..end].to_string();
        let arity = if rest[end..].starts_with('(') {
            arity(&tokens(&rest[end..]))
        } else {
            // It may stand for a function.
            Arity::AtLeast(0)
        };
        self.functions.entry(name.clone()).or_default().insert(arity);
        self.names.insert(name);
    }

    /// Takes in one declaration or definition.
    fn declare(&mut self, item: &[String]) {
        let body = item.iter().position(|token| token == "{");
        let end = body.map_or(item.len(), |open| open + group(&item[open..], "{", "}"));
        if let Some(open) = body {
            let head = &item[..open];
            let inside = &item[open + 1..end.saturating_sub(1).max(open + 1)];
            let has = |word: &str| head.iter().any(|token| token == word);
            if has("(") {
                // A function.
            } else if has("enum") {
                self.names.extend(enumerators(inside));
            } else if has("struct") || has("union") {
                let members = members(inside);
                let tag = head.last().filter(|tag| is_name(tag) && *tag != "struct");
                let alias = item[end..].iter().find(|token| is_name(token));
                for name in tag.into_iter().chain(alias) {
                    self.names.insert(name.clone());
                    self.members.entry(name.clone()).or_default().extend(members.clone());
                }
            }
        }
        // What stands outside of braces.
        let mut flat: Vec<String> = item[..body.unwrap_or(item.len())].to_vec();
        flat.extend_from_slice(&item[end..]);
        self.declare_flat(&flat);
    }

    fn declare_flat(&mut self, flat: &[String]) {
        let mut at = 0;
        let mut last = None;
        while at < flat.len() {
            match flat[at].as_str() {
                "(" => {
                    let len = group(&flat[at..], "(", ")");
                    if let Some(name) = last.take() {
                        self.functions.entry(name).or_default().insert(arity(&flat[at..at + len]));
                    }
                    // `typedef void (Name)(…)` and `(*Name)(…)`.
                    let inner: Vec<&String> =
                        flat[at..at + len].iter().filter(|token| is_name(token)).collect();
                    if let ([one], Some("(")) = (&inner[..], flat.get(at + len).map(String::as_str))
                    {
                        self.names.insert((*one).clone());
                    }
                    at += len;
                }
                "=" => break,
                "[" => at += group(&flat[at..], "[", "]"),
                token => {
                    if token == "," {
                        self.names.extend(last.take());
                    } else if is_name(token) {
                        last = Some(token.to_string());
                    }
                    at += 1;
                }
            }
        }
        self.names.extend(last);
        // `typedef int Name(…)`.
        if flat.first().is_some_and(|token| token == "typedef") {
            let before = flat.windows(2).find(|pair| pair[1] == "(").map(|pair| pair[0].clone());
            self.names.extend(before.filter(|name| is_name(name)));
        }
    }

    /// The ways in which a function or macro of this name can be called.
    pub(super) fn function(&self, name: &str) -> Option<&BTreeSet<Arity>> {
        self.functions.get(name)
    }

    /// Whether there is a macro, enumerator, type or variable of this name.
    pub(super) fn has_name(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// A member of a structure, by the structure's tag or alias.
    pub(super) fn member(&self, structure: &str, member: &str) -> Option<&Member> {
        self.members.get(structure)?.get(member)
    }

    /// Whether the structure is there at all.
    pub(super) fn has_structure(&self, structure: &str) -> bool {
        self.members.contains_key(structure)
    }
}

/// The C constants that QEMU generates for the enums of its QAPI files: `RUN_STATE_DEBUG` for value
/// `debug` of `RunState`, or with the prefix that the enum gives.
pub(super) fn qapi_constants(schema: &str) -> HashSet<String> {
    let code: Vec<&str> =
        schema.lines().filter(|line| !line.trim_start().starts_with('#')).collect();
    let tokens = tokens(&code.join("\n"));
    let mut constants = HashSet::new();
    for at in 0..tokens.len() {
        if tokens[at] != "{" || tokens.get(at + 1).is_none_or(|token| token != "'enum'") {
            continue;
        }
        let definition = &tokens[at..at + group(&tokens[at..], "{", "}")];
        let after = |key: &str| {
            let at = definition.iter().position(|token| token == key)?;
            definition.get(at + 2)
        };
        let text = |token: &String| token.trim_matches('\'').to_string();
        let Some(name) = after("'enum'").map(text) else { continue };
        let prefix = after("'prefix'").map_or_else(|| upper(&name), text);
        let Some(list) = definition.iter().position(|token| token == "[") else { continue };
        let list = &definition[list..list + group(&definition[list..], "[", "]")];
        for entry in split(&list[1..list.len().saturating_sub(1).max(1)], ",") {
            // `'value'` or `{ 'name': 'value', … }`.
            let value = match entry.iter().position(|token| token == "'name'") {
                None => entry.first(),
                Some(at) => entry.get(at + 2),
            };
            let Some(value) = value.filter(|value| value.starts_with('\'')) else { continue };
            let value = text(value).to_ascii_uppercase().replace(['-', '.'], "_");
            constants.insert(format!("{prefix}_{value}"));
        }
    }
    constants
}

/// `RunState` as `RUN_STATE`.
fn upper(camel: &str) -> String {
    let mut out = String::new();
    let mut before = '_';
    for c in camel.chars() {
        if c.is_ascii_uppercase() && (before.is_ascii_lowercase() || before.is_ascii_digit()) {
            out.push('_');
        }
        out.push(c.to_ascii_uppercase());
        before = c;
    }
    out
}

/// Where a quoted include leads in the tree.
fn find(tree: &Path, beside: Option<&Path>, name: &str) -> Option<PathBuf> {
    let beside = beside.map(|dir| dir.join(name));
    beside.into_iter().chain([tree.join("include").join(name)]).find(|path| path.is_file())
}

pub(super) fn is_word(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

fn is_name(token: &str) -> bool {
    token.starts_with(|c: char| c == '_' || c.is_ascii_alphabetic())
}

/// C source without its comments; lines stay where they are.
pub(super) fn without_comments(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['/', '"', '\'']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let len = if let Some(comment) = rest.strip_prefix("/*") {
            let len = comment.find("*/").map_or(rest.len(), |end| end + 4);
            out.push(' ');
            out.extend(rest[..len].chars().filter(|c| *c == '\n'));
            len
        } else if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else {
            let len = if rest.starts_with('/') { 1 } else { literal(rest) };
            out.push_str(&rest[..len]);
            len
        };
        rest = &rest[len..];
    }
    out.push_str(rest);
    out
}

/// The length of the text or character literal at the beginning; an unfinished one ends its line.
fn literal(text: &str) -> usize {
    let quote = text.as_bytes()[0];
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            b'\n' if !escaped => return at,
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            byte if byte == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Code and preprocessor lines, the latter with their continuations joined.
fn split_directives(text: &str) -> (String, Vec<String>) {
    let joined = text.replace("\\\r\n", " ").replace("\\\n", " ");
    let mut code = String::with_capacity(joined.len());
    let mut directives = Vec::new();
    for line in joined.lines() {
        if line.trim_start().starts_with('#') {
            directives.push(line.trim().to_string());
        } else {
            code.push_str(line);
            code.push('\n');
        }
    }
    (code, directives)
}

/// Words and single signs; literals are one token, `...` too.
pub(super) fn tokens(code: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let len = if is_word(first) {
            rest.find(|c| !is_word(c)).unwrap_or(rest.len())
        } else if first == '"' || first == '\'' {
            literal(rest)
        } else if rest.starts_with("...") {
            3
        } else {
            first.len_utf8()
        };
        tokens.push(rest[..len].to_string());
        rest = rest[len..].trim_start();
    }
    tokens
}

/// The number of tokens of the group that begins here, its signs included.
fn group(tokens: &[String], open: &str, close: &str) -> usize {
    let mut depth = 0_usize;
    for (at, token) in tokens.iter().enumerate() {
        if token == open {
            depth += 1;
        } else if token == close {
            depth = depth.saturating_sub(1);
        }
        if depth == 0 {
            return at + 1;
        }
    }
    tokens.len()
}

/// Declarations and definitions at file level: each ends with `;`, or with the body of a function.
fn items(tokens: &[String]) -> Vec<&[String]> {
    let mut items = Vec::new();
    let (mut start, mut at) = (0, 0);
    while at < tokens.len() {
        match tokens[at].as_str() {
            "{" => {
                let is_function = at > start && tokens[at - 1] == ")";
                at += group(&tokens[at..], "{", "}");
                if is_function {
                    items.push(&tokens[start..at]);
                    start = at;
                }
            }
            ";" => {
                items.push(&tokens[start..at]);
                at += 1;
                start = at;
            }
            _ => at += 1,
        }
    }
    items.push(&tokens[start..]);
    items
}

/// The names in the body of an enum.
fn enumerators(body: &[String]) -> Vec<String> {
    let parts = split(body, ",");
    parts.iter().filter_map(|part| part.first().filter(|token| is_name(token)).cloned()).collect()
}

/// The members in the body of a structure, by name.
fn members(body: &[String]) -> HashMap<String, Member> {
    let mut found = HashMap::new();
    for statement in split(body, ";") {
        // A structure inside, whose members count as ours if it has no name.
        let open = statement.iter().position(|token| token == "{");
        let statement = match open {
            None => statement,
            Some(open) => {
                let end = open + group(&statement[open..], "{", "}");
                let after = &statement[end..];
                if after.is_empty() {
                    found
                        .extend(members(&statement[open + 1..end.saturating_sub(1).max(open + 1)]));
                }
                after
            }
        };
        let member = Member { tokens: statement.to_vec() };
        if let Some(name) = pointer_at(statement).and_then(|at| statement.get(at + 2)) {
            found.insert(name.clone(), member);
            continue;
        }
        // `type a, *b[4];`, `LIST_HEAD(, Type) a;`.
        for part in split(statement, ",") {
            let size = part.iter().position(|token| token == ":" || token == "[");
            let declared = &part[..size.unwrap_or(part.len())];
            if let Some(name) = declared.iter().rfind(|token| is_name(token)) {
                found.insert(name.clone(), member.clone());
            }
        }
    }
    found
}

/// Where `(*` of a pointer to a function stands.
fn pointer_at(tokens: &[String]) -> Option<usize> {
    tokens.windows(2).position(|pair| pair[0] == "(" && pair[1] == "*")
}

/// Splits at a sign that stands outside of all brackets.
fn split<'a>(tokens: &'a [String], sign: &str) -> Vec<&'a [String]> {
    let mut parts = Vec::new();
    let (mut start, mut depth) = (0, 0_usize);
    for (at, token) in tokens.iter().enumerate() {
        match token.as_str() {
            "(" | "{" | "[" => depth += 1,
            ")" | "}" | "]" => depth = depth.saturating_sub(1),
            token if token == sign && depth == 0 => {
                parts.push(&tokens[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&tokens[start..]);
    parts.retain(|part| !part.is_empty());
    parts
}

/// The parameters in a group of round brackets, each as text.
fn parameters(tokens: &[String]) -> Vec<String> {
    let len = group(tokens, "(", ")");
    let inside = &tokens[1..len.saturating_sub(1).max(1)];
    let parts: Vec<String> = split(inside, ",").iter().map(|part| part.join(" ")).collect();
    if parts == ["void"] { Vec::new() } else { parts }
}

fn arity(tokens: &[String]) -> Arity {
    let parameters = parameters(tokens);
    if parameters.last().is_some_and(|last| last.ends_with("...")) {
        Arity::AtLeast(parameters.len() - 1)
    } else {
        Arity::Exactly(parameters.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = r#"
/* int commented(void); */
#ifndef A_H
#define A_H
#include "other/b.h"
#include <stdio.h>
#define LIMIT 4
#define twice(a, \
              b) ((a) + (b))
#define say(fmt, ...) print(fmt, ## __VA_ARGS__)
// bool commented_too(int a);
typedef struct Node Node;
typedef int Open(Node *n, int flags);
typedef void (Close)(Node *n);
typedef void (*Callback)(void *opaque);
typedef enum { FIRST = 1 << 2, SECOND, LAST = max(1, 2), } Kind;
extern const Kind table[], one_of_them;
int coroutine_fn GUARDED
open_it(Node *n, int (*each)(Node *n, int x), const char *text);
void MARK(lock) close_it(void);
static inline int half(int x) { helper(x); return x / 2; }
void variadic(const char *fmt, ...) G_PRINTF(1, 2);
struct Node {
    const char *name; /* its name */
    bool a:1, *b[4];
    int coroutine_fn GUARDED (*status)(Node *n,
        bool exact, int64_t offset);
    LIST_HEAD(, Node) children;
    struct { int inner; } outer;
    int (*none)(void);
};
#endif
"#;

    fn headers() -> (Headers, Vec<String>) {
        let mut headers = Headers::default();
        let includes = headers.take(HEADER);
        (headers, includes)
    }

    fn calls(headers: &Headers, name: &str) -> Vec<Arity> {
        headers.function(name).into_iter().flatten().copied().collect()
    }

    #[test]
    fn finds_functions_with_their_number_of_parameters() {
        let (headers, includes) = headers();
        assert_eq!(includes, ["other/b.h"]);
        assert_eq!(calls(&headers, "open_it"), [Arity::Exactly(3)]);
        assert_eq!(calls(&headers, "close_it"), [Arity::Exactly(0)]);
        assert_eq!(calls(&headers, "half"), [Arity::Exactly(1)]);
        assert_eq!(calls(&headers, "variadic"), [Arity::AtLeast(1)]);
        assert_eq!(calls(&headers, "twice"), [Arity::Exactly(2)]);
        assert_eq!(calls(&headers, "say"), [Arity::AtLeast(1)]);
        // Calls in bodies and what stands in comments declare nothing.
        for name in ["helper", "print", "commented", "commented_too", "each"] {
            assert_eq!(calls(&headers, name), [], "{name}");
        }
    }

    #[test]
    fn finds_types_constants_and_variables() {
        let (headers, _) = headers();
        for name in [
            "LIMIT",
            "Node",
            "Open",
            "Close",
            "Callback",
            "Kind",
            "FIRST",
            "SECOND",
            "LAST",
            "table",
            "one_of_them",
        ] {
            assert!(headers.has_name(name), "{name}");
        }
        for name in ["inner", "flags", "max", "GUARDED", "commented"] {
            assert!(!headers.has_name(name), "{name}");
        }
    }

    #[test]
    fn finds_members_and_the_parameters_of_callbacks() {
        let (headers, _) = headers();
        for name in ["name", "a", "b", "status", "children", "outer", "none"] {
            assert!(headers.member("Node", name).is_some(), "{name}");
        }
        assert!(headers.member("Node", "inner").is_none());
        assert!(headers.member("Node", "exact").is_none());
        assert!(headers.has_structure("Node") && !headers.has_structure("Kind"));
        let parameters = |name| headers.member("Node", name).unwrap().parameters();
        assert_eq!(parameters("status").unwrap(), ["Node * n", "bool exact", "int64_t offset"]);
        assert_eq!(parameters("none").unwrap(), [""; 0]);
        assert_eq!(parameters("name"), None);
    }

    #[test]
    fn finds_the_constants_of_qapi_enums() {
        let constants = qapi_constants(
            "# { 'enum': 'Not', 'data': [ 'this' ] }\n\
             { 'enum': 'RunState',\n  'data': [ 'debug', 'in-migrate',\n    # why\n\
               { 'name': 'late', 'if': 'X' } ] }\n\
             { 'enum': 'Old', 'prefix': 'NEW', 'data': ['a'], 'if': 'Y' }\n\
             { 'struct': 'S', 'data': { 'data': 'str' } }\n{ 'enum': 'Broken', 'data': [ 'x'",
        );
        let mut constants: Vec<String> = constants.into_iter().collect();
        constants.sort();
        assert_eq!(
            constants,
            ["NEW_A", "RUN_STATE_DEBUG", "RUN_STATE_IN_MIGRATE", "RUN_STATE_LATE"]
        );
    }

    #[test]
    fn broken_headers_end() {
        for text in
            ["{", "}", "(", "f(", "struct A {", "\"", "'", "/*", "#define", "enum { A", "=("]
        {
            Headers::default().take(text);
        }
    }
}
