//! A socket between two processes of a VM, over which words and file descriptors go (SCM_RIGHTS, unix(7)).
//!
//! Each message arrives whole or not at all. Descriptors of io_uring cannot travel.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};

/// Descriptors in one message (SCM_MAX_FD).
pub const FDS: usize = 253;
/// Bytes in one message.
const WORD: usize = 16 << 10;

/// One end of it. Dropped, the other end reads the end of the stream.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// Why a message was not sent or has not come.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// Its end was closed, as at its process' end.
    #[error("the other side is gone")]
    Gone,
    /// [`Channel::receive`] has waited so long.
    #[error("the other side has said nothing within {0:?}")]
    Silent(Duration),
    /// To be sent, or come: then its descriptors are closed.
    #[error("a message of more than {WORD} bytes, or {FDS} descriptors")]
    TooLong,
    /// What the kernel says of a call for it.
    #[error("the socket between the processes: {0}")]
    Os(#[from] io::Error),
}

impl From<rustix::io::Errno> for ChannelError {
    fn from(error: rustix::io::Errno) -> Self {
        match error {
            rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET => Self::Gone,
            // unix_attach_fds: more in flight than RLIMIT_NOFILE of this user allows.
            other => Self::Os(other.into()),
        }
    }
}

impl Channel {
    /// Two ends, both close-on-exec.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(a), Self(b)))
    }

    /// An end that was inherited.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Never waits: a message is far smaller than the buffer of a socket, and no more than a few are under way. One
    /// without bytes and descriptors would be read as the other side's end.
    ///
    /// # Errors
    /// Nothing is sent: the other side is gone, the message is too long, or its buffer is full (EAGAIN).
    pub fn send(&self, word: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        if word.len() > WORD || fds.len() > FDS {
            return Err(ChannelError::TooLong);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ChannelError::TooLong);
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            match rustix::net::sendmsg(&self.0, &[IoSlice::new(word)], &mut control, flags) {
                Err(rustix::io::Errno::INTR) => {}
                sent => return Ok(sent.map(drop)?),
            }
        }
    }

    /// The next message. Its descriptors are close-on-exec.
    ///
    /// # Errors
    /// [`ChannelError::Silent`] where none has come: it may come yet. After all others there is no more to hope for.
    pub fn receive(&self, within: Duration) -> Result<(Vec<u8>, Vec<OwnedFd>), ChannelError> {
        self.await_message(within)?;
        self.take()
    }

    fn await_message(&self, within: Duration) -> Result<(), ChannelError> {
        let until = Instant::now().checked_add(within);
        loop {
            let rest = until.map(|until| until.saturating_duration_since(Instant::now()));
            let timeout = rest.map(|rest| Timespec {
                tv_sec: i64::try_from(rest.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: rest.subsec_nanos().into(),
            });
            let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return Err(ChannelError::Silent(within)),
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The message that is there, or waits for it.
    fn take(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), ChannelError> {
        let mut word = vec![0; WORD];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            let mut parts = [IoSliceMut::new(&mut word)];
            match rustix::net::recvmsg(&self.0, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                got => break got?,
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if got.flags.intersects(rustix::net::ReturnFlags::TRUNC | rustix::net::ReturnFlags::CTRUNC) {
            return Err(ChannelError::TooLong);
        }
        if got.bytes == 0 && fds.is_empty() {
            return Err(ChannelError::Gone);
        }
        word.truncate(got.bytes);
        Ok((word, fds))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    #[test]
    fn words_and_descriptors_arrive_together() {
        let (a, b) = Channel::pair().unwrap();
        let file = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let id = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_ino;
        a.send(b"one", &[file.as_fd(), file.as_fd()]).unwrap();
        a.send(b"two", &[]).unwrap();
        let (word, fds) = b.receive(SOON).unwrap();
        assert_eq!((&word[..], fds.len(), id(fds[1].as_fd())), (&b"one"[..], 2, id(file.as_fd())));
        assert!(rustix::io::fcntl_getfd(&fds[0]).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        assert_eq!(b.receive(SOON).unwrap().0, b"two");
    }

    #[test]
    fn as_many_descriptors_as_one_message_holds() {
        let (a, b) = Channel::pair().unwrap();
        let file = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        a.send(b"x", &vec![file.as_fd(); FDS]).unwrap();
        assert_eq!(b.receive(SOON).unwrap().1.len(), FDS);
        assert!(matches!(a.send(b"x", &vec![file.as_fd(); FDS + 1]), Err(ChannelError::TooLong)));
        assert!(matches!(a.send(&[0; WORD + 1], &[]), Err(ChannelError::TooLong)));
    }

    #[test]
    fn silence_and_the_end_are_told_apart() {
        let (a, b) = Channel::pair().unwrap();
        assert!(matches!(b.receive(SOON), Err(ChannelError::Silent(_))));
        drop(a);
        assert!(matches!(b.receive(SOON), Err(ChannelError::Gone)));
        assert!(matches!(b.send(b"x", &[]), Err(ChannelError::Gone)));
    }
}
