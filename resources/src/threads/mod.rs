//! The threads of a VMM, all started from here: what each is for gives it its name, which /proc and debuggers show, its
//! signal mask, and its fence ([`begin`]).
//!
//! | role | takes, beside what is fatal ([`FATAL`]) |
//! |---|---|
//! | main | all that is sent to the process, but for what another thread waits for (signalfd, sigwait(3)) |
//! | `vcpuN` | [`KICK`] |
//! | the others | nothing |
//!
//! No thread changes its mask afterwards.

use std::ffi::c_int;
use std::fmt;
use std::io;
use std::mem::MaybeUninit;

mod spawner;

pub use spawner::{Fence, begin, spawn};

/// What a thread is for. Displayed, its name.
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
    /// Starts the other threads.
    Spawner,
    /// An update before its pause.
    Update,
    /// The vCPU of this index.
    Vcpu(u32),
    /// Starts those of vCPUs.
    VcpuSpawner,
}

impl Role {
    /// What it takes, beside [`FATAL`].
    fn takes(self) -> &'static [c_int] {
        match self {
            Self::Vcpu(_) => &[KICK],
            Self::Api
            | Self::Boot
            | Self::Control
            | Self::KeeperWatch
            | Self::Log
            | Self::Populate
            | Self::Spawner
            | Self::Update
            | Self::VcpuSpawner => &[],
        }
    }

    fn mask(self) -> libc::sigset_t {
        all_but(FATAL.iter().chain(self.takes()))
    }
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
            Self::Spawner => f.write_str("spawner"),
            Self::Update => f.write_str("update"),
            Self::Vcpu(index) => write!(f, "vcpu{index}"),
            Self::VcpuSpawner => f.write_str("vcpu-spawner"),
        }
    }
}

/// Why a thread does not run: nothing of its body has.
#[derive(Debug, thiserror::Error)]
pub enum ThreadError {
    /// EAGAIN where a limit is reached (clone(2)).
    #[error("cannot start the thread '{role}': {source}: raise RLIMIT_NPROC or pids.max")]
    Limit {
        /// Of the thread.
        role: Role,
        /// What the kernel says.
        source: io::Error,
    },
    /// Its [`Fence`] has failed, and it has ended.
    #[error("the thread '{role}' cannot be fenced in: {source}")]
    Fence {
        /// Of the thread.
        role: Role,
        /// What the fence says.
        source: io::Error,
    },
    /// The spawner is gone, or ended while it started this one.
    #[error("the thread '{0}' cannot be started: the one that would do it has ended")]
    NoSpawner(Role),
}

impl From<ThreadError> for io::Error {
    fn from(error: ThreadError) -> Self {
        let kind = match &error {
            ThreadError::Limit { source, .. } | ThreadError::Fence { source, .. } => source.kind(),
            ThreadError::NoSpawner(_) => io::ErrorKind::Other,
        };
        Self::new(kind, error.to_string())
    }
}

/// What a thread gets for a fault of its own (signal(7)), or by abort(3). Never blocked in a VMM: the kernel ends a
/// process whose thread has one of them blocked as it earns it, whatever handler there is (kernel/signal.c,
/// force_sig_info_to_task), and one that is sent would wait.
pub const FATAL: [c_int; 7] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGSYS, libc::SIGTRAP, libc::SIGABRT];

/// Takes a vCPU's thread out of KVM_RUN. Not one of the real-time signals: those are not sent (EAGAIN) once this user's
/// processes have used up what may be queued, RLIMIT_SIGPENDING (kernel/signal.c, __send_signal_locked).
pub const KICK: c_int = libc::SIGUSR1;

/// A set with these signals.
pub fn set_of<'a>(signals: impl IntoIterator<Item = &'a c_int>) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: a set of our own, initialised by the first call; a number that is no signal is not added.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

/// A set with all signals but these, and but those that the C library has for itself.
fn all_but<'a>(signals: impl IntoIterator<Item = &'a c_int>) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: as in `set_of`.
    unsafe {
        libc::sigfillset(set.as_mut_ptr());
        for signal in signals {
            libc::sigdelset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

fn set_mask(set: &libc::sigset_t) {
    // SAFETY: a valid set; of this thread only.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, set, std::ptr::null_mut()) };
}

/// On the first thread of a process, before there are others. Whoever has started it may have blocked any signal, which
/// exec hands on.
pub fn unblock(signals: &[c_int]) {
    // SAFETY: a valid set; of this thread only.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &set_of(signals), std::ptr::null_mut()) };
}

/// Makes the calling thread, the only one there is yet, the main thread of a VMM: what is sent to the process comes to
/// it, but `elsewhere`, which other threads wait for.
pub fn begin_main(elsewhere: &[c_int]) {
    set_mask(&set_of(elsewhere.iter().filter(|signal| !FATAL.contains(signal))));
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

    fn bits(signals: impl IntoIterator<Item = c_int>) -> u64 {
        signals.into_iter().fold(0, |mask, signal| mask | 1 << (signal - 1))
    }

    /// On a thread of its own, with all blocked that can be or nothing; and what the kernel and the C library let it
    /// block.
    fn on_a_thread<T: Send + 'static>(blocks: bool, act: impl FnOnce() -> T + Send + 'static) -> (u64, T) {
        let thread = std::thread::spawn(move || {
            set_mask(&all_but(&[]));
            let all = blocked();
            set_mask(&if blocks { all_but(&[]) } else { set_of(&[]) });
            (all, act())
        });
        thread.join().unwrap()
    }

    #[test]
    fn a_thread_takes_what_its_role_says_whoever_starts_it() {
        use Role::*;
        let roles = [Api, Boot, Control, KeeperWatch, Log, Populate, Spawner, Update, Vcpu(0), VcpuSpawner];
        for blocks in [true, false] {
            let masks = move || roles.map(|role| (role, spawn(role, blocked).unwrap().join().unwrap()));
            let (all, masks) = on_a_thread(blocks, masks);
            for (role, mask) in masks {
                let takes = if role == Vcpu(0) { vec![libc::SIGUSR1] } else { Vec::new() };
                assert_eq!(mask, all & !bits(FATAL.into_iter().chain(takes)), "{role}: {mask:#x}");
            }
        }
    }

    #[test]
    fn main_takes_what_nobody_waits_for() {
        for blocks in [true, false] {
            let begin = || {
                begin_main(&[libc::SIGTERM, libc::SIGCONT, libc::SIGABRT]);
                blocked()
            };
            assert_eq!(on_a_thread(blocks, begin).1, bits([libc::SIGTERM, libc::SIGCONT]));
        }
    }
}
