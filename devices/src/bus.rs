//! A port or MMIO bus: address ranges and the device behind each. Devices may be moved while vCPUs run (a guest that
//! writes a BAR).

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

/// What answers on a bus, to several vCPUs at once: a device locks itself, and no more of itself than an access needs.
/// `offset` is relative to the range it was inserted with; `data` is 1 to 8 bytes, little endian.
pub trait BusDevice: Send + Sync {
    /// Fills all of `data`; what is not there reads as ones.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// False: other accesses were under way, and before their end this vCPU `is_wanted` elsewhere. Then nothing was
    /// written, and whoever has taken the data from the guest owes it this write.
    #[must_use]
    fn write(&self, offset: u64, data: &[u8], is_wanted: &dyn Fn() -> bool) -> bool;
}

/// The registers of a device of which no access takes long: `Mutex` makes a [`BusDevice`] of it.
pub trait LockedDevice: Send {
    /// As [`BusDevice::read`].
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// As [`BusDevice::write`], of a write that is always made.
    fn write(&mut self, offset: u64, data: &[u8]);
}

impl<D: LockedDevice> BusDevice for Mutex<D> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8], _: &dyn Fn() -> bool) -> bool {
        self.lock().write(offset, data);
        true
    }
}

/// A device as a bus has it. It may answer at several ranges.
pub type SharedDevice = Arc<dyn BusDevice>;

/// Why a device cannot be at a range.
#[derive(Debug, thiserror::Error)]
#[error("{name} bus: range {base:#x}+{len:#x} is empty, wraps, or overlaps another device")]
pub struct BusError {
    name: &'static str,
    base: u64,
    len: u64,
}

/// See the module.
pub struct Bus {
    name: &'static str,
    /// base -> (length, device)
    ranges: RwLock<BTreeMap<u64, (u64, SharedDevice)>>,
}

impl Bus {
    /// Nothing answers yet. `name` is for errors: "port" or "MMIO".
    pub fn new(name: &'static str) -> Self {
        Self { name, ranges: RwLock::default() }
    }

    /// Has `device` answer at `base..base + len`.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps another one. Nothing has changed then.
    pub fn insert(&self, base: u64, len: u64, device: SharedDevice) -> Result<(), BusError> {
        let error = BusError { name: self.name, base, len };
        let Some(end) = base.checked_add(len).filter(|_| len > 0) else { return Err(error) };
        let mut ranges = self.ranges.write();
        let below = ranges.range(..end).next_back();
        if below.is_some_and(|(other, (other_len, _))| other.saturating_add(*other_len) > base) {
            return Err(error);
        }
        ranges.insert(base, (len, device));
        Ok(())
    }

    /// Takes away the range that starts at `base`, if there is one.
    pub fn remove(&self, base: u64) {
        self.ranges.write().remove(&base);
    }

    fn find(&self, addr: u64, len: usize) -> Option<(u64, SharedDevice)> {
        let ranges = self.ranges.read();
        let (base, (range_len, device)) = ranges.range(..=addr).next_back()?;
        let offset = addr - base;
        (offset.checked_add(len as u64)? <= *range_len).then(|| (offset, device.clone()))
    }

    /// An address nobody answers reads as all ones, as on real hardware.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        match self.find(addr, data.len()) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xFF),
        }
    }

    /// A write that nobody takes is dropped. Waits for the accesses that are under way.
    pub fn write(&self, addr: u64, data: &[u8]) {
        let _never_gives_up = self.write_unless(addr, data, &|| false);
    }

    /// As [`BusDevice::write`].
    #[must_use]
    pub fn write_unless(&self, addr: u64, data: &[u8], is_wanted: &dyn Fn() -> bool) -> bool {
        self.find(addr, data.len()).is_none_or(|(offset, device)| device.write(offset, data, is_wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Ram([u8; 8]);

    impl LockedDevice for Ram {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            let at = offset as usize;
            data.copy_from_slice(&self.0[at..at + data.len()]);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            let at = offset as usize;
            self.0[at..at + data.len()].copy_from_slice(data);
        }
    }

    fn ram() -> SharedDevice {
        Arc::new(Mutex::new(Ram([0; 8])))
    }

    #[test]
    fn reads_back_and_holes_are_ones() {
        let bus = Bus::new("test");
        bus.insert(0x100, 8, ram()).unwrap();
        bus.write(0x104, &[1, 2]);
        let mut data = [0; 2];
        bus.read(0x104, &mut data);
        assert_eq!(data, [1, 2]);
        bus.read(0x107, &mut data);
        assert_eq!(data, [0xFF; 2], "an access that leaves the range hits nobody");
    }

    #[test]
    fn overlaps_are_refused_and_ranges_can_move() {
        let bus = Bus::new("test");
        bus.insert(0x100, 8, ram()).unwrap();
        assert!(bus.insert(0x107, 8, ram()).is_err());
        assert!(bus.insert(0xF9, 8, ram()).is_err());
        assert!(bus.insert(0x0, 0, ram()).is_err());
        assert!(bus.insert(u64::MAX, 8, ram()).is_err());
        bus.insert(0x108, 8, ram()).unwrap();
        bus.remove(0x100);
        bus.insert(0xF9, 8, ram()).unwrap();
    }
}
