//! An emulated function, which is made of what a passed-through one is made of: nothing of VFIO is needed for a BAR and
//! its MSI-X.

use std::sync::Arc;

use theseus_resources::FdStore;
use theseus_resources::alloc::Windows;

use super::bar::{BarKind, BarRegister};
use super::config::{CONFIG_SIZE, ConfigSpace};
use super::decoding::Decoding;
use super::msix::Msix;
use super::msix_capability::{MsixInBar, MsixLayout};
use super::placement::{Decoded, place, vacate};
use super::regs::*;
use crate::interrupt::fake::{FakeController, signal};

const MSIX: u16 = 0x40;
const PM: u16 = 0x50;
const LAYOUT: MsixLayout =
    MsixLayout { vectors: 2, table_bar: 0, table_offset: 0x1000, pba_bar: 0, pba_offset: 0x1800 };

struct Function {
    config: ConfigSpace,
    bar: BarRegister,
    decoding: Decoding,
    here: MsixInBar,
    msix: Msix,
    controller: Arc<FakeController>,
}

fn function() -> Function {
    let mut windows = Windows::new(1 << 30, 40);
    let mut bars = [BarRegister { index: 0, flags: BAR_MEMORY_64, size: 0x2000, address: 0, is_64bit: true }];
    place(&mut windows, &mut bars).unwrap();
    let [bar] = bars;
    let mut config = ConfigSpace::new(CONFIG_SIZE);
    bar.emulate(&mut config);
    LAYOUT.emulate(&mut config, MSIX);
    config.set(MSIX, &[CAP_MSIX, 0]);
    config.set(PM, &[CAP_PM, MSIX as u8]);
    config.allow(PM + PM_CONTROL, &[PM_STATE]);
    config.allow(COMMAND, &[COMMAND_MEMORY as u8]);
    config.set(CAPABILITY_POINTER, &[PM as u8]);
    let controller = Arc::new(FakeController::default());
    let msix = Msix::new("counter0", LAYOUT.vectors, controller.clone(), FdStore::new());
    let decoding = Decoding::new(Decoded::new(&windows));
    vacate(&mut windows, &bars);
    Function { config, bar, decoding, here: LAYOUT.in_bar(0), msix, controller }
}

impl Function {
    fn read32(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.config.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// As a guest writes; where the BAR is then.
    fn write(&mut self, offset: u16, data: &[u8]) -> Option<u64> {
        self.config.write(offset, data);
        if self.decoding.write(Some(PM + PM_CONTROL), offset, data) {
            let [control] = self.config.value(PM + PM_CONTROL);
            self.decoding.set_power(control);
        }
        self.decoding.address(&self.bar, self.bar.address_in(&self.config))
    }
}

#[test]
fn its_bar_is_sized_and_moved() {
    let mut function = function();
    let bar = function.bar;
    assert_eq!(bar.address_in(&function.config), bar.address);
    assert_eq!(function.read32(BAR0), bar.address as u32 | BAR_MEMORY_64);
    for offset in [BAR0, BAR0 + 4] {
        function.config.write(offset, &[0xFF; 4]);
    }
    assert_eq!([BAR0, BAR0 + 4].map(|at| function.read32(at)), [0xFFFF_E004, 0xFFFF_FFFF]);
    assert_eq!(function.write(COMMAND, &[0xFF, 0xFF]), None, "outside the windows");
    function.write(BAR0, &0xD000_0FFFu32.to_le_bytes());
    let address = function.write(BAR0 + 4, &[0; 4]).unwrap();
    assert_eq!(address, 0xD000_0000);
    let shown = bar.at(address);
    assert_eq!((shown.address, shown.kind, shown.prefetchable), (address, BarKind::Memory64, false));
}

#[test]
fn it_decodes_when_told_and_awake() {
    let mut function = function();
    let here = Some(function.bar.address);
    assert_eq!(function.write(BAR0, &[0]), None, "nothing decodes after a reset");
    // A byte alone, two registers in one access, and the byte that has no decode bits.
    assert_eq!(function.write(COMMAND, &[2]), here);
    assert_eq!(function.write(COMMAND + 1, &[0]), here);
    assert_eq!(function.write(COMMAND, &[1, 0, 0, 0]), None, "that is ports");
    assert_eq!(function.write(COMMAND, &[2, 0]), here);
    for (state, address) in [(3, None), (0, here), (2, here), (3, None)] {
        assert_eq!(function.write(PM + PM_CONTROL, &[state, 0, 0, 0]), address, "D{state}");
    }
    // Its upper byte is not the state.
    assert_eq!(function.write(PM + PM_CONTROL + 1, &[0]), None);
    assert_eq!(function.write(PM + PM_CONTROL, &[0xFC]), here);
    // A state that it does not take.
    function.config.allow(PM + PM_CONTROL, &[0]);
    assert_eq!(function.write(PM + PM_CONTROL, &[3]), here);
}

#[test]
fn its_vectors_are_those_of_the_table_in_the_bar() {
    let mut function = function();
    assert_eq!(function.read32(MSIX), 0x0001_0011);
    assert_eq!((function.read32(MSIX + 4), function.read32(MSIX + 8)), (0x1000, 0x1800));
    let Function { config, here, msix, controller, .. } = &mut function;
    let beside = |_: u64, data: &mut [u8]| data.fill(0x5A);
    let nobody = |at: u64, _: &[u8]| panic!("{at:#x} is the table's");
    here.write(msix, 0x1010, &0xFEE0_1000u64.to_le_bytes(), nobody);
    here.write(msix, 0x1018, &0x41u64.to_le_bytes(), nobody);
    msix.eventfds().unwrap();
    config.write(MSIX + 2, &0xFFFFu16.to_le_bytes());
    assert_eq!(MsixLayout::control(config, MSIX), 0xC001, "enable and function mask, no more");
    config.write(MSIX + 2, &MSIX_ENABLE.to_le_bytes());
    msix.set_control(MsixLayout::control(config, MSIX));
    assert_eq!(controller.attached(), 1);
    // The other one is masked.
    signal(msix.eventfds().unwrap()[0]);
    let mut data = [0; 8];
    here.read(msix, 0x1800, &mut data, beside);
    assert_eq!(data, [1, 0, 0, 0, 0, 0, 0, 0]);
    here.read(msix, 0x101C, &mut data, beside);
    assert_eq!(data, [0, 0, 0, 0, 0x5A, 0x5A, 0x5A, 0x5A], "the device is beside the table");
    here.read(msix, 0, &mut data, beside);
    assert_eq!(data, [0x5A; 8]);
}
