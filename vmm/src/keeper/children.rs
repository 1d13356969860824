//! The start and the end of the keeper's children.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use theseus_resources::Channel;

use super::signals::Signals;
use super::{Keeper, Vmm, pidfd};

/// Whom a fork returns to.
pub(super) enum Fork {
    Parent(Vmm, OwnedFd),
    Child(Keeper),
}

/// Starts a VMM, with a link to this process.
pub(super) fn fork() -> std::io::Result<Fork> {
    let (ours, theirs) = Channel::pair()?;
    let keeper = std::process::id();
    // SAFETY: this process has one thread, so the child's memory is whole: it may do whatever this one may.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(std::io::Error::last_os_error()),
        0 => {
            drop(ours);
            let _ = rustix::thread::set_name(c"theseus-vmm");
            Ok(Fork::Child(Keeper::new(theirs, keeper)))
        }
        pid => {
            drop(theirs);
            let vmm = Vmm { pid, link: ours };
            match pidfd(pid) {
                Ok(fd) => Ok(Fork::Parent(vmm, fd)),
                Err(error) => {
                    kill(pid);
                    Err(error)
                }
            }
        }
    }
}

/// A child that has ended, if there is one, and its status. Of whomever's: as PID 1 of a container this process
/// inherits strangers.
pub(super) fn next_end() -> Option<(libc::pid_t, libc::c_int)> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel fills in one status.
        match unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) } {
            0 => return None,
            -1 if std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
            -1 => return None,
            pid => return Some((pid, status)),
        }
    }
}

/// Waits for a signal: a child has closed its link, and is ending.
pub(super) fn await_end(signals: &Signals) {
    let _ = rustix::event::poll(&mut [PollFd::new(&signals.as_fd(), PollFlags::IN)], None);
}

/// Ends a child, and waits until it has given everything back.
pub(super) fn kill(pid: libc::pid_t) {
    // SAFETY: a child that was not reaped: its number is its own.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        while libc::waitpid(pid, std::ptr::null_mut(), 0) < 0
            && std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR)
        {}
    }
}

/// The keeper ends as its VMM has.
pub(super) fn end_as(status: libc::c_int) -> ! {
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        // SAFETY: our own disposition and mask; no thread is left that could mind.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            let mut all = std::mem::MaybeUninit::uninit();
            libc::sigfillset(all.as_mut_ptr());
            libc::sigprocmask(libc::SIG_UNBLOCK, all.as_ptr(), std::ptr::null_mut());
            libc::raise(signal);
            // PID 1 of a container is not ended by its own signals.
            libc::_exit(128 + signal)
        }
    }
    // SAFETY: ends the process. Nothing is to be flushed: the keeper has said nothing.
    unsafe { libc::_exit(libc::WEXITSTATUS(status)) }
}
