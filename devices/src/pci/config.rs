//! A configuration space as the guest sees it: for each bit whether we answer it, and whether the guest can write it.
//! The rest, of a passed-through function, is the device's.

pub(crate) use super::saved::ConfigSpaceState;
use crate::migratable::MigrateError;

/// Conventional configuration space, in bytes.
pub(crate) const CONFIG_SIZE: usize = 256;
/// PCI Express configuration space, in bytes.
pub(crate) const EXTENDED_CONFIG_SIZE: usize = 4096;

// Header registers (PCI Local Bus 3.0, 6.1).
pub(crate) const VENDOR_ID: u16 = 0x00;
pub(crate) const DEVICE_ID: u16 = 0x02;
pub(crate) const REVISION_ID: u16 = 0x08;
/// Programming interface, subclass, class: three bytes.
pub(crate) const CLASS_CODE: u16 = 0x09;

/// The device behind a configuration space that is not all emulated. `data` is 1, 2 or 4 bytes inside a dword; what is
/// not there reads as ones.
pub(crate) trait PhysicalConfig {
    fn read(&self, offset: u16, data: &mut [u8]);
    fn write(&self, offset: u16, data: &[u8]);
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConfigSpace {
    /// The emulated bits; zero where the device answers.
    bytes: Vec<u8>,
    /// A set bit is emulated. As long as `bytes`.
    emulated: Vec<u8>,
    /// A set bit can be written by the guest; it is emulated. As long as `bytes`.
    writable: Vec<u8>,
}

impl ConfigSpace {
    /// Of an emulated function: all zero and read-only. `size` is [`CONFIG_SIZE`] or [`EXTENDED_CONFIG_SIZE`].
    pub(crate) fn new(size: usize) -> Self {
        Self { bytes: vec![0; size], emulated: vec![0xFF; size], writable: vec![0; size] }
    }

    /// Of a device of the host's: nothing is emulated yet.
    pub(crate) fn over_device() -> Self {
        Self { emulated: vec![0; EXTENDED_CONFIG_SIZE], ..Self::new(EXTENDED_CONFIG_SIZE) }
    }

    pub(crate) fn save(&self) -> ConfigSpaceState {
        let Self { bytes, emulated, writable } = self.clone();
        ConfigSpaceState { bytes, emulated, writable }
    }

    /// Refuses what is not whole.
    pub(crate) fn restore(state: ConfigSpaceState) -> Result<Self, MigrateError> {
        let ConfigSpaceState { bytes, emulated, writable } = state;
        let len = bytes.len();
        if matches!(len, CONFIG_SIZE | EXTENDED_CONFIG_SIZE) && emulated.len() == len && writable.len() == len {
            return Ok(Self { bytes, emulated, writable });
        }
        Err(MigrateError::State("the configuration space is not whole".into()))
    }

    /// Sets a value, whatever is writable. What exceeds the space is left out.
    pub(crate) fn set(&mut self, offset: u16, value: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(offset.into()).zip(value) {
            *to = *from;
        }
    }

    /// Lets the guest write the bits set in `mask`, which are emulated.
    pub(crate) fn allow(&mut self, offset: u16, mask: &[u8]) {
        let registers = self.writable.iter_mut().zip(&self.emulated).skip(offset.into());
        for ((to, emulated), from) in registers.zip(mask) {
            *to = from & emulated;
        }
    }

    /// From now on the bits of `mask` in each byte are emulated, read as in `values`, and can be written by the guest
    /// where `writable` has them too.
    pub(crate) fn emulate(&mut self, offset: u16, values: &[u8], mask: u8, writable: u8) {
        for (at, value) in (usize::from(offset)..).zip(values) {
            if let Some(emulated) = self.emulated.get_mut(at) {
                *emulated = mask;
                self.set(at as u16, &[value & mask]);
                self.allow(at as u16, &[writable]);
            }
        }
    }

    /// The bits of a byte that are emulated.
    pub(crate) fn emulated(&self, offset: u16) -> u8 {
        self.emulated.get(usize::from(offset)).copied().unwrap_or(0)
    }

    /// The emulated bits of some bytes.
    pub(crate) fn value<const N: usize>(&self, offset: u16) -> [u8; N] {
        std::array::from_fn(|n| self.bytes.get(usize::from(offset) + n).copied().unwrap_or(0))
    }

    /// An access by the guest to an emulated function. Beyond the space it reads ones, which tells a guest that there
    /// is no extended space.
    pub(crate) fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, to) in (usize::from(offset)..).zip(data) {
            *to = self.bytes.get(at).copied().unwrap_or(0xFF);
        }
    }

    /// An access by the guest: changes only what is writable.
    pub(crate) fn write(&mut self, offset: u16, data: &[u8]) {
        let registers = self.bytes.iter_mut().zip(&self.writable).skip(offset.into());
        for ((to, mask), from) in registers.zip(data) {
            *to = *to & !mask | from & mask;
        }
    }

    /// As [`ConfigSpace::read`], over a device.
    pub(crate) fn read_over(&self, device: &dyn PhysicalConfig, offset: u16, data: &mut [u8]) {
        let emulated: Vec<u8> = (offset..).map(|at| self.emulated(at)).take(data.len()).collect();
        if emulated.iter().any(|mask| *mask != 0xFF) {
            device.read(offset, data);
        }
        for ((at, mask), out) in (offset..).zip(emulated).zip(data) {
            let [value] = self.value(at);
            *out = *out & !mask | value;
        }
    }

    /// As [`ConfigSpace::write`], over a device. Returns what is to be written to it, if anything.
    pub(crate) fn write_over(&mut self, device: &dyn PhysicalConfig, offset: u16, data: &[u8]) -> Option<Vec<u8>> {
        self.write(offset, data);
        let emulated: Vec<u8> = (offset..).map(|at| self.emulated(at)).take(data.len()).collect();
        if emulated.iter().all(|mask| *mask == 0xFF) {
            return None;
        }
        let mut physical = data.to_vec();
        if emulated.iter().any(|mask| *mask != 0) {
            // The device's own value in the emulated bits: the write must not change them.
            let mut current = vec![0; data.len()];
            device.read(offset, &mut current);
            for ((out, mask), current) in physical.iter_mut().zip(emulated).zip(current) {
                *out = *out & !mask | current & mask;
            }
        }
        Some(physical)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_allowed_bits_change() {
        let mut config = ConfigSpace::new(CONFIG_SIZE);
        config.set(4, &[0x0F, 0xF0]);
        config.allow(4, &[0x3C]);
        config.write(4, &[0xF0, 0xFF]);
        let mut data = [0; 2];
        config.read(4, &mut data);
        assert_eq!(data, [0x33, 0xF0]);
        config.write(255, &[1; 4]);
        config.set(254, &[1; 4]);
        let mut data = [0; 4];
        config.read(254, &mut data);
        assert_eq!(data, [1, 1, 0xFF, 0xFF]);
        assert_eq!(ConfigSpace::restore(config.save()).unwrap(), config);
        config.writable.pop();
        assert!(ConfigSpace::restore(config.save()).is_err());
        config.write(255, &[1]);
    }
}
