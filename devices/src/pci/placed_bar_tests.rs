//! A BAR over memslots that keep KVM's rules, and a bus.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::*;
use crate::bus::LockedDevice;
use crate::pci::fake::{FakeMemslots, space};
use crate::pci::regs::BAR_IO;

/// Answers with its own number.
struct Answer(u8);

impl LockedDevice for Answer {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(self.0);
    }

    fn write(&mut self, _: u64, _: &[u8]) {}
}

/// Only an address: nobody touches it.
struct Page(Arc<AtomicBool>);

// SAFETY: the memslots are a fake.
unsafe impl BarMemory for Page {
    fn hva(&self) -> u64 {
        0x7000_0000
    }

    fn size(&self) -> u64 {
        0x1000
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// 8 KiB: the first page is memory, the second one is trapped.
fn bar(space: &AddressSpace, number: u8, ended: &Arc<AtomicBool>) -> PlacedBar<Page> {
    let register = BarRegister { index: 0, flags: 0, size: 0x2000, address: 0xC000_0000, is_64bit: false };
    let trap = Arc::new(Mutex::new(Answer(number))) as SharedDevice;
    PlacedBar::new(register, vec![(0, Page(ended.clone()))], vec![(0x1000, 0x1000, trap)], space.clone())
}

fn answer(space: &AddressSpace, address: u64) -> u8 {
    let mut data = [0];
    space.mmio.read(address, &mut data);
    data[0]
}

#[test]
fn beyond_the_last_address_it_is_nowhere() {
    let memslots = Arc::new(FakeMemslots::default());
    let (space, ended) = (space(memslots.clone()), Arc::default());
    let mut bar = bar(&space, 7, &ended);
    for address in [u64::MAX - 0xFFF, u64::MAX - 0x1FFF] {
        assert!(bar.put(address).is_err(), "{address:#x}");
        assert_eq!((memslots.count(), bar.address()), (0, None), "{address:#x}");
    }
}

#[test]
fn it_is_at_one_place() {
    let memslots = Arc::new(FakeMemslots::default());
    let (space, ended) = (space(memslots.clone()), Arc::default());
    let mut bar = bar(&space, 7, &ended);
    assert_eq!((bar.address(), memslots.count()), (None, 0));
    for address in [0xC000_0000, 0xD000_0000] {
        bar.put(address).unwrap();
        assert_eq!((memslots.all(), answer(&space, address + 0x1000)), (vec![(address, 0x1000)], 7));
    }
    assert_eq!(answer(&space, 0xC000_1000), 0xFF, "no longer");
    assert_eq!(bar.shown().unwrap().address, 0xD000_0000);
    assert_eq!((bar.vaddr(0x800, 0x800), bar.vaddr(0x800, 0x801)), (Some(0x7000_0800), None));
    assert!(bar.take_away());
    assert_eq!((memslots.count(), answer(&space, 0xD000_1000), bar.address()), (0, 0xFF, None));
}

#[test]
fn onto_another_one_nothing_of_it_is_put() {
    let memslots = Arc::new(FakeMemslots::default());
    let (space, ended) = (space(memslots.clone()), Arc::default());
    let (mut one, mut other) = (bar(&space, 1, &ended), bar(&space, 2, &ended));
    one.put(0xC000_0000).unwrap();
    assert!(other.put(0xC000_0000).is_err());
    // The memory fits, the trapped part does not.
    space.mmio.insert(0xD000_1000, 1, Arc::new(Mutex::new(Answer(9)))).unwrap();
    assert!(other.put(0xD000_0000).is_err());
    assert!(other.put(u64::MAX - 0xFFF).is_err(), "it wraps around");
    assert_eq!((other.address(), memslots.count(), answer(&space, 0xC000_1000)), (None, 1, 1));
    one.put(0xC100_0000).unwrap();
    other.put(0xC000_0000).unwrap();
    assert_eq!((memslots.count(), answer(&space, 0xC000_1000)), (2, 2));
}

/// In a process that goes on the memory is somebody else's by then.
#[test]
fn no_memslot_outlives_its_memory() {
    let memslots = Arc::new(FakeMemslots::default());
    let (space, ended) = (space(memslots.clone()), Arc::new(AtomicBool::new(false)));
    let mut bar = bar(&space, 7, &ended);
    bar.put(0xC000_0000).unwrap();
    memslots.refuse(true);
    assert!(!bar.take_away(), "it is not forgotten");
    assert!(!bar.settle());
    memslots.refuse(false);
    drop(bar);
    assert_eq!((memslots.count(), ended.load(Ordering::Relaxed)), (0, true));
}

#[test]
fn ports_are_on_their_own_bus() {
    let space = space(Arc::new(FakeMemslots::default()));
    let register = BarRegister { index: 2, flags: BAR_IO, size: 0x20, address: 0x1000, is_64bit: false };
    let trap = Arc::new(Mutex::new(Answer(3))) as SharedDevice;
    let mut bar =
        PlacedBar::<std::convert::Infallible>::new(register, Vec::new(), vec![(0, 0x20, trap)], space.clone());
    bar.put(0x1000).unwrap();
    let mut data = [0];
    space.pio.read(0x101F, &mut data);
    assert_eq!((data[0], answer(&space, 0x1000)), (3, 0xFF));
}
