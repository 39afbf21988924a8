// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rules against examples and a reference that is as plain as it is slow.

use std::collections::BTreeSet;

use proptest::prelude::{
    Just, ProptestConfig, Strategy, any, prop_assert, prop_assert_eq, proptest,
};
use proptest::{collection, prop_oneof, sample};

use super::*;

/// Berlin, without the need of a time zone database.
fn zone() -> TimeZone {
    TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
}

fn archive(name: &str, time_s: i64) -> Archive {
    Archive {
        name: name.to_owned(),
        subtype: GuestKind::Qemu,
        guest_id: 100,
        time_s,
        size_bytes: 1,
        base: None,
        commit_id: None,
        protected: false,
        notes: None,
        verified: None,
    }
}

/// Archives at local times such as `2026-01-02T03:04`.
fn at(times: &[&str]) -> Vec<Archive> {
    let seconds = |time: &str| {
        let time: DateTime = time.parse().unwrap();
        zone().to_zoned(time).unwrap().timestamp().as_second()
    };
    times.iter().map(|time| archive(time, seconds(time))).collect()
}

fn marks(archives: &[Archive], text: &str) -> Vec<String> {
    let marks = plan(archives, &text.parse().unwrap(), &zone());
    marks
        .into_iter()
        .map(|mark| match mark {
            Mark::Keep(rule) => rule.name().trim_start_matches("keep-").to_owned(),
            other => format!("{other:?}").to_lowercase(),
        })
        .collect()
}

#[test]
fn each_rule_covers_what_earlier_ones_did_not() {
    let archives = at(&[
        "2026-03-31T23:30",
        "2026-03-31T23:10",
        "2026-03-31T22:00",
        "2026-03-30T22:00",
        "2026-03-30T21:00",
        "2026-03-29T22:00",
        "2026-02-15T22:00",
        "2026-02-14T22:00",
        "2025-12-31T22:00",
    ]);
    assert_eq!(
        marks(&archives, "keep-last=1,keep-hourly=1,keep-daily=1,keep-monthly=1,keep-yearly=1"),
        ["last", "remove", "hourly", "daily", "remove", "remove", "monthly", "remove", "yearly"]
    );
    assert_eq!(
        marks(&archives, "keep-daily=2")[..5],
        ["daily", "remove", "remove", "daily", "remove"]
    );
    assert!(marks(&archives, "keep-all=1").iter().all(|mark| mark == "all"));
}

#[test]
fn weeks_are_those_of_iso_8601() {
    // Monday 2024-12-30 to Sunday 2025-01-05 is week 1 of 2025; 2020 has a week 53.
    let archives = at(&["2025-01-05T12:00", "2024-12-30T12:00", "2024-12-29T12:00"]);
    assert_eq!(marks(&archives, "keep-weekly=2"), ["weekly", "remove", "weekly"]);
    let archives = at(&["2021-01-03T12:00", "2020-12-28T12:00", "2020-01-01T12:00"]);
    assert_eq!(marks(&archives, "keep-weekly=2"), ["weekly", "remove", "weekly"]);
    // A month that begins in a week which is covered: its archive there is decided already.
    let archives = at(&["2026-04-01T12:00", "2026-03-31T12:00", "2026-03-20T12:00"]);
    assert_eq!(marks(&archives, "keep-weekly=1,keep-monthly=1"), ["weekly", "remove", "monthly"]);
}

#[test]
fn hours_and_days_are_local_ones() {
    // 23:30 and 00:30 local time are one day in UTC.
    let archives = at(&["2026-07-02T00:30", "2026-07-01T23:30"]);
    assert_eq!(marks(&archives, "keep-daily=2"), ["daily", "daily"]);
    // The hour that is there twice in autumn is one hour.
    let utc = |text: &str| text.parse::<Timestamp>().unwrap().as_second();
    let first = archive("first", utc("2026-10-25T00:30:00Z"));
    let second = archive("second", utc("2026-10-25T01:30:00Z"));
    let both = [second, first];
    let hours: Vec<_> =
        both.iter().map(|a| local_time(a.time_s, &zone()).unwrap().hour()).collect();
    assert_eq!(hours, [2, 2]);
    assert_eq!(marks(&both, "keep-hourly=5"), ["hourly", "remove"]);
}

/// Scenario 81.
#[test]
fn protected_archives_other_guests_and_odd_names_are_told_apart() {
    let mut archives = at(&["2026-01-05T12:00", "2026-01-04T12:00", "2026-01-03T12:00"]);
    archives[0].protected = true;
    // Neither counted nor removed: the next one is the last.
    assert_eq!(marks(&archives, "keep-last=1"), ["protected", "last", "remove"]);
    archives[2].subtype = GuestKind::Lxc;
    assert_eq!(marks(&archives, "keep-last=1"), ["protected", "last", "last"]);
    archives[2].subtype = GuestKind::Qemu;
    archives[2].guest_id = 101;
    assert_eq!(marks(&archives, "keep-last=1"), ["protected", "last", "last"]);
    // Whatever a name says, kind and number are what the provider says.
    archives[2].guest_id = 100;
    archives[2].name = "vzdump-lxc-7-2031_01_01-00_00_00".to_owned();
    assert_eq!(marks(&archives, "keep-last=1"), ["protected", "last", "remove"]);
    archives[2].time_s = i64::MAX;
    assert_eq!(marks(&archives, "keep-last=1"), ["protected", "last", "undated"]);
}

#[test]
fn archives_of_one_second_are_two_archives() {
    let archives = [archive("a", 0), archive("a-2", 0)];
    assert_eq!(marks(&archives, "keep-last=2"), ["last", "last"]);
    assert_eq!(marks(&archives, "keep-last=1"), ["remove", "last"]);
    let archives = [archive("a-10", 0), archive("a-9", 0)];
    assert_eq!(marks(&archives, "keep-last=1"), ["last", "remove"]);
}

fn name_of(rule: Rule, archive: &Archive) -> String {
    let zoned = Timestamp::from_second(archive.time_s).unwrap().to_zoned(zone());
    let format = match rule {
        Rule::Hourly => "%Y %m %d %H",
        Rule::Daily => "%Y %m %d",
        Rule::Weekly => "%G %V",
        Rule::Monthly => "%Y %m",
        Rule::Yearly => "%Y",
        Rule::All | Rule::Last => return format!("{} {}", archive.time_s, archive.name),
    };
    zoned.strftime(format).to_string()
}

fn age(archive: &Archive) -> (i64, usize, String) {
    (archive.time_s, archive.name.len(), archive.name.clone())
}

/// The documented rules, word by word, for the archives of one guest without protected ones.
fn reference(archives: &[Archive], counts: &KeepCounts) -> Vec<Mark> {
    let mut order: Vec<usize> = (0..archives.len()).collect();
    order.sort_by_key(|i| age(&archives[*i]));
    order.reverse();
    let mut marks: Vec<Option<Mark>> = vec![None; archives.len()];
    for rule in Rule::COUNTING {
        let covered: BTreeSet<String> = order
            .iter()
            .filter(|i| matches!(marks[**i], Some(Mark::Keep(_))))
            .map(|i| name_of(rule, &archives[*i]))
            .collect();
        for _ in 0..counts.get(rule) {
            // The newest undecided one of a period that is not covered, and with it its period;
            // what this rule covered before is decided already.
            let newest = order
                .iter()
                .copied()
                .find(|i| marks[*i].is_none() && !covered.contains(&name_of(rule, &archives[*i])));
            let Some(newest) = newest else { break };
            let period = name_of(rule, &archives[newest]);
            for i in &order {
                if marks[*i].is_none() && name_of(rule, &archives[*i]) == period {
                    marks[*i] = Some(Mark::Remove);
                }
            }
            marks[newest] = Some(Mark::Keep(rule));
        }
    }
    marks.into_iter().map(|mark| mark.unwrap_or(Mark::Remove)).collect()
}

fn counts() -> impl Strategy<Value = KeepCounts> {
    let count = || prop_oneof![Just(0_u32), 0..6_u32];
    (count(), count(), count(), count(), count(), count()).prop_map(
        |(last, hourly, daily, weekly, monthly, yearly)| KeepCounts {
            last,
            hourly,
            daily,
            weekly,
            monthly,
            yearly,
        },
    )
}

/// Archives that are minutes to months apart, around changes of the year and of the clock.
fn archives() -> impl Strategy<Value = Vec<Archive>> {
    let start = sample::select(vec![0, 1_761_000_000, 1_735_500_000, 1_774_700_000, 1_609_300_000]);
    let gap = prop_oneof![0..3_i64, 600..7200_i64, 40_000..200_000_i64, 400_000..5_000_000_i64];
    let one = (gap, any::<bool>(), 0..4_u32, any::<bool>());
    (start, collection::vec(one, 0..40)).prop_map(|(start, gaps)| {
        let mut time_s: i64 = start;
        let mut archives = Vec::new();
        for (number, (gap, protected, guest, is_ct)) in gaps.into_iter().enumerate() {
            time_s += gap;
            let mut archive = archive(&format!("n{number:02}"), time_s);
            archive.protected = protected && number % 3 == 0;
            archive.guest_id = if guest == 0 { 101 } else { 100 };
            archive.subtype = if is_ct && guest == 1 { GuestKind::Lxc } else { GuestKind::Qemu };
            archives.push(archive);
        }
        archives
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_plan_is_that_of_the_reference(archives in archives(), counts in counts(), turn in 0..40_usize) {
        let retention = Retention::from(counts);
        let marks = plan(&archives, &retention, &zone());
        if retention == Retention::All {
            prop_assert!(!marks.contains(&Mark::Remove));
            return Ok(());
        }
        for (kind, id) in [(GuestKind::Qemu, 100), (GuestKind::Qemu, 101), (GuestKind::Lxc, 100)] {
            let of_guest = |a: &Archive| a.subtype == kind && a.guest_id == id && !a.protected;
            let own: Vec<Archive> = archives.iter().filter(|a| of_guest(a)).cloned().collect();
            let got: Vec<Mark> = archives.iter().zip(&marks)
                .filter(|(a, _)| of_guest(a)).map(|(_, mark)| *mark).collect();
            prop_assert_eq!(&got, &reference(&own, &counts));
            // Something is kept, the newest first of all.
            let newest = own.iter().enumerate().max_by_key(|(_, a)| age(a));
            if let Some((newest, _)) = newest {
                prop_assert!(matches!(got[newest], Mark::Keep(_)));
            }
            for rule in Rule::COUNTING {
                let kept = got.iter().filter(|mark| **mark == Mark::Keep(rule)).count();
                prop_assert!(kept as u64 <= u64::from(counts.get(rule)));
            }
        }
        for (archive, mark) in archives.iter().zip(&marks) {
            prop_assert_eq!(archive.protected, *mark == Mark::Protected);
        }
        // The order of the list means nothing.
        if !archives.is_empty() {
            let turn = turn % archives.len();
            let mut turned = archives.clone();
            turned.rotate_left(turn);
            let mut expected = marks.clone();
            expected.rotate_left(turn);
            prop_assert_eq!(plan(&turned, &retention, &zone()), expected);
        }
        // What has been pruned needs no pruning: nothing that is kept goes the next time.
        let kept: Vec<Archive> = archives.iter().zip(&marks)
            .filter(|(_, mark)| **mark != Mark::Remove).map(|(a, _)| a.clone()).collect();
        prop_assert!(!plan(&kept, &retention, &zone()).contains(&Mark::Remove));
    }

    #[test]
    fn any_text_is_read_or_refused(text in "[a-z0-9=,-]{0,40}") {
        if let Ok(retention) = text.parse::<Retention>() {
            prop_assert_eq!(retention.to_string().parse::<Retention>().unwrap(), retention);
        }
    }
}
