//! What of a hand-over is done while the guest still runs: what goes over beside the machine is given to the new VMM,
//! and the parts of the state that the guest cannot change are written.

use std::os::fd::AsFd;

use theseus_resources::{FdStore, StateWriter, StoredFd};

use super::UpdateError;
use super::saved::Handover;
use super::sealed;
use super::standby::Standby;
use crate::build_info;
use crate::machine::state::SaveScope;
use crate::machine::{Machine, MachineError};

/// What of the state is written before the guest stands still.
pub(super) struct Begun {
    handover: Handover,
    /// With the machine's frame in it, and the handover if that has not gone ahead.
    pub writer: StateWriter,
    /// What the new VMM does not have yet.
    pub fds: Vec<StoredFd>,
    /// Of the fd store.
    generation: (u32, usize),
}

impl Begun {
    /// What goes over beside the machine goes ahead of it, if the new VMM knows that.
    pub(super) fn new(
        handover: Handover,
        guest: Option<&HeldGuest<'_>>,
        new: &Standby,
        fd_store: &FdStore,
    ) -> Result<Self, UpdateError> {
        if !new.takes_ahead {
            return Self::whole(handover, guest, new, fd_store);
        }
        let mut this = Self::of(handover, new, fd_store);
        let mut beside = StateWriter::new(&build_info::this().build_id);
        this.handover.encode(&mut beside)?;
        let sealed = sealed::seal("handover", &beside.finish().map_err(MachineError::from)?);
        let sealed = sealed.map_err(UpdateError::os("cannot keep what goes over ahead"))?;
        new.send_ahead(sealed.as_fd(), std::mem::take(&mut this.fds))?;
        this.frame(guest)?;
        Ok(this)
    }

    /// With the handover in it.
    fn whole(
        handover: Handover,
        guest: Option<&HeldGuest<'_>>,
        new: &Standby,
        fd_store: &FdStore,
    ) -> Result<Self, UpdateError> {
        let mut this = Self::of(handover, new, fd_store);
        this.handover.encode(&mut this.writer)?;
        this.frame(guest)?;
        Ok(this)
    }

    fn of(mut handover: Handover, new: &Standby, fd_store: &FdStore) -> Self {
        let generation = fd_store.generation();
        let (records, fds) = new.missing(fd_store);
        handover.fd_store = records;
        Self { handover, writer: StateWriter::new(&build_info::this().build_id), fds, generation }
    }

    fn frame(&mut self, guest: Option<&HeldGuest<'_>>) -> Result<(), MachineError> {
        let frame =
            |guest: &HeldGuest<'_>| guest.machine.save_frame(&mut self.writer, SaveScope::Full, guest.was_running);
        guest.map_or(Ok(()), frame)
    }

    /// As it is now.
    pub(super) fn renew(
        self,
        guest: Option<&HeldGuest<'_>>,
        new: &Standby,
        fd_store: &FdStore,
    ) -> Result<Self, UpdateError> {
        if fd_store.generation() == self.generation {
            return Ok(self);
        }
        Self::whole(self.handover, guest, new, fd_store)
    }
}

/// A guest that is about to be stopped, or is. Dropped, its interrupts arrive again, and it runs if it did.
pub(super) struct HeldGuest<'a> {
    pub machine: &'a mut Machine,
    pub was_running: bool,
}

impl<'a> HeldGuest<'a> {
    pub(super) fn new(machine: &'a mut Machine) -> Self {
        let was_running = machine.vcpus.is_running();
        Self { machine, was_running }
    }
}

impl Drop for HeldGuest<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.machine.activate(self.was_running) {
            log::error!("the guest cannot go on: {error}");
        }
    }
}
