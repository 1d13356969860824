//! The whole device over a memfd that stands for a VFIO device: BARs can be mapped from it, requests to VFIO fail.

use std::sync::atomic::Ordering;

use theseus_resources::{FdStore, StateReader};

use super::super::dma::MapSource;
use super::super::dma::fake::container;
use super::super::dma::tests::RamOnly;
use super::super::fake::{CONFIG, Rig, rig, rig_in, wiring};
use super::super::registry::{DEFAULT_CONTAINER, Passthrough};
use super::super::saved::PassthroughHandles;
use super::*;
use crate::migratable::{Handles, with_slots};

const ON: &[u8] = &[7, 0];
const BAR3: u64 = 64 << 30;

#[test]
fn bars_are_there_exactly_while_they_decode() {
    let mut rig = rig();
    assert_eq!((rig.slots(), rig.dma()), (vec![], vec![]));
    assert_eq!(rig.read32(COMMAND) & 0xFFFF, 0, "nothing decodes at boot");
    assert_eq!((rig.read32(0x10), rig.read32(0x14), rig.read32(0x18)), (0xC000_0000, 0xC001_0000, 0x1001));
    rig.write(COMMAND, ON);
    let all = vec![(0xC000_0000, 0x1_0000), (BAR3 + 0x1000, 0x1000), (BAR3 + 0x3000, 0x1000)];
    assert_eq!((rig.slots(), rig.dma()), (all.clone(), all), "the pages of table and PBA are cut out");

    let mut data = [0; 4];
    rustix::io::pwrite(&rig.file, &[0xAB], 0x1_0010).unwrap();
    rig.wiring.space.mmio.read(0xC001_0010, &mut data);
    assert_eq!(data, [0xAB, 0, 0, 0], "a BAR below a page is trapped");
    rig.wiring.space.pio.write(0x1004, &[0xCD]);
    rustix::io::pread(&rig.file, &mut data[..1], 0x1_1004).unwrap();
    assert_eq!(data[0], 0xCD, "so are ports");

    rig.write(COMMAND, &[5, 0]);
    assert_eq!((rig.slots(), rig.dma()), (vec![], vec![]));
    rig.wiring.space.mmio.read(0xC001_0010, &mut data);
    assert_eq!(data, [0xFF; 4]);
    rig.wiring.space.pio.read(0x1004, &mut data[..1]);
    assert_eq!(data[0], 0xCD, "ports decode by their own bit");
    rig.write(COMMAND, &[0, 0]);
    rig.wiring.space.pio.read(0x1004, &mut data[..1]);
    assert_eq!(data[0], 0xFF);
}

/// The guest reaches them all the same.
#[test]
fn where_no_bar_can_be_mapped_for_dma_none_is() {
    let mut rig = rig_in(|fd_store| Arc::new(RamOnly(container(fd_store, DEFAULT_CONTAINER, false).0)));
    rig.write(COMMAND, ON);
    assert_eq!((rig.slots().len(), rig.dma()), (3, vec![]));
    rig.write(COMMAND, &[0, 0]);
    assert_eq!(rig.slots(), []);
}

#[test]
fn a_bar_can_be_sized_and_moved() {
    let mut rig = rig();
    rig.write(0x10, &[0xFF; 4]);
    assert_eq!(rig.read32(0x10), 0xFFFF_0000);
    rig.write(0x10, &0xD000_0000u32.to_le_bytes());
    rig.write(COMMAND, ON);
    assert_eq!(rig.slots()[0], (0xD000_0000, 0x1_0000));
    // While decoding, as a guest that does not switch it off: outside the windows it is nowhere.
    rig.write(0x10, &[0xFF; 4]);
    assert_eq!(rig.slots().len(), 2);
    rig.write(0x10, &0xD800_0000u32.to_le_bytes());
    assert_eq!(rig.slots()[0], (0xD800_0000, 0x1_0000));
    // Onto the other BAR: one of them loses, nothing breaks, and it can move away again.
    rig.write(0x20, &[0; 4]);
    rig.write(0x1C, &0xD800_0000u32.to_le_bytes());
    assert_eq!(rig.slots(), [(0xD800_0000, 0x1_0000)]);
    rig.write(0x1C, &0xD900_0000u32.to_le_bytes());
    assert_eq!(rig.slots().len(), 3);
}

#[test]
fn asleep_it_decodes_nothing() {
    let mut rig = rig();
    rig.write(COMMAND, ON);
    rig.write(0x44, &[3, 0]);
    assert_eq!(rig.slots(), []);
    rig.write(0x44, &[0, 0]);
    assert_eq!(rig.slots().len(), 3);
}

/// Programs vector 0 by the bus as a guest does, and switches MSI-X on.
fn enable_vector0(rig: &mut Rig) {
    rig.write(COMMAND, ON);
    rig.wiring.space.mmio.write(BAR3, &0xFEE0_1000u64.to_le_bytes());
    rig.wiring.space.mmio.write(BAR3 + 8, &0x41u64.to_le_bytes());
    rig.write(0x52, &[0, 0x80]);
}

#[test]
fn the_table_is_ours_and_the_bytes_beside_it_are_the_device_s() {
    let mut rig = rig();
    enable_vector0(&mut rig);
    assert_eq!(rig.msi.attached(), 1);
    let mut entry = [0; 8];
    rig.wiring.space.mmio.read(BAR3 + 8, &mut entry);
    assert_eq!(entry, 0x41u64.to_le_bytes());
    rig.wiring.space.mmio.write(BAR3 + 0x30, &[1; 8]);
    rustix::io::pread(&rig.file, &mut entry, 0x1_4030).unwrap();
    assert_eq!(entry, [1; 8]);
    rustix::io::pread(&rig.file, &mut entry, 0x1_4000).unwrap();
    assert_eq!(entry, [0; 8], "the physical table is VFIO's");
    rig.wiring.space.mmio.write(BAR3 + 0x2000, &[0xFF; 8]);
    rig.wiring.space.mmio.read(BAR3 + 0x2000, &mut entry);
    assert_eq!(entry, [0; 8], "the pending bits cannot be written");
    rig.write(0x52, &[0, 0]);
    assert_eq!(rig.msi.attached(), 0);
}

/// The same in a new image, which finds the device as VFIO has it.
fn carried(mut rig: Rig) -> Rig {
    let before: Vec<u8> = (0..64).flat_map(|n| rig.read32(n * 4).to_le_bytes()).collect();
    let mut new = carried_untouched(rig);
    let after: Vec<u8> = (0..64).flat_map(|n| new.read32(n * 4).to_le_bytes()).collect();
    assert_eq!(before, after);
    new
}

fn carried_untouched(rig: Rig) -> Rig {
    let state = saved(&rig);
    rig.carried(&state).unwrap()
}

fn saved(rig: &Rig) -> Vec<u8> {
    rig.saved()
}

fn read(bytes: &[u8]) -> (PassthroughHandles, Saved<VfioPci>) {
    let mut reader = StateReader::new(bytes).unwrap();
    let vfio = PassthroughHandles::take(&mut reader, "vfio").unwrap();
    (vfio, crate::migratable::take(&mut reader, "nic0").unwrap())
}

/// A new VMM gets ready while the guest goes on, and is then brought to the guest's last state: whatever has changed in
/// between, it has what it would have from that state alone.
#[test]
fn a_device_that_was_made_ready_is_mended() {
    type Change = fn(&mut Rig);
    let changes: [(&str, Change, &[u8]); 7] = [
        ("nothing", |_| {}, &[]),
        ("decoding begins", |rig| rig.write(COMMAND, ON), &[0, 1, 2, 3]),
        ("a BAR moves", |rig| rig.write(0x10, &0xD000_0000u32.to_le_bytes()), &[0]),
        ("MSI-X is turned on", enable_vector0, &[]),
        (
            "a vector is moved and masked",
            |rig| {
                rig.wiring.space.mmio.write(BAR3, &[0x10, 0x20]);
                rig.wiring.space.mmio.write(BAR3 + 12, &1u32.to_le_bytes());
            },
            &[],
        ),
        ("it moves again", |rig| rig.write(0x10, &0xD800_0000u32.to_le_bytes()), &[0]),
        ("decoding ends", |rig| rig.write(COMMAND, &[0, 0]), &[0, 1, 2, 3]),
    ];
    for at in 0..changes.len() {
        let (mut rig, mut moved) = (rig(), Vec::new());
        let (name, last, wanted) = &changes[at];
        changes[..at].iter().for_each(|(_, change, _)| change(&mut rig));
        let early = saved(&rig);
        let (fd_store, mut claims) = (FdStore::new(), Claims::default());
        let again = |fds: Vec<theseus_resources::StoredFd>| -> Vec<_> {
            fds.iter().map(|fd| std::os::fd::AsFd::as_fd(fd).try_clone_to_owned().unwrap()).collect()
        };
        let (records, fds) = rig.wiring.fd_store.offer(&Default::default());
        let known = records.iter().map(|record| record.slot).collect();
        fd_store.receive(&mut claims, records, again(fds)).unwrap();
        let (wiring, memslots, msi) = wiring(&fd_store);
        let (vfio, state) = read(&early);
        let passthrough = Passthrough::restore(vfio, fd_store.clone(), Arc::default(), &mut claims).unwrap();
        let mut windows = Windows::new(1 << 30, 40);
        let (groups, device) = (&|n| passthrough.group(n), wiring.clone());
        let parts = VfioPciParts { claims: &mut claims, groups, windows: &mut windows, wiring: device };
        let mut pci = VfioPci::restore(state, parts).unwrap();

        last(&mut rig);
        rig.pci.msix().quiesce_irqfds().unwrap();
        let late = saved(&rig);
        let (records, fds) = rig.wiring.fd_store.offer(&known);
        fd_store.receive(&mut claims, records, again(fds)).unwrap();
        let (vfio, state) = read(&late);
        passthrough.mend(vfio).unwrap();
        moved.extend(pci.mend(state, &mut claims).unwrap());
        claims.finish().unwrap();
        assert_eq!(&moved, wanted, "{name}");
        let (slots, file, irqs) = (rig.slots(), rig.file.try_clone().unwrap(), rig.irqs.clone());
        let new = Rig { pci, passthrough, file, windows, memslots, msi, irqs, wiring };
        assert_eq!(saved(&new), late, "{name}");
        assert_eq!(new.slots(), slots, "{name}");
        assert_eq!(new.msi.attached(), 0, "{name}");
        rig.pci.msix().resume_irqfds().unwrap();
        new.pci.msix().resume_irqfds().unwrap();
        assert_eq!(new.msi.attached(), rig.msi.attached(), "{name}");
    }
}

#[test]
fn a_device_that_is_another_one_is_refused() {
    let (one, other) = (rig(), rig());
    let other_of = |change: fn(&mut Saved<VfioPci>)| {
        let (_, mut later) = read(&saved(&one));
        change(&mut later);
        later
    };
    let mut other = carried_untouched(other);
    let mut claims = Claims::default();
    let changes: [fn(&mut Saved<VfioPci>); 6] = [
        |later| later.state.id = "nic1".into(),
        |later| later.state.bars.clear(),
        |later| later.handles.bars.clear(),
        |later| later.handles.bars[1].region = 4,
        |later| later.handles.group = 8,
        |later| later.handles.device.config.size = 256,
    ];
    for change in changes {
        assert!(other.pci.mend(other_of(change), &mut claims).is_err());
    }
    other.pci.mend(other_of(|_| {}), &mut claims).unwrap();
}

#[test]
fn a_moved_and_running_device_goes_over_whole() {
    let mut rig = rig();
    rig.write(0x10, &0xD000_0000u32.to_le_bytes());
    enable_vector0(&mut rig);
    rig.pci.msix().quiesce_irqfds().unwrap();
    let (slots, dma, memslots) = (rig.slots(), rig.dma(), rig.memslots.clone());
    let msix_fd = rig.pci.msix().eventfds().unwrap()[0].try_clone_to_owned().unwrap();
    assert_eq!(with_slots(&saved(&rig)), ["nic0.handles", "vfio.handles"]);
    let asked = rig.irqs.asked.load(Ordering::Relaxed);
    let mut new = carried(rig);
    assert_eq!(memslots.count(), 0, "no memslot outlives its mapping");
    assert_eq!(new.passthrough.domains()[0].maps().len(), 3, "but DMA does");
    rustix::io::write(&msix_fd, &1u64.to_ne_bytes()).unwrap();
    assert_eq!((new.slots(), new.dma()), (slots, dma));
    for map in new.passthrough.domains()[0].maps() {
        let MapSource::Bar { region, offset, .. } = map.source else { panic!("{map:?}") };
        assert!(new.pci.bar_vaddr(region, offset, map.size).is_some());
    }
    assert_eq!(new.msi.attached(), 0);
    new.pci.msix().resume_irqfds().unwrap();
    assert_eq!(new.msi.injected(), [0x41], "what came in the pause");
    assert_eq!(new.windows.mmio32.allocate(0x1_0000), Some(0xC002_0000), "the addresses stay taken");
    new.pci.settle();
    assert_eq!(new.irqs.asked.load(Ordering::Relaxed), asked, "nothing is asked of VFIO");
}

#[test]
fn memslots_that_were_refused_are_tried_again() {
    let mut rig = rig();
    rig.memslots.refuse(true);
    rig.write(COMMAND, ON);
    assert_eq!(rig.slots(), []);
    rig.memslots.refuse(false);
    rig.read32(0);
    assert_eq!((rig.slots().len(), rig.dma().len()), (3, 3));
    // One that cannot be removed is not forgotten, nor its number given to nobody.
    rig.memslots.refuse(true);
    rig.write(COMMAND, &[0, 0]);
    assert_eq!((rig.slots().len(), rig.dma().len()), (3, 0));
    rig.memslots.refuse(false);
    rig.read32(0);
    assert_eq!(rig.slots(), []);
    // A save in between: what the guest wants is in the registers.
    rig.memslots.refuse(true);
    rig.write(COMMAND, ON);
    let mut new = carried(rig);
    assert_eq!(new.slots().len(), 3, "at the first access");
    new.pci.release(&mut new.windows);
}

#[test]
fn peer_to_peer_mappings_that_were_refused_are_tried_again() {
    let mut kernel = None;
    let mut rig = rig_in(|fd_store| {
        let (container, its) = container(fd_store, DEFAULT_CONTAINER, false);
        kernel = Some(its);
        container
    });
    let kernel = kernel.unwrap();
    kernel.refuses.store(true, Ordering::Relaxed);
    rig.write(COMMAND, ON);
    assert_eq!((rig.slots().len(), rig.dma().len()), (3, 0), "the guest has its BARs all the same");
    kernel.refuses.store(false, Ordering::Relaxed);
    rig.read32(0);
    assert_eq!((rig.slots().len(), rig.dma().len()), (3, 3));
    rig.read32(0);
    rig.write(COMMAND, &[0, 0]);
    assert_eq!((rig.slots().len(), rig.dma().len()), (0, 0), "each was mapped once");
}

#[test]
fn vfio_that_refused_msix_is_asked_again() {
    let mut rig = rig();
    let signals = |rig: &Rig| (rig.irqs.on.load(Ordering::Relaxed), rig.pci.device.signals());
    rig.irqs.refused.store(true, Ordering::Relaxed);
    enable_vector0(&mut rig);
    assert_eq!(signals(&rig), (false, false));
    assert_eq!(rig.read32(0x50) >> 16, 0x8002, "the guest cannot be told");
    rig.irqs.refused.store(false, Ordering::Relaxed);
    // An access to the table is one, too.
    rig.wiring.space.mmio.read(BAR3, &mut [0; 4]);
    assert_eq!((signals(&rig), rig.msi.attached()), ((true, true), 1));
    assert_eq!(rig.msi.injected(), [0; 0], "a count after the attach is KVM's to inject");
    assert_eq!(readable_count(&mut rig), 1, "what was missed is made up for by a spurious one");
    rig.irqs.refused.store(true, Ordering::Relaxed);
    rig.write(0x52, &[0, 0]);
    assert_eq!(signals(&rig), (true, true));
    rig.irqs.refused.store(false, Ordering::Relaxed);
    rig.read32(0);
    assert_eq!(signals(&rig), (false, false));
    // What VFIO does not do goes over as such.
    rig.irqs.refused.store(true, Ordering::Relaxed);
    rig.write(0x52, &[0, 0x80]);
    let new = carried(rig);
    assert_eq!((new.pci.device.signals(), new.pci.msix().enabled()), (false, true));
}

#[test]
fn a_host_with_ever_fewer_vectors_gives_what_it_has() {
    let mut rig = rig();
    let signals = |rig: &Rig| (rig.irqs.on.load(Ordering::Relaxed), rig.pci.device.signals());
    // As many as asked for, and yet not: nothing that the kernel says. It is no success.
    *rig.irqs.fewer.lock() = vec![3];
    enable_vector0(&mut rig);
    assert_eq!(signals(&rig), (false, false));
    *rig.irqs.fewer.lock() = vec![1, 2];
    rig.read32(0);
    assert_eq!((signals(&rig), rig.irqs.vectors.load(Ordering::Relaxed)), ((true, true), 1));
}

fn readable_count(rig: &mut Rig) -> u64 {
    let mut count = [0; 8];
    rustix::io::read(rig.pci.msix().eventfds().unwrap()[0], &mut count).unwrap();
    u64::from_ne_bytes(count)
}

/// Whatever the guest writes, and whatever VFIO does at the end of MSI-X.
#[test]
fn intx_stays_off_in_the_device() {
    let mut rig = rig();
    let physical = |rig: &Rig| {
        let mut high = [0];
        rustix::io::pread(&rig.file, &mut high, CONFIG + 5).unwrap();
        high[0]
    };
    assert_eq!(physical(&rig), DISABLE_INTX, "before the guest runs");
    assert_eq!(rig.read32(COMMAND) & 0x400, 0, "the guest sees it as after a reset");
    for (offset, data) in [(COMMAND, &[7, 4][..]), (COMMAND, &[7, 0]), (COMMAND + 1, &[5]), (COMMAND + 1, &[1])] {
        rig.write(offset, data);
        let last = data[data.len() - 1];
        assert_eq!(rig.read32(COMMAND) >> 8 & 0xFF, u32::from(last));
        assert_eq!(physical(&rig), last | DISABLE_INTX);
    }
    rig.write(COMMAND, &0x1000_0007u32.to_le_bytes());
    assert_eq!(physical(&rig), DISABLE_INTX);
    enable_vector0(&mut rig);
    rig.write(0x52, &[0, 0]);
    assert_eq!(physical(&rig), DISABLE_INTX, "after MSI-X");
    rig.irqs.refused.store(true, Ordering::Relaxed);
    rig.write(0x52, &[0, 0x80]);
    assert_eq!(physical(&rig), DISABLE_INTX, "after MSI-X that could not be enabled");
    rig.pci.release(&mut rig.windows);
    assert_eq!(physical(&rig), DISABLE_INTX);
}

#[test]
fn release_gives_all_back() {
    let mut rig = rig();
    enable_vector0(&mut rig);
    assert_eq!(rig.windows.mmio32.allocate(0x1_0000), Some(0xC002_0000));
    rig.pci.release(&mut rig.windows);
    assert_eq!((rig.slots(), rig.dma(), rig.msi.attached()), (vec![], vec![], 0));
    assert_eq!(rig.windows.mmio32.allocate(0x1_0000), Some(0xC000_0000));
    assert_eq!(rig.read32(COMMAND) & 0xFFFF, 0);
}

#[test]
fn no_access_breaks_it() {
    let mut rig = rig();
    let mut random = 0x2545_F491_4F6C_DD1Du64;
    for _ in 0..20_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let (offset, len) = ((random >> 8) as u16 & 0xFC, [1, 2, 4][(random % 3) as usize]);
        rig.write(offset, &random.to_le_bytes()[..len]);
        rig.wiring.space.mmio.write(BAR3 + (random >> 32) % 0x4000, &random.to_be_bytes()[..len]);
        let mut data = [0; 8];
        rig.wiring.space.mmio.read(BAR3 + (random >> 20) % 0x4000, &mut data);
        rig.pci.config_read((random >> 40) as u16 & 0xFFC, &mut data[..len]);
    }
    rig.write(0xFFFC, &[0; 4]);
    let mut data = [0; 4];
    rig.pci.config_read(0xFFFF, &mut data);
    assert_eq!(data, [0xFF; 4]);
}
