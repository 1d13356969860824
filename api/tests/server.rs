//! The server over a real socket, with a backend that the test controls.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::json;
use theseus_api::access::api_listen;
use theseus_api::client::{Client, ClientError};
use theseus_api::server::{Backend, KeptConnection, MAX_CONNECTIONS, ReplyTo, Server, bind, bind_for};
use theseus_api::{ApiError, Body, Request};

const SOON: Duration = Duration::from_secs(5);

/// Answers most requests at once; hands `vm.pause` and `vm.update` to the test.
struct Fake(Mutex<mpsc::Sender<ReplyTo>>);

impl Backend for Fake {
    fn submit(&self, request: Request, reply: ReplyTo) {
        match request {
            Request::Ping => reply.send(Ok(Body::Json(json!({"version": "1"})))),
            Request::Create(config) => reply.send(Ok(Body::Json(json!(config.memory.size)))),
            Request::Boot => reply.send(Err(ApiError::not_found("there is no VM"))),
            Request::Resume => {
                reply.send(Err(ApiError::conflict("the VM runs").because(["it was never paused".into()])))
            }
            Request::Nmi => reply.send(Err(ApiError::busy("an update is under way"))),
            Request::Reboot => reply.send(Err(ApiError::internal("broken"))),
            Request::Delete => drop(reply),
            Request::Counters => reply.send(Ok(Body::Json(json!("x".repeat(3 << 20))))),
            Request::Pause | Request::Update(_) => self.0.lock().send(reply).unwrap(),
            _ => reply.send(Ok(Body::Empty)),
        }
    }
}

struct Fixture {
    server: Server,
    path: PathBuf,
    /// Requests that wait for the test.
    held: mpsc::Receiver<ReplyTo>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let (sender, held) = mpsc::channel();
        let backend = Arc::new(Fake(Mutex::new(sender)));
        let server = Server::start(bind(&path).unwrap(), vec![], backend).unwrap();
        Self { server, path, held, _dir: dir }
    }

    fn client(&self) -> Client {
        let mut client = Client::new(&self.path).unwrap();
        client.set_timeout(Some(SOON));
        client
    }

    fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream
    }

    fn held(&self) -> ReplyTo {
        self.held.recv_timeout(SOON).unwrap()
    }

    /// A second server, as the new image would start it.
    fn successor(listener: BorrowedFd, kept: Vec<KeptConnection>) -> Server {
        let (sender, _) = mpsc::channel();
        let listener = listener.try_clone_to_owned().unwrap().into();
        Server::start(listener, kept, Arc::new(Fake(Mutex::new(sender)))).unwrap()
    }
}

fn dup(fd: BorrowedFd) -> UnixStream {
    fd.try_clone_to_owned().unwrap().into()
}

/// Reads one response with a content-length, or none.
fn read_response(stream: &mut UnixStream) -> (String, String) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "end of stream after {:?}", String::from_utf8_lossy(&head));
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|l| l.strip_prefix("Content-Length: ")).map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (head, String::from_utf8(body).unwrap())
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < SOON, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

const PING: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\nhost: x\r\n\r\n";

#[test]
fn every_status() {
    let f = Fixture::new();
    let mut client = f.client();
    let table: &[(&str, &str, Option<&str>, u16, &str)] = &[
        ("GET", "vmm.ping", None, 200, r#"{"version":"1"}"#),
        ("PUT", "vm.shutdown", None, 204, ""),
        ("PUT", "vm.create", Some(r#"{"payload":{"kernel":"/k"}}"#), 200, "536870912"),
        ("PUT", "vm.create", Some("not json"), 400, "the body is not what is expected"),
        ("PUT", "vm.create", Some(r#"{"cpus":{"boot_vcpus":"two"}}"#), 400, "cpus.boot_vcpus: invalid type"),
        ("PUT", "vm.create", Some(r#"{"rng":{"src":"/x"}}"#), 400, "`rng` is not supported by this build"),
        ("PUT", "vm.create", Some("{}"), 400, "payload.kernel is missing"),
        ("PUT", "vm.create", Some("\u{0}\u{1}"), 400, "expected value"),
        ("GET", "vm.boot", None, 400, "use PUT"),
        ("DELETE", "vmm.ping", None, 400, "use GET"),
        ("PUT", "vm.pause", Some("{}"), 400, "takes none"),
        ("GET", "vm.nothing", None, 404, "no such endpoint"),
        ("GET", "/", None, 404, "no such endpoint"),
        ("PUT", "vm.boot", None, 404, r#"["there is no VM"]"#),
        ("PUT", "vm.resume", None, 409, r#"["the VM runs","it was never paused"]"#),
        ("PUT", "vm.nmi", None, 429, "an update is under way"),
        ("PUT", "vm.reboot", None, 500, "broken"),
        ("PUT", "vm.delete", None, 500, "vm.delete: the VMM dropped the request unanswered"),
    ];
    for (method, endpoint, body, status, expected) in table {
        let response = client.request(method, endpoint, *body).unwrap();
        assert_eq!(response.status, *status, "{method} {endpoint}: {}", response.body);
        assert!(response.body.contains(expected), "{method} {endpoint}: {}", response.body);
        if *status >= 400 {
            response.json::<Vec<String>>().unwrap();
        }
    }
    // A large answer on the same connection.
    assert_eq!(client.get("vm.counters").unwrap().body.len(), (3 << 20) + 2);
}

#[test]
fn large_bodies() {
    let f = Fixture::new();
    let mut client = f.client();
    let config = |size: usize| {
        let text = r#"{"payload":{"kernel":"/k","cmdline":""#.to_string();
        let end = r#""}}"#;
        let filler = "x".repeat(size - text.len() - end.len());
        text + &filler + end
    };
    assert_eq!(client.put("vm.create", Some(&config(4 << 20))).unwrap().status, 200);
    for size in [(4 << 20) + 1, 5 << 20] {
        let response = client.put("vm.create", Some(&config(size))).unwrap();
        assert_eq!((response.status, response.causes()), (400, vec!["the body is larger than 4 MiB".to_string()]));
    }
    // Too much to be read out: answered at once.
    let mut raw = f.raw();
    raw.write_all(b"PUT /api/v1/vm.create HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n").unwrap();
    assert!(read_response(&mut raw).0.starts_with("HTTP/1.1 400"));
    // As curl does it: the body is held back until asked for.
    let mut raw = f.raw();
    raw.write_all(
        b"PUT /api/v1/vm.create HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5000000\r\n\r\n",
    )
    .unwrap();
    assert!(read_response(&mut raw).0.starts_with("HTTP/1.1 400"));
    assert_eq!(client.get("vmm.ping").unwrap().status, 200);
}

#[test]
fn bodies_in_pieces() {
    let f = Fixture::new();
    let body = br#"{"payload":{"kernel":"/k"}}"#;
    let mut raw = f.raw();
    let mut request =
        format!("PUT /api/v1/vm.create HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len()).into_bytes();
    request.extend_from_slice(body);
    for piece in request.chunks(7) {
        raw.write_all(piece).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(read_response(&mut raw).0.starts_with("HTTP/1.1 200"));
    raw.write_all(PING).unwrap();
    assert!(read_response(&mut raw).0.starts_with("HTTP/1.1 200"));

    let mut raw = f.raw();
    raw.write_all(b"PUT /api/v1/vm.create HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
    raw.write_all(format!("{:x}\r\n", body.len()).as_bytes()).unwrap();
    raw.write_all(body).unwrap();
    raw.write_all(b"\r\n0\r\n\r\n").unwrap();
    let (head, _) = read_response(&mut raw);
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("Connection: close"), "{head}");
}

#[test]
fn requests_sent_ahead_are_answered_in_turn() {
    let f = Fixture::new();
    let mut raw = f.raw();
    raw.write_all(&[PING, PING, b"\r\n", PING].concat()).unwrap();
    for _ in 0..3 {
        assert!(read_response(&mut raw).0.starts_with("HTTP/1.1 200"));
    }
    // A closed sending side is no reason not to answer.
    raw.write_all(PING).unwrap();
    raw.shutdown(Shutdown::Write).unwrap();
    assert!(read_response(&mut raw).0.starts_with("HTTP/1.1 200"));
    assert_eq!(raw.read(&mut [0]).unwrap(), 0);
}

#[test]
fn what_is_not_a_request_is_told_so() {
    let f = Fixture::new();
    let endings: &[&[u8]] = &[
        b"nonsense\r\n\r\n",
        b"GET /api/v1/vmm.ping HTTP/1.1\r\nhost",
        b"GET /api/v1/vmm.ping SMTP/1.1\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{}",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n{}",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ];
    for bytes in endings {
        let mut raw = f.raw();
        raw.write_all(bytes).unwrap();
        raw.shutdown(Shutdown::Write).unwrap();
        let (head, body) = read_response(&mut raw);
        assert!(head.starts_with("HTTP/1.1 400"), "{:?}: {head}", String::from_utf8_lossy(bytes));
        let causes: Vec<String> = serde_json::from_str(&body).unwrap();
        assert!(causes.len() >= 2, "{causes:?}");
    }
    let mut raw = f.raw();
    raw.write_all(&[b"GET / HTTP/1.1\r\nbig: ".as_slice(), &vec![b'x'; 100_000]].concat()).ok();
    assert!(read_response(&mut raw).0.starts_with("HTTP/1.1 400"));
    assert_eq!(f.client().get("vmm.ping").unwrap().status, 200);
}

#[test]
fn half_a_request_holds_nothing_up() {
    let f = Fixture::new();
    let mut half = f.raw();
    half.write_all(&PING[..20]).unwrap();
    assert_eq!(f.client().get("vmm.ping").unwrap().status, 200);
    half.write_all(&PING[20..]).unwrap();
    assert!(read_response(&mut half).0.starts_with("HTTP/1.1 200"));
}

#[test]
fn a_client_that_hangs_up_is_harmless() {
    let f = Fixture::new();
    let mut raw = f.raw();
    raw.write_all(b"PUT /api/v1/vm.pause HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let reply = f.held();
    drop(raw);
    // Its connection can even be the caller's of a freeze.
    drop(f.server.freeze(Some(reply.connection()), SOON).unwrap());
    reply.send(Ok(Body::Empty));
    assert_eq!(f.client().get("vmm.ping").unwrap().status, 200);
    eventually("the connection is not let go", || f.server.freeze(None, SOON).unwrap().idle().count() == 0);
}

#[test]
fn the_oldest_idle_connection_makes_room() {
    let f = Fixture::new();
    let mut oldest = f.raw();
    let mut open: Vec<Client> = (1..MAX_CONNECTIONS).map(|_| f.client()).collect();
    // Not the oldest any more once it has asked; then the first of the others is.
    oldest.write_all(PING).unwrap();
    read_response(&mut oldest);
    for client in &mut open {
        assert_eq!(client.get("vmm.ping").unwrap().status, 200);
    }
    oldest.write_all(PING).unwrap();
    read_response(&mut oldest);
    let mut new = f.client();
    assert_eq!(new.get("vmm.ping").unwrap().status, 200);
    assert!(matches!(open[0].get("vmm.ping"), Err(ClientError::Broken(_))), "it was closed between two requests");
    oldest.write_all(PING).unwrap();
    read_response(&mut oldest);
    assert_eq!(f.server.freeze(None, SOON).unwrap().idle().count(), MAX_CONNECTIONS);
}

#[test]
fn who_finds_no_room_is_told_after_the_request() {
    let f = Fixture::new();
    let mut busy: Vec<_> = (0..MAX_CONNECTIONS).map(|_| f.raw()).collect();
    for stream in &mut busy {
        stream.write_all(b"PUT /api/v1/vm.pause HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    }
    let mut held: Vec<_> = busy.iter().map(|_| f.held()).collect();
    // As much as no socket takes unread.
    let body = format!(r#"{{"payload":{{"kernel":"/k","cmdline":"{}"}}}}"#, "x".repeat(3 << 20));
    let response = f.client().put("vm.create", Some(&body)).unwrap();
    assert_eq!(response.status, 429, "{}", response.body);
    assert!(response.causes()[0].contains("64 requests"), "{}", response.body);
    held.pop().unwrap().send(Ok(Body::Empty));
    // Not at once: its answer must be out first.
    eventually("the one that is idle now makes room", || f.client().get("vmm.ping").unwrap().status == 200);
    drop(held);
}

/// A thread of another user, as the kernel tells a server of it. Nobody but root can make one.
#[test]
fn other_users_are_told_that_they_may_not() {
    const UID: u32 = 65_534;
    if !rustix::process::geteuid().is_root() {
        return println!("not tried: this is not root");
    }
    let f = Fixture::new();
    std::fs::set_permissions(&f.path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    std::fs::set_permissions(f.path.parent().unwrap(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let ask = |path: &PathBuf| {
        let path = path.clone();
        let other = std::thread::spawn(move || {
            // SAFETY: the system call itself, which unlike libc's function changes this thread only.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, UID, UID, UID) };
            assert_eq!(changed, 0);
            let mut client = Client::new(&path).unwrap();
            client.set_timeout(Some(SOON));
            client.get("vmm.ping").unwrap()
        });
        other.join().unwrap()
    };
    let refused = ask(&f.path);
    assert_eq!(refused.status, 403, "{}", refused.body);
    assert!(refused.causes()[0].contains("user 65534 may not use this API"), "{}", refused.body);
    assert_eq!(f.client().get("vmm.ping").unwrap().status, 200);

    let listen = api_listen(f.path.with_extension("open").to_str().unwrap()).unwrap();
    let path = f.path.with_extension("open");
    let listener = bind_for(&path, listen.file_mode(&[UID]), None).unwrap();
    let (sender, _) = mpsc::channel();
    let _server =
        Server::start_for(listen.peers(&[UID]), listener, vec![], Arc::new(Fake(Mutex::new(sender)))).unwrap();
    assert_eq!(ask(&path).status, 200);
}

#[test]
fn a_frozen_server_reads_nothing_and_thaws() {
    let f = Fixture::new();
    let (mut idle, mut caller, mut partial) = (f.client(), f.raw(), f.raw());
    assert_eq!(idle.get("vmm.ping").unwrap().status, 200);
    caller.write_all(b"PUT /api/v1/vm.update HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let reply = f.held();
    partial.write_all(&PING[..20]).unwrap();
    eventually("the partial request is not seen", || {
        f.server.freeze(Some(reply.connection()), SOON).unwrap().partial() == 1
    });

    let frozen = f.server.freeze(Some(reply.connection()), SOON).unwrap();
    assert_eq!((frozen.idle().count(), frozen.partial(), frozen.unanswered().len()), (1, 1, 0));
    assert!(frozen.caller().is_some());
    for fd in frozen.idle().map(|(_, fd)| fd).chain(frozen.caller()).chain([frozen.listener()]) {
        assert!(rustix::io::fcntl_getfd(fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    }
    // Everything a client does now waits in the kernel.
    let mut newcomer = f.raw();
    newcomer.write_all(PING).unwrap();
    partial.write_all(&PING[20..]).unwrap();
    idle.set_timeout(Some(Duration::from_millis(100)));
    assert!(matches!(idle.get("vmm.ping"), Err(ClientError::Timeout(_))));
    reply.send(Ok(Body::Json(json!("refused"))));
    caller.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(caller.read(&mut [0]).is_err());
    caller.set_read_timeout(Some(SOON)).unwrap();

    drop(frozen);
    assert_eq!(read_response(&mut caller).1, "\"refused\"");
    assert!(read_response(&mut partial).0.starts_with("HTTP/1.1 200"));
    assert!(read_response(&mut newcomer).0.starts_with("HTTP/1.1 200"));
    caller.write_all(PING).unwrap();
    assert!(read_response(&mut caller).0.starts_with("HTTP/1.1 200"));
}

#[test]
fn freeze_lets_requests_under_way_be_answered() {
    let f = Fixture::new();
    let (mut other, mut caller) = (f.raw(), f.raw());
    other.write_all(b"PUT /api/v1/vm.pause HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let other_reply = f.held();
    caller.write_all(b"PUT /api/v1/vm.update HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let reply = f.held();

    // Not answered by the deadline: reported.
    let frozen = f.server.freeze(Some(reply.connection()), Duration::from_millis(50)).unwrap();
    assert_eq!(frozen.unanswered(), [other_reply.connection()]);
    drop(frozen);

    // Answered while the freeze waits.
    let answerer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        other_reply.send(Ok(Body::Empty));
    });
    let frozen = f.server.freeze(Some(reply.connection()), SOON).unwrap();
    assert!(read_response(&mut other).0.starts_with("HTTP/1.1 204"));
    assert_eq!((frozen.idle().count(), frozen.unanswered().len()), (1, 0));
    answerer.join().unwrap();
}

#[test]
fn a_partial_body_is_not_idle() {
    let f = Fixture::new();
    let mut partial = f.raw();
    partial.write_all(b"PUT /api/v1/vm.create HTTP/1.1\r\nhost: x\r\ncontent-length: 27\r\n\r\n{\"payload\"").unwrap();
    eventually("the partial body is not seen", || f.server.freeze(None, SOON).unwrap().partial() == 1);
    assert_eq!(f.server.freeze(None, SOON).unwrap().idle().count(), 0);
    partial.write_all(b":{\"kernel\":\"/k\"}}").unwrap();
    assert!(read_response(&mut partial).0.starts_with("HTTP/1.1 200"));
    assert_eq!(f.server.freeze(None, SOON).unwrap().idle().count(), 1);
}

#[test]
fn connections_go_over_to_the_next_server() {
    let f = Fixture::new();
    let (mut idle, mut caller, mut ahead) = (f.client(), f.client(), f.raw());
    assert_eq!(idle.get("vmm.ping").unwrap().status, 200);
    // Two requests at once: the second must not be lost with the first server's memory.
    ahead.write_all(&[PING, PING].concat()).unwrap();
    read_response(&mut ahead);
    read_response(&mut ahead);
    let waiting = std::thread::spawn(move || {
        let answer = caller.put("vm.update", Some("{}")).unwrap();
        (answer, caller.get("vmm.ping").unwrap())
    });
    let reply = f.held();
    let frozen = f.server.freeze(Some(reply.connection()), SOON).unwrap();
    assert_eq!(frozen.idle().count(), 2);
    ahead.write_all(PING).unwrap();

    let mut kept: Vec<_> =
        frozen.idle().map(|(_, fd)| KeptConnection { stream: dup(fd), answer: None, ends: false }).collect();
    let report = json!({"outcome": "updated", "text": "x".repeat(1 << 20)});
    let answer = Some(Ok(Body::Json(report.clone())));
    kept.push(KeptConnection { stream: dup(frozen.caller().unwrap()), answer, ends: frozen.caller_ends() });
    let next = Fixture::successor(frozen.listener(), kept);

    let (answer, ping) = waiting.join().unwrap();
    assert_eq!((answer.status, answer.json::<serde_json::Value>().unwrap()), (200, report));
    assert_eq!(ping.status, 200);
    assert_eq!(idle.get("vmm.ping").unwrap().status, 200);
    assert!(read_response(&mut ahead).0.starts_with("HTTP/1.1 200"));
    // The listener went over too: the first server is still frozen.
    assert_eq!(f.client().get("vmm.ping").unwrap().status, 200);
    next.stop();
}

#[test]
fn a_caller_that_sent_ahead_loses_nothing() {
    let f = Fixture::new();
    let mut caller = f.raw();
    caller.write_all(b"PUT /api/v1/vm.update HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}").unwrap();
    caller.write_all(PING).unwrap();
    let reply = f.held();
    let frozen = f.server.freeze(Some(reply.connection()), SOON).unwrap();
    let refusal = Err(ApiError::conflict("no"));
    let kept = vec![KeptConnection { stream: dup(frozen.caller().unwrap()), answer: Some(refusal), ends: false }];
    let next = Fixture::successor(frozen.listener(), kept);
    let (head, body) = read_response(&mut caller);
    assert!(head.starts_with("HTTP/1.1 409 ") && body == r#"["no"]"#, "{head}{body}");
    assert!(read_response(&mut caller).0.starts_with("HTTP/1.1 200"));
    next.stop();
}

#[test]
fn a_caller_that_wants_its_connection_closed_sees_its_end() {
    let close = |version: &str, header: &str| {
        let f = Fixture::new();
        let mut caller = f.raw();
        let head = format!("PUT /api/v1/vm.update {version}\r\nhost: x\r\n{header}content-length: 2\r\n\r\n{{}}");
        caller.write_all(head.as_bytes()).unwrap();
        let reply = f.held();
        let frozen = f.server.freeze(Some(reply.connection()), SOON).unwrap();
        let (stream, ends) = (dup(frozen.caller().unwrap()), frozen.caller_ends());
        let next = Fixture::successor(
            frozen.listener(),
            vec![KeptConnection { stream, answer: Some(Ok(Body::EmptyOk)), ends }],
        );
        if ends {
            let mut all = String::new();
            caller.read_to_string(&mut all).unwrap();
            assert!(all.starts_with("HTTP/1.1 200 ") && all.contains("Connection: close"), "{all}");
        }
        next.stop();
        ends
    };
    assert!(close("HTTP/1.1", "connection: x, Close\r\n"));
    assert!(close("HTTP/1.0", ""));
    assert!(!close("HTTP/1.1", ""));
    assert!(!close("HTTP/1.0", "connection: keep-alive\r\n"));
}

#[test]
fn stop_lets_the_last_answer_out() {
    let f = Fixture::new();
    let mut client = f.raw();
    client.write_all(b"PUT /api/v1/vm.pause HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    f.held().send(Ok(Body::Empty));
    f.server.stop();
    assert!(read_response(&mut client).0.starts_with("HTTP/1.1 204"));
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn bind_replaces_only_a_stale_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    let listener = bind(&path).unwrap();
    let error = bind(&path).unwrap_err().to_string();
    assert!(error.contains("is another theseus using it?") && error.contains("api"), "{error}");
    drop(listener);
    assert!(path.exists());
    bind(&path).unwrap();

    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(bind(&file).unwrap_err().to_string().contains("not a socket"));
    assert!(bind(&dir.path().join("none/api")).unwrap_err().to_string().contains("does the folder exist?"));
    assert!(file.exists());
}
