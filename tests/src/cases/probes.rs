//! Guests of a few instructions, which are in states that no kernel is in for long.

use anyhow::{Result, ensure};

use crate::{
    cases::{failures::End, note},
    harness::{hooks::Switch, lab::Nic, proc, vm::Vm, wait_for},
    native::{Counter, guest, probes},
};

/// A guest of `code`, and its two counts.
pub(super) struct Probe {
    pub vm: Vm,
    counter: Counter,
}

impl Probe {
    pub(super) fn new(code: &[u8], device: Option<Nic>) -> Result<Self> {
        let kernel = std::env::temp_dir().join(format!("probe-{}", std::process::id()));
        guest::write_image(&kernel, code)?;
        let mut args = vec!["--kernel".into(), kernel.display().to_string(), "--memory".into(), "size=128M".into()];
        if let Some(nic) = device {
            let bdf = nic.bdf()?;
            proc::wait_group_free(&bdf)?;
            args.extend(["--device".into(), format!("path=/sys/bus/pci/devices/{bdf}")]);
        }
        let vm = Vm::with_args(&args.iter().map(String::as_str).collect::<Vec<_>>())?.booted()?;
        std::fs::remove_file(&kernel)?;
        let counter = Counter::of(vm.vmm()?)?;
        let mut probe = Self { vm, counter };
        probe.goes_on_from(0, "after its boot")?;
        Ok(probe)
    }

    /// What it is about.
    fn count(&self) -> u64 {
        self.counter.get()
    }

    pub(super) fn goes_on(&mut self, when: &str) -> Result<()> {
        self.goes_on_from(self.counter.second(), when)
    }

    fn goes_on_from(&mut self, before: u64, when: &str) -> Result<()> {
        let vm = &mut self.vm;
        wait_for(&format!("the guest to go on {when}"), || {
            ensure!(vm.is_running(), "the VMM has ended: {}", vm.log_text());
            Ok((self.counter.second() > before).then_some(()))
        })
    }

    /// An update that must be undone, with `word` among the reasons.
    pub(super) fn refused(&mut self, word: &str) -> Result<()> {
        let pid = self.vm.pid();
        let answer = self.vm.ask_update(&self.vm.other_build()?)?;
        let reasons = End::RolledBack.reasons(&answer)?;
        note(format_args!("{reasons}"));
        ensure!(reasons.contains(word), "no {word} in {reasons}");
        ensure!(self.vm.ping()?.pid == pid, "the PID has changed");
        self.goes_on("after an update that was undone")
    }
}

/// Whatever a guest stood still for: it is told when it goes on.
pub(super) fn told_that_it_stood_still() -> Result<()> {
    let mut probe = Probe::new(&probes::clock(), None)?;
    ensure!(probe.count() == 0, "it was told before it had stood still");
    let told = |probe: &Probe, times: u64, of: &str| {
        wait_for(&format!("the guest to be told of {of}"), || Ok((probe.count() >= times).then_some(())))?;
        ensure!(probe.count() == times, "told {} times, not {times}, after {of}", probe.count());
        Ok(())
    };
    probe.vm.api.order("vm.pause")?;
    probe.vm.api.order("vm.resume")?;
    told(&probe, 1, "a pause")?;
    let fault = Switch::with(&probe.vm.dir, "fault", "invalidate:error")?;
    probe.refused("phase invalidate")?;
    drop(fault);
    told(&probe, 2, "an update undone before the exec")?;
    probe.vm.update()?;
    told(&probe, 3, "an update")?;
    probe.vm.api.order("vm.pause")?;
    probe.vm.update()?;
    probe.vm.api.order("vm.resume")?;
    told(&probe, 4, "a pause that an update fell into")
}

/// A deadline that may have passed unseen is due at once: one interrupt an update, which wakes a vCPU that sleeps.
pub(super) fn deadline_in_doubt() -> Result<()> {
    let mut probe = Probe::new(&probes::timer(), None)?;
    for update in 1..=3 {
        ensure!(probe.count() == update - 1, "{} interrupts before update {update}", probe.count());
        probe.vm.update()?;
        wait_for("the timer", || Ok((probe.count() >= update).then_some(())))?;
    }
    Ok(())
}

/// A device that is one file and one line of the catalogue: it comes at boot, goes over there and back, stands still in
/// a pause, and can refuse.
pub(super) fn device_that_counts() -> Result<()> {
    let vm = Vm::api_only()?;
    let asked = Switch::on(&vm.dir, "counting-device")?;
    let kernel = vm.dir.join("kernel");
    guest::write_image(&kernel, &probes::counting())?;
    let config = serde_json::json!({ "payload": { "kernel": kernel }, "memory": { "size": 128 << 20 } });
    let created = vm.api.put("vm.create", &config.to_string())?;
    ensure!(created.ok(), "{created:?}");
    vm.api.order("vm.boot")?;
    drop(asked);
    let counter = Counter::of(vm.vmm()?)?;
    let mut probe = Probe { vm, counter };
    probe.goes_on_from(0, "after its boot")?;
    for update in 1..=2 {
        probe.vm.update()?;
        probe.goes_on(&format!("after update {update}: has the device counted what it was written?"))?;
    }
    probe.vm.api.order("vm.pause")?;
    probe.vm.update()?;
    let paused = probe.count();
    probe.vm.api.order("vm.resume")?;
    probe.goes_on("after a pause that an update fell into")?;
    ensure!(probe.count() > paused, "it has counted {paused} before and {} after a pause", probe.count());

    probes::tell(probe.vm.vmm()?, 7)?;
    // Twice, and the device has been told.
    probe.goes_on("when it was told to block")?;
    probe.goes_on("when it was told to block")?;
    let answer = probe.vm.ask_update(&probe.vm.other_build()?)?;
    let reasons = End::Refused.reasons(&answer)?;
    ensure!(reasons.contains("device 'counting': it blocks 7: have the guest write 0"), "{reasons}");
    probe.goes_on("after an update that was refused")
}

/// KVM gives CS.L outside of long mode, and does not take it back.
pub(super) fn code_segment_that_kvm_refuses() -> Result<()> {
    let mut probe = Probe::new(&probes::code_segment(), None)?;
    probe.refused("with L = 1 outside of long mode")?;
    // A build that does not look: the new VMM cannot have it, and the old one has it still.
    let blind = Switch::on(&probe.vm.dir, "skip-state-check")?;
    probe.refused("KVM_SET_SREGS2")?;
    drop(blind);
    probe.refused("with L = 1 outside of long mode")?;
    probe.goes_on("after three updates that were not")
}

/// KVM looks up an address when it is told of it: one in a BAR that was switched off since it does not take again.
pub(super) fn eoi_flag_that_kvm_refuses() -> Result<()> {
    let mut probe = Probe::new(&probes::eoi_flag(), Some(Nic::IgbA))?;
    probe.refused("MSR_KVM_PV_EOI_EN")?;
    let blind = Switch::on(&probe.vm.dir, "skip-state-check")?;
    probe.refused("0x4b564d04")?;
    drop(blind);
    probe.refused("MSR_KVM_PV_EOI_EN")?;
    probe.goes_on("after three updates that were not")
}
