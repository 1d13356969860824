//! PCI configuration mechanism #1 (PCI Local Bus 3.0, 3.2.2.3.2): ports 0xCF8 (address) to 0xCFF (data).

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use acpi_tables::AmlSink;
use serde::{Deserialize, Serialize};
use theseus_resources::state::Format;
use theseus_resources::{Claims, layout};

use super::ecam::Ecam;
use crate::bus::BusDevice;
use crate::device::{Catalogued, Device, DeviceError, Operation, Place, Surroundings, on_board};
use crate::migratable::{Migratable, MigrateError, NoHandles, Saved, SavedDevice};
use crate::pci::bus::{Address, PciBus};
use crate::spec::Spec;

/// Its name in a [`crate::set::DeviceSet`].
pub(crate) const NAME: &str = "pci-config-access";

/// Ports: address and data, 4 bytes each.
const PORTS: u64 = 8;
const DATA: u64 = 4;
const ENABLE: u32 = 1 << 31;
/// Enable, bus, device, function, register; the rest reads as 0.
const ADDRESS_BITS: u32 = 0x80FF_FFFC;

pub(crate) struct PciConfigAccess {
    /// As in [`super::ecam::Ecam`].
    bus: Weak<PciBus>,
    /// What was last written to 0xCF8. Not behind a lock: a write to a function may take long, and is none of who reads
    /// the address.
    address: AtomicU32,
}

impl PciConfigAccess {
    pub(crate) fn new(bus: &Arc<PciBus>) -> Self {
        Self { bus: Arc::downgrade(bus), address: AtomicU32::new(0) }
    }

    fn address(&self) -> u32 {
        self.address.load(Ordering::Relaxed)
    }

    /// The function and register that an access at `offset` from 0xCFC means; `None` if the mechanism is not enabled or
    /// the access leaves the dword.
    fn target(&self, offset: u64, len: usize) -> Option<Address> {
        let within = u16::try_from(offset.checked_sub(DATA)?).ok()?;
        let address = self.address();
        if address & ENABLE == 0 || usize::from(within).checked_add(len)? > 4 {
            return None;
        }
        let [register, function, bus, _] = address.to_le_bytes();
        Some(Address { bus, slot: function >> 3, function: function & 7, offset: u16::from(register) + within })
    }
}

impl BusDevice for PciConfigAccess {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some((target, bus)) = self.target(offset, data.len()).zip(self.bus.upgrade()) {
            return bus.read(target, data);
        }
        match (offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            (0, Ok(address)) => *address = self.address().to_le_bytes(),
            _ => data.fill(0xFF),
        }
    }

    fn write(&self, offset: u64, data: &[u8], is_wanted: &dyn Fn() -> bool) -> bool {
        if let Some((target, bus)) = self.target(offset, data.len()).zip(self.bus.upgrade()) {
            return bus.write(target, data, is_wanted);
        }
        // Only a whole dword reaches the address register; the bytes at these ports are other registers (0xCF9, reset).
        if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            self.address.store(u32::from_le_bytes(address) & ADDRESS_BITS, Ordering::Relaxed);
        }
        true
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PciConfigAccessState {
    address: u32,
}

impl Migratable for PciConfigAccess {
    const FORMAT: Format = Format::new("pci-config-access", 1);
    type State = PciConfigAccessState;
    type Handles = NoHandles;
    type Parts<'a> = &'a Arc<PciBus>;

    fn save(&self) -> Result<Saved<Self>, MigrateError> {
        let Self { bus: _, address: _ } = self;
        let state = PciConfigAccessState { address: self.address() };
        Ok(Saved { state, handles: NoHandles })
    }

    fn upgrade(_: u16, state: Self::State) -> Result<Self::State, MigrateError> {
        Ok(state)
    }

    fn restore(saved: Saved<Self>, bus: &Arc<PciBus>) -> Result<Self, MigrateError> {
        let Saved { state: PciConfigAccessState { address }, handles: NoHandles } = saved;
        Ok(Self { bus: Arc::downgrade(bus), address: AtomicU32::new(address & ADDRESS_BITS) })
    }
}

impl Catalogued for PciConfigAccess {
    fn boot(_: &Spec, around: &Surroundings<'_>) -> Result<Vec<(String, Self)>, DeviceError> {
        Ok(vec![(NAME.to_owned(), Self::new(around.pci))])
    }

    fn parts<'a>(around: &Surroundings<'a>, _: &'a mut Claims) -> Self::Parts<'a> {
        around.pci
    }

    fn share(self) -> Arc<dyn Device> {
        Arc::new(self)
    }
}

impl Device for PciConfigAccess {
    fn places(self: Arc<Self>) -> Vec<Place> {
        let ecam = Arc::new(Ecam::new(self.bus.clone()));
        vec![
            Place::Pio { base: layout::PCI_CONFIG_ADDRESS.into(), len: PORTS, device: self },
            Place::Mmio { base: layout::ECAM_BASE, len: layout::ECAM_SIZE, device: ecam },
        ]
    }

    /// Does nothing by itself.
    fn quiesce(&self) -> Result<(), MigrateError> {
        Ok(())
    }

    fn resume(&self) {}

    fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
    }

    fn blockers(&self, operation: Operation) -> Vec<String> {
        on_board(operation)
    }

    fn save(&self, name: &str) -> Result<SavedDevice, MigrateError> {
        SavedDevice::of(self, name)
    }

    fn describe(&self, _: &mut dyn AmlSink) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::bus::tests::bus_with_probe;

    fn write(access: &PciConfigAccess, offset: u64, data: &[u8]) {
        assert!(access.write(offset, data, &|| false));
    }

    fn read<const N: usize>(access: &PciConfigAccess, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        access.read(offset, &mut data);
        data
    }

    #[test]
    fn address_then_data_in_every_size() {
        let (bus, probe) = bus_with_probe(3);
        let access = PciConfigAccess::new(&bus);
        assert_eq!(read::<4>(&access, 4), [0xFF; 4], "not enabled");
        write(&access, 0, &0x8000_1843u32.to_le_bytes());
        assert_eq!(read::<4>(&access, 0), 0x8000_1840u32.to_le_bytes());
        assert_eq!(read::<4>(&access, 4), [0x40, 0x41, 0x42, 0x43]);
        assert_eq!(read::<2>(&access, 6), [0x42, 0x43]);
        assert_eq!(read::<1>(&access, 7), [0x43]);
        assert_eq!(read::<4>(&access, 6), [0xFF; 4], "crosses the dword");
        write(&access, 5, &[9]);
        assert_eq!(probe.lock().written, [(0x41, vec![9])]);
        // What Linux does to probe (pci_check_type1).
        write(&access, 3, &[1]);
        assert_eq!(read::<4>(&access, 0), 0x8000_1840u32.to_le_bytes());
        assert_eq!(read::<1>(&access, 1), [0xFF]);
        for absent in [0x8000_2000u32, 0x8000_1900, 0x8001_1800, 0x0000_1800] {
            write(&access, 0, &absent.to_le_bytes());
            assert_eq!(read::<4>(&access, 4), [0xFF; 4]);
        }
    }

    #[test]
    fn the_latch_goes_over() {
        let (bus, _probe) = bus_with_probe(3);
        let access = PciConfigAccess::new(&bus);
        write(&access, 0, &0x8000_1840u32.to_le_bytes());
        let access = PciConfigAccess::restore(Migratable::save(&access).unwrap(), &bus).unwrap();
        assert_eq!(read::<1>(&access, 4), [0x40]);
    }
}
