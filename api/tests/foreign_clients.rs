//! The server's bytes, and whether clients that are not ours can read them.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::json;
use theseus_api::endpoint::DOCUMENT;
use theseus_api::server::{Backend, KeptConnection, MAX_CONNECTIONS, ReplyTo, Server, bind};
use theseus_api::{ApiError, Body, Request};

const SOON: Duration = Duration::from_secs(5);

/// What a client with the habits of Cloud Hypervisor's makes of an answer: pieces of 256 bytes, each of which must be
/// UTF-8; a number, blanks around it allowed, from `HTTP/1.1 ` to the end of the line; a body only where
/// `Content-Length: ` stands just so.
fn read_as_they_do(stream: &mut UnixStream) -> Result<(u16, Option<String>), String> {
    let mut text = String::new();
    let (head_end, length) = loop {
        let mut piece = [0; 256];
        let count = stream.read(&mut piece).map_err(|e| e.to_string())?;
        text.push_str(std::str::from_utf8(&piece[..count]).map_err(|e| e.to_string())?);
        let Some(end) = text.find("\r\n\r\n").map(|at| at + 4) else {
            if count == 0 {
                return Err(format!("the end of the stream after {text:?}"));
            }
            continue;
        };
        let length: Option<usize> =
            text.split_once("Content-Length: ").and_then(|(_, rest)| rest.split('\r').next()?.trim().parse().ok());
        if length.is_none_or(|length| text.len() >= end + length) {
            break (end, length);
        }
        if count == 0 {
            return Err(format!("the end of the stream after {text:?}"));
        }
    };
    let line = text.split('\r').next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).ok_or("no status line")?;
    let status = line.trim().parse().map_err(|e| format!("status {line:?}: {e}"))?;
    Ok((status, length.map(|length| text[head_end..head_end + length].to_owned())))
}

/// All that the server sends until it closes, but for the value of `Date`.
fn bytes(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    match text.split_once("Date: ") {
        Some((before, rest)) => format!("{before}{}", &rest[rest.find("\r\n").unwrap() + 2..]),
        None => text,
    }
}

struct Fake(Mutex<mpsc::Sender<ReplyTo>>);

impl Backend for Fake {
    fn submit(&self, request: Request, reply: ReplyTo) {
        match request {
            Request::Ping => reply.send(Ok(Body::Json(json!({"version": "1"})))),
            Request::OpenApi => reply.send(Ok(Body::Text(DOCUMENT))),
            Request::Info => reply.send(Ok(Body::Json(json!({"cmdline": format!("{}ä€😀", "x".repeat(500))})))),
            Request::VmmShutdown => reply.send(Ok(Body::EmptyOk)),
            Request::Resume => reply.send(Err(ApiError::conflict("the VM runs"))),
            Request::Nmi => reply.send(Err(ApiError::busy("later"))),
            Request::Reboot => reply.send(Err(ApiError::internal("broken"))),
            Request::Update(_) => self.0.lock().send(reply).unwrap(),
            _ => reply.send(Ok(Body::Empty)),
        }
    }
}

struct Fixture {
    server: Server,
    path: PathBuf,
    held: mpsc::Receiver<ReplyTo>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let (sender, held) = mpsc::channel();
        let server = Server::start(bind(&path).unwrap(), vec![], Arc::new(Fake(Mutex::new(sender)))).unwrap();
        Self { server, path, held, _dir: dir }
    }

    fn send(&self, request: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(request).unwrap();
        stream
    }
}

fn request(method: &str, endpoint: &str) -> Vec<u8> {
    format!("{method} /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n").into_bytes()
}

/// Request, status, body.
fn table() -> Vec<(Vec<u8>, u16, Option<String>)> {
    let some = |text: &str| Some(text.to_owned());
    let no_route = r#"["/api/v1/vm.none: there is no such endpoint in this build"]"#;
    vec![
        (request("GET", "vmm.ping"), 200, some(r#"{"version":"1"}"#)),
        (request("PUT", "vmm.shutdown"), 200, some("")),
        (request("PUT", "vm.pause"), 204, None),
        (request("PUT", "vm.none"), 404, some(no_route)),
        (request("GET", "vm.boot"), 400, some(r#"["vm.boot: the method is GET: use PUT"]"#)),
        (request("PUT", "vm.resume"), 409, some(r#"["the VM runs"]"#)),
        (request("PUT", "vm.nmi"), 429, some(r#"["later"]"#)),
        (request("PUT", "vm.reboot"), 500, some(r#"["broken"]"#)),
        (request("GET", "openapi.json"), 200, some(DOCUMENT)),
        (
            request("GET", "vm.info"),
            200,
            Some(format!(r#"{{"cmdline":"{}\u00e4\u20ac\ud83d\ude00"}}"#, "x".repeat(500))),
        ),
    ]
}

#[test]
fn every_answer_byte_for_byte() {
    let f = Fixture::new();
    for (request, status, body) in table() {
        let mut stream = f.send(&request);
        stream.shutdown(Shutdown::Write).unwrap();
        let (kind, length) = match &body {
            None => ("", String::new()),
            Some(text) if text.is_empty() => ("", "Content-Length: 0\r\n".into()),
            Some(text) => ("Content-Type: application/json\r\n", format!("Content-Length: {}\r\n", text.len())),
        };
        let expected = format!("HTTP/1.1 {status} \r\n{kind}{length}\r\n{}", body.clone().unwrap_or_default());
        let name = String::from_utf8_lossy(&request);
        assert_eq!(bytes(&mut stream), expected, "{name}");
        assert_eq!(read_as_they_do(&mut f.send(&request)), Ok((status, body)), "{name}");
    }
}

#[test]
fn they_read_what_is_answered_before_a_request_is_whole() {
    let f = Fixture::new();
    let broken: &[&[u8]] = &[
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ];
    for request in broken {
        let (status, body) = read_as_they_do(&mut f.send(request)).unwrap();
        let causes: Vec<String> = serde_json::from_str(&body.unwrap()).unwrap();
        assert!(status == 400 && !causes.is_empty(), "{request:?}: {status} {causes:?}");
    }
    let mut stream = f.send(b"nonsense\r\n\r\n");
    let text = bytes(&mut stream);
    let head = "HTTP/1.1 400 \r\nContent-Type: application/json\r\nContent-Length: ";
    assert!(text.starts_with(head) && text.contains("\r\nConnection: close\r\n\r\n["), "{text}");
}

#[test]
fn they_read_that_there_are_too_many() {
    let f = Fixture::new();
    let mut open: Vec<UnixStream> = (0..MAX_CONNECTIONS).map(|_| f.send(&request("GET", "vmm.ping"))).collect();
    open.iter_mut().for_each(|stream| assert_eq!(read_as_they_do(stream).unwrap().0, 200));
    // Others may be closed to make room, but none may get what it cannot read.
    let status = read_as_they_do(&mut f.send(&request("GET", "vmm.ping"))).unwrap().0;
    assert!([200, 429].contains(&status), "{status}");
}

#[test]
fn they_read_the_answer_of_the_next_image() {
    let report = json!({"outcome": "updated", "text": "x".repeat(1 << 16)});
    let replies = [
        (Ok(Body::Json(report.clone())), 200, Some(report.to_string())),
        (Ok(Body::Empty), 204, None),
        (Ok(Body::EmptyOk), 200, Some(String::new())),
        (Err(ApiError::conflict("né")), 409, Some(r#"["n\u00e9"]"#.to_owned())),
    ];
    for (reply, status, body) in replies {
        let f = Fixture::new();
        let mut caller = f.send(&request("PUT", "vm.update"));
        let waiting = f.held.recv_timeout(SOON).unwrap();
        let frozen = f.server.freeze(Some(waiting.connection()), SOON).unwrap();
        let stream = frozen.caller().unwrap().as_fd().try_clone_to_owned().unwrap().into();
        let listener = frozen.listener().try_clone_to_owned().unwrap().into();
        let kept = vec![KeptConnection { stream, answer: Some(reply), ends: false }];
        let backend = Arc::new(Fake(Mutex::new(mpsc::channel().0)));
        let next = Server::start(listener, kept, backend).unwrap();
        assert_eq!(read_as_they_do(&mut caller), Ok((status, body)));
        // The same connection goes on.
        caller.write_all(&request("GET", "vmm.ping")).unwrap();
        assert_eq!(read_as_they_do(&mut caller).unwrap().0, 200);
        next.stop();
    }
}
