//! One epoll instance over the console's fds. The control loop watches only this one, so that a vCPU thread can change
//! what is waited for without waking it, and a reused fd number means nothing outside.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;

pub(super) struct Poller {
    epoll: OwnedFd,
    watched: Vec<(RawFd, EventFlags)>,
}

impl Poller {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)?, watched: Vec::new() })
    }

    /// Waits for exactly `wanted` from now on. An fd without flags is not watched at all: epoll would report its
    /// hang-up all the same, over and over.
    pub(super) fn watch(&mut self, wanted: &[Option<(BorrowedFd<'_>, EventFlags)>]) {
        let Self { epoll, watched } = self;
        watched.retain(|(raw, _)| {
            let stays = wanted.iter().flatten().any(|(fd, flags)| fd.as_raw_fd() == *raw && !flags.is_empty());
            if !stays {
                // SAFETY: used for one epoll_ctl, which answers EBADF or ENOENT if the fd was closed meanwhile.
                let gone = unsafe { BorrowedFd::borrow_raw(*raw) };
                report(epoll::delete(&*epoll, gone));
            }
            stays
        });
        for (fd, flags) in wanted.iter().flatten().filter(|(_, flags)| !flags.is_empty()) {
            let data = EventData::new_u64(0);
            match watched.iter_mut().find(|(raw, _)| *raw == fd.as_raw_fd()) {
                Some((_, now)) if now == flags => {}
                Some((_, now)) => {
                    report(epoll::modify(&*epoll, fd, data, *flags));
                    *now = *flags;
                }
                None => {
                    report(epoll::add(&*epoll, fd, data, *flags));
                    watched.push((fd.as_raw_fd(), *flags));
                }
            }
        }
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

fn report(result: rustix::io::Result<()>) {
    match result {
        Ok(()) | Err(Errno::BADF | Errno::NOENT) => {}
        Err(error) => super::TROUBLE.warn(|| format!("serial: epoll_ctl: {error}: its input or output may stall")),
    }
}
