//! Waits for who is about to answer, without going to sleep: to be woken takes tens of microseconds, most of them a
//! CPU's way out of its idle state, and in the pause of an update one wait follows another.
//!
//! Only on a host that has CPUs to spare. Where others wait for one, who spins uses up his turn and then stands behind
//! them: pauses of seconds, where a thread that sleeps and is woken goes first (docs/adr/0018).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use rustix::thread::CpuSet;

/// What one step of a pause takes, and then some.
const LONGEST: Duration = Duration::from_micros(300);

/// See [`has_room`].
static HAS_ROOM: AtomicBool = AtomicBool::new(false);
/// See [`cpus_seen`].
static CPUS: AtomicUsize = AtomicUsize::new(1);

/// Looks whether the host has CPUs to spare: to be called when somebody is about to wait awake.
pub(crate) fn look_for_room() {
    let cpus = cpus();
    CPUS.store(cpus, Ordering::Relaxed);
    HAS_ROOM.store(cpus > 1 && load().is_some_and(|load| is_room(load, cpus)), Ordering::Relaxed);
}

/// How many CPUs this process may be on, and have the time of. Opens files of the cgroup: nothing for a pause.
fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What [`cpus`] was when it was last looked at; 1 where it never was.
pub(crate) fn cpus_seen() -> usize {
    CPUS.load(Ordering::Relaxed)
}

/// Whether the host had CPUs to spare when it was last looked at, more than one of them.
pub(crate) fn has_room() -> bool {
    HAS_ROOM.load(Ordering::Relaxed)
}

/// How many threads have run or waited for a CPU, on the average of the last minute, in 1/65536.
fn load() -> Option<u64> {
    let mut info = std::mem::MaybeUninit::uninit();
    // SAFETY: room for what the kernel writes.
    let said = unsafe { libc::sysinfo(info.as_mut_ptr()) };
    // SAFETY: it has been written.
    (said == 0).then(|| unsafe { info.assume_init() }.loads[0])
}

fn is_room(load: u64, cpus: usize) -> bool {
    // A quarter of them free: the load lags behind.
    load.saturating_mul(4) <= (cpus as u64).saturating_mul(3 << 16)
}

/// How long to stay awake.
#[derive(Clone, Copy)]
pub(crate) struct Spin(Duration);

impl Spin {
    pub(crate) const NOT: Self = Self(Duration::ZERO);

    /// For so many threads and the one that commands them. Not at all where there is no CPU for each: they would keep
    /// those whom they wait for from running.
    pub(crate) fn of_threads(count: usize) -> Self {
        if cpus() > count { Self(LONGEST) } else { Self::NOT }
    }

    pub(crate) fn is_spinning(self) -> bool {
        !self.0.is_zero() && has_room()
    }

    /// For a command, which `commander` gives.
    pub(crate) fn receive<T>(self, from: &Receiver<T>, commander: &Commander) -> Result<T, RecvError> {
        if !self.is_spinning() {
            return from.recv();
        }
        let mut stays = false;
        let look = || {
            let found = message(from);
            if found.is_none() && !stays {
                stays = commander.keep_off();
            }
            found
        };
        self.awake(look).unwrap_or_else(|| from.recv())
    }

    pub(crate) fn receive_until<T>(self, from: &Receiver<T>, deadline: Instant) -> Result<T, RecvTimeoutError> {
        match self.awake(|| message(from)) {
            Some(message) => message.map_err(|_| RecvTimeoutError::Disconnected),
            None => from.recv_timeout(deadline.saturating_duration_since(Instant::now())),
        }
    }

    /// What `look` finds, if it does so in time.
    pub(crate) fn awake<T>(self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        let began = Instant::now();
        loop {
            let found = look();
            if found.is_some() || !self.is_spinning() || began.elapsed() >= self.0 {
                return found;
            }
            // Not a mere pause: whom this waits for may have been put on the same CPU.
            std::thread::yield_now();
        }
    }
}

/// Where the thread is that commands others. Who stays awake on its CPU until the next command would only begin with it
/// once the commander waits itself: the scheduler does not part two threads that both run all the time, and what is to
/// be done at the same time is done one after the other.
#[derive(Clone, Default)]
pub(crate) struct Commander(Arc<AtomicUsize>);

impl Commander {
    /// The calling thread is about to command.
    pub(crate) fn is_here(&self) {
        self.0.store(rustix::thread::sched_getcpu() + 1, Ordering::Relaxed);
    }

    /// Moves the calling thread to another CPU if it is on the commander's, and may be on another. Whether it is, or
    /// was moved: once is enough.
    fn keep_off(&self) -> bool {
        let here = rustix::thread::sched_getcpu();
        if self.0.load(Ordering::Relaxed) != here + 1 {
            return false;
        }
        leave(here);
        true
    }
}

/// Moves the calling thread to another CPU, where it may be on another. Returns which. Its affinity is then what it was
/// (but for an operator's change within these microseconds): for a thread that may be on all CPUs of its cpuset not a
/// list of these, or it would not be let on those that the cpuset gets later (task_struct.user_cpus_ptr).
fn leave(cpu: usize) -> Option<usize> {
    let allowed = rustix::thread::sched_getaffinity(None).ok()?;
    let mut others = allowed;
    others.unset(cpu);
    if others.count() == 0 {
        return None;
    }
    let mut all = CpuSet::new();
    (0..CpuSet::MAX_CPU).for_each(|cpu| all.set(cpu));
    rustix::thread::sched_setaffinity(None, &all).ok()?;
    let is_free = rustix::thread::sched_getaffinity(None).is_ok_and(|cpuset| cpuset == allowed);
    let moved = rustix::thread::sched_setaffinity(None, &others).map(|()| rustix::thread::sched_getcpu());
    rustix::thread::sched_setaffinity(None, if is_free { &all } else { &allowed }).ok()?;
    moved.ok()
}

/// None: there is none yet.
fn message<T>(from: &Receiver<T>) -> Option<Result<T, RecvError>> {
    match from.try_recv() {
        Err(TryRecvError::Empty) => None,
        Err(TryRecvError::Disconnected) => Some(Err(RecvError)),
        Ok(message) => Some(Ok(message)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn what_comes_early_or_late_arrives_and_who_is_gone_is_noticed() {
        for spin in [Spin(Duration::ZERO), Spin(Duration::from_millis(5))] {
            let (sender, receiver) = channel();
            let soon = || Instant::now() + Duration::from_millis(20);
            sender.send(1).unwrap();
            assert_eq!(spin.receive(&receiver, &Commander::default()), Ok(1));
            assert_eq!(spin.receive_until(&receiver, soon()), Err(RecvTimeoutError::Timeout));
            let late = std::thread::spawn({
                let sender = sender.clone();
                move || {
                    std::thread::sleep(Duration::from_millis(20));
                    sender.send(2)
                }
            });
            assert_eq!(spin.receive(&receiver, &Commander::default()), Ok(2));
            late.join().unwrap().unwrap();
            drop(sender);
            assert_eq!(spin.receive(&receiver, &Commander::default()), Err(RecvError));
            assert_eq!(spin.receive_until(&receiver, soon()), Err(RecvTimeoutError::Disconnected));
        }
    }

    #[test]
    fn nobody_spins_where_cpus_are_few() {
        let load = |tenths: u64| (tenths << 16) / 10;
        assert!(is_room(load(0), 1) && is_room(load(15), 2) && is_room(load(90), 12));
        assert!(!is_room(load(16), 2) && !is_room(load(91), 12) && !is_room(u64::MAX, 12));
        look_for_room();
        let cpus = std::thread::available_parallelism().unwrap().get();
        assert!(super::load().is_some() && (cpus > 1 || !Spin(LONGEST).is_spinning()));
    }

    #[test]
    fn who_waits_leaves_the_cpu_of_whom_it_waits_for() {
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        assert!(!Commander::default().keep_off(), "nobody commands yet");
        let here = rustix::thread::sched_getcpu();
        let to = leave(here);
        assert!(to != Some(here) && to.is_some() == (allowed.count() > 1), "{to:?}");
        assert_eq!(rustix::thread::sched_getaffinity(None).unwrap(), allowed, "it may be everywhere again");
    }
}
