//! Containers over a kernel that keeps the rules of vfio_iommu_type1.c about addresses.

use std::sync::Arc;

use theseus_resources::FdStore;
use theseus_resources::memory_listener::{MemoryListeners, RamBlock, Rank, Refusal};
use vfio_bindings::bindings::vfio::{VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_UNMAP_FLAG_VADDR};

use super::fake::{Kernel, block, container};
use super::invalidate::invalidate_all;
use super::type1::{Container, Type1};
use super::*;

fn vaddrs(kernel: &Kernel) -> Vec<Option<u64>> {
    kernel.maps.lock().values().map(|(_, vaddr)| *vaddr).collect()
}

const OLD: [Option<u64>; 2] = [Some(0x7000_0000), Some(0x7010_0000)];

#[test]
fn drop_maps_all_back() {
    let fd_store = FdStore::new();
    let ((a, ka), (b, kb)) = (container(&fd_store, "a", false), container(&fd_store, "b", false));
    let guard = invalidate_all(&[a as _, b as _]).unwrap();
    assert_eq!((vaddrs(&ka), vaddrs(&kb)), (vec![None; 2], vec![None; 2]));
    drop(guard);
    assert_eq!((vaddrs(&ka), vaddrs(&kb)), (OLD.to_vec(), OLD.to_vec()));
}

#[test]
fn a_second_container_that_refuses_leaves_both_whole() {
    let fd_store = FdStore::new();
    let ((a, ka), (b, kb)) = (container(&fd_store, "a", false), container(&fd_store, "b", false));
    Type1::unmap(&kb, VFIO_DMA_UNMAP_FLAG_VADDR, 0x10_0000, 0x1000).unwrap();
    let refused = invalidate_all(&[a.clone() as _, b.clone() as _]).err().unwrap();
    assert_eq!(refused.domain, "b");
    assert_eq!((vaddrs(&ka), vaddrs(&kb)), (OLD.to_vec(), OLD.to_vec()));
    drop(invalidate_all(&[a as _, b as _]).expect("the next one works"));
}

#[test]
fn a_mediated_device_is_named_and_left_alone() {
    let fd_store = FdStore::new();
    let ((a, ka), (b, kb)) = (container(&fd_store, "a", false), container(&fd_store, "b", true));
    assert!(a.blockers().is_empty());
    assert_eq!(b.blockers().len(), 1);
    let refused = invalidate_all(&[a as _, b as _]).err().unwrap();
    assert!(refused.to_string().contains("mediated device"), "{refused}");
    assert_eq!((vaddrs(&ka), vaddrs(&kb)), (OLD.to_vec(), OLD.to_vec()));
}

#[test]
fn remap_covers_every_container_and_ranges_done_already() {
    let fd_store = FdStore::new();
    let (a, kernel) = container(&fd_store, "a", false);
    std::mem::forget(invalidate_all(&[a.clone() as _]).unwrap());
    // SAFETY: this kernel maps nothing.
    unsafe { Type1::map(&kernel, VFIO_DMA_MAP_FLAG_VADDR, 0xBAD0_0000, 0, 0x1000) }.unwrap();
    // SAFETY: as above.
    unsafe { a.remap(&|map| Some(map.iova + 0x5000_0000)) }.unwrap();
    assert_eq!(vaddrs(&kernel), [Some(0x5000_0000), Some(0x5010_0000)]);
    // SAFETY: as above.
    let missing = unsafe { a.remap(&|map| (map.iova == 0).then_some(0x6000_0000)) };
    assert!(matches!(missing, Err(DmaError::NoMemory { iova: 0x10_0000, .. })));
}

/// A BAR that a device has put there is not taken for RAM, nor taken away with it.
#[test]
fn ram_comes_and_goes_while_it_is_in_use() {
    let fd_store = FdStore::new();
    let ((a, ka), (b, kb)) = (container(&fd_store, "a", false), container(&fd_store, "b", false));
    let listeners = MemoryListeners::new();
    listeners.subscribe_told(a.clone());
    listeners.subscribe_told(b.clone());
    let source = MapSource::Bar { device: "nic0".into(), region: 0, offset: 0 };
    assert!(b.maps_device_memory());
    // SAFETY: this kernel maps nothing.
    unsafe { b.map_device_memory(0x20_0000, 0x1000, 0x7020_0000, source) }.unwrap();
    let (before_a, before_b) = (a.maps(), b.maps());
    // SAFETY: as above.
    let error = unsafe { listeners.add(block(&fd_store, 0x20_0000)) }.unwrap_err().to_string();
    assert!(error.starts_with("container 'b': cannot map 0x200000+0x1000 for DMA: "), "{error}");
    assert!(error.ends_with("(the range overlaps one that is already mapped)"), "{error}");
    assert_eq!((a.maps(), b.maps()), (before_a.clone(), before_b.clone()));
    assert_eq!((vaddrs(&ka).len(), vaddrs(&kb).len()), (2, 3));
    // SAFETY: as above.
    unsafe { listeners.add(block(&fd_store, 0x30_0000)) }.unwrap();
    let last = a.maps().pop().unwrap();
    assert_eq!((last.iova, last.vaddr, last.source), (0x30_0000, 0x7030_0000, MapSource::Ram));
    // What was added goes over in an update as the rest does, and can be removed afterwards.
    drop(invalidate_all(&[a.clone() as _, b.clone() as _]).unwrap());
    assert!(vaddrs(&ka).iter().chain(&vaddrs(&kb)).all(Option::is_some));
    listeners.remove(0x30_0000).unwrap();
    assert_eq!((a.maps(), b.maps()), (before_a, before_b));
    assert_eq!((vaddrs(&ka).len(), vaddrs(&kb).len()), (2, 3));
}

#[test]
fn unmap_forgets() {
    let fd_store = FdStore::new();
    let (a, kernel) = container(&fd_store, "a", false);
    a.unmap(0).unwrap();
    a.unmap(0).unwrap();
    assert_eq!(a.maps().len(), 1);
    assert_eq!(vaddrs(&kernel).len(), 1);
}

/// A domain that no BAR can be mapped into; otherwise it is as its container.
pub(crate) struct RamOnly(pub Arc<Container>);

impl MemoryListener for RamOnly {
    fn describe(&self) -> String {
        self.0.describe()
    }

    fn rank(&self) -> Rank {
        self.0.rank()
    }

    unsafe fn add(&self, block: &RamBlock) -> Result<(), Refusal> {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(block) }
    }

    fn remove(&self, block: &RamBlock) -> Result<(), Refusal> {
        self.0.remove(block)
    }
}

impl DmaDomain for RamOnly {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn fd(&self) -> &StoredFd {
        self.0.fd()
    }

    fn maps(&self) -> Vec<DmaMap> {
        self.0.maps()
    }

    fn is_coherent(&self) -> bool {
        true
    }

    fn maps_device_memory(&self) -> bool {
        false
    }

    unsafe fn map_device_memory(&self, iova: u64, _: u64, _: u64, _: MapSource) -> Result<(), DmaError> {
        panic!("{iova:#x} cannot be mapped here");
    }

    fn unmap(&self, iova: u64) -> Result<(), DmaError> {
        self.0.unmap(iova)
    }

    fn blockers(&self) -> Vec<String> {
        self.0.blockers()
    }

    fn invalidate(&self) -> Result<(), DmaError> {
        self.0.invalidate()
    }

    fn take_back(&self) {
        self.0.take_back();
    }

    unsafe fn remap(&self, vaddr_of: &dyn Fn(&DmaMap) -> Option<u64>) -> Result<(), DmaError> {
        // SAFETY: the caller's promise.
        unsafe { self.0.remap(vaddr_of) }
    }

    fn save(&self) -> DomainHandles {
        self.0.save()
    }

    fn mend(&self, later: DomainHandles) -> bool {
        self.0.mend(later)
    }
}
