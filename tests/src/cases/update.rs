//! The update without any device passed through.

use std::{thread::sleep, time::Duration};

use anyhow::{Result, ensure};

use crate::{
    cases::{MANY, note},
    harness::vm::Vm,
    proto::{MachineInfo, MemoryStats, Request},
};

/// Updates back and forth while the guest works on its memory.
pub fn plain() -> Result<()> {
    let mut vm = Vm::builder().cpus(2).boot()?;
    let before: MachineInfo = vm.agent()?.machine()?;
    vm.agent()?.call::<()>(&Request::MemoryStart { mib: 64, seed: 42 })?;
    vm.agent()?.call::<()>(&Request::BusyStart { cpus: vec![1] })?;
    let mut pauses = Vec::new();
    let mut count = 0;
    let mut checked = 0;
    for update in 1..=MANY {
        let report = vm.update()?;
        pauses.push(report.pause_us);
        sleep(Duration::from_millis(100));
        let busy: Vec<u64> = vm.agent()?.call(&Request::BusyStats)?;
        ensure!(busy[0] > count, "after update {update} the busy thread stands still at {count}");
        count = busy[0];
        let memory = vm.agent()?.memory()?;
        ensure!(memory.pages_wrong == 0, "after update {update}: {memory:?}");
        ensure!(memory.pages_checked > checked, "after update {update} the memory job stands still: {memory:?}");
        checked = memory.pages_checked;
    }
    vm.agent()?.call::<Vec<u64>>(&Request::BusyStop)?;
    let memory: MemoryStats = vm.agent()?.call_within(&Request::MemoryStop, Duration::from_secs(120))?;
    ensure!(memory.pages_wrong == 0, "{memory:?}");
    let after = vm.agent()?.machine()?;
    ensure!(after.uptime_s > before.uptime_s && after.cpus_online == before.cpus_online, "{before:?} -> {after:?}");
    ensure!(
        vm.agent()?.asked_again() == 0,
        "{} requests or answers were lost on the serial port",
        vm.agent()?.asked_again()
    );
    let log: String = vm.agent()?.call(&Request::Dmesg { bytes: 4000 })?;
    for bad in ["BUG:", "Oops", "soft lockup", "rcu: INFO", "clocksource: Marking"] {
        ensure!(!log.contains(bad), "the guest's kernel complains: {log}");
    }
    note(format_args!("pauses, us: {pauses:?}; {} memory pages checked", memory.pages_checked));
    Ok(())
}
