//! The test's end of the serial line.
//!
//! A thread reads and sorts: answers go to who waits for them with the time they came, all else goes to the console
//! log. A request whose answer was garbled is sent again under its ID, and counted: an update must not cost a byte, so
//! some tests want none.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Write},
    marker::PhantomData,
    ops::Deref,
    os::unix::net::UnixStream,
    path::Path,
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use parking_lot::{Condvar, Mutex};
use serde::de::DeserializeOwned;

use crate::{
    clock::Sample,
    harness::{PATIENCE, wait_for},
    proto::{
        self, Answer, Line, LineBuffer, MachineInfo, MemoryStats, Nic, Notice, PciFunction, Request, Vector,
        encode_line,
    },
};

/// A request of which nothing was heard for so long may have been lost. Far longer than any takes on a slow machine.
const ASK_AGAIN: Duration = Duration::from_secs(60);

struct Pending {
    line: String,
    answer: mpsc::Sender<(Answer, Instant)>,
}

#[derive(Default)]
struct State {
    next_id: u64,
    pending: BTreeMap<u64, Pending>,
    ready: bool,
    closed: bool,
    asked_again: u64,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    writer: Mutex<UnixStream>,
}

impl Shared {
    fn write(&self, line: &str) -> Result<()> {
        self.writer.lock().write_all(line.as_bytes()).context("writing to the serial socket")
    }

    fn ask_all_again(&self) {
        let lines: Vec<String> = {
            let mut state = self.state.lock();
            state.asked_again += state.pending.len() as u64;
            state.pending.values().map(|p| p.line.clone()).collect()
        };
        for line in lines {
            // A closed line is noticed by the reader.
            let _ = self.write(&line);
        }
    }
}

/// Asks the agent of one guest. It may be cloned for another thread, and gets errors once the agent is dropped.
#[derive(Clone)]
pub struct Asker {
    shared: Arc<Shared>,
}

/// The agent of one guest.
pub struct Agent {
    asker: Asker,
}

impl Deref for Agent {
    type Target = Asker;

    fn deref(&self) -> &Asker {
        &self.asker
    }
}

/// An answer to come.
pub struct Ticket<T> {
    what: String,
    id: u64,
    shared: Arc<Shared>,
    answer: Receiver<(Answer, Instant)>,
    kind: PhantomData<T>,
}

impl<T: DeserializeOwned> Ticket<T> {
    /// The answer, and when it came.
    pub fn wait(self, deadline: Duration) -> Result<(T, Instant)> {
        let started = Instant::now();
        loop {
            let left = deadline.saturating_sub(started.elapsed());
            match self.answer.recv_timeout(left.min(ASK_AGAIN)) {
                Ok((answer, at)) => {
                    let value = answer.take().map_err(|e| anyhow!("agent: {e}"))?;
                    return Ok((value, at));
                }
                Err(RecvTimeoutError::Disconnected) => bail!("agent: {}: the serial line was closed", self.what),
                Err(RecvTimeoutError::Timeout) if left > ASK_AGAIN => {
                    let mut state = self.shared.state.lock();
                    state.asked_again += 1;
                    let line = state.pending.get(&self.id).map(|p| p.line.clone());
                    drop(state);
                    if let Some(line) = line {
                        self.shared.write(&line)?;
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("agent: {}: no answer within {deadline:?}", self.what),
            }
        }
    }
}

impl Asker {
    /// Asks without waiting.
    pub fn start<T: DeserializeOwned>(&self, request: &Request) -> Result<Ticket<T>> {
        let (sender, receiver) = mpsc::channel();
        let mut state = self.shared.state.lock();
        anyhow::ensure!(!state.closed, "agent: {request:?}: the serial line was closed");
        let id = state.next_id;
        state.next_id += 1;
        let line = encode_line(id, request);
        state.pending.insert(id, Pending { line: line.clone(), answer: sender });
        drop(state);
        let ticket = Ticket {
            what: format!("{request:?}"),
            id,
            shared: Arc::clone(&self.shared),
            answer: receiver,
            kind: PhantomData,
        };
        self.shared.write(&line)?;
        Ok(ticket)
    }

    /// Asks and waits.
    pub fn call<T: DeserializeOwned>(&self, request: &Request) -> Result<T> {
        self.call_within(request, PATIENCE)
    }

    pub fn call_within<T: DeserializeOwned>(&self, request: &Request, deadline: Duration) -> Result<T> {
        Ok(self.start(request)?.wait(deadline)?.0)
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        self.shared.state.lock().pending.remove(&self.id);
    }
}

impl Agent {
    /// Connects to the VMM's serial socket at `path`, which may be about to appear. What is not ours goes to `console`.
    pub fn connect(path: &Path, console: &Path) -> Result<Self> {
        let stream = wait_for(&format!("serial socket {}", path.display()), || Ok(UnixStream::connect(path).ok()))?;
        Self::over(stream, File::create(console)?)
    }

    fn over(stream: UnixStream, console: File) -> Result<Self> {
        let writer = stream.try_clone()?;
        writer.set_write_timeout(Some(PATIENCE))?;
        let state = State { next_id: proto::UNASKED + 1, ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), writer: Mutex::new(writer) });
        let reader = Arc::clone(&shared);
        std::thread::Builder::new().name("serial".into()).spawn(move || read_all(stream, &reader, console))?;
        Ok(Self { asker: Asker { shared } })
    }

    /// For another thread.
    pub fn asker(&self) -> Asker {
        self.asker.clone()
    }

    /// Waits until the agent says that it is up.
    pub fn wait_ready(&self, deadline: Duration) -> Result<()> {
        let mut state = self.shared.state.lock();
        self.shared.changed.wait_while_for(&mut state, |s| !s.ready && !s.closed, deadline);
        if state.closed {
            bail!("the serial line was closed before the agent was ready");
        }
        anyhow::ensure!(state.ready, "the guest's agent was not ready within {deadline:?}");
        Ok(())
    }

    /// Requests that had to be sent more than once.
    pub fn asked_again(&self) -> u64 {
        self.shared.state.lock().asked_again
    }

    pub fn ping(&self) -> Result<()> {
        self.call(&Request::Ping)
    }

    /// The guest's kernel has nothing to say against its machine, its ACPI tables or its clock.
    pub fn no_complaints(&self) -> Result<()> {
        let words =
            ["BUG:", "Oops", "soft lockup", "rcu: INFO", "clocksource: Marking", "ACPI Err", "ACPI BIOS", "ACPI Warn"];
        let words = words.map(str::to_owned).to_vec();
        let told: String = self.call(&Request::Dmesg { words })?;
        ensure!(told.is_empty(), "the guest's kernel complains: {told}");
        Ok(())
    }

    pub fn machine(&self) -> Result<MachineInfo> {
        self.call(&Request::Machine)
    }

    pub fn nics(&self) -> Result<Vec<Nic>> {
        self.call(&Request::Nics)
    }

    pub fn clock(&self) -> Result<Sample> {
        self.call(&Request::Clock { cpu: 0 })
    }

    pub fn memory(&self) -> Result<MemoryStats> {
        self.call(&Request::MemoryStats)
    }

    pub fn pci(&self) -> Result<Vec<PciFunction>> {
        self.call(&Request::Pci)
    }

    pub fn cpuid(&self, cpu: usize) -> Result<Vec<String>> {
        self.call(&Request::Cpuid { cpu })
    }

    /// Remembers the CPUID leaves of all CPUs in the guest; how many each has.
    pub fn remember_cpuid(&self) -> Result<Vec<usize>> {
        self.call(&Request::CpuidRemember)
    }

    /// How the CPUID leaves differ from those remembered.
    pub fn cpuid_changes(&self) -> Result<Vec<String>> {
        self.call(&Request::CpuidChanges)
    }

    /// Interrupts whose name contains `name`, like `eth0`.
    pub fn interrupts(&self, name: &str) -> Result<Vec<Vector>> {
        self.call(&Request::Interrupts { name: name.into() })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // The reader thread holds the other half; this ends it.
        let _ = self.shared.writer.lock().shutdown(std::net::Shutdown::Both);
    }
}

fn read_all(mut stream: UnixStream, shared: &Shared, mut console: File) {
    let mut lines = LineBuffer::default();
    let mut bytes = [0; 4096];
    while let Ok(len @ 1..) = stream.read(&mut bytes) {
        let now = Instant::now();
        for line in lines.push(&bytes[..len]) {
            match line {
                Line::Message { id: proto::UNASKED, json } => match serde_json::from_str(&json) {
                    Ok(Notice::Ready) => {
                        shared.state.lock().ready = true;
                        shared.changed.notify_all();
                    }
                    Ok(Notice::Garbled) => shared.ask_all_again(),
                    Err(e) => {
                        let _ = writeln!(console, "[unknown notice {json}: {e}]");
                    }
                },
                Line::Message { id, json } => {
                    let answer = serde_json::from_str(&json).unwrap_or_else(|e| Answer::Err(format!("{json}: {e}")));
                    // Nobody waits for an answer that came twice.
                    if let Some(pending) = shared.state.lock().pending.remove(&id) {
                        let _ = pending.answer.send((answer, now));
                    }
                }
                Line::Garbled => {
                    let _ = writeln!(console, "[garbled line]");
                    shared.ask_all_again();
                }
                Line::Other(text) if text.is_empty() => {}
                Line::Other(text) => {
                    let _ = writeln!(console, "{text}");
                }
            }
        }
    }
    let mut state = shared.state.lock();
    state.closed = true;
    state.pending.clear();
    drop(state);
    shared.changed.notify_all();
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    fn pair() -> (Agent, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Agent::over(ours, File::create("/dev/null").unwrap()).unwrap(), theirs)
    }

    #[test]
    fn a_garbled_answer_is_asked_for_again() {
        let (agent, guest) = pair();
        let served = std::thread::spawn(move || {
            let mut reader = BufReader::new(guest.try_clone().unwrap());
            let mut writer = guest;
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let answer = encode_line(1, &Answer::Ok(serde_json::Value::Null));
            writer.write_all(answer.replace("ok", "[kernel]ok").as_bytes()).unwrap();
            let mut again = String::new();
            reader.read_line(&mut again).unwrap();
            assert_eq!(line, again);
            writer.write_all(answer.as_bytes()).unwrap();
        });
        agent.ping().unwrap();
        served.join().unwrap();
        assert_eq!(agent.asked_again(), 1);
    }

    #[test]
    fn a_closed_line_ends_the_wait() {
        let (agent, guest) = pair();
        let ticket = agent.start::<()>(&Request::Ping).unwrap();
        drop(guest);
        let error = ticket.wait(PATIENCE).unwrap_err();
        assert!(error.to_string().contains("closed"), "{error}");
    }

    #[test]
    fn ready_is_waited_for() {
        let (agent, mut guest) = pair();
        assert!(agent.wait_ready(Duration::from_millis(10)).is_err());
        guest.write_all(format!("booting {}", encode_line(proto::UNASKED, &Notice::Ready)).as_bytes()).unwrap();
        agent.wait_ready(PATIENCE).unwrap();
    }
}
