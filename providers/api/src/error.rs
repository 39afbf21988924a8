// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one error type of the contract: a kind for decisions, a sentence for people.

/// What an error means to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// The named archive, device or file does not exist.
    NotFound,
    /// The request makes no sense or is not supported.
    Invalid,
    /// Stored data is damaged or incomplete.
    Corrupt,
    /// No space left in the storage.
    NoSpace,
    /// The call was cancelled or its deadline passed.
    Cancelled,
    /// The archive is protected: take the protection away first.
    Protected,
    /// The archive is being read, or a backup builds upon it: the same call works later.
    InUse,
    /// Other archives need this one, and it cannot be merged into them:
    /// [`Error::dependents`] names them.
    HasDependents,
    /// Input or output failed.
    Io,
    /// Anything else.
    Other,
}

/// How the kinds are written where errors are sent; what is missing here is `other`.
const WORDS: [(Kind, &str); 9] = [
    (Kind::NotFound, "not_found"),
    (Kind::Invalid, "invalid"),
    (Kind::Corrupt, "corrupt"),
    (Kind::NoSpace, "no_space"),
    (Kind::Cancelled, "cancelled"),
    (Kind::Protected, "protected"),
    (Kind::InUse, "in_use"),
    (Kind::HasDependents, "has_dependents"),
    (Kind::Io, "io"),
];

impl Kind {
    /// As it is written in the provider protocol.
    #[must_use]
    pub fn word(self) -> &'static str {
        WORDS.iter().find(|(kind, _)| *kind == self).map_or("other", |(_, word)| word)
    }

    /// The kind of a word of the provider protocol; an unknown one is [`Kind::Other`].
    #[must_use]
    pub fn from_word(word: &str) -> Self {
        WORDS.iter().find(|(_, known)| *known == word).map_or(Self::Other, |(kind, _)| *kind)
    }
}

/// An error of a provider.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What it means.
    pub kind: Kind,
    /// One sentence that names the thing.
    pub message: String,
    /// What caused it.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
    /// For [`Kind::HasDependents`] the archives that need the one named by the call; else empty.
    pub dependents: Vec<String>,
}

/// Result of a call of the contract.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error without a cause.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None, dependents: Vec::new() }
    }

    /// An I/O error with the sentence that says what was being done. `ENOSPC` becomes
    /// [`Kind::NoSpace`], "not found" [`Kind::NotFound`].
    pub fn io(message: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Kind::NoSpace,
            std::io::ErrorKind::NotFound => Kind::NotFound,
            _ => Kind::Io,
        };
        Self { source: Some(Box::new(source)), ..Self::new(kind, message) }
    }

    /// An error with a cause.
    pub fn with_source(
        kind: Kind,
        message: impl Into<String>,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self { source: Some(Box::new(source)), ..Self::new(kind, message) }
    }

    /// The removal of an archive that others need; the sentence names them.
    pub fn has_dependents(archive: &str, dependents: Vec<String>) -> Self {
        let names = dependents.join(", ");
        let message = format!(
            "Archive {archive} is needed by {names}; remove these first, or keep it as well."
        );
        Self { dependents, ..Self::new(Kind::HasDependents, message) }
    }
}
