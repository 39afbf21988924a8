// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which archives of a guest are kept: the meaning of `keep-last` … `keep-yearly`. Pure.
//!
//! The archives of one guest (its kind and number; the archives' names mean nothing) are looked at
//! from the newest to the oldest, once for each rule, in the order last, hourly, daily, weekly,
//! monthly, yearly:
//!
//! - A rule divides time into periods of the local time zone; a week is one of ISO 8601. It keeps the
//!   newest archive of each of the first *n* periods in which no earlier rule has kept one.
//! - Older archives in such a period are decided with it: they go, and later rules do not see them.
//! - What no rule has kept goes.
//! - Protected archives are neither counted nor removed, and so are archives whose time cannot be.

mod parse;

use std::cmp::Ordering;
use std::collections::HashSet;
use std::fmt;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use provider_api::{Archive, GuestKind};
use serde::Serialize;

/// How many archives the rules keep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct KeepCounts {
    /// The newest ones.
    pub last: u32,
    /// One for each of so many hours.
    pub hourly: u32,
    /// One for each of so many days.
    pub daily: u32,
    /// One for each of so many weeks.
    pub weekly: u32,
    /// One for each of so many months.
    pub monthly: u32,
    /// One for each of so many years.
    pub yearly: u32,
}

/// What is kept. Its text is that of the property `prune-backups`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retention {
    /// Everything (`keep-all=1`).
    All,
    /// What the rules keep; at least one of them keeps something.
    Keep(KeepCounts),
}

/// Why an archive is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub enum Rule {
    /// Everything is.
    #[serde(rename = "keep-all")]
    All,
    /// It is among the newest.
    #[serde(rename = "keep-last")]
    Last,
    /// It is the newest of an hour.
    #[serde(rename = "keep-hourly")]
    Hourly,
    /// It is the newest of a day.
    #[serde(rename = "keep-daily")]
    Daily,
    /// It is the newest of a week.
    #[serde(rename = "keep-weekly")]
    Weekly,
    /// It is the newest of a month.
    #[serde(rename = "keep-monthly")]
    Monthly,
    /// It is the newest of a year.
    #[serde(rename = "keep-yearly")]
    Yearly,
}

/// What becomes of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mark {
    /// It is kept by this rule.
    Keep(Rule),
    /// It is protected.
    Protected,
    /// Its time cannot be, so no rule can say anything about it.
    Undated,
    /// It goes.
    Remove,
}

impl Rule {
    /// The rules that count, in their order.
    pub const COUNTING: [Self; 6] =
        [Self::Last, Self::Hourly, Self::Daily, Self::Weekly, Self::Monthly, Self::Yearly];

    /// Its name as an option.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::All => "keep-all",
            Self::Last => "keep-last",
            Self::Hourly => "keep-hourly",
            Self::Daily => "keep-daily",
            Self::Weekly => "keep-weekly",
            Self::Monthly => "keep-monthly",
            Self::Yearly => "keep-yearly",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl KeepCounts {
    /// How many a rule keeps.
    #[must_use]
    pub const fn get(&self, rule: Rule) -> u32 {
        match rule {
            Rule::All => 0,
            Rule::Last => self.last,
            Rule::Hourly => self.hourly,
            Rule::Daily => self.daily,
            Rule::Weekly => self.weekly,
            Rule::Monthly => self.monthly,
            Rule::Yearly => self.yearly,
        }
    }
}

impl From<KeepCounts> for Retention {
    /// Nothing to keep is no wish to remove everything, but none at all.
    fn from(counts: KeepCounts) -> Self {
        if counts == KeepCounts::default() { Self::All } else { Self::Keep(counts) }
    }
}

/// Says for each archive, in the order given, what becomes of it. Archives of different guests do
/// not touch each other.
#[must_use]
pub fn plan(archives: &[Archive], retention: &Retention, zone: &TimeZone) -> Vec<Mark> {
    let mut marks: Vec<Option<Mark>> = vec![None; archives.len()];
    let mut guests: Vec<(GuestKind, u32)> = Vec::new();
    let mut seen = HashSet::new();
    for archive in archives {
        if seen.insert((archive.subtype, archive.guest_id)) {
            guests.push((archive.subtype, archive.guest_id));
        }
    }
    for guest in guests {
        let mut group = Vec::new();
        for (index, archive) in archives.iter().enumerate() {
            if (archive.subtype, archive.guest_id) != guest {
                continue;
            }
            match local_time(archive.time_s, zone) {
                _ if archive.protected => marks[index] = Some(Mark::Protected),
                None => marks[index] = Some(Mark::Undated),
                Some(time) => group.push(Dated { index, time, archive }),
            }
        }
        group.sort_by(|a, b| by_age(b.archive, a.archive));
        plan_group(&group, retention, &mut marks);
    }
    // Only what goes is left.
    marks.into_iter().map(|mark| mark.unwrap_or(Mark::Remove)).collect()
}

/// Orders archives of a guest, the oldest first. The name decides between those of one second: `…-10` comes after
/// `…-9`.
pub(crate) fn by_age(a: &Archive, b: &Archive) -> Ordering {
    let key = |archive: &Archive| (archive.time_s, archive.name.len());
    key(a).cmp(&key(b)).then_with(|| a.name.cmp(&b.name))
}

/// An archive with its local time.
struct Dated<'a> {
    index: usize,
    time: DateTime,
    archive: &'a Archive,
}

fn plan_group(group: &[Dated<'_>], retention: &Retention, marks: &mut [Option<Mark>]) {
    let counts = match retention {
        Retention::All => {
            group.iter().for_each(|dated| marks[dated.index] = Some(Mark::Keep(Rule::All)));
            return;
        }
        Retention::Keep(counts) => counts,
    };
    for rule in Rule::COUNTING {
        apply(rule, counts.get(rule), group, marks);
    }
}

fn apply(rule: Rule, count: u32, group: &[Dated<'_>], marks: &mut [Option<Mark>]) {
    if count == 0 {
        return;
    }
    let kept = group.iter().filter(|dated| matches!(marks[dated.index], Some(Mark::Keep(_))));
    let covered: HashSet<Period<'_>> = kept.map(|dated| Period::of(rule, dated)).collect();
    let mut new = HashSet::new();
    for dated in group.iter().filter(|dated| marks[dated.index].is_none()).collect::<Vec<_>>() {
        let period = Period::of(rule, dated);
        if covered.contains(&period) {
            continue;
        }
        if new.contains(&period) {
            marks[dated.index] = Some(Mark::Remove);
        } else if new.len() as u64 == u64::from(count) {
            break;
        } else {
            new.insert(period);
            marks[dated.index] = Some(Mark::Keep(rule));
        }
    }
}

/// A period of a rule: its year and what numbers it in there.
#[derive(PartialEq, Eq, Hash)]
enum Period<'a> {
    One(&'a str),
    Of { year: i16, number: i16, hour: i8 },
}

impl<'a> Period<'a> {
    fn of(rule: Rule, dated: &Dated<'a>) -> Self {
        let date = dated.time.date();
        let of = |year, number, hour| Self::Of { year, number, hour };
        match rule {
            Rule::All | Rule::Last => Self::One(&dated.archive.name),
            Rule::Hourly => of(date.year(), date.day_of_year(), dated.time.hour()),
            Rule::Daily => of(date.year(), date.day_of_year(), 0),
            Rule::Weekly => {
                let week = date.iso_week_date();
                of(week.year(), week.week().into(), 0)
            }
            Rule::Monthly => of(date.year(), date.month().into(), 0),
            Rule::Yearly => of(date.year(), 0, 0),
        }
    }
}

fn local_time(time_s: i64, zone: &TimeZone) -> Option<DateTime> {
    let time = Timestamp::from_second(time_s).ok()?;
    Some(zone.to_datetime(time))
}

#[cfg(test)]
mod tests;
