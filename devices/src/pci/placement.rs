//! Where the guest's PCI windows have room for BARs.

use std::ops::Range;

use theseus_resources::alloc::{Taken, Window, Windows};

use super::bar::{BarRegister, PAGE};
use super::saved::{DecodedState, WindowState};

#[derive(Debug, thiserror::Error)]
#[error("BAR {index} of {size:#x} bytes: no room in the guest's PCI windows")]
pub(crate) struct NoRoom {
    index: u8,
    size: u64,
}

/// The host bridge's windows, frozen at the guest's boot: a BAR decodes only inside them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decoded {
    mmio32: Range<u64>,
    mmio64: Range<u64>,
    io: Range<u64>,
}

impl Decoded {
    pub(crate) fn new(windows: &Windows) -> Self {
        let Windows { mmio32, mmio64, io } = windows;
        Self { mmio32: mmio32.range(), mmio64: mmio64.range(), io: io.range() }
    }

    pub(super) fn save(&self) -> DecodedState {
        let Self { mmio32, mmio64, io } = self;
        let [mmio32, mmio64, io] = [mmio32, mmio64, io].map(|range| WindowState { start: range.start, end: range.end });
        DecodedState { mmio32, mmio64, io }
    }

    pub(super) fn restore(state: DecodedState) -> Self {
        let DecodedState { mmio32, mmio64, io } = state;
        let [mmio32, mmio64, io] = [mmio32, mmio64, io].map(|WindowState { start, end }| start..end);
        Self { mmio32, mmio64, io }
    }

    /// Whether all of a BAR at `address` is inside a window of its kind.
    pub(crate) fn covers(&self, bar: &BarRegister, address: u64) -> bool {
        let windows = if bar.is_io() { &[&self.io][..] } else { &[&self.mmio32, &self.mmio64] };
        let inside =
            |r: &&Range<u64>| address.checked_add(bar.size).is_some_and(|end| r.start <= address && end <= r.end);
        windows.iter().any(inside)
    }
}

/// What a BAR takes of its window: a page at least, so that no two share one.
fn footprint(bar: &BarRegister) -> u64 {
    if bar.is_io() { bar.size } else { bar.size.max(PAGE) }
}

fn window_of<'a>(windows: &'a mut Windows, bar: &BarRegister) -> &'a mut Window {
    match bar.is_io() {
        true => &mut windows.io,
        false if windows.mmio64.range().contains(&bar.address) => &mut windows.mmio64,
        false => &mut windows.mmio32,
    }
}

/// Gives each BAR its address; all or none.
pub(crate) fn place(windows: &mut Windows, registers: &mut [BarRegister]) -> Result<(), NoRoom> {
    for n in 0..registers.len() {
        let BarRegister { index, size, is_64bit, .. } = registers[n];
        let need = footprint(&registers[n]);
        let address = match (registers[n].is_io(), is_64bit) {
            (true, _) => windows.io.allocate(need),
            (_, true) => windows.mmio64.allocate(need).or_else(|| windows.mmio32.allocate(need)),
            _ => windows.mmio32.allocate(need),
        };
        let Some(address) = address else {
            vacate(windows, &registers[..n]);
            return Err(NoRoom { index, size });
        };
        registers[n].address = address;
    }
    Ok(())
}

/// Gives the BARs' addresses back.
pub(crate) fn vacate(windows: &mut Windows, registers: &[BarRegister]) {
    for bar in registers {
        window_of(windows, bar).free(bar.address);
    }
}

/// Takes a BAR's address again, in a new image.
pub(crate) fn reserve(windows: &mut Windows, bar: &BarRegister) -> Result<(), Taken> {
    window_of(windows, bar).reserve(bar.address, footprint(bar))
}
