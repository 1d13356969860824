//! PCI: the bus, and what functions are made of, emulated and passed-through ones: configuration space, BARs and their
//! places in the guest's windows, MSI-X.

pub mod bar;
pub mod bus;
pub(crate) mod config;
pub(crate) mod decoding;
#[cfg(any(test, feature = "fakes"))]
pub(crate) mod fake;
pub mod msix;
pub(crate) mod msix_capability;
pub mod placed_bar;
pub(crate) mod placement;
pub(crate) mod regs;
pub(crate) mod saved;

/// A function on the PCI bus as its configuration space.
pub trait PciDevice: Send {
    /// `offset` < 4096; `data` is 1, 2 or 4 bytes and does not cross a dword (the bus splits and checks).
    fn config_read(&mut self, offset: u16, data: &mut [u8]);
    /// As [`PciDevice::config_read`]. Bits that cannot be written keep their value.
    fn config_write(&mut self, offset: u16, data: &[u8]);
}

#[cfg(test)]
#[path = "function_tests.rs"]
mod tests;
