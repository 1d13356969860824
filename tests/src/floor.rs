//! What no update in place can do without: an exec, a new VM, its memslot, interrupt controllers and vCPUs. Measured
//! right beside the pauses, which can so be compared between machines of different speed.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Kvm;

use crate::clock::mono_ns;
use crate::harness::table::percentile;

const RUNS: usize = 20;
const RAM: u64 = 512 << 20;

/// The median, us, with `cpus` vCPUs and 512 MiB.
pub fn median(cpus: u32) -> Result<u64> {
    let one = || -> Result<u64> {
        let mut command = Command::new("/proc/self/exe");
        let output = command.args(["floor", &cpus.to_string()]).stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "l1-tests floor ended with {}", output.status);
        Ok(String::from_utf8(output.stdout)?.trim().parse()?)
    };
    let runs = (0..RUNS).map(|_| one()).collect::<Result<Vec<_>>>().context("the floor of the pause")?;
    Ok(percentile(&runs, 50))
}

/// `l1-tests floor CPUS`: notes the time and becomes `l1-tests floor CPUS SINCE`, which makes the VM and prints how
/// long both took, us.
pub fn run(args: &[String]) -> Result<()> {
    let cpus = args.first().context("how many vCPUs?")?;
    let Some(since) = args.get(1) else {
        let mut again = Command::new("/proc/self/exe");
        bail!("exec: {}", again.args(["floor", cpus, &mono_ns().to_string()]).exec());
    };
    let (cpus, since): (u64, u64) = (cpus.parse()?, since.parse()?);
    let vm = Kvm::new()?.create_vm()?;
    // SAFETY: a new mapping, which stays to the end of the process.
    let hva = unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), RAM as usize, prot, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0)
    };
    ensure!(hva != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    let slot = kvm_userspace_memory_region { memory_size: RAM, userspace_addr: hva as u64, ..Default::default() };
    // SAFETY: mapped to the end of the process, and nothing but the guest's.
    unsafe { vm.set_user_memory_region(slot) }?;
    // Not before the memslot, which would wait for what this registers.
    vm.create_irq_chip()?;
    let vcpus = (0..cpus).map(|index| vm.create_vcpu(index)).collect::<Result<Vec<_>, _>>()?;
    println!("{}", mono_ns().saturating_sub(since) / 1000);
    drop(vcpus);
    Ok(())
}
