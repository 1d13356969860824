//! A program of its own, as it forks without the C library's care: the child has all locks as they were, and all
//! descriptors of the process for a while.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};

use theseus_resources::StateWriter;
use theseus_resources::state::Format;
use theseus_vmm::heap;

/// The threads that die in the middle of whatever they are at.
const THREADS: usize = 4;
const TRIES: usize = 60;
const UNTIL_SEEN: usize = 5000;

/// Like a saved state of many vCPUs: sections whose buffers grow as they are encoded, and then all in one.
fn serialised() -> Vec<u8> {
    let mut writer = StateWriter::new("id");
    for section in 0..64u64 {
        let registers: Vec<(u64, String)> = (0..500).map(|n| (n * section, format!("register {n}"))).collect();
        writer.add(&format!("vcpu{section}"), &Format::new("vcpu", 1), &registers).unwrap();
    }
    writer.finish().unwrap()
}

#[derive(Debug, PartialEq)]
enum End {
    /// With this status.
    Ended(libc::c_int),
    /// It waits for a lock that nobody will ever give back.
    Hangs,
}

/// Runs `body` in a process whose other threads have died in what they were just doing.
fn outlive(body: impl FnOnce() -> bool) -> End {
    // Where this thread has just given malloc's lock back, it is nobody's: the others are to get ahead.
    std::thread::sleep(std::time::Duration::from_micros(200));
    // SAFETY: clone as fork(2) does it, but without the C library's handlers, which would take malloc's locks first.
    // The child calls `body`, and ends.
    let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } as libc::pid_t;
    if child == 0 {
        let failed = !std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(false);
        // SAFETY: ends the child.
        unsafe { libc::_exit(failed.into()) }
    }
    assert!(child > 0, "{}", std::io::Error::last_os_error());
    loop {
        let mut status = 0;
        // SAFETY: our own child; the kernel fills in one status.
        if unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == child {
            return End::Ended(status);
        }
        // It makes no system call that waits, but for a lock.
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap();
        if stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('S')) {
            // SAFETY: our own child, which is there until it is waited for.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, &mut status, 0);
            }
            return End::Hangs;
        }
        std::thread::yield_now();
    }
}

/// Sizes that no thread has for itself (glibc's tcache ends at 1 KiB), and memory that is not touched: most of the time
/// one of the threads is in malloc.
fn allocate_until(stop: &AtomicBool) {
    for n in (1..64).cycle() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        black_box([Vec::<u8>::with_capacity(n << 11), Vec::with_capacity(n << 10 | 1 << 11)]);
    }
}

/// One test: the threads of another would be waited for by none.
#[test]
fn who_outlives_all_others_needs_none_of_their_locks() {
    heap::keep();
    let expected = serialised();
    let serialises = || serialised() == expected;
    let stop = AtomicBool::new(false);
    let (of_arena, of_malloc, of_more, (used, size)) = std::thread::scope(|scope| {
        (0..THREADS).for_each(|_| drop(scope.spawn(|| allocate_until(&stop))));
        let of_arena: Vec<_> = (0..TRIES)
            .map(|_| {
                outlive(|| {
                    heap::switch_to_arena();
                    serialises()
                })
            })
            .collect();
        // So that it is seen what the switch is for: however long that takes, as it depends on where the threads are.
        let of_malloc = (0..UNTIL_SEEN).find(|_| outlive(serialises) == End::Hangs);
        // More than there is: an error to who asks, and no end of the process.
        let of_more = outlive(|| {
            heap::switch_to_arena();
            let (_, size) = heap::arena_use();
            let mut all: Vec<Vec<u8>> = Vec::with_capacity(1 << 10);
            loop {
                let mut one: Vec<u8> = Vec::new();
                if one.try_reserve_exact(size / 100).is_err() {
                    break all.len() == 99 && one.try_reserve_exact(size / 200).is_ok();
                }
                all.push(one);
            }
        });
        stop.store(true, Ordering::Relaxed);
        (of_arena, of_malloc, of_more, heap::arena_use())
    });
    assert!(of_arena.iter().all(|end| *end == End::Ended(0)), "{of_arena:?}");
    assert!(of_malloc.is_some(), "with malloc none of {UNTIL_SEEN} hangs");
    assert_eq!(of_more, End::Ended(0));
    assert_eq!(used, 0, "of {size}: this process's own memory is malloc's");
}
