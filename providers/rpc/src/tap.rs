// SPDX-License-Identifier: MIT OR Apache-2.0
//! Shows every message to somebody who looks on: a test, a trace.

use std::sync::Arc;

/// Who wrote a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The host.
    ToPlugin,
    /// The plugin.
    FromPlugin,
}

/// Gets every message, as it is on the wire, in the order of each direction. Must be quick.
pub type Tap = Arc<dyn Fn(Direction, &str) + Send + Sync>;
