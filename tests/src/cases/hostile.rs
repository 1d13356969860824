//! Guests that use their device against the host, or against whoever runs them.

use std::{fs::File, os::unix::fs::FileExt};

use anyhow::{Context, Result, ensure};

use crate::{
    cases::note,
    harness::{agent::Agent, hooks::Switch, lab::Nic, vm::Vm, wait_for},
    proto::Request,
};

/// PCI Local Bus 3.0, 6.2.2.
const COMMAND: u64 = 4;
const DISABLE_INTX: u16 = 1 << 10;

/// The guest's address of its only NIC, and where its capability `id` is.
fn device(agent: &Agent, id: u8) -> Result<(String, u64)> {
    let nic = agent.nics()?.pop().context("the guest has no NIC")?;
    let functions = agent.pci()?;
    let function = functions.iter().find(|function| function.bdf == nic.bdf).context("no such function")?;
    let byte = |at: usize| u8::from_str_radix(function.config.get(at * 2..at * 2 + 2).unwrap_or_default(), 16);
    let mut at = usize::from(byte(0x34)?);
    for _ in 0..48 {
        if at < 0x40 || byte(at)? == id {
            break;
        }
        at = usize::from(byte(at + 1)?);
    }
    ensure!(at >= 0x40, "no capability {id:#x}: {function:?}");
    Ok((nic.bdf, at as u64))
}

/// DisINTx is the guest's to see and not to change: with MSI-X off and the bit clear a device could assert INTx, which
/// nobody handles.
pub(super) fn intx_stays_off() -> Result<()> {
    let mut vm = Vm::builder().device(Nic::IgbA, None)?.boot()?;
    let host = Nic::IgbA.bdf()?;
    let physical = || -> Result<u16> {
        let mut word = [0; 2];
        File::open(format!("/sys/bus/pci/devices/{host}/config"))?.read_exact_at(&mut word, COMMAND)?;
        Ok(u16::from_le_bytes(word))
    };
    let (bdf, msix) = device(vm.agent()?, 0x11)?;
    let (_, express) = device(vm.agent()?, 0x10)?;
    // The driver has MSI-X on: from here on no driver, and MSI-X as the test wants it.
    vm.agent()?.call::<u32>(&Request::VectorsOn { bdf: bdf.clone() })?;
    let write =
        |vm: &Vm, offset, value| vm.agent()?.call::<()>(&Request::ConfigWrite { bdf: bdf.clone(), offset, value });
    let read = |vm: &Vm, offset| vm.agent()?.call::<u16>(&Request::ConfigRead { bdf: bdf.clone(), offset });
    let check = |vm: &Vm, when: &str| -> Result<()> {
        let (seen, there) = (read(vm, COMMAND)?, physical()?);
        ensure!(seen & DISABLE_INTX == 0, "{when}: the guest has cleared DisINTx and reads COMMAND {seen:#x}");
        ensure!(there & DISABLE_INTX != 0, "{when}: COMMAND of the device is {there:#x}: it may assert INTx");
        Ok(())
    };
    let control = read(&vm, msix + 2)?;
    write(&vm, msix + 2, control & 0x7FFF)?;
    write(&vm, COMMAND, read(&vm, COMMAND)? & !DISABLE_INTX)?;
    check(&vm, "MSI-X off")?;
    write(&vm, COMMAND, read(&vm, COMMAND)? | DISABLE_INTX)?;
    ensure!(read(&vm, COMMAND)? & DISABLE_INTX != 0, "the guest cannot set DisINTx");
    write(&vm, COMMAND, read(&vm, COMMAND)? & !DISABLE_INTX)?;
    check(&vm, "set and cleared")?;
    write(&vm, express + 8, read(&vm, express + 8)? | 1 << 15)?;
    check(&vm, "after a reset of the function")?;
    vm.update()?;
    check(&vm, "after an update")?;
    {
        let _fault = Switch::with(&vm.dir, "fault", "remap:error")?;
        ensure!(vm.ask_update(&vm.other_build()?)?.json::<serde_json::Value>()?["outcome"] == "rolled_back");
    }
    check(&vm, "after an update that was rolled back")?;
    write(&vm, msix + 2, control | 0x8000)?;
    write(&vm, msix + 2, control & 0x7FFF)?;
    check(&vm, "MSI-X on and off")
}

/// All vCPUs reset their device without end, each in a write that takes 100 ms, and wait for one another: the VMM
/// answers, is updated, and no write is lost.
pub(super) fn resets_without_end() -> Result<()> {
    let mut vm = Vm::builder().cpus(4).device(Nic::IgbA, None)?.boot()?;
    let (bdf, _) = device(vm.agent()?, 0x10)?;
    vm.agent()?.call::<()>(&Request::ResetsStart { bdf: bdf.clone(), cpus: (0..4).collect() })?;
    let counts = |vm: &Vm| vm.agent()?.call::<Vec<u64>>(&Request::ResetsStats);
    let goes_on = |vm: &Vm, before: &[u64]| {
        wait_for("every vCPU to get its turn", || {
            Ok(counts(vm)?.iter().zip(before).all(|(now, then)| now > then).then_some(()))
        })
    };
    goes_on(&vm, &[0; 4])?;
    for round in 0..3 {
        vm.info()?;
        let before = counts(&vm)?;
        let report = vm.update().with_context(|| format!("update {round}"))?;
        note(format_args!("pause {} us", report.pause_us));
        goes_on(&vm, &before)?;
    }
    // One that is rolled back by each of the ways: what was owed to the guest is paid in the old build.
    for fault in ["save:error", "remap:error", "remap:kill"] {
        let before = counts(&vm)?;
        let fault = Switch::with(&vm.dir, "fault", fault)?;
        let answer = vm.ask_update(&vm.other_build()?)?;
        let report: crate::harness::report::Report = answer.json().with_context(|| format!("{answer:?}"))?;
        drop(fault);
        ensure!(report.outcome == "rolled_back", "{report:?}");
        vm.follow(report.pid)?;
        goes_on(&vm, &before)?;
    }
    let before = counts(&vm)?;
    vm.api.order("vm.pause")?;
    vm.api.order("vm.resume")?;
    goes_on(&vm, &before)?;
    vm.agent()?.call::<Vec<u64>>(&Request::ResetsStop)?;
    let seen: u16 = vm.agent()?.call(&Request::ConfigRead { bdf, offset: 0 })?;
    ensure!(seen == 0x8086, "the device does not answer after its resets: vendor {seen:#x}");
    vm.update()?;
    vm.agent()?.no_complaints()
}
