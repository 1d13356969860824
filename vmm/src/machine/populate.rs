//! The background thread that fills page tables after an update: else the guest faults them in one by one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use theseus_resources::GuestRam;
use theseus_resources::threads::{self, Role};

/// Ends the thread when dropped: it must not keep the RAM of a machine that is gone, whose fd the next update would
/// find in the fd store.
pub(super) struct Populating {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Populating {
    /// None where no thread can be started, which costs only speed.
    pub(super) fn start(ram: Arc<GuestRam>) -> Option<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let body = move || {
            // At normal priority: it holds mmap_lock, and a thread that is starved while holding it would stop the
            // vCPUs.
            if let Err(error) = ram.populate_page_tables(|| !stopped.load(Ordering::Relaxed)) {
                log::debug!("background population: {error}");
            }
        };
        let thread = threads::spawn(Role::Populate, body);
        let thread = thread.inspect_err(|error| log::debug!("no background population: {error}")).ok()?;
        Some(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Populating {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
