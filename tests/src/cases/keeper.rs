//! The keeper: what is done to it is done to its VMM, but in an update that its death may be part of.

use std::{fs, os::unix::process::ExitStatusExt, time::Instant};

use anyhow::{Context, Result, ensure};

use crate::{
    cases::note,
    harness::{
        hooks::Hold,
        lab::Nic,
        proc,
        report::Report,
        rig::Rig,
        vm::{Setting, Vm},
        wait_for,
    },
    native::guest,
    proto::{MemoryStats, Request},
};

fn is_gone(pid: u32) -> bool {
    proc::state(pid).map_or(true, |state| state == 'Z')
}

/// `kill -9` of the PID that everybody knows ends the guest, and its device is free: for another VMM at once, after an
/// update too. So it is with the VMM stopped.
pub(super) fn killed() -> Result<()> {
    for stopped in [false, true] {
        let mut vm = Vm::builder().confined().device(Nic::IgbA, None)?.boot()?;
        vm.update()?;
        vm.settled_facts()?;
        let vmm = vm.vmm()?;
        if stopped {
            proc::signal(vmm, libc::SIGSTOP)?;
        }
        let killed = Instant::now();
        vm.signal(libc::SIGKILL)?;
        ensure!(vm.wait_exit()?.signal() == Some(libc::SIGKILL), "not by that");
        proc::wait_group_free(&Nic::IgbA.bdf()?)?;
        note(format_args!("stopped {stopped}: the device was free {:?} after the kill", killed.elapsed()));
        wait_for("the VMM to end", || Ok(is_gone(vmm).then_some(())))?;
    }
    Rig::boot(Vm::builder().cpus(2), &[(Nic::IgbA, None)])?.update_under_traffic()
}

/// Signals to either process; the exit code of a VMM that ends by itself, and the signal of one that is killed, are the
/// keeper's.
pub(super) fn signals() -> Result<()> {
    for (to_vmm, signal, code, death) in [
        (false, libc::SIGTERM, Some(0), None),
        (true, libc::SIGTERM, Some(0), None),
        (false, libc::SIGHUP, Some(0), None),
        (false, libc::SIGUSR2, None, Some(libc::SIGUSR2)),
        (true, libc::SIGKILL, None, Some(libc::SIGKILL)),
        (true, libc::SIGABRT, None, Some(libc::SIGABRT)),
    ] {
        let mut vm = Vm::api_only()?;
        vm.update()?;
        vm.settled_facts()?;
        let pid = if to_vmm { vm.vmm()? } else { vm.pid() };
        proc::signal(pid, signal)?;
        let status = vm.wait_exit()?;
        ensure!(
            (status.code(), status.signal()) == (code, death),
            "signal {signal} to the {}: {status}",
            if to_vmm { "VMM" } else { "keeper" }
        );
    }
    // A keeper that is stopped alone stops nobody else.
    let mut vm = Vm::builder().boot()?;
    proc::signal(vm.pid(), libc::SIGSTOP)?;
    wait_for("the keeper to stop", || Ok((proc::state(vm.pid())? == 'T').then_some(())))?;
    vm.agent()?.ping()?;
    proc::signal(vm.pid(), libc::SIGCONT)?;
    vm.update()?;
    vm.agent()?.ping()
}

/// What a thread earns by a fault, and abort(3).
const FATAL: [libc::c_int; 7] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGSYS, libc::SIGTRAP, libc::SIGABRT];

/// KVM's own, in the process of each VM (arch/x86/kvm/mmu/mmu.c, kvm_mmu_post_init_vm): it runs no code of ours.
const KERNEL_THREAD: &str = "kvm-nx-lpage-re";

/// What the main thread leaves to others: the signals that end a VMM, which are read from a descriptor, and SIGCONT,
/// which `keeper-watch` waits for.
const ELSEWHERE: [libc::c_int; 5] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGCONT];

fn bits(signals: &[libc::c_int]) -> u64 {
    signals.iter().fold(0, |mask, signal| mask | 1 << (signal - 1))
}

/// What nobody can block, and what the C library has for itself.
const NOT_OURS: [libc::c_int; 5] = [libc::SIGKILL, libc::SIGSTOP, 32, 33, 34];

/// What a thread of this name has to have blocked, but for [`NOT_OURS`]. None: a VMM has no such thread.
fn mask(name: &str) -> Option<u64> {
    let takes: &[libc::c_int] = match name {
        "theseus-vmm" => return Some(bits(&ELSEWHERE)),
        "api" | "boot" | "control" | "log" | "populate" | "spawner" | "update" | "vcpu-spawner" => &[],
        // Blocked but for the time of a wait for it (kernel/signal.c, do_sigtimedwait).
        "keeper-watch" => &[libc::SIGCONT],
        vcpu => {
            vcpu.strip_prefix("vcpu")?.parse::<u32>().ok()?;
            &[libc::SIGUSR1]
        }
    };
    Some(!bits(&NOT_OURS) & !bits(&FATAL) & !bits(takes))
}

/// The threads of a VMM that have other signals blocked than they are to have. One that is being started has its
/// parent's name, and all blocked, for a moment.
fn wrong_masks(pid: u32) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    for (tid, name) in proc::threads(pid)?.into_iter().filter(|(_, name)| name != KERNEL_THREAD) {
        let (blocked, wanted) = (proc::blocked(pid, tid)? & !bits(&NOT_OURS), mask(&name));
        if wanted != Some(blocked) {
            wrong.push(format!("{name}: {blocked:#x}, not {wanted:#x?}"));
        }
    }
    Ok(wrong)
}

/// Of a VMM that was started with all signals blocked each thread has those blocked that are not its own, and none that
/// is fatal, before, during and after an update; its keeper of these only ABRT, which is meant for the guest.
pub(super) fn fatal_signals() -> Result<()> {
    let kernel = std::env::temp_dir().join(format!("fatal-{}", std::process::id()));
    guest::write(&kernel, 128 << 20)?;
    let args = ["--kernel", &kernel.display().to_string(), "--cpus", "boot=2", "--memory", "size=128M"];
    let setting = Setting { blocks_signals: true, ..Setting::default() };
    let mut vm = Vm::spawn("theseus-a", &args.map(str::to_owned), &setting)?.booted()?;
    fs::remove_file(&kernel)?;
    let free = |pid: u32| {
        let mut left = Vec::new();
        wait_for("each thread to have its mask", || {
            left = wrong_masks(pid)?;
            Ok(left.is_empty().then_some(()))
        })
        .with_context(|| left.join("; "))
    };
    let kept = |vm: &Vm| -> Result<()> {
        let blocked = proc::blocked(vm.pid(), vm.pid() as i32)? & bits(&FATAL);
        ensure!(blocked == bits(&[libc::SIGABRT]), "the keeper has blocked {blocked:#x} of what is fatal");
        Ok(())
    };
    for _ in 0..2 {
        free(vm.vmm()?)?;
        kept(&vm)?;
        let mut hold = Hold::arm(&vm.dir, "save")?;
        let mut caller = vm.api.connect()?;
        let body = serde_json::json!({ "binary": vm.other_build()?, "deadline_ms": 120_000 });
        caller.send("PUT", "vm.update", &body.to_string())?;
        hold.wait_held()?;
        let vmms = proc::children(vm.pid())?;
        ensure!(vmms.len() == 2, "{vmms:?}");
        vmms.into_iter().try_for_each(free)?;
        kept(&vm)?;
        hold.release()?;
        let report: Report = caller.receive()?.json()?;
        drop(hold);
        ensure!(report.outcome == "updated", "{report:?}");
        vm.note_update();
        vm.settled_facts()?;
    }
    free(vm.vmm()?)
}

/// The keeper is killed between its exec and the commit: the old VMM has the guest, loses nothing of it, says where it
/// is to be found now, and ends as it is told.
pub(super) fn killed_in_update() -> Result<()> {
    for phase in ["prewarm", "remap"] {
        let mut rig = Rig::boot(Vm::builder().cpus(2).confined(), &[(Nic::IgbA, None)])?;
        rig.agent()?.call::<()>(&Request::MemoryStart { mib: 16, seed: 9 })?;
        rig.vm.update()?;
        rig.vm.settled_facts()?;
        let old = rig.vm.vmm()?;
        let traffic = rig.traffic()?;
        traffic.moves_on(rig.agent()?, 25)?;
        let mut hold = Hold::arm(&rig.vm.dir, phase)?;
        let mut caller = rig.vm.api.connect()?;
        let body = serde_json::json!({ "binary": rig.vm.other_build()?, "deadline_ms": 120_000 });
        caller.send("PUT", "vm.update", &body.to_string())?;
        hold.wait_held()?;
        proc::signal(rig.vm.pid(), libc::SIGKILL)?;
        let answer = caller.receive()?;
        drop(hold);
        let report: Report = answer.json().with_context(|| format!("{answer:?}"))?;
        ensure!(report.outcome == "rolled_back" && report.pid == old, "{phase}: old VMM {old}: {report:?}");
        rig.vm.follow(report.pid)?;
        ensure!(rig.vm.ping()?.pid == old, "{:?}", rig.vm.ping()?);
        traffic.moves_on(rig.agent()?, 25)?;
        traffic.finish_clean(rig.agent()?)?;
        let memory: MemoryStats = rig.agent()?.call(&Request::MemoryStop)?;
        ensure!(memory.pages_wrong == 0, "{memory:?}");
        note(format_args!("{phase}: rolled back, PID {old} now: {}", report.reasons.join("; ")));
        // Without a keeper there is no other update, and no harm in asking for one.
        let refused = rig.vm.ask_update(&rig.vm.other_build()?)?;
        ensure!(refused.status == 409 && refused.causes()?.join(" ").contains("keeper"), "{refused:?}");
        rig.agent()?.ping()?;
        rig.vm.signal(libc::SIGTERM)?;
        ensure!(rig.vm.wait_exit()?.code() == Some(0), "not orderly");
    }
    Ok(())
}

/// What is set on the PID before a guest is booted counts for its vCPUs; `cpus.affinity` wins over it.
pub(super) fn settings() -> Result<()> {
    let mut vm = Vm::api_only()?;
    proc::set_soft_limit(vm.pid(), libc::RLIMIT_CORE, 4096)?;
    let nice = 7;
    // SAFETY: a plain call on our own child.
    ensure!(unsafe { libc::setpriority(libc::PRIO_PROCESS, vm.pid(), nice) } == 0, "setpriority");
    let kernel = std::env::temp_dir().join(format!("settings-{}", std::process::id()));
    guest::write(&kernel, 128 << 20)?;
    let config = serde_json::json!({
        "cpus": { "boot_vcpus": 2, "affinity": [{ "vcpu": 1, "host_cpus": [0] }] },
        "memory": { "size": 128 << 20 },
        "payload": { "kernel": kernel },
    });
    let created = vm.api.put("vm.create", &config.to_string())?;
    ensure!(created.status == 204, "{created:?}");
    vm.api.order("vm.boot")?;
    for update in 0..2 {
        let threads = vm.info()?["vcpu_threads"].as_array().context("no vcpu_threads")?.clone();
        ensure!(threads.len() == 2, "{threads:?}");
        for (index, tid) in threads.iter().enumerate() {
            let tid = tid.as_i64().context("no number")? as i32;
            ensure!(tid == proc::thread_named(vm.vmm()?, &format!("vcpu{index}"))?, "vCPU {index} is not thread {tid}");
            // SAFETY: a plain call.
            let now = unsafe { libc::getpriority(libc::PRIO_PROCESS, tid as u32) };
            ensure!(now == nice, "vCPU {index} has nice value {now} after {update} updates");
        }
        let limits = fs::read_to_string(format!("/proc/{}/limits", vm.vmm()?))?;
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).context("no limit")?;
        ensure!(core.contains(" 4096 "), "{core}");
        let status = fs::read_to_string(format!("/proc/{}/task/{}/status", vm.vmm()?, threads[1]))?;
        ensure!(status.lines().any(|line| line.split_whitespace().eq(["Cpus_allowed_list:", "0"])), "{status}");
        vm.update()?;
    }
    fs::remove_file(&kernel)?;
    Ok(())
}
