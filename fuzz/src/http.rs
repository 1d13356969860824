//! Any bytes on a connection of the API's server: it answers or hangs up, and goes on serving others.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use parking_lot::Mutex;
use tempfile::TempDir;
use theseus_api::server::{self, Backend, ReplyTo, Server};
use theseus_api::{Body, Request};

/// A hang, not a slow machine.
const PATIENCE: Duration = Duration::from_secs(600);
/// More than any answer here has: bytes.
const ANSWER_MAX: u64 = 16 << 20;

const PING: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\n\r\n";

/// Answers with what it was asked.
struct Echo;

impl Backend for Echo {
    fn submit(&self, request: Request, reply: ReplyTo) {
        let body = match &request {
            Request::Create(config) => serde_json::to_value(config),
            Request::Update(update) => serde_json::to_value(update),
            _ => Ok(request.name().into()),
        };
        reply.send(Ok(body.map_or(Body::Empty, Body::Json)));
    }
}

/// The server, and a client of it that asks something now and then.
struct Served {
    path: PathBuf,
    other: Mutex<BufReader<UnixStream>>,
    _server: Server,
    _folder: TempDir,
}

static SERVED: LazyLock<Served> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder for the socket");
    let path = folder.path().join("api");
    let listener = server::bind(&path).expect("a socket");
    let server = Server::start(listener, Vec::new(), Arc::new(Echo)).expect("a server");
    let other = Mutex::new(BufReader::new(connect(&path)));
    Served { path, other, _server: server, _folder: folder }
});

fn connect(path: &PathBuf) -> UnixStream {
    let stream = UnixStream::connect(path).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    stream
}

/// Whether another client is served.
fn is_serving(other: &mut BufReader<UnixStream>) -> bool {
    let mut line = String::new();
    if other.get_mut().write_all(PING).is_err() || other.read_line(&mut line).is_err() {
        return false;
    }
    let mut length = 0;
    loop {
        let mut header = String::new();
        match other.read_line(&mut header) {
            Ok(0) | Err(_) => return false,
            Ok(_) if header.trim().is_empty() => break,
            Ok(_) => {}
        }
        if let Some(count) = header.to_ascii_lowercase().strip_prefix("content-length:") {
            length = count.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    line.starts_with("HTTP/1.1 200") && other.read_exact(&mut body).is_ok() && body == b"\"vmm.ping\""
}

pub fn run(data: &[u8]) {
    let mut stream = connect(&SERVED.path);
    // It may hang up before it has read all.
    let _ = stream.write_all(data);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let end = Read::by_ref(&mut stream).take(ANSWER_MAX + 1).read_to_end(&mut answer);
    let is_reset = end.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset);
    assert!(end.is_ok() || is_reset, "neither an answer nor the end: {end:?}");
    assert!(answer.len() as u64 <= ANSWER_MAX, "an answer without end");
    // In the version that it was asked in.
    let is_http = [b"HTTP/1.1 ", b"HTTP/1.0 "].iter().any(|version| answer.starts_with(*version));
    assert!(answer.is_empty() || is_http, "{}", answer.escape_ascii());
    assert!(is_serving(&mut SERVED.other.lock()), "another client gets no answer");
}
