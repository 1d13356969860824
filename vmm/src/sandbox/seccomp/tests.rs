use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use super::*;
use crate::sandbox;
use crate::seams::untouched;
use crate::timeline::Timeline;

const FILTERED: [Role; 8] = [
    Role::Api,
    Role::Boot,
    Role::Control,
    Role::KeeperWatch,
    Role::Log,
    Role::Populate,
    Role::Update,
    Role::VcpuSpawner,
];

/// What becomes of a child of its own with the filters of `role`, and what it says.
fn fenced(role: Role, action: &SeccompAction, act: impl Fn()) -> (ExitStatus, String) {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let status = sandbox::in_child(|| {
        // SAFETY: the child's own descriptors.
        unsafe { libc::dup2(writer.as_raw_fd(), libc::STDERR_FILENO) };
        crate::logging::last_words_to_standard_error();
        let failed = trap::install().is_err() || fence(role, action).is_err();
        if !failed {
            act();
        }
        i32::from(failed)
    });
    drop(writer);
    // It has said a line or two, which the pipe holds.
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    (status, said)
}

fn fence(role: Role, action: &SeccompAction) -> Result<(), String> {
    for program in programs(role, std::process::id(), action).map_err(|error| error.to_string())? {
        seccompiler::apply_filter(&program).map_err(|error| error.to_string())?;
    }
    Ok(())
}

type Wish = (&'static str, Box<dyn Fn()>);

/// What somebody would like to do who has got a thread to run his code.
fn wishes() -> Vec<Wish> {
    // SAFETY: all of these are system calls in a child that ends after them; pointers are null, or to constants.
    unsafe fn call(number: i64, arguments: [usize; 5]) {
        let [a, b, c, d, e] = arguments;
        // SAFETY: as above.
        unsafe { libc::syscall(number, a, b, c, d, e) };
    }
    let wish = |name, number, arguments: [usize; 5]| -> Wish {
        // SAFETY: as above.
        (name, Box::new(move || unsafe { call(number, arguments) }))
    };
    let path = c"/etc/passwd".as_ptr() as usize;
    let parent = std::process::id() as usize;
    let own = libc::AT_FDCWD as usize;
    vec![
        wish("open a file", libc::SYS_openat, [own, path, 0, 0, 0]),
        wish("open a file by its old call", libc::SYS_open, [path, 0, 0, 0, 0]),
        wish("make a socket", libc::SYS_socket, [libc::AF_INET as usize, libc::SOCK_STREAM as usize, 0, 0, 0]),
        wish("connect a socket", libc::SYS_connect, [0, 0, 0, 0, 0]),
        wish("run a program", libc::SYS_execve, [path, 0, 0, 0, 0]),
        wish("run a program by its fd", libc::SYS_execveat, [0, path, 0, 0, 0]),
        wish("make a process", libc::SYS_fork, [0; 5]),
        wish("trace a process", libc::SYS_ptrace, [libc::PTRACE_ATTACH as usize, parent, 0, 0, 0]),
        wish("write to a process", libc::SYS_process_vm_writev, [parent, 0, 0, 0, 0]),
        wish("signal a process", libc::SYS_kill, [parent, 0, 0, 0, 0]),
        wish("signal a thread of a process", libc::SYS_tgkill, [parent, parent, 0, 0, 0]),
        wish("have a process signalled", libc::SYS_fcntl, [0, libc::F_SETOWN as usize, parent, 0, 0]),
        wish("mount", libc::SYS_mount, [0; 5]),
        wish("enter a namespace", libc::SYS_setns, [0; 5]),
        wish("make a namespace", libc::SYS_unshare, [libc::CLONE_NEWUSER as usize, 0, 0, 0, 0]),
        wish("load a BPF program", libc::SYS_bpf, [0; 5]),
        wish("make a ring that does calls", libc::SYS_io_uring_setup, [1, 0, 0, 0, 0]),
        wish("load a module", libc::SYS_finit_module, [0; 5]),
        wish("become another user", libc::SYS_setuid, [0; 5]),
        wish(
            "have writable code",
            libc::SYS_mmap,
            [0, 4096, 7, libc::MAP_PRIVATE as usize | libc::MAP_ANONYMOUS as usize, !0],
        ),
        wish("make memory code", libc::SYS_mprotect, [0, 4096, 5, 0, 0]),
        wish("type into a terminal", libc::SYS_ioctl, [0, libc::TIOCSTI as usize, path, 0, 0]),
        wish("change the limits of a process", libc::SYS_prlimit64, [parent, 7, path, 0, 0]),
        // x32: the number has another bit.
        wish("open a file by another ABI", libc::SYS_openat | 0x4000_0000, [own, path, 0, 0, 0]),
    ]
}

/// The files that a role may open are named by somebody whom it serves: what holds those is Landlock.
fn may(role: Role, wish: &str) -> bool {
    match wish {
        "open a file" => matches!(role, Role::Log | Role::Boot | Role::Update | Role::Control),
        "open a file by its old call" => matches!(role, Role::Boot | Role::Update | Role::Control),
        // One of this host: no other can be made.
        "connect a socket" => matches!(role, Role::Boot | Role::Control),
        _ => false,
    }
}

#[test]
fn no_thread_does_what_it_need_not() {
    for role in FILTERED {
        for (name, act) in wishes() {
            let (status, _) = fenced(role, &SeccompAction::Trap, &act);
            let died = status.signal() == Some(libc::SIGSYS);
            assert_eq!(died, !may(role, name), "{role}: {name}: {status}");
        }
        let logged = fenced(role, &SeccompAction::Log, || {
            // SAFETY: has no arguments.
            unsafe { libc::syscall(libc::SYS_getsid, 0) };
        });
        assert_eq!((logged.0.code(), logged.1.as_str()), (Some(0), ""), "{role}");
    }
}

/// What a thread of any role does: memory, locks, a thread's end, a signal to itself, an abort.
#[test]
fn what_every_thread_does_it_may() {
    for role in FILTERED {
        let (status, said) = fenced(role, &SeccompAction::Trap, || {
            let blocks: Vec<_> = (0..64).map(|order| vec![1u8; 1 << (order % 20)]).collect();
            std::thread::yield_now();
            std::thread::sleep(std::time::Duration::from_nanos(1));
            drop(blocks);
            // SAFETY: a signal that is ignored.
            unsafe {
                libc::signal(libc::SIGURG, libc::SIG_IGN);
                libc::raise(libc::SIGURG);
            }
        });
        assert!(status.success(), "{role}: {said}");
        let (aborted, _) = fenced(role, &SeccompAction::Trap, || std::process::abort());
        assert_eq!(aborted.signal(), Some(libc::SIGABRT), "{role}");
    }
}

/// A vCPU's thread inherits the filters of the one that has started it, which starts threads, and no processes.
#[test]
fn the_spawner_of_vcpus_starts_threads() {
    let (status, said) = fenced(Role::VcpuSpawner, &SeccompAction::Trap, || {
        let threads: Vec<_> = (0..4).map(|_| std::thread::spawn(|| Vec::<u8>::with_capacity(1 << 20))).collect();
        threads.into_iter().for_each(|thread| drop(thread.join()));
    });
    assert!(status.success(), "{said}");
    assert!(calls::of(Role::Vcpu(0), 1).is_none() && calls::of(Role::Spawner, 1).is_none());
}

#[test]
fn who_was_stopped_says_by_what() {
    let (timeline, _page) = Timeline::new(untouched()).unwrap();
    let (status, said) = fenced(Role::Populate, &SeccompAction::Trap, || {
        let _witness = trap::Witness::new(&timeline);
        let _ = rustix::thread::set_name(c"populate");
        // SAFETY: a constant path.
        unsafe { libc::open(c"/etc/passwd".as_ptr(), 0) };
    });
    assert_eq!(status.signal(), Some(libc::SIGSYS), "{said}");
    assert_eq!(
        timeline.cause(),
        "the thread 'populate' has called system call 257 (ausyscall 257), which its seccomp filter does not allow",
        "{said}"
    );
}

#[test]
fn the_mode_is_the_one_in_force() {
    for mode in [Mode::True, Mode::False, Mode::Log] {
        assert_eq!(Mode::of_name(Some(mode.name().as_ref())), mode);
    }
    assert_eq!([Mode::of_name(None), Mode::of_name(Some("no".as_ref()))], [Mode::True; 2]);
}

#[test]
fn filters_are_small() {
    for role in FILTERED {
        let begun = std::time::Instant::now();
        let programs = programs(role, 1, &SeccompAction::Trap).unwrap();
        let made = begun.elapsed();
        let length: usize = programs.iter().map(Vec::len).sum();
        println!("{role}: {length} instructions, made in {made:?}");
        // BPF_MAXINSNS
        assert!(programs.iter().all(|program| program.len() <= 4096), "{role}: {length}");
    }
}
