//! New images that die of what no signal of a test stands for: no memory, and a death that comes too late for a way
//! back.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};

use crate::{
    cases::{
        failures::{End, unharmed},
        note,
    },
    harness::{
        fences,
        hooks::Switch,
        lab::Nic,
        proc,
        report::{Report, update_body},
        rig::{self, Rig},
        vm::Vm,
        wait_for,
    },
    proto::{MemoryStats, Request},
};

/// A panic that is not the control thread's.
pub(super) fn vcpu_panic() -> Result<()> {
    rig::shared(|rig| {
        unharmed(rig, End::RolledBack, &["panic of a thread (test)"], |rig| {
            let _hook = Switch::on(&rig.vm.dir, "vcpu-panic")?;
            rig.vm.ask_update(&rig.vm.other_build()?)
        })
    })
}

/// A vCPU's thread of the new VMM, whichever of two is the first, calls what its filter does not allow.
pub(super) fn vcpu_filter() -> Result<()> {
    if !fences::stop() {
        return Ok(());
    }
    fences::are_met();
    rig::shared(|rig| {
        unharmed(
            rig,
            End::RolledBack,
            &["the thread 'vcpu0' has called system call", "the thread 'vcpu1' has called system call"],
            |rig| {
                let _hook = Switch::with(&rig.vm.dir, "vcpu-calls", &libc::SYS_openat.to_string())?;
                rig.vm.ask_update(&rig.vm.other_build()?)
            },
        )
    })
}

/// A cgroup below L1's root with memory for one guest, as an orchestrator makes it. This process is in it until
/// [`SmallMemory::leave`], and its children stay.
struct SmallMemory(PathBuf);

impl SmallMemory {
    /// RAM of the guest, and as much as an image that is well does not need.
    const MIB: u64 = 256 + 256;

    fn new() -> Result<Self> {
        let root = PathBuf::from("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+memory +pids")
            .context("no such controllers in /sys/fs/cgroup")?;
        let this = Self(root.join("small-memory"));
        fs::create_dir(&this.0).with_context(|| format!("{}", this.0.display()))?;
        this.set(Self::MIB << 20)?;
        fs::write(this.0.join("cgroup.procs"), std::process::id().to_string())?;
        Ok(this)
    }

    fn set(&self, bytes: u64) -> Result<()> {
        fs::write(self.0.join("memory.max"), bytes.to_string()).context("memory.max")
    }

    /// Leaves room for 16 MiB.
    fn shrink_to_fit(&self) -> Result<()> {
        let used: u64 = fs::read_to_string(self.0.join("memory.current"))?.trim().parse()?;
        self.set(used + (16 << 20))
    }

    /// So many threads more, or as many as it wants.
    fn threads(&self, more: Option<u64>) -> Result<()> {
        let now: u64 = fs::read_to_string(self.0.join("pids.current"))?.trim().parse()?;
        let max = more.map_or("max".into(), |more| (now + more).to_string());
        fs::write(self.0.join("pids.max"), max).context("pids.max")
    }

    fn leave() -> Result<()> {
        Ok(fs::write("/sys/fs/cgroup/cgroup.procs", std::process::id().to_string())?)
    }

    /// Processes that the OOM killer has taken here.
    fn kills(&self) -> Result<u64> {
        let events = fs::read_to_string(self.0.join("memory.events"))?;
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(kills.context("no oom_kill")?.trim().parse()?)
    }
}

impl Drop for SmallMemory {
    fn drop(&mut self) {
        let _ = Self::leave();
        let _ = fs::remove_dir(&self.0);
        let _ = fs::write("/sys/fs/cgroup/cgroup.subtree_control", "-memory -pids");
    }
}

/// Asks for an update whose new VMM a fault kills.
pub(super) fn taken_back(vm: &mut Vm) -> Result<Report> {
    let answer = vm.ask_update(&vm.other_build()?)?;
    let report: Report = answer.json().with_context(|| format!("{answer:?}"))?;
    ensure!(report.outcome == "rolled_back" && report.pid == vm.pid() && vm.ping()?.pid == vm.pid(), "{report:?}");
    Ok(report)
}

/// An update that its cgroup has no memory, or no threads, for is refused. If memory runs out all the same, the
/// kernel's OOM killer takes the new VMM, and not the old one, though that has all of guest RAM mapped.
pub(super) fn out_of_memory() -> Result<()> {
    // Before the VM, so that it is empty when it is removed.
    let cgroup = SmallMemory::new()?;
    let mut rig = Rig::boot(Vm::builder().cpus(2), &[(Nic::IgbA, None)])?;
    SmallMemory::leave()?;
    rig.agent()?.call::<()>(&Request::MemoryStart { mib: 16, seed: 8 })?;
    cgroup.shrink_to_fit()?;
    let refused = rig.vm.ask_update(&rig.vm.other_build()?)?;
    ensure!(refused.status == 409 && refused.causes()?.join(" ").contains("small-memory"), "{refused:?}");
    cgroup.set(SmallMemory::MIB << 20)?;
    cgroup.threads(Some(8))?;
    let refused = rig.vm.ask_update(&rig.vm.other_build()?)?;
    ensure!(refused.status == 409 && refused.causes()?.join(" ").contains("(pids.max "), "{refused:?}");
    cgroup.threads(None)?;

    for (round, phase) in ["claim", "remap"].into_iter().enumerate() {
        let traffic = rig.traffic()?;
        traffic.moves_on(rig.agent()?, 25)?;
        let fault = Switch::with(&rig.vm.dir, "fault", &format!("{phase}:oom"))?;
        let report = taken_back(&mut rig.vm)?;
        drop(fault);
        let reasons = report.reasons.join(" ");
        ensure!(reasons.contains(&format!("phase {phase}")) && reasons.contains("died"), "{report:?}");
        ensure!(cgroup.kills()? == round as u64 + 1, "{} processes were killed", cgroup.kills()?);
        note(format_args!("{phase}: rolled back after {} us: {reasons}", report.pause_us));
        let score = fs::read_to_string(format!("/proc/{}/oom_score_adj", rig.vm.vmm()?))?;
        ensure!(score.trim() == "0", "oom_score_adj is {score} afterwards");
        traffic.moves_on(rig.agent()?, 25)?;
        traffic.finish_clean(rig.agent()?)?;
    }
    rig.update_under_traffic()?;
    rig.vm.settled_facts()?;
    let score = fs::read_to_string(format!("/proc/{}/oom_score_adj", rig.vm.vmm()?))?;
    ensure!(score.trim() == "0", "oom_score_adj is {score} after an update");
    let memory: MemoryStats = rig.agent()?.call(&Request::MemoryStop)?;
    ensure!(memory.pages_wrong == 0, "{memory:?}");
    Ok(())
}

/// From its commit on a new VMM that dies is a VMM that crashes, and leaves nothing: the old one goes too, and the
/// device is free for the next.
pub(super) fn committed() -> Result<()> {
    for kind in ["kill", "segv"] {
        let mut vm = Vm::builder().cpus(2).device(Nic::IgbA, None)?.boot()?;
        vm.update()?;
        vm.settled_facts()?;
        let fault = Switch::with(&vm.dir, "fault", &format!("committed:{kind}"))?;
        let mut caller = vm.api.connect()?;
        caller.send("PUT", "vm.update", &update_body(&vm.other_build()?))?;
        let status = vm.wait_exit()?;
        ensure!(!status.success() && status.code().is_none(), "{kind}: {status}");
        drop(fault);
        ensure!(caller.receive().is_err(), "an answer of a VMM that is dead");
        // The old VMM is ours now, as its parent is gone.
        wait_for("the old VMM to end", || {
            let ours = proc::children(std::process::id())?;
            Ok(ours.into_iter().all(|pid| proc::state(pid).is_ok_and(|state| state == 'Z')).then_some(()))
        })?;
        proc::wait_group_free(&Nic::IgbA.bdf()?)?;
    }
    Rig::boot(Vm::builder().cpus(2), &[(Nic::IgbA, None)])?.update_under_traffic()
}

/// `--fault` of a test build: it strikes in every update, whichever build is the old one by then.
pub(super) fn fault_by_option() -> Result<()> {
    let mut vm = Vm::builder().fault("remap:kill").boot()?;
    for _ in 0..2 {
        let report = taken_back(&mut vm)?;
        ensure!(report.reasons.join(" ").contains("phase remap"), "{report:?}");
        vm.agent()?.ping()?;
    }
    Ok(())
}
