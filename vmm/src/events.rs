//! The event stream (`--event-monitor`): one JSON object a line, for whoever supervises many guests.
//!
//! What there is to be said is in [`Event`]. A reader that does not read loses events, and never holds the VMM up.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde_json::{Value, json};
use theseus_api::args::ApiSocket;
use theseus_api::types::{Event, EventLine, Timestamp};
use theseus_resources::fd_store::FdStoreError;
use theseus_resources::{Claims, FdKind, FdStore, Slot, StoredFd};

/// Linux's, bytes (pipe(7)).
const PIPE_BUF: usize = 4096;

/// Events that were lost, since this image was started.
static LOST: AtomicU64 = AtomicU64::new(0);

pub(crate) fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// Cheap to clone; says nothing where no stream was asked for.
#[derive(Clone, Default)]
pub(crate) struct EventStream(Option<StoredFd>);

impl EventStream {
    /// `target`: a file that is appended to, a FIFO, or an fd that whoever started us has opened.
    pub(crate) fn open(target: Option<&ApiSocket>, fd_store: &FdStore) -> anyhow::Result<Self> {
        let fd: OwnedFd = match target {
            None => return Ok(Self(None)),
            // Reading too: a FIFO then opens, whether or not somebody reads it yet.
            Some(ApiSocket::Path(path)) => File::options()
                .create(true)
                .append(true)
                .read(true)
                .mode(crate::logging::MODE)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(path)
                .with_context(|| format!("event stream {}", path.display()))?
                .into(),
            Some(ApiSocket::Fd(fd)) => crate::inherited(*fd).with_context(|| format!("event stream: fd={fd}"))?,
        };
        Ok(Self(Some(fd_store.keep("event stream", FdKind::Log, fd))))
    }

    pub(crate) fn slot(&self) -> Option<Slot> {
        self.0.as_ref().map(StoredFd::slot)
    }

    pub(crate) fn claim(slot: Option<Slot>, claims: &mut Claims) -> Result<Self, FdStoreError> {
        Ok(Self(slot.map(|slot| claims.claim(slot, FdKind::Log)).transpose()?))
    }

    pub(crate) fn emit(&self, event: impl Into<Event>) {
        let Some(fd) = &self.0 else { return };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = Timestamp { secs: now.as_secs(), nanos: now.subsec_nanos() };
        // It has no key that is not a text, and so none that JSON cannot have.
        let mut line = serde_json::to_value(EventLine { timestamp, event: event.into() }).unwrap_or_default();
        if line.to_string().len() >= PIPE_BUF {
            // A pipe that can be written to has room for so much; a longer line could block.
            line["properties"] = shortened(&line["properties"]);
        }
        // Not O_NONBLOCK, which would hold for all who share the open file.
        if !crate::ready(fd) || rustix::io::write(fd, format!("{line}\n").as_bytes()).is_err() {
            LOST.fetch_add(1, Ordering::Relaxed);
            log::debug!("event lost: {line}");
        }
    }
}

/// What of a report matters most, in far less than [`PIPE_BUF`].
fn shortened(properties: &Value) -> Value {
    let reason = properties["reasons"].get(0).and_then(Value::as_str).unwrap_or_default();
    let reason: String = reason.chars().take(500).collect();
    json!({ "pid": crate::keeper::pid(), "outcome": properties["outcome"], "reasons": [reason], "shortened": true })
}

#[cfg(test)]
mod tests {
    use super::*;
    use theseus_api::types::VmEvent;

    #[test]
    fn events_are_appended_line_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        std::fs::write(&path, "before\n").unwrap();
        let events = EventStream::open(Some(&ApiSocket::Path(path.clone())), &FdStore::new()).unwrap();
        events.emit(VmEvent::Booting {});
        events.emit(VmEvent::MemoryError { gpa: 7, needed: false });
        let text = std::fs::read_to_string(&path).unwrap();
        let last: Value = serde_json::from_str(text.lines().nth(2).unwrap()).unwrap();
        assert_eq!((&last["event"], &last["properties"]["gpa"]), (&json!("memory_error"), &json!(7)));
        EventStream::default().emit(VmEvent::Failed { reason: "nobody hears this".into() });
        let nowhere = ApiSocket::Path("/nowhere/events".into());
        assert!(EventStream::open(Some(&nowhere), &FdStore::new()).is_err());
    }

    #[test]
    fn a_reader_that_does_not_read_holds_nobody_up() {
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        let events = EventStream(Some(FdStore::new().keep("pipe", FdKind::Log, writer)));
        for _ in 0..5000 {
            events.emit(VmEvent::Booting {});
        }
        assert!(lost() > 0);
    }
}
