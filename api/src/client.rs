//! A client that waits for each answer, over one connection that is kept.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use crate::API_PREFIX;
use crate::types::SOCKET_PATH_MAX;

/// Bytes of an answer.
const MAX_ANSWER: usize = 64 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// As where there are no more files to be had.
    #[error("the client's event loop cannot be made")]
    Runtime(#[source] std::io::Error),
    /// Nobody listens there, or this user may not connect.
    #[error("{path}: no connection to the API socket: is theseus running, with this --api-socket?")]
    Connect {
        /// Of the socket.
        path: PathBuf,
        /// What connect(2) says.
        source: std::io::Error,
    },
    /// Nobody can listen there.
    #[error("{path}: the path is longer than that of a unix socket may be ({SOCKET_PATH_MAX} bytes)")]
    PathTooLong {
        /// As it was given.
        path: PathBuf,
    },
    /// What was asked for, if it cannot be a part of a URI.
    #[error("{0:?}: not an endpoint")]
    Endpoint(String, #[source] hyper::http::Error),
    /// Whether the request was carried out is not known.
    #[error("the connection broke before the answer was there: has the VMM ended? Its log and its PID file say more")]
    Broken(#[source] hyper::Error),
    /// It broke off, or is too long (64 MiB).
    #[error("the connection broke in the middle of the answer")]
    Answer(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// See [`Client::set_timeout`]. Whether the request was carried out is not known.
    #[error("there was no answer within {0:?}")]
    Timeout(Duration),
}

/// Status and text of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Of HTTP.
    pub status: u16,
    /// UTF-8, with replacement characters for what is none. Of a failed call a JSON array of its causes.
    pub body: String,
}

impl Response {
    /// Whether the call was carried out.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The body as a value.
    ///
    /// # Errors
    /// When the body is something else.
    pub fn json<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        serde_json::from_str(&self.body)
    }

    /// Why a call failed, outermost cause first; the body as it is where it is not the documented array.
    pub fn causes(&self) -> Vec<String> {
        match self.json::<Vec<String>>() {
            Ok(causes) if !causes.is_empty() => causes,
            _ if self.body.is_empty() => vec![format!("HTTP status {}", self.status)],
            _ => vec![self.body.clone()],
        }
    }
}

/// Keeps one connection open. It never reconnects behind the caller's back: when the connection breaks the request
/// fails, and only the next one makes a new connection.
pub struct Client {
    path: PathBuf,
    runtime: Runtime,
    sender: Option<SendRequest<Full<Bytes>>>,
    timeout: Option<Duration>,
}

impl Client {
    /// The connection is made by the first request.
    ///
    /// # Errors
    /// When the event loop cannot be made.
    pub fn new(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ClientError::Runtime)?;
        Ok(Self { path: path.as_ref().to_owned(), runtime, sender: None, timeout: None })
    }

    /// Bounds each request from now on; None, as at first, waits for ever.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }

    /// Closes the connection; the next request makes a new one.
    pub fn disconnect(&mut self) {
        self.sender = None;
    }

    /// Sends a request and waits for the answer. `endpoint` is a name such as `vm.boot`, or a path from the root.
    ///
    /// # Errors
    /// When there is no connection or it breaks. An answer that reports a failure is an answer.
    pub fn request(&mut self, method: &str, endpoint: &str, body: Option<&str>) -> Result<Response, ClientError> {
        let path = if endpoint.starts_with('/') { endpoint.into() } else { format!("{API_PREFIX}{endpoint}") };
        let mut request = hyper::Request::builder().method(method).uri(path).header("host", "localhost");
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let request = request
            .body(Full::new(Bytes::from(body.unwrap_or_default().to_owned())))
            .map_err(|e| ClientError::Endpoint(endpoint.into(), e))?;

        let Self { path, runtime, sender, timeout } = self;
        let exchange = exchange(path, sender, request);
        let result = runtime.block_on(async {
            match *timeout {
                Some(limit) => tokio::time::timeout(limit, exchange).await.unwrap_or(Err(ClientError::Timeout(limit))),
                None => exchange.await,
            }
        });
        if result.is_err() {
            self.sender = None;
        }
        result
    }

    /// As [`Client::request`], for an endpoint that only answers.
    pub fn get(&mut self, endpoint: &str) -> Result<Response, ClientError> {
        self.request("GET", endpoint, None)
    }

    /// As [`Client::request`], for an endpoint that does something.
    pub fn put(&mut self, endpoint: &str, body: Option<&str>) -> Result<Response, ClientError> {
        self.request("PUT", endpoint, body)
    }
}

async fn exchange(
    path: &Path,
    sender: &mut Option<SendRequest<Full<Bytes>>>,
    request: hyper::Request<Full<Bytes>>,
) -> Result<Response, ClientError> {
    let sender = match sender {
        Some(sender) => sender,
        None => sender.insert(connect(path).await?),
    };
    sender.ready().await.map_err(ClientError::Broken)?;
    let response: hyper::Response<Incoming> = sender.send_request(request).await.map_err(ClientError::Broken)?;
    let status = response.status().as_u16();
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(ClientError::Answer)?.to_bytes();
    Ok(Response { status, body: String::from_utf8_lossy(&body).into_owned() })
}

async fn connect(path: &Path) -> Result<SendRequest<Full<Bytes>>, ClientError> {
    if path.as_os_str().len() > SOCKET_PATH_MAX {
        return Err(ClientError::PathTooLong { path: path.to_owned() });
    }
    let stream =
        UnixStream::connect(path).await.map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(ClientError::Broken)?;
    tokio::spawn(async move {
        if let Err(e) = connection.await {
            log::debug!("API client: the connection ended: {e}");
        }
    });
    Ok(sender)
}
