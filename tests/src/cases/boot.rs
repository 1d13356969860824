//! A guest comes up, and goes down by its own will.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    cases::note,
    harness::{
        PATIENCE, clock,
        hooks::Hold,
        lab, proc, ram,
        report::{Report, update_body},
        vm::Vm,
        wait_for,
    },
    native::guest,
    proto::Request,
};

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
        proc::thread_named(vm.vmm()?, &format!("vcpu{cpu}"))?;
    }
    // Memory behind the hole is not only counted but there: it is written and read. Linux takes from it first, which is
    // checked.
    if mib > 4096 {
        const MIB: u64 = 100;
        let before = ram::touched_from(vm.vmm()?, ram::HOLE)?;
        vm.agent()?.call::<()>(&Request::MemoryStart { mib: MIB, seed: 1 })?;
        let stats: crate::proto::MemoryStats = vm.agent()?.call_within(&Request::MemoryStop, 3 * PATIENCE)?;
        ensure!(stats.pages_wrong == 0 && stats.pages_checked >= MIB * 256, "{stats:?}");
        let after = ram::touched_from(vm.vmm()?, ram::HOLE)?;
        ensure!(after >= before + (MIB << 20) / 2, "{before} -> {after} bytes behind the hole");
    }
    Ok(())
}

pub fn one_cpu_512m() -> Result<()> {
    boot(1, 512)
}

pub fn four_cpus_5g() -> Result<()> {
    boot(4, 5 << 10)
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

/// Many vCPUs: all come up, and all are carried over updates. In the lab they share one CPU of an emulator, where 64
/// take minutes.
pub fn many_cpus(cpus: u32, updates: u32) -> Result<()> {
    let started = Instant::now();
    let builder = Vm::builder().cpus(cpus).memory("size=1G").patience(3 * PATIENCE);
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

/// Ends the guest with `request`; the VMM, which was updated before, must end by itself with `code`, say `reason`, and
/// tell of it as Cloud Hypervisor does.
fn end_by(request: &Request, code: i32, reason: &str, event: &str) -> Result<()> {
    let mut vm = Vm::builder().boot()?;
    vm.update()?;
    vm.agent()?.call::<()>(request)?;
    let status = vm.wait_exit()?;
    ensure!(status.code() == Some(code), "exit code {code} expected: {status}");
    ensure!(vm.log_text().contains(reason), "the VMM does not say '{reason}': {}", vm.log_text());
    ends_with(&vm, &[event, "vm shutdown", "vm deleted", "vmm shutdown"])
}

/// The last that the event stream tells.
fn ends_with(vm: &Vm, story: &[&str]) -> Result<()> {
    let told = vm.story()?;
    ensure!(told.ends_with(&story.iter().map(|event| (*event).to_owned()).collect::<Vec<_>>()), "told: {told:?}");
    Ok(())
}

pub fn poweroff_from_guest() -> Result<()> {
    end_by(&Request::PowerOff { after_ms: 300 }, 0, "powered off", "vm powered_off")
}

pub fn reboot_from_guest() -> Result<()> {
    end_by(&Request::Reboot { after_ms: 300 }, 3, "reset", "vm reset")
}

/// A guest that resets itself is booted again in the same process, which goes on as before: it is updated, and its
/// guest resets itself again.
pub fn reset_in_place() -> Result<()> {
    let mut vm = Vm::builder().reboots().boot()?;
    ensure!(vm.story()? == ["vmm starting", "vm created", "vm booting", "vm booted"], "told: {:?}", vm.story()?);
    for round in 0..2 {
        vm.agent()?.call::<()>(&Request::Reboot { after_ms: 300 })?;
        vm.wait_event("vm rebooted", round + 1)?;
        ends_with(&vm, &["vm reset", "vm rebooting", "vm rebooted"])?;
        vm.reconnect()?;
        ensure!(vm.ping()?.pid == vm.pid() && vm.state()? == "Running", "{}", vm.info()?);
        vm.update()?;
    }
    Ok(())
}

/// Where hand-made guests count what they do, and wait for a word, see [`guest::flood`].
const COUNT: u64 = 0x5_1000;
const GO: u64 = COUNT + 8;

fn ram(vm: &Vm) -> Result<File> {
    proc::open_fd_to(vm.vmm()?, "/memfd:guest-ram", File::options().read(true).write(true))
}

/// Four vCPUs that write to the reset port without end, while nobody has time for them: each writes once, and waits.
/// Then the update that they have met says so, and the guest is booted again; what waits can be paused and ended like
/// any other.
pub fn flood_of_resets() -> Result<()> {
    let kernel = std::env::temp_dir().join("floods");
    guest::write_image(&kernel, &guest::flood())?;
    let args = ["--kernel", &kernel.display().to_string(), "--cpus", "boot=4", "--memory", "size=128M", "-v"];
    let mut vm = Vm::with_args(&args)?;
    vm.wait_event("vm booted", 1)?;
    let count = |ram: &File| -> Result<u32> {
        let mut bytes = [0; 4];
        ram.read_exact_at(&mut bytes, COUNT)?;
        Ok(u32::from_le_bytes(bytes))
    };
    let mut hold = Hold::arm(&vm.dir, "prepare")?;
    let mut caller = vm.api.connect()?;
    caller.send("PUT", "vm.update", &update_body(&vm.other_build()?))?;
    hold.wait_held()?;
    let old = ram(&vm)?;
    old.write_all_at(&[1], GO)?;
    wait_for("all vCPUs to ask", || Ok((count(&old)? >= 4).then_some(())))?;
    for _ in 0..50 {
        std::thread::sleep(Duration::from_millis(10));
        ensure!(count(&old)? == 4, "4 vCPUs have written {} times", count(&old)?);
    }
    ensure!(vm.log_text().matches("the guest asks").count() == 1, "asked more than once: {}", vm.log_text());
    hold.release()?;
    let report: Report = caller.receive()?.json()?;
    let reasons = report.reasons.join(" ");
    ensure!(report.outcome == "rolled_back" && reasons.contains("power-off or reset"), "{report:?}");
    drop(hold);
    vm.wait_event("vm rebooted", 1)?;
    vm.update()?;
    // Once more, into a VM that is paused: it is as it was, and starts when it is let go.
    vm.api.order("vm.pause")?;
    let new = ram(&vm)?;
    ensure!(count(&new)? == 0, "the memory of the guest before");
    vm.api.order("vm.resume")?;
    new.write_all_at(&[1], GO)?;
    vm.wait_event("vm rebooted", 2)?;
    ensure!(count(&new)? <= 4, "4 vCPUs have written {} times", count(&new)?);
    std::fs::remove_file(&kernel)?;
    // Its next boot finds no kernel: no VMM hangs with a guest that cannot come up.
    ram(&vm)?.write_all_at(&[1], GO)?;
    let status = vm.wait_exit()?;
    ensure!(status.code() == Some(4), "exit code 4 expected: {status}");
    let events = vm.events()?;
    let failed = events.iter().find(|event| event["event"] == "failed").context("no event 'failed'")?;
    let reason = failed["properties"]["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains(&kernel.display().to_string()), "{failed}");
    ends_with(&vm, &["vm failed", "vm shutdown", "vm deleted", "vmm shutdown"])
}

/// A guest that only ever takes a triple fault is booted again and again, but does nothing else to its host, and its
/// VMM serves.
pub fn triple_fault_loop() -> Result<()> {
    let kernel = std::env::temp_dir().join("faults");
    // ud2, and no IDT.
    guest::write_image(&kernel, &[0x0F, 0x0B])?;
    let mut vm = Vm::with_args(&["--kernel", &kernel.display().to_string(), "--memory", "size=128M"])?;
    let started = Instant::now();
    vm.wait_event("vm rebooted", 12)?;
    let told = vm.story()?.iter().filter(|event| *event == "vm rebooted").count() as u64;
    ensure!(told <= 11 + started.elapsed().as_secs(), "{told} boots in {:?}", started.elapsed());
    vm.api.order("vm.shutdown")?;
    ensure!(vm.state()? == "Shutdown", "{}", vm.info()?);
    vm.api.order("vm.boot")?;
    vm.wait_event("vm rebooted", told as usize + 1)?;
    vm.signal(libc::SIGTERM)?;
    let status = vm.wait_exit()?;
    std::fs::remove_file(&kernel)?;
    ensure!(status.code() == Some(0), "{status}");
    Ok(())
}

/// A guest that runs into an address where there is nothing: KVM gives up on it, which is not the guest's wish.
pub fn guest_that_cannot_go_on() -> Result<()> {
    let kernel = std::env::temp_dir().join("runs-astray");
    // mov ecx, 0x8000000; dec ecx; jnz -4; mov eax, 0xd0000000; jmp rax: not before the API's socket was found.
    let code = [0xB9, 0, 0, 0, 8, 0xFF, 0xC9, 0x75, 0xFC, 0xB8, 0, 0, 0, 0xD0, 0xFF, 0xE0];
    guest::write_image(&kernel, &code)?;
    let mut vm = Vm::with_args(&["--kernel", &kernel.display().to_string(), "--memory", "size=128M"])?;
    let status = vm.wait_exit()?;
    std::fs::remove_file(&kernel)?;
    ensure!(status.code() == Some(4), "exit code 4 expected: {status}");
    ends_with(&vm, &["vm failed", "vm shutdown", "vm deleted", "vmm shutdown"])?;
    let events = vm.events()?;
    let failed = events.iter().rev().nth(3).context("no event")?;
    let reason = failed["properties"]["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("KVM_EXIT_INTERNAL_ERROR"), "{failed}");
    Ok(())
}

/// An operator's NMI is no bus's: the guest's kernel does not know what it is for, and does then what it is told to,
/// which may be a panic.
pub fn nmi_from_outside() -> Result<()> {
    let mut vm = Vm::builder().boot()?;
    let words: Vec<String> = ["NMI received", "NMI:", "SERR", "IOCK"].map(Into::into).to_vec();
    vm.api.order("vm.nmi")?;
    let told = wait_for("the guest to tell of the NMI", || {
        let told: String = vm.agent()?.call(&Request::Dmesg { words: words.clone() })?;
        Ok((!told.is_empty()).then_some(told))
    })?;
    note(format_args!("{}", told.trim_end()));
    ensure!(told.contains("unknown reason") && !told.contains("SERR") && !told.contains("IOCK"), "{told}");
    vm.update()?;
    vm.agent()?.call::<()>(&Request::Sysctl { name: "kernel/unknown_nmi_panic".into(), value: "1".into() })?;
    vm.api.order("vm.nmi")?;
    wait_for("the guest to panic, and so to reset", || {
        Ok(vm.events()?.iter().any(|event| event["event"] == "reset").then_some(()))
    })
}

pub fn power_button() -> Result<()> {
    let mut vm = Vm::builder().boot()?;
    for round in ["before an update", "after it"] {
        vm.agent()?.call::<()>(&Request::PowerButtonOpen)?;
        vm.api.order("vm.power-button")?;
        vm.agent()?.call::<()>(&Request::PowerButtonWait).context(round)?;
        if round.starts_with("before") {
            vm.update()?;
        }
    }
    Ok(())
}
