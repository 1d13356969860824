//! The REST server: HTTP/1.1 on a unix socket, one thread named `api`.
//!
//! An update replaces the process under open connections, so the server can be frozen: it stops reading, says which
//! connections stand between two requests, and the new image serves those on, by their fds. That works because a
//! connection reads only the request it is working on (see `conn`): what a client sent ahead stays in the kernel.

mod conn;
mod freeze;
mod http;

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use theseus_resources::rate::Rate;
use theseus_resources::socket::{self, Peer};
use theseus_resources::threads::{self, Role};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::access::Peers;
use crate::endpoint::Request;
use crate::reply::{ApiError, Reply};
use conn::{Conn, Gate};
pub use freeze::{FreezeError, Frozen};

/// Connections served at a time. One more takes the place of the one that has been idle for longest; where none is
/// idle, it is answered 429.
pub const MAX_CONNECTIONS: usize = 64;

/// Connections that are turned away at a time, with an answer to their request; more are only closed.
const MAX_REFUSED: usize = 16;

/// How long one that is turned away may take for its request and the answer.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(5);

/// After an accept that failed, doubled with each that fails again.
const BACK_OFF: Duration = Duration::from_millis(100);
const BACK_OFF_MAX: Duration = Duration::from_secs(2);

/// Log lines that a client, or a lack of fds, can provoke.
static REFUSED: Rate = Rate::new(5, Duration::from_secs(60));
static ACCEPT: Rate = Rate::new(5, Duration::from_secs(60));

/// How long a client may take to send a request, or to read an answer. A connection may be idle for ever.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long [`Server::stop`] waits for answers under way.
const STOP_WAIT: Duration = Duration::from_secs(1);

/// Names a connection as long as its server lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnId(u64);

/// Who carries out the requests.
pub trait Backend: Send + Sync + 'static {
    /// Takes a request over. Called on the api thread, so it must not block: the answer comes later, through `reply`.
    fn submit(&self, request: Request, reply: ReplyTo);
}

/// The way back to the client of one request. Dropped unsent, it answers 500.
#[derive(Debug)]
pub struct ReplyTo {
    connection: ConnId,
    sender: oneshot::Sender<Reply>,
}

impl ReplyTo {
    fn new(connection: ConnId) -> (Self, oneshot::Receiver<Reply>) {
        let (sender, receiver) = oneshot::channel();
        (Self { connection, sender }, receiver)
    }

    /// Answers. A client that has hung up is no error.
    pub fn send(self, reply: Reply) {
        if self.sender.send(reply).is_err() {
            log::debug!("API: connection {} is gone, its answer is dropped", self.connection.0);
        }
    }

    /// The connection that waits for the answer, see [`Server::freeze`].
    pub fn connection(&self) -> ConnId {
        self.connection
    }
}

/// A connection taken over from the image before.
#[derive(Debug)]
pub struct KeptConnection {
    /// Its last request was read whole; what its client has sent since is still in it.
    pub stream: UnixStream,
    /// The answer its client still waits for.
    pub answer: Option<Reply>,
    /// Whether it ends after that answer, as its client has asked for with its request ([`Frozen::caller_ends`]).
    pub ends: bool,
}

enum Control {
    Freeze(freeze::Order),
    Stop,
}

/// What the api thread and its connections share.
struct Shared {
    gate: Arc<Gate>,
    conns: Mutex<HashMap<ConnId, Arc<Conn>>>,
    next_id: AtomicU64,
    backend: Arc<dyn Backend>,
    peers: Peers,
    /// Connections that are being turned away.
    refused: AtomicUsize,
}

impl Shared {
    fn conns(&self) -> MutexGuard<'_, HashMap<ConnId, Arc<Conn>>> {
        self.conns.lock()
    }

    /// Takes a new connection, if its client may use the API.
    fn accept(self: &Arc<Self>, stream: tokio::net::UnixStream) {
        match Peer::of(&stream) {
            Ok(peer) if self.peers.admit(&peer) => self.adopt(stream, None, false),
            Ok(Peer { uid, .. }) => {
                REFUSED.warn(|| format!("API: user {uid} is refused: --api-uid {uid} would let them in"));
                let cause = format!("user {uid} may not use this API: the VMM's user, root and those of --api-uid may");
                self.refuse(stream, ApiError::forbidden(cause));
            }
            Err(e) => REFUSED.warn(|| format!("API: a client is refused, as who it is cannot be found out: {e}")),
        }
    }

    /// Serves a connection in a task of its own.
    fn adopt(self: &Arc<Self>, stream: tokio::net::UnixStream, answer: Option<Reply>, ends: bool) {
        if self.conns().len() >= MAX_CONNECTIONS && !self.close_an_idle_one() {
            let cause = format!("{MAX_CONNECTIONS} requests are being served: try again later");
            return self.refuse(stream, ApiError::busy(cause));
        }
        let conn = self.connection(stream);
        self.conns().insert(conn.id(), conn.clone());
        tokio::spawn(http::serve(Registered { shared: self.clone(), conn, refusal: None }, answer, ends));
    }

    fn connection(&self, stream: tokio::net::UnixStream) -> Arc<Conn> {
        let id = ConnId(self.next_id.fetch_add(1, Ordering::Relaxed));
        Arc::new(Conn::new(id, stream, self.gate.clone()))
    }

    /// Makes room: clients keep connections open for a next request that may never come. Whether there was one.
    fn close_an_idle_one(&self) -> bool {
        let mut conns = self.conns();
        let idle = conns.values().filter_map(|conn| Some((conn.idle_since()?, conn.clone())));
        let Some((_, oldest)) = idle.min_by_key(|(since, _)| *since) else { return false };
        oldest.close();
        conns.remove(&oldest.id());
        true
    }

    /// Reads a request and answers it with `refusal`: many clients do not look for an answer before they have sent all
    /// they have, and take a socket that is closed before for a server that is gone.
    fn refuse(self: &Arc<Self>, stream: tokio::net::UnixStream, refusal: ApiError) {
        if self.refused.fetch_add(1, Ordering::Relaxed) >= MAX_REFUSED {
            self.refused.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let entry = Registered { shared: self.clone(), conn: self.connection(stream), refusal: Some(refusal) };
        tokio::spawn(tokio::time::timeout(REFUSAL_PATIENCE, http::serve(entry, None, false)));
    }
}

/// A connection while its task lives: its entry in the table of connections goes with it, panics included.
struct Registered {
    shared: Arc<Shared>,
    conn: Arc<Conn>,
    /// It is not in the table, and this is the answer to its one request.
    refusal: Option<ApiError>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.refusal.is_some() {
            self.shared.refused.fetch_sub(1, Ordering::Relaxed);
        } else {
            self.shared.conns().remove(&self.conn.id());
        }
        self.shared.gate.changed();
    }
}

/// The running server. Dropping it closes all connections without waiting.
pub struct Server {
    listener: Arc<tokio::net::UnixListener>,
    control: mpsc::UnboundedSender<Control>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts the api thread. `kept` are connections from the image before: those with an answer get it first.
    ///
    /// All fds are made close-on-exec and non-blocking.
    ///
    /// # Errors
    /// When the event loop or the thread cannot be made; `kept` are closed then.
    pub fn start(listener: UnixListener, kept: Vec<KeptConnection>, backend: Arc<dyn Backend>) -> io::Result<Self> {
        Self::start_for(Peers::default(), listener, kept, backend)
    }

    /// The same for more than root and this process' own user. Connections that are kept have been let in already.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn start_for(
        peers: Peers,
        listener: UnixListener,
        kept: Vec<KeptConnection>,
        backend: Arc<dyn Backend>,
    ) -> io::Result<Self> {
        Self::with_patience(peers, listener, kept, backend, PATIENCE)
    }

    fn with_patience(
        peers: Peers,
        listener: UnixListener,
        kept: Vec<KeptConnection>,
        backend: Arc<dyn Backend>,
        patience: Duration,
    ) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let entered = runtime.enter();
        prepare(&listener)?;
        listener.set_nonblocking(true)?;
        let listener = Arc::new(tokio::net::UnixListener::from_std(listener)?);
        let mut adopted = Vec::new();
        for KeptConnection { stream, answer, ends } in kept {
            prepare(&stream)?;
            stream.set_nonblocking(true)?;
            adopted.push((tokio::net::UnixStream::from_std(stream)?, answer, ends));
        }
        drop(entered);

        let shared = Arc::new(Shared {
            gate: Arc::new(Gate::new(patience)),
            conns: Mutex::default(),
            next_id: AtomicU64::new(1),
            backend,
            peers,
            refused: AtomicUsize::new(0),
        });
        let (control, orders) = mpsc::unbounded_channel();
        let accepting = listener.clone();
        let thread = threads::spawn(Role::Api, move || {
            runtime.block_on(async {
                for (stream, answer, ends) in adopted {
                    shared.adopt(stream, answer, ends);
                }
                run(accepting, shared, orders).await;
            })
        });
        Ok(Self { listener, control, thread: Some(thread?) })
    }

    /// Stops the server, after the answers under way are out (for a second at most). The socket's path stays.
    pub fn stop(mut self) {
        // A failed send means that the thread has ended already.
        let _ = self.control.send(Control::Stop);
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            log::error!("API: the api thread had panicked");
        }
    }
}

fn prepare(fd: &impl AsFd) -> io::Result<()> {
    Ok(rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)?)
}

/// The main task of the api thread.
async fn run(
    listener: Arc<tokio::net::UnixListener>,
    shared: Arc<Shared>,
    mut orders: mpsc::UnboundedReceiver<Control>,
) {
    // The reason why accept fails, such as no free fd, lasts for a while: we do not spin on it.
    let (mut not_before, mut back_off) = (Instant::now(), BACK_OFF);
    loop {
        let accept = async {
            tokio::time::sleep_until(not_before).await;
            listener.accept().await
        };
        tokio::select! {
            biased;
            order = orders.recv() => match order {
                Some(Control::Freeze(order)) => freeze::carry_out(&shared, order).await,
                Some(Control::Stop) => return freeze::settle(&shared, None, STOP_WAIT).await,
                None => return,
            },
            accepted = accept => match accepted {
                Ok((stream, _)) => {
                    back_off = BACK_OFF;
                    shared.accept(stream);
                }
                Err(e) => {
                    ACCEPT.warn(|| format!("API: accept failed: {e}; raise the limit of open files if that is it"));
                    // It may have had the fd that is missing.
                    shared.close_an_idle_one();
                    not_before = Instant::now() + back_off;
                    back_off = (back_off * 2).min(BACK_OFF_MAX);
                }
            },
        }
    }
}

/// Makes the listening socket at `path`, for this process' user only, in place of one that nobody listens on any more.
///
/// # Errors
/// When something else is there, or somebody answers.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    bind_for(path, socket::PRIVATE, None)
}

/// The same for whom the mode and the group of the socket's file let in, see [`socket::listen`].
pub fn bind_for(path: &Path, mode: u32, group: Option<u32>) -> io::Result<UnixListener> {
    socket::listen(path, mode, group, BACKLOG).map(UnixListener::from)
}

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::reply::Body;

    struct Large;

    impl Backend for Large {
        fn submit(&self, _: Request, reply: ReplyTo) {
            reply.send(Ok(Body::Json("x".repeat(8 << 20).into())));
        }
    }

    #[test]
    fn patience_ends_for_a_slow_client_but_not_for_an_idle_one() {
        const PING: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\nhost: x\r\n\r\n";
        const LONG: Duration = Duration::from_secs(60);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let patience = Duration::from_millis(200);
        let server =
            Server::with_patience(Peers::default(), bind(&path).unwrap(), vec![], Arc::new(Large), patience).unwrap();
        let connect = |bytes: &[u8]| {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.set_read_timeout(Some(LONG)).unwrap();
            stream.write_all(bytes).unwrap();
            stream
        };
        let idle = connect(b"");
        let half_a_head = connect(b"GET /api");
        let half_a_body = connect(b"PUT /api/v1/vm.create HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{");
        let mut does_not_read = connect(PING);
        for mut stream in [half_a_head, half_a_body] {
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            assert!(text.starts_with("HTTP/1.1 400") && text.contains("has taken more than 200ms"), "{text}");
        }
        std::thread::sleep(patience * 2);
        assert_eq!(server.freeze(None, LONG).unwrap().idle().count(), 1);
        let mut cut_off = Vec::new();
        does_not_read.read_to_end(&mut cut_off).unwrap();
        assert!(cut_off.len() < 8 << 20);
        let mut idle = idle;
        idle.write_all(PING).unwrap();
        idle.read_exact(&mut vec![0; 8 << 20]).unwrap();
    }
}
