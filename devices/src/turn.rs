//! The lock of a device, which a guest cannot hold against the VMM.
//!
//! An access may take long: a reset of the function keeps its vCPU in pwrite for 100 ms (pcie_flr), one that does not
//! come back for a minute (pci_dev_wait), and a guest can ask for another the moment it is over. So the VMM itself (a
//! save, say) comes before all vCPUs that wait, and a vCPU that waits with a write gives up when it is wanted
//! elsewhere: the write is then owed, see [`crate::bus::BusDevice::write`]. Between a pause that is asked for and a
//! guest that stands there is at most the access that was under way.

use std::ops::{Deref, DerefMut};
use std::thread::Thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use theseus_resources::survivor::{self, look};

/// How often a vCPU that waits looks whether it is wanted elsewhere.
const LOOK: Duration = Duration::from_millis(1);

/// How long a save waits for a vCPU that is in an access to the device. Else a guest could block whoever saves.
const SOON: Duration = Duration::from_secs(5);

/// See the module.
pub struct Turn<T: ?Sized> {
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Only locked by the holder: never waited for.
    value: Mutex<T>,
}

#[derive(Default)]
struct Queue {
    holder: Option<Holder>,
    /// How many threads of the VMM wait.
    first: usize,
}

struct Holder {
    thread: Thread,
    since: Instant,
}

/// Who has a device, and for how long.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{thread} has been in an access to it for {} ms", of.as_millis())]
pub struct Held {
    /// Its name.
    pub thread: String,
    /// Up to now.
    pub of: Duration,
}

/// It is this thread's turn, until this is dropped: the value first, then the turn.
pub struct TurnGuard<'a, T: ?Sized> {
    value: MutexGuard<'a, T>,
    _given_on: GivenOn<'a>,
}

struct GivenOn<'a> {
    queue: &'a Mutex<Queue>,
    changed: &'a Condvar,
}

impl Drop for GivenOn<'_> {
    fn drop(&mut self) {
        self.queue.lock().holder = None;
        self.changed.notify_all();
    }
}

impl<T> Turn<T> {
    /// Nobody's turn yet.
    pub fn new(value: T) -> Self {
        Self { queue: Mutex::default(), changed: Condvar::new(), value: Mutex::new(value) }
    }
}

impl<T: ?Sized> Turn<T> {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock()
    }

    fn take(&self, mut queue: MutexGuard<'_, Queue>) -> TurnGuard<'_, T> {
        queue.holder = Some(Holder { thread: std::thread::current(), since: Instant::now() });
        drop(queue);
        // A panic of who had it does not poison it: every change of a device is whole for each register.
        let value = self.value.lock();
        TurnGuard { value, _given_on: GivenOn { queue: &self.queue, changed: &self.changed } }
    }

    /// For a vCPU. None: it had to wait, and `is_wanted` elsewhere. Whoever is, and has waited, does not begin any
    /// more, even if it could now: of many who wait each would take its turn.
    pub fn lock_unless(&self, is_wanted: &dyn Fn() -> bool) -> Option<TurnGuard<'_, T>> {
        let mut queue = self.queue();
        while queue.holder.is_some() || queue.first > 0 {
            if is_wanted() {
                return None;
            }
            self.changed.wait_for(&mut queue, LOOK);
            if is_wanted() {
                return None;
            }
        }
        Some(self.take(queue))
    }

    /// For a vCPU that cannot give up.
    pub fn lock(&self) -> TurnGuard<'_, T> {
        let mut queue = self.queue();
        self.changed.wait_while(&mut queue, |queue| queue.holder.is_some() || queue.first > 0);
        self.take(queue)
    }

    /// For the VMM itself: before all vCPUs. The error says who has the device, and does not give it back `within` that
    /// time.
    pub fn lock_first(&self, within: Duration) -> Result<TurnGuard<'_, T>, Held> {
        let mut queue = self.queue();
        queue.first += 1;
        self.changed.wait_while_for(&mut queue, |queue| queue.holder.is_some(), within);
        queue.first -= 1;
        match held(&queue) {
            None => Ok(self.take(queue)),
            Some(held) => {
                drop(queue);
                self.changed.notify_all();
                Err(held)
            }
        }
    }

    /// For a save: as [`Turn::lock_first`], but a survivor waits for no turn.
    pub fn look(&self) -> Result<Look<'_, T>, Held> {
        if survivor::is_alone() { Ok(Look::Past(look(&self.value))) } else { self.lock_first(SOON).map(Look::Turn) }
    }

    /// Who has it now, if anybody. Waits for no turn.
    pub fn held(&self) -> Option<Held> {
        held(&self.queue())
    }
}

/// The value of a [`Turn`], to be read.
pub enum Look<'a, T: ?Sized> {
    /// It is this thread's turn.
    Turn(TurnGuard<'a, T>),
    /// A survivor's, which reads past whoever has the turn.
    Past(survivor::Look<'a, T>),
}

impl<T: ?Sized> Deref for Look<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self {
            Self::Turn(guard) => guard,
            Self::Past(value) => value,
        }
    }
}

fn held(queue: &Queue) -> Option<Held> {
    let Holder { thread, since } = queue.holder.as_ref()?;
    Some(Held { thread: thread.name().unwrap_or("a thread").to_owned(), of: since.elapsed() })
}

impl<T: ?Sized> Deref for TurnGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: ?Sized> DerefMut for TurnGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn the_vmm_comes_before_all_who_wait() {
        let turn = Turn::new(Vec::new());
        let held = turn.lock();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| turn.lock().push("vCPU"));
                scope.spawn(|| turn.lock_unless(&|| false).unwrap().push("vCPU"));
            }
            scope.spawn(|| turn.lock_first(LONG).unwrap().push("VMM"));
            while turn.queue().first == 0 {
                std::thread::yield_now();
            }
            drop(held);
        });
        let order = turn.lock();
        assert_eq!((order.len(), order[0]), (9, "VMM"));
    }

    #[test]
    fn one_who_is_wanted_elsewhere_gives_up() {
        let turn = Turn::new(7);
        let (wanted, held) = (AtomicBool::new(false), turn.lock());
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| turn.lock_unless(&|| wanted.load(Ordering::Relaxed)).is_none());
            wanted.store(true, Ordering::Relaxed);
            assert!(waits.join().unwrap());
        });
        drop(held);
        assert_eq!(turn.lock_unless(&|| true).map(|value| *value), Some(7), "what is free is taken");
    }

    #[test]
    fn one_after_the_other_gives_up_though_it_is_free_by_then() {
        let turn = Turn::new(());
        let (wanted, held) = (AtomicBool::new(false), turn.lock());
        let looks = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| {
                let is_wanted = || {
                    looks.fetch_add(1, Ordering::SeqCst);
                    wanted.load(Ordering::SeqCst)
                };
                turn.lock_unless(&is_wanted).is_none()
            });
            while looks.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            wanted.store(true, Ordering::SeqCst);
            drop(held);
            assert!(waits.join().unwrap(), "it has begun when it was to stop");
        });
    }

    #[test]
    fn who_holds_it_is_named() {
        let turn = Arc::new(Turn::new(()));
        let (sender, receiver) = std::sync::mpsc::channel();
        let (theirs, done) = (turn.clone(), std::sync::mpsc::channel::<()>());
        let holder = std::thread::Builder::new().name("vcpu2".into()).spawn(move || {
            let _held = theirs.lock();
            sender.send(()).unwrap();
            let _ = done.1.recv();
        });
        receiver.recv().unwrap();
        let error = turn.lock_first(Duration::from_millis(5)).err().unwrap();
        assert!(error.to_string().starts_with("vcpu2 has been in an access to it for "), "{error}");
        assert!(turn.held().is_some_and(|held| held.of >= error.of));
        drop(done.0);
        holder.unwrap().join().unwrap();
        assert!(turn.held().is_none() && turn.lock_first(LONG).is_ok());
    }

    #[test]
    fn a_panic_gives_it_back() {
        let turn = Turn::new(1);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _held = turn.lock();
            panic!("x");
        }));
        assert!(panicked.is_err());
        assert_eq!(*turn.lock(), 1);
    }
}
