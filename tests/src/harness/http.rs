//! A plain HTTP/1.1 client over a unix socket, which can also send what no client should.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;

use crate::harness::PATIENCE;

/// Status and body of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub status: u16,
    pub body: String,
}

impl Answer {
    pub fn ok(&self) -> bool {
        (200..300).contains(&self.status)
    }

    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_str(&self.body).with_context(|| format!("status {}, body {:?}", self.status, self.body))
    }

    /// The documented form of every error: an array of strings, the outermost cause first.
    pub fn causes(&self) -> Result<Vec<String>> {
        let causes: Vec<String> = self.json().context("an error is a JSON array of strings")?;
        if causes.is_empty() {
            bail!("status {} without a cause", self.status);
        }
        Ok(causes)
    }
}

/// One connection.
pub struct Connection {
    stream: BufReader<UnixStream>,
}

impl Connection {
    pub fn open(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("connecting to {}", path.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.get_mut().write_all(bytes).context("sending a request")
    }

    /// Sends a whole request; `endpoint` like `vm.info`.
    pub fn send(&mut self, method: &str, endpoint: &str, body: &str) -> Result<()> {
        let head = if body.is_empty() {
            String::new()
        } else {
            format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len())
        };
        self.send_raw(format!("{method} /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n{body}").as_bytes())
    }

    /// Reads one answer.
    pub fn receive(&mut self) -> Result<Answer> {
        let status_line = self.line().context("waiting for an answer")?;
        let status = status_line
            .strip_prefix("HTTP/1.1 ")
            .and_then(|rest| rest.get(..3)?.parse().ok())
            .with_context(|| format!("not a status line: {status_line:?}"))?;
        let mut length = 0;
        loop {
            let line = self.line()?.to_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().with_context(|| line.clone())?;
            } else if line.starts_with("transfer-encoding:") {
                bail!("answers are documented to have a length: {line}");
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).context("reading the body of an answer")?;
        Ok(Answer { status, body: String::from_utf8(body).context("the body is not UTF-8")? })
    }

    pub fn call(&mut self, method: &str, endpoint: &str, body: &str) -> Result<Answer> {
        self.send(method, endpoint, body)?;
        self.receive().with_context(|| format!("{method} {endpoint}"))
    }

    /// Waits until the other end has closed; false: it sent another byte, or never closes.
    pub fn is_closed(&mut self) -> Result<bool> {
        let mut byte = [0];
        Ok(match self.stream.read(&mut byte) {
            Ok(read) => read == 0,
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("the connection was closed before the answer was whole");
        }
        Ok(line.trim_end().to_string())
    }
}

/// The API socket; every call has a connection of its own.
#[derive(Debug, Clone)]
pub struct Api {
    pub path: PathBuf,
}

impl Api {
    pub fn connect(&self) -> Result<Connection> {
        Connection::open(&self.path)
    }

    pub fn get(&self, endpoint: &str) -> Result<Answer> {
        self.connect()?.call("GET", endpoint, "")
    }

    pub fn put(&self, endpoint: &str, body: &str) -> Result<Answer> {
        self.connect()?.call("PUT", endpoint, body)
    }

    /// A PUT that must succeed.
    pub fn order(&self, endpoint: &str) -> Result<()> {
        let answer = self.put(endpoint, "")?;
        anyhow::ensure!(answer.ok(), "{endpoint}: {answer:?}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(answer: &'static str) -> Connection {
        let (client, mut server) = UnixStream::pair().unwrap();
        server.write_all(answer.as_bytes()).unwrap();
        Connection { stream: BufReader::new(client) }
    }

    #[test]
    fn answers_are_read_one_after_the_other() {
        let mut connection =
            served("HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 409 Conflict\r\nContent-Length: 7\r\n\r\n[\"why\"]");
        assert_eq!(connection.receive().unwrap(), Answer { status: 204, body: String::new() });
        assert_eq!(connection.receive().unwrap().causes().unwrap(), ["why"]);
        assert!(connection.receive().is_err());
    }

    #[test]
    fn causes_must_be_an_array_of_strings() {
        for body in ["{}", "[]", "[1]", ""] {
            assert!(Answer { status: 400, body: body.into() }.causes().is_err(), "{body}");
        }
    }
}
