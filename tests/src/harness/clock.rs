//! The guest's clock against L1's; the method is told in [`crate::clock`].

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::{
    clock::{Sample, Which, difference, median, sample},
    harness::{vm::Vm, wait_for},
};

const TRIES: usize = 200;
const READINGS: usize = 7;

/// Where the guest's clocks are, relative to L1's.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// CLOCK_MONOTONIC_RAW: guest minus L1, ns, with a constant in it.
    pub raw_ns: i64,
    /// CLOCK_REALTIME: guest minus L1, ns.
    pub real_ns: i64,
    /// TSC of each vCPU minus L1's.
    pub offsets: Vec<i64>,
    /// The largest uncertainty of the samples used, TSC ticks.
    pub window: u64,
}

/// KVM's folder of the VM of process `pid` in debugfs. While the old VM of an update is dying there are two.
pub fn kvm_dir(pid: u32) -> Result<PathBuf> {
    wait_for("KVM to show one VM of the VMM in debugfs", || {
        let root = fs::read_dir("/sys/kernel/debug/kvm").context("is debugfs mounted on /sys/kernel/debug?")?;
        let mut dirs: Vec<PathBuf> = root.flatten().map(|e| e.path()).filter(|dir| is_vm_of(pid, dir)).collect();
        Ok(if dirs.len() == 1 { dirs.pop() } else { None })
    })
}

/// KVM names a VM's folder by the thread that made it, and by the number of its fd (kvm_create_vm_debugfs). A guest is
/// booted by a thread that ends with the boot.
fn is_vm_of(pid: u32, dir: &Path) -> bool {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let Some((thread, fd)) = name.split_once('-') else { return false };
    let is_vm =
        || fs::read_link(format!("/proc/{pid}/fd/{fd}")).is_ok_and(|link| link == Path::new("anon_inode:kvm-vm"));
    let is_gone = || !Path::new("/proc").join(thread).exists();
    Path::new(&format!("/proc/{pid}/task/{thread}")).exists() || is_gone() && is_vm()
}

/// TSC offset of each vCPU, as KVM has it.
pub fn tsc_offsets(vm: &Vm) -> Result<Vec<i64>> {
    let dir = kvm_dir(vm.vmm()?)?;
    (0..vm.cpus)
        .map(|cpu| {
            let file = dir.join(format!("vcpu{cpu}/tsc-offset"));
            let text = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
            text.trim().parse().with_context(|| format!("{}: {text:?}", file.display()))
        })
        .collect()
}

/// Compares the clocks now.
pub fn read(vm: &Vm) -> Result<Reading> {
    let offsets = tsc_offsets(vm)?;
    let offset = *offsets.first().context("no vCPU")?;
    let mut taken: Vec<(Sample, Sample, Sample)> = Vec::new();
    for _ in 0..READINGS {
        let before = sample(TRIES);
        let guest = vm.agent()?.clock()?;
        taken.push((before, guest, sample(TRIES)));
    }
    // The sharpest ones.
    taken.sort_by_key(|(before, guest, after)| before.window.max(guest.window).max(after.window));
    taken.truncate(READINGS.div_ceil(2));
    let all = |which| -> Result<Vec<i64>> {
        taken
            .iter()
            .map(|(before, guest, after)| {
                difference(which, before, guest, after, offset).with_context(|| {
                    format!(
                        "the guest's sample {guest:?} is not between {before:?} and {after:?} with TSC offset {offset}"
                    )
                })
            })
            .collect()
    };
    let window = taken.iter().map(|(b, g, a)| b.window.max(g.window).max(a.window)).max();
    Ok(Reading {
        raw_ns: median(&all(Which::Raw)?),
        real_ns: median(&all(Which::Real)?),
        offsets,
        window: window.unwrap_or(0),
    })
}

/// How far the guest's clock has moved against L1's since `first`, µs. A moved TSC offset is an error.
pub fn error_us(first: &Reading, now: &Reading) -> Result<f64> {
    if first.offsets != now.offsets {
        bail!("the TSC offsets changed: {:?} -> {:?}", first.offsets, now.offsets);
    }
    Ok((now.raw_ns - first.raw_ns) as f64 / 1000.0)
}
