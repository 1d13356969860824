//! In a VMM: it ends when its keeper is killed. What people kill is the PID that they know, and they expect the guest
//! to be gone then, and its devices to be free.
//!
//! PR_SET_PDEATHSIG with SIGCONT: it reaches a process that is stopped too, and as all threads have it blocked nothing
//! happens to anybody else. It is of one thread, and does not fire at the keeper's exec (kernel/exit.c,
//! forget_original_parent).

use std::sync::atomic::{AtomicBool, Ordering};

use theseus_resources::threads::{self, Role, set_of};

/// Whether this VMM goes on without its keeper: as long as it has an update under way, which may be how the keeper
/// died.
static ALONE: AtomicBool = AtomicBool::new(false);

/// The keeper is gone, and this VMM has gone on.
static FOR_EVER: AtomicBool = AtomicBool::new(false);

/// While it lives, the end of the keeper is not the end of this VMM.
pub(crate) struct MayBeAlone(());

impl MayBeAlone {
    pub(crate) fn new() -> Self {
        ALONE.store(true, Ordering::SeqCst);
        Self(())
    }

    /// For ever: the keeper is gone, and this VMM is on its own.
    pub(crate) fn stay(self) {
        FOR_EVER.store(true, Ordering::SeqCst);
    }
}

impl Drop for MayBeAlone {
    fn drop(&mut self) {
        ALONE.store(false, Ordering::SeqCst);
        // The one that told of the keeper's death may have come meanwhile.
        // SAFETY: to this process, where the signal is blocked but in the thread that waits for it.
        unsafe { libc::kill(libc::getpid(), libc::SIGCONT) };
    }
}

/// Starts the thread that waits for the end of the keeper. `end`: what to do then.
pub(crate) fn start(end: impl Fn() + Send + 'static) -> std::io::Result<()> {
    let keeper = super::pid();
    Ok(threads::spawn(Role::KeeperWatch, move || watch(keeper, end)).map(drop)?)
}

fn watch(keeper: u32, end: impl Fn()) {
    // SAFETY: of this thread only; a constant signal number.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGCONT) };
    let set = set_of(&[libc::SIGCONT]);
    loop {
        // SAFETY: has no arguments and cannot fail.
        let parent = unsafe { libc::getppid() }.unsigned_abs();
        if parent != keeper && !ALONE.load(Ordering::SeqCst) && !FOR_EVER.load(Ordering::SeqCst) {
            return end();
        }
        let mut signal = 0;
        // SAFETY: a valid set, and the kernel fills in one number.
        unsafe { libc::sigwait(&set, &mut signal) };
    }
}
