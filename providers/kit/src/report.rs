// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kit found out: one result per check, and a grade.

use provider_api::Capabilities;
use serde::Serialize;

/// What became of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "result")]
pub enum Outcome {
    /// The provider does what the contract says.
    Passed {
        /// What an author may want to know nevertheless.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        remarks: Vec<String>,
    },
    /// It does not.
    Failed {
        /// What it did, and what the contract says.
        why: String,
        /// Where to look.
        #[serde(skip_serializing_if = "Option::is_none")]
        advice: Option<String>,
    },
    /// The provider says that it cannot do this.
    NotSupported {
        /// The capability that is missing.
        capability: String,
    },
    /// The kit could not look.
    NotTested {
        /// What it needs for that.
        why: String,
    },
}

impl Outcome {
    /// Whether the provider is at fault.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }
}

/// One check and what became of it.
#[derive(Debug, Clone, Serialize)]
pub struct CheckResult {
    /// Its name, for `--only`.
    pub name: String,
    /// What it is about, in a few words.
    pub title: String,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// How long it took.
    pub elapsed_ms: u64,
}

/// How good the provider is as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Grade {
    /// Nothing failed, and the provider has all that the contract offers.
    Complete,
    /// Nothing failed; some abilities are missing or were not tested.
    Conforming,
    /// Something failed: backups may be lost or wrong.
    Faulty,
}

impl std::fmt::Display for Grade {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Complete => "complete",
            Self::Conforming => "conforming",
            Self::Faulty => "FAULTY",
        })
    }
}

/// All that the kit found out.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The product's name.
    pub provider: String,
    /// The version of the contract it was written for.
    pub api_version: u32,
    /// What it says that it can do.
    pub capabilities: Capabilities,
    /// Number that makes the same disks again.
    pub seed: u64,
    /// How the disks were served, in words.
    pub source: String,
    /// The checks in their order.
    pub checks: Vec<CheckResult>,
    /// Archives of the kit that could not be removed.
    pub left: Vec<String>,
    /// How good it is.
    pub grade: Grade,
}

/// How many checks ended in which way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Passed.
    pub passed: usize,
    /// Failed.
    pub failed: usize,
    /// Not supported by the provider.
    pub not_supported: usize,
    /// Not tested.
    pub not_tested: usize,
}

impl Report {
    /// Whether nothing failed and nothing is left behind against the provider's word.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.grade != Grade::Faulty
    }

    /// How many checks ended in which way.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for check in &self.checks {
            match check.outcome {
                Outcome::Passed { .. } => counts.passed += 1,
                Outcome::Failed { .. } => counts.failed += 1,
                Outcome::NotSupported { .. } => counts.not_supported += 1,
                Outcome::NotTested { .. } => counts.not_tested += 1,
            }
        }
        counts
    }
}

/// `is_whole` if no check was left out.
pub(crate) fn grade(checks: &[CheckResult], is_whole: bool) -> Grade {
    if checks.iter().any(|check| check.outcome.is_failure()) {
        return Grade::Faulty;
    }
    if is_whole && checks.iter().all(|check| matches!(check.outcome, Outcome::Passed { .. })) {
        Grade::Complete
    } else {
        Grade::Conforming
    }
}
