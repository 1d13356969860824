//! What no update can do without while the guest stands still: KVM gives the state of each vCPU, and takes it in
//! another VM. Measured right beside the pauses, which can so be compared between machines, and hours, of different
//! speed.

use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::harness::table::percentile;

const RUNS: usize = 20;

/// The median, us, with `cpus` vCPUs, as many at a time as there are CPUs.
pub fn median(cpus: u32) -> Result<u64> {
    let kvm = Kvm::new()?;
    let msrs = readable_msrs(&kvm)?;
    let (_old, from) = machine(&kvm, cpus)?;
    let (_new, to) = machine(&kvm, cpus)?;
    let pairs: Vec<_> = from.iter().zip(&to).collect();
    let threads = thread::available_parallelism().map_or(1, usize::from).min(pairs.len()).max(1);
    let runs = (0..RUNS).map(|_| {
        let began = Instant::now();
        thread::scope(|scope| {
            let msrs = &msrs;
            let mut shares = pairs.chunks(pairs.len().div_ceil(threads).max(1));
            // The first one here: to start a thread is no part of it where one is enough.
            let mine = shares.next().unwrap_or_default();
            let others: Vec<_> = shares.map(|share| scope.spawn(|| share_of(share, msrs))).collect();
            share_of(mine, msrs)?;
            others.into_iter().try_for_each(|other| other.join().expect("the floor's thread"))
        })?;
        Ok(began.elapsed().as_micros() as u64)
    });
    Ok(percentile(&runs.collect::<Result<Vec<_>>>().context("the floor of the pause")?, 50))
}

fn machine(kvm: &Kvm, cpus: u32) -> Result<(VmFd, Vec<VcpuFd>)> {
    let vm = kvm.create_vm()?;
    vm.create_irq_chip()?;
    let vcpus = (0..u64::from(cpus)).map(|index| vm.create_vcpu(index)).collect::<Result<_, _>>()?;
    Ok((vm, vcpus))
}

/// Those that a vCPU without any CPUID has: about as many as a guest's.
fn readable_msrs(kvm: &Kvm) -> Result<Vec<kvm_msr_entry>> {
    let (_vm, vcpus) = machine(kvm, 1)?;
    let vcpu = vcpus.first().context("no vCPU")?;
    let all = kvm.get_msr_index_list()?;
    let entries = all.as_slice().iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() });
    let taken_back = |entry: &kvm_msr_entry| {
        let Ok(mut one) = Msrs::from_entries(&[*entry]) else { return false };
        vcpu.get_msrs(&mut one).is_ok_and(|count| count == 1) && vcpu.set_msrs(&one).is_ok_and(|count| count == 1)
    };
    Ok(entries.filter(taken_back).collect())
}

fn share_of(pairs: &[(&VcpuFd, &VcpuFd)], msrs: &[kvm_msr_entry]) -> Result<()> {
    for (old, new) in pairs {
        let mut msrs = Msrs::from_entries(msrs).context("too many MSRs")?;
        let (state, regs, sregs) = (old.get_mp_state()?, old.get_regs()?, old.get_sregs()?);
        let (xsave, xcrs, debug) = (old.get_xsave()?, old.get_xcrs()?, old.get_debug_regs()?);
        old.get_msrs(&mut msrs)?;
        let (lapic, events) = (old.get_lapic()?, old.get_vcpu_events()?);
        new.set_mp_state(state)?;
        new.set_regs(&regs)?;
        new.set_sregs(&sregs)?;
        new.set_xcrs(&xcrs)?;
        // SAFETY: what KVM_GET_XSAVE has filled in: no feature of the guest is larger than that.
        unsafe { new.set_xsave(&xsave) }?;
        new.set_debug_regs(&debug)?;
        new.set_lapic(&lapic)?;
        new.set_msrs(&msrs)?;
        new.set_vcpu_events(&events)?;
    }
    Ok(())
}
