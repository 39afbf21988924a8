// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one error type of the crate.

use std::{io, time::Duration};

/// What went wrong between us and QEMU or the guest agent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket does not exist, nobody listens, or access is denied.
    #[error("Cannot connect to the socket {path}")]
    Connect {
        /// The socket.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something answers, but it is no QMP monitor.
    #[error("{peer} is not a QMP monitor: {detail}")]
    NotQemu {
        /// The socket.
        peer: String,
        /// What was seen instead of a greeting.
        detail: String,
    },
    /// The connection was accepted, but no greeting came in time.
    #[error(
        "{peer} sent no QMP greeting within {after_ms} ms: a monitor serves one client at a time, \
         so another program probably uses it (or QEMU hangs, or this is no monitor)"
    )]
    Busy {
        /// The socket.
        peer: String,
        /// How long we waited.
        after_ms: u64,
    },
    /// No reply in time. Whether the command was or will be executed is unknown.
    #[error("{command} got no reply within {after_ms} ms")]
    Timeout {
        /// The command.
        command: String,
        /// How long we waited.
        after_ms: u64,
    },
    /// The connection is gone. Whether a command in flight was executed is unknown.
    #[error("The connection is closed: QEMU ended or closed it")]
    Disconnected,
    /// The command was executed and failed.
    #[error("{command} failed: {desc}")]
    Qmp {
        /// The command.
        command: String,
        /// QEMU's class, mostly `GenericError`.
        class: String,
        /// QEMU's sentence.
        desc: String,
    },
    /// The peer's answer, or what we were asked to send, does not fit the protocol.
    #[error("{context}: {detail}")]
    Protocol {
        /// The command or socket.
        context: String,
        /// What does not fit.
        detail: String,
    },
    /// QEMU runs without a feature we need.
    #[error(
        "This QEMU lacks {feature}: run the guest with a QEMU that has the backup access extension"
    )]
    MissingFeature {
        /// The feature.
        feature: String,
    },
    /// The guest agent does not answer at all; nor does QEMU while another client has the socket.
    #[error(
        "The guest agent at {path} did not answer within {after_ms} ms: \
         is it installed and running in the guest? \
         The socket serves one client at a time, so another program may be using it"
    )]
    AgentSilent {
        /// The agent's socket.
        path: String,
        /// How long we waited.
        after_ms: u64,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// QEMU's class for a command it does not have.
const COMMAND_NOT_FOUND: &str = "CommandNotFound";
/// QEMU's class for a device or node it does not have.
const DEVICE_NOT_FOUND: &str = "DeviceNotFound";

impl Error {
    /// QEMU says that a named device or node does not exist.
    #[must_use]
    pub fn is_device_not_found(&self) -> bool {
        self.has_class(DEVICE_NOT_FOUND)
    }

    /// QEMU does not have the command.
    #[must_use]
    pub fn is_command_not_found(&self) -> bool {
        self.has_class(COMMAND_NOT_FOUND)
    }

    /// There was no answer in time, so the outcome is unknown.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout { .. } | Self::AgentSilent { .. })
    }

    fn has_class(&self, wanted: &str) -> bool {
        matches!(self, Self::Qmp { class, .. } if class == wanted)
    }

    pub(crate) fn timeout(command: &str, after: Duration) -> Self {
        Self::Timeout { command: command.to_owned(), after_ms: millis(after) }
    }

    pub(crate) fn protocol(context: impl Into<String>, detail: impl ToString) -> Self {
        Self::Protocol { context: context.into(), detail: detail.to_string() }
    }

    /// Replaces QEMU's "command not found" by the name of the feature that is missing.
    pub(crate) fn or_missing(self, feature: &str) -> Self {
        if self.is_command_not_found() {
            Self::MissingFeature { feature: feature.to_owned() }
        } else {
            self
        }
    }
}

/// Whole milliseconds, saturating.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_agent_may_be_one_that_serves_another_client() {
        let error = Error::AgentSilent { path: "agent.sock".to_owned(), after_ms: 100 };
        assert_eq!(
            error.to_string(),
            "The guest agent at agent.sock did not answer within 100 ms: is it installed and \
             running in the guest? The socket serves one client at a time, so another program may \
             be using it"
        );
    }
}
