//! A BAR before the guest: the parts that it reaches directly (memslots), and those that are trapped (a bus).

use std::sync::Arc;
use std::time::Duration;

use theseus_resources::rate::Rate;

use super::bar::{BarAddress, BarRegister};
use crate::bus::{Bus, BusError, SharedDevice};

/// A guest moves its BARs as often as it likes.
static STUCK: Rate = Rate::new(10, Duration::from_secs(60));

/// Memory that the guest reaches without an exit, beside its RAM.
pub trait Memslots: Send + Sync {
    /// Maps `size` bytes at `hva` into the guest at `gpa` (all multiples of the page size), and returns the slot's
    /// number.
    ///
    /// # Safety
    /// `hva..hva + size` must be mapped, and the guest may touch it, until the slot is removed.
    unsafe fn add(&self, gpa: u64, size: u64, hva: u64) -> std::io::Result<u32>;
    /// Takes away what [`Memslots::add`] has mapped.
    ///
    /// # Errors
    /// It is mapped still; a later try may succeed.
    fn remove(&self, slot: u32) -> std::io::Result<()>;
}

/// Where BARs are put.
#[derive(Clone)]
pub struct AddressSpace {
    /// For the parts that the guest reaches directly.
    pub memslots: Arc<dyn Memslots>,
    /// For the trapped parts of memory BARs.
    pub mmio: Arc<Bus>,
    /// For I/O BARs, all of which is trapped.
    pub pio: Arc<Bus>,
}

/// What a part of a BAR is in this process, if the guest reaches it directly.
///
/// # Safety
/// `hva()..hva() + size()` is mapped until it is dropped, whole pages, and nothing in it is a Rust object.
pub(crate) unsafe trait BarMemory {
    fn hva(&self) -> u64;
    /// In bytes.
    fn size(&self) -> u64;
}

// SAFETY: there is none.
unsafe impl BarMemory for std::convert::Infallible {
    fn hva(&self) -> u64 {
        match *self {}
    }

    fn size(&self) -> u64 {
        match *self {}
    }
}

/// Why a BAR cannot be where the guest has put it; the caller adds the device's name and the BAR's.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlaceError {
    #[error("it wraps around the address space: the guest has to put it elsewhere")]
    Wraps,
    #[error("cannot map it into the guest: {0}: does it lie on another BAR?")]
    Memslot(std::io::Error),
    #[error("{0}: the guest has to put it elsewhere")]
    Bus(#[from] BusError),
}

/// What is before the guest.
struct Placed {
    address: u64,
    slots: Vec<u32>,
    /// Starts of the ranges on the bus.
    ranges: Vec<u64>,
}

/// See the module. Dropped, it is taken away from the guest before its memory ends.
pub(crate) struct PlacedBar<M: BarMemory> {
    pub(crate) register: BarRegister,
    space: AddressSpace,
    /// (offset in the BAR, its memory)
    direct: Vec<(u64, M)>,
    /// (offset in the BAR, size, who answers)
    trapped: Vec<(u64, u64, SharedDevice)>,
    placed: Option<Placed>,
    /// Memslots that could not be removed: tried again by [`PlacedBar::settle`].
    leftover: Vec<u32>,
}

impl<M: BarMemory> PlacedBar<M> {
    /// Nothing is before the guest yet.
    pub(crate) fn new(
        register: BarRegister,
        direct: Vec<(u64, M)>,
        trapped: Vec<(u64, u64, SharedDevice)>,
        space: AddressSpace,
    ) -> Self {
        Self { register, space, direct, trapped, placed: None, leftover: Vec::new() }
    }

    /// None while it does not decode.
    pub(crate) fn address(&self) -> Option<u64> {
        self.placed.as_ref().map(|placed| placed.address)
    }

    /// As [`PlacedBar::address`], for whoever asks what the guest sees.
    pub(crate) fn shown(&self) -> Option<BarAddress> {
        Some(self.register.at(self.address()?))
    }

    pub(crate) fn direct(&self) -> &[(u64, M)] {
        &self.direct
    }

    /// Where this process has `offset..offset + size` of the BAR mapped.
    pub(crate) fn vaddr(&self, offset: u64, size: u64) -> Option<u64> {
        self.direct.iter().find_map(|(start, memory)| {
            let into = offset.checked_sub(*start)?;
            (into.checked_add(size)? <= memory.size()).then(|| memory.hva() + into)
        })
    }

    /// Puts it before the guest at `address`, and away from where it was. On failure nothing of it is.
    pub(crate) fn put(&mut self, address: u64) -> Result<(), PlaceError> {
        self.take_away();
        let mut placed = Placed { address, slots: Vec::new(), ranges: Vec::new() };
        let done = self.place(&mut placed);
        match done {
            Ok(()) => self.placed = Some(placed),
            Err(_) => self.withdraw(placed),
        }
        done
    }

    fn place(&self, placed: &mut Placed) -> Result<(), PlaceError> {
        let at = |offset| placed.address.checked_add(offset).ok_or(PlaceError::Wraps);
        for (offset, memory) in &self.direct {
            // SAFETY: mapped until this is dropped, and withdrawn before.
            let slot = unsafe { self.space.memslots.add(at(*offset)?, memory.size(), memory.hva()) };
            placed.slots.push(slot.map_err(PlaceError::Memslot)?);
        }
        for (offset, size, trap) in &self.trapped {
            let start = at(*offset)?;
            self.bus().insert(start, *size, trap.clone())?;
            placed.ranges.push(start);
        }
        Ok(())
    }

    fn bus(&self) -> &Bus {
        if self.register.is_io() { &self.space.pio } else { &self.space.mmio }
    }

    fn withdraw(&mut self, placed: Placed) {
        let Placed { address: _, slots, ranges } = placed;
        for slot in slots {
            if let Err(e) = self.space.memslots.remove(slot) {
                STUCK.warn(|| format!("BAR {}: memslot {slot} cannot be removed: {e}", self.register.index));
                self.leftover.push(slot);
            }
        }
        ranges.iter().for_each(|start| self.bus().remove(*start));
    }

    /// Takes it away from the guest. False if something of it is left.
    pub(crate) fn take_away(&mut self) -> bool {
        let Some(placed) = self.placed.take() else { return true };
        self.withdraw(placed);
        self.leftover.is_empty()
    }

    /// Takes away what could not be taken away before. False if something is left still.
    pub(crate) fn settle(&mut self) -> bool {
        let Self { space, leftover, .. } = self;
        leftover.retain(|slot| space.memslots.remove(*slot).is_err());
        leftover.is_empty()
    }
}

impl<M: BarMemory> Drop for PlacedBar<M> {
    fn drop(&mut self) {
        self.take_away();
        self.settle();
    }
}

#[cfg(test)]
#[path = "placed_bar_tests.rs"]
mod tests;
