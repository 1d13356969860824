//! Uncorrectable errors of the host's memory, made by L1's kernel in a page of the guest: the guest loses the process
//! that needs the page, and nothing else.

use std::{fs, io, os::fd::AsRawFd};

use anyhow::{Context, Result, ensure};

use crate::{
    harness::{proc, ram, vm::Vm, wait_for},
    native::{Counter, guest},
    proto::Request,
};

const PAGE: usize = 4096;

/// Marks the host's page behind the guest's page at `gpa` as one with an uncorrectable error (madvise(2),
/// MADV_HWPOISON). Its kernel does not use the page again, which with `--hardware` means until that machine is started
/// anew.
fn poison(pid: u32, gpa: u64) -> Result<()> {
    ensure!(gpa < ram::HOLE, "{gpa:#x} is not below the hole");
    let file = proc::open_fd_to(pid, "/memfd:guest-ram", std::fs::OpenOptions::new().read(true).write(true))?;
    // SAFETY: a new mapping, of one page, which is not read.
    let page = unsafe {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), PAGE, access, libc::MAP_SHARED, file.as_raw_fd(), gpa as i64)
    };
    ensure!(page != libc::MAP_FAILED, "mapping the page: {}", io::Error::last_os_error());
    // In a process of its own: whoever asks for it is killed first (madvise_inject_error: MF_ACTION_REQUIRED).
    // SAFETY: the child makes system calls only, and ends; the mapping is there for both.
    let child = unsafe {
        match libc::fork() {
            0 => match libc::madvise(page, PAGE, libc::MADV_HWPOISON) {
                0 => libc::_exit(0),
                _ => libc::_exit(*libc::__errno_location()),
            },
            child => child,
        }
    };
    let mut status = 0;
    // SAFETY: our child, and one int to fill; the mapping above, which nobody refers to any more.
    let ended = unsafe {
        let ended = libc::waitpid(child, &mut status, 0);
        libc::munmap(page, PAGE);
        ended
    };
    ensure!(child > 0 && ended == child, "a process that poisons: {}", io::Error::last_os_error());
    let done = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS || status == 0;
    let error = io::Error::from_raw_os_error(libc::WEXITSTATUS(status));
    ensure!(done, "MADV_HWPOISON: {error}: does L1's kernel handle memory failures?");
    Ok(())
}

fn told(vm: &Vm, gpa: u64) -> Result<usize> {
    let is_it = |event: &&serde_json::Value| {
        event["source"] == "vm" && event["event"] == "memory_error" && event["properties"]["gpa"] == gpa
    };
    Ok(vm.events()?.iter().filter(is_it).count())
}

/// Before an update, and after one: whoever is told of the first must not be all.
pub(super) fn pages() -> Result<()> {
    let mut vm = Vm::builder().cpus(2).boot()?;
    for turn in 0..2 {
        let gpa: u64 = vm.agent()?.call(&Request::PageHold)?;
        let touch = |vm: &Vm| vm.agent()?.call::<i32>(&Request::PageTouch);
        ensure!(touch(&vm)? == 0, "the page cannot be read before");
        poison(vm.vmm()?, gpa)?;
        let event = |vm: &Vm| wait_for("the event", || Ok((told(vm, gpa)? > 0).then_some(())));
        // Before anybody needs the page, the second time.
        if turn == 1 {
            event(&vm)?;
        }
        for _ in 0..2 {
            let signal = touch(&vm).context("a process needs the page")?;
            ensure!(signal == libc::SIGBUS, "turn {turn}: whoever needed the page got signal {signal}");
        }
        event(&vm)?;
        ensure!(told(&vm, gpa)? == 1, "turn {turn}: told {} times", told(&vm, gpa)?);
        let words = ["Machine check", "Hardware Error", "Memory failure"].map(str::to_owned).to_vec();
        let log: String = vm.agent()?.call(&Request::Dmesg { words })?;
        ensure!(log.contains("Memory failure"), "turn {turn}: the guest's kernel says: {log}");
        vm.update().with_context(|| format!("turn {turn}"))?;
        vm.agent()?.ping()?;
    }
    Ok(())
}

const BUS_MCEERR_AR: libc::c_int = 4;
const BUS_MCEERR_AO: libc::c_int = 5;
const MEMORY: u64 = 128 << 20;

/// Sends SIGBUS to a thread of the VMM as the kernel does for a page at `address`: what a tracer makes of a signal on
/// its way.
fn strike(pid: u32, tid: i32, code: libc::c_int, address: u64) -> Result<()> {
    let mut info = [0_u32; 32];
    // signo, errno, code, padding, address, its lowest valid bit (include/uapi/asm-generic/siginfo.h).
    info[0] = libc::SIGBUS as u32;
    info[2] = code as u32;
    (info[4], info[5], info[6]) = (address as u32, (address >> 32) as u32, 12);
    let none = std::ptr::null_mut::<libc::c_void>();
    let done = |result: i64, what: &str| -> Result<()> {
        ensure!(result >= 0, "{what} of thread {tid}: {}", io::Error::last_os_error());
        Ok(())
    };
    // SAFETY: a thread of our own child; the kernel reads one siginfo_t of 128 bytes, and fills one int.
    unsafe {
        done(libc::ptrace(libc::PTRACE_SEIZE, tid, none, none), "PTRACE_SEIZE")?;
        done(libc::syscall(libc::SYS_tgkill, pid, tid, libc::SIGBUS), "SIGBUS")?;
        loop {
            let mut status = 0;
            done(libc::waitpid(tid, &mut status, libc::__WALL).into(), "waitpid")?;
            ensure!(libc::WIFSTOPPED(status), "thread {tid} has ended: {status:#x}");
            if libc::WSTOPSIG(status) == libc::SIGBUS {
                break;
            }
            // A kick, say.
            let signal = libc::WSTOPSIG(status) as usize as *mut libc::c_void;
            done(libc::ptrace(libc::PTRACE_CONT, tid, none, signal), "PTRACE_CONT")?;
        }
        done(libc::ptrace(libc::PTRACE_SETSIGINFO, tid, none, info.as_ptr()), "PTRACE_SETSIGINFO")?;
        let signal = libc::SIGBUS as usize as *mut libc::c_void;
        done(libc::ptrace(libc::PTRACE_DETACH, tid, none, signal), "PTRACE_DETACH")
    }
}

/// Where the VMM has the page of its guest at `gpa`.
fn address_in(pid: u32, gpa: u64) -> Result<u64> {
    let maps = proc::maps(pid)?;
    let mut ram = maps.iter().filter(|(.., name)| name.starts_with("/memfd:guest-ram"));
    let (start, _, offset, _) = ram
        .find(|(start, end, offset, _)| (*offset..offset + end - start).contains(&gpa))
        .context("guest memory is not mapped")?;
    Ok(start + gpa - offset)
}

/// The same on any machine, without an error in its memory: only the signals come. This guest knows no machine checks;
/// so where it needs the page itself, it shuts down like a real machine, and boots again.
pub(super) fn signals() -> Result<()> {
    let kernel = std::env::temp_dir().join(format!("counts-{}", std::process::id()));
    guest::write(&kernel, MEMORY)?;
    let mut vm = Vm::bare(&kernel, 1, "size=128M", true)?;
    let goes_on = |vm: &Vm, what: &str| {
        let counter = Counter::of(vm.vmm()?)?;
        let before = counter.get();
        wait_for(&format!("the guest to go on after {what}"), || {
            Ok((counter.get() > before + guest::pages(MEMORY)).then_some(()))
        })
    };
    for turn in 0..2 {
        goes_on(&vm, "an update")?;
        let gpa = 0x300_0000 + turn * 0x1000;
        // Main is told of what nobody needs yet.
        let vmm = vm.vmm()?;
        strike(vmm, vmm as i32, BUS_MCEERR_AO, address_in(vmm, gpa)?)?;
        wait_for("the event", || Ok((told(&vm, gpa)? > 0).then_some(())))?;
        goes_on(&vm, "an error that is nobody's yet")?;
        vm.update()?;
        goes_on(&vm, "an update")?;
    }
    let (pid, gpa) = (vm.vmm()?, 0x400_0000);
    strike(pid, proc::thread_named(pid, "vcpu0")?, BUS_MCEERR_AR, address_in(pid, gpa)?)?;
    wait_for("the event", || Ok((told(&vm, gpa)? > 0).then_some(())))?;
    wait_for("the guest to boot again", || {
        Ok(vm.events()?.iter().any(|event| event["event"] == "rebooted").then_some(()))
    })?;
    ensure!(vm.is_running() && vm.vmm()? == pid, "the VMM is another one");
    goes_on(&vm, "its reset")?;
    vm.update()?;
    goes_on(&vm, "an update after that")?;
    fs::remove_file(&kernel)?;
    Ok(())
}
