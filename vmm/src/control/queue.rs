//! The ways into the control thread: a queue for the API's requests, and a latch for what the guest asks of its
//! machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use parking_lot::{Mutex, MutexGuard};
use theseus_api::server::{Backend, ReplyTo};
use theseus_api::{ApiError, Request};
use theseus_devices::interrupt::{GuestRequest, GuestRequests};
use vmm_sys_util::eventfd::EventFd;

/// What the guest has asked for and nobody has acted on. One request, the first: the machine ends by it, whatever its
/// vCPUs write to the same ports before they stand. So a guest cannot fill memory or log, however often it asks.
#[derive(Default)]
struct Latch {
    request: Mutex<Option<GuestRequest>>,
    /// The same without the lock, for vCPUs to look at after each exit.
    set: AtomicBool,
}

impl Latch {
    fn lock(&self) -> MutexGuard<'_, Option<GuestRequest>> {
        self.request.lock()
    }

    /// Whether `request` is the first.
    fn set(&self, request: GuestRequest) -> bool {
        let mut latched = self.lock();
        let first = latched.is_none();
        latched.get_or_insert(request);
        self.set.store(true, Ordering::SeqCst);
        first
    }

    fn take(&self) -> Option<GuestRequest> {
        let mut latched = self.lock();
        self.set.store(false, Ordering::SeqCst);
        latched.take()
    }
}

/// An API request, and the way back to its caller.
pub(super) type Call = (Request, ReplyTo);

/// The senders' side.
#[derive(Clone)]
pub(crate) struct Queue {
    calls: Sender<Call>,
    guest: Arc<Latch>,
    wake: Arc<EventFd>,
    updating: Arc<AtomicBool>,
}

/// The control thread's side.
pub(crate) struct Inbox {
    calls: Receiver<Call>,
    guest: Arc<Latch>,
    pub wake: Arc<EventFd>,
    /// An update is under way: most other requests are told so at once.
    pub updating: Arc<AtomicBool>,
}

pub(crate) fn queue() -> std::io::Result<(Queue, Inbox)> {
    let (sender, calls) = channel();
    let guest = Arc::new(Latch::default());
    let wake = Arc::new(EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?);
    let updating = Arc::new(AtomicBool::new(false));
    let queue = Queue { calls: sender, guest: guest.clone(), wake: wake.clone(), updating: updating.clone() };
    Ok((queue, Inbox { calls, guest, wake, updating }))
}

impl Queue {
    fn wake(&self) {
        // A full counter wakes as well as one that goes up.
        let _ = self.wake.write(1);
    }
}

pub(super) fn update_under_way() -> ApiError {
    ApiError::busy("an update is under way: try again in a moment")
}

impl Backend for Queue {
    fn submit(&self, request: Request, reply: ReplyTo) {
        if self.updating.load(Ordering::SeqCst) && !request.endpoint().in_update {
            return reply.send(Err(update_under_way()));
        }
        // A control thread that is gone ends the process. As long as it lives there is one request a connection.
        let _ = self.calls.send((request, reply));
        self.wake();
    }
}

impl GuestRequests for Queue {
    fn notify(&self, request: GuestRequest) {
        let said = format!("the guest asks: {request:?}");
        if self.guest.set(request) {
            log::info!("{said}");
            self.wake();
        }
    }

    fn pending(&self) -> bool {
        self.guest.set.load(Ordering::SeqCst)
    }
}

impl Inbox {
    pub(crate) fn call(&self) -> Option<Call> {
        self.calls.try_recv().ok()
    }

    pub(crate) fn guest_has_asked(&self) -> bool {
        self.guest.set.load(Ordering::SeqCst)
    }

    /// The guest's request while it waits.
    pub(crate) fn guest_request(&self) -> Option<GuestRequest> {
        self.guest.lock().clone()
    }

    /// It is acted on, or the guest that has asked is gone: the next one may ask.
    pub(crate) fn forget_guest(&self) {
        self.guest.take();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a guest on many vCPUs can write into its reset and power-off ports before the control thread comes round.
    #[test]
    fn a_flood_of_requests_is_one_request() {
        let (queue, inbox) = queue().unwrap();
        assert!(!queue.pending() && !inbox.guest_has_asked());
        queue.notify(GuestRequest::Reset);
        std::thread::scope(|scope| {
            for vcpu in 0..4 {
                let queue = queue.clone();
                scope.spawn(move || {
                    for _ in 0..10_000 {
                        queue.notify(GuestRequest::PowerOff);
                        queue.notify(GuestRequest::Failed(format!("vCPU {vcpu}")));
                    }
                });
            }
        });
        assert!(queue.pending(), "vCPUs wait");
        assert_eq!(inbox.wake.read().unwrap(), 1, "the control thread was woken once");
        assert_eq!(inbox.guest_request(), Some(GuestRequest::Reset));
        inbox.forget_guest();
        assert!(!queue.pending() && inbox.guest_request().is_none() && inbox.call().is_none());
        queue.notify(GuestRequest::PowerOff);
        assert_eq!((inbox.guest_request(), inbox.wake.read().unwrap()), (Some(GuestRequest::PowerOff), 1));
    }
}
