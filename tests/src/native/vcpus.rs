//! `l1-tests bench native vcpus`: the pause against the number of vCPUs, on this machine's own KVM, with its floor
//! beside it.

use anyhow::{Context, Result};

use super::{SMALL, bare};
use crate::bench::phase_table;
use crate::floor;
use crate::harness::table::{Table, ms, percentile};

const UPDATES: usize = 30;

/// The vCPUs beyond the first wait for their SIPI: they cost an update what any other does.
pub(super) fn run() -> Result<()> {
    let mut table = Table::new(["pause, ms", "p50", "p99 = max", "n", "floor, p50", "pause / floor"]);
    for cpus in [1, 4, 16] {
        let mut vm = bare(SMALL, cpus, "", false)?;
        // Both builds once, so that their files are in the page cache.
        vm.update()?;
        vm.update()?;
        let mut reports = Vec::new();
        for _ in 0..UPDATES {
            // The tear-down of the last old image is not part of the next pause.
            vm.settled_facts()?;
            reports.push(vm.update().with_context(|| format!("{cpus} vCPUs"))?);
        }
        drop(vm);
        let pauses: Vec<_> = reports.iter().map(|report| report.pause_us).collect();
        let (pause, floor) = (percentile(&pauses, 50), floor::median(cpus)?);
        println!("{cpus} vCPUs:\n\n{}", phase_table(&reports));
        table.row([
            format!("{cpus} vCPUs"),
            ms(pause),
            ms(percentile(&pauses, 100)),
            pauses.len().to_string(),
            ms(floor),
            format!("{:.1}", pause as f64 / floor as f64),
        ]);
    }
    println!("### Pause against vCPUs, natively: 512 MiB that one of them writes all over, no device\n\n{table}");
    println!("Floor: KVM gives and takes the state of so many vCPUs, right after the updates of its row.\n");
    Ok(())
}
