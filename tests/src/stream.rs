//! Senders and receivers of numbered UDP packets, the same code on both ends of the wire.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use crate::{
    clock::{mono_ns, sleep_until},
    net::big_receive_buffer,
    proto::Sent,
    seq::{PACKET_LEN, Packet, SeqCheck, SeqStats},
};

/// Packets that a sender sends at once, at most, to be back at its rate.
const CATCH_UP: u64 = 50;
const RECEIVE_BUFFER: i32 = 8 << 20;
/// So many of the packets that did not come are named.
const MISSING: usize = 8;
/// After the last packet that was sent has come: how long one that comes twice may take.
const QUIET: Duration = Duration::from_millis(300);
/// Before that: how long nothing may come until what is missing counts as lost.
const LOST: Duration = Duration::from_secs(5);

/// A thread with a flag that tells it to end; dropped, it has ended.
struct Worker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    fn start(name: String, body: impl FnOnce(&AtomicBool) + Send + 'static) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name(name).stack_size(128 << 10).spawn(move || body(&stopped))?;
        Ok(Self { stop, thread: Some(thread) })
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
    }
}

/// A thread that sends packets 0, 1, 2, … at a fixed rate until it is stopped or dropped.
pub struct Sender {
    packets: Arc<AtomicU64>,
    errors: Arc<AtomicU64>,
    worker: Worker,
}

impl Sender {
    pub fn start(flow: u32, from: SocketAddr, to: SocketAddr, rate: u32) -> io::Result<Self> {
        let socket = UdpSocket::bind(from)?;
        socket.connect(to)?;
        let (packets, errors) = (Arc::default(), Arc::default());
        let sender = (Arc::clone(&packets), Arc::clone(&errors));
        let period = 1_000_000_000 / u64::from(rate.max(1));
        let worker = Worker::start(format!("send{flow}"), move |stop| {
            let (packets, errors): (Arc<AtomicU64>, Arc<AtomicU64>) = sender;
            let mut due = mono_ns();
            let mut seq = 0;
            while !stop.load(Ordering::Relaxed) {
                let now = mono_ns();
                match socket.send(&Packet { flow, seq, sent_ns: now }.encode()) {
                    Ok(_) => {
                        seq += 1;
                        packets.store(seq, Ordering::Relaxed);
                    }
                    Err(_) => {
                        errors.fetch_add(1, Ordering::Relaxed);
                    }
                }
                // A sender that was held up catches up with a few packets, which makes good what timers are late, and not with
                // all: the rate is a promise to the receiver's ring too.
                due = (due + period).max(now.saturating_sub(CATCH_UP * period));
                sleep_until(due);
            }
        })?;
        Ok(Self { packets, errors, worker })
    }

    pub fn stats(&self) -> Sent {
        Sent { packets: self.packets.load(Ordering::Relaxed), errors: self.errors.load(Ordering::Relaxed) }
    }

    /// Stops it; the number of packets is final.
    pub fn stop(mut self) -> Sent {
        self.worker.end();
        self.stats()
    }
}

/// A thread that counts the packets of one flow until it is stopped or dropped.
pub struct Receiver {
    check: Arc<Mutex<SeqCheck>>,
    worker: Worker,
}

impl Receiver {
    pub fn start(flow: u32, at: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(at)?;
        big_receive_buffer(&socket, RECEIVE_BUFFER)?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let check = Arc::new(Mutex::new(SeqCheck::default()));
        let receiver = Arc::clone(&check);
        let worker = Worker::start(format!("recv{flow}"), move |stop| {
            // One more than a packet, so that a longer one does not look like ours.
            let mut bytes = [0; PACKET_LEN + 1];
            while !stop.load(Ordering::Relaxed) {
                let Ok(len) = socket.recv(&mut bytes) else { continue };
                let now = mono_ns();
                let mut check = receiver.lock().unwrap_or_else(PoisonError::into_inner);
                match Packet::decode(&bytes[..len]) {
                    Some(packet) if packet.flow == flow => check.packet(packet.seq, now),
                    _ => check.foreign(),
                }
            }
        })?;
        Ok(Self { check, worker })
    }

    pub fn stats(&self) -> SeqStats {
        self.check.lock().unwrap_or_else(PoisonError::into_inner).stats()
    }

    /// Waits for `expected` packets, or until nothing comes any more, then stops.
    /// The count, and some numbers that did not come.
    pub fn stop(mut self, expected: u64) -> (SeqStats, Vec<u64>) {
        let started = mono_ns();
        loop {
            let stats = self.stats();
            let patience = if stats.unique >= expected { QUIET } else { LOST };
            let until = stats.last_ns.max(started) + patience.as_nanos() as u64;
            if mono_ns() >= until {
                break;
            }
            sleep_until(until.min(mono_ns() + QUIET.as_nanos() as u64));
        }
        self.worker.end();
        let check = self.check.lock().unwrap_or_else(PoisonError::into_inner);
        (check.stats(), check.missing(MISSING))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_over_loopback_is_whole() {
        let at: SocketAddr = "127.0.0.1:47651".parse().unwrap();
        let Ok(receiver) = Receiver::start(9, at) else { return eprintln!("skipped: SO_RCVBUFFORCE needs root") };
        let sender = Sender::start(9, "127.0.0.1:0".parse().unwrap(), at, 2000).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        let sent = sender.stop();
        let (got, missing) = receiver.stop(sent.packets);
        assert!(sent.packets > 50 && sent.errors == 0, "{sent:?}");
        assert_eq!((got.unique, got.duplicated, got.reordered, got.foreign), (sent.packets, 0, 0, 0));
        assert_eq!((got.lost_of(sent.packets), missing), (0, vec![]));
    }
}
