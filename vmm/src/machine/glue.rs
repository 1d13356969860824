//! What the devices need of the hypervisor, said in the devices' own words.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use theseus_devices::interrupt::{IrqLine, Memslots, Msi, MsiError, MsiMessage};
use theseus_hypervisor::{Error, MsiRoute, Vm};
use theseus_resources::rate::Rate;

/// A guest can provoke as many as it likes.
static LOST: Rate = Rate::new(10, Duration::from_secs(60));

/// An IOAPIC pin.
pub struct Pin {
    pub vm: Arc<Vm>,
    pub gsi: u32,
}

impl IrqLine for Pin {
    fn pulse(&self) {
        if let Err(error) = self.vm.pulse_irq(self.gsi) {
            LOST.warn(|| format!("an interrupt is lost: {error}"));
        }
    }
}

pub struct VmMsi(pub Arc<Vm>);

fn io(error: Error) -> std::io::Error {
    match error {
        Error::Call { source, .. } => source,
        other => std::io::Error::other(other),
    }
}

fn msi_error(what: String) -> impl FnOnce(Error) -> MsiError {
    move |error| MsiError { what, source: io(error) }
}

fn route(message: MsiMessage) -> MsiRoute {
    MsiRoute { address: message.address, data: message.data }
}

impl Msi for VmMsi {
    fn allocate(&self, count: u32) -> Result<Vec<u32>, MsiError> {
        self.0.allocate_gsis(count).map_err(msi_error(format!("{count} GSIs")))
    }

    fn adopt(&self, gsis: &[(u32, Option<MsiMessage>)]) -> Result<(), MsiError> {
        self.0.stage_routes(gsis.iter().map(|(gsi, message)| (*gsi, message.map(route))));
        Ok(())
    }

    fn free(&self, gsis: &[u32]) {
        self.0.free_gsis(gsis);
    }

    fn route(&self, gsi: u32, message: MsiMessage) -> Result<(), MsiError> {
        self.0.route_msi(gsi, route(message)).map_err(msi_error(format!("route of GSI {gsi}")))
    }

    fn attach(&self, gsi: u32, eventfd: BorrowedFd<'_>) -> Result<(), MsiError> {
        self.0.attach_irqfd(gsi, eventfd).map_err(msi_error(format!("irqfd of GSI {gsi}")))
    }

    fn detach(&self, gsi: u32, eventfd: BorrowedFd<'_>) -> Result<(), MsiError> {
        self.0.detach_irqfd(gsi, eventfd).map_err(msi_error(format!("irqfd of GSI {gsi}")))
    }
}

pub struct VmMemslots(pub Arc<Vm>);

impl Memslots for VmMemslots {
    unsafe fn add(&self, gpa: u64, size: u64, hva: u64) -> std::io::Result<u32> {
        // SAFETY: the caller's promise.
        unsafe { self.0.add_memslot(gpa, size, hva, false) }.map_err(io)
    }

    fn remove(&self, slot: u32) -> std::io::Result<()> {
        self.0.remove_memslot(slot).map_err(io)
    }
}
