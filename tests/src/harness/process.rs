//! The keeper of a VMM: our child, until its death in an update leaves the guest to its VMM alone.

use std::{
    io,
    os::unix::process::ExitStatusExt,
    process::{Child, ExitStatus},
    sync::Once,
};

pub struct Process {
    child: Child,
    /// The process that has taken over, and its end once that was seen.
    heir: Option<(u32, Option<ExitStatus>)>,
}

impl Process {
    pub fn new(child: Child) -> Self {
        Self { child, heir: None }
    }

    pub fn pid(&self) -> u32 {
        self.heir.map_or(self.child.id(), |(pid, _)| pid)
    }

    /// Makes orphans (VMMs whose keeper has died) ours, so that they can be waited for. To be called before the first
    /// is started.
    pub fn adopt_orphans() {
        static ONCE: Once = Once::new();
        // SAFETY: no memory is involved.
        ONCE.call_once(|| unsafe {
            libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
        });
    }

    /// From now on the VMM is `pid`; the one before has ended.
    pub fn follow(&mut self, pid: u32) -> io::Result<()> {
        if pid == self.pid() {
            return Ok(());
        }
        self.wait()?;
        self.heir = Some((pid, None));
        Ok(())
    }

    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.end(libc::WNOHANG)
    }

    pub fn wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.end(0)
    }

    fn end(&mut self, options: libc::c_int) -> io::Result<Option<ExitStatus>> {
        match &mut self.heir {
            None if options == 0 => self.child.wait().map(Some),
            None => self.child.try_wait(),
            Some((_, Some(status))) => Ok(Some(*status)),
            Some((pid, end)) => {
                let mut status = 0;
                // SAFETY: the kernel fills one int.
                match unsafe { libc::waitpid(*pid as libc::pid_t, &mut status, options) } {
                    0 => Ok(None),
                    -1 => Err(io::Error::last_os_error()),
                    _ => {
                        *end = Some(ExitStatus::from_raw(status));
                        Ok(*end)
                    }
                }
            }
        }
    }

    pub fn signal(&mut self, signal: libc::c_int) -> io::Result<()> {
        if self.try_wait()?.is_some() {
            return Ok(());
        }
        // SAFETY: our own child, not reaped yet.
        match unsafe { libc::kill(self.pid() as libc::pid_t, signal) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
