//! The guest's memory is as fast after an update as before.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::{
    cases::note,
    harness::{clock::kvm_dir, lab, vm::Vm, wait_for},
    native::{self, Counter, guest},
};

const MEMORY: u64 = 128 << 20;

/// A new VM's second stage is made before the pause, where the kernel can do so (since 6.11): a guest that goes round
/// all its memory then makes no page fault for each of its pages.
pub(super) fn second_stage() -> Result<()> {
    let mut vm = native::bare(MEMORY, 1, "", false)?;
    let counter = Counter::of(vm.vmm()?)?;
    let pages = guest::pages(MEMORY);
    let goes_round = |vm: &mut Vm, when: &str| {
        let all = counter.get() + 2 * pages;
        wait_for(&format!("the guest to write all of its memory {when}"), || {
            ensure!(vm.is_running(), "the VMM has ended: {}", vm.log_text());
            Ok((counter.get() >= all).then_some(()))
        })?;
        let file = kvm_dir(vm.vmm()?)?.join("pf_taken");
        let faults = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
        faults.trim().parse::<u64>().with_context(|| format!("{}: {faults:?}", file.display()))
    };
    let booted = goes_round(&mut vm, "after its boot")?;
    vm.update()?;
    let updated = goes_round(&mut vm, "after an update")?;
    note(format_args!("{pages} pages; page faults after the boot {booted}, after an update {updated}"));
    ensure!(booted >= pages, "{booted} page faults for {pages} pages: is it another counter?");
    if lab::kernel_version() == "6.1" {
        return Ok(());
    }
    ensure!(updated < pages / 4, "{updated} page faults for {pages} pages");
    Ok(())
}
