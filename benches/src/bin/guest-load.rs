// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs in the guest that is measured: random writes of 4 KiB past its page cache, each block once, by
//! as many threads as requests are to be in flight. Only the standard library: it is linked statically.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
/// Linux' number on x86.
const O_DIRECT: i32 = 0o40000;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("guest-load: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Arguments: device, depth, seconds, seed.
fn run(arguments: &[String]) -> io::Result<String> {
    let [device, numbers @ ..] = arguments else {
        return Err(io::Error::other("usage: guest-load DEVICE DEPTH SECONDS SEED"));
    };
    let number = |n: usize| numbers.get(n).and_then(|text| text.parse::<u64>().ok());
    let (Some(depth), Some(seconds), Some(seed)) = (number(0), number(1), number(2)) else {
        return Err(io::Error::other("depth, seconds and seed are numbers"));
    };
    let mut file = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(device)?;
    let blocks = file.seek(SeekFrom::End(0))? / BLOCK as u64;
    let next = AtomicU64::new(0);
    let begin = Instant::now();
    let deadline = begin + Duration::from_secs(seconds);
    let results: Vec<io::Result<Vec<u64>>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..depth.clamp(1, 256))
            .map(|_| scope.spawn(|| write(&file, blocks, seed, &next, deadline)))
            .collect();
        let failed = || Err(io::Error::other("a thread panicked"));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| failed())).collect()
    });
    let took = begin.elapsed();
    let mut latencies = Vec::new();
    for result in results {
        latencies.extend(result?);
    }
    latencies.sort_unstable();
    let ios = latencies.len();
    if ios == 0 {
        return Err(io::Error::other("nothing was written"));
    }
    let at = |part: f64| latencies[((part * ios as f64) as usize).min(ios - 1)];
    let mean = latencies.iter().sum::<u64>() / ios as u64;
    let (p99, p999) = (at(0.99), at(0.999));
    Ok(format!("LOAD {ios} {} {mean} {p99} {p999} END", took.as_nanos()))
}

fn write(
    file: &File,
    blocks: u64,
    seed: u64,
    next: &AtomicU64,
    deadline: Instant,
) -> io::Result<Vec<u64>> {
    let memory = vec![0x5a; 2 * BLOCK];
    let skip = memory.as_ptr().align_offset(BLOCK);
    let data = &memory[skip..skip + BLOCK];
    let mut latencies = Vec::new();
    loop {
        let begin = Instant::now();
        let number = next.fetch_add(1, Ordering::Relaxed);
        if begin >= deadline || number >= blocks {
            return Ok(latencies);
        }
        file.write_all_at(data, place(number, blocks, seed) * BLOCK as u64)?;
        latencies.push(u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
}

/// The `number`th of `blocks` places, each once: a Feistel network on the next power of four, walked
/// until it is within the disk.
fn place(number: u64, blocks: u64, seed: u64) -> u64 {
    let half = (u64::BITS - blocks.saturating_sub(1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1 << half) - 1;
    let mut at = number;
    loop {
        let (mut left, mut right) = (at >> half, at & mask);
        for round in 0..4 {
            let mixed = (right ^ seed ^ (round << 56)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (left, right) = (right, left ^ (mixed >> 40 & mask));
        }
        at = left << half | right;
        if at < blocks {
            return at;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_once() {
        for blocks in [1, 5, 1000, 4096] {
            let mut places: Vec<u64> = (0..blocks).map(|n| place(n, blocks, 7)).collect();
            places.sort_unstable();
            assert!(places.into_iter().eq(0..blocks));
        }
        assert_ne!(place(1, 1000, 1), place(1, 1000, 2));
    }

    #[test]
    fn bad_arguments_are_errors() {
        assert!(run(&[]).is_err());
        assert!(run(&["/dev/null".into(), "x".into()]).is_err());
    }
}
