//! Credit for the senders of a traffic, over the serial line, which is none of the wires under test.
//!
//! A sender may be [`Wire::window`] packets ahead of the highest number that its receiver has heard: so many fit into
//! the receive ring alone, whether or not anybody takes them out, as in the pause of an update. While the serial line
//! stands still, so does the traffic once its credit is used up. What is lost all the same gives no credit of its own,
//! and is found out at the end.
//!
//! [`Wire::window`]: crate::harness::wire::Wire::window

use std::{
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Result;
use parking_lot::Mutex;

use crate::{
    harness::agent::Asker,
    proto::{Heard, Request},
    stream::{Grant, Tally},
};

/// From one exchange to the next: the serial line costs the guest some 200 exits each time, and a window of 512 is a
/// second of traffic.
const PACE: Duration = Duration::from_millis(500);

/// Both directions of one wire.
pub struct Ways {
    pub window: u64,
    /// L1 to guest.
    pub inward: u32,
    pub grant: Grant,
    /// Guest to L1.
    pub outward: u32,
    pub tally: Tally,
}

/// What is known of all wires.
struct Ledger {
    asker: Asker,
    ways: Vec<Ways>,
    /// One exchange at a time.
    busy: Mutex<()>,
}

impl Ledger {
    /// Tells the guest how far its senders may go, hears from its receivers, and tells ours. Different numbers received
    /// so far: into the guest and out of it, for each wire.
    fn exchange(&self) -> Result<Vec<[u64; 2]>> {
        let _busy = self.busy.lock();
        let out: Vec<_> = self.ways.iter().map(|ways| ways.tally.stats()).collect();
        let limits = self.ways.iter().zip(&out).map(|(ways, got)| (ways.outward, got.next + ways.window)).collect();
        let heard: Vec<Heard> = self.asker.call(&Request::Credit { limits })?;
        let counts = self.ways.iter().zip(&out).map(|(ways, got)| {
            let Heard(_, unique, next) = heard.iter().find(|heard| heard.0 == ways.inward).copied().unwrap_or_default();
            ways.grant.up_to(next + ways.window);
            [unique, got.unique]
        });
        Ok(counts.collect())
    }
}

/// Credit is given for as long as this lives.
pub struct Credit {
    ledger: Arc<Ledger>,
    /// Dropped, it ends the thread.
    _stop: mpsc::Sender<()>,
    thread: JoinHandle<()>,
}

impl Credit {
    pub fn start(asker: Asker, ways: Vec<Ways>) -> Result<Self> {
        let ledger = Arc::new(Ledger { asker, ways, busy: Mutex::new(()) });
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::Builder::new().name("credit".into()).spawn({
            let ledger = Arc::clone(&ledger);
            move || {
                while stopped.recv_timeout(PACE) == Err(RecvTimeoutError::Timeout) {
                    // A guest that does not answer gets no credit; whoever waits for its traffic is told the error.
                    let _ = ledger.exchange();
                }
            }
        })?;
        Ok(Self { ledger, _stop: stop, thread })
    }

    /// An exchange now. What was received so far: into the guest and out of it, for each wire.
    pub fn exchange(&self) -> Result<Vec<[u64; 2]>> {
        self.ledger.exchange()
    }

    /// Ends it; nothing of it is on the serial line afterwards. Merely dropped, it may wait for a last answer of a
    /// guest that gives none.
    pub fn stop(self) {
        let Self { _stop: stop, thread, .. } = self;
        drop(stop);
        let _ = thread.join();
    }
}
