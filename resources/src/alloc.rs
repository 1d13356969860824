//! Address windows for PCI BARs: first fit, naturally aligned. Has no saved form: a restore reserves again what its
//! devices hold.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::layout;

/// Why [`Window::reserve`] has not taken a range.
#[derive(Debug, thiserror::Error)]
#[error("{start:#x}+{size:#x} is outside {window:#x?} or already taken")]
pub struct Taken {
    start: u64,
    size: u64,
    window: Range<u64>,
}

/// One range of addresses and who holds what of it.
#[derive(Debug)]
pub struct Window {
    range: Range<u64>,
    /// start -> end, never overlapping
    taken: BTreeMap<u64, u64>,
}

impl Window {
    /// All of `range` is free.
    pub fn new(range: Range<u64>) -> Self {
        Self { range, taken: BTreeMap::new() }
    }

    /// All of it, free or not.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// The lowest free address for `size` bytes, aligned to `size`, which must be a power of two. None: no room.
    pub fn allocate(&mut self, size: u64) -> Option<u64> {
        if !size.is_power_of_two() {
            return None;
        }
        let mut start = self.range.start.checked_next_multiple_of(size)?;
        for (&taken, &end) in &self.taken {
            if start.checked_add(size)? <= taken {
                break;
            }
            start = start.max(end.checked_next_multiple_of(size)?);
        }
        let end = start.checked_add(size)?;
        (end <= self.range.end).then(|| {
            self.taken.insert(start, end);
            start
        })
    }

    /// Takes exactly `start..start + size`.
    pub fn reserve(&mut self, start: u64, size: u64) -> Result<(), Taken> {
        let error = Taken { start, size, window: self.range() };
        let Some(end) = start.checked_add(size).filter(|end| size > 0 && *end <= self.range.end) else {
            return Err(error);
        };
        let below = self.taken.range(..end).next_back();
        if start < self.range.start || below.is_some_and(|(_, below_end)| *below_end > start) {
            return Err(error);
        }
        self.taken.insert(start, end);
        Ok(())
    }

    /// Gives back what was allocated or reserved at `start`.
    pub fn free(&mut self, start: u64) {
        self.taken.remove(&start);
    }
}

/// The windows a host bridge decodes.
#[derive(Debug)]
pub struct Windows {
    /// [`layout::PCI_WINDOW32`].
    pub mmio32: Window,
    /// Empty where the guest has no address bits for it.
    pub mmio64: Window,
    /// [`layout::PCI_IO_WINDOW`]: ports.
    pub io: Window,
}

impl Windows {
    /// As [`layout`] has them, for `ram_size` bytes of RAM and a guest with `phys_bits` address bits.
    pub fn new(ram_size: u64, phys_bits: u8) -> Self {
        Self::with_window64(layout::pci_window64(ram_size, phys_bits))
    }

    /// With the 64-bit window that a running guest was told of.
    pub fn with_window64(window64: Range<u64>) -> Self {
        let io = layout::PCI_IO_WINDOW;
        Self {
            mmio32: Window::new(layout::PCI_WINDOW32),
            mmio64: Window::new(window64),
            io: Window::new(io.start.into()..io.end.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_fit_aligned() {
        let mut window = Window::new(0x1800..0x10000);
        assert_eq!(window.allocate(0x1000), Some(0x2000));
        assert_eq!(window.allocate(0x4000), Some(0x4000));
        assert_eq!(window.allocate(0x800), Some(0x1800), "the gap before is used");
        assert_eq!(window.allocate(0x1000), Some(0x3000));
        assert_eq!(window.allocate(0x8000), Some(0x8000));
        assert_eq!(window.allocate(0x1000), None);
        window.free(0x3000);
        assert_eq!(window.allocate(0x1000), Some(0x3000));
        assert_eq!(window.allocate(0x3000), None, "not a power of two");
        assert_eq!(window.allocate(0), None);
        assert_eq!(window.allocate(1 << 63), None);
    }

    #[test]
    fn reserve_refuses_overlap_and_outside() {
        let mut window = Window::new(0x1000..0x5000);
        window.reserve(0x2000, 0x1000).unwrap();
        assert!(window.reserve(0x2000, 0x1000).is_err());
        assert!(window.reserve(0x1000, 0x1001).is_err());
        assert!(window.reserve(0x2FFF, 1).is_err());
        assert!(window.reserve(0x0, 0x1001).is_err());
        assert!(window.reserve(0x4000, 0x1001).is_err());
        assert!(window.reserve(u64::MAX, 2).is_err());
        window.reserve(0x3000, 0x2000).unwrap();
        assert_eq!(window.allocate(0x1000), Some(0x1000));
        assert_eq!(window.allocate(0x1000), None);
    }

    #[test]
    fn an_empty_window_has_no_room() {
        let mut windows = Windows::new(1 << 30, 36);
        assert_eq!(windows.mmio64.allocate(0x1000), None);
        assert!(windows.mmio32.allocate(0x1000_0000).is_some());
    }
}
