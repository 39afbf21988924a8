// SPDX-License-Identifier: MIT OR Apache-2.0
//! A few episodes of the soak, with fixed seeds: each kind of process, and each way it ends.
//! `cargo xtask soak` goes on for longer.

use std::time::Duration;

use system_tests::soak::{Options, run};

/// Both processes; the mortal one is left alone, quits, and is killed.
const SEEDS: [(u64, u64); 1] = [(0, 6)];

#[test]
fn a_short_soak_leaves_nothing_behind() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for (seed, episodes) in SEEDS {
        let options = Options { seed, duration: Duration::MAX, episodes, show: true };
        match runtime.block_on(run(&options)) {
            Ok(summary) => println!("{summary}"),
            Err(error) => {
                panic!(
                    "{error:#}\nrepeat with cargo xtask soak --seed {seed} --episodes {episodes}"
                )
            }
        }
    }
}
