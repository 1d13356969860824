//! What all parts of a passed-through device share: what it is wired to, and why it cannot be had.

use std::sync::Arc;

use theseus_resources::FdStore;

use super::config::ConfigError;
use super::device::DeviceError;
use crate::interrupt::InterruptController;
use crate::pci::placed_bar::AddressSpace;
use crate::pci::placement::NoRoom;

/// What a device is wired to in this image.
#[derive(Clone)]
pub struct Wiring {
    /// Keeps what it opens, for the next image.
    pub fd_store: FdStore,
    /// What its vectors ask of KVM.
    pub interrupts: Arc<dyn InterruptController>,
    /// Where its BARs are put before the guest.
    pub space: AddressSpace,
}

/// Why a device cannot be passed through; the caller adds the device's name.
#[derive(Debug, thiserror::Error)]
pub(super) enum PassthroughError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}
