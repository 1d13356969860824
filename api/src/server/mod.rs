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
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::request::{ApiError, Reply, Request};
use conn::{Conn, Gate};
pub use freeze::{FreezeError, Frozen};

/// Connections served at a time; one more is answered 429.
pub const MAX_CONNECTIONS: usize = 64;

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
    pub stream: UnixStream,
    /// The answer its client still waits for.
    pub answer: Option<Reply>,
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
}

impl Shared {
    fn conns(&self) -> MutexGuard<'_, HashMap<ConnId, Arc<Conn>>> {
        self.conns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a connection in a task of its own; refuses it when there are too many.
    fn adopt(self: &Arc<Self>, stream: tokio::net::UnixStream, answer: Option<Reply>) {
        let mut conns = self.conns();
        if conns.len() >= MAX_CONNECTIONS {
            drop(conns);
            let busy =
                ApiError::busy(format!("{MAX_CONNECTIONS} connections are open: close some, or try again later"));
            http::answer_and_forget(&stream, &Err(busy));
            return;
        }
        let id = ConnId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let conn = Arc::new(Conn::new(id, stream, self.gate.clone()));
        conns.insert(id, conn.clone());
        drop(conns);
        tokio::spawn(http::serve(Registered { shared: self.clone(), conn }, answer));
    }
}

/// An entry in the table of connections that goes when its task does, panics included.
struct Registered {
    shared: Arc<Shared>,
    conn: Arc<Conn>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.shared.conns().remove(&self.conn.id());
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
        Self::with_patience(listener, kept, backend, PATIENCE)
    }

    fn with_patience(
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
        for KeptConnection { stream, answer } in kept {
            prepare(&stream)?;
            stream.set_nonblocking(true)?;
            adopted.push((tokio::net::UnixStream::from_std(stream)?, answer));
        }
        drop(entered);

        let shared = Arc::new(Shared {
            gate: Arc::new(Gate::new(patience)),
            conns: Mutex::default(),
            next_id: AtomicU64::new(1),
            backend,
        });
        let (control, orders) = mpsc::unbounded_channel();
        let accepting = listener.clone();
        let thread = std::thread::Builder::new().name("api".into()).spawn(move || {
            runtime.block_on(async {
                for (stream, answer) in adopted {
                    shared.adopt(stream, answer);
                }
                run(accepting, shared, orders).await;
            })
        })?;
        Ok(Self { listener, control, thread: Some(thread) })
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
    loop {
        tokio::select! {
            biased;
            order = orders.recv() => match order {
                Some(Control::Freeze(order)) => freeze::carry_out(&shared, order).await,
                Some(Control::Stop) => return freeze::settle(&shared, None, STOP_WAIT).await,
                None => return,
            },
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => shared.adopt(stream, None),
                Err(e) => {
                    log::warn!("API: accept failed: {e}; raise the limit of open files if that is it");
                    // The reason, such as no free fd, lasts for a while: do not spin on it.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
}

/// Makes the listening socket at `path`, in place of one that nobody listens on any more.
///
/// # Errors
/// When something else is there, or somebody answers.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let named = |e: io::Error, what: &str| io::Error::new(e.kind(), format!("{}: {what}: {e}", path.display()));
    let refuse = |what: &str| Err(io::Error::new(io::ErrorKind::AddrInUse, format!("{}: {what}", path.display())));
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return refuse("there is a file which is not a socket: choose another path for the API socket");
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => return refuse("the socket is being served: is another theseus using it?"),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(|e| named(e, "a stale API socket cannot be removed"))?;
            }
            Err(e) => return Err(named(e, "the API socket is there and cannot be tried")),
        },
        Err(_) => {}
    }
    UnixListener::bind(path).map_err(|e| named(e, "the API socket cannot be made (does the folder exist?)"))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::request::Body;

    struct Large;

    impl Backend for Large {
        fn submit(&self, _: Request, reply: ReplyTo) {
            reply.send(Ok(Body::Json("x".repeat(8 << 20).into())));
        }
    }

    #[test]
    fn patience_ends_for_a_slow_client_but_not_for_an_idle_one() {
        const PING: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\nhost: x\r\n\r\n";
        const LONG: Duration = Duration::from_secs(5);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let patience = Duration::from_millis(200);
        let server = Server::with_patience(bind(&path).unwrap(), vec![], Arc::new(Large), patience).unwrap();
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
