//! HTTP on one connection: bodies in, answers out.
//!
//! Answers look as the narrowest readers want them, those of Cloud Hypervisor's own clients: all that follows
//! `HTTP/1.1 ` on the status line is taken for a number, so the reason phrase is empty (RFC 9112, 4, allows that);
//! headers are looked up in title case; and the text is decoded in pieces of 256 bytes, which only ASCII survives.

use std::convert::Infallible;
use std::error::Error;

use http_body_util::{BodyExt, Full};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::ext::ReasonPhrase;
use hyper::header::{CONNECTION, CONTENT_TYPE, EXPECT, HeaderMap, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, StatusCode, Version};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::conn::{Phase, Socket};
use super::{Registered, ReplyTo};
use crate::endpoint::Request;
use crate::reply::{ApiError, Body, Reply};

/// Bytes of a body.
const MAX_BODY: usize = 4 << 20;
/// Bytes of a body that is too large which are read and dropped: many clients read the answer only after they have sent
/// all they have.
const MAX_DROPPED: u64 = 64 << 20;
/// Bytes of a request line and its headers.
const MAX_HEAD: usize = 64 << 10;

/// Serves a connection to its end, after the answer it may still owe, or only to that if it then `ends`.
pub(super) async fn serve(entry: Registered, answer: Option<Reply>, ends: bool) {
    let conn = &entry.conn;
    if let Some(reply) = answer {
        conn.set_phase(Phase::Answering { begun: true });
        match tokio::time::timeout(conn.patience(), write_all(conn.stream(), &encode(&reply, !ends))).await {
            // The old image may have it open for a while yet.
            Ok(Ok(())) if ends => return conn.close(),
            Ok(Ok(())) => conn.set_phase(Phase::Idle),
            failed => return log::debug!("API: a client did not take its answer: {failed:?}"),
        }
    }
    let result = http1::Builder::new()
        // `Socket` has its own: hyper's would also run out on a connection that is idle.
        .header_read_timeout(None)
        .max_buf_size(MAX_HEAD)
        .title_case_headers(true)
        // A client may close its side and still wait for the answer.
        .half_close(true)
        .serve_connection(TokioIo::new(Socket::new(conn.clone())), service_fn(|request| handle(&entry, request)))
        .await;
    let Err(e) = result else { return };
    log::debug!("API: a connection ended: {}", chain(&e));
    if matches!(conn.phase(), Phase::Head | Phase::HeadEnd) {
        let reply = Err(ApiError::bad_request("this is not an HTTP/1.1 request").because([chain(&e)]));
        answer_and_forget(conn.stream(), &reply);
    }
}

/// Starts on a request when its head is parsed. This part must not be put off into the future: the length of the body
/// has to be known before the next read.
fn handle(
    entry: &Registered,
    request: hyper::Request<Incoming>,
) -> impl Future<Output = Result<Response<Full<Bytes>>, Infallible>> {
    let length = request.body().size_hint().exact();
    entry.conn.set_phase(Phase::Body(length));
    entry.conn.set_ends(ends(request.version(), request.headers()));
    async move {
        let (parts, body) = request.into_parts();
        let expects = parts.headers.contains_key(EXPECT);
        let reply = match read_body(body, expects).await {
            Ok(body) => match (&entry.refusal, Request::parse(parts.method.as_str(), parts.uri.path(), &body)) {
                (Some(refusal), _) => Err(refusal.clone()),
                (None, Ok(request)) => submit(entry, request).await,
                (None, Err(e)) => Err(e),
            },
            Err(e) => Err(e),
        };
        entry.conn.set_phase(Phase::Answering { begun: false });
        let mut response = response(&reply);
        if length.is_none() || entry.refusal.is_some() {
            // Where a chunked body ends is known to the parser only, which may have read past it.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(response)
    }
}

/// Whether a client wants its connection closed after the answer (RFC 9112, 9.3).
fn ends(version: Version, headers: &HeaderMap) -> bool {
    let has = |option: &str| {
        let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|one| one.trim().eq_ignore_ascii_case(option))
    };
    has("close") || version == Version::HTTP_10 && !has("keep-alive")
}

async fn submit(entry: &Registered, request: Request) -> Reply {
    let name = request.name();
    log::debug!("API: {name}");
    entry.conn.set_phase(Phase::Working);
    let (reply_to, reply) = ReplyTo::new(entry.conn.id());
    entry.shared.backend.submit(request, reply_to);
    reply.await.unwrap_or_else(|_| {
        Err(ApiError::internal(format!("{name}: the VMM dropped the request unanswered: its log may say why")))
    })
}

async fn read_body(mut body: Incoming, expects: bool) -> Result<Vec<u8>, ApiError> {
    let too_large = || ApiError::bad_request(format!("the body is larger than {} MiB", MAX_BODY >> 20));
    let announced = body.size_hint().lower();
    if announced > MAX_DROPPED || (expects && announced > MAX_BODY as u64) {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    let mut total: u64 = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame
            .map_err(|e| ApiError::bad_request(format!("the body ends after {total} bytes")).because([chain(&e)]))?;
        let Ok(data) = frame.into_data() else { continue };
        total = total.saturating_add(data.len() as u64);
        if total > MAX_DROPPED {
            return Err(too_large());
        }
        if total <= MAX_BODY as u64 {
            bytes.extend_from_slice(&data);
        }
    }
    if total > MAX_BODY as u64 { Err(too_large()) } else { Ok(bytes) }
}

/// Status and JSON text of a reply.
fn render(reply: &Reply) -> (u16, String) {
    match reply {
        Ok(Body::Empty) => (204, String::new()),
        Ok(Body::EmptyOk) => (200, String::new()),
        Ok(Body::Json(value)) => (200, ascii(value.to_string())),
        Ok(Body::Text(text)) => (200, ascii((*text).to_owned())),
        Err(e) => (e.status, ascii(serde_json::Value::from(e.causes.clone()).to_string())),
    }
}

/// JSON text with `\uXXXX` for all that is not ASCII; such characters stand in strings only.
fn ascii(json: String) -> String {
    if json.is_ascii() {
        return json;
    }
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            text.push(c);
        } else {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| text.push_str(&format!("\\u{unit:04x}")));
        }
    }
    text
}

fn response(reply: &Reply) -> Response<Full<Bytes>> {
    let (status, text) = render(reply);
    let has_body = !text.is_empty();
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.extensions_mut().insert(ReasonPhrase::from_static(b""));
    if has_body {
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    response
}

/// A whole response as bytes, for a request that hyper has not seen (it came in under another image) or not understood.
fn encode(reply: &Reply, keep_alive: bool) -> Vec<u8> {
    let (status, text) = render(reply);
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut head = format!("HTTP/1.1 {} \r\n", status.as_u16());
    if !text.is_empty() {
        head.push_str("Content-Type: application/json\r\n");
    }
    // A 204 has no length (RFC 9110, 8.6).
    if status != StatusCode::NO_CONTENT {
        head.push_str(&format!("Content-Length: {}\r\n", text.len()));
    }
    if !keep_alive {
        head.push_str("Connection: close\r\n");
    }
    [head.as_bytes(), b"\r\n", text.as_bytes()].concat()
}

/// Answers as far as the socket takes it at once, for a connection about to be closed.
pub(super) fn answer_and_forget(stream: &UnixStream, reply: &Reply) {
    let bytes = encode(reply, false);
    // The socket itself, as tokio would first have to see it writable.
    if let Err(e) = rustix::net::send(stream, &bytes, rustix::net::SendFlags::NOSIGNAL) {
        log::debug!("API: a client could not be told why it is turned away: {e}");
    }
}

async fn write_all(stream: &UnixStream, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn chain(error: &dyn Error) -> String {
    ApiError::chain(400, error).to_string()
}
