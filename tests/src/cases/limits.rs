//! Limits of the process and what they send: they refuse, or cost what exceeds them, but never the guest.

use std::{fs, os::unix::fs::MetadataExt, path::PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    harness::{
        proc,
        vm::{Setting, Vm},
        wait_for,
    },
    native::{Counter, HugePages, guest},
};

const MEMORY: u64 = 128 << 20;
const MEMORY_OPTION: &str = "size=128M";

/// A guest that writes one byte to its serial port for ever.
const TALKS: [u8; 9] = [
    0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3f8
    0xB0, b'x', // mov al, 'x'
    0xEE, // 1: out dx, al
    0xEB, 0xFD, // jmp 1b
];

fn file(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("{name}-{}", std::process::id()))
}

/// RLIMIT_FSIZE: a guest whose RAM exceeds it is refused; a serial file that reaches it loses what comes then, and that
/// is counted; an update is refused as long as its saved state could exceed it, and done once the limit is gone.
pub(super) fn refuse_or_drop() -> Result<()> {
    let kernel = file("talks");
    guest::write_image(&kernel, &TALKS)?;
    let kernel_option = kernel.display().to_string();
    let args = ["--kernel", &kernel_option, "--memory", MEMORY_OPTION].map(str::to_owned);
    let setting = Setting { limit: Some((libc::RLIMIT_FSIZE, 64 << 20)), ..Setting::default() };
    let refused = match Vm::spawn("theseus-a", &args, &setting) {
        Ok(mut vm) => {
            let status = vm.wait_exit()?;
            format!("{status}: {}", vm.log_text())
        }
        Err(error) => format!("{error:#}"),
    };
    for part in ["exit status: 1", "RLIMIT_FSIZE is 64 MiB", "ulimit -f unlimited", "LimitFSIZE=infinity"] {
        ensure!(refused.contains(part), "'{part}' is not in: {refused}");
    }

    let output = file("serial");
    let serial = format!("file={}", output.display());
    let mut vm = Vm::with_args(&["--kernel", &kernel_option, "--memory", MEMORY_OPTION, "--serial", &serial])?;
    let len = || fs::metadata(&output).map(|meta| meta.size()).unwrap_or(0);
    wait_for("the guest to talk", || Ok((len() > 0).then_some(())))?;
    let max = len() + (64 << 10);
    let limit = |vm: &Vm, max| -> Result<()> {
        // Of the keeper, whose limits count for an update, and of the VMM, which is the one that writes now.
        for pid in [vm.pid(), vm.vmm()?] {
            proc::set_soft_limit(pid, libc::RLIMIT_FSIZE, max)?;
        }
        Ok(())
    };
    limit(&vm, max)?;
    wait_for("output to be dropped", || Ok((vm.counter("/serial/dropped_bytes")? > 0).then_some(())))?;
    ensure!(len() == max, "{} bytes were written, {max} were allowed", len());
    let refused = vm.ask_update(&vm.other_build()?)?;
    ensure!(refused.status == 409 && refused.body.contains("RLIMIT_FSIZE is "), "{refused:?}");
    ensure!(vm.is_running(), "it has ended");
    limit(&vm, libc::RLIM_INFINITY)?;
    vm.update().context("without the limit")?;
    wait_for("the guest to talk on", || Ok((len() > max).then_some(())))?;
    drop(vm);
    fs::remove_file(&output)?;
    fs::remove_file(&kernel)?;
    Ok(())
}

/// A guest that writes all of its memory.
fn counting() -> Result<Vm> {
    let kernel = file("counts");
    guest::write(&kernel, MEMORY)?;
    let vm = Vm::bare(&kernel, 1, MEMORY_OPTION, true)?;
    fs::remove_file(&kernel)?;
    goes_on(&vm, "its start")?;
    Ok(vm)
}

fn goes_on(vm: &Vm, what: &str) -> Result<()> {
    let counter = Counter::of(vm.vmm()?)?;
    let before = counter.get();
    wait_for(&format!("the guest to go on after {what}"), || {
        Ok((counter.get() > before + guest::pages(MEMORY)).then_some(()))
    })
}

/// The signals that a limit, a peer or a terminal may send end nothing and stop nothing, before and after an update.
pub(super) fn signal_nothing() -> Result<()> {
    let mut vm = counting()?;
    for turn in 0..2 {
        for signal in [libc::SIGXFSZ, libc::SIGXCPU, libc::SIGPIPE, libc::SIGTTIN, libc::SIGTTOU] {
            for pid in [vm.pid(), vm.vmm()?] {
                proc::signal(pid, signal)?;
                goes_on(&vm, &format!("signal {signal} to {pid} in turn {turn}"))?;
                ensure!(vm.is_running() && proc::state(pid)? != 'T', "signal {signal} to {pid} in turn {turn}");
            }
        }
        vm.update()?;
        vm.settled_facts()?;
    }
    Ok(())
}

/// vCPUs stop at once where this user's other processes have used up what may be queued of signals (RLIMIT_SIGPENDING).
pub(super) fn no_signal_queued() -> Result<()> {
    let mut vm = counting()?;
    proc::set_soft_limit(vm.vmm()?, libc::RLIMIT_SIGPENDING, 0)?;
    proc::set_soft_limit(vm.pid(), libc::RLIMIT_SIGPENDING, 0)?;
    for endpoint in ["vm.pause", "vm.resume"] {
        let answer = vm.api.put(endpoint, "")?;
        ensure!(answer.ok(), "{endpoint}: {answer:?}");
    }
    vm.update()?;
    goes_on(&vm, "an update")
}

/// Huge pages are the guest's from its boot on, or it is refused: with one less than it needs, and while another guest
/// has them. An update needs no others.
pub(super) fn huge_pages() -> Result<()> {
    const PAGES: u64 = MEMORY >> 21;
    let kernel = file("counts");
    guest::write(&kernel, MEMORY)?;
    let kernel_option = kernel.display().to_string();
    let boot = || Vm::with_args(&["--kernel", &kernel_option, "--memory", "size=128M,hugepages=on"])?.booted();
    let refused = |what: &str, has: &str| {
        let Err(error) = boot() else { bail!("{what}: started all the same") };
        let error = format!("{error:#}");
        for part in ["guest RAM: 64 huge pages of 2048 KiB", has, "nr_hugepages"] {
            ensure!(error.contains(part), "{what}: '{part}' is not in: {error}");
        }
        Ok(())
    };
    let pool = HugePages::reserve(PAGES - 1)?;
    // Many times: threads start and end beside the mapping that fails, and none of them may lose its stack to it.
    for _ in 0..50 {
        refused("one page too few", "of which 63 are")?;
    }
    drop(pool);
    let _pool = HugePages::reserve(PAGES)?;
    let mut vm = boot()?;
    refused("another guest has them", "of which 0 are")?;
    goes_on(&vm, "its start")?;
    for _ in 0..2 {
        vm.update()?;
        goes_on(&vm, "an update")?;
    }
    drop(vm);
    boot()?;
    fs::remove_file(&kernel)?;
    Ok(())
}
