//! MSI-X emulation (PCI Local Bus 3.0, 6.8.2): the table and the pending bits the guest sees, over [`Vectors`].
//!
//! An update detaches all vectors: quiesced, what comes waits in the eventfds, which go over.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use theseus_resources::FdStore;
use theseus_resources::fd_store::Claims;

use super::regs::{MSIX_ENABLE, MSIX_FUNCTION_MASK, MSIX_WRITABLE};
use super::saved::{MsixHandles, MsixState};
use crate::interrupt::{InterruptController, InterruptError, MsiMessage, VectorError, Vectors};

/// Bytes of a table entry: address (8), data (4), vector control (4).
const ENTRY: usize = 16;
const VECTOR_CONTROL: usize = 12;
/// Vector control (6.8.2.9): this vector is masked.
const VECTOR_MASK: u8 = 1;

/// See the module.
pub struct Msix {
    /// As the guest reads it, [`ENTRY`] bytes a vector.
    table: Vec<u8>,
    control: u16,
    /// All of them, or none before the guest first enables MSI-X.
    vectors: Vectors,
}

/// Why MSI-X is not as the guest wants it, or cannot be restored; the caller adds the device's name.
#[derive(Debug, thiserror::Error)]
pub enum MsixError {
    /// There are no eventfds or GSIs for it, or they are others than those that were saved.
    #[error("MSI-X: {0}")]
    Vectors(#[from] VectorError),
    /// KVM has refused a route or an irqfd, which is tried again.
    #[error("MSI-X: {0}")]
    Interrupt(#[from] InterruptError),
    /// The table is not of whole entries, or there are eventfds, but not one for each.
    #[error("MSI-X: the saved state has {vectors} eventfds and a table of {table} bytes")]
    State {
        /// How many eventfds there are.
        vectors: usize,
        /// Bytes of the table.
        table: usize,
    },
    /// A later state of the same guest has a table of another size.
    #[error("MSI-X: the saved state has other vectors than the one before it")]
    OtherVectors,
}

impl Msix {
    /// `vectors` vectors, all masked, MSI-X off. `name` is the device's, for errors.
    pub(crate) fn new(name: &str, vectors: u16, controller: Arc<dyn InterruptController>, fd_store: FdStore) -> Self {
        let mut table = vec![0; usize::from(vectors) * ENTRY];
        table.chunks_exact_mut(ENTRY).for_each(|entry| entry[VECTOR_CONTROL] = VECTOR_MASK);
        Self { table, control: 0, vectors: Vectors::new(format!("{name} msix"), controller, fd_store) }
    }

    fn count(&self) -> usize {
        self.table.len() / ENTRY
    }

    /// Bytes of the table, and of the pending bit array (64 vectors a quadword).
    pub(crate) fn sizes(vectors: u16) -> (u64, u64) {
        (u64::from(vectors) * ENTRY as u64, u64::from(vectors).div_ceil(64) * 8)
    }

    /// Whether the guest has MSI-X on.
    pub fn enabled(&self) -> bool {
        Self::enables(self.control)
    }

    /// Whether this value of message control turns MSI-X on.
    pub(crate) fn enables(control: u16) -> bool {
        control & MSIX_ENABLE != 0
    }

    /// The vectors' eventfds, in order, made now if there are none yet: what the device is to signal.
    pub fn eventfds(&mut self) -> Result<Vec<BorrowedFd<'_>>, MsixError> {
        if self.vectors.is_empty() {
            self.vectors.make(self.count())?;
        }
        Ok(self.vectors.eventfds())
    }

    /// Takes a write of message control. When the guest turns MSI-X on, the device must signal [`Msix::eventfds`] by
    /// then.
    pub(crate) fn set_control(&mut self, control: u16) {
        let was_enabled = self.enabled();
        self.control = control & MSIX_WRITABLE;
        let _ = self.tell(0..self.count());
        if was_enabled && !self.enabled() {
            // Nothing is pending in a function that is off.
            self.vectors.drain();
        }
    }

    /// Reads from the table; what is behind its end reads as zero.
    pub(crate) fn table_read(&self, offset: u64, data: &mut [u8]) {
        for (n, out) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|start| start.checked_add(n));
            *out = at.and_then(|at| self.table.get(at).copied()).unwrap_or(0);
        }
    }

    pub(crate) fn table_write(&mut self, offset: u64, data: &[u8]) {
        let Some(start) = usize::try_from(offset).ok().filter(|start| *start < self.table.len()) else { return };
        let end = start.saturating_add(data.len()).min(self.table.len());
        for (at, value) in (start..end).zip(data) {
            self.table[at] = match at % ENTRY {
                VECTOR_CONTROL => value & VECTOR_MASK,
                at if at > VECTOR_CONTROL => 0,
                _ => *value,
            };
        }
        let _ = self.tell(start / ENTRY..end.div_ceil(ENTRY));
    }

    /// Reads from the pending bit array; writes to it have no effect.
    pub(crate) fn pba_read(&self, offset: u64, data: &mut [u8]) {
        for (n, out) in data.iter_mut().enumerate() {
            let first = offset.saturating_add(n as u64).saturating_mul(8);
            *out = (0..8).fold(0, |bits, bit| bits | u8::from(self.pending(first.saturating_add(bit))) << bit);
        }
    }

    fn pending(&self, vector: u64) -> bool {
        usize::try_from(vector).is_ok_and(|vector| self.vectors.is_pending(vector))
    }

    fn masked(&self, vector: usize) -> bool {
        let control = self.table.get(vector * ENTRY + VECTOR_CONTROL);
        self.control & MSIX_FUNCTION_MASK != 0 || control.is_none_or(|control| control & VECTOR_MASK != 0)
    }

    fn message(&self, vector: usize) -> MsiMessage {
        let mut entry = [0; ENTRY];
        self.table_read((vector * ENTRY) as u64, &mut entry);
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = entry;
        MsiMessage { address: u64::from_le_bytes([a, b, c, d, e, f, g, h]), data: u32::from_le_bytes([i, j, k, l]) }
    }

    /// Has some vectors as the table says.
    fn tell(&mut self, range: Range<usize>) -> Result<(), InterruptError> {
        let wanted: Vec<_> = range.clone().map(|n| self.wanted(n)).collect();
        let start = range.start;
        self.vectors.set(range, |n| wanted.get(n - start).copied().flatten())
    }

    fn wanted(&self, vector: usize) -> Option<MsiMessage> {
        (self.enabled() && !self.masked(vector)).then(|| self.message(vector))
    }

    /// For eventfds that were made after MSI-X was turned on.
    pub(crate) fn attach_missing(&mut self) -> Result<(), MsixError> {
        Ok(self.tell(0..self.count())?)
    }

    /// Tries again what the host has refused, if anything.
    pub(crate) fn settle(&mut self) -> Result<(), MsixError> {
        Ok(self.vectors.settle()?)
    }

    /// Detaches all irqfds, before an update: what comes waits in the eventfds, whatever a guest that still runs does to
    /// its table. Undone by [`Msix::resume_irqfds`], after an error too.
    pub fn quiesce_irqfds(&mut self) -> Result<(), MsixError> {
        Ok(self.vectors.quiesce()?)
    }

    /// Attaches the irqfds of all unmasked vectors, which injects what has come meanwhile: in the old image after an
    /// update that did not happen, in the new one once all LAPICs and the GSI routes are in place.
    pub fn resume_irqfds(&mut self) -> Result<(), MsixError> {
        Ok(self.vectors.resume()?)
    }

    /// Signals every vector that can fire, once: where what came may have been lost. A spurious
    /// interrupt is legal, a lost one is not.
    pub(crate) fn signal_all(&self) {
        if self.enabled() {
            self.vectors.signal_all();
        }
    }

    /// The end of the device: detaches everything and gives the GSIs back.
    pub(crate) fn release(&mut self) {
        self.set_control(0);
        self.vectors.release();
    }

    pub(crate) fn save(&self) -> (MsixState, MsixHandles) {
        let Self { table, control, vectors } = self;
        let state = MsixState { table: table.clone(), control: *control, pending: vectors.pending() };
        (state, MsixHandles { vectors: vectors.save() })
    }

    /// Comes up quiesced, its GSIs and routes given to `controller` but nothing attached.
    pub(crate) fn restore(
        name: &str,
        (state, handles): (MsixState, MsixHandles),
        controller: Arc<dyn InterruptController>,
        fd_store: FdStore,
        claims: &mut Claims,
    ) -> Result<Self, MsixError> {
        let vectors = Vectors::new(format!("{name} msix"), controller, fd_store);
        let mut this = Self { table: vec![0; state.table.len()], control: 0, vectors };
        this.mend(state, handles, claims)?;
        Ok(this)
    }

    /// Takes a later state of the same guest. Nothing is attached yet.
    pub(crate) fn mend(
        &mut self,
        state: MsixState,
        handles: MsixHandles,
        claims: &mut Claims,
    ) -> Result<(), MsixError> {
        // What is pending is counted in the eventfds.
        let (MsixState { table, control, pending: _ }, MsixHandles { vectors }) = (state, handles);
        let is_whole =
            table.len().is_multiple_of(ENTRY) && (vectors.is_empty() || vectors.len() == table.len() / ENTRY);
        if !is_whole {
            return Err(MsixError::State { vectors: vectors.len(), table: table.len() });
        }
        if table.len() != self.table.len() {
            return Err(MsixError::OtherVectors);
        }
        self.vectors.mend(&vectors, claims)?;
        self.table = table;
        self.control = control;
        // Nothing of it reaches KVM before the vectors are resumed.
        Ok(self.tell(0..self.count())?)
    }
}

#[cfg(test)]
#[path = "msix_tests.rs"]
mod tests;
