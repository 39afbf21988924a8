// SPDX-License-Identifier: MIT OR Apache-2.0
//! Measures reading an export: `read_speed SOCKET [EXPORT] [REQUEST_KIB] [IN_FLIGHT] [CONNECTIONS]`.
//!
//! Reads the whole export, prints bytes per second. Compare with
//! `nbdcopy nbd+unix:///?socket=SOCKET null:`.

use std::time::Instant;

use bytes::BytesMut;
use provider_nbd::{Client, Options, Result};

/// Reads every `in_flight`-th request, beginning with the `first`, into one buffer.
async fn lane(client: Client, first: u64, in_flight: u64, step: u64) -> Result<u64> {
    let (mut done, mut buf) = (0, BytesMut::with_capacity(step as usize));
    let mut offset = first * step;
    while offset < client.size_bytes() {
        let len = step.min(client.size_bytes() - offset);
        buf.clear();
        buf = client.read_into(offset, len as usize, buf).await?;
        done += len;
        offset += in_flight * step;
    }
    Ok(done)
}

async fn measure(args: &[String]) -> Result<()> {
    let number = |n: usize, default: u64| {
        args.get(n).and_then(|text| text.parse().ok()).filter(|&n| n > 0).unwrap_or(default)
    };
    let export = args.get(1).map_or("", String::as_str);
    let (step, in_flight) = (number(2, 256) << 10, number(3, 16));
    let options = Options { connections: number(4, 1) as usize, ..Options::default() };
    let client = Client::connect_unix(&args[0], export, options).await?;
    let begin = Instant::now();
    let mut lanes = tokio::task::JoinSet::new();
    for first in 0..in_flight {
        lanes.spawn(lane(client.clone(), first, in_flight, step));
    }
    let done = lanes.join_all().await.into_iter().sum::<Result<u64>>()?;
    let seconds = begin.elapsed().as_secs_f64();
    let rate = done as f64 / seconds / 1e9;
    println!(
        "{done} bytes in {seconds:.3} s = {rate:.2} GB/s ({in_flight} x {} KiB over {} connections)",
        step >> 10,
        client.connections()
    );
    client.disconnect().await
}

#[tokio::main]
async fn main() -> std::process::ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.is_empty() {
        eprintln!("Usage: read_speed SOCKET [EXPORT] [REQUEST_KIB] [IN_FLIGHT] [CONNECTIONS]");
        return std::process::ExitCode::FAILURE;
    }
    match measure(&args).await {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            std::process::ExitCode::FAILURE
        }
    }
}
