//! The keeper's signals: those that end a VMM are the VMM's, and it is told of the ends of its children.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::signals::{is_ignored, read_all, set_of};

/// Handed on to the VMM, unless they were ignored when the keeper was started. Never those that stop a process, which
/// are for the keeper alone as for any parent: a shell sees it stop, and the guest goes on.
const FORWARDED: [libc::c_int; 7] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGABRT, libc::SIGUSR1, libc::SIGUSR2];

pub struct Signals {
    fd: OwnedFd,
    /// The mask of whoever started this process.
    before: libc::sigset_t,
}

impl Signals {
    /// Blocks them. exec keeps that, and what has come meanwhile.
    pub fn block() -> std::io::Result<Self> {
        let set = set_of(FORWARDED.into_iter().filter(|signal| !is_ignored(*signal)).chain([libc::SIGCHLD]));
        let mut before = set_of([].into_iter());
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

    /// In the VMM, which sets up its own: the mask is as it was before.
    pub fn give_back(self) {
        // SAFETY: a set that pthread_sigmask gave us.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.before, std::ptr::null_mut()) };
    }

    /// The signals that have come since the last call.
    pub fn read(&self) -> Vec<libc::c_int> {
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
