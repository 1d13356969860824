//! Holding the server still while another thread replaces the process.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, mpsc};
use std::thread::ThreadId;
use std::time::Duration;

use super::conn::{Conn, Phase};
use super::{ConnId, Control, Server, Shared};

/// Beyond the deadline, for the api thread to come round.
const GRACE: Duration = Duration::from_secs(1);

/// Why the server goes on, or cannot be frozen at all.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// It serves nobody any more.
    #[error("the api thread has ended: the API cannot be carried over")]
    Ended,
    /// After the deadline and a second.
    #[error("the api thread did not stop within {0:?}: is it frozen already?")]
    Stuck(Duration),
    /// It would wait for itself.
    #[error("the server cannot be frozen from its own thread: call freeze from the thread that updates")]
    OwnThread,
}

/// From [`Server::freeze`] to the api thread.
pub(super) struct Order {
    caller: Option<ConnId>,
    deadline: Duration,
    ready: mpsc::Sender<Snapshot>,
    /// Nothing is ever sent: it ends when the [`Frozen`] is dropped.
    thaw: mpsc::Receiver<()>,
}

#[derive(Default)]
struct Snapshot {
    caller: Option<Arc<Conn>>,
    idle: Vec<Arc<Conn>>,
    partial: usize,
    unanswered: Vec<ConnId>,
}

impl Snapshot {
    fn take(shared: &Shared, caller: Option<ConnId>) -> Self {
        let mut snapshot = Self::default();
        for (id, conn) in shared.conns().iter() {
            match conn.phase() {
                Phase::Idle => snapshot.idle.push(conn.clone()),
                Phase::Head | Phase::HeadEnd | Phase::Body(_) => snapshot.partial += 1,
                Phase::Working if Some(*id) == caller => snapshot.caller = Some(conn.clone()),
                Phase::Working | Phase::Answering { .. } => snapshot.unanswered.push(*id),
            }
        }
        snapshot
    }
}

/// The server, held still: nothing is accepted, read or written until this is dropped, which lets it go on as if
/// nothing had happened.
pub struct Frozen<'a> {
    server: &'a Server,
    snapshot: Snapshot,
    _thaw: mpsc::Sender<()>,
}

impl Frozen<'_> {
    /// The connections that stand between two requests: their fds are all there is to carry.
    pub fn idle(&self) -> impl Iterator<Item = (ConnId, BorrowedFd<'_>)> {
        self.snapshot.idle.iter().map(|c| (c.id(), c.as_fd()))
    }

    /// The connection of the caller, which waits for its answer; None if none was named or it waits no more.
    pub fn caller(&self) -> Option<BorrowedFd<'_>> {
        self.snapshot.caller.as_deref().map(AsFd::as_fd)
    }

    /// Whether the caller's connection is to be closed after that answer.
    pub fn caller_ends(&self) -> bool {
        self.snapshot.caller.as_deref().is_some_and(Conn::ends)
    }

    /// The socket on which it listens, for the next image. What connects meanwhile waits in its backlog.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.server.listener.as_fd()
    }

    /// Connections in the middle of a request that has not arrived whole. exec closes them.
    pub fn partial(&self) -> usize {
        self.snapshot.partial
    }

    /// Connections whose answer was not out by the deadline. exec closes them.
    pub fn unanswered(&self) -> &[ConnId] {
        &self.snapshot.unanswered
    }
}

impl Server {
    /// Stops reading and accepting, lets requests under way be answered until the deadline (all but that of `caller`),
    /// then holds the api thread still. Takes no longer than the deadline and a second.
    ///
    /// # Errors
    /// When the api thread does not respond; it then goes on serving.
    pub fn freeze(&self, caller: Option<ConnId>, deadline: Duration) -> Result<Frozen<'_>, FreezeError> {
        let own: Option<ThreadId> = self.thread.as_ref().map(|t| t.thread().id());
        if own == Some(std::thread::current().id()) {
            return Err(FreezeError::OwnThread);
        }
        let (ready, is_ready) = mpsc::channel();
        let (held, thaw) = mpsc::channel();
        let order = Order { caller, deadline, ready, thaw };
        self.control.send(Control::Freeze(order)).map_err(|_| FreezeError::Ended)?;
        let wait = deadline.saturating_add(GRACE);
        let snapshot = is_ready.recv_timeout(wait).map_err(|e| match e {
            mpsc::RecvTimeoutError::Timeout => FreezeError::Stuck(wait),
            mpsc::RecvTimeoutError::Disconnected => FreezeError::Ended,
        })?;
        Ok(Frozen { server: self, snapshot, _thaw: held })
    }
}

/// Shuts the gate and waits until no answer but that of `caller` is under way.
pub(super) async fn settle(shared: &Shared, caller: Option<ConnId>, deadline: Duration) {
    shared.gate.set_shut(true);
    let under_way = || {
        shared.conns().iter().any(|(id, conn)| match conn.phase() {
            Phase::Working => Some(*id) != caller,
            Phase::Answering { .. } => true,
            Phase::Idle | Phase::Head | Phase::HeadEnd | Phase::Body(_) => false,
        })
    };
    let settled = async {
        while under_way() {
            shared.gate.wait().await;
        }
    };
    if tokio::time::timeout(deadline, settled).await.is_err() {
        log::warn!("API: some requests were not answered within {deadline:?}");
    }
}

/// Carries out a freeze on the api thread, from the last answer to the thaw.
pub(super) async fn carry_out(shared: &Shared, order: Order) {
    let Order { caller, deadline, ready, thaw } = order;
    settle(shared, caller, deadline).await;
    if ready.send(Snapshot::take(shared, caller)).is_ok() {
        // Blocks the thread, and with it every connection: exec may come at any moment and must find nothing half done.
        let _ = thaw.recv();
    }
    shared.gate.set_shut(false);
    for conn in shared.conns().values() {
        conn.wake_reader();
    }
}
