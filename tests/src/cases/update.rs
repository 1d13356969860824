//! The update without any device passed through.

use std::{thread::sleep, time::Duration};

use anyhow::{Result, ensure};

use crate::{
    cases::{MANY, note},
    harness::{PATIENCE, vm::Vm, wait_for},
    proto::{MachineInfo, MemoryStats, Request},
};

/// Updates back and forth while the guest works on its memory.
pub(super) fn plain() -> Result<()> {
    let mut vm = Vm::builder().cpus(2).boot()?;
    let before: MachineInfo = vm.agent()?.machine()?;
    vm.agent()?.call::<()>(&Request::MemoryStart { mib: 64, seed: 42 })?;
    vm.agent()?.call::<()>(&Request::BusyStart { cpus: vec![1] })?;
    let dropped = vm.counter("/serial/dropped_bytes")?;
    let mut pauses = Vec::new();
    let mut count = 0;
    // The first filling takes long.
    let mut checked = goes_on("the memory job", 0, || Ok(vm.agent()?.memory()?.pages_checked))?;
    for update in 1..=MANY / 2 {
        let report = vm.update()?;
        pauses.push(report.pause_us);
        count = goes_on(&format!("the busy thread after update {update}"), count, || {
            Ok(vm.agent()?.call::<Vec<u64>>(&Request::BusyStats)?.first().copied().unwrap_or(0))
        })?;
        checked = goes_on(&format!("the memory job after update {update}"), checked, || {
            let memory = vm.agent()?.memory()?;
            ensure!(memory.pages_wrong == 0, "after update {update}: {memory:?}");
            Ok(memory.pages_checked)
        })?;
    }
    vm.agent()?.call::<Vec<u64>>(&Request::BusyStop)?;
    let memory: MemoryStats = vm.agent()?.call(&Request::MemoryStop)?;
    ensure!(memory.pages_wrong == 0, "{memory:?}");
    let after = vm.agent()?.machine()?;
    ensure!(after.uptime_s > before.uptime_s && after.cpus_online == before.cpus_online, "{before:?} -> {after:?}");
    ensure!(
        vm.agent()?.asked_again() == 0,
        "{} requests or answers were lost on the serial port",
        vm.agent()?.asked_again()
    );
    ensure!(vm.counter("/serial/dropped_bytes")? == dropped, "serial output was dropped");
    vm.agent()?.no_complaints()?;
    note(format_args!("pauses, us: {pauses:?}; {} memory pages checked", memory.pages_checked));
    Ok(())
}

/// Waits until `counter` has passed `before`.
fn goes_on(what: &str, before: u64, mut counter: impl FnMut() -> Result<u64>) -> Result<u64> {
    wait_for(what, || Ok(Some(counter()?).filter(|now| *now > before)))
}

/// A paused guest stays paused over an update, and resumes in the new image.
pub(super) fn paused() -> Result<()> {
    let mut vm = Vm::builder().cpus(2).boot()?;
    vm.api.order("vm.pause")?;
    let before = vm.ping()?;
    let answer = vm.ask_update(&vm.other_build()?)?;
    ensure!(answer.status == 200, "{answer:?}");
    vm.note_update();
    let after = vm.ping()?;
    ensure!(after.build_id != before.build_id && after.pid == before.pid, "{before:?} -> {after:?}: {answer:?}");
    ensure!(vm.state()? == "Paused", "{}", vm.info()?);
    let ticket = vm.agent()?.start::<()>(&Request::Ping)?;
    sleep(Duration::from_millis(500));
    vm.api.order("vm.resume")?;
    // What was sent to the paused guest is answered now.
    ticket.wait(PATIENCE)?;
    vm.update()?;
    vm.agent()?.ping()
}

/// The VMM without a guest is replaced as well.
pub(super) fn without_guest() -> Result<()> {
    let mut vm = Vm::api_only()?;
    for _ in 0..3 {
        let before = vm.ping()?;
        let answer = vm.ask_update(&vm.other_build()?)?;
        ensure!(answer.status == 200, "{answer:?}");
        vm.note_update();
        let after = vm.ping()?;
        ensure!(after.build_id != before.build_id && after.pid == before.pid, "{before:?} -> {after:?}: {answer:?}");
    }
    ensure!(vm.is_running(), "the VMM ended");
    Ok(())
}
