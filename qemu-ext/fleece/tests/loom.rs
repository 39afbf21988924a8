// SPDX-License-Identifier: GPL-2.0-or-later
//! Interleavings of the engine's operations, explored by loom: every pair of writer, reader,
//! release, flush, break and drain, and triples that have a story. A model passes when no order of
//! its threads breaks the oracle, loses a wake-up, or leaves something behind (`model::explore`).
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p fleece --release --test loom`, with a target folder of its
//! own; `LOOM_MORE_PREEMPTIONS=1` explores more than the bounds below.

#![cfg(loom)]
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod model;

use fleece::OnError::{BreakGuestWrite, BreakSnapshot};
use model::Role::{Break, Close, Discard, Drain, Flush, Read, Release, Status, Write, Zeroes};
use model::{Setup, explore};

macro_rules! models {
    ($($name:ident: $setup:expr => [$($role:expr),+];)+) => {$(
        #[test]
        fn $name() {
            let roles = [$($role),+];
            // At most so many preemptions: a pair is cheap.
            let bound = if roles.len() == 2 { 3 } else { 2 };
            explore(stringify!($name), bound, $setup, &roles);
        }
    )+};
}

// Pairs. Content 0 is zero, everything else is data.
models! {
    writer_writer: Setup::roomy(&[1, 2]) => [Write(0..1, 7), Write(0..1, 8)];
    writer_writer_overlapping: Setup::roomy(&[1, 0, 3]) => [Write(0..2, 7), Write(1..3, 8)];
    writer_writer_through: Setup::through(&[1, 2, 3]) => [Write(0..2, 7), Write(1..3, 8)];
    writer_reader: Setup::roomy(&[1, 0]) => [Write(0..2, 7), Read(0..2)];
    writer_reader_through: Setup::through(&[1, 0]) => [Write(0..2, 7), Read(0..2)];
    writer_writer_shared: Setup::shared(&[1, 2, 3]) => [Write(0..2, 7), Write(1..3, 8)];
    writer_reader_shared: Setup::shared(&[1, 0]) => [Write(0..2, 7), Read(0..2)];
    writer_release_shared: Setup::shared(&[1, 2]) => [Write(0..2, 7), Release(0..1)];
    writer_break_shared: Setup::shared(&[1, 2]) => [Write(0..1, 7), Break];
    writer_writer_failing_share: Setup::failing_share(&[1, 2]) =>
        [Write(0..2, 7), Write(1..2, 8)];
    writer_reader_failing_share: Setup::failing_share(&[1, 2]) => [Write(0..2, 7), Read(0..2)];
    writer_release: Setup::roomy(&[1, 2]) => [Write(0..2, 7), Release(0..1)];
    writer_release_through: Setup::through(&[1, 2]) => [Write(0..2, 7), Release(0..1)];
    writer_flush: Setup::pressed(&[1, 2]).after(&[Write(0..1, 6)]) => [Write(0..2, 7), Flush];
    writer_break: Setup::roomy(&[1, 2]) => [Write(0..1, 7), Break];
    writer_break_through: Setup::through(&[1, 2]) => [Write(0..1, 7), Break];
    through_hangs_break: Setup::through(&[1, 2]).hanging() => [Write(0..1, 7), Break, Flush];
    writer_drain: Setup::pressed(&[1, 2]) => [Write(0..1, 7), Drain];
    reader_release_source: Setup::roomy(&[1, 2]) => [Read(0..2), Release(0..1)];
    reader_release_ram: Setup::roomy(&[1, 2]).after(&[Write(0..2, 7)]) =>
        [Read(0..2), Release(0..1)];
    reader_release_log: Setup::through(&[1, 2]).after(&[Write(0..2, 7)]) =>
        [Read(0..2), Release(0..1)];
    reader_flush: Setup::pressed(&[1, 2]).after(&[Write(0..1, 7)]) => [Read(0..2), Flush];
    reader_break: Setup::roomy(&[1, 2]).after(&[Write(0..1, 7)]) => [Read(0..2), Break];
    reader_drain: Setup::pressed(&[1, 2]).after(&[Write(0..1, 7)]) => [Read(0..2), Drain];
    release_flush: Setup::pressed(&[1, 2]).after(&[Write(0..1, 7)]) => [Release(0..1), Flush];
    release_flush_segment: Setup::batches(&[1, 2, 3, 4]).segments(2)
        .after(&[Write(0..1, 7), Write(1..2, 7), Write(2..3, 7)]) => [Release(0..2), Flush];
    release_break: Setup::roomy(&[1, 2]).after(&[Write(0..1, 7)]) => [Release(0..2), Break];
    release_drain: Setup::pressed(&[1, 2]).after(&[Write(0..1, 7)]) => [Release(0..1), Drain];
    flush_flush: Setup::batches(&[1, 2, 3])
        .after(&[Write(0..1, 7), Write(1..2, 7), Write(2..3, 7)]) => [Flush, Flush];
    flush_break: Setup::pressed(&[1, 2]).after(&[Write(0..1, 7)]) => [Flush, Break];
    flush_drain: Setup::batches(&[1, 2, 3])
        .after(&[Write(0..1, 7), Write(1..2, 7), Write(2..3, 7)]) => [Flush, Drain];
    break_break: Setup::pressed(&[1, 2]).after(&[Write(0..1, 7)]) => [Break, Close];
    break_drain: Setup::pressed(&[1, 2]).after(&[Write(0..1, 7)]) => [Break, Drain];
    release_release: Setup::through(&[1, 2]).after(&[Write(0..2, 7)]) =>
        [Release(0..2), Release(0..1)];
}

// Readers beside writers, whatever else happens.
models! {
    a_read_that_succeeds_never_shows_what_was_not_captured: Setup::roomy(&[1, 2]) =>
        [Write(0..1, 7), Read(0..1), Break];
    writer_reader_close: Setup::through(&[1, 2]) => [Write(0..1, 7), Read(0..1), Close];
    writer_release_reader_shared: Setup::shared(&[1, 2]) =>
        [Write(0..1, 7), Release(0..1), Read(0..2)];
    writer_flush_reader: Setup::pressed(&[1, 2]) => [Write(0..1, 7), Flush, Read(0..1)];
    writer_release_reader: Setup::roomy(&[1, 2]) => [Write(0..1, 7), Release(0..1), Read(0..2)];
    writer_release_reader_through: Setup::through(&[1, 2]) =>
        [Write(0..1, 7), Release(0..1), Read(0..2)];
    writer_writer_reader: Setup::roomy(&[1, 2]) => [Write(0..1, 7), Write(0..2, 8), Read(0..2)];
    release_flush_writer: Setup::batches(&[1, 2, 3, 4])
        .after(&[Write(0..1, 7), Write(1..2, 7), Write(2..3, 7)]) =>
        [Release(0..1), Flush, Write(3..4, 8)];
    release_flush_reader: Setup::pressed(&[1, 2]).after(&[Write(0..1, 7)]) =>
        [Release(0..1), Flush, Read(0..1)];
    status_of_zeroes_and_writer: Setup::roomy(&[0, 0]) => [Write(0..1, 7), Status(0..2)];
    status_of_data_and_writer: Setup::roomy(&[1, 0]) => [Write(0..1, 0), Status(0..2)];
    status_of_data_and_writer_and_break: Setup::roomy(&[1, 0]) =>
        [Write(0..1, 0), Status(0..2), Break];
    status_of_discarded_and_release: Setup::roomy(&[1, 0]).after(&[Discard(0..1)]) =>
        [Release(0..1), Status(0..2)];
    known_zeroes_and_writer: Setup::pressed(&[0, 0]) => [Zeroes(0..2), Write(0..1, 7)];
    known_zeroes_and_writer_and_reader: Setup::pressed(&[0, 3]) =>
        [Zeroes(0..2), Write(0..1, 7), Read(0..2)];
}

// Guest discards, and what they must never destroy.
models! {
    discard_writer: Setup::roomy(&[1, 2]) => [Discard(0..2), Write(0..1, 7)];
    discard_release: Setup::roomy(&[1, 2]) => [Discard(0..1), Release(0..1)];
    discard_close: Setup::roomy(&[1, 2]) => [Discard(0..1), Close];
    postponed_release_writer: Setup::roomy(&[1, 2]).after(&[Discard(0..1)]) =>
        [Release(0..1), Write(0..1, 7)];
    postponed_release_writer_reader: Setup::roomy(&[1, 2]).after(&[Discard(0..1)]) =>
        [Release(0..1), Write(0..1, 7), Read(0..1)];
    postponed_release_writer_break: Setup::roomy(&[1, 2]).after(&[Discard(0..1)]) =>
        [Release(0..1), Write(0..1, 7), Break];
    postponed_release_release_writer: Setup::roomy(&[1, 2]).after(&[Discard(0..2)]) =>
        [Release(0..2), Write(0..2, 7), Release(0..1)];
    postponed_close_writer: Setup::roomy(&[1, 2]).after(&[Discard(0..1)]) =>
        [Close, Write(0..1, 7)];
    postponed_close_writer_release: Setup::roomy(&[1, 2]).after(&[Discard(0..1)]) =>
        [Close, Write(0..1, 7), Release(0..1)];
    postponed_close_writer_without_room: Setup::through_pressed(&[1, 2, 3])
        .after(&[Discard(2..3)]) => [Write(0..2, 7), Write(2..3, 8), Close];
    postponed_close_drain: Setup::roomy(&[1, 2]).after(&[Discard(0..2)]) => [Close, Drain];
    discard_break_writer: Setup::roomy(&[1, 2]) => [Discard(0..1), Break, Write(0..1, 7)];
    discard_close_writer: Setup::roomy(&[1, 2]) => [Discard(0..1), Close, Write(0..1, 7)];
    discard_release_writer: Setup::roomy(&[1, 2]) =>
        [Discard(0..1), Release(0..1), Write(0..1, 7)];
}

// Waiting for room in RAM.
models! {
    waiter_flush: Setup::scarce(&[1, 2], 1).after(&[Write(0..1, 6)]) => [Write(1..2, 7), Flush];
    waiter_release: Setup::scarce(&[1, 2], 1).after(&[Write(0..1, 6)]) =>
        [Write(1..2, 7), Release(0..1)];
    waiter_break: Setup::scarce(&[1, 2], 1).after(&[Write(0..1, 6)]) => [Write(1..2, 7), Break];
    waiter_drain_flush: Setup::scarce(&[1, 2], 1).after(&[Write(0..1, 6)]) =>
        [Write(1..2, 7), Drain, Flush];
    waiter_break_flush: Setup::scarce(&[1, 2], 1).after(&[Write(0..1, 6)]) =>
        [Write(1..2, 7), Break, Flush];
    waiter_release_flush: Setup::scarce(&[1, 2, 3], 1).after(&[Write(0..1, 6)]) =>
        [Write(1..2, 7), Release(0..2), Flush];
    two_waiters_flush: Setup::scarce(&[1, 2, 3], 1).after(&[Write(0..1, 6)]) =>
        [Write(1..2, 7), Write(2..3, 8), Flush];
    two_waiters_for_one_granule_flush: Setup::scarce(&[1, 2], 1).after(&[Write(0..1, 6)]) =>
        [Write(1..2, 7), Write(1..2, 8), Flush];
}

// Errors: one capture, or one write to the log, fails.
models! {
    failed_write_and_writer: Setup::roomy(&[1, 2]).failing_capture(BreakGuestWrite) =>
        [Write(0..1, 7), Write(0..1, 8)];
    failed_write_and_writer_and_reader: Setup::roomy(&[1, 2]).failing_capture(BreakGuestWrite) =>
        [Write(0..1, 7), Write(0..1, 8), Read(0..1)];
    failed_write_and_release: Setup::roomy(&[1, 2]).failing_capture(BreakGuestWrite) =>
        [Write(0..1, 7), Release(0..1)];
    lost_granule_and_writer_and_reader: Setup::roomy(&[1, 2]).failing_capture(BreakSnapshot) =>
        [Write(0..1, 7), Write(0..1, 8), Read(0..1)];
    failed_log_and_writer_and_reader: Setup::through(&[1, 2]).failing_log(BreakSnapshot) =>
        [Write(0..1, 7), Write(0..1, 8), Read(0..1)];
    failed_log_and_failed_write_and_reader: Setup::through(&[1, 2]).failing_log(BreakGuestWrite) =>
        [Write(0..1, 7), Write(0..1, 8), Read(0..1)];
    failed_flush_and_reader: Setup::pressed(&[1, 2]).after(&[Write(0..1, 6)])
        .failing_log(BreakSnapshot) => [Flush, Read(0..1), Write(0..1, 7)];
    failed_flush_and_waiter: Setup::scarce(&[1, 2], 1).after(&[Write(0..1, 6)])
        .failing_log(BreakSnapshot) => [Write(1..2, 7), Flush];
}

// Requests of the engine that hang: the end of the snapshot sets everybody else free.
models! {
    hanging_read_and_writer_and_break: Setup::roomy(&[1, 2]).hanging() =>
        [Write(0..1, 7), Write(0..1, 8), Break];
    hanging_read_and_writer_and_close: Setup::roomy(&[1, 2]).hanging() =>
        [Write(0..1, 7), Write(0..1, 8), Close];
    hanging_flush_and_waiter_and_break: Setup::full(&[1; 8]).after(&[Write(0..7, 6)])
        .hanging() => [Write(7..8, 7), Flush, Break];
}
