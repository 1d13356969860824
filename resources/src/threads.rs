//! The threads of a VMM, all started from here: what each is for gives it its name, which /proc and debuggers show. All
//! inherit the signal mask of who starts them, but for [`FATAL`].

use std::ffi::c_int;
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::thread::{Builder, JoinHandle};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Serves the API's sockets.
    Api,
    /// Makes a machine and boots a guest.
    Boot,
    /// Owns the machine.
    Control,
    /// Waits for the keeper's death.
    KeeperWatch,
    /// Writes what has waited for the log.
    Log,
    /// Fills page tables.
    Populate,
    /// An update before its pause.
    Update,
    /// The vCPU of this index.
    Vcpu(u32),
}

impl fmt::Display for Role {
    /// At most 15 bytes (TASK_COMM_LEN).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Api => f.write_str("api"),
            Self::Boot => f.write_str("boot"),
            Self::Control => f.write_str("control"),
            Self::KeeperWatch => f.write_str("keeper-watch"),
            Self::Log => f.write_str("log"),
            Self::Populate => f.write_str("populate"),
            Self::Update => f.write_str("update"),
            Self::Vcpu(index) => write!(f, "vcpu{index}"),
        }
    }
}

/// Its `source` is EAGAIN where a limit is reached (clone(2)).
#[derive(Debug, thiserror::Error)]
#[error("cannot start the thread '{role}': {source}: raise RLIMIT_NPROC or pids.max")]
pub struct ThreadError {
    role: Role,
    source: io::Error,
}

impl From<ThreadError> for io::Error {
    fn from(error: ThreadError) -> Self {
        Self::new(error.source.kind(), error.to_string())
    }
}

/// What a thread gets for a fault of its own (signal(7)), or by abort(3). Never blocked in a VMM: the kernel ends a
/// process whose thread has one of them blocked as it earns it, whatever handler there is (kernel/signal.c,
/// force_sig_info_to_task), and one that is sent would wait.
pub const FATAL: [c_int; 7] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGSYS, libc::SIGTRAP, libc::SIGABRT];

/// On this thread. Whoever has started this process may have blocked any signal, which exec hands on.
pub fn unblock(signals: &[c_int]) {
    let mut set = MaybeUninit::uninit();
    // SAFETY: a set of our own, initialised by the first call; a number that is no signal is not added.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut());
    }
}

pub fn spawn<T: Send + 'static>(
    role: Role,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, ThreadError> {
    let life = move || {
        unblock(&FATAL);
        body()
    };
    Builder::new().name(role.to_string()).spawn(life).map_err(|source| ThreadError { role, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_the_name_of_its_role() {
        for role in [Role::KeeperWatch, Role::Vcpu(u32::MAX)] {
            let name = || std::fs::read_to_string("/proc/thread-self/comm").unwrap();
            assert_eq!(spawn(role, name).unwrap().join().unwrap().trim_end(), role.to_string());
        }
    }

    /// Of this thread, one bit a signal.
    fn blocked() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap()
    }

    #[test]
    fn no_thread_of_any_role_blocks_what_is_fatal() {
        use Role::*;
        let masks = std::thread::spawn(|| {
            let mut all = MaybeUninit::uninit();
            // SAFETY: a set of our own, and the mask of this thread, which is the test's.
            unsafe {
                libc::sigfillset(all.as_mut_ptr());
                libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut());
            }
            let roles = [Api, Boot, Control, KeeperWatch, Log, Populate, Update, Vcpu(0)];
            (blocked(), roles.map(|role| (role, spawn(role, blocked).unwrap().join().unwrap())))
        });
        let (here, threads) = masks.join().unwrap();
        let fatal = FATAL.iter().fold(0, |mask, signal| mask | 1u64 << (signal - 1));
        assert_eq!(here & fatal, fatal);
        threads.iter().for_each(|(role, mask)| assert_eq!(*mask, here & !fatal, "{role}: {mask:#x}"));
    }
}
