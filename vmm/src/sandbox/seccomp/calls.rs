//! What each role calls. Traced over the whole of the tests, and read: of what a thread calls only when something goes
//! wrong no trace tells.

use theseus_resources::threads::Role;

use super::ioctls;
use super::rules::{Is, Rules};

/// None: it has no filter, or another thread's. `pid`: of this process.
pub(super) fn of(role: Role, pid: u32) -> Option<Rules> {
    let mut rules = all(pid);
    match role {
        Role::Spawner | Role::Vcpu(_) => return None,
        Role::VcpuSpawner => rules.and(&vcpu()),
        Role::Populate => {}
        Role::Log => rules.any(&[libc::SYS_openat, libc::SYS_fstat]),
        Role::KeeperWatch => rules.and(&keeper_watch()),
        Role::Api => rules.and(&api()),
        Role::Update => rules.and(&update(pid)),
        Role::Boot => rules.and(&boot()),
        Role::Control => {
            // What is done in a pause and beside it.
            rules.and(&boot());
            rules.and(&update(pid));
            rules.and(&sockets());
        }
    }
    Some(rules)
}

/// Memory, locks, time, the thread's own life and end, the log, and a signal handler of ours.
fn all(pid: u32) -> Rules {
    let mut rules = Rules::default();
    rules.any(&[
        libc::SYS_brk,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_close,
        libc::SYS_close_range,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_futex,
        libc::SYS_getpid,
        libc::SYS_getrandom,
        libc::SYS_gettid,
        libc::SYS_gettimeofday,
        libc::SYS_lseek,
        libc::SYS_madvise,
        libc::SYS_mremap,
        libc::SYS_munmap,
        libc::SYS_nanosleep,
        libc::SYS_poll,
        libc::SYS_ppoll,
        libc::SYS_read,
        libc::SYS_restart_syscall,
        libc::SYS_rseq,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sched_getaffinity,
        libc::SYS_sched_yield,
        libc::SYS_set_robust_list,
        libc::SYS_sigaltstack,
        // Whether there are CPUs to spare (spin.rs).
        libc::SYS_sysinfo,
        libc::SYS_write,
        libc::SYS_writev,
    ]);
    // No code but that of the program.
    let no_code = (2, Is::Bits { mask: libc::PROT_EXEC as u32, value: 0 });
    rules.when(libc::SYS_mmap, &[no_code]);
    rules.when(libc::SYS_mprotect, &[no_code]);
    // Signals go to this process alone: kicks, abort(3), and what a handler of ours hands on.
    rules.when(libc::SYS_tgkill, &[(0, Is::Int(pid as i32))]);
    for option in [libc::PR_SET_NAME, libc::PR_GET_NAME] {
        rules.when(libc::SYS_prctl, &[(0, Is::Int(option))]);
    }
    // Not what would have the kernel send signals to others (F_SETOWN, F_NOTIFY).
    for command in [libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC] {
        rules.when(libc::SYS_fcntl, &[(1, Is::Int(command))]);
    }
    rules
}

fn ioctls(rules: &mut Rules, lists: &[&[u32]]) {
    for number in lists.iter().copied().flatten() {
        rules.when(libc::SYS_ioctl, &[(1, Is::Bits { mask: 0xffff, value: *number })]);
    }
}

/// A vCPU thread, and what it takes to start one.
fn vcpu() -> Rules {
    let mut rules = Rules::default();
    rules.any(&[
        libc::SYS_eventfd2,
        libc::SYS_getcpu,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        // Only asks.
        libc::SYS_getpriority,
        libc::SYS_sched_getparam,
        libc::SYS_sched_getscheduler,
    ]);
    // Its own place.
    for call in [libc::SYS_sched_setaffinity, libc::SYS_sched_setscheduler] {
        rules.when(call, &[(0, Is::Int(0))]);
    }
    rules.when(libc::SYS_setpriority, &[(0, Is::Int(libc::PRIO_PROCESS as i32)), (1, Is::Int(0))]);
    // A thread, not a process.
    let thread = libc::CLONE_THREAD as u32;
    rules.when(libc::SYS_clone, &[(0, Is::Bits { mask: thread, value: thread })]);
    // Refused by the filter below this one.
    rules.any(&[libc::SYS_clone3]);
    ioctls(&mut rules, &[ioctls::VCPU]);
    rules.and(&console());
    rules
}

/// A guest that reads or writes its serial port takes a client that waits, and reads, writes and watches what is there.
fn console() -> Rules {
    let mut rules = Rules::default();
    rules.any(&[libc::SYS_accept4, libc::SYS_epoll_ctl, libc::SYS_fstat, libc::SYS_getpgrp]);
    // Of a connection, not to an address.
    for call in [libc::SYS_sendto, libc::SYS_recvfrom] {
        rules.when(call, &[(4, Is::Word(0))]);
    }
    rules.when(libc::SYS_fcntl, &[(1, Is::Int(libc::F_GETPIPE_SZ))]);
    ioctls(&mut rules, &[ioctls::LOOKED_AT]);
    rules
}

fn keeper_watch() -> Rules {
    let mut rules = Rules::default();
    rules.any(&[libc::SYS_getppid, libc::SYS_rt_sigtimedwait]);
    rules.when(libc::SYS_prctl, &[(0, Is::Int(libc::PR_SET_PDEATHSIG))]);
    ioctls(&mut rules, &[ioctls::ENDING]);
    rules
}

/// Connections, and what waits for them.
fn sockets() -> Rules {
    let mut rules = Rules::default();
    rules.any(&[
        libc::SYS_accept4,
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_wait,
        libc::SYS_eventfd2,
        libc::SYS_getpeername,
        libc::SYS_getsockname,
        libc::SYS_getsockopt,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_sendto,
        libc::SYS_shutdown,
    ]);
    ioctls(&mut rules, &[ioctls::NONBLOCK]);
    rules
}

fn api() -> Rules {
    let mut rules = sockets();
    // Whether the other end of a connection is this user.
    rules.any(&[libc::SYS_geteuid]);
    rules
}

/// Files that a caller or an operator has named, and what is read below /proc and /sys.
fn files() -> Rules {
    let mut rules = Rules::default();
    rules.any(&[
        libc::SYS_faccessat,
        libc::SYS_faccessat2,
        libc::SYS_fallocate,
        libc::SYS_fstat,
        libc::SYS_fstatfs,
        libc::SYS_ftruncate,
        libc::SYS_getdents64,
        libc::SYS_getegid,
        libc::SYS_geteuid,
        libc::SYS_getgid,
        libc::SYS_getuid,
        libc::SYS_memfd_create,
        libc::SYS_newfstatat,
        libc::SYS_open,
        libc::SYS_openat,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_readlink,
        libc::SYS_readlinkat,
        libc::SYS_readv,
        libc::SYS_rename,
        libc::SYS_renameat2,
        libc::SYS_stat,
        libc::SYS_statfs,
        libc::SYS_statx,
        libc::SYS_sysinfo,
        libc::SYS_uname,
        libc::SYS_unlink,
        libc::SYS_unlinkat,
    ]);
    for command in [libc::F_ADD_SEALS, libc::F_GET_SEALS, libc::F_GETPIPE_SZ] {
        rules.when(libc::SYS_fcntl, &[(1, Is::Int(command))]);
    }
    // Those of the keeper are read, and are then this process's.
    rules.when(libc::SYS_prlimit64, &[(0, Is::Int(0))]);
    rules.when(libc::SYS_prlimit64, &[(2, Is::Word(0))]);
    rules
}

/// Also what a guest's end takes.
fn boot() -> Rules {
    let mut rules = files();
    rules.and(&vcpu_ioctls());
    rules.any(&[
        // What an operator has set on the keeper comes to all threads of this process.
        libc::SYS_getcpu,
        libc::SYS_getpgrp,
        libc::SYS_getpriority,
        libc::SYS_sched_getparam,
        libc::SYS_sched_getscheduler,
        libc::SYS_sched_setaffinity,
        libc::SYS_sched_setscheduler,
        libc::SYS_setpriority,
        // The socket of a console, which may still be somebody's.
        libc::SYS_bind,
        libc::SYS_chmod,
        libc::SYS_connect,
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_eventfd2,
        libc::SYS_fchmod,
        libc::SYS_fchmodat,
        libc::SYS_fchownat,
        libc::SYS_getsockname,
        libc::SYS_getsockopt,
        libc::SYS_listen,
        libc::SYS_setsockopt,
        libc::SYS_timerfd_create,
        libc::SYS_timerfd_settime,
        libc::SYS_umask,
    ]);
    of_this_host(&mut rules);
    rules
}

fn vcpu_ioctls() -> Rules {
    let mut rules = Rules::default();
    ioctls(&mut rules, &[ioctls::VCPU, ioctls::MACHINE, ioctls::TERMINAL, ioctls::NONBLOCK]);
    rules
}

/// Sockets that reach no other.
fn of_this_host(rules: &mut Rules) {
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        rules.when(call, &[(0, Is::Int(libc::AF_UNIX))]);
    }
}

/// Looks at a target, and talks with the keeper and a new VMM.
fn update(pid: u32) -> Rules {
    let mut rules = files();
    rules.any(&[
        libc::SYS_capget,
        libc::SYS_fgetxattr,
        libc::SYS_getppid,
        libc::SYS_getpriority,
        libc::SYS_getxattr,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_pidfd_send_signal,
        libc::SYS_sched_getparam,
        libc::SYS_sched_getscheduler,
        libc::SYS_setpriority,
    ]);
    of_this_host(&mut rules);
    // F_SETSIG, for a lease.
    for command in [10, libc::F_SETLEASE, libc::F_GETLEASE] {
        rules.when(libc::SYS_fcntl, &[(1, Is::Int(command))]);
    }
    // To its own thread that watches the keeper.
    rules.when(libc::SYS_kill, &[(0, Is::Int(pid as i32))]);
    for option in [libc::PR_GET_NO_NEW_PRIVS, libc::PR_CAPBSET_READ, libc::PR_CAP_AMBIENT, libc::PR_GET_SECUREBITS] {
        rules.when(libc::SYS_prctl, &[(0, Is::Int(option))]);
    }
    // A guest's end, where it is another VMM's by now.
    ioctls(&mut rules, &[ioctls::ENDING]);
    rules
}
