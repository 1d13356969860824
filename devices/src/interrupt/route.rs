//! One message signalled interrupt: a GSI, the message it is routed to, the eventfd that fires it, and the irqfd
//! between them.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use theseus_resources::StoredFd;

use super::controller::{InterruptController, InterruptError, MsiMessage};
use super::saved::RouteHandles;

/// What KVM has of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Irqfd {
    /// An event would be lost, so there is none.
    Unarmed,
    Detached(MsiMessage),
    Attached(MsiMessage),
}

/// See the module. While it is detached its events stay counted in the eventfd. Dropped, it is detached, and its GSI
/// is given back.
pub(crate) struct Route {
    controller: Arc<dyn InterruptController>,
    /// Nobody else's until this is dropped.
    gsi: u32,
    eventfd: StoredFd,
    irqfd: Irqfd,
}

impl Route {
    /// One for each eventfd, not armed yet.
    pub(crate) fn make(
        controller: &Arc<dyn InterruptController>,
        eventfds: Vec<StoredFd>,
    ) -> Result<Vec<Self>, InterruptError> {
        let count = u32::try_from(eventfds.len()).unwrap_or(u32::MAX);
        let gsis = controller.allocate(count)?;
        Ok(Self::of(controller, gsis.into_iter().zip(eventfds)))
    }

    fn of(controller: &Arc<dyn InterruptController>, parts: impl Iterator<Item = (u32, StoredFd)>) -> Vec<Self> {
        let route = |(gsi, eventfd)| Self { controller: controller.clone(), gsi, eventfd, irqfd: Irqfd::Unarmed };
        parts.map(route).collect()
    }

    /// In a new VMM, detached: KVM learns of the messages in the one call of the restore.
    pub(crate) fn restore(
        controller: &Arc<dyn InterruptController>,
        saved: &[RouteHandles],
        eventfds: Vec<StoredFd>,
    ) -> Result<Vec<Self>, InterruptError> {
        let gsis: Vec<_> = saved.iter().map(|route| route.gsi).collect();
        controller.adopt(&gsis)?;
        let mut routes = Self::of(controller, gsis.into_iter().zip(eventfds));
        Self::note(controller, &mut routes.iter_mut().zip(saved).collect::<Vec<_>>());
        Ok(routes)
    }

    /// Takes the messages of later handles of the same routes ([`Route::is`]), which are detached.
    pub(crate) fn note(controller: &Arc<dyn InterruptController>, later: &mut [(&mut Self, &RouteHandles)]) {
        let routes: Vec<_> = later.iter().map(|(_, saved)| (saved.gsi, saved.routed.map(Into::into))).collect();
        controller.note(&routes);
        for (route, saved) in later {
            route.irqfd = saved.routed.map_or(Irqfd::Unarmed, |message| Irqfd::Detached(message.into()));
        }
    }

    /// Whether `saved` are the handles of this route.
    pub(crate) fn is(&self, saved: &RouteHandles) -> bool {
        self.gsi == saved.gsi && self.eventfd.slot() == saved.eventfd
    }

    /// Routes each to its message, attached or not: all in one call, or none.
    pub(crate) fn arm(routes: &mut [(&mut Self, MsiMessage)]) -> Result<(), InterruptError> {
        let Some((first, _)) = routes.first() else { return Ok(()) };
        let table: Vec<_> = routes.iter().map(|(route, message)| (route.gsi, *message)).collect();
        first.controller.route(&table)?;
        for (route, message) in routes {
            route.irqfd = if route.is_attached() { Irqfd::Attached(*message) } else { Irqfd::Detached(*message) };
        }
        Ok(())
    }

    /// Injects what has come meanwhile, and then what comes. Nothing is done to one that is attached, or not armed.
    pub(crate) fn attach(&mut self) -> Result<(), InterruptError> {
        let Irqfd::Detached(message) = self.irqfd else { return Ok(()) };
        self.controller.attach(self.gsi, self.eventfd.as_fd(), None)?;
        self.irqfd = Irqfd::Attached(message);
        Ok(())
    }

    /// What came before is injected, what comes later waits in the eventfd.
    pub(crate) fn detach(&mut self) -> Result<(), InterruptError> {
        let Irqfd::Attached(message) = self.irqfd else { return Ok(()) };
        self.controller.detach(self.gsi, self.eventfd.as_fd())?;
        self.irqfd = Irqfd::Detached(message);
        Ok(())
    }

    pub(crate) fn is_attached(&self) -> bool {
        matches!(self.irqfd, Irqfd::Attached(_))
    }

    /// What it is armed with.
    pub(crate) fn message(&self) -> Option<MsiMessage> {
        match self.irqfd {
            Irqfd::Unarmed => None,
            Irqfd::Detached(message) | Irqfd::Attached(message) => Some(message),
        }
    }

    /// What the device is to signal.
    pub(crate) fn eventfd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }

    /// Whether an event waits.
    pub(crate) fn is_pending(&self) -> bool {
        // The count of an attached eventfd was injected already, and stays until it is detached.
        !self.is_attached() && is_readable(self.eventfd.as_fd())
    }

    /// As the device does.
    pub(crate) fn signal(&self) -> std::io::Result<()> {
        rustix::io::write(&self.eventfd, &1u64.to_ne_bytes())?;
        Ok(())
    }

    /// Forgets what waits.
    pub(crate) fn drain(&self) {
        let _ = rustix::io::read(&self.eventfd, &mut [0; 8]);
    }

    pub(crate) fn save(&self) -> RouteHandles {
        let Self { controller: _, gsi, eventfd, irqfd: _ } = self;
        RouteHandles { eventfd: eventfd.slot(), gsi: *gsi, routed: self.message().map(Into::into) }
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        match self.detach() {
            Ok(()) => self.controller.free(&[self.gsi]),
            // KVM takes the irqfd away itself with the last copy of the eventfd (irqfd_wakeup). Until then it injects
            // the GSI, which so becomes nobody's.
            Err(error) => log::error!("{}: {error}", self.eventfd.name()),
        }
    }
}

/// Which of them have an event that waits.
pub(super) fn pending(routes: &[(u16, &Route)]) -> Vec<u16> {
    // See `Route::is_pending`.
    let detached: Vec<_> = routes.iter().filter(|(_, route)| !route.is_attached()).collect();
    let mut fds: Vec<_> =
        detached.iter().map(|(_, route)| PollFd::from_borrowed_fd(route.eventfd.as_fd(), PollFlags::IN)).collect();
    let is_known = rustix::event::poll(&mut fds, Some(&NOW)).is_ok();
    let waits = |route: &Route, fd: &PollFd<'_>| {
        if is_known { fd.revents().contains(PollFlags::IN) } else { route.is_pending() }
    };
    detached.iter().zip(&fds).filter(|((_, route), fd)| waits(route, fd)).map(|((n, _), _)| *n).collect()
}

const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

pub(super) fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    matches!(rustix::event::poll(&mut fds, Some(&NOW)), Ok(1))
}
