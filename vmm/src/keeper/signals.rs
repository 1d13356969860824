//! The keeper's signals: those that end a VMM are the VMM's, and it is told of the ends of its children.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use theseus_resources::threads::{FATAL, set_of};

use crate::signals::{is_ignored, read_all};

/// Handed on to the VMM, unless they were ignored when the keeper was started. Never those that stop a process, which
/// are for the keeper alone as for any parent: a shell sees it stop, and the guest goes on. ABRT is the only one that
/// is fatal and blocked, here and nowhere else: abort(3) unblocks it, and from anybody else it is meant for the guest.
const FORWARDED: [libc::c_int; 7] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGABRT, libc::SIGUSR1, libc::SIGUSR2];

pub(super) struct Signals {
    fd: OwnedFd,
    /// The mask of whoever started this process.
    before: libc::sigset_t,
}

impl Signals {
    /// Blocks them. exec keeps that, and what has come meanwhile.
    pub(super) fn block() -> std::io::Result<Self> {
        let set = set_of(FORWARDED.iter().filter(|signal| !is_ignored(**signal)).chain([&libc::SIGCHLD]));
        let mut before = set_of([]);
        // SAFETY: valid sets, and constant signal numbers.
        let fd = unsafe {
            // Whoever started us may ignore it, which exec hands on: the kernel would then reap the VMM itself.
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, &mut before);
            libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: just created.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, before })
    }

    /// In the VMM, which sets up its own: the mask is as it was before, but nothing that is fatal is blocked. It would
    /// be in an update, where what was before is the mask of the keeper that has become this program.
    pub(super) fn give_back(self) {
        let Self { fd: _, mut before } = self;
        // SAFETY: a set that pthread_sigmask gave us, and constant signal numbers.
        unsafe {
            for signal in FATAL {
                libc::sigdelset(&mut before, signal);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        }
    }

    /// The signals that have come since the last call.
    pub(super) fn read(&self) -> Vec<libc::c_int> {
        read_all(self.fd.as_fd())
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_blocked(signal: libc::c_int) -> bool {
        let mut now = set_of([]);
        // SAFETY: a valid set, which the first call fills in; nothing is changed.
        unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut now);
            libc::sigismember(&now, signal) == 1
        }
    }

    /// On a thread of its own, whose mask it changes.
    #[test]
    fn a_vmm_blocks_nothing_that_is_fatal_from_its_fork_on() {
        let thread = std::thread::spawn(|| {
            let all = set_of(&(1..=31).collect::<Vec<_>>());
            // SAFETY: a valid set, and the mask of this thread.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut()) };
            let signals = Signals::block().unwrap();
            assert!(is_blocked(libc::SIGABRT));
            signals.give_back();
            (FATAL.map(is_blocked), is_blocked(libc::SIGUSR2))
        });
        assert_eq!(thread.join().unwrap(), ([false; 7], true));
    }
}
