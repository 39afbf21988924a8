// SPDX-License-Identifier: MIT OR Apache-2.0
//! The targets on their seeds and on small changes of them: what can be had of fuzzing without a
//! fuzzer, in every run of the tests.

use std::{fs, path::Path};

/// Changed copies of each seed.
const CHANGED: u64 = 100;

/// Runs a target on every file of its folder, and on copies with a few bytes changed.
///
/// # Panics
/// The target does, or it has no seeds.
pub fn run(top: &Path, target: &str, body: fn(&[u8])) {
    let folder = top.join("fuzz/seeds").join(target);
    let files = fs::read_dir(&folder).expect("a folder of seeds");
    let mut files: Vec<_> = files.map(|entry| entry.expect("a file").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} has no seeds", folder.display());
    for file in files {
        let seed = fs::read(&file).expect("a seed");
        println!("{}", file.display());
        body(&seed);
        for number in 0..CHANGED {
            body(&changed(&seed, number));
        }
    }
}

/// One of many changes, always the same for a number: a few bytes replaced, or the end cut off.
fn changed(seed: &[u8], number: u64) -> Vec<u8> {
    // Steele and Vigna's SplitMix64.
    let mut state = number;
    let mut random = |below: usize| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % below.max(1) as u64).expect("it is below a usize")
    };
    let mut bytes = seed.to_vec();
    if random(4) == 0 {
        bytes.truncate(random(seed.len()));
    }
    for _ in 0..=random(4) {
        let at = random(bytes.len());
        if let Some(byte) = bytes.get_mut(at) {
            *byte = u8::try_from(random(256)).expect("it is below 256");
        }
    }
    bytes
}
