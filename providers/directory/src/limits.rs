// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every bound of this crate in one place, with its reason.

use std::time::Duration;

/// Unit of checksums and of one write job.
pub(crate) const BLOCK_BYTES: u64 = 4 << 20;
/// One NBD read. Small enough to stay in the processor's cache between socket, hash and file:
/// larger requests were measured slower.
pub(crate) const READ_BYTES: u64 = 256 << 10;
/// Cluster size of the images written, and the unit of zero detection.
pub(crate) const CLUSTER_BYTES: u64 = 64 << 10;
/// Data of one guest's disks held in memory at once.
pub(crate) const IN_FLIGHT_BYTES: u64 = 64 << 20;
/// Blocks of one disk in work at once. More than the memory bound allows for full blocks, so that
/// increments of many small areas keep enough requests in flight.
pub(crate) const BLOCKS_IN_FLIGHT: usize = 48;
/// Range asked for in one round of block status queries: bounds the extents held in memory.
pub(crate) const WINDOW_BYTES: u64 = 1 << 30;
/// One NBD trim.
pub(crate) const TRIM_BYTES: u64 = 1 << 30;
/// Connections to one disk's export.
pub(crate) const CONNECTIONS: usize = 2;
/// Wait for one NBD request. A bandwidth limit may stretch the requests in flight.
pub(crate) const NBD_TIMEOUT: Duration = Duration::from_secs(300);

/// Archives in one backing chain. Each costs a descriptor and a lookup per read in a restore; at
/// the bound the next backup is a full one.
pub(crate) const CHAIN_ARCHIVES_MAX: usize = 128;
/// Largest disk accepted from a manifest: far above any real one, far below an overflow.
pub(crate) const DISK_BYTES_MAX: u64 = 1 << 56;
/// Disks of one guest.
pub(crate) const DISKS_MAX: usize = 256;
/// Largest manifest that is read.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 4 << 20;
/// Largest guest or firewall configuration that is stored or read.
pub(crate) const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// Largest of the provider's own small files (commit records).
pub(crate) const RECORD_BYTES_MAX: u64 = 4 << 10;
/// Age at which a commit record is dropped. A host asks right after an error or at its next start.
pub(crate) const RECORD_KEEP: Duration = Duration::from_hours(90 * 24);
/// Level of zstd for a container's files: its default, faster than most storages.
pub(crate) const COMPRESSION_LEVEL: i32 = 3;
/// Threads that compress one container's tree; each needs some MiB.
pub(crate) const COMPRESSION_THREADS_MAX: u32 = 8;
/// What is taken out of a pipe, or read of a stored tree, at once.
pub(crate) const PIPE_BYTES: usize = 1 << 20;
/// How far a container's files are read ahead of `tar`: enough to keep a disk busy, little beside a page cache.
pub(crate) const AHEAD_BYTES: u64 = 64 << 20;
/// The same in files, for trees of tiny ones.
pub(crate) const AHEAD_FILES: usize = 4096;
/// What is read ahead of one file; then the kernel has noticed that all of it is read.
pub(crate) const AHEAD_FILE_BYTES: u64 = 1 << 20;
/// Directories within each other, each a descriptor, in which files are read ahead.
pub(crate) const AHEAD_DEPTH_MAX: usize = 64;
/// Names of one directory that are sorted in memory; files of a larger one are not read ahead.
pub(crate) const AHEAD_NAMES_MAX: usize = 100_000;
/// An archive is written to the disk in pieces of that size while it grows.
pub(crate) const FLUSH_BYTES: u64 = 16 << 20;
/// Wait for what is left in a pipe whose writer has ended: at most as much as a pipe holds, and what a
/// storage has not written yet, which its cache may have much of. As long as a host waits for anything to move.
pub(crate) const PIPE_END_WAIT: Duration = Duration::from_mins(30);
/// Pause between two reports of a container's progress.
pub(crate) const REPORT_INTERVAL: Duration = Duration::from_millis(200);
/// Volumes of one container.
pub(crate) const MOUNTS_MAX: usize = 512;
/// Names tried when an archive of the same guest and second exists.
pub(crate) const NAME_TRIES: u32 = 100;

/// Wait for the storage's lock. Its holders rename and sync small files.
pub(crate) const LOCK_WAIT: Duration = Duration::from_secs(60);
/// How long a removal waits at its beginning for restores, verifications and backups that have the guest's archives
/// open. They take minutes to hours, so this only covers their ends. Later, when something may have
/// been copied already, it waits as for the storage's lock.
pub(crate) const USE_WAIT: Duration = Duration::from_secs(2);
/// Times a removal looks for archives that build upon the one that goes. New ones are committed
/// meanwhile only by backups that had begun before.
pub(crate) const MERGE_ROUNDS: u32 = 4;
/// The same wait in `commit_outcome`, which then answers "pending".
pub(crate) const OUTCOME_LOCK_WAIT: Duration = Duration::from_secs(10);
/// How long an activation waits for the removal of what dead runs left, which then goes on beside it.
pub(crate) const LEFTOVERS_WAIT: Duration = Duration::from_secs(5);
/// Pause between two tries of a lock.
pub(crate) const LOCK_RETRY: Duration = Duration::from_millis(10);
/// Longest answer time of `status`.
pub(crate) const STATUS_WAIT: Duration = Duration::from_millis(900);

/// Wait for `qemu-nbd` to listen.
pub(crate) const SERVER_START_WAIT: Duration = Duration::from_secs(30);
/// Pause between two looks at its socket.
pub(crate) const SERVER_START_RETRY: Duration = Duration::from_millis(10);
/// Bytes of its error output kept for messages.
pub(crate) const SERVER_OUTPUT_BYTES: usize = 4 << 10;
/// Clients of one restore server.
pub(crate) const SERVER_CLIENTS: u32 = 16;

const _: () = {
    assert!(BLOCK_BYTES.is_multiple_of(CLUSTER_BYTES));
    assert!(BLOCK_BYTES.is_multiple_of(READ_BYTES));
    assert!(READ_BYTES.is_multiple_of(CLUSTER_BYTES));
    assert!(WINDOW_BYTES.is_multiple_of(BLOCK_BYTES));
    assert!(IN_FLIGHT_BYTES >= BLOCK_BYTES);
};
