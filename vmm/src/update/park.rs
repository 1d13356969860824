//! The parked helper: a process that shares the address space exec leaves behind, so that tearing it down (which grows with guest RAM)
//! is not part of the guest's pause.
//!
//! It shares main's thread-local storage and, after exec, an allocator whose locks may be held by threads that no longer exist: so it
//! makes raw system calls only, from a stack of its own, and touches nothing else. All signals are blocked.
//!
//! ```text
//!   park -> waits for the release eventfd, or the death of the image
//!        -> close_range (a held VFIO group would stay busy until the end of the tear-down) -> SCHED_IDLE -> exit
//! ```

use std::os::fd::{AsRawFd, RawFd};

use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::{Pid, PidfdFlags};

const STACK: usize = 64 << 10;

/// What the helper is told; lives on its stack.
#[repr(C)]
struct Orders {
    release: i32,
    image: i32,
}

/// Starts the helper. To be called on the main thread right before exec, with all signals blocked. Returns its PID.
///
/// `release`: an eventfd whose first count lets it go. If the exec then fails, write to it and reap the PID.
pub fn park(release: RawFd) -> std::io::Result<libc::pid_t> {
    // The helper has its own copy of the fd table: ours closes with this function.
    let image = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    // SAFETY: a fresh private mapping. Never unmapped here: exec leaves it to the helper.
    let stack = unsafe {
        rustix::mm::mmap_anonymous(std::ptr::null_mut(), STACK, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
    }?;
    let orders = stack.cast::<Orders>();
    // SAFETY: inside the fresh mapping, page aligned.
    unsafe { orders.write(Orders { release, image: image.as_raw_fd() }) };
    // SAFETY: one past the last byte of the mapping.
    let top = unsafe { stack.cast::<u8>().add(STACK) };
    // SAFETY: the child runs `helper` on its own stack, which makes system calls only; it has its own fd table, so nothing
    // it closes is ours. Without CLONE_VFORK: both go on.
    let pid = unsafe { libc::clone(helper, top.cast(), libc::CLONE_VM | libc::SIGCHLD, orders.cast()) };
    if pid < 0 {
        let error = std::io::Error::last_os_error();
        // SAFETY: mapped above, nobody uses it.
        let _ = unsafe { rustix::mm::munmap(stack, STACK) };
        return Err(error);
    }
    Ok(pid)
}

extern "C" fn helper(orders: *mut libc::c_void) -> libc::c_int {
    // SAFETY: written by `park` before the clone; this stack is ours alone.
    let Orders { release, image } = unsafe { orders.cast::<Orders>().read() };
    let mut fds = [
        libc::pollfd { fd: release, events: libc::POLLIN, revents: 0 },
        libc::pollfd { fd: image, events: libc::POLLIN, revents: 0 },
    ];
    // SAFETY: raw system calls on our own memory and fds. Any answer but EINTR (which blocked signals exclude) ends the wait.
    unsafe {
        raw::syscall3(libc::SYS_poll, fds.as_mut_ptr() as usize, fds.len(), usize::MAX);
        raw::syscall3(libc::SYS_close_range, 0, u32::MAX as usize, 0);
        let param = 0i32;
        let idle = libc::SCHED_IDLE as usize;
        raw::syscall3(libc::SYS_sched_setscheduler, 0, idle, std::ptr::from_ref(&param) as usize);
        raw::syscall3(libc::SYS_exit_group, 0, 0, 0);
    }
    0
}

mod raw {
    /// A system call without libc, whose wrapper would write errno into the thread-local storage of another thread.
    ///
    /// # Safety
    /// As the call itself.
    #[inline(always)]
    pub unsafe fn syscall3(number: i64, a: usize, b: usize, c: usize) -> isize {
        let result;
        // SAFETY: the x86-64 system call convention: rcx and r11 are clobbered.
        unsafe {
            core::arch::asm!(
                "syscall",
                inlateout("rax") number as isize => result,
                in("rdi") a,
                in("rsi") b,
                in("rdx") c,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
        result
    }
}

/// Whether a child of ours ends within `patience`. Does not reap it.
pub fn ends_within(pid: libc::pid_t, patience: Duration) -> std::io::Result<bool> {
    let pid = Pid::from_raw(pid).ok_or(std::io::ErrorKind::InvalidInput)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let timeout = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: patience.subsec_nanos().into() };
    loop {
        match rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Reaps a helper that was let go, so that it leaves no zombie; waits for its end as long as `patience`. Whether it is gone.
pub fn reap(pid: libc::pid_t, patience: Duration) -> bool {
    if !patience.is_zero() {
        // Somebody waits for it now: on a host whose CPUs are all busy it would get next to nothing at idle priority.
        let param = libc::sched_param { sched_priority: 0 };
        // SAFETY: our own child, not reaped yet; the kernel reads one sched_param.
        unsafe { libc::sched_setscheduler(pid, libc::SCHED_OTHER, &param) };
        // An error only shortens the wait.
        let _ = ends_within(pid, patience);
    }
    // SAFETY: no status is asked for.
    let result = unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) };
    result == pid || result < 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn a_helper_goes_when_it_is_let_go() {
        let release = EventFd::new(libc::EFD_CLOEXEC).unwrap();
        let pid = park(release.as_raw_fd()).unwrap();
        assert!(!reap(pid, Duration::ZERO), "it waits");
        release.write(1).unwrap();
        assert!(reap(pid, Duration::from_secs(30)));
    }
}
