// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty bitmaps over random histories of backups, ends of all kinds and guest writes, against
//! what the disk really held. `STRESS_SEEDS=n` runs n seeds instead of 6, `STRESS_SEED=s` only
//! that one.

#![allow(clippy::unwrap_used, reason = "tests")]

mod bitmap_history;

use bitmap_history::{Actions, History};

const LIMIT: std::time::Duration = std::time::Duration::from_secs(300);
const ALL: [&str; 6] =
    ["not-used", "not-used-removed", "new", "used", "invalid", "missing-recreated"];

#[test]
fn a_used_bitmap_covers_every_change_since_the_backup_that_the_client_has() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let one = number("STRESS_SEED");
    let seeds = match one {
        Some(seed) => seed..seed + 1,
        None => 0..number("STRESS_SEEDS").unwrap_or(6),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut total = Actions::new();
    for seed in seeds {
        let start = std::time::Instant::now();
        let run = runtime.block_on(async { tokio::time::timeout(LIMIT, History::run(seed)).await });
        match run {
            Ok(Ok(actions)) => {
                println!("{:?} seed {seed}: {actions:?}", start.elapsed());
                for (action, count) in actions {
                    *total.entry(action).or_default() += count;
                }
            }
            Ok(Err(error)) => panic!("{error:#}\nrepeat with STRESS_SEED={seed}"),
            Err(_) => panic!("no end within {LIMIT:?}; repeat with STRESS_SEED={seed}"),
        }
    }
    if one.is_none() {
        let missing: Vec<&str> =
            ALL.into_iter().filter(|action| !total.contains_key(*action)).collect();
        assert!(missing.is_empty(), "never: {missing:?} in {total:?}");
    }
}
