//! One connection: where it stands between requests, and a socket that reads no further than the present request.
//!
//! ```text
//!     Idle --first byte--> Head --blank line--> HeadEnd --parsed--> Body --all of it--> Working
//!      ^                                                                                   |
//!      '------------------ flushed ------------------ Answering <------- reply ------------'
//! ```
//!
//! Bytes of the head are looked at with MSG_PEEK and taken up to the blank line; of the body, as many as it has. So in
//! Idle and Working nothing of a later request has been read, and the fd alone is enough to serve the connection on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use rustix::net::{RecvFlags, Shutdown};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};

use super::ConnId;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Idle,
    Head,
    HeadEnd,
    /// Bytes still to be read; None for a chunked body, whose end only the parser sees.
    Body(Option<u64>),
    /// The request is with the backend.
    Working,
    /// `begun` once a byte is written.
    Answering {
        begun: bool,
    },
}

/// Shut, it keeps every connection from reading. Also tells the main task that some connection's phase has changed.
pub(super) struct Gate {
    shut: AtomicBool,
    notify: Notify,
    patience: Duration,
}

impl Gate {
    /// `patience` is how long a client may take to send a request, or to read an answer.
    pub(super) fn new(patience: Duration) -> Self {
        Self { shut: AtomicBool::new(false), notify: Notify::new(), patience }
    }

    pub(super) fn set_shut(&self, shut: bool) {
        self.shut.store(shut, Ordering::Relaxed);
    }

    pub(super) fn changed(&self) {
        self.notify.notify_one();
    }

    pub(super) async fn wait(&self) {
        self.notify.notified().await;
    }
}

struct State {
    phase: Phase,
    /// When it came, or its last request ended.
    idle_since: Instant,
    scanner: HeadScanner,
    /// Whether it ends after the answer to the request that it is at.
    ends: bool,
    /// The task, when a read had to wait for something else than the socket.
    reader: Option<Waker>,
}

pub(super) struct Conn {
    id: ConnId,
    stream: UnixStream,
    gate: Arc<Gate>,
    state: Mutex<State>,
}

impl Conn {
    pub(super) fn new(id: ConnId, stream: UnixStream, gate: Arc<Gate>) -> Self {
        let (idle_since, scanner) = (Instant::now(), HeadScanner::default());
        let state = State { phase: Phase::Idle, idle_since, scanner, ends: false, reader: None };
        Self { id, stream, gate, state: Mutex::new(state) }
    }

    pub(super) fn id(&self) -> ConnId {
        self.id
    }

    pub(super) fn patience(&self) -> Duration {
        self.gate.patience
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn phase(&self) -> Phase {
        self.state().phase
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        let mut state = self.state();
        state.phase = phase;
        if phase == Phase::Idle {
            state.scanner = HeadScanner::default();
            state.idle_since = Instant::now();
            // hyper asks for the next head before the last flush is through, and would not ask again.
            if let Some(reader) = state.reader.take() {
                reader.wake();
            }
        }
        drop(state);
        self.gate.changed();
    }

    pub(super) fn set_ends(&self, ends: bool) {
        self.state().ends = ends;
    }

    pub(super) fn ends(&self) -> bool {
        self.state().ends
    }

    /// Since when it stands between two requests, with none waiting to be read.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let state = self.state();
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let empty = || matches!(rustix::net::recv(&self.stream, &mut [0u8; 1], flags), Err(rustix::io::Errno::AGAIN));
        (state.phase == Phase::Idle && empty()).then_some(state.idle_since)
    }

    /// Ends it: its client sees the end of the stream, and its task too.
    pub(super) fn close(&self) {
        if let Err(e) = rustix::net::shutdown(&self.stream, Shutdown::Both) {
            log::debug!("API: connection {} cannot be closed: {e}", self.id.0);
        }
    }

    pub(super) fn wake_reader(&self) {
        if let Some(reader) = self.state().reader.take() {
            reader.wake();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// One read from the socket, no further than the phase allows. 0 is the end of the stream.
    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let mut state = self.state();
        match state.phase {
            Phase::Idle | Phase::Head => {
                let (_, seen) = rustix::net::recv(&self.stream, &mut *buf, RecvFlags::PEEK)?;
                let take = state.scanner.clone().feed(&buf[..seen]).unwrap_or(seen);
                let (_, got) = rustix::net::recv(&self.stream, &mut buf[..take], RecvFlags::empty())?;
                if got > 0 {
                    let ended = state.scanner.feed(&buf[..got]).is_some();
                    state.phase = if ended { Phase::HeadEnd } else { Phase::Head };
                }
                Ok(got)
            }
            // The parser and we do not agree where the head ends: rather close than wait for what never comes.
            Phase::HeadEnd => Err(io::Error::new(io::ErrorKind::InvalidData, "the head of the request is malformed")),
            Phase::Body(left) => {
                let most = left.map_or(buf.len(), |n| usize::try_from(n).unwrap_or(usize::MAX).min(buf.len()));
                let (_, got) = rustix::net::recv(&self.stream, &mut buf[..most], RecvFlags::empty())?;
                state.phase = Phase::Body(left.map(|n| n.saturating_sub(got as u64)));
                Ok(got)
            }
            Phase::Working | Phase::Answering { .. } => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl AsFd for Conn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Finds the blank line that ends a head, over any number of pieces.
#[derive(Clone, Default)]
struct HeadScanner {
    /// Blank lines before the request line do not count (RFC 9112, 2.2).
    begun: bool,
    line_has_bytes: bool,
}

impl HeadScanner {
    /// Returns how many of `bytes` belong to the head, once its end is among them.
    fn feed(&mut self, bytes: &[u8]) -> Option<usize> {
        for (i, byte) in bytes.iter().enumerate() {
            match byte {
                b'\r' => {}
                b'\n' if self.begun && !self.line_has_bytes => return Some(i + 1),
                b'\n' => self.line_has_bytes = false,
                _ => (self.begun, self.line_has_bytes) = (true, true),
            }
        }
        None
    }
}

/// The connection as hyper sees it.
pub(super) struct Socket {
    conn: Arc<Conn>,
    timer: Pin<Box<Sleep>>,
}

impl Socket {
    pub(super) fn new(conn: Arc<Conn>) -> Self {
        let timer = Box::pin(tokio::time::sleep(conn.patience()));
        Self { conn, timer }
    }

    fn restart_timer(&mut self) {
        let patience = self.conn.patience();
        self.timer.as_mut().reset(Instant::now() + patience);
    }

    fn check_timer(&mut self, cx: &mut Context<'_>, what: &str) -> io::Result<()> {
        match self.timer.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the {what} has taken more than {:?}", self.conn.patience()),
            )),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let phase = {
            let mut state = this.conn.state();
            let waits = matches!(state.phase, Phase::Working | Phase::Answering { .. } | Phase::Body(Some(0)));
            if waits || this.conn.gate.shut.load(Ordering::Relaxed) {
                state.reader = Some(cx.waker().clone());
                return Poll::Pending;
            }
            state.phase
        };
        if phase != Phase::Idle {
            this.check_timer(cx, "request")?;
        }
        loop {
            ready!(this.conn.stream.poll_read_ready(cx))?;
            let conn = this.conn.clone();
            match conn.stream.try_io(Interest::READABLE, || conn.read(buf.initialize_unfilled())) {
                Ok(n) => {
                    buf.advance(n);
                    if phase == Phase::Idle && n > 0 {
                        this.restart_timer();
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        match this.conn.phase() {
            // hyper's own answer to a head it cannot parse has no body: `http::serve` answers instead.
            Phase::Idle | Phase::Head | Phase::HeadEnd => return Poll::Ready(Ok(buf.len())),
            Phase::Answering { begun: false } => {
                this.restart_timer();
                this.conn.set_phase(Phase::Answering { begun: true });
            }
            Phase::Answering { begun: true } | Phase::Body(_) | Phase::Working => {}
        }
        this.check_timer(cx, "answer")?;
        loop {
            ready!(this.conn.stream.poll_write_ready(cx))?;
            match this.conn.stream.try_write(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    /// hyper flushes when all of an answer is written, so this is the end of the request.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.conn.phase() == (Phase::Answering { begun: true }) {
            self.conn.set_phase(Phase::Idle);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // In the middle of a head the answer is still to come from `http::serve`.
        if !matches!(self.conn.phase(), Phase::Head | Phase::HeadEnd) {
            rustix::net::shutdown(&self.conn.stream, Shutdown::Write)?;
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::HeadScanner;

    #[test]
    fn the_head_ends_at_the_blank_line() {
        let table: &[(&[u8], Option<usize>)] = &[
            (b"", None),
            (b"GET / HTTP/1.1\r\n\r\nX", Some(18)),
            (b"GET / HTTP/1.1\n\nX", Some(16)),
            (b"\r\n\r\nGET / HTTP/1.1\r\nA: b\r\n\r\nbody", Some(28)),
            (b"GET / HTTP/1.1\r\nA: b\r\n", None),
            (b"\r\n\r\n\r\n", None),
        ];
        for (bytes, end) in table {
            assert_eq!(HeadScanner::default().feed(bytes), *end);
            let mut one_by_one = HeadScanner::default();
            let found = bytes.iter().position(|b| one_by_one.feed(&[*b]).is_some());
            assert_eq!(found.map(|i| i + 1), *end);
        }
    }
}
