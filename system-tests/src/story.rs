// SPDX-License-Identifier: MIT OR Apache-2.0
//! The main job as one story: back up a running VM, back it up again, restore both, let the guest check.
//!
//! Each step gives a row of the table at the end; the first thing that is not as it must be ends
//! the story with an error.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::{Backup, Checked, Lab, SOURCE_VM};
use crate::table::{Row, Table};

/// The VM that the increment is restored to.
pub const INCREMENT_VM: u32 = 101;
/// The VM that the full backup is restored to.
pub const FULL_VM: u32 = 102;
/// How long the guest may take for its records; a stalled guest ends the story.
const RECORDS_WITHIN: Duration = Duration::from_secs(180);
/// What an increment may transfer beyond the clusters the records touched: nothing but the records
/// written while the point in time was being taken.
const INCREMENT_SLACK_BYTES: u64 = 2 << 20;

/// How many records are written when.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Before the full backup.
    pub before: u64,
    /// Between full backup and increment.
    pub between: u64,
}

/// What the story produced.
#[derive(Debug)]
pub struct Ending {
    /// One row per step.
    pub table: Table,
    /// The full backup.
    pub full: Backup,
    /// The increment.
    pub increment: Backup,
    /// What the increment had to transfer, by the guest's own records.
    pub touched_bytes: u64,
}

/// Tells the story in an installation whose VM does not run yet; `say` gets one line per step.
///
/// # Errors
/// The first thing that is not as it must be.
pub fn tell(lab: &mut Lab, pace: Pace, mut say: impl FnMut(&str)) -> Result<Ending> {
    let mut table = Table::default();
    say("Start the VM; its guest checks both disks and writes records to them all the time.");
    let begin = Instant::now();
    let mut running = lab.start(SOURCE_VM)?;
    let mut seen = running.console.wait_for_record(pace.before, RECORDS_WITHIN, &lab.stop)?;
    table.add(Row::new("guest writes", begin.elapsed()).stall(seen.longest_stall));

    say("Full backup while the guest writes.");
    let full = lab.backup()?;
    seen = running.console.wait_for_record(seen.last + 1, RECORDS_WITHIN, &lab.stop)?;
    ensure!(!full.is_increment(), "the first backup cannot be an increment");
    ensure!(full.freeze.is_some(), "the guest's file systems were not frozen");
    table.add(Row::of_backup("full backup", &full).stall(seen.longest_stall));

    say("The guest writes more.");
    let begin = Instant::now();
    let goal = seen.last + pace.between;
    seen = running.console.wait_for_record(goal, RECORDS_WITHIN, &lab.stop)?;
    table.add(Row::new("guest writes", begin.elapsed()).stall(seen.longest_stall));

    say("Incremental backup while the guest writes.");
    let increment = lab.backup()?;
    seen = running.console.wait_for_record(seen.last + 1, RECORDS_WITHIN, &lab.stop)?;
    let actions = &increment.bitmap_actions;
    ensure!(increment.is_increment(), "the second backup is no increment: bitmaps {actions:?}");
    table.add(Row::of_backup("increment", &increment).stall(seen.longest_stall));
    lab.stop_vm(SOURCE_VM)?;

    say("Restore both as new VMs and boot them; the guest checks every sector.");
    let restored = restore_and_boot(lab, &increment, INCREMENT_VM, "increment", &mut table)?;
    let base = restore_and_boot(lab, &full, FULL_VM, "full backup", &mut table)?;

    let touched_bytes = lab.touched_bytes(base, restored)?;
    check_increment(&full, &increment, touched_bytes)?;
    ensure!(base.last_a >= pace.before, "the full backup lacks records: it ends with {base:?}");
    let between = restored.last_a.saturating_sub(base.last_a);
    ensure!(between >= pace.between, "the increment lacks records: {base:?}, then {restored:?}");
    Ok(Ending { table, full, increment, touched_bytes })
}

fn restore_and_boot(
    lab: &mut Lab,
    backup: &Backup,
    vm: u32,
    name: &str,
    table: &mut Table,
) -> Result<Checked> {
    let took = lab.restore(&backup.volume, vm)?;
    table.add(Row::new(&format!("restore {name}"), took).size(backup.disks_bytes));
    let begin = Instant::now();
    let checked = lab.start(vm).with_context(|| format!("the restored {name}"))?.checked;
    let row = Row::new(&format!("boot and check {name}"), begin.elapsed());
    table.add(row.result(&format!("records a={} b={}: ok", checked.last_a, checked.last_b)));
    lab.stop_vm(vm)?;
    let half = checked.in_flight_sectors;
    ensure!(half == 0, "the restored {name} has {half} sectors of a half-written record");
    Ok(checked)
}

/// The increment transfers what the guest wrote since the full backup and nothing else.
fn check_increment(full: &Backup, increment: &Backup, touched_bytes: u64) -> Result<()> {
    let (total, allowed) = (increment.total_bytes, touched_bytes + INCREMENT_SLACK_BYTES);
    ensure!(
        (touched_bytes..=allowed).contains(&total),
        "the increment transferred {total} bytes, but the guest's records touched {touched_bytes}"
    );
    let limit = full.disks_bytes / 4;
    ensure!(total <= limit, "the increment ({total} bytes) is not far below the full backup");
    Ok(())
}
