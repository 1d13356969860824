//! What a thread may not do that has got into wrong hands.

use anyhow::{Context, Result, ensure};

use crate::{
    cases::{MANY, failures::End, probes::Probe},
    harness::{fences, hooks::Switch, lab},
    native::probes,
};

/// What somebody would like to call who has got a vCPU's thread.
const CALLS: [(&str, i64); 7] = [
    ("open a file", libc::SYS_openat),
    ("make a socket", libc::SYS_socket),
    ("run a program", libc::SYS_execve),
    ("trace a process", libc::SYS_ptrace),
    ("mount", libc::SYS_mount),
    ("signal a process", libc::SYS_kill),
    ("write to a process", libc::SYS_process_vm_writev),
];

/// Each ends the new VMM before it has the guest, which goes on in the old one.
pub(super) fn calls_that_are_stopped() -> Result<()> {
    if !fences::stop() {
        return Ok(());
    }
    fences::are_met();
    let mut probe = Probe::new(&probes::clock(), None)?;
    for (wish, call) in CALLS {
        let hook = Switch::with(&probe.vm.dir, "vcpu-calls", &call.to_string())?;
        probe.refused(&format!("the thread 'vcpu0' has called system call {call} ")).context(wish)?;
        drop(hook);
    }
    probe.vm.update()?;
    probe.goes_on("after an update that went well")
}

/// All threads have their filters, and no more of them after many updates and ways back. Who runs programs, or becomes
/// one, has none.
pub(super) fn filters_in_force() -> Result<()> {
    let mut probe = Probe::new(&probes::clock(), None)?;
    let own = std::fs::read_to_string("/proc/self/status")?;
    let inherited = fences::filters_in(&own)?;
    let of_vcpu = inherited + if lab::seccomp().contains(&"false".to_owned()) { 0 } else { 2 };
    for round in 0..=MANY {
        let found = fences::filters(probe.vm.vmm()?)?;
        for (thread, count) in &found {
            let expected = match thread.as_str() {
                "vcpu0" | "vcpu-spawner" => of_vcpu,
                "theseus-vmm" | "spawner" => inherited,
                _ => of_vcpu.min(inherited + 1),
            };
            ensure!(*count == expected, "round {round}: {thread} has {count} filters, not {expected}: {found:?}");
        }
        ensure!(["vcpu0", "control", "api", "keeper-watch"].iter().all(|name| found.contains_key(*name)), "{found:?}");
        let keeper = fences::filters(probe.vm.pid())?;
        ensure!(keeper.values().all(|count| *count == inherited), "round {round}: the keeper: {keeper:?}");
        if round % 4 == 3 {
            let fault = Switch::with(&probe.vm.dir, "fault", "devices:error")?;
            let answer = probe.vm.ask_update(&probe.vm.other_build()?)?;
            End::RolledBack.reasons(&answer)?;
            drop(fault);
        } else {
            probe.vm.update()?;
        }
        probe.goes_on("after an update or a way back")?;
    }
    Ok(())
}
