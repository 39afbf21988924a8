// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which files of a container patterns leave out.
//!
//! A pattern is one of components, as a path is. Each directory of a walk has a [`Reached`]: how far which
//! patterns have come there. So a name is compared once, and a walk sees where nothing can be left out any more.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path};
use std::sync::Arc;

use crate::{Error, Kind, Result};

/// The longest pattern.
const PATTERN_BYTES_MAX: usize = 4096;
/// The most patterns.
const PATTERNS_MAX: usize = 1000;

/// Patterns of what is left out of a container's backup, as given by `--exclude-path`.
///
/// | in a pattern | is |
/// |---|---|
/// | `/` at the beginning | the container's root; without it, the pattern may begin in any directory |
/// | `/` at the end | only directories |
/// | `*` | any characters but `/`, also none, also a dot at the beginning |
/// | `?` | one character; a byte that is no text is one, too |
/// | `[a-z]`, `[!a-z]`, `[^a-z]` | one character that is (not) one of these |
/// | `**` as a whole component | any number of directories, also none; at the end all that is below |
/// | `\` | takes its meaning from the next character |
///
/// What is below a directory that is left out is left out. Mount points are directories as any other.
#[derive(Debug, Clone, Default)]
pub struct Excludes(Arc<[Pattern]>);

#[derive(Debug)]
struct Pattern {
    text: String,
    directories_only: bool,
    /// The last one is a name.
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    /// Any number of names.
    Any,
    Name(Vec<Token>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Char(char),
    One,
    Run,
    Set { is_negated: bool, ranges: Vec<(char, char)> },
}

impl Excludes {
    /// Understands patterns.
    ///
    /// # Errors
    /// [`Kind::Invalid`] that names the first pattern that means nothing.
    pub fn parse<S: AsRef<str>>(patterns: &[S]) -> Result<Self> {
        if patterns.len() > PATTERNS_MAX {
            let why = format!("{} patterns of files to leave out are too many.", patterns.len());
            return Err(Error::new(Kind::Invalid, why));
        }
        let parsed: Result<Vec<_>> = patterns
            .iter()
            .map(AsRef::as_ref)
            .map(|text| {
                Pattern::parse(text).map_err(|why| {
                    let why = format!("The pattern {text:?} of files to leave out {why}.");
                    Error::new(Kind::Invalid, why)
                })
            })
            .collect();
        Ok(Self(parsed?.into()))
    }

    /// The patterns as they were given.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|pattern| pattern.text.as_str())
    }

    /// What holds in the container's root.
    #[must_use]
    pub fn root(&self) -> Reached {
        let mut reached = Reached { excludes: self.clone(), at: Vec::new() };
        for pattern in 0..self.0.len() {
            reached.add(pattern, 0);
        }
        reached
    }

    /// What holds in a directory; none if it is left out.
    #[must_use]
    pub fn directory(&self, path: &Path) -> Option<Reached> {
        let names = path.components().filter_map(|component| match component {
            Component::Normal(name) => Some(name.as_bytes()),
            _ => None,
        });
        names.into_iter().try_fold(self.root(), |reached, name| reached.enter(name, true))
    }
}

/// How far the patterns have come in a directory.
#[derive(Debug, Clone)]
pub struct Reached {
    excludes: Excludes,
    /// Pattern, and the part of it that the next name must match.
    at: Vec<(usize, usize)>,
}

impl Reached {
    /// What holds for what is in this directory by the name `name`; none if it is left out.
    #[must_use]
    pub fn enter(&self, name: &[u8], is_directory: bool) -> Option<Self> {
        let mut next = Self { excludes: self.excludes.clone(), at: Vec::new() };
        for &(number, at) in &self.at {
            let pattern = &self.excludes.0[number];
            match &pattern.parts[at] {
                Part::Any => next.add(number, at),
                Part::Name(tokens) if matches(tokens, name) => {
                    if at + 1 < pattern.parts.len() {
                        next.add(number, at + 1);
                    } else if is_directory || !pattern.directories_only {
                        return None;
                    }
                }
                Part::Name(_) => {}
            }
        }
        Some(next)
    }

    /// Whether nothing below can be left out.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.at.is_empty()
    }

    fn add(&mut self, pattern: usize, at: usize) {
        if !self.at.contains(&(pattern, at)) {
            self.at.push((pattern, at));
            if self.excludes.0[pattern].parts[at] == Part::Any {
                // No directory is a number of directories, too.
                self.add(pattern, at + 1);
            }
        }
    }
}

impl Pattern {
    fn parse(text: &str) -> std::result::Result<Self, String> {
        if text.is_empty() {
            return Err("is empty".to_owned());
        }
        if text.len() > PATTERN_BYTES_MAX {
            return Err(format!("is longer than {PATTERN_BYTES_MAX} bytes"));
        }
        if text.contains(['\0', '\n']) {
            return Err("contains a line break or a zero".to_owned());
        }
        let mut parts = Vec::new();
        if !text.starts_with('/') {
            parts.push(Part::Any);
        }
        for component in text.split('/').filter(|component| !component.is_empty()) {
            let part = match component {
                "**" => Part::Any,
                "." | ".." => {
                    return Err(format!("contains '{component}', which is the name of no file"));
                }
                name => Part::Name(tokens(name)?),
            };
            if part != Part::Any || parts.last() != Some(&Part::Any) {
                parts.push(part);
            }
        }
        if text.chars().all(|c| c == '/') {
            return Err("is about the root itself".to_owned());
        }
        if parts.last() == Some(&Part::Any) {
            // All that is below, and not the directory itself.
            parts.push(Part::Name(vec![Token::Run]));
        }
        Ok(Self { text: text.to_owned(), directories_only: text.ends_with('/'), parts })
    }
}

fn tokens(name: &str) -> std::result::Result<Vec<Token>, String> {
    let mut found = Vec::new();
    let mut rest = name.chars();
    while let Some(c) = rest.next() {
        let token = match c {
            '*' => Token::Run,
            '?' => Token::One,
            '[' => set(&mut rest)?,
            '\\' => Token::Char(escaped(&mut rest)?),
            c => Token::Char(c),
        };
        if token != Token::Run || found.last() != Some(&Token::Run) {
            found.push(token);
        }
    }
    Ok(found)
}

fn escaped(rest: &mut std::str::Chars<'_>) -> std::result::Result<char, String> {
    rest.next().ok_or_else(|| "has a '\\' with no character after it".to_owned())
}

/// What is between brackets, the first of which has been read.
fn set(rest: &mut std::str::Chars<'_>) -> std::result::Result<Token, String> {
    let unclosed = || "has a '[' without a ']' before the next '/' (write '\\[' for the character)";
    let is_negated = rest.as_str().starts_with(['!', '^']);
    if is_negated {
        rest.next();
    }
    let mut ranges = Vec::new();
    loop {
        let low = match rest.next().ok_or_else(unclosed)? {
            // At the beginning it is one of the characters.
            ']' if !ranges.is_empty() => return Ok(Token::Set { is_negated, ranges }),
            '[' if rest.as_str().starts_with([':', '.', '=']) => {
                return Err("has a named class such as '[:alpha:]', which is not known".to_owned());
            }
            '\\' => escaped(rest)?,
            c => c,
        };
        let is_range = rest.as_str().starts_with('-') && !rest.as_str().starts_with("-]");
        let high = if is_range {
            rest.next();
            match rest.next().ok_or_else(unclosed)? {
                '\\' => escaped(rest)?,
                c => c,
            }
        } else {
            low
        };
        if low > high {
            return Err(format!("has the range '{low}-{high}', which is empty"));
        }
        ranges.push((low, high));
    }
}

/// Whether a name is what tokens say.
fn matches(tokens: &[Token], name: &[u8]) -> bool {
    let (mut token, mut rest) = (0, name);
    // Where to go on if the last run is to be longer.
    let mut again: Option<(usize, &[u8])> = None;
    loop {
        match tokens.get(token) {
            Some(Token::Run) => {
                token += 1;
                again = Some((token, rest));
                continue;
            }
            Some(one) if !rest.is_empty() => {
                let (c, after) = next_char(rest);
                if is_one(one, c) {
                    (token, rest) = (token + 1, after);
                    continue;
                }
            }
            None if rest.is_empty() => return true,
            _ => {}
        }
        match again {
            Some((after_run, from)) if !from.is_empty() => {
                let from = next_char(from).1;
                (token, rest, again) = (after_run, from, Some((after_run, from)));
            }
            _ => return false,
        }
    }
}

fn is_one(token: &Token, c: Option<char>) -> bool {
    match token {
        Token::Char(wanted) => c == Some(*wanted),
        Token::One => true,
        Token::Set { is_negated, ranges } => {
            let is_in = |c| ranges.iter().any(|&(low, high)| (low..=high).contains(&c));
            c.is_some_and(is_in) != *is_negated
        }
        Token::Run => false,
    }
}

/// The first character of a name that is not empty; none for a byte that is no text.
fn next_char(name: &[u8]) -> (Option<char>, &[u8]) {
    for length in 1..=name.len().min(4) {
        if let Ok(text) = std::str::from_utf8(&name[..length]) {
            return (text.chars().next(), &name[length..]);
        }
    }
    (None, &name[1..])
}
