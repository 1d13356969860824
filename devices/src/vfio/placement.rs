//! Which BARs a device has, and where the guest's PCI windows have room for them.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use theseus_resources::alloc::{Taken, Window, Windows};

use super::config::{BarRegister, ConfigSpace};
use super::device::{PAGE, VfioDevice};
use super::pci_regs::*;
use super::wiring::PassthroughError;

/// The host bridge's windows, frozen at the guest's boot: a BAR decodes only inside them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decoded {
    mmio32: Range<u64>,
    mmio64: Range<u64>,
    io: Range<u64>,
}

impl Decoded {
    pub fn new(windows: &Windows) -> Self {
        let Windows { mmio32, mmio64, io } = windows;
        Self { mmio32: mmio32.range(), mmio64: mmio64.range(), io: io.range() }
    }

    /// Whether all of a BAR at `address` is inside a window of its kind.
    pub fn covers(&self, bar: &BarRegister, address: u64) -> bool {
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
pub fn place(windows: &mut Windows, registers: &mut [BarRegister]) -> Result<(), PassthroughError> {
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
            return Err(PassthroughError::NoRoom { index, size });
        };
        registers[n].address = address;
    }
    Ok(())
}

/// Gives the BARs' addresses back.
pub fn vacate(windows: &mut Windows, registers: &[BarRegister]) {
    for bar in registers {
        window_of(windows, bar).free(bar.address);
    }
}

/// The BARs the device has, without an address yet.
pub fn discover_bars(device: &VfioDevice) -> Vec<BarRegister> {
    let mut found = Vec::new();
    let mut upper_half = false;
    for (index, region) in (0u8..).zip(device.bars()) {
        if std::mem::take(&mut upper_half) || region.size == 0 {
            continue;
        }
        let mut data = [0; 4];
        ConfigSpace::read(device, BAR0 + 4 * u16::from(index), &mut data);
        let low = u32::from_le_bytes(data);
        let flags = low & if low & BAR_IO != 0 { BAR_IO_FLAGS } else { BAR_MEMORY_FLAGS };
        let is_64bit = low & BAR_IO == 0 && low & BAR_MEMORY_TYPE == BAR_MEMORY_64 && index < 5;
        // Below 16 bytes the address bits would reach into the flags.
        let least = if low & BAR_IO != 0 { 4 } else { 16 };
        let Some(size) = region.size.max(least).checked_next_power_of_two() else { continue };
        upper_half = is_64bit;
        found.push(BarRegister { index, flags, size, address: 0, is_64bit });
    }
    found
}

/// Takes a BAR's address again, in a new image.
pub fn reserve(windows: &mut Windows, bar: &BarRegister) -> Result<(), Taken> {
    window_of(windows, bar).reserve(bar.address, footprint(bar))
}
