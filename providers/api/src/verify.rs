// SPDX-License-Identifier: MIT OR Apache-2.0
//! The verification of an archive: what is asked for, and what is found.

use serde::{Deserialize, Serialize};

/// The most places of damage that a report names; the others are only counted.
pub const DAMAGE_MAX: usize = 100;

/// How much of the data is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "extent")]
pub enum VerifyExtent {
    /// All of it.
    All,
    /// Blocks chosen at random. What is small and needed by all (manifests, lists of checksums) is
    /// read in any case.
    Sample {
        /// How many of a hundred blocks, 1 to 100.
        percent: u8,
        /// Decides which: the same number chooses the same blocks again.
        seed: u32,
    },
}

/// What to verify.
#[derive(Debug, Clone)]
pub struct VerifyOptions {
    /// How much.
    pub extent: VerifyExtent,
    /// Archives that this task has verified to the same extent and found sound. Where the one that is
    /// verified builds upon them, their data need not be read once more.
    pub known_sound: Vec<String>,
}

/// A part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedArea {
    /// Where it begins on the disk, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub length_bytes: u64,
}

/// One place that is damaged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// The archive whose own data it is: the one that was verified, or one it builds upon.
    pub archive: String,
    /// The disk; none if it is not about a single one.
    pub device: Option<String>,
    /// Where on the disk; none if all of it is concerned, or none.
    pub area: Option<DamagedArea>,
    /// One sentence that says what is wrong.
    pub problem: String,
}

/// What a verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Bytes of the disks that were read.
    pub read_bytes: u64,
    /// Blocks of the disks that were looked at; the provider chooses their size.
    pub blocks: u64,
    /// What is damaged, at most [`DAMAGE_MAX`] places.
    pub damage: Vec<Damage>,
    /// How many places are damaged.
    pub damage_count: u64,
}

impl VerifyReport {
    /// Adds a place of damage: names it, or only counts it.
    pub fn add(&mut self, damage: Damage) {
        self.damage_count = self.damage_count.saturating_add(1);
        if self.damage.len() < DAMAGE_MAX {
            self.damage.push(damage);
        }
    }

    /// Whether nothing is damaged, as far as was looked.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.damage_count == 0
    }
}

/// The last verification of an archive that came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// When it ended, seconds since the epoch.
    pub time_s: i64,
    /// How much was read.
    #[serde(flatten)]
    pub extent: VerifyExtent,
    /// How many places were damaged.
    pub damage_count: u64,
}
