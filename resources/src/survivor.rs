//! A thread that has outlived all others of its address space, and looks at what they have left.
//!
//! A lock that one of them had when it died is never given back, and what it guards may be as that one was just leaving
//! it. A survivor reads past it (parking_lot's `data_ptr`; the lock itself is never forced), in a process of its own,
//! whose end harms nobody if what it reads is torn after all. All that a save locks it locks by [`look`], which is the
//! usual lock as long as there is no survivor.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};

static IS_ALONE: AtomicBool = AtomicBool::new(false);

/// For ever: the calling thread is alone, and nothing is logged any more, as the log has locks too. Async-signal-safe.
///
/// # Safety
/// No other thread of this address space makes a step any more. The caller has no lock of those that it will look at,
/// and takes none.
pub unsafe fn begin() {
    log::set_max_level(log::LevelFilter::Off);
    IS_ALONE.store(true, Ordering::SeqCst);
}

/// Whether [`begin`] was called.
pub fn is_alone() -> bool {
    IS_ALONE.load(Ordering::Relaxed)
}

/// What a lock guards, to be read.
pub enum Look<'a, T: ?Sized> {
    /// The usual lock, until this is dropped.
    Locked(MutexGuard<'a, T>),
    /// A survivor's, who has locked nothing.
    Past {
        /// Where the lock has it.
        value: &'a T,
        /// A thread has died that had the lock, so it may be half changed.
        is_locked: bool,
    },
}

impl<T: ?Sized> Look<'_, T> {
    /// Whether a dead thread may have been in the middle of a change.
    pub fn may_be_torn(&self) -> bool {
        matches!(self, Self::Past { is_locked: true, .. })
    }
}

impl<T: ?Sized> Deref for Look<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self {
            Self::Locked(guard) => guard,
            Self::Past { value, .. } => value,
        }
    }
}

/// Locks it; a survivor only reads. It would not get by with those that are free: to give back one that a dead thread
/// had waited for takes a lock of parking_lot's own.
pub fn look<T: ?Sized>(mutex: &Mutex<T>) -> Look<'_, T> {
    if !is_alone() {
        return Look::Locked(mutex.lock());
    }
    // SAFETY: nobody else makes a step, and this thread has not locked it: who has called `begin` has promised both.
    Look::Past { value: unsafe { &*mutex.data_ptr() }, is_locked: mutex.is_locked() }
}
