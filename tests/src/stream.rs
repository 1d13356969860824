//! Senders and receivers of numbered UDP packets, the same code on both ends of the wire.
//!
//! A sender sends by credit: it is told up to which number it may go, and waits there. How fast a machine carries
//! packets is then its own affair; what is on its way at once always has room in the receiver's ring and on the wire.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{JoinHandle, Thread},
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};

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
/// Before that: how long nothing may come until what is missing counts as lost. A machine that is merely slow is never
/// silent for so long.
const LOST: Duration = Duration::from_secs(60);

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
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
    }
}

#[derive(Default)]
struct Progress {
    packets: AtomicU64,
    errors: AtomicU64,
    /// Packets below this number may be sent.
    limit: AtomicU64,
    longest_wait_ns: AtomicU64,
}

/// Gives a sender credit. It keeps no sender running.
#[derive(Clone)]
pub struct Grant {
    progress: Arc<Progress>,
    sender: Thread,
}

impl Grant {
    /// Packets below `limit` may be sent; a limit that is lower than an earlier one says nothing new.
    pub fn up_to(&self, limit: u64) {
        self.progress.limit.fetch_max(limit, Ordering::Relaxed);
        self.sender.unpark();
    }
}

/// A thread that sends packets 0, 1, 2, … at a fixed rate, as far as it has credit, until it is stopped or dropped.
pub struct Sender {
    progress: Arc<Progress>,
    grant: Grant,
    worker: Worker,
}

impl Sender {
    /// At most `rate` packets a second. `credit`: the packets that it may send before it is granted more.
    pub fn start(flow: u32, from: SocketAddr, to: SocketAddr, rate: u32, credit: u64) -> io::Result<Self> {
        let socket = UdpSocket::bind(from)?;
        socket.connect(to)?;
        let progress = Arc::new(Progress { limit: AtomicU64::new(credit), ..Progress::default() });
        let period = 1_000_000_000 / u64::from(rate.max(1));
        let shared = Arc::clone(&progress);
        let worker = Worker::start(format!("send{flow}"), move |stop| {
            let mut due = mono_ns();
            let mut seq = 0;
            while may_send(&shared, seq, stop) {
                let now = mono_ns();
                match socket.send(&Packet { flow, seq, sent_ns: now }.encode()) {
                    Ok(_) => {
                        seq += 1;
                        shared.packets.store(seq, Ordering::Relaxed);
                    }
                    Err(_) => {
                        shared.errors.fetch_add(1, Ordering::Relaxed);
                    }
                }
                // A sender that was held up catches up with a few packets, which makes good what timers are late.
                due = (due + period).max(now.saturating_sub(CATCH_UP * period));
                sleep_until(due);
            }
        })?;
        let sender = worker.thread.as_ref().map(|thread| thread.thread().clone());
        let grant = Grant { progress: Arc::clone(&progress), sender: sender.ok_or(io::ErrorKind::NotFound)? };
        Ok(Self { progress, grant, worker })
    }

    pub fn grant(&self) -> &Grant {
        &self.grant
    }

    pub fn stats(&self) -> Sent {
        let Progress { packets, errors, limit: _, longest_wait_ns } = &*self.progress;
        Sent {
            packets: packets.load(Ordering::Relaxed),
            errors: errors.load(Ordering::Relaxed),
            longest_wait_us: longest_wait_ns.load(Ordering::Relaxed) / 1000,
        }
    }

    /// Stops it; the number of packets is final.
    pub fn stop(mut self) -> Sent {
        self.worker.end();
        self.stats()
    }
}

/// Waits for credit for packet `seq`. False: it is to stop.
fn may_send(progress: &Progress, seq: u64, stop: &AtomicBool) -> bool {
    let has_credit = || seq < progress.limit.load(Ordering::Relaxed);
    if !has_credit() {
        let since = mono_ns();
        while !has_credit() && !stop.load(Ordering::Relaxed) {
            // Who grants, or stops, unparks after it.
            std::thread::park();
        }
        progress.longest_wait_ns.fetch_max(mono_ns() - since, Ordering::Relaxed);
    }
    !stop.load(Ordering::Relaxed)
}

/// What a receiver has counted so far. It keeps no receiver running.
#[derive(Clone, Default)]
pub struct Tally(Arc<Mutex<SeqCheck>>);

impl Tally {
    pub fn stats(&self) -> SeqStats {
        self.lock().stats()
    }

    fn lock(&self) -> MutexGuard<'_, SeqCheck> {
        self.0.lock()
    }
}

/// A thread that counts the packets of one flow until it is stopped or dropped.
pub struct Receiver {
    tally: Tally,
    worker: Worker,
}

impl Receiver {
    pub fn start(flow: u32, at: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(at)?;
        big_receive_buffer(&socket, RECEIVE_BUFFER)?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let tally = Tally::default();
        let count = tally.clone();
        let worker = Worker::start(format!("recv{flow}"), move |stop| {
            // One more than a packet, so that a longer one does not look like ours.
            let mut bytes = [0; PACKET_LEN + 1];
            while !stop.load(Ordering::Relaxed) {
                let Ok(len) = socket.recv(&mut bytes) else { continue };
                let now = mono_ns();
                let mut check = count.lock();
                match Packet::decode(&bytes[..len]) {
                    Some(packet) if packet.flow == flow => check.packet(packet.seq, now),
                    _ => check.foreign(),
                }
            }
        })?;
        Ok(Self { tally, worker })
    }

    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    pub fn stats(&self) -> SeqStats {
        self.tally.stats()
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
        let check = self.tally.lock();
        (check.stats(), check.missing(MISSING))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: &str = "127.0.0.1:0";

    fn wait_until(condition: impl Fn() -> bool) {
        while !condition() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_sender_stops_at_its_credit_and_goes_on_with_more() {
        let sink = UdpSocket::bind(ANY).unwrap();
        let sender = Sender::start(1, ANY.parse().unwrap(), sink.local_addr().unwrap(), 1_000_000, 10).unwrap();
        for limit in [10, 15, 40] {
            sender.grant().up_to(limit);
            // What was granted before comes late: it takes nothing back.
            sender.grant().up_to(limit - 1);
            wait_until(|| sender.stats().packets >= limit);
            assert_eq!(sender.stats().packets, limit);
        }
        assert_eq!(sender.stop().packets, 40);
    }

    /// A wire that carries a packet a millisecond and keeps 64 on their way.
    fn slow_wire(to: SocketAddr) -> (SocketAddr, Worker) {
        const ROOM: usize = 64;
        let socket = UdpSocket::bind(ANY).unwrap();
        socket.set_nonblocking(true).unwrap();
        let at = socket.local_addr().unwrap();
        let worker = Worker::start("wire".into(), move |stop| {
            let (mut bytes, mut waiting) = ([0; PACKET_LEN], std::collections::VecDeque::new());
            while !stop.load(Ordering::Relaxed) {
                while socket.recv(&mut bytes).is_ok() {
                    if waiting.len() < ROOM {
                        waiting.push_back(bytes);
                    }
                }
                if let Some(packet) = waiting.pop_front() {
                    socket.send_to(&packet, to).unwrap();
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        (at, worker.unwrap())
    }

    /// Sends 500 packets over the slow wire, much faster than it carries them. How many are there when the last one
    /// that was not lost has come.
    fn over_a_slow_wire(flow: u32, at: SocketAddr, window: u64) -> Option<(u64, u64)> {
        let Ok(receiver) = Receiver::start(flow, at) else {
            eprintln!("skipped: SO_RCVBUFFORCE needs root");
            return None;
        };
        let (wire, _wire) = slow_wire(at);
        let sender = Sender::start(flow, ANY.parse().unwrap(), wire, 50_000, window).unwrap();
        wait_until(|| {
            let got = receiver.stats();
            sender.grant().up_to((got.next + window).min(500));
            sender.stats().packets >= 500
        });
        let sent = sender.stop();
        // The wire is empty after its 64 packets.
        let expected = if window <= 64 { sent.packets } else { 64 };
        let (got, _) = receiver.stop(expected);
        Some((got.lost_of(sent.packets), got.duplicated + got.reordered + got.foreign))
    }

    #[test]
    fn a_slow_wire_loses_nothing_by_credit() {
        let Some(seen) = over_a_slow_wire(8, "127.0.0.1:47650".parse().unwrap(), 64) else { return };
        assert_eq!(seen, (0, 0));
    }

    #[test]
    fn a_slow_wire_loses_without_credit() {
        let Some((lost, _)) = over_a_slow_wire(7, "127.0.0.1:47649".parse().unwrap(), 500) else { return };
        assert!(lost > 0);
    }

    #[test]
    fn a_stream_over_loopback_is_whole() {
        let at: SocketAddr = "127.0.0.1:47651".parse().unwrap();
        let Ok(receiver) = Receiver::start(9, at) else { return eprintln!("skipped: SO_RCVBUFFORCE needs root") };
        let sender = Sender::start(9, ANY.parse().unwrap(), at, 2000, 200).unwrap();
        wait_until(|| receiver.stats().unique == 200);
        let sent = sender.stop();
        let (got, missing) = receiver.stop(sent.packets);
        assert_eq!((sent.packets, sent.errors), (200, 0));
        assert_eq!((got.unique, got.duplicated, got.reordered, got.foreign), (sent.packets, 0, 0, 0));
        assert_eq!((got.lost_of(sent.packets), missing), (0, vec![]));
    }
}
