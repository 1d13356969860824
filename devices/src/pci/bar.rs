//! A BAR's register (PCI Local Bus 3.0, 6.2.5), and where it puts the BAR.

use super::config::ConfigSpace;
use super::regs::*;
use super::saved::BarRegisterState;

/// What a memory BAR takes of the guest's memory at least, in bytes.
pub(crate) const PAGE: u64 = 4096;

/// A BAR to emulate. `size` is a power of two; `address` is the one it has at the guest's boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BarRegister {
    pub(crate) index: u8,
    /// The read-only low bits: type and prefetchable.
    pub(crate) flags: u32,
    pub(crate) size: u64,
    pub(crate) address: u64,
    /// Takes the next register too.
    pub(crate) is_64bit: bool,
}

/// A BAR that decodes, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarAddress {
    /// Of its first register, 0 to 5.
    pub index: u8,
    /// The first port or guest physical address.
    pub address: u64,
    /// Ports or bytes.
    pub size: u64,
    /// What the guest takes it for.
    pub kind: BarKind,
    /// Reads have no side effects, and writes may be merged (bit 3 of a memory BAR).
    pub prefetchable: bool,
}

/// Bits 0 to 2 of a BAR's register (PCI Local Bus 3.0, 6.2.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory, with an address of one register.
    Memory32,
    /// Memory, with an address of two registers.
    Memory64,
}

impl BarRegister {
    pub(crate) fn is_io(&self) -> bool {
        self.flags & BAR_IO != 0
    }

    /// What of COMMAND lets it decode.
    pub(crate) fn decode_bit(&self) -> u16 {
        if self.is_io() { COMMAND_IO } else { COMMAND_MEMORY }
    }

    pub(crate) fn save(&self) -> BarRegisterState {
        let Self { index, flags, size, address, is_64bit } = *self;
        BarRegisterState { index, flags, size, address, is_64bit }
    }

    pub(crate) fn restore(state: BarRegisterState) -> Self {
        let BarRegisterState { index, flags, size, address, is_64bit } = state;
        Self { index, flags, size, address, is_64bit }
    }

    fn offset(&self) -> u16 {
        BAR0 + 4 * u16::from(self.index)
    }

    /// The address bits.
    fn mask(&self) -> u64 {
        !self.size.saturating_sub(1)
    }

    /// Puts it in, with its address at boot.
    pub(crate) fn emulate(&self, config: &mut ConfigSpace) {
        let value = self.address & self.mask() | u64::from(self.flags);
        let count = if self.is_64bit { 8 } else { 4 };
        for (n, (value, writable)) in (0..count).zip(value.to_le_bytes().into_iter().zip(self.mask().to_le_bytes())) {
            config.emulate(self.offset() + n, &[value], 0xFF, writable);
        }
    }

    /// The address that the guest has programmed.
    pub(crate) fn address_in(&self, config: &ConfigSpace) -> u64 {
        let value = u64::from_le_bytes(config.value(self.offset()));
        let value = if self.is_64bit { value } else { value & u64::from(u32::MAX) };
        value & self.mask()
    }

    /// How the guest sees it at `address`.
    pub(crate) fn at(&self, address: u64) -> BarAddress {
        let kind = match (self.is_io(), self.is_64bit) {
            (true, _) => BarKind::Io,
            (false, true) => BarKind::Memory64,
            (false, false) => BarKind::Memory32,
        };
        let prefetchable = kind != BarKind::Io && self.flags & BAR_MEMORY_PREFETCHABLE != 0;
        BarAddress { index: self.index, address, size: self.size, kind, prefetchable }
    }
}
