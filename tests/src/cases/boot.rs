//! A guest comes up, and goes down by its own will.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::{
    cases::note,
    harness::{clock, lab, proc, ram, vm::Vm},
    proto::Request,
};

/// Time for a guest to end and the VMM after it.
const DOWN: Duration = Duration::from_secs(60);

/// What a kernel takes from small memory before it counts: its image, its page structures, the initramfs.
const TAKEN_MIB: u64 = 130;

fn boot(cpus: u32, mib: u64) -> Result<()> {
    check(&Vm::builder().cpus(cpus).memory(&format!("size={mib}M")).boot()?, cpus, mib)
}

fn check(vm: &Vm, cpus: u32, mib: u64) -> Result<()> {
    let machine = vm.agent()?.machine()?;
    ensure!(machine.cpus_online == cpus as usize, "{machine:?}");
    let seen = machine.memory_kib / 1024;
    // 1/40 of large memory are page structures.
    ensure!(seen < mib && seen + TAKEN_MIB.min(mib / 2) + mib / 40 > mib, "{machine:?} of {mib} MiB");
    ensure!(vm.state()? == "Running", "{}", vm.info()?);
    ensure!(vm.info()?["memory_actual_size"] == mib << 20, "{}", vm.info()?);
    vm.agent()?.no_complaints()?;
    // The kernel has its time of day from the CMOS clock, which counts seconds.
    let off = clock::read(vm)?.real_ns;
    ensure!(off.abs() < 5_000_000_000, "the guest's time of day is off by {off} ns");
    for cpu in 0..cpus {
        proc::thread_named(vm.pid(), &format!("vcpu{cpu}"))?;
    }
    // Memory behind the hole is not only counted but there: it is written and read. Linux takes from it first, which is checked.
    if mib > 4096 {
        const MIB: u64 = 600;
        let before = ram::touched_from(vm.pid(), ram::HOLE)?;
        vm.agent()?.call_within::<()>(&Request::MemoryStart { mib: MIB, seed: 1 }, DOWN)?;
        let stats: crate::proto::MemoryStats =
            vm.agent()?.call_within(&Request::MemoryStop, Duration::from_secs(400))?;
        ensure!(stats.pages_wrong == 0 && stats.pages_checked >= MIB * 256, "{stats:?}");
        let after = ram::touched_from(vm.pid(), ram::HOLE)?;
        ensure!(after >= before + (MIB << 20) / 2, "{before} -> {after} bytes behind the hole");
    }
    Ok(())
}

pub fn one_cpu_512m() -> Result<()> {
    boot(1, 512)
}

pub fn four_cpus_6g() -> Result<()> {
    boot(4, 6 << 10)
}

/// The smallest memory, and the kernel as an ELF file with a PVH note.
pub fn pvh_128m() -> Result<()> {
    let mut vm = Vm::builder().kernel(lab::pvh_kernel()?).memory("size=128M").boot()?;
    check(&vm, 1, 128)?;
    vm.update()?;
    vm.agent()?.ping()
}

pub fn sixteen_cpus() -> Result<()> {
    many_cpus(16, 1)
}

/// Many vCPUs: all come up, and all are carried over updates. In the lab they share one CPU of an emulator, where 64 take minutes.
pub fn many_cpus(cpus: u32, updates: u32) -> Result<()> {
    let started = Instant::now();
    let builder = Vm::builder().cpus(cpus).memory("size=1G").patience(Duration::from_secs(600));
    let mut vm = builder.boot()?;
    check(&vm, cpus, 1 << 10)?;
    note(format_args!("{cpus} vCPUs are up after {:.1?}", started.elapsed()));
    for _ in 0..updates {
        let report = vm.update()?;
        let machine = vm.agent()?.machine()?;
        ensure!(machine.cpus_online == cpus as usize, "{machine:?}");
        note(format_args!("pause {} us", report.pause_us));
    }
    Ok(())
}

/// Ends the guest with `request`; the VMM must end by itself with `code` and say `reason`.
fn end_by(request: &Request, code: i32, reason: &str) -> Result<()> {
    let mut vm = Vm::builder().boot()?;
    vm.agent()?.call::<()>(request)?;
    let status = vm.wait_exit(DOWN)?;
    ensure!(status.code() == Some(code), "exit code {code} expected: {status}");
    ensure!(vm.log_text().contains(reason), "the VMM does not say '{reason}': {}", vm.log_text());
    Ok(())
}

pub fn poweroff_from_guest() -> Result<()> {
    end_by(&Request::PowerOff { after_ms: 300 }, 0, "powered off")
}

pub fn reboot_from_guest() -> Result<()> {
    end_by(&Request::Reboot { after_ms: 300 }, 3, "reset")
}

/// A guest that runs into an address where there is nothing: KVM gives up on it, which is not the guest's wish.
pub fn guest_that_cannot_go_on() -> Result<()> {
    let kernel = std::env::temp_dir().join("runs-astray");
    // mov ecx, 0x8000000; dec ecx; jnz -4; mov eax, 0xd0000000; jmp rax: not before the API's socket was found.
    let code = [0xB9, 0, 0, 0, 8, 0xFF, 0xC9, 0x75, 0xFC, 0xB8, 0, 0, 0, 0xD0, 0xFF, 0xE0];
    crate::native::guest::write_image(&kernel, &code)?;
    let mut vm = Vm::with_args(&["--kernel", &kernel.display().to_string(), "--memory", "size=128M"])?;
    let status = vm.wait_exit(DOWN)?;
    std::fs::remove_file(&kernel)?;
    ensure!(status.code() == Some(4), "exit code 4 expected: {status}");
    let last = vm.events()?.pop().unwrap_or_default();
    let reason = last["properties"]["reason"].as_str().unwrap_or_default();
    ensure!(last["event"] == "failed" && reason.contains("KVM_EXIT_INTERNAL_ERROR"), "the last event is {last}");
    Ok(())
}

pub fn power_button() -> Result<()> {
    let mut vm = Vm::builder().boot()?;
    for round in ["before an update", "after it"] {
        let pressed = vm.agent()?.start::<()>(&Request::PowerButtonWait { timeout_ms: 20_000 })?;
        // The agent must have the device open: this answer comes after that.
        vm.agent()?.ping()?;
        std::thread::sleep(Duration::from_millis(500));
        vm.api.order("vm.power-button")?;
        pressed.wait(Duration::from_secs(30)).map_err(|e| e.context(round))?;
        if round.starts_with("before") {
            vm.update()?;
        }
    }
    Ok(())
}
