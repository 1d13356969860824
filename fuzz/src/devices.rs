//! The machine around devices: interrupt lines, requests of the guest.

use std::sync::Arc;

use theseus_devices::device::Surroundings;
use theseus_devices::interrupt::{GuestRequest, GuestRequests, IrqLine};
use theseus_devices::pci::bus::PciBus;
use theseus_resources::FdStore;

struct Unheard;

impl IrqLine for Unheard {
    fn pulse(&self) {}
}

impl GuestRequests for Unheard {
    fn notify(&self, _: GuestRequest) {}

    fn pending(&self) -> bool {
        false
    }
}

/// Calls `with` with what devices have around them where nobody listens.
pub(crate) fn surrounded<T>(fd_store: &FdStore, pci: &Arc<PciBus>, with: impl FnOnce(&Surroundings<'_>) -> T) -> T {
    let requests: Arc<dyn GuestRequests> = Arc::new(Unheard);
    let pin = |_| Arc::new(Unheard) as Arc<dyn IrqLine>;
    with(&Surroundings { pin: &pin, requests: &requests, fd_store, pci })
}
