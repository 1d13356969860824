//! The filter over a configuration space that is an array of bytes.

use std::cell::RefCell;

use super::*;

/// Everything writable, so that what reaches it shows.
struct Space(RefCell<Vec<u8>>);

impl PhysicalConfig for Space {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let (bytes, at) = (self.0.borrow(), usize::from(offset));
        match bytes.get(at..at + data.len()) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xFF),
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        self.0.borrow_mut()[at..at + data.len()].copy_from_slice(data);
    }
}

impl Space {
    fn put(&self, offset: u16, data: &[u8]) {
        self.write(offset, data);
    }

    fn put32(&self, offset: u16, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }
}

/// PM at 0x40, MSI at 0x50 (64-bit), MSI-X at 0x70 (10 vectors, table BAR 3 at 0, PBA BAR 3 at 0x2000), PCIe at 0xA0;
/// extended: AER at 0x100, SR-IOV at 0x160, ARI at 0x150, serial number at 0x140.
fn igb() -> Space {
    let space = Space(RefCell::new(vec![0; 4096]));
    space.put32(0, 0x10C9_8086);
    space.put32(COMMAND, 0x0010_0000);
    space.put32(0x0C, 0x0080_0000);
    space.put32(BAR0, 0xFEBC_0000);
    space.put32(EXPANSION_ROM, 0xFEB8_0001);
    space.put(CAPABILITY_POINTER, &[0x40]);
    space.put(0x3C, &[0x0B, 0x01]);
    space.put32(0x40, 0xC803_5001);
    space.put32(0x50, 0x0080_7005);
    space.put32(0x54, 0xFEE0_0000);
    space.put32(0x70, 0x0009_A011);
    space.put32(0x74, 3);
    space.put32(0x78, 0x2003);
    space.put32(0xA0, 0x0002_0010);
    space.put32(0x100, 0x1402_0001);
    space.put32(0x140, 0x1501_0003);
    space.put32(0x150, 0x1601_000E);
    space.put32(0x160, 0x0001_0010);
    space
}

fn read32(filter: &ConfigFilter, space: &Space, offset: u16) -> u32 {
    let mut data = [0; 4];
    filter.read(space, offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(filter: &mut ConfigFilter, space: &Space, offset: u16, data: &[u8]) {
    if let Some(physical) = filter.write(space, offset, data) {
        space.write(offset, &physical);
    }
}

/// (offset, id) along the chain as a guest walks it.
fn chain(filter: &ConfigFilter, space: &Space) -> Vec<(u16, u8)> {
    let mut found = Vec::new();
    let mut at = read32(filter, space, CAPABILITY_POINTER) as u16 & 0xFF;
    while at != 0 {
        let head = read32(filter, space, at);
        found.push((at, head as u8));
        at = (head >> 8) as u16 & 0xFF;
    }
    found
}

fn extended(filter: &ConfigFilter, space: &Space) -> Vec<(u16, u16)> {
    let mut found = Vec::new();
    let mut at = 0x100;
    while at != 0 {
        let head = read32(filter, space, at);
        found.push((at, head as u16));
        at = (head >> 20) as u16;
    }
    found
}

#[test]
fn msi_is_unlinked_the_rest_stays() {
    let space = igb();
    let (mut filter, layout) = ConfigFilter::new(&space).unwrap();
    assert_eq!(chain(&filter, &space), [(0x40, CAP_PM), (0x70, CAP_MSIX), (0xA0, 0x10)]);
    assert_eq!(layout, MsixLayout { vectors: 10, table_bar: 3, table_offset: 0, pba_bar: 3, pba_offset: 0x2000 });
    assert_eq!(filter.power_register(), Some(0x44));
    assert_eq!(read32(&filter, &space, 0x50), 0);
    write(&mut filter, &space, 0x54, &[1; 4]);
    assert_eq!(space.0.borrow()[0x54..0x58], 0xFEE0_0000u32.to_le_bytes(), "MSI is out of reach");
}

#[test]
fn extended_capabilities_of_the_host_are_unlinked() {
    let space = igb();
    let (filter, _) = ConfigFilter::new(&space).unwrap();
    assert_eq!(extended(&filter, &space), [(0x100, 1), (0x140, 3)]);
    assert_eq!(read32(&filter, &space, 0x100), 0x1402_0001, "the version stays");
    assert_eq!(read32(&filter, &space, 0x140) >> 16, 1, "the last one's next is 0");
}

#[test]
fn a_hidden_head_keeps_its_place_without_an_id() {
    let space = igb();
    space.put32(0x100, 0x1401_0010);
    let (filter, _) = ConfigFilter::new(&space).unwrap();
    assert_eq!(extended(&filter, &space), [(0x100, 0), (0x140, 3)]);
    assert_eq!(read32(&filter, &space, 0x100), 0x1400_0000);
}

#[test]
fn header_is_that_of_a_single_function_without_rom_and_pin() {
    let space = igb();
    let (filter, _) = ConfigFilter::new(&space).unwrap();
    assert_eq!(read32(&filter, &space, 0), 0x10C9_8086);
    assert_eq!(read32(&filter, &space, 0x0C), 0);
    assert_eq!(read32(&filter, &space, EXPANSION_ROM), 0);
    assert_eq!(read32(&filter, &space, BAR0), 0, "the host's address does not show");
    assert_eq!(read32(&filter, &space, 0x3C), 0x0B);
}

#[test]
fn bars_are_sized_and_moved() {
    let space = igb();
    let (mut filter, _) = ConfigFilter::new(&space).unwrap();
    let bar = |index, flags, size, address, is_64bit| BarRegister { index, flags, size, address, is_64bit };
    let (low, io) = (bar(0, 0, 0x2_0000, 0xC000_0000, false), bar(2, 1, 0x20, 0x1000, false));
    let high = bar(4, 0xC, 0x4000, 0x10_0000_0000, true);
    filter.set_bars(&[low, io, high]);
    assert_eq!(read32(&filter, &space, 0x10), 0xC000_0000);
    assert_eq!(read32(&filter, &space, 0x18), 0x1001);
    assert_eq!((read32(&filter, &space, 0x20), read32(&filter, &space, 0x24)), (0xC, 0x10));
    assert_eq!(read32(&filter, &space, 0x14), 0, "no BAR");
    for offset in [0x10, 0x14, 0x18, 0x20, 0x24] {
        write(&mut filter, &space, offset, &[0xFF; 4]);
    }
    let sized = [0x10, 0x14, 0x18, 0x20, 0x24].map(|offset| read32(&filter, &space, offset));
    assert_eq!(sized, [0xFFFE_0000, 0, 0xFFFF_FFE1, 0xFFFF_C00C, 0xFFFF_FFFF]);
    write(&mut filter, &space, 0x10, &0xC123_4567u32.to_le_bytes());
    assert_eq!(filter.bar_address(&low), 0xC122_0000);
    write(&mut filter, &space, 0x24, &[0x11, 0, 0, 0]);
    write(&mut filter, &space, 0x20, &[0; 4]);
    assert_eq!(filter.bar_address(&high), 0x11_0000_0000);
    assert_eq!(space.0.borrow()[0x10..0x14], 0xFEBC_0000u32.to_le_bytes(), "the physical BAR stays");
}

#[test]
fn msix_control_is_ours() {
    let space = igb();
    let (mut filter, _) = ConfigFilter::new(&space).unwrap();
    write(&mut filter, &space, 0x72, &[0xFF, 0xFF]);
    assert_eq!(filter.msix_control(), 0xC009);
    write(&mut filter, &space, 0x70, &[0x11, 0xA0, 0, 0x80]);
    assert_eq!(filter.msix_control(), 0x8009);
    assert_eq!(read32(&filter, &space, 0x70), 0x8009_A011);
    assert_eq!(space.0.borrow()[0x72..0x74], [9, 0], "the device is switched by VFIO_DEVICE_SET_IRQS only");
    assert_eq!(read32(&filter, &space, 0x78), 0x2003);
}

#[test]
fn the_rest_is_passed_on_and_emulated_bits_beside_it_are_not() {
    let space = igb();
    let (mut filter, _) = ConfigFilter::new(&space).unwrap();
    write(&mut filter, &space, COMMAND, &[0x06, 0x05]);
    assert_eq!(space.0.borrow()[0x04..0x06], [0x06, 0x01], "DisINTx is ours");
    space.put(COMMAND + 1, &[0x04]);
    write(&mut filter, &space, COMMAND, &[0x06, 0x00]);
    assert_eq!(space.0.borrow()[0x04..0x06], [0x06, 0x04]);
    write(&mut filter, &space, 0x3C, &[0x05, 0x77, 0, 0]);
    assert_eq!(space.0.borrow()[0x3C..0x3E], [0x05, 0x01], "the pin behind the hidden one is not written");
}

#[test]
fn what_cannot_be_passed_through_is_refused_with_a_reason() {
    let space = igb();
    space.put(0x70, &[0x09]);
    assert_eq!(ConfigFilter::new(&space).unwrap_err(), ConfigError::NoMsix);
    let space = igb();
    space.put(HEADER_TYPE, &[0x01]);
    assert_eq!(ConfigFilter::new(&space).unwrap_err(), ConfigError::Header(1));
    let space = igb();
    space.put32(0x74, 7);
    assert!(matches!(ConfigFilter::new(&space), Err(ConfigError::BadMsix(_))));
}

#[test]
fn broken_chains_end() {
    let space = igb();
    space.put32(0xA0, 0x0002_4010);
    space.put32(0x140, 0x1001_0003);
    let (filter, _) = ConfigFilter::new(&space).unwrap();
    assert!(chain(&filter, &space).len() <= 48);
    assert!(extended(&filter, &space).len() <= 1024);
    let conventional = Space(RefCell::new(igb().0.borrow()[..256].to_vec()));
    assert!(ConfigFilter::new(&conventional).is_ok());
}
