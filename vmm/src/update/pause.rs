//! From the stopped guest to the end of this VMM: Paused, Saved, Invalidated. Each is a guard over the one before.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use theseus_api::server::{ConnId, Frozen};
use theseus_resources::{FdKind, FdStore, Slot, StateWriter, StoredFd};

use super::ahead::{Begun, HeldGuest};
use super::saved::{ApiSlots, Handover};
use super::standby::{End, Standby};
use super::{UpdateContext, UpdateError};
use crate::logging::Held;
use crate::machine::MachineError;
use crate::spin;
use crate::timeline::{Phase, Timeline};

/// How long running requests may take to end, and vCPUs to stop: a hung device must not hold the guest for longer.
const DRAIN: Duration = Duration::from_secs(5);

/// The guest's vCPUs are stopped with nothing pending, its interrupts wait in their eventfds, and the API stands still.
/// Dropped in the order of the fields: the new VMM ends first, then the guest runs again, then the log and the API.
pub(super) struct Paused<'a> {
    new: Standby,
    guest: Option<HeldGuest<'a>>,
    _held: Held,
    _frozen: Option<Frozen<'a>>,
    /// With what was written before the guest stood still.
    writer: StateWriter,
    /// What the new VMM does not have yet.
    fds: Vec<StoredFd>,
    /// Held so that the fd store keeps them: their slots are in the handover.
    _kept_connections: Vec<StoredFd>,
    timeline: Arc<Timeline>,
}

impl<'a> Paused<'a> {
    pub(super) fn new(
        subject: &'a mut UpdateContext<'_>,
        target: PathBuf,
        timeline: Arc<Timeline>,
        new: Standby,
        caller: Option<ConnId>,
        deadline: Duration,
    ) -> Result<Self, UpdateError> {
        // A last look at the queue, too: the server waits for the answers to all that is in there.
        if (subject.guest_asked)() {
            return Err(UpdateError::GuestAsked);
        }
        let drain = deadline.min(DRAIN);
        let frozen = subject.server.map(|server| server.freeze(caller, drain)).transpose()?;
        let mut kept_connections = Vec::new();
        let api =
            frozen.as_ref().map(|frozen| keep_api(frozen, &subject.host.fd_store, &mut kept_connections)).transpose();
        let api = api.map_err(UpdateError::os("cannot keep the API's connections"))?;
        let handover = Handover::new(subject, Some(target), Vec::new(), api).map_err(MachineError::from)?;
        let fd_store = &subject.host.fd_store;
        let mut guest = subject.machine.as_deref_mut().map(HeldGuest::new);
        let begun = Begun::new(handover, guest.as_ref(), &new, fd_store)?;
        spin::look_for_room();
        guest.as_ref().map_or(Ok(()), |guest| guest.machine.prepare_quiesce())?;
        timeline.start_deadline(deadline);
        timeline.pass(Phase::Freeze)?;

        let held = Held::new();
        if let Some(HeldGuest { machine, .. }) = &mut guest {
            machine.pause(drain)?;
            if (subject.guest_asked)() {
                return Err(UpdateError::GuestAsked);
            }
            machine.quiesce()?;
        }
        // A guest that turns MSI-X on has eventfds made for it until its last vCPU stands.
        let Begun { writer, fds, .. } = begun.renew(guest.as_ref(), &new, fd_store)?;
        timeline.pass(Phase::Pause)?;
        Ok(Self {
            new,
            guest,
            _held: held,
            _frozen: frozen,
            writer,
            fds,
            _kept_connections: kept_connections,
            timeline,
        })
    }

    /// Pure: the guest and its devices stay as they are.
    pub(super) fn save(mut self) -> Result<Saved<'a>, UpdateError> {
        // Where there is one CPU the new VMM would take it from those that save. One that has not heard it only takes a
        // little longer.
        let soon = || drop(spin::has_room().then(|| self.new.soon()));
        // In parallel with all the rest.
        let vcpus = self.guest.as_ref().map(|guest| guest.machine.vcpus.begin_save(&soon)).transpose();
        let vcpus = vcpus.map_err(MachineError::from)?;
        if let Some(guest) = &self.guest {
            guest.machine.save(&mut self.writer, vcpus)?;
        }
        self.new.store(self.writer.finish()?)?;
        self.timeline.pass(Phase::Save)?;
        Ok(Saved { paused: self })
    }
}

fn keep_api(frozen: &Frozen<'_>, fd_store: &FdStore, kept: &mut Vec<StoredFd>) -> std::io::Result<ApiSlots> {
    let mut keep = |name: &str, purpose, fd: std::os::fd::BorrowedFd<'_>| -> std::io::Result<Slot> {
        let fd = fd_store.keep(name, purpose, fd.try_clone_to_owned()?);
        let slot = fd.slot();
        kept.push(fd);
        Ok(slot)
    };
    Ok(ApiSlots {
        listener: keep("API listener", FdKind::ApiListener, frozen.listener())?,
        idle: frozen
            .idle()
            .map(|(_, fd)| keep("idle API connection", FdKind::ApiConnection, fd))
            .collect::<Result<_, _>>()?,
        caller: frozen
            .caller()
            .map(|fd| keep("API connection of the caller", FdKind::ApiConnection, fd))
            .transpose()?,
        caller_ends: frozen.caller_ends(),
    })
}

/// The state is in its memfd.
pub(super) struct Saved<'a> {
    paused: Paused<'a>,
}

impl<'a> Saved<'a> {
    /// All DMA addresses of all containers; the DMA itself goes on.
    pub(super) fn invalidate(self) -> Result<Invalidated<'a>, UpdateError> {
        let containers = match &self.paused.guest {
            Some(guest) => guest.machine.invalidate()?,
            None => None,
        };
        let invalidated = Invalidated { _containers: containers, saved: self };
        invalidated.saved.paused.timeline.pass(Phase::Invalidate)?;
        Ok(invalidated)
    }
}

/// No DMA address of this process is valid any more; DMA that was mapped goes on. Dropping it ends the new VMM, and
/// maps them back.
pub(super) struct Invalidated<'a> {
    _containers: Option<theseus_devices::vfio::Invalidated>,
    saved: Saved<'a>,
}

impl Drop for Invalidated<'_> {
    fn drop(&mut self) {
        // Before the fields are dropped: it may be mapping its own.
        self.saved.paused.new.end();
    }
}

impl Invalidated<'_> {
    /// The guest goes over to the new VMM, and this one ends. Returns only if that failed, with the reason.
    pub(super) fn hand_over(mut self) -> UpdateError {
        let fds = std::mem::take(&mut self.saved.paused.fds);
        match self.saved.paused.new.hand_over(fds) {
            End::Committed => crate::ending::retire(),
            End::Failed(reason) => {
                self.saved.paused.new.end();
                self.saved.paused.timeline.stamp(Phase::Failed);
                reason
            }
        }
    }
}
