//! Work that goes on in the guest while it is updated.

use std::{
    collections::HashMap,
    io,
    net::{SocketAddr, UdpSocket},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use crate::{
    agent::machine::pin_to,
    clock::{mono_ns, rdtsc},
    proto::{Arrival, Heard, Sent, TimerFired},
    seq::SeqStats,
    stream::{Receiver, Sender},
};

fn none(what: &str, flow: u32) -> io::Error {
    io::Error::other(format!("no {what} of flow {flow}"))
}

/// Senders and receivers by flow.
#[derive(Default)]
pub(super) struct Streams {
    senders: HashMap<u32, Sender>,
    receivers: HashMap<u32, Receiver>,
}

impl Streams {
    pub(super) fn send_start(
        &mut self,
        flow: u32,
        from: SocketAddr,
        to: SocketAddr,
        rate: u32,
        credit: u64,
    ) -> io::Result<()> {
        self.senders.remove(&flow);
        self.senders.insert(flow, Sender::start(flow, from, to, rate, credit)?);
        Ok(())
    }

    pub(super) fn credit(&self, limits: &[(u32, u64)]) -> io::Result<Vec<Heard>> {
        for (flow, limit) in limits {
            self.senders.get(flow).ok_or_else(|| none("sender", *flow))?.grant().up_to(*limit);
        }
        let heard = |(flow, receiver): (&u32, &Receiver)| {
            let SeqStats { unique, next, .. } = receiver.stats();
            Heard(*flow, unique, next)
        };
        Ok(self.receivers.iter().map(heard).collect())
    }

    pub(super) fn send_stats(&self, flow: u32) -> io::Result<Sent> {
        Ok(self.senders.get(&flow).ok_or_else(|| none("sender", flow))?.stats())
    }

    pub(super) fn send_stop(&mut self, flow: u32) -> io::Result<Sent> {
        Ok(self.senders.remove(&flow).ok_or_else(|| none("sender", flow))?.stop())
    }

    pub(super) fn recv_start(&mut self, flow: u32, at: SocketAddr) -> io::Result<()> {
        self.receivers.remove(&flow);
        self.receivers.insert(flow, Receiver::start(flow, at)?);
        Ok(())
    }

    pub(super) fn recv_stats(&self, flow: u32) -> io::Result<SeqStats> {
        Ok(self.receivers.get(&flow).ok_or_else(|| none("receiver", flow))?.stats())
    }

    pub(super) fn recv_take(&mut self, flow: u32) -> io::Result<Receiver> {
        self.receivers.remove(&flow).ok_or_else(|| none("receiver", flow))
    }
}

/// Sockets that wait for a single packet, by port.
#[derive(Default)]
pub(super) struct Watches(HashMap<u16, Arc<Watch>>);

pub(super) struct Watch {
    socket: UdpSocket,
    closed: AtomicBool,
}

impl Watches {
    pub(super) fn open(&mut self, port: u16) -> io::Result<()> {
        if let Some(watch) = self.0.remove(&port) {
            watch.closed.store(true, Ordering::Relaxed);
            // Whoever waits there lets go of the port within a slice.
            while Arc::strong_count(&watch) > 1 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let socket = UdpSocket::bind(("0.0.0.0", port))?;
        self.0.insert(port, Arc::new(Watch { socket, closed: AtomicBool::new(false) }));
        Ok(())
    }

    pub(super) fn of(&self, port: u16) -> io::Result<Arc<Watch>> {
        self.0.get(&port).cloned().ok_or_else(|| io::Error::other(format!("port {port} is not watched")))
    }
}

impl Watch {
    /// Waits for one packet and says when it came.
    pub(super) fn wait(&self) -> io::Result<Arrival> {
        const SLICE: Duration = Duration::from_millis(100);
        let mut bytes = [0; 2048];
        self.socket.set_read_timeout(Some(SLICE))?;
        loop {
            match self.socket.recv(&mut bytes) {
                Ok(len) => {
                    let (mono_ns, tsc) = (mono_ns(), rdtsc());
                    return Ok(Arrival { mono_ns, tsc, len, head: bytes[..len.min(32)].to_vec() });
                }
                Err(_) if self.closed.load(Ordering::Relaxed) => return Err(io::Error::other("not watched any more")),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Threads that spin, each pinned to a CPU.
pub(super) struct Busy {
    stop: Arc<AtomicBool>,
    counts: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<()>>,
}

impl Busy {
    pub(super) fn start(cpus: &[usize]) -> io::Result<Self> {
        let mut busy = Self { stop: Arc::default(), counts: Vec::new(), threads: Vec::new() };
        for &cpu in cpus {
            let (stop, count) = (Arc::clone(&busy.stop), Arc::<AtomicU64>::default());
            busy.counts.push(Arc::clone(&count));
            let thread = std::thread::Builder::new().name(format!("busy{cpu}")).spawn(move || {
                if let Err(e) = pin_to(cpu) {
                    return eprintln!("agent: {e}");
                }
                // SAFETY: plain system call; the agent's own answers must get through.
                unsafe { libc::nice(19) };
                while !stop.load(Ordering::Relaxed) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            })?;
            busy.threads.push(thread);
        }
        Ok(busy)
    }

    pub(super) fn counts(&self) -> Vec<u64> {
        self.counts.iter().map(|c| c.load(Ordering::Relaxed)).collect()
    }

    pub(super) fn stop(self) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let Self { counts, threads, .. } = self;
        for thread in threads {
            let _ = thread.join();
        }
        counts.iter().map(|c| c.load(Ordering::Relaxed)).collect()
    }
}

/// Timers of the kernel (timerfd, CLOCK_MONOTONIC). One thread sleeps in each of them in turn, the earliest first.
pub(super) struct Timers {
    thread: JoinHandle<io::Result<Vec<TimerFired>>>,
}

impl Timers {
    pub(super) fn arm(after_ms: &[u64]) -> io::Result<Self> {
        let start = mono_ns();
        let mut due: Vec<u64> = after_ms.iter().map(|ms| start + ms * 1_000_000).collect();
        due.sort_unstable();
        // All are armed now: what is to be seen is whether the kernel's own list of timers lives through an update.
        let armed: Vec<(u64, OwnedFd)> =
            due.into_iter().map(|due| Ok((due, timer_at(due)?))).collect::<io::Result<_>>()?;
        let thread = std::thread::Builder::new().name("timers".into()).spawn(move || {
            armed
                .into_iter()
                .map(|(due_ns, timer)| {
                    let mut expirations = 0_u64;
                    // SAFETY: reads 8 bytes into an 8-byte integer.
                    let read = unsafe { libc::read(timer.as_raw_fd(), (&raw mut expirations).cast(), 8) };
                    if read == 8 {
                        Ok(TimerFired { due_ns, fired_ns: mono_ns() })
                    } else {
                        Err(io::Error::last_os_error())
                    }
                })
                .collect()
        })?;
        Ok(Self { thread })
    }

    /// All of them. It sleeps meanwhile: nothing but the timers themselves wakes this guest.
    pub(super) fn wait(self) -> io::Result<Vec<TimerFired>> {
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the timer thread panicked")))
    }
}

fn timer_at(due_ns: u64) -> io::Result<OwnedFd> {
    // SAFETY: plain system call.
    let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let timer = unsafe { OwnedFd::from_raw_fd(fd) };
    let value = libc::timespec { tv_sec: (due_ns / 1_000_000_000) as i64, tv_nsec: (due_ns % 1_000_000_000) as i64 };
    let spec = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
    // SAFETY: `spec` is valid, the old value is not asked for.
    if unsafe { libc::timerfd_settime(timer.as_raw_fd(), libc::TFD_TIMER_ABSTIME, &spec, std::ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(timer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_fire_when_due() {
        let fired = Timers::arm(&[20, 5]).unwrap().wait().unwrap();
        assert_eq!(fired.len(), 2);
        assert!(fired.iter().all(|t| t.late_us() >= 0), "{fired:?}");
    }

    #[test]
    fn busy_threads_count() {
        let busy = Busy::start(&[0]).unwrap();
        while busy.counts()[0] == 0 {
            std::thread::yield_now();
        }
        assert!(busy.stop()[0] > 0);
    }
}
