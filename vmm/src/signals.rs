//! The signals that the VMM acts on, as a file descriptor.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

const ACTED_ON: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD];

pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks these signals on the calling thread, whose mask the threads it starts inherit, and unblocks all others: exec leaves
    /// everything blocked. To be called first, on the main thread.
    pub fn new() -> std::io::Result<Self> {
        // SAFETY: plain old data, filled by the calls below.
        let mut set = unsafe { std::mem::zeroed::<libc::sigset_t>() };
        // SAFETY: `set` is a valid set throughout, and the signal numbers are constants.
        let fd = unsafe {
            libc::sigemptyset(&mut set);
            for signal in ACTED_ON {
                libc::sigaddset(&mut set, signal);
            }
            // Whoever started us may ignore it, which exec hands on: the kernel would then reap the rehearsals of updates itself.
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
            libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
            libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: just created.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The signals that have come since the last call.
    pub fn read(&self) -> Vec<libc::c_int> {
        let mut signals = Vec::new();
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        while rustix::io::read(&self.0, &mut info) == Ok(info.len()) {
            // ssi_signo is the first field.
            signals.push(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]));
        }
        signals
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
