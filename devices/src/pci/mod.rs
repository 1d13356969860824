//! PCI: the bus, configuration space, MSI-X.

pub mod bus;
pub mod config;
pub mod msix;

/// A function on the PCI bus as its configuration space.
pub trait PciDevice: Send {
    /// `offset` < 4096; `data` is 1, 2 or 4 bytes and does not cross a dword (the bus splits and checks).
    fn config_read(&mut self, offset: u16, data: &mut [u8]);
    fn config_write(&mut self, offset: u16, data: &[u8]);
}
