// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why something could not be done with a container.

use std::path::PathBuf;

use vzdump_core::config::ConfigError;
use vzdump_core::guest::GuestError;
use vzdump_core::job::chain;
use vzdump_core::journal::JournalError;
use vzdump_core::journal::volumes::NewVolumeError;
use vzdump_core::layout::LayoutError;
use vzdump_core::lock::LockError;
use vzdump_core::storage::StorageError;

/// Why something could not be done with a container.
#[derive(Debug, thiserror::Error)]
pub enum CtError {
    /// There is no such container.
    #[error("There is no container {id}: '{path}' does not exist.")]
    NoConfig {
        /// Its number.
        id: u32,
        /// Where its configuration would be.
        path: PathBuf,
    },
    /// It runs already.
    #[error("The container {id} runs already.")]
    Running {
        /// Its number.
        id: u32,
    },
    /// The request makes no sense, or cannot be met.
    #[error("{0}")]
    Invalid(String),
    /// A step failed.
    #[error("Cannot {doing}.")]
    Step {
        /// What was being done.
        doing: String,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It was cancelled.
    #[error("It was cancelled, and what had been begun was undone.")]
    Cancelled,
    /// Another task works on it.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Its number, or a directory.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

impl CtError {
    /// For `map_err`: a step that failed.
    pub(crate) fn at<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        doing: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::Step { doing: doing.into(), source: source.into() }
    }

    /// The error and its causes in one line.
    #[must_use]
    pub fn words(&self) -> String {
        chain(self)
    }
}

impl From<NewVolumeError> for CtError {
    fn from(error: NewVolumeError) -> Self {
        match error {
            NewVolumeError::Storage(error) => error.into(),
            NewVolumeError::Journal(error) => error.into(),
        }
    }
}

impl From<CtError> for GuestError {
    fn from(error: CtError) -> Self {
        match error {
            CtError::Journal(error) => Self::Journal(error),
            CtError::Step { doing, source } => Self::Step { doing, source },
            other => Self::Refused(other.words()),
        }
    }
}
