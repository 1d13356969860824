//! The message signalled interrupts of a device: a vector each, masked or with the message it is to send. What the
//! guest changes together reaches KVM together.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use theseus_resources::fd_store::{Claims, FdStoreError};
use theseus_resources::{FdKind, FdStore, StoredFd};

use super::controller::{InterruptController, InterruptError, MsiMessage};
use super::route::{self, Route};
use super::saved::RouteHandles;
use crate::rate_limited_log::RateLimitedLog;

/// Why a device's vectors cannot be made or taken over.
#[derive(Debug, thiserror::Error)]
pub enum VectorError {
    /// The process or the host has no descriptor to give.
    #[error("cannot make an eventfd for vector {vector}: {source} (raise RLIMIT_NOFILE)")]
    Eventfd {
        /// From 0.
        vector: usize,
        /// EMFILE, ENFILE or ENOMEM.
        source: std::io::Error,
    },
    /// There are no GSIs left, or those of the saved state are another device's.
    #[error(transparent)]
    Interrupt(#[from] InterruptError),
    /// An eventfd of the saved state is not in the fd store.
    #[error(transparent)]
    FdStore(#[from] FdStoreError),
    /// Vectors that were made ready are gone, or have other GSIs or eventfds now.
    #[error("the saved state has other vectors than the one before it")]
    Other,
}

struct Vector {
    route: Route,
    /// None: masked.
    wanted: Option<MsiMessage>,
}

/// See the module. A masked vector is one whose route is detached: its events stay counted, which is the pending bit,
/// and attaching it again injects them. An update uses the same mechanism.
pub(crate) struct Vectors {
    /// The device's and what it has, for errors: "nic0 msix".
    name: String,
    controller: Arc<dyn InterruptController>,
    fd_store: FdStore,
    /// None until they are made, at the first use.
    vectors: Vec<Vector>,
    quiesced: bool,
    /// KVM has refused something: [`Vectors::settle`] tries again.
    dirty: bool,
    complaints: RateLimitedLog,
}

impl Vectors {
    pub(crate) fn new(name: String, controller: Arc<dyn InterruptController>, fd_store: FdStore) -> Self {
        let complaints = RateLimitedLog::default();
        Self { name, controller, fd_store, vectors: Vec::new(), quiesced: false, dirty: false, complaints }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// All of them, masked.
    pub(crate) fn make(&mut self, count: usize) -> Result<(), VectorError> {
        let eventfds: Result<Vec<_>, _> = (0..count).map(|vector| self.eventfd(vector)).collect();
        let routes = Route::make(&self.controller, eventfds?)?;
        self.vectors = routes.into_iter().map(|route| Vector { route, wanted: None }).collect();
        Ok(())
    }

    fn eventfd(&self, vector: usize) -> Result<StoredFd, VectorError> {
        let eventfd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|e| VectorError::Eventfd { vector, source: e.into() })?;
        Ok(self.fd_store.keep(format!("{} {vector}", self.name), FdKind::Interrupt, eventfd))
    }

    /// In order: what the device is to signal.
    pub(crate) fn eventfds(&self) -> Vec<BorrowedFd<'_>> {
        self.vectors.iter().map(|vector| vector.route.eventfd()).collect()
    }

    /// Whether an event of the vector waits, and not only for the end of a quiescence, in which it is on its way.
    pub(crate) fn is_pending(&self, vector: usize) -> bool {
        self.vectors.get(vector).is_some_and(|vector| self.waits(vector) && vector.route.is_pending())
    }

    fn waits(&self, vector: &Vector) -> bool {
        !self.quiesced || vector.wanted.is_none()
    }

    /// What the vectors of `range` are to send from now on; None: they are masked. What KVM refuses is logged, as the
    /// guest has no way to be told, and the first of it returned.
    pub(crate) fn set(
        &mut self,
        range: Range<usize>,
        wanted: impl Fn(usize) -> Option<MsiMessage>,
    ) -> Result<(), InterruptError> {
        let range = range.start.min(self.vectors.len())..range.end.min(self.vectors.len());
        for (n, vector) in range.clone().zip(self.vectors.get_mut(range.clone()).unwrap_or_default()) {
            vector.wanted = wanted(n);
        }
        self.reconcile(range)
    }

    /// Brings KVM in line: detach, then route, then attach, each for all of them. A message that is no route to KVM
    /// (EINVAL) is the guest's own fault: that waits for another one.
    fn reconcile(&mut self, range: Range<usize>) -> Result<(), InterruptError> {
        let Self { name, vectors, quiesced, dirty, complaints, .. } = self;
        let Some(vectors) = vectors.get_mut(range) else { return Ok(()) };
        let mut failed = Vec::new();
        let on = !*quiesced;
        for Vector { route, wanted } in &mut *vectors {
            if !on || wanted.is_none() {
                failed.extend(route.detach().err());
            }
        }
        let mut changes: Vec<_> = vectors
            .iter_mut()
            .filter_map(|Vector { route, wanted }| Some((route, (*wanted)?)))
            .filter(|(route, message)| on && route.message() != Some(*message))
            .collect();
        for error in arm(&mut changes) {
            match error.is_invalid() {
                true => complaints.warn(|| format!("{name}: {error}")),
                false => failed.push(error),
            }
        }
        for (route, message) in changes {
            // What comes waits in the eventfd: where it would go now nobody expects it any more.
            if route.message() != Some(message) {
                failed.extend(route.detach().err());
            }
        }
        for Vector { route, wanted } in vectors {
            if on && wanted.is_some() && route.message() == *wanted {
                failed.extend(route.attach().err());
            }
        }
        for error in &failed {
            complaints.warn(|| format!("{name}: {error}"));
        }
        *dirty |= !failed.is_empty();
        failed.into_iter().next().map_or(Ok(()), Err)
    }

    fn reconcile_all(&mut self) -> Result<(), InterruptError> {
        self.dirty = false;
        self.reconcile(0..self.vectors.len())
    }

    /// Tries again what KVM has refused, if anything.
    pub(crate) fn settle(&mut self) -> Result<(), InterruptError> {
        if self.dirty { self.reconcile_all() } else { Ok(()) }
    }

    /// Detaches all, and attaches none until [`Vectors::resume`], which undoes it, after an error too.
    pub(crate) fn quiesce(&mut self) -> Result<(), InterruptError> {
        self.quiesced = true;
        self.reconcile_all()
    }

    /// Attaches those that are not masked, which injects what has come meanwhile: in the old VMM after an update that
    /// did not happen, in the new one once all LAPICs and the GSI routes are in place.
    pub(crate) fn resume(&mut self) -> Result<(), InterruptError> {
        self.quiesced = false;
        self.reconcile_all()
    }

    /// Signals each once: where what came may have been lost. A spurious interrupt is legal, a lost one is not.
    pub(crate) fn signal_all(&self) {
        for (n, vector) in self.vectors.iter().enumerate() {
            if let Err(e) = vector.route.signal() {
                log::warn!("{}: cannot signal vector {n}: {e}", self.name);
            }
        }
    }

    /// Forgets what waits.
    pub(crate) fn drain(&self) {
        self.vectors.iter().for_each(|vector| vector.route.drain());
    }

    /// The end of all of them.
    pub(crate) fn release(&mut self) {
        self.vectors.clear();
        self.dirty = false;
    }

    /// As [`Vectors::is_pending`], of all. One call for all: it is made in the pause of an update.
    pub(crate) fn pending(&self) -> Vec<u16> {
        let waiting = (0..).zip(&self.vectors).filter(|(_, vector)| self.waits(vector));
        route::pending(&waiting.map(|(n, vector)| (n, &vector.route)).collect::<Vec<_>>())
    }

    pub(crate) fn save(&self) -> Vec<RouteHandles> {
        self.vectors.iter().map(|Vector { route, wanted: _ }| route.save()).collect()
    }

    /// In a new VMM: takes the handles of the old one's, or later ones of the same guest, in which there may be some
    /// where there were none. All are masked, and quiesced until [`Vectors::resume`].
    pub(crate) fn mend(&mut self, saved: &[RouteHandles], claims: &mut Claims) -> Result<(), VectorError> {
        self.quiesced = true;
        // Once made, they stay.
        if saved.len() < self.vectors.len() || !self.vectors.iter().zip(saved).all(|(old, new)| old.route.is(new)) {
            return Err(VectorError::Other);
        }
        let (known, new) = saved.split_at(self.vectors.len());
        let mut routes: Vec<_> = self.vectors.iter_mut().map(|vector| &mut vector.route).zip(known).collect();
        Route::note(&self.controller, &mut routes);
        if !new.is_empty() {
            let eventfds = new.iter().map(|route| claims.claim(route.eventfd, FdKind::Interrupt));
            let routes = Route::restore(&self.controller, new, eventfds.collect::<Result<_, _>>()?)?;
            self.vectors.extend(routes.into_iter().map(|route| Vector { route, wanted: None }));
        }
        Ok(())
    }
}

/// In one call; where KVM finds one of them invalid, each on its own, so that none has to stay behind for another's
/// sake. Returns what went wrong.
fn arm(changes: &mut [(&mut Route, MsiMessage)]) -> Vec<InterruptError> {
    match Route::arm(changes) {
        Ok(()) => Vec::new(),
        Err(error) if error.is_invalid() && changes.len() > 1 => {
            changes.chunks_mut(1).filter_map(|change| Route::arm(change).err()).collect()
        }
        Err(error) => vec![error],
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeController, count, signal};
    use super::*;

    fn message(data: u32) -> MsiMessage {
        MsiMessage { address: 0xFEE0_1000, data }
    }

    fn vectors(count: usize) -> (Vectors, Arc<FakeController>) {
        let controller = Arc::new(FakeController::default());
        let mut vectors = Vectors::new("nic0 msix".into(), controller.clone(), FdStore::new());
        vectors.make(count).unwrap();
        (vectors, controller)
    }

    #[test]
    fn all_that_change_are_routed_in_one_call() {
        let (mut vectors, controller) = vectors(64);
        vectors.set(0..64, |n| (n % 2 == 0).then(|| message(n as u32))).unwrap();
        let calls = controller.calls();
        assert_eq!(calls.iter().filter(|call| **call == "route").count(), 1);
        assert_eq!((calls.len(), controller.attached()), (33, 32));
        vectors.set(0..64, |n| (n % 2 == 0).then(|| message(n as u32))).unwrap();
        assert!(controller.calls().is_empty(), "nothing has changed");
    }

    #[test]
    fn an_invalid_message_holds_up_no_other() {
        let (mut vectors, controller) = vectors(4);
        controller.refuse_data(Some(2));
        vectors.set(0..4, |n| Some(message(n as u32))).unwrap();
        assert_eq!(controller.attached(), 3);
        assert!(vectors.vectors[2].route.message().is_none());
        controller.calls();
        vectors.settle().unwrap();
        assert!(controller.calls().is_empty(), "it waits for another message");
        vectors.set(2..3, |_| Some(message(9))).unwrap();
        assert_eq!(controller.attached(), 4);
    }

    #[test]
    fn none_is_dropped_attached() {
        let (mut vectors, controller) = vectors(3);
        vectors.set(0..2, |n| Some(message(n as u32))).unwrap();
        signal(vectors.eventfds()[0]);
        let kept = vectors.eventfds()[0].try_clone_to_owned().unwrap();
        drop(vectors);
        assert_eq!((controller.attached(), controller.taken()), (0, 0));
        use std::os::fd::AsFd;
        assert_eq!(count(kept.as_fd()), 0, "what came before is injected");
    }

    /// Its GSI would inject what another device's route says.
    #[test]
    fn one_that_cannot_be_detached_keeps_its_gsi() {
        let (mut vectors, controller) = vectors(3);
        vectors.set(0..1, |_| Some(message(1))).unwrap();
        controller.refuse("detach", libc::ENOMEM);
        drop(vectors);
        assert_eq!((controller.attached(), controller.taken()), (1, 1));
    }

    #[test]
    fn a_gsi_that_is_another_s_is_refused() {
        let (vectors, controller) = vectors(2);
        let mut claims = Claims::default();
        let state = vectors.save();
        let (fd_store, mut handed) = vectors.fd_store.handed_over().unwrap();
        let mut other = Vectors::new("nic1 msix".into(), controller.clone(), fd_store);
        assert!(matches!(other.mend(&state, &mut claims), Err(VectorError::FdStore(_))), "nor is an eventfd");
        assert!(matches!(other.mend(&state, &mut handed), Err(VectorError::Interrupt(_))));
        drop(other);
        assert_eq!(controller.taken(), 2);
    }
}
