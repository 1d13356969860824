//! Signals: those that end the VMM in order, as a file descriptor, and those that must do nothing.
//!
//! Of all whose default is to end or to stop a process (signal(7)), these can come from a limit, a peer or a terminal.
//! ALRM, VTALRM, PROF and IO come only to who has asked for them, STOP and TSTP stand for somebody's wish, and USR1 and
//! USR2 are nobody's here but an operator's.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use theseus_resources::threads::{self, FATAL, set_of};

/// End the VMM in order, unless whoever started it has them ignored: nohup(1) does that with HUP, a shell without job
/// control with INT and QUIT for what it starts in the background. exec keeps that, and we never ignore one of these
/// ourselves: so what an image finds ignored was so when the first one was started.
const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Ignored in every image, by whatever these were before. The call that met the limit or the terminal then says so:
/// EFBIG at RLIMIT_FSIZE, EPIPE where a reader is gone, EIO for reading from a terminal in the background. RLIMIT_CPU
/// and RLIMIT_RTTIME have a hard limit to end by.
const IGNORED: [libc::c_int; 5] = [libc::SIGXFSZ, libc::SIGXCPU, libc::SIGPIPE, libc::SIGTTIN, libc::SIGTTOU];

pub(crate) struct Signals(OwnedFd);

/// First of all, in every image. Not ABRT: one for the VMM may be waiting over the keeper's exec.
pub(crate) fn unblock_faults() {
    threads::unblock(&FATAL.into_iter().filter(|signal| *signal != libc::SIGABRT).collect::<Vec<_>>());
}

/// First of all: no file can be written to safely before.
pub(crate) fn ignore_limits() {
    for signal in IGNORED {
        // SAFETY: a constant signal number, and no handler of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Limits that end the process sooner or later, whatever it does.
pub(crate) fn warn_of_limits() {
    use rustix::process::{Resource, getrlimit};
    for (limit, name, option) in [
        (getrlimit(Resource::Cpu).maximum, "RLIMIT_CPU", "ulimit -t unlimited, or LimitCPU=infinity"),
        (getrlimit(Resource::Rttime).maximum, "RLIMIT_RTTIME", "ulimit -R unlimited, or LimitRTTIME=infinity"),
    ] {
        if let Some(limit) = limit {
            log::warn!("{name} is {limit}: the kernel will kill the VMM, and the guest, when it is reached: {option}");
        }
    }
}

impl Signals {
    /// From now on those that the VMM acts on wait to be read. To be called on the main thread, before there are
    /// others.
    pub(crate) fn new() -> std::io::Result<Self> {
        let ending: Vec<_> = ENDING.into_iter().filter(|signal| !is_ignored(*signal)).collect();
        // SIGCONT: see keeper::watch.
        threads::begin_main(&[&ending[..], &[libc::SIGCONT]].concat());
        // SAFETY: a valid set, and constant signal numbers.
        let fd = unsafe {
            // Whoever started us may ignore it, which exec hands on: the kernel would then reap the rehearsals of
            // updates itself.
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
            libc::signalfd(-1, &set_of(&ending), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: just created.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The signals that have come since the last call.
    pub(crate) fn read(&self) -> Vec<libc::c_int> {
        read_all(self.0.as_fd())
    }
}

/// Those that have come to a signalfd that does not block.
pub(crate) fn read_all(signalfd: BorrowedFd<'_>) -> Vec<libc::c_int> {
    let mut signals = Vec::new();
    let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
    while rustix::io::read(signalfd, &mut info) == Ok(info.len()) {
        // ssi_signo is the first field.
        signals.push(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]));
    }
    signals
}

/// One that is ignored and blocked would be queued all the same, and read from a signalfd (kernel/signal.c,
/// sig_ignored).
pub(crate) fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: nothing is changed, and the kernel fills the struct where it returns 0; all zeroes are one too.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
