//! A child that is run to its end.

use std::process::{Command, ExitStatus};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};
use rustix::thread::CapabilitySet;

/// What it was.
pub(crate) struct Ended {
    pub status: ExitStatus,
    /// The effective ones that it had: what the kernel has given to its program at exec, as no program that we run
    /// gives up any.
    pub capabilities: CapabilitySet,
}

/// Whether a child of ours ends within `patience`. Does not reap it.
fn ends_within(pid: libc::pid_t, patience: Duration) -> std::io::Result<bool> {
    let pid = Pid::from_raw(pid).ok_or(std::io::ErrorKind::InvalidInput)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let timeout = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: patience.subsec_nanos().into() };
    loop {
        match rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Runs `command` to its end, or kills it when `patience` is over (`None`). On the main thread, which has no filters.
pub(crate) fn run_child(mut command: Command, patience: Duration) -> std::io::Result<Option<Ended>> {
    let mut child = command.spawn()?;
    let ended = ends_within(child.id() as libc::pid_t, patience)?;
    if !ended {
        child.kill()?;
    }
    // While nobody has reaped it: it still has its credentials then. Not before its end, as the spawn may return in the
    // middle of its exec.
    let sets = Pid::from_raw(child.id() as libc::pid_t).map(|pid| rustix::thread::capabilities(Some(pid))).transpose();
    let status = child.wait()?;
    let capabilities = sets?.map_or(CapabilitySet::empty(), |sets| sets.effective);
    Ok(ended.then_some(Ended { status, capabilities }))
}
