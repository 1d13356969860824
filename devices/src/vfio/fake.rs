//! A whole device over a memfd that stands for a VFIO device: BARs can be mapped from it, requests to VFIO fail.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;
use theseus_resources::alloc::Windows;
use theseus_resources::{FdKind, FdStore, StateReader, StateWriter};

use super::device::{Irqs, Region, VfioDevice};
use super::dma::DmaDomain;
use super::dma::fake::container;
use super::pci::{VfioPci, VfioPciParts};
use super::registry::{DEFAULT_CONTAINER, Passthrough};
use super::saved::PassthroughHandles;
use super::wiring::Wiring;
use crate::interrupt::fake::FakeController;
use crate::migratable::{self, Handles, Migratable, SavedDevice};
use crate::pci::PciDevice;
use crate::pci::fake::{FakeMemslots, space};

/// VFIO's interrupts as far as they change the device: the end of MSI-X clears DisINTx (pci_intx_for_msi).
#[derive(Default)]
pub struct FakeIrqs {
    file: Option<OwnedFd>,
    /// MSI-X is on.
    pub on: AtomicBool,
    /// All requests fail while this is set. One that would have switched MSI-X on leaves it off.
    pub refused: AtomicBool,
    /// How many requests there were, refused or not.
    pub asked: AtomicU32,
    /// What the next requests to switch MSI-X on are answered, the last of these first: so many vectors there are, and
    /// it stays off.
    pub fewer: Mutex<Vec<u32>>,
    /// How many vectors the last request named that was not refused.
    pub vectors: AtomicU32,
}

impl Irqs for Arc<FakeIrqs> {
    fn set(&self, _: u32, eventfds: &[std::os::fd::BorrowedFd<'_>]) -> std::io::Result<u32> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let refused = self.refused.load(Ordering::Relaxed);
        let on = !eventfds.is_empty() && !refused;
        if refused && eventfds.is_empty() {
            return Err(std::io::ErrorKind::OutOfMemory.into());
        }
        if let Some(fewer) = on.then(|| self.fewer.lock().pop()).flatten() {
            return Ok(fewer);
        }
        self.vectors.store(eventfds.len() as u32, Ordering::Relaxed);
        assert!(on || refused || self.on.load(Ordering::Relaxed), "EINVAL: it is off");
        self.on.store(on, Ordering::Relaxed);
        if let Some(file) = self.file.as_ref().filter(|_| !on) {
            rustix::io::pwrite(file, &[0], CONFIG + 5).unwrap();
        }
        if refused { Err(std::io::ErrorKind::OutOfMemory.into()) } else { Ok(0) }
    }
}

/// Where the configuration space is in the file.
pub const CONFIG: u64 = 0x10_0000;

/// The device, and the machine around it.
pub struct Rig {
    /// On no bus yet.
    pub pci: VfioPci,
    /// Of one domain, and group 7 in it.
    pub passthrough: Passthrough,
    /// The memfd: regions are at the offsets that [`rig`] gives them.
    pub file: OwnedFd,
    /// Of a guest with 1 GiB of RAM and addresses of 40 bits.
    pub windows: Windows,
    /// Of the device's BARs alone.
    pub memslots: Arc<FakeMemslots>,
    /// Of `wiring`.
    pub msi: Arc<FakeController>,
    /// What the device asks VFIO for; one that was carried over asks the memfd, which refuses.
    pub irqs: Arc<FakeIrqs>,
    /// Of the device.
    pub wiring: Wiring,
}

/// A machine that nothing is wired to yet, and what stands for KVM in it.
pub fn wiring(fd_store: &FdStore) -> (Wiring, Arc<FakeMemslots>, Arc<FakeController>) {
    let (memslots, msi) = (Arc::new(FakeMemslots::default()), Arc::new(FakeController::default()));
    let wiring = Wiring { fd_store: fd_store.clone(), interrupts: msi.clone(), space: space(memslots.clone()) };
    (wiring, memslots, msi)
}

/// BAR 0: 64 KiB, BAR 1: 256 bytes, BAR 2: 32 ports, BAR 3: 64-bit, 16 KiB with table at 0 and PBA at 0x2000, 3
/// vectors.
pub fn rig() -> Rig {
    rig_in(|fd_store| container(fd_store, DEFAULT_CONTAINER, false).0)
}

/// As [`rig`], with this domain.
pub(super) fn rig_in<D: DmaDomain + 'static>(domain: impl FnOnce(&FdStore) -> Arc<D>) -> Rig {
    let fd_store = FdStore::new();
    let file = rustix::fs::memfd_create("device", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, CONFIG + 0x1000).unwrap();
    let put = |offset: u64, value: u32| rustix::io::pwrite(&file, &value.to_le_bytes(), CONFIG + offset).unwrap();
    put(0x04, 0x0010_0007);
    put(0x18, 0x1);
    put(0x1C, 0x4);
    put(0x34, 0x40);
    put(0x40, 0x0003_5001);
    put(0x50, 0x0002_0011);
    put(0x54, 0x3);
    put(0x58, 0x2003);
    let whole = |index, size, offset| Region { index, size, offset, mappable: vec![(0, size)] };
    let small = |index, size, offset| Region { index, size, offset, mappable: vec![] };
    let bars = vec![
        whole(0, 0x1_0000, 0),
        small(1, 0x100, 0x1_0000),
        small(2, 0x20, 0x1_1000),
        whole(3, 0x4000, 0x1_4000),
        small(4, 0, 0),
        small(5, 0, 0),
    ];
    let fd = fd_store.keep("device 0000:01:00.0", FdKind::VfioDevice, file.try_clone().unwrap());
    let irqs = Arc::new(FakeIrqs { file: Some(file.try_clone().unwrap()), ..Default::default() });
    let device = VfioDevice::with("0000:01:00.0", fd, Box::new(irqs.clone()), bars, small(7, 0x1000, CONFIG), 3);
    let domain = domain(&fd_store);
    // The RAM that it comes with is not looked at here.
    domain.maps().iter().for_each(|map| domain.unmap(map.iova).unwrap());
    let passthrough = Passthrough::with(&fd_store, domain);
    let (wiring, memslots, msi) = wiring(&fd_store);
    let mut windows = Windows::new(1 << 30, 40);
    let group = passthrough.group(7).unwrap();
    let pci = VfioPci::new("nic0", device, group, wiring.clone(), &mut windows).unwrap();
    Rig { pci, passthrough, file, windows, memslots, msi, irqs, wiring }
}

impl Rig {
    /// A write by the guest to the configuration space.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        self.pci.config_write(offset, data);
    }

    /// What the guest reads of the configuration space.
    pub fn read32(&mut self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.pci.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// (gpa, size) of all memslots.
    pub fn slots(&self) -> Vec<(u64, u64)> {
        self.memslots.all()
    }

    /// (iova, size) of all that its domain has.
    pub fn dma(&self) -> Vec<(u64, u64)> {
        let mut maps: Vec<_> = self.passthrough.domains()[0].maps().iter().map(|map| (map.iova, map.size)).collect();
        maps.sort();
        maps
    }

    /// What the device and its registry are, as they would be saved, in bytes.
    pub fn saved(&self) -> Vec<u8> {
        let mut writer = StateWriter::new("test");
        let SavedDevice { state, handles } = SavedDevice::of(&self.pci, "nic0").unwrap();
        for section in [self.passthrough.save().encode("vfio").unwrap(), Some(state), handles].into_iter().flatten() {
            writer.add_encoded(section.encoded, &section.format).unwrap();
        }
        writer.finish().unwrap()
    }

    /// The same in a new image, of `state`; the error says what is wrong with that.
    pub fn carried(self, state: &[u8]) -> Result<Self, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let mut reader = StateReader::new(state).map_err(|e| text(&e))?;
        let vfio = PassthroughHandles::take(&mut reader, "vfio").map_err(|e| text(&e))?;
        let saved = migratable::take(&mut reader, "nic0").map_err(|e| text(&e))?;
        let (fd_store, mut claims) = self.wiring.fd_store.handed_over().map_err(|e| text(&e))?;
        drop(self.pci);
        let (wiring, memslots, msi) = wiring(&fd_store);
        let restored = Passthrough::restore(vfio, fd_store.clone(), Arc::default(), &mut claims);
        let passthrough = restored.map_err(|e| text(&e))?;
        let mut windows = Windows::new(1 << 30, 40);
        let groups = &|n| passthrough.group(n);
        let parts = VfioPciParts { claims: &mut claims, groups, windows: &mut windows, wiring: wiring.clone() };
        let pci = VfioPci::restore(saved, parts).map_err(|e| text(&e))?;
        claims.finish().map_err(|e| text(&e))?;
        Ok(Self { pci, passthrough, file: self.file, windows, memslots, msi, irqs: self.irqs, wiring })
    }
}
