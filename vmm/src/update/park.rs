//! The parked helper: a process that shares the address space exec leaves behind. It does two things: the tear-down of that address space,
//! which grows with guest RAM, is not part of the guest's pause; and if the new image dies or hangs, it brings the old binary back.
//!
//! It shares main's thread-local storage and, after exec, an allocator whose locks may be held by threads that no longer exist: so it
//! makes raw system calls only, from a stack of its own, and touches nothing else but the shared page. All signals are blocked.
//!
//! ```text
//!   park -> waits for the release eventfd, the death of the image, or the deadline
//!        -> released, or the guest runs: munmap of the devices, close_range (a VFIO group is busy as long as somebody has one or
//!             the other, and at exit the memory goes first: exit_mm before exit_files) -> SCHED_IDLE -> exit
//!        -> takes the arbiter: kills the image, waits for its exit (which gives up its KVM VM and its fds), execs the old binary
//! ```

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::{Pid, PidfdFlags};

use super::arbiter::Way;
use super::timeline::{Page, Phase, TAKEN_DEAD, TAKEN_LATE, Timeline};

const STACK: usize = 64 << 10;

/// How the old binary is started again.
#[derive(Clone, Copy)]
pub struct Return {
    /// The old binary.
    pub binary: RawFd,
    /// Null-terminated arrays of C strings, which stay where they are for as long as this address space lives.
    pub args: *const *const libc::c_char,
    pub env: *const *const libc::c_char,
}

/// A mapping of a device's registers: its address and size.
pub type DeviceMapping = (u64, u64);

/// What the helper is told; at the low end of its stack, which grows towards it, with the devices' mappings right behind.
struct Orders {
    release: RawFd,
    image: RawFd,
    page: *const Page,
    back: Return,
    /// There was no exec: this address space, and what is mapped in it, still is the image's.
    is_shared: AtomicBool,
    devices: *const DeviceMapping,
    device_count: usize,
}

/// A helper that waits.
#[must_use]
pub struct Parked {
    pid: libc::pid_t,
    orders: *mut Orders,
    /// Bytes of its stack.
    size: usize,
}

impl Parked {
    pub fn pid(&self) -> libc::pid_t {
        self.pid
    }

    /// After an exec that failed: lets the helper go, which `release` does, and takes its stack back.
    pub fn dismiss(self, release: RawFd, patience: Duration) {
        let Self { pid, orders, size } = self;
        // SAFETY: the stack is there until the end of this function.
        unsafe { &*orders }.is_shared.store(true, Ordering::SeqCst);
        // SAFETY: a count of one into an eventfd that the caller keeps open.
        unsafe { libc::write(release, 1u64.to_ne_bytes().as_ptr().cast(), 8) };
        if reap(pid, patience) {
            // SAFETY: mapped by `park`; whoever ran on it is gone.
            let _ = unsafe { rustix::mm::munmap(orders.cast(), size) };
        }
    }
}

/// Starts the helper. To be called on the main thread right before exec, with all signals blocked and the kept fds open for exec, as
/// the helper gets a copy of them.
///
/// `release`: an eventfd whose first count lets it go. If the exec then fails, commit first, then [`Parked::dismiss`] it. `devices`: what it
/// unmaps when it goes.
pub fn park(release: RawFd, timeline: &Timeline, back: Return, devices: &[DeviceMapping]) -> std::io::Result<Parked> {
    // The helper has its own copy of the fd table: ours closes with this function.
    let image = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    let size = (STACK + size_of::<Orders>() + size_of_val(devices)).next_multiple_of(4096);
    // SAFETY: a fresh private mapping. Exec leaves it to the helper.
    let stack = unsafe {
        rustix::mm::mmap_anonymous(std::ptr::null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
    }?;
    let orders = stack.cast::<Orders>();
    // SAFETY: inside the fresh mapping, which has room for both, aligned as Orders is.
    let list = unsafe { orders.add(1) }.cast::<DeviceMapping>();
    let told = Orders {
        release,
        image: image.as_raw_fd(),
        page: timeline.page(),
        back,
        is_shared: AtomicBool::new(false),
        devices: list,
        device_count: devices.len(),
    };
    // SAFETY: likewise; nobody else knows the mapping yet.
    unsafe {
        orders.write(told);
        list.copy_from_nonoverlapping(devices.as_ptr(), devices.len());
    }
    // SAFETY: one past the last byte of the mapping.
    let top = unsafe { stack.cast::<u8>().add(size) };
    // SAFETY: the child runs `helper` on its own stack, which makes system calls only; it has its own fd table, so nothing
    // it closes is ours. Without CLONE_VFORK: both go on.
    let pid = unsafe { libc::clone(helper, top.cast(), libc::CLONE_VM | libc::SIGCHLD, orders.cast()) };
    if pid < 0 {
        let error = std::io::Error::last_os_error();
        // SAFETY: mapped above, nobody uses it.
        let _ = unsafe { rustix::mm::munmap(stack, size) };
        return Err(error);
    }
    Ok(Parked { pid, orders, size })
}

extern "C" fn helper(orders: *mut libc::c_void) -> libc::c_int {
    // SAFETY: written by `park` before the clone; this stack is ours alone.
    let orders = unsafe { &*orders.cast::<Orders>() };
    let Orders { release, image, page, back, .. } = *orders;
    // SAFETY: the update's page stays mapped in this address space: the thread that would unmap it waits for the exec, or for us.
    let page = unsafe { &*page };
    if let Some(because) = watch(release, image, page) {
        page.taken_because.store(because, Ordering::SeqCst);
        take_over(image, page, back);
        // Nobody is left who could run the guest.
        raw::exit(crate::EXIT_LOST as usize);
    }
    // SAFETY: raw system calls on our own fds and scheduling, and, if nobody else is left in this address space, on mappings that nobody uses.
    unsafe {
        let devices = if orders.is_shared.load(Ordering::SeqCst) { 0 } else { orders.device_count };
        for n in 0..devices {
            let (address, size) = orders.devices.add(n).read();
            raw::call(libc::SYS_munmap, [address as usize, size as usize, 0, 0, 0]);
        }
        raw::call(libc::SYS_close_range, [0, u32::MAX as usize, 0, 0, 0]);
        let param = 0i32;
        let idle = libc::SCHED_IDLE as usize;
        raw::call(libc::SYS_sched_setscheduler, [0, idle, std::ptr::from_ref(&param) as usize, 0, 0]);
    }
    raw::exit(0)
}

/// Waits for the end of the update. None if the guest runs; else the arbiter is ours, and this is why.
fn watch(release: RawFd, image: RawFd, page: &Page) -> Option<u32> {
    let mut extended = false;
    let mut until = page.deadline.load(Ordering::Relaxed);
    loop {
        let mut fds = [
            libc::pollfd { fd: release, events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: image, events: libc::POLLIN, revents: 0 },
        ];
        let rest = until.saturating_sub(raw::now_ns());
        let timeout = libc::timespec { tv_sec: (rest / 1_000_000_000) as i64, tv_nsec: (rest % 1_000_000_000) as i64 };
        // SAFETY: raw system call on our own memory and fds.
        let ready = unsafe {
            let timeout = std::ptr::from_ref(&timeout) as usize;
            raw::call(libc::SYS_ppoll, [fds.as_mut_ptr() as usize, fds.len(), timeout, 0, 8])
        };
        if ready < 0 {
            continue;
        }
        let dead = ready > 0 && fds[1].revents != 0;
        if ready > 0 && fds[0].revents != 0 {
            return None;
        }
        if ready == 0 && page.arbiter.way() == Some(Way::Back) && !extended {
            // The image has given up by itself and is on its way back: that starts anew.
            extended = true;
            until = raw::now_ns().saturating_add(page.patience.load(Ordering::Relaxed));
            continue;
        }
        // First: whoever reads TAKEN must be able to tell whether it is the one that was started for it.
        page.helper.store(raw::pid(), Ordering::SeqCst);
        if page.arbiter.take() {
            return Some(if dead { TAKEN_DEAD } else { TAKEN_LATE });
        }
        // The guest runs: only the end of the image, or our release, is of interest any more.
        if dead {
            return None;
        }
        until = u64::MAX / 4;
    }
}

/// Returns only if the old binary cannot be started.
fn take_over(image: RawFd, page: &Page, back: Return) {
    // SAFETY: raw system calls on our own memory and fds; the strings were made to last.
    unsafe {
        // ESRCH if it is dead already.
        raw::call(libc::SYS_pidfd_send_signal, [image as usize, libc::SIGKILL as usize, 0, 0, 0]);
        let mut fd = libc::pollfd { fd: image, events: libc::POLLIN, revents: 0 };
        // Its last thread has given up mm and fds before this is readable (do_exit).
        while raw::call(libc::SYS_ppoll, [std::ptr::from_mut(&mut fd) as usize, 1, 0, 0, 8]) <= 0 {}
        page.stamp(Phase::Failed, raw::now_ns());
        let Return { binary, args, env } = back;
        let path = c"".as_ptr() as usize;
        let flags = libc::AT_EMPTY_PATH as usize;
        raw::call(libc::SYS_execveat, [binary as usize, path, args as usize, env as usize, flags]);
    }
}

mod raw {
    /// A system call without libc, whose wrapper would write errno into the thread-local storage of another thread.
    ///
    /// # Safety
    /// As the call itself.
    #[inline(always)]
    pub unsafe fn call(number: i64, args: [usize; 5]) -> isize {
        let result;
        let [a, b, c, d, e] = args;
        // SAFETY: the x86-64 system call convention: rcx and r11 are clobbered.
        unsafe {
            core::arch::asm!(
                "syscall",
                inlateout("rax") number as isize => result,
                in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e,
                lateout("rcx") _, lateout("r11") _,
                options(nostack),
            );
        }
        result
    }

    pub fn exit(code: usize) -> ! {
        loop {
            // SAFETY: ends this process.
            unsafe { call(libc::SYS_exit_group, [code, 0, 0, 0, 0]) };
        }
    }

    pub fn pid() -> u32 {
        // SAFETY: has no arguments and cannot fail.
        unsafe { call(libc::SYS_getpid, [0; 5]) as u32 }
    }

    /// CLOCK_MONOTONIC, ns.
    pub fn now_ns() -> u64 {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel fills one timespec.
        unsafe {
            let now = std::ptr::from_mut(&mut now) as usize;
            call(libc::SYS_clock_gettime, [libc::CLOCK_MONOTONIC as usize, now, 0, 0, 0]);
        }
        (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
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

/// No longer at idle priority: where all CPUs are busy, that is next to nothing.
pub fn hurry(pid: libc::pid_t) {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: our own child, not reaped yet; the kernel reads one sched_param.
    unsafe { libc::sched_setscheduler(pid, libc::SCHED_OTHER, &param) };
}

/// Reaps a helper that was let go, so that it leaves no zombie; waits for its end as long as `patience`. Whether it is gone.
pub fn reap(pid: libc::pid_t, patience: Duration) -> bool {
    if !patience.is_zero() {
        hurry(pid);
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
    use theseus_resources::Vault;
    use vmm_sys_util::eventfd::EventFd;

    /// A helper that, should it ever take over, would run nothing.
    fn parked(patience: Duration, devices: &[DeviceMapping]) -> (Parked, EventFd, Timeline) {
        let release = EventFd::new(libc::EFD_CLOEXEC).unwrap();
        let (timeline, _fd) = Timeline::new(&Vault::new()).unwrap();
        timeline.start_deadline(patience);
        let back = Return { binary: -1, args: std::ptr::null(), env: std::ptr::null() };
        let parked = park(release.as_raw_fd(), &timeline, back, devices).unwrap();
        (parked, release, timeline)
    }

    fn is_mapped(address: u64) -> bool {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().any(|line| {
            let mut ends = line.split([' ', '-']).map(|end| u64::from_str_radix(end, 16).unwrap_or(0));
            (ends.next().unwrap()..ends.next().unwrap()).contains(&address)
        })
    }

    /// As if it were a device's: two pages, so that not all of it is one mapping with its neighbours.
    fn device() -> DeviceMapping {
        // SAFETY: a fresh mapping.
        let at = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), 8192, ProtFlags::READ, MapFlags::SHARED).unwrap()
        };
        (at as u64, 8192)
    }

    #[test]
    fn devices_are_unmapped_before_all_else() {
        let devices = [device(), device()];
        // As after an exec: nobody uses them any more.
        let (parked, release, _timeline) = parked(Duration::from_secs(600), &devices);
        release.write(1).unwrap();
        assert!(reap(parked.pid(), Duration::from_secs(30)));
        assert!(devices.iter().all(|(address, _)| !is_mapped(*address)));
    }

    #[test]
    fn an_exec_that_failed_costs_nothing() {
        let devices = [device()];
        let (parked, release, timeline) = parked(Duration::from_secs(600), &devices);
        assert!(timeline.arbiter().commit(Way::Forward));
        let stack = parked.orders as u64;
        assert!(is_mapped(stack));
        parked.dismiss(release.as_raw_fd(), Duration::from_secs(30));
        assert!(!is_mapped(stack), "its stack is left behind");
        assert!(is_mapped(devices[0].0), "the devices are still in use");
        // SAFETY: mapped above.
        unsafe { rustix::mm::munmap(devices[0].0 as *mut _, 8192) }.unwrap();
    }

    #[test]
    fn a_helper_goes_when_it_is_let_go() {
        let (parked, release, timeline) = parked(Duration::from_secs(600), &[]);
        let pid = parked.pid();
        assert!(!reap(pid, Duration::ZERO), "it waits");
        release.write(1).unwrap();
        assert!(reap(pid, Duration::from_secs(30)));
        assert!(timeline.arbiter().commit(Way::Forward), "it took nothing");
    }

    #[test]
    fn a_helper_leaves_a_committed_guest_alone_whatever_the_deadline() {
        let (parked, release, timeline) = parked(Duration::from_secs(600), &[]);
        let pid = parked.pid();
        assert!(timeline.arbiter().commit(Way::Forward));
        timeline.page().deadline.store(1, Ordering::Relaxed);
        assert!(!reap(pid, Duration::ZERO), "it waits for its release");
        release.write(1).unwrap();
        assert!(reap(pid, Duration::from_secs(30)));
    }
}
