// SPDX-License-Identifier: GPL-2.0-or-later
//! What the engines of one access share: a limit on the RAM for old data over all of them.

/// The devices of one access with a common limit.
#[derive(Debug)]
pub struct Group {
    limit_bytes: u64,
}

impl Group {
    /// A group whose members together hold at most so much old data in RAM.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Self {
        Self { limit_bytes }
    }

    /// The limit on old data in RAM over all members.
    #[must_use]
    pub fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }
}
