//! MSI-X emulation (PCI Local Bus 3.0, 6.8.2): the table and the pending bits the guest sees, over an eventfd for each
//! vector.
//!
//! ```text
//! device -> eventfd -> irqfd -> GSI route (the table entry's message) -> guest
//! ```
//!
//! A masked vector is one whose irqfd is detached: its events stay counted in the eventfd, which is the pending bit,
//! and attaching the irqfd again injects them. An update uses the same mechanism: quiesced, all vectors are detached,
//! so what comes while vCPUs are stopped waits in the eventfds, which go over.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use serde::{Deserialize, Serialize};
use theseus_resources::fd_store::{Claims, FdStoreError};
use theseus_resources::{FdKind, FdStore, Slot, StoredFd};

use super::rate_limited_log::RateLimitedLog;
use crate::interrupt::{Msi, MsiError, MsiMessage};

/// Message control (6.8.2.3): all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Message control: MSI-X is on.
const ENABLE: u16 = 1 << 15;
/// Bytes of a table entry: address (8), data (4), vector control (4).
const ENTRY: usize = 16;
const VECTOR_CONTROL: usize = 12;
/// Vector control (6.8.2.9): this vector is masked.
const VECTOR_MASK: u8 = 1;

/// What a vector needs of the host; made when the guest first enables MSI-X.
#[derive(Debug)]
struct Wire {
    eventfd: StoredFd,
    gsi: u32,
    /// The message the GSI is routed to.
    routed: Option<MsiMessage>,
    /// The irqfd is assigned.
    attached: bool,
}

impl Wire {
    fn detach(&mut self, msi: &dyn Msi) -> Result<(), MsiError> {
        msi.detach(self.gsi, self.eventfd.as_fd())?;
        self.attached = false;
        Ok(())
    }
}

/// See the module.
pub struct Msix {
    name: String,
    msi: Arc<dyn Msi>,
    fd_store: FdStore,
    /// As the guest reads it, [`ENTRY`] bytes a vector.
    table: Vec<u8>,
    control: u16,
    /// One for each vector, or none yet.
    wires: Vec<Wire>,
    quiesced: bool,
    /// The host has refused something: [`Msix::settle`] tries again.
    dirty: bool,
    complaints: RateLimitedLog,
}

/// Saved state of [`Msix`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    #[serde(with = "serde_bytes")]
    table: Vec<u8>,
    control: u16,
    wires: Vec<WireState>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct WireState {
    slot: Slot,
    gsi: u32,
    routed: Option<MsiMessage>,
}

#[derive(Debug, thiserror::Error)]
pub enum MsixError {
    #[error("MSI-X: cannot make an eventfd for vector {vector}: {source} (raise RLIMIT_NOFILE)")]
    Eventfd { vector: usize, source: std::io::Error },
    #[error("MSI-X: {0}")]
    Msi(#[from] MsiError),
    #[error("MSI-X: {0}")]
    FdStore(#[from] FdStoreError),
    #[error("MSI-X: the saved state has {wires} eventfds and a table of {table} bytes")]
    State { wires: usize, table: usize },
    #[error("MSI-X: the saved state has other vectors than the one before it")]
    OtherVectors,
}

impl Msix {
    /// `vectors` vectors, all masked, MSI-X off. `name` is the device's, for errors.
    pub fn new(name: &str, vectors: u16, msi: Arc<dyn Msi>, fd_store: FdStore) -> Self {
        let mut table = vec![0; usize::from(vectors) * ENTRY];
        table.chunks_exact_mut(ENTRY).for_each(|entry| entry[VECTOR_CONTROL] = VECTOR_MASK);
        Self {
            name: name.to_owned(),
            msi,
            fd_store,
            table,
            control: 0,
            wires: Vec::new(),
            quiesced: false,
            dirty: false,
            complaints: RateLimitedLog::default(),
        }
    }

    fn vectors(&self) -> usize {
        self.table.len() / ENTRY
    }

    /// Bytes of the table, and of the pending bit array (64 vectors a quadword).
    pub fn sizes(vectors: u16) -> (u64, u64) {
        (u64::from(vectors) * ENTRY as u64, u64::from(vectors).div_ceil(64) * 8)
    }

    pub fn enabled(&self) -> bool {
        Self::enables(self.control)
    }

    /// Whether this value of message control turns MSI-X on.
    pub fn enables(control: u16) -> bool {
        control & ENABLE != 0
    }

    /// The vectors' eventfds, in order, made now if there are none yet: what the device is to signal.
    pub fn eventfds(&mut self) -> Result<Vec<BorrowedFd<'_>>, MsixError> {
        if self.wires.is_empty() {
            let count = self.vectors();
            let gsis = self.msi.allocate(count as u32)?;
            let wires: Result<Vec<_>, _> =
                gsis.iter().enumerate().map(|(vector, gsi)| self.wire(vector, *gsi)).collect();
            match wires {
                Ok(wires) => self.wires = wires,
                Err(e) => {
                    self.msi.free(&gsis);
                    return Err(e);
                }
            }
        }
        Ok(self.wires.iter().map(|wire| wire.eventfd.as_fd()).collect())
    }

    fn wire(&self, vector: usize, gsi: u32) -> Result<Wire, MsixError> {
        let eventfd = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|e| MsixError::Eventfd { vector, source: e.into() })?;
        let eventfd = self.fd_store.keep(format!("{} msix {vector}", self.name), FdKind::Interrupt, eventfd);
        Ok(Wire { eventfd, gsi, routed: None, attached: false })
    }

    /// Takes a write of message control. When the guest turns MSI-X on, the device must signal [`Msix::eventfds`] by
    /// then.
    pub fn set_control(&mut self, control: u16) {
        let was_enabled = self.enabled();
        self.control = control & (ENABLE | FUNCTION_MASK);
        let _ = self.reconcile_all();
        if was_enabled && !self.enabled() {
            // Nothing is pending in a function that is off.
            for wire in &self.wires {
                let _ = rustix::io::read(&wire.eventfd, &mut [0; 8]);
            }
        }
    }

    /// Reads from the table; what is behind its end reads as zero.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        for (n, out) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|start| start.checked_add(n));
            *out = at.and_then(|at| self.table.get(at).copied()).unwrap_or(0);
        }
    }

    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        let Some(start) = usize::try_from(offset).ok().filter(|start| *start < self.table.len()) else { return };
        let end = start.saturating_add(data.len()).min(self.table.len());
        for (at, value) in (start..end).zip(data) {
            self.table[at] = match at % ENTRY {
                VECTOR_CONTROL => value & VECTOR_MASK,
                at if at > VECTOR_CONTROL => 0,
                _ => *value,
            };
        }
        let _ = self.reconcile(start / ENTRY..end.div_ceil(ENTRY));
    }

    /// Reads from the pending bit array; writes to it have no effect.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        for (n, out) in data.iter_mut().enumerate() {
            let first = offset.saturating_add(n as u64).saturating_mul(8);
            *out = (0..8).fold(0, |bits, bit| bits | u8::from(self.pending(first.saturating_add(bit))) << bit);
        }
    }

    fn pending(&self, vector: u64) -> bool {
        let wire = usize::try_from(vector).ok().and_then(|vector| self.wires.get(vector));
        // The count of an attached eventfd was injected already, and stays until it is detached.
        wire.is_some_and(|wire| !wire.attached && readable(wire.eventfd.as_fd()))
    }

    fn masked(&self, vector: usize) -> bool {
        let control = self.table.get(vector * ENTRY + VECTOR_CONTROL);
        self.control & FUNCTION_MASK != 0 || control.is_none_or(|control| control & VECTOR_MASK != 0)
    }

    fn message(&self, vector: usize) -> MsiMessage {
        let mut entry = [0; ENTRY];
        self.table_read((vector * ENTRY) as u64, &mut entry);
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = entry;
        MsiMessage { address: u64::from_le_bytes([a, b, c, d, e, f, g, h]), data: u32::from_le_bytes([i, j, k, l]) }
    }

    /// Brings irqfds and routes of some vectors in line with the table: detach, then route, then attach, each for all
    /// of them. State changes after success only: what the host refuses is logged, as the guest has no way to be told,
    /// tried again by [`Msix::settle`], and the first of it returned. A message that is no route to KVM (EINVAL) is the
    /// guest's own fault: that waits for another one.
    fn reconcile(&mut self, range: Range<usize>) -> Result<(), MsixError> {
        let on = self.enabled() && !self.quiesced;
        let range = range.start.min(self.wires.len())..range.end.min(self.wires.len());
        let plan: Vec<_> = range.clone().map(|n| (on && !self.masked(n), self.message(n))).collect();
        let mut failed = Vec::new();
        let Some(wires) = self.wires.get_mut(range) else { return Ok(()) };
        for (wire, (wanted, _)) in wires.iter_mut().zip(&plan) {
            if wire.attached && !wanted {
                failed.extend(wire.detach(&*self.msi).err());
            }
        }
        for (wire, (wanted, message)) in wires.iter_mut().zip(&plan) {
            if *wanted && wire.routed != Some(*message) {
                match self.msi.route(wire.gsi, *message) {
                    Ok(()) => wire.routed = Some(*message),
                    Err(e) => {
                        if e.source.raw_os_error() == Some(libc::EINVAL) {
                            self.complaints.warn(|| format!("{}: MSI-X: {e}", self.name));
                        } else {
                            failed.push(e);
                        }
                        // What comes waits in the eventfd: where it would go now nobody expects it any more.
                        if wire.attached {
                            failed.extend(wire.detach(&*self.msi).err());
                        }
                    }
                }
            }
        }
        for (wire, (wanted, message)) in wires.iter_mut().zip(&plan) {
            if *wanted && !wire.attached && wire.routed == Some(*message) {
                match self.msi.attach(wire.gsi, wire.eventfd.as_fd()) {
                    Ok(()) => wire.attached = true,
                    Err(e) => failed.push(e),
                }
            }
        }
        for error in &failed {
            self.complaints.warn(|| format!("{}: MSI-X: {error}", self.name));
        }
        self.dirty |= !failed.is_empty();
        failed.into_iter().next().map_or(Ok(()), |error| Err(error.into()))
    }

    /// For eventfds that were made after MSI-X was turned on.
    pub fn attach_missing(&mut self) -> Result<(), MsixError> {
        self.reconcile_all()
    }

    fn reconcile_all(&mut self) -> Result<(), MsixError> {
        self.dirty = false;
        self.reconcile(0..self.vectors())
    }

    /// Tries again what the host has refused, if anything.
    pub fn settle(&mut self) -> Result<(), MsixError> {
        if self.dirty { self.reconcile_all() } else { Ok(()) }
    }

    /// Detaches all irqfds, with vCPUs stopped, before an update. Undone by [`Msix::resume_irqfds`], after an error
    /// too.
    pub fn quiesce_irqfds(&mut self) -> Result<(), MsixError> {
        self.quiesced = true;
        self.reconcile_all()
    }

    /// Attaches the irqfds of all unmasked vectors, which injects what has come meanwhile: in the old image after an
    /// update that did not happen, in the new one once all LAPICs and the GSI routes are in place.
    pub fn resume_irqfds(&mut self) -> Result<(), MsixError> {
        self.quiesced = false;
        self.reconcile_all()
    }

    /// Signals every vector that can fire, once: where what came may have been lost. A spurious
    /// interrupt is legal, a lost one is not.
    pub fn signal_all(&self) {
        for (vector, wire) in self.wires.iter().enumerate().filter(|_| self.enabled()) {
            if let Err(e) = rustix::io::write(&wire.eventfd, &1u64.to_ne_bytes()) {
                log::warn!("{}: MSI-X vector {vector}: cannot signal it: {e}", self.name);
            }
        }
    }

    /// The end of the device: detaches everything and gives the GSIs back.
    pub fn release(&mut self) {
        self.set_control(0);
        let gsis: Vec<_> = self.wires.drain(..).map(|wire| wire.gsi).collect();
        self.msi.free(&gsis);
    }

    pub fn save(&self) -> MsixState {
        let Self { name: _, msi: _, fd_store: _, table, control, wires, quiesced: _, dirty: _, complaints: _ } = self;
        let wires = wires.iter().map(|wire| {
            let Wire { eventfd, gsi, routed, attached: _ } = wire;
            WireState { slot: eventfd.slot(), gsi: *gsi, routed: *routed }
        });
        MsixState { table: table.clone(), control: *control, wires: wires.collect() }
    }

    /// Comes up quiesced, its GSIs and routes given to `msi` but nothing attached.
    pub fn restore(
        name: &str,
        state: MsixState,
        msi: Arc<dyn Msi>,
        fd_store: FdStore,
        claims: &mut Claims,
    ) -> Result<Self, MsixError> {
        let mut this = Self {
            name: name.to_owned(),
            msi,
            fd_store,
            table: vec![0; state.table.len()],
            control: 0,
            wires: Vec::new(),
            quiesced: true,
            dirty: false,
            complaints: RateLimitedLog::default(),
        };
        this.mend(state, claims)?;
        Ok(this)
    }

    /// Takes a later state of the same guest. Nothing is attached yet.
    pub fn mend(&mut self, state: MsixState, claims: &mut Claims) -> Result<(), MsixError> {
        let MsixState { table, control, wires } = state;
        let is_whole = table.len().is_multiple_of(ENTRY) && (wires.is_empty() || wires.len() == table.len() / ENTRY);
        if !is_whole {
            return Err(MsixError::State { wires: wires.len(), table: table.len() });
        }
        // Once made, they stay.
        let is_later =
            self.wires.iter().zip(&wires).all(|(old, new)| (old.eventfd.slot(), old.gsi) == (new.slot, new.gsi));
        if table.len() != self.table.len() || !is_later || wires.len() < self.wires.len() {
            return Err(MsixError::OtherVectors);
        }
        let gsis: Vec<_> = wires.iter().map(|wire| (wire.gsi, wire.routed)).collect();
        self.msi.adopt(&gsis)?;
        for (old, new) in self.wires.iter_mut().zip(&wires) {
            old.routed = new.routed;
        }
        for WireState { slot, gsi, routed } in wires.into_iter().skip(self.wires.len()) {
            let eventfd = claims.claim(slot, FdKind::Interrupt)?;
            self.wires.push(Wire { eventfd, gsi, routed, attached: false });
        }
        self.table = table;
        self.control = control;
        Ok(())
    }
}

fn readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(1))
}

#[cfg(test)]
#[path = "msix_tests.rs"]
pub mod tests;
