//! What the devices need of the hypervisor, said in the devices' own words.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use theseus_devices::interrupt::{InterruptController, InterruptError, IoAddress, IoEvents, IrqLine, MsiMessage};
use theseus_devices::pci::placed_bar::Memslots;
use theseus_hypervisor::{Error, IoEventAt, MsiRoute, Vm};
use theseus_resources::rate::Rate;

/// A guest can provoke as many as it likes.
static LOST: Rate = Rate::new(10, Duration::from_secs(60));

/// An IOAPIC pin.
pub(super) struct Pin {
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

pub(super) struct VmInterrupts(pub Arc<Vm>);

fn io(error: Error) -> std::io::Error {
    match error {
        Error::Call { source, .. } => source,
        other => std::io::Error::other(other),
    }
}

fn failed(what: String) -> impl FnOnce(Error) -> InterruptError {
    move |error| InterruptError { what, source: io(error) }
}

fn route(message: MsiMessage) -> MsiRoute {
    MsiRoute { address: message.address, data: message.data }
}

impl InterruptController for VmInterrupts {
    fn allocate(&self, count: u32) -> Result<Vec<u32>, InterruptError> {
        self.0.allocate_gsis(count).map_err(failed(format!("{count} GSIs")))
    }

    fn adopt(&self, gsis: &[u32]) -> Result<(), InterruptError> {
        self.0.adopt_gsis(gsis).map_err(failed(format!("GSIs {gsis:?}")))
    }

    fn note(&self, routes: &[(u32, Option<MsiMessage>)]) {
        self.0.stage_routes(routes.iter().map(|(gsi, message)| (*gsi, message.map(route))));
    }

    fn free(&self, gsis: &[u32]) {
        self.0.free_gsis(gsis);
    }

    fn route(&self, routes: &[(u32, MsiMessage)]) -> Result<(), InterruptError> {
        let table: Vec<_> = routes.iter().map(|(gsi, message)| (*gsi, route(*message))).collect();
        let what = match routes {
            [(gsi, _)] => format!("route of GSI {gsi}"),
            _ => format!("routes of {} GSIs", routes.len()),
        };
        self.0.route_msis(&table).map_err(failed(what))
    }

    fn attach(
        &self,
        gsi: u32,
        eventfd: BorrowedFd<'_>,
        resample: Option<BorrowedFd<'_>>,
    ) -> Result<(), InterruptError> {
        let done = match resample {
            None => self.0.attach_irqfd(gsi, eventfd),
            Some(resample) => self.0.attach_level_irqfd(gsi, eventfd, resample),
        };
        done.map_err(failed(format!("irqfd of GSI {gsi}")))
    }

    fn detach(&self, gsi: u32, eventfd: BorrowedFd<'_>) -> Result<(), InterruptError> {
        self.0.detach_irqfd(gsi, eventfd).map_err(failed(format!("irqfd of GSI {gsi}")))
    }
}

fn place(at: IoAddress) -> IoEventAt {
    match at {
        IoAddress::Port(port) => IoEventAt::Port(port),
        IoAddress::Mmio(gpa) => IoEventAt::Mmio(gpa),
    }
}

impl IoEvents for VmInterrupts {
    fn attach(&self, at: IoAddress, eventfd: BorrowedFd<'_>) -> Result<(), InterruptError> {
        self.0.attach_ioeventfd(place(at), eventfd).map_err(failed(format!("ioeventfd at {at:x?}")))
    }

    fn detach(&self, at: IoAddress, eventfd: BorrowedFd<'_>) -> Result<(), InterruptError> {
        self.0.detach_ioeventfd(place(at), eventfd).map_err(failed(format!("ioeventfd at {at:x?}")))
    }
}

pub(super) struct VmMemslots(pub Arc<Vm>);

impl Memslots for VmMemslots {
    unsafe fn add(&self, gpa: u64, size: u64, hva: u64) -> std::io::Result<u32> {
        // SAFETY: the caller's promise.
        unsafe { self.0.add_memslot(gpa, size, hva, false) }.map_err(io)
    }

    fn remove(&self, slot: u32) -> std::io::Result<()> {
        self.0.remove_memslot(slot).map_err(io)
    }
}
