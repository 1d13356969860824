//! Nothing grows with the number of updates.

use anyhow::{Result, ensure};

use crate::{
    cases::{MANY, note},
    harness::rig::{self, Rig},
};

/// Growth of the VMM's own resident memory that counts as flat, KiB.
const FLAT_KIB: u64 = 1024;

pub(super) fn flat() -> Result<()> {
    rig::shared(|rig| check_flat(rig, MANY))
}

/// Compares the process after the first of `updates` with after the last.
pub(super) fn check_flat(rig: &mut Rig, updates: u32) -> Result<()> {
    // Both builds have run once before: the same one is looked at, so that two builds may differ in size.
    rig.vm.update()?;
    rig.vm.update()?;
    let first = rig.vm.settled_facts()?;
    for _ in 0..updates.next_multiple_of(2) {
        rig.vm.update()?;
    }
    let last = rig.vm.settled_facts()?;
    note(format_args!(
        "{} fds, {} threads, {} mappings, {} KiB of its own, {} KiB locked",
        last.fd_count(),
        last.thread_count(),
        last.mapping_count(),
        last.own_rss_kib,
        last.locked_kib
    ));
    let growth = last.growth_since(&first, FLAT_KIB);
    ensure!(growth.is_empty(), "after {updates} updates: {growth}");
    Ok(())
}
