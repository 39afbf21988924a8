// SPDX-License-Identifier: MIT OR Apache-2.0
//! The snapshot of a disk under random writes, compared sector by sector, in the real storage
//! daemon. `STRESS_SEEDS=n` runs n seeds instead of 10, `STRESS_SEED=s` only that one.

use system_tests::stress::{Plan, run};

#[test]
fn every_sector_of_the_snapshot_is_that_of_the_point_in_time() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seeds = match number("STRESS_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("STRESS_SEEDS").unwrap_or(10),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for seed in seeds {
        let plan = Plan::from_seed(seed);
        let limit = std::time::Duration::from_secs(300);
        let start = std::time::Instant::now();
        let result = runtime.block_on(async { tokio::time::timeout(limit, run(&plan)).await });
        match result {
            Ok(Ok(outcome)) => {
                println!("{:?} seed {seed}: {plan:?} -> {outcome:?}", start.elapsed());
            }
            Ok(Err(error)) => panic!("{error:#}\n{plan:?}\nrepeat with STRESS_SEED={seed}"),
            Err(_) => panic!("no end within {limit:?}\n{plan:?}\nrepeat with STRESS_SEED={seed}"),
        }
    }
}
