//! The host's side of the serial port: where its bytes go and come from.
//!
//! Nothing here blocks. What the other side has no room for waits in memory, up to [`UNSENT_MAX`]; beyond that the
//! newest bytes are dropped and counted. Input is never taken before the UART has room for it: what waits, waits in the
//! kernel, on an fd that survives an update.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::SocketFlags;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use theseus_resources::fd_store::{FdKind, FdStore, StoredFd};

use super::TROUBLE;
use super::stream::{Input, Stream};
use super::tty::{RawMode, is_anothers};

/// Output kept for a reader that does not keep up, in bytes.
pub const UNSENT_MAX: usize = 1 << 20;

/// How often a terminal that another job has is looked at: nothing tells when a job comes to the front.
const LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

pub(super) enum Backend {
    Null,
    Tty {
        input: Option<Stream>,
        output: Stream,
        raw: Option<RawMode>,
    },
    /// The slave is held open: the master of a pty whose slave nobody has open only reports a hang-up.
    Pty {
        master: Stream,
        slave: StoredFd,
        path: PathBuf,
    },
    File {
        file: Stream,
    },
    /// One client at a time, the next waits in the backlog. Without a client output is dropped.
    Socket {
        listener: StoredFd,
        client: Option<Stream>,
        path: PathBuf,
    },
}

pub struct Console {
    pub(super) backend: Backend,
    pub(super) fd_store: FdStore,
    pub(super) unsent: VecDeque<u8>,
    /// Bytes dropped because `unsent` was full, since the device was made.
    pub(super) dropped: u64,
    /// The input (not of a socket) has ended, or accept failed for a lasting reason: waiting for it would only spin.
    pub(super) deaf: bool,
    /// Another job has the terminal, so nothing can be read from it, and [`Self::look`] is waited for instead.
    pub(super) background: bool,
    /// Readable every [`LOOK`]; made when first needed, and kept, as the poller knows fds by their numbers.
    pub(super) look: Option<OwnedFd>,
}

impl Console {
    pub(super) fn new(backend: Backend, fd_store: FdStore) -> Self {
        let mut console =
            Self { backend, fd_store, unsent: VecDeque::new(), dropped: 0, deaf: false, background: false, look: None };
        console.has_terminal();
        console
    }

    /// Whether the input may be read now, as far as a shell's job control goes. A terminal that comes back to us is
    /// made raw.
    fn has_terminal(&mut self) -> bool {
        let Backend::Tty { input: Some(input), raw, .. } = &mut self.backend else { return true };
        let before = std::mem::replace(&mut self.background, is_anothers(input.as_fd()));
        match (before, self.background) {
            (_, true) if self.look.is_none() => match timer() {
                Ok(timer) => self.look = Some(timer),
                Err(error) => {
                    log::error!("serial: the terminal's input is lost: {error}");
                    self.deaf = true;
                }
            },
            (true, false) => match raw {
                Some(raw) => raw.renew(),
                None => *raw = RawMode::enter(input.kept().clone()).ok(),
            },
            _ => {}
        }
        !self.background
    }

    /// The slave's path, for a person to attach to.
    pub fn pty_path(&self) -> Option<&Path> {
        match &self.backend {
            Backend::Pty { path, .. } => Some(path),
            _ => None,
        }
    }

    fn output(&self) -> Option<&Stream> {
        match &self.backend {
            Backend::Null => None,
            Backend::Tty { output, .. } => Some(output),
            Backend::Pty { master, .. } => Some(master),
            Backend::File { file } => Some(file),
            Backend::Socket { client, .. } => client.as_ref(),
        }
    }

    fn input(&self) -> Option<&Stream> {
        match &self.backend {
            Backend::Null | Backend::File { .. } => None,
            Backend::Tty { input, .. } => input.as_ref(),
            Backend::Pty { master, .. } => Some(master),
            Backend::Socket { client, .. } => client.as_ref(),
        }
    }

    /// Sends `bytes` now if they can go now, or keeps them for [`Self::flush`].
    ///
    /// A client that waits is taken, and what has waited is sent first: the control loop, which does both, may be busy
    /// for seconds with an update's target, and the guest's output is not to stand still that long.
    pub(super) fn write(&mut self, bytes: &[u8]) {
        self.accept();
        self.flush();
        let Some(output) = self.output() else { return };
        let sent = if self.unsent.is_empty() { output.write(bytes) } else { Ok(0) };
        match sent {
            Ok(count) => self.keep(bytes.get(count..).unwrap_or_default()),
            Err(error) => self.lost(bytes.len(), error),
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let (kept, rest) = bytes.split_at(bytes.len().min(UNSENT_MAX.saturating_sub(self.unsent.len())));
        self.unsent.extend(kept);
        if !rest.is_empty() {
            if self.dropped == 0 {
                log::warn!("serial: nobody reads the output: what exceeds {UNSENT_MAX} bytes is dropped");
            }
            self.dropped = self.dropped.saturating_add(rest.len() as u64);
        }
    }

    /// Output that the other side will never take. A client that is gone is normal; its input may still be waiting, so
    /// only the end of that ends the connection.
    fn lost(&mut self, count: usize, error: Errno) {
        if !matches!(self.backend, Backend::Socket { .. }) {
            if self.dropped == 0 {
                log::warn!("serial: output is dropped: {error}");
            }
            self.dropped = self.dropped.saturating_add(count as u64);
        }
    }

    /// Sends what has waited, as far as it goes.
    pub(super) fn flush(&mut self) {
        while !self.unsent.is_empty() {
            let Some(output) = self.output() else { return self.unsent.clear() };
            match output.write(self.unsent.as_slices().0) {
                Ok(0) => return,
                Ok(count) => drop(self.unsent.drain(..count.min(self.unsent.len()))),
                Err(error) => {
                    self.lost(self.unsent.len(), error);
                    return self.unsent.clear();
                }
            }
        }
    }

    pub(super) fn read(&mut self, buf: &mut [u8]) -> Input {
        if let Some(timer) = &self.look {
            let _ = rustix::io::read(timer, &mut [0; 8]);
        }
        if self.deaf || !self.has_terminal() {
            return Input::Nothing;
        }
        match self.input().map_or(Input::Nothing, |input| input.read(buf)) {
            // It went to another job meanwhile.
            Input::Ended if !self.has_terminal() => Input::Nothing,
            input => input,
        }
    }

    /// After [`Input::Ended`].
    pub(super) fn hang_up(&mut self) {
        match &mut self.backend {
            Backend::Socket { client, .. } => {
                *client = None;
                self.unsent.clear();
            }
            _ => self.deaf = true,
        }
    }

    pub(super) fn lacks_client(&self) -> bool {
        matches!(self.backend, Backend::Socket { client: None, .. })
    }

    /// Takes a waiting client, if there is none yet.
    pub(super) fn accept(&mut self) {
        let Backend::Socket { listener, client: client @ None, path } = &mut self.backend else { return };
        let accepted = rustix::net::accept_with(&*listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
            .map(|fd| self.fd_store.keep("serial socket client", FdKind::Console, fd));
        match accepted {
            Ok(fd) => match Stream::new(fd) {
                Ok(stream) => {
                    *client = Some(stream);
                    self.deaf = false;
                }
                Err(error) => TROUBLE.warn(|| format!("serial socket {}: client refused: {error}", path.display())),
            },
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => self.deaf = false,
            Err(error) => {
                if !self.deaf {
                    let path = path.display();
                    TROUBLE.warn(|| format!("serial socket {path}: accept: {error}: trying again at the next output"));
                }
                self.deaf = true;
            }
        }
    }

    /// What to wait for: output that has waited, a client, and input if the UART wants it.
    pub(super) fn interest(&self, wants_input: bool) -> [Option<(BorrowedFd<'_>, EventFlags)>; 2] {
        let wants_input = wants_input && !self.deaf;
        let flags = |on: bool, flag: EventFlags| if on { flag } else { EventFlags::empty() };
        let input_fd = self.input().filter(|stream| stream.pollable()).map(AsFd::as_fd);
        let output_fd = self.output().filter(|stream| stream.pollable()).map(AsFd::as_fd);
        let (read, write) = (flags(wants_input, EventFlags::IN), flags(!self.unsent.is_empty(), EventFlags::OUT));
        match &self.backend {
            Backend::Null => [None, None],
            Backend::Socket { listener, client: None, .. } => {
                [Some((listener.as_fd(), flags(!self.deaf, EventFlags::IN))), None]
            }
            // One fd for both directions.
            Backend::Pty { .. } | Backend::Socket { .. } => [input_fd.map(|fd| (fd, read | write)), None],
            Backend::Tty { .. } | Backend::File { .. } => {
                let input_fd = if self.background { self.look.as_ref().map(AsFd::as_fd) } else { input_fd };
                [input_fd.map(|fd| (fd, read)), output_fd.map(|fd| (fd, write))]
            }
        }
    }
}

/// Readable every [`LOOK`].
fn timer() -> rustix::io::Result<OwnedFd> {
    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
    let every = Itimerspec { it_interval: LOOK, it_value: LOOK };
    rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &every)?;
    Ok(timer)
}
