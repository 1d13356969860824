//! A configuration space as bytes, with a mask of the bits a guest can write.

use serde::{Deserialize, Serialize};

/// Conventional configuration space, in bytes.
pub const CONFIG_SIZE: usize = 256;
/// PCI Express configuration space, in bytes.
pub const EXTENDED_CONFIG_SIZE: usize = 4096;

// Header registers (PCI Local Bus 3.0, 6.1).
pub const VENDOR_ID: u16 = 0x00;
pub const DEVICE_ID: u16 = 0x02;
pub const REVISION_ID: u16 = 0x08;
/// Programming interface, subclass, class: three bytes.
pub const CLASS_CODE: u16 = 0x09;

/// Serialisable as a whole: what a guest has seen stays as it is, also in a build that would begin with other values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigSpace {
    #[serde(with = "serde_bytes")]
    bytes: Vec<u8>,
    /// A set bit can be written by the guest. As long as `bytes`.
    #[serde(with = "serde_bytes")]
    writable: Vec<u8>,
}

impl ConfigSpace {
    /// All zero and read-only. `size` is [`CONFIG_SIZE`] or [`EXTENDED_CONFIG_SIZE`].
    pub fn new(size: usize) -> Self {
        Self { bytes: vec![0; size], writable: vec![0; size] }
    }

    /// For a state that was read: are both halves there?
    pub fn is_whole(&self) -> bool {
        matches!(self.bytes.len(), CONFIG_SIZE | EXTENDED_CONFIG_SIZE) && self.bytes.len() == self.writable.len()
    }

    /// Sets a value, whatever is writable. What exceeds the space is left out.
    pub fn set(&mut self, offset: u16, value: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(offset.into()).zip(value) {
            *to = *from;
        }
    }

    /// Lets the guest write the bits set in `mask`.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(offset.into()).zip(mask) {
            *to = *from;
        }
    }

    /// An access by the guest. Beyond the space it reads ones, which tells a guest that there is no extended space.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, to) in (usize::from(offset)..).zip(data) {
            *to = self.bytes.get(at).copied().unwrap_or(0xFF);
        }
    }

    /// An access by the guest: changes only what is writable.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let registers = self.bytes.iter_mut().zip(&self.writable).skip(offset.into());
        for ((to, mask), from) in registers.zip(data) {
            *to = *to & !mask | from & mask;
        }
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
        assert!(config.is_whole());
        config.writable.pop();
        assert!(!config.is_whole());
        config.write(255, &[1]);
    }
}
