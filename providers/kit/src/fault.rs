// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a check fails, in words that are safe to print.

use provider_api::Error;

/// Longest text of a provider that is shown.
const TEXT_CHARS_MAX: usize = 300;

/// What is wrong with the provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) why: String,
    pub(crate) advice: Option<String>,
}

impl Fault {
    pub(crate) fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), advice: None }
    }

    pub(crate) fn advise(self, advice: &str) -> Self {
        Self { advice: Some(advice.to_owned()), ..self }
    }

    /// Puts in front of it where that happened.
    pub(crate) fn at(self, place: &str) -> Self {
        Self { why: format!("{place}: {}", self.why), ..self }
    }
}

/// Result of what a check does.
pub(crate) type Checked<T = ()> = Result<T, Fault>;

/// Fails unless something holds.
pub(crate) fn ensure(holds: bool, why: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(Fault::new(why())) }
}

/// An untrusted text on one line, not too long.
pub(crate) fn clean(text: &str) -> String {
    let mut line: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(TEXT_CHARS_MAX).collect();
    if line.len() < text.len() && text.chars().count() > TEXT_CHARS_MAX {
        line.push('…');
    }
    line
}

/// An error with what caused it.
pub(crate) fn words(error: &Error) -> String {
    let mut text = clean(&error.message);
    let mut source = std::error::Error::source(error);
    // A chain may be as long as its maker likes.
    for _ in 0..4 {
        let Some(cause) = source else { break };
        text.push_str(": ");
        text.push_str(&clean(&cause.to_string()));
        source = cause.source();
    }
    text
}
