//! GSI routing and irqfds. GSIs below [`FIRST_MSI_GSI`] are IOAPIC and PIC pins, those above are MSI routes.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use parking_lot::MutexGuard;
use theseus_resources::layout::FIRST_MSI_GSI;
use vmm_sys_util::eventfd::EventFd;

use crate::{Error, Result, Vm};

/// The first GSI that can have no route: KVM takes a table of KVM_MAX_IRQ_ROUTES entries, in which the pins of the PICs
/// have one each beside that of the IOAPIC's pin with the same GSI.
const MAX_GSI: u32 = 4096 - PIC_PINS;
const PIC_PINS: u32 = 16;

/// A register whose writes are signals of an eventfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoEventAt {
    /// An I/O port.
    Port(u16),
    /// A guest physical address.
    Mmio(u64),
}

/// Where an MSI goes, as the guest programmed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiRoute {
    /// Which LAPICs it goes to, and how (SDM 3A, 12.11.1).
    pub address: u64,
    /// Vector, delivery mode and trigger mode (SDM 3A, 12.11.2).
    pub data: u32,
}

/// The table as KVM has it, plus the GSIs that are taken without having a route yet.
pub(crate) struct Routing {
    msi: BTreeMap<u32, Option<MsiRoute>>,
    /// KVM has not all of it yet.
    staged: bool,
}

impl Routing {
    pub(crate) fn new() -> Self {
        Self { msi: BTreeMap::new(), staged: true }
    }

    /// Routes GSIs by `write`, which gives the kernel the whole table. If that fails the table is the kernel's again,
    /// which keeps its old one (kvm_set_irq_routing): so that the same routes are tried the next time, and no later
    /// table contains what was refused.
    fn change(&mut self, routes: &[(u32, MsiRoute)], write: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let before: Vec<_> = routes.iter().map(|(gsi, route)| (*gsi, self.msi.insert(*gsi, Some(*route)))).collect();
        if before.iter().zip(routes).all(|((_, before), (_, route))| *before == Some(Some(*route))) {
            return Ok(());
        }
        write(self).inspect_err(|_| {
            // From the last, should one be named twice.
            for (gsi, before) in before.into_iter().rev() {
                match before {
                    Some(before) => self.msi.insert(gsi, before),
                    None => self.msi.remove(&gsi),
                };
            }
        })
    }

    /// Takes GSIs by number: all or none.
    fn adopt(&mut self, gsis: &[u32]) -> Result<()> {
        let wanted: BTreeSet<_> = gsis.iter().copied().collect();
        let is_free = |gsi: &u32| (FIRST_MSI_GSI..MAX_GSI).contains(gsi) && !self.msi.contains_key(gsi);
        if wanted.len() != gsis.len() || !wanted.iter().all(is_free) {
            return Err(Error::GsiTaken);
        }
        self.msi.extend(wanted.into_iter().map(|gsi| (gsi, None)));
        Ok(())
    }
}

impl Vm {
    fn routing(&self) -> MutexGuard<'_, Routing> {
        self.routing.lock()
    }

    /// `count` GSIs that are nobody's yet. They have no route until [`Vm::route_msis`].
    ///
    /// # Errors
    /// There are not as many: none is taken.
    pub fn allocate_gsis(&self, count: u32) -> Result<Vec<u32>> {
        let mut routing = self.routing();
        let free: Vec<u32> =
            (FIRST_MSI_GSI..MAX_GSI).filter(|gsi| !routing.msi.contains_key(gsi)).take(count as usize).collect();
        if free.len() < count as usize {
            return Err(Error::Exhausted("GSI"));
        }
        routing.msi.extend(free.iter().map(|gsi| (*gsi, None)));
        Ok(free)
    }

    /// They are anybody's from now on. KVM keeps their routes until the table is written the next time.
    pub fn free_gsis(&self, gsis: &[u32]) {
        let mut routing = self.routing();
        for gsi in gsis {
            routing.msi.remove(gsi);
        }
    }

    /// In a new VMM: GSIs that were allocated in the old one, all or none.
    ///
    /// # Errors
    /// [`Error::GsiTaken`], also for one that is named twice or is a pin's.
    pub fn adopt_gsis(&self, gsis: &[u32]) -> Result<()> {
        self.routing().adopt(gsis)
    }

    /// Routes all of them in one call, or none: the kernel takes the whole table each time.
    pub fn route_msis(&self, routes: &[(u32, MsiRoute)]) -> Result<()> {
        self.routing().change(routes, |routing| self.write_table(routing))
    }

    /// Notes routes without telling KVM, for a restore: [`Vm::commit_routes`] then sets all of them in one call.
    pub fn stage_routes(&self, routes: impl IntoIterator<Item = (u32, Option<MsiRoute>)>) {
        let mut routing = self.routing();
        for (gsi, route) in routes {
            routing.staged |= routing.msi.insert(gsi, route) != Some(route);
        }
    }

    /// Waits for a grace period of KVM's: nothing is done where KVM has all of them already.
    pub fn commit_routes(&self) -> Result<()> {
        let mut routing = self.routing();
        if routing.staged {
            self.write_table(&routing)?;
            routing.staged = false;
        }
        Ok(())
    }

    fn write_table(&self, routing: &Routing) -> Result<()> {
        let mut entries = Vec::with_capacity(40 + routing.msi.len());
        for pin in 0..16 {
            let (chip, pic_pin) =
                if pin < 8 { (KVM_IRQCHIP_PIC_MASTER, pin) } else { (KVM_IRQCHIP_PIC_SLAVE, pin - 8) };
            entries.push(pin_entry(pin, chip, pic_pin));
        }
        for pin in 0..FIRST_MSI_GSI {
            entries.push(pin_entry(pin, KVM_IRQCHIP_IOAPIC, pin));
        }
        for (gsi, route) in &routing.msi {
            entries.extend(route.map(|route| msi_entry(*gsi, route)));
        }
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| Error::Exhausted("GSI route"))?;
        self.fd()
            .set_gsi_routing(&table)
            .map_err(Error::call(format!("KVM_SET_GSI_ROUTING with {} entries", entries.len())))
    }

    /// From now on each count in `eventfd` is an interrupt on `gsi`; what it holds already is injected once, now
    /// (kvm_irqfd_assign polls it). The GSI must have a route, or that one is silently lost.
    pub fn attach_irqfd(&self, gsi: u32, eventfd: BorrowedFd<'_>) -> Result<()> {
        let view = view(eventfd);
        self.fd().register_irqfd(&view, gsi).map_err(Error::call(format!("KVM_IRQFD assign GSI {gsi}")))
    }

    /// As [`Vm::attach_irqfd`], for the level of an IOAPIC pin: a count raises it until the guest's EOI, which lowers
    /// it and signals `resample`.
    pub fn attach_level_irqfd(&self, pin: u32, eventfd: BorrowedFd<'_>, resample: BorrowedFd<'_>) -> Result<()> {
        let (eventfd, resample) = (view(eventfd), view(resample));
        self.fd()
            .register_irqfd_with_resample(&eventfd, &resample, pin)
            .map_err(Error::call(format!("KVM_IRQFD assign with resample GSI {pin}")))
    }

    /// Detaches and waits for injections under way; what comes later stays counted in the eventfd. A pin's level falls
    /// with the last of its irqfds.
    pub fn detach_irqfd(&self, gsi: u32, eventfd: BorrowedFd<'_>) -> Result<()> {
        let view = view(eventfd);
        self.fd().unregister_irqfd(&view, gsi).map_err(Error::call(format!("KVM_IRQFD deassign GSI {gsi}")))
    }

    /// From now on a write there, of any value and size, is a count in `eventfd`, and no exit.
    pub fn attach_ioeventfd(&self, at: IoEventAt, eventfd: BorrowedFd<'_>) -> Result<()> {
        self.fd()
            .register_ioevent(&view(eventfd), &io_event_address(at), NoDatamatch)
            .map_err(Error::call(format!("KVM_IOEVENTFD assign {at:x?}")))
    }

    /// From now on a write there is an exit again. `eventfd` must be the one that was attached.
    pub fn detach_ioeventfd(&self, at: IoEventAt, eventfd: BorrowedFd<'_>) -> Result<()> {
        self.fd()
            .unregister_ioevent(&view(eventfd), &io_event_address(at), NoDatamatch)
            .map_err(Error::call(format!("KVM_IOEVENTFD deassign {at:x?}")))
    }
}

fn io_event_address(at: IoEventAt) -> IoEventAddress {
    match at {
        IoEventAt::Port(port) => IoEventAddress::Pio(port.into()),
        IoEventAt::Mmio(gpa) => IoEventAddress::Mmio(gpa),
    }
}

fn view(eventfd: BorrowedFd<'_>) -> ManuallyDrop<EventFd> {
    // SAFETY: used for one call while the borrow lives; ManuallyDrop never closes it.
    ManuallyDrop::new(unsafe { EventFd::from_raw_fd(eventfd.as_raw_fd()) })
}

fn pin_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn msi_entry(gsi: u32, route: MsiRoute) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: route.address as u32,
        address_hi: (route.address >> 32) as u32,
        data: route.data,
        ..Default::default()
    };
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(_: &Routing) -> Result<()> {
        Err(Error::Exhausted("memory"))
    }

    #[test]
    fn a_route_that_failed_is_tried_again_and_spoils_no_other() {
        let mut routing = Routing::new();
        let route = |data| MsiRoute { address: 0xFEE0_1000, data };
        routing.msi.insert(24, None);
        assert!(routing.change(&[(24, route(1))], refused).is_err());
        assert!(routing.change(&[(24, route(9)), (25, route(9)), (24, route(8))], refused).is_err());
        assert_eq!(routing.msi, BTreeMap::from([(24, None)]));
        let mut written = 0;
        let mut write = |routing: &Routing| {
            written += 1;
            assert_eq!(routing.msi, BTreeMap::from([(24, Some(route(1)))]));
            Ok(())
        };
        routing.change(&[(24, route(1))], &mut write).unwrap();
        routing.change(&[(24, route(1))], &mut write).unwrap();
        assert_eq!(written, 1, "the kernel has it already");
        assert!(routing.change(&[(24, route(2))], refused).is_err());
        assert_eq!(routing.msi, BTreeMap::from([(24, Some(route(1)))]));
    }

    #[test]
    fn gsis_of_a_saved_state_are_taken_once() {
        let mut routing = Routing::new();
        routing.adopt(&[24, 26]).unwrap();
        for bad in [&[25, 26][..], &[25, 25], &[23], &[MAX_GSI]] {
            assert!(routing.adopt(bad).is_err(), "{bad:?}");
        }
        assert_eq!(routing.msi, BTreeMap::from([(24, None), (26, None)]));
    }
}
