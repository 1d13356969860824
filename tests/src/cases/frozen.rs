//! What the guest sees of its machine, and where its vCPUs run, stay as they are.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::{
    harness::{agent::Agent, placement::Placement, proc, rig, vm::Vm},
    proto::PciFunction,
};

/// CPUID of every CPU, and every PCI function's configuration space and resources, before and after updates between two
/// builds that would each boot a guest with another machine.
pub fn machine() -> Result<()> {
    rig::shared(|rig| {
        let other = Vm::builder().cpus(rig.vm.cpus).binary("theseus-b").boot()?;
        let (ours, others) = (rig.agent()?.cpuid(0)?, other.agent()?.cpuid(0)?);
        ensure!(ours != others, "both builds boot the same machine, so this test would show nothing");
        drop(other);

        let leaves = rig.agent()?.remember_cpuid()?;
        ensure!(leaves.len() == rig.vm.cpus as usize && leaves.iter().all(|&n| n > 10), "{leaves:?}");
        let pci = pci(rig.agent()?)?;
        ensure!(pci.len() > rig.wires.len(), "{pci:?}");
        for way in ["there", "back"] {
            rig.vm.update()?;
            let changes = rig.agent()?.cpuid_changes()?;
            ensure!(changes.is_empty(), "{way}: CPUID changed: {changes:?}");
            let pci_after = self::pci(rig.agent()?)?;
            ensure!(pci.len() == pci_after.len(), "{way}: {} -> {} PCI functions", pci.len(), pci_after.len());
            for (a, b) in pci.iter().zip(&pci_after) {
                ensure!(
                    a == b,
                    "{way}: PCI function {} changed:\n{}\n{}\n{}\n{}",
                    a.bdf,
                    a.config,
                    b.config,
                    a.resources,
                    b.resources
                );
            }
        }
        Ok(())
    })
}

fn pci(agent: &Agent) -> Result<Vec<PciFunction>> {
    let mut pci = agent.pci()?;
    for function in &mut pci {
        mask_status(&mut function.config);
    }
    Ok(pci)
}

/// The PCI status register (offset 6) and PCI Express device and link status (capability 0x10, offsets 0xa and 0x12)
/// tell what happened on the bus, not what the machine is.
fn mask_status(config: &mut String) {
    let Some(mut bytes) = decode(config) else { return };
    let mut mask = |at: usize| bytes.get_mut(at..at + 2).map(|b| b.fill(0));
    mask(6);
    let express = |bytes: &[u8]| {
        let mut at = usize::from(*bytes.get(0x34)?) & !3;
        for _ in 0..48 {
            match (*bytes.get(at)?, *bytes.get(at + 1)?) {
                _ if at == 0 => return None,
                (0x10, _) => return Some(at),
                (_, next) => at = usize::from(next) & !3,
            }
        }
        None
    };
    if let Some(at) = express(&bytes) {
        for status in [at + 0xa, at + 0x12] {
            if let Some(word) = bytes.get_mut(status..status + 2) {
                word.fill(0);
            }
        }
    }
    *config = bytes.iter().map(|b| format!("{b:02x}")).collect();
}

fn decode(hex: &str) -> Option<Vec<u8>> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(hex.get(i..i + 2)?, 16).ok()).collect()
}

/// A threaded cgroup below the root of L1's, removed when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new() -> Result<Self> {
        let path = PathBuf::from("/sys/fs/cgroup/vcpus");
        let cgroup = Self(path.clone());
        std::fs::create_dir(&path).with_context(|| format!("{}: is cgroup2 mounted?", path.display()))?;
        std::fs::write(path.join("cgroup.type"), "threaded")?;
        Ok(cgroup)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// Affinity, policy, nice value and cgroup of a vCPU thread as an operator sets them from outside. What main is given
/// is not theirs.
pub fn affinity_kept() -> Result<()> {
    // Before the VM, so that it is empty when it is removed. Only the root may have threads of a process below it just
    // so.
    let is_root = std::fs::read_to_string("/proc/self/cgroup")?.lines().any(|line| line == "0::/");
    let cgroup = is_root.then(Cgroup::new).transpose()?;
    let mut vm = Vm::builder().cpus(2).boot()?;
    let tid = proc::thread_named(vm.vmm()?, "vcpu0")?;
    if let Some(cgroup) = &cgroup {
        std::fs::write(cgroup.0.join("cgroup.threads"), tid.to_string()).context("a thread into a cgroup")?;
    }
    let other = Placement::of(proc::thread_named(vm.vmm()?, "vcpu1")?)?;
    // The last CPU of those there are: where L1 has one, only policy and nice value can differ.
    let cpus: Vec<_> = other.cpus.last().copied().into_iter().collect();
    Placement { cpus: cpus.clone(), policy: libc::SCHED_BATCH, nice: 5, cgroup: String::new() }.put(tid)?;
    Placement { cpus: other.cpus.clone(), policy: libc::SCHED_BATCH, nice: 7, cgroup: String::new() }
        .put(vm.pid() as i32)?;
    let wanted = Placement::of(tid)?;
    ensure!(wanted.cpus == cpus && wanted.policy == libc::SCHED_BATCH && wanted.nice == 5, "{wanted:?}");
    ensure!(cgroup.is_none() || (wanted.cgroup == "/vcpus" && other.cgroup == "/"), "{wanted:?}, {other:?}");
    for _ in 0..2 {
        vm.update()?;
        let now = Placement::of(proc::thread_named(vm.vmm()?, "vcpu0")?)?;
        ensure!(now == wanted, "vcpu0: {wanted:?} -> {now:?}");
        let now = Placement::of(proc::thread_named(vm.vmm()?, "vcpu1")?)?;
        ensure!(now == other, "vcpu1: {other:?} -> {now:?}");
    }
    vm.agent()?.ping()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_masked_and_nothing_else() {
        let mut bytes = vec![0x11_u8; 256];
        bytes[0x34] = 0x40;
        (bytes[0x40], bytes[0x41]) = (0x05, 0x60);
        (bytes[0x60], bytes[0x61]) = (0x10, 0);
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let mut config = hex(&bytes);
        mask_status(&mut config);
        for at in [6, 7, 0x6a, 0x6b, 0x72, 0x73] {
            bytes[at] = 0;
        }
        assert_eq!(config, hex(&bytes));
    }

    #[test]
    fn no_capabilities_no_loop() {
        let mut config = "ff".repeat(256);
        mask_status(&mut config);
        let mut short = "00".repeat(8);
        mask_status(&mut short);
        assert_eq!(short, "00".repeat(8));
    }
}
