// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is measured: guest work, caching, fleecing image, backup client, and in which modes.

use serde::Serialize;

/// Default of `buffer-size`.
pub const BUFFER_DEFAULT: u64 = 64 << 20;
/// So small that old data goes to the fleecing image at once.
pub const BUFFER_SMALL: u64 = 1 << 20;
/// The larger buffer of some goals.
pub const BUFFER_LARGE: u64 = 1 << 30;

/// What stands between the guest and its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filter {
    /// Nothing: no backup runs.
    None,
    /// QEMU's own copy-before-write.
    C,
    /// Ours.
    Ours,
}

/// Who plays the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Client {
    /// fio.
    Fio,
    /// Our own load generator: the same work as fio's, by the client of the ceiling.
    Generator,
    /// The generator, reading each block before it writes it.
    ReadFirst,
}

/// One way to run a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Mode {
    /// In reports.
    pub name: &'static str,
    /// What filters.
    pub filter: Filter,
    /// Who writes.
    pub client: Client,
}

const fn mode(name: &'static str, filter: Filter, client: Client) -> Mode {
    Mode { name, filter, client }
}

/// No backup.
pub const NONE: Mode = mode("none", Filter::None, Client::Fio);
/// QEMU's filter.
pub const C: Mode = mode("c", Filter::C, Client::Fio);
/// Our filter.
pub const OURS: Mode = mode("ours", Filter::Ours, Client::Fio);
/// What capture cannot avoid: a read before each write.
pub const CEILING: Mode = mode("ceiling", Filter::None, Client::ReadFirst);
/// No backup, with the client of the ceiling.
pub const NONE_GEN: Mode = mode("none-gen", Filter::None, Client::Generator);
/// Our filter, with the client of the ceiling.
pub const OURS_GEN: Mode = mode("ours-gen", Filter::Ours, Client::Generator);

const PLAIN: &[Mode] = &[NONE, C, OURS];
const WITH_CEILING: &[Mode] = &[NONE, C, OURS, NONE_GEN, OURS_GEN, CEILING];

/// Caching of the disk and of a fleecing image on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// Past the page cache, with native asynchronous I/O.
    Direct,
    /// Through the page cache.
    Default,
}

/// Format and place of the fleecing image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fleecing {
    /// A sparse file beside the disk.
    Raw,
    /// qcow2 beside the disk.
    Qcow2,
    /// A sparse file in RAM.
    RawTmpfs,
    /// qcow2 in RAM.
    Qcow2Tmpfs,
    /// None: writes to it vanish.
    Null,
}

impl Fleecing {
    /// Whether it is qcow2.
    #[must_use]
    pub fn is_qcow2(self) -> bool {
        matches!(self, Self::Qcow2 | Self::Qcow2Tmpfs)
    }

    /// Whether it is in RAM.
    #[must_use]
    pub fn in_ram(self) -> bool {
        matches!(self, Self::RawTmpfs | Self::Qcow2Tmpfs)
    }
}

/// What the backup client does meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reading {
    /// Nothing.
    Absent,
    /// Reads at 300 MB/s.
    Limited,
    /// Reads as fast as it can.
    Unlimited,
}

/// What the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// Each block once, in random order or in sequence.
    Once {
        /// In sequence.
        sequential: bool,
        /// Size of a request.
        block_bytes: u64,
        /// Requests in flight.
        depth: u32,
    },
    /// So few random writes of 4 KiB, 16 in flight, that they are all far from each other.
    Few,
    /// 70 % reads, 30 % writes of 4 KiB, 16 in flight.
    Mixed,
    /// Writes of 4 KiB, 16 in flight, most of them to few blocks.
    Zipf,
    /// Writes of 4 KiB at half of the rate that is possible without a backup.
    FixedRate,
    /// Writes of 4 KiB, one at a time, to what was written before during the backup.
    Rewrite,
    /// nbdcopy reads everything; the guest writes at a rate or is idle.
    Nbdcopy {
        /// The guest's writes per second.
        guest_iops: Option<u32>,
    },
    /// Writes of 4 KiB to a disk that costs nothing, each place for the first time.
    NullOnce,
    /// Writes of 4 KiB to a disk that costs nothing, to what was written before.
    NullRewrite,
}

impl Work {
    /// Whether the disk is a real one.
    #[must_use]
    pub fn on_disk(self) -> bool {
        !matches!(self, Self::NullOnce | Self::NullRewrite)
    }

    fn name(self) -> String {
        match self {
            Self::Once { sequential, block_bytes, depth } => {
                let (size, unit) = match block_bytes >> 20 {
                    0 => (block_bytes >> 10, 'k'),
                    mib => (mib, 'm'),
                };
                let order = if sequential { "-seq" } else { "" };
                format!("{size}{unit}{order}-qd{depth}")
            }
            Self::Few => "few-4k-qd16".into(),
            Self::Mixed => "mixed-4k-qd16".into(),
            Self::Zipf => "zipf-4k-qd16".into(),
            Self::FixedRate => "rate-4k".into(),
            Self::Rewrite => "rewrite-4k-qd1".into(),
            Self::Nbdcopy { guest_iops: None } => "nbdcopy-idle".into(),
            Self::Nbdcopy { guest_iops: Some(iops) } => format!("nbdcopy-{iops}iops"),
            Self::NullOnce => "null-first-4k-qd32".into(),
            Self::NullRewrite => "null-rewrite-4k-qd32".into(),
        }
    }
}

/// One comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Case {
    /// Work, cache, fleecing image, reader, and the buffer where it is not the default.
    pub name: String,
    /// The guest's work.
    pub work: Work,
    /// Caching.
    pub cache: Cache,
    /// The fleecing image.
    pub fleecing: Fleecing,
    /// The backup client.
    pub reading: Reading,
    /// `buffer-size` of our filter.
    pub buffer_bytes: u64,
    /// The modes, in the order of the first round.
    pub modes: Vec<Mode>,
    /// Longer runs than those of other cases.
    pub long: bool,
    /// Whether it is part of a short run.
    pub short: bool,
}

fn kebab(value: impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

impl Case {
    pub(crate) fn new(work: Work, cache: Cache, fleecing: Fleecing, reading: Reading) -> Self {
        let name =
            format!("{}/{}/{}/{}", work.name(), kebab(cache), kebab(fleecing), kebab(reading));
        Self {
            name,
            work,
            cache,
            fleecing,
            reading,
            buffer_bytes: BUFFER_DEFAULT,
            modes: PLAIN.to_vec(),
            long: work == Work::Zipf,
            short: false,
        }
    }

    fn short(self) -> Self {
        Self { short: true, ..self }
    }

    fn small_buffer(self) -> Self {
        Self { name: format!("{}/1m", self.name), buffer_bytes: BUFFER_SMALL, ..self }
    }

    fn large_buffer(self) -> Self {
        Self { name: format!("{}/1g", self.name), buffer_bytes: BUFFER_LARGE, ..self }
    }

    fn modes(self, modes: &[Mode]) -> Self {
        Self { modes: modes.to_vec(), ..self }
    }

    /// The modes in the order of a round: each mode is first equally often.
    #[must_use]
    pub fn order(&self, round: usize) -> Vec<usize> {
        turns(self.modes.len(), round).collect()
    }
}

/// The order of a round: each of `count` ways is first, and last, equally often.
pub fn turns(count: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |n| (n + round) % count)
}

const fn random(block_bytes: u64, depth: u32) -> Work {
    Work::Once { sequential: false, block_bytes, depth }
}

const SEQUENTIAL: Work = Work::Once { sequential: true, block_bytes: 1 << 20, depth: 4 };

/// All cases, those of the goals first.
#[must_use]
pub fn all() -> Vec<Case> {
    use Reading::{Absent, Limited, Unlimited};
    use {
        Cache::{Default, Direct},
        Fleecing::{Null, Qcow2, Qcow2Tmpfs, Raw, RawTmpfs},
    };
    let small = random(4096, 16);
    let medium = random(65536, 16);
    let case = Case::new;
    let mut cases = vec![
        case(small, Direct, Raw, Limited).large_buffer().modes(WITH_CEILING).short(),
        case(small, Default, Raw, Limited).large_buffer().short(),
        case(Work::FixedRate, Direct, Raw, Limited).short(),
        case(Work::FixedRate, Direct, Raw, Absent),
        case(Work::FixedRate, Default, Raw, Limited),
        case(Work::FixedRate, Default, Raw, Absent),
        case(medium, Direct, Raw, Limited).short(),
        case(medium, Default, Raw, Limited),
        case(SEQUENTIAL, Direct, Raw, Limited),
        case(SEQUENTIAL, Default, Raw, Limited).short(),
        case(medium, Direct, Raw, Limited).large_buffer().modes(WITH_CEILING),
        case(SEQUENTIAL, Direct, Raw, Limited).large_buffer().modes(WITH_CEILING),
        case(Work::Zipf, Direct, Raw, Limited).short(),
        case(Work::Zipf, Default, Raw, Limited),
        case(Work::Rewrite, Direct, Raw, Absent).short(),
        case(Work::Rewrite, Default, Raw, Absent),
        case(Work::Nbdcopy { guest_iops: None }, Direct, Raw, Absent),
        case(Work::Nbdcopy { guest_iops: None }, Default, Raw, Absent),
        case(Work::Nbdcopy { guest_iops: Some(2000) }, Direct, Raw, Absent).short(),
        case(Work::Nbdcopy { guest_iops: Some(2000) }, Default, Raw, Absent),
        case(Work::Few, Direct, Raw, Absent).small_buffer().short(),
        case(Work::NullRewrite, Default, Null, Absent).short(),
        case(Work::NullOnce, Default, Null, Absent),
    ];
    for cache in [Direct, Default] {
        cases.push(case(random(4096, 1), cache, Raw, Limited).modes(WITH_CEILING));
        cases.push(case(random(4096, 32), cache, Raw, Limited).modes(WITH_CEILING));
        cases.push(case(small, cache, Raw, Limited));
        cases.push(case(Work::Mixed, cache, Raw, Limited));
    }
    for work in [small, medium, SEQUENTIAL] {
        for cache in [Direct, Default] {
            for (fleecing, reading) in [
                (Raw, Absent),
                (Raw, Unlimited),
                (Qcow2, Limited),
                (RawTmpfs, Limited),
                (Qcow2Tmpfs, Limited),
            ] {
                let new = case(work, cache, fleecing, reading);
                if !cases.iter().any(|known| known.name == new.name) {
                    cases.push(new);
                }
            }
        }
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_say_what_a_case_is() {
        let cases = all();
        let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names.len(), cases.len());
        for name in ["4k-qd16/direct/raw/limited/1g", "1m-seq-qd4/default/qcow2-tmpfs/limited"] {
            assert!(names.contains(name), "{name} is not in {names:?}");
        }
    }

    #[test]
    fn every_mode_is_first_in_some_round() {
        let case = &all()[0];
        let first: BTreeSet<usize> =
            (0..case.modes.len()).map(|round| case.order(round)[0]).collect();
        assert_eq!(first.len(), case.modes.len());
        assert_eq!(case.order(1).len(), case.modes.len());
    }
}
