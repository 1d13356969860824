//! A byte stream that never blocks its caller, whatever is behind its fd.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use theseus_resources::fd_store::StoredFd;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Socket,
    /// A terminal or a pipe, with O_NONBLOCK.
    Polled,
    /// A regular file or the like of /dev/null: always ready, unknown to epoll.
    Plain,
}

#[derive(Clone)]
pub(super) struct Stream {
    fd: StoredFd,
    kind: Kind,
}

/// What a read came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    Bytes(usize),
    Nothing,
    /// The other side has hung up: there will be no more.
    Ended,
}

impl Stream {
    pub(super) fn new(fd: StoredFd) -> std::io::Result<Self> {
        // No fstat: after an update a guest waits for this, and a file whose server is gone answers none.
        let kind = if rustix::net::sockopt::socket_type(&fd).is_ok() {
            Kind::Socket
        } else if rustix::pipe::fcntl_getpipe_size(&fd).is_ok() || rustix::termios::isatty(&fd) {
            Kind::Polled
        } else {
            Kind::Plain
        };
        if kind == Kind::Polled {
            let flags = rustix::fs::fcntl_getfl(&fd)?;
            if !flags.contains(OFlags::NONBLOCK) {
                rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
            }
        }
        Ok(Self { fd, kind })
    }

    pub(super) fn kept(&self) -> &StoredFd {
        &self.fd
    }

    /// Can epoll wait for it?
    pub(super) fn pollable(&self) -> bool {
        self.kind != Kind::Plain
    }

    /// How many bytes were taken; 0 when there is no room now.
    pub(super) fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        loop {
            let written = match self.kind {
                Kind::Socket => rustix::net::send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
                Kind::Polled | Kind::Plain => rustix::io::write(&self.fd, bytes),
            };
            match written {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(0),
                other => return other,
            }
        }
    }

    /// `buf` must not be empty.
    pub(super) fn read(&self, buf: &mut [u8]) -> Input {
        loop {
            let read = match self.kind {
                Kind::Socket => rustix::net::recv(&self.fd, &mut *buf, RecvFlags::DONTWAIT).map(|(n, _)| n),
                Kind::Polled | Kind::Plain => rustix::io::read(&self.fd, &mut *buf),
            };
            match read {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Input::Nothing,
                Ok(0) | Err(_) => return Input::Ended,
                Ok(count) => return Input::Bytes(count),
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
