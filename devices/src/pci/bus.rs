//! PCI bus 0: 32 slots with one function each. Both configuration mechanisms come through here.

use std::sync::Arc;

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::PciDevice;
use crate::turn::Turn;

const SLOTS: usize = 32;

/// A function on the bus: one access at a time, and the VMM's own before those of vCPUs.
pub type SharedPciDevice = Arc<Turn<dyn PciDevice>>;

/// Why a device cannot be put into a slot.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciBusError {
    /// Another device is in it.
    #[error("PCI slot {0} is taken: give the device another one")]
    Taken(u8),
    /// It is above 31.
    #[error("there is no PCI slot {0}: slots are 0 to 31")]
    NoSuchSlot(u8),
    /// Any slot would do, and none is free.
    #[error("all 32 PCI slots are taken: remove a device")]
    Full,
}

/// Which function is addressed, and where in its configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) bus: u8,
    pub(crate) slot: u8,
    pub(crate) function: u8,
    /// Below 4096.
    pub(crate) offset: u16,
}

/// Has no saved state of its own: each device knows its slot, and the machine adds it there again.
#[derive(Default)]
pub struct PciBus {
    slots: RwLock<[Option<SharedPciDevice>; SLOTS]>,
}

impl PciBus {
    /// All slots are free.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> RwLockReadGuard<'_, [Option<SharedPciDevice>; SLOTS]> {
        self.slots.read()
    }

    fn lock_mut(&self) -> RwLockWriteGuard<'_, [Option<SharedPciDevice>; SLOTS]> {
        self.slots.write()
    }

    /// Puts `device` into `slot`, or into the first free one. Returns the slot.
    pub fn add(&self, slot: Option<u8>, device: SharedPciDevice) -> Result<u8, PciBusError> {
        let mut slots = self.lock_mut();
        let slot = match slot {
            Some(slot) => slot,
            None => {
                let free = slots.iter().position(Option::is_none).and_then(|at| u8::try_from(at).ok());
                free.ok_or(PciBusError::Full)?
            }
        };
        match slots.get_mut(usize::from(slot)) {
            None => Err(PciBusError::NoSuchSlot(slot)),
            Some(Some(_)) => Err(PciBusError::Taken(slot)),
            Some(place) => {
                *place = Some(device);
                Ok(slot)
            }
        }
    }

    /// Takes the device out of `slot`, if there is one.
    pub fn remove(&self, slot: u8) -> Option<SharedPciDevice> {
        self.lock_mut().get_mut(usize::from(slot))?.take()
    }

    /// The lowest slot without a device.
    pub fn next_free(&self) -> Option<u8> {
        self.lock().iter().position(Option::is_none).and_then(|at| u8::try_from(at).ok())
    }

    /// The lock on the slots is not held while a device works: a BAR write may take time.
    fn find(&self, address: Address) -> Option<SharedPciDevice> {
        if address.bus != 0 || address.function != 0 {
            return None;
        }
        self.lock().get(usize::from(address.slot))?.clone()
    }

    /// Absent functions read as all ones.
    pub(crate) fn read(&self, address: Address, data: &mut [u8]) {
        let Some(device) = self.find(address) else { return data.fill(0xFF) };
        let mut device = device.lock();
        let mut rest = data;
        let mut offset = address.offset;
        while let Some(count) = piece(offset, rest.len()) {
            let (now, later) = rest.split_at_mut(count);
            device.config_read(offset, now);
            offset += count as u16;
            rest = later;
        }
        rest.fill(0xFF);
    }

    /// As [`crate::bus::BusDevice::write`].
    pub(crate) fn write(&self, address: Address, data: &[u8], is_wanted: &dyn Fn() -> bool) -> bool {
        let Some(device) = self.find(address) else { return true };
        let Some(mut device) = device.lock_unless(is_wanted) else { return false };
        let mut rest = data;
        let mut offset = address.offset;
        while let Some(count) = piece(offset, rest.len()) {
            let (now, later) = rest.split_at(count);
            device.config_write(offset, now);
            offset += count as u16;
            rest = later;
        }
        true
    }
}

/// The size of the next access: the largest of 1, 2, 4 that is naturally aligned at `offset` and not more than `left`.
fn piece(offset: u16, left: usize) -> Option<usize> {
    if offset >= 4096 {
        return None;
    }
    [4, 2, 1].into_iter().find(|size| *size <= left && usize::from(offset).is_multiple_of(*size))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Remembers how it was accessed; reads as the low byte of each offset.
    #[derive(Default)]
    pub(crate) struct Probe {
        pub(crate) accesses: Vec<(u16, usize)>,
        pub(crate) written: Vec<(u16, Vec<u8>)>,
    }

    impl PciDevice for Probe {
        fn config_read(&mut self, offset: u16, data: &mut [u8]) {
            self.accesses.push((offset, data.len()));
            for (at, byte) in (offset..).zip(data) {
                *byte = at as u8;
            }
        }

        fn config_write(&mut self, offset: u16, data: &[u8]) {
            self.written.push((offset, data.to_vec()));
        }
    }

    pub(crate) fn bus_with_probe(slot: u8) -> (Arc<PciBus>, Arc<Turn<Probe>>) {
        let bus = Arc::new(PciBus::new());
        let probe = Arc::new(Turn::new(Probe::default()));
        bus.add(Some(slot), probe.clone()).unwrap();
        (bus, probe)
    }

    #[test]
    fn slots() {
        let (bus, probe) = bus_with_probe(1);
        assert_eq!(bus.add(Some(1), probe.clone()), Err(PciBusError::Taken(1)));
        assert_eq!(bus.add(Some(32), probe.clone()), Err(PciBusError::NoSuchSlot(32)));
        assert_eq!(bus.add(None, probe.clone()), Ok(0));
        assert_eq!(bus.next_free(), Some(2));
        for slot in 2..32 {
            assert_eq!(bus.add(None, probe.clone()), Ok(slot));
        }
        assert_eq!(bus.add(None, probe), Err(PciBusError::Full));
        assert!(bus.remove(7).is_some());
        assert!(bus.remove(7).is_none());
        assert!(bus.remove(99).is_none());
        assert_eq!(bus.next_free(), Some(7));
    }

    #[test]
    fn accesses_are_split_and_end_with_the_space() {
        let (bus, probe) = bus_with_probe(0);
        let at = |offset| Address { bus: 0, slot: 0, function: 0, offset };
        let mut data = [0; 8];
        bus.read(at(0x11), &mut data);
        assert_eq!(data, [0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18]);
        assert_eq!(probe.lock().accesses, [(0x11, 1), (0x12, 2), (0x14, 4), (0x18, 1)]);
        bus.read(at(0xFFC), &mut data);
        assert_eq!(data, [0xFC, 0xFD, 0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]);
        assert!(bus.write(at(0x12), &[1, 2, 3, 4], &|| true));
        assert_eq!(probe.lock().written, [(0x12, vec![1, 2]), (0x14, vec![3, 4])]);
        for absent in [Address { bus: 1, ..at(0) }, Address { slot: 1, ..at(0) }, Address { function: 1, ..at(0) }] {
            bus.read(absent, &mut data);
            assert_eq!(data, [0xFF; 8]);
            assert!(bus.write(absent, &data, &|| true));
        }
        assert_eq!(probe.lock().written.len(), 2);
    }
}
