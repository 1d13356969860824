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

fn io_thread(name: String, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name).stack_size(128 << 10).spawn(body)
}

/// A thread that sends packets 0, 1, 2, … at a fixed rate until it is stopped or dropped.
pub struct Sender {
    stop: Arc<AtomicBool>,
    packets: Arc<AtomicU64>,
    errors: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Sender {
    pub fn start(flow: u32, from: SocketAddr, to: SocketAddr, rate: u32) -> io::Result<Self> {
        let socket = UdpSocket::bind(from)?;
        socket.connect(to)?;
        let (stop, packets, errors) = (Arc::new(AtomicBool::new(false)), Arc::default(), Arc::default());
        let sender = (Arc::clone(&stop), Arc::clone(&packets), Arc::clone(&errors));
        let period = 1_000_000_000 / u64::from(rate.max(1));
        let thread = io_thread(format!("send{flow}"), move || {
            let (stop, packets, errors): (Arc<AtomicBool>, Arc<AtomicU64>, Arc<AtomicU64>) = sender;
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
        Ok(Self { stop, packets, errors, thread: Some(thread) })
    }

    pub fn stats(&self) -> Sent {
        Sent { packets: self.packets.load(Ordering::Relaxed), errors: self.errors.load(Ordering::Relaxed) }
    }

    /// Stops it; the number of packets is final.
    pub fn stop(mut self) -> Sent {
        self.halt();
        self.stats()
    }

    fn halt(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.halt();
    }
}

/// A thread that counts the packets of one flow until it is stopped or dropped.
pub struct Receiver {
    stop: Arc<AtomicBool>,
    check: Arc<Mutex<SeqCheck>>,
    thread: Option<JoinHandle<()>>,
}

impl Receiver {
    pub fn start(flow: u32, at: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(at)?;
        big_receive_buffer(&socket, RECEIVE_BUFFER)?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let (stop, check) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(SeqCheck::default())));
        let receiver = (Arc::clone(&stop), Arc::clone(&check));
        let thread = io_thread(format!("recv{flow}"), move || {
            let (stop, check) = receiver;
            // One more than a packet, so that a longer one does not look like ours.
            let mut bytes = [0; PACKET_LEN + 1];
            while !stop.load(Ordering::Relaxed) {
                let Ok(len) = socket.recv(&mut bytes) else { continue };
                let now = mono_ns();
                let mut check = check.lock().unwrap_or_else(PoisonError::into_inner);
                match Packet::decode(&bytes[..len]) {
                    Some(packet) if packet.flow == flow => check.packet(packet.seq, now),
                    _ => check.foreign(),
                }
            }
        })?;
        Ok(Self { stop, check, thread: Some(thread) })
    }

    pub fn stats(&self) -> SeqStats {
        self.check.lock().unwrap_or_else(PoisonError::into_inner).stats()
    }

    /// Numbers that did not come, at most `limit`.
    pub fn missing(&self, limit: usize) -> Vec<u64> {
        self.check.lock().unwrap_or_else(PoisonError::into_inner).missing(limit)
    }

    /// Waits until nothing came for `quiet`, then stops.
    pub fn stop(mut self, quiet: Duration) -> SeqStats {
        let quiet_ns = quiet.as_nanos() as u64;
        let started = mono_ns();
        loop {
            let until = self.stats().last_ns.max(started) + quiet_ns;
            if mono_ns() >= until {
                break;
            }
            sleep_until(until);
        }
        self.halt();
        self.stats()
    }

    fn halt(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.halt();
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
        let got = receiver.stop(Duration::from_millis(100));
        assert!(sent.packets > 50 && sent.errors == 0, "{sent:?}");
        assert_eq!((got.unique, got.duplicated, got.reordered, got.foreign), (sent.packets, 0, 0, 0));
        assert_eq!(got.lost_of(sent.packets), 0);
    }
}
