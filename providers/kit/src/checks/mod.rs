// SPDX-License-Identifier: MIT OR Apache-2.0
//! The checks, in the order in which an author meets them.

mod archives;
mod backup;
mod basics;
mod containers;
mod crash;
mod guests;
mod trouble;

use provider_api::{BoxFuture, Capabilities};

use crate::bench::Ctx;
use crate::fault::Checked;

/// How a check ends that finds no fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Passed,
    NotTested(String),
}

/// Something a provider must be able to do for a check to make sense.
pub(crate) struct Need {
    pub(crate) name: &'static str,
    pub(crate) has: fn(&Capabilities) -> bool,
}

/// One check.
pub(crate) struct Check {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) needs: &'static [&'static Need],
    /// Whether it is run with a real QEMU, too.
    pub(crate) is_main_step: bool,
    pub(crate) run: for<'a> fn(&'a Ctx) -> BoxFuture<'a, Checked<Verdict>>,
}

impl Check {
    /// Whether it is about containers.
    pub(crate) fn is_of_containers(&self) -> bool {
        self.needs.iter().any(|need| need.name == CONTAINER.name)
    }
}

static VM: Need = Need { name: "vm_nbd or vm_file", has: |c| c.vm_nbd || c.vm_file };
static RESTORE: Need = Need { name: "vm_restore", has: |c| c.vm_restore };
static INCREMENTAL: Need = Need { name: "vm_incremental", has: |c| c.vm_incremental };
static NOTES: Need = Need { name: "notes", has: |c| c.notes };
static PROTECT: Need = Need { name: "protect", has: |c| c.protect };
static REMOVE: Need = Need { name: "remove", has: |c| c.remove };
static VERIFY: Need = Need { name: "verify", has: |c| c.verify };
static LOG: Need = Need { name: "log", has: |c| c.log };
static FILE: Need = Need { name: "vm_file", has: |c| c.vm_file };
static CONTAINER: Need = Need { name: "container", has: |c| c.container };
static CONTAINER_RESTORE: Need = Need { name: "container_restore", has: |c| c.container_restore };
static SLOW_COMMIT: Need = Need { name: "slow_commit", has: |c| c.slow_commit };
static RANDOM_READ: Need = Need { name: "random_read", has: |c| c.random_read };

macro_rules! check {
    ($name:literal, $title:literal, $needs:expr, $main:literal, $function:path) => {
        Check {
            name: $name,
            title: $title,
            needs: $needs,
            is_main_step: $main,
            run: |ctx| Box::pin($function(ctx)),
        }
    };
}

pub(crate) static CHECKS: &[Check] = &[
    check!("describe", "says what it is", &[], false, basics::describe),
    check!("activate", "can be made ready again and again", &[], false, basics::activate),
    check!("status", "tells its space, fast", &[], false, basics::status),
    check!("unknown", "knows nothing of what is not there", &[], false, basics::unknown),
    check!("full", "full backup, restored byte by byte", &[&VM, &RESTORE], true, backup::full),
    check!(
        "incremental",
        "increments of what changed",
        &[&VM, &RESTORE, &INCREMENTAL],
        true,
        backup::incremental
    ),
    check!(
        "empty-increment",
        "increment without any change",
        &[&VM, &RESTORE, &INCREMENTAL],
        true,
        backup::empty_increment
    ),
    check!(
        "fine-increment",
        "increments of areas of 4 KiB",
        &[&VM, &RESTORE, &INCREMENTAL],
        false,
        backup::fine_increment
    ),
    check!(
        "late-full",
        "wants an increment, has to make a full backup",
        &[&VM, &RESTORE, &INCREMENTAL],
        false,
        backup::late_full
    ),
    check!(
        "chain",
        "a long chain of increments",
        &[&VM, &RESTORE, &INCREMENTAL],
        true,
        backup::chain
    ),
    check!("sizes", "disks whose sizes fit no unit", &[&VM, &RESTORE], true, backup::sizes),
    check!(
        "changed-disks",
        "disks come, go and grow",
        &[&VM, &RESTORE],
        false,
        backup::changed_disks
    ),
    check!("no-disks", "a machine without disks", &[&VM], false, backup::no_disks),
    check!("abort", "gives up at each step", &[&VM, &RESTORE], true, trouble::abort),
    check!(
        "failing-request",
        "each request of the disks fails once",
        &[&VM, &RESTORE],
        false,
        trouble::failing_requests
    ),
    check!("lost-disks", "the disks go away", &[&VM, &RESTORE], false, trouble::lost_disks),
    check!(
        "wrong-sum",
        "notices a bitmap that is not whole",
        &[&VM, &INCREMENTAL],
        false,
        trouble::wrong_sum
    ),
    check!("wrong-size", "notices a disk of another size", &[&VM], false, trouble::wrong_size),
    check!("cancel", "stops when it is told to", &[&VM], false, trouble::cancel),
    check!("crash", "dies at each step", &[&VM, &RESTORE], false, crash::crash),
    check!(
        "commit-outcome",
        "tells what became of a commit",
        &[&VM, &RESTORE],
        false,
        crash::outcome
    ),
    check!(
        "slow-commit",
        "commits when the disks are gone",
        &[&VM, &RESTORE, &SLOW_COMMIT],
        false,
        crash::slow_commit
    ),
    check!("concurrent", "several guests at once", &[&VM, &RESTORE], false, guests::concurrent),
    check!("hostile-names", "guests with hostile names", &[&VM, &RESTORE], false, guests::names),
    check!(
        "hostile-configs",
        "configurations of any bytes",
        &[&VM, &RESTORE],
        false,
        guests::configs
    ),
    check!("load", "answers fast during a backup", &[&VM], false, guests::load),
    check!(
        "restores",
        "several restores, and odd ones",
        &[&VM, &RESTORE],
        false,
        archives::restores
    ),
    check!(
        "random-read",
        "any part of a restored disk at any time",
        &[&VM, &RESTORE, &RANDOM_READ],
        false,
        archives::random_read
    ),
    check!("notes", "keeps notes", &[&VM, &NOTES], false, archives::notes),
    check!("log", "keeps the log of a backup", &[&VM, &LOG], false, archives::log),
    check!("protect", "protects archives", &[&VM, &PROTECT, &REMOVE], false, archives::protect),
    check!("verify", "finds sound archives sound", &[&VM, &VERIFY], false, archives::verify),
    check!("damage", "finds one flipped bit", &[&VM, &VERIFY], false, archives::damage),
    check!(
        "remove",
        "removals leave the others as they were",
        &[&VM, &RESTORE, &REMOVE],
        false,
        archives::remove
    ),
    check!(
        "remove-meanwhile",
        "removals leave a backup under way as it is",
        &[&VM, &RESTORE, &REMOVE],
        false,
        archives::remove_meanwhile
    ),
    check!(
        "prune",
        "pruning keeps chains whole",
        &[&VM, &RESTORE, &REMOVE],
        false,
        archives::prune
    ),
    check!("files", "disks offered as files", &[&FILE, &RESTORE], false, backup::files),
    check!(
        "container",
        "a container with odd files, restored file by file",
        &[&CONTAINER, &CONTAINER_RESTORE],
        true,
        containers::container
    ),
    check!(
        "container-abort",
        "gives up the backup of a container",
        &[&CONTAINER, &CONTAINER_RESTORE],
        true,
        containers::abort
    ),
    check!(
        "container-command",
        "a command that reads a container fails",
        &[&CONTAINER, &CONTAINER_RESTORE],
        false,
        containers::failing_commands
    ),
    check!(
        "container-exclude",
        "leaves out what is to be left out, no more",
        &[&CONTAINER, &CONTAINER_RESTORE],
        true,
        containers::exclude
    ),
    check!(
        "container-names",
        "containers with hostile names and mount points",
        &[&CONTAINER, &CONTAINER_RESTORE],
        false,
        guests::container_names
    ),
    check!(
        "container-configs",
        "configurations of containers of any bytes",
        &[&CONTAINER],
        false,
        guests::container_configs
    ),
    check!(
        "container-load",
        "answers fast during the backup of a container",
        &[&CONTAINER],
        false,
        containers::load
    ),
];

#[cfg(test)]
mod tests {
    use super::CHECKS;

    #[test]
    fn names_are_unique_and_can_be_typed() {
        for (n, check) in CHECKS.iter().enumerate() {
            assert!(CHECKS[..n].iter().all(|c| c.name != check.name), "{}", check.name);
            assert!(check.name.chars().all(|c| c.is_ascii_lowercase() || c == '-'));
        }
    }
}
