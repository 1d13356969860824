//! DMA domains that refuse what a test wants refused, and are in all else what they were.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use theseus_devices::vfio::saved::DomainHandles;
use theseus_devices::vfio::{DmaDomain, DmaError, DmaMap, MapSource};
use theseus_resources::StoredFd;
use theseus_resources::memory_listener::{MemoryListener, RamBlock, Rank, Refusal};

pub(super) struct DmaFaults {
    /// The domain that is busy.
    pub busy: Option<u32>,
    /// The mapping that nobody finds, counted over all domains.
    pub refused: Option<u32>,
}

impl DmaFaults {
    pub(super) fn over(self, domains: Vec<Arc<dyn DmaDomain>>) -> Vec<Arc<dyn DmaDomain>> {
        let Self { busy, refused } = self;
        let left = refused.map(|refused| Arc::new(AtomicU32::new(refused)));
        let wrap = |(number, domain)| -> Arc<dyn DmaDomain> {
            Arc::new(Faulty { domain, is_busy: busy == Some(number), left: left.clone() })
        };
        (0..).zip(domains).map(wrap).collect()
    }
}

struct Faulty {
    domain: Arc<dyn DmaDomain>,
    is_busy: bool,
    /// How many mappings are found before the one that is not.
    left: Option<Arc<AtomicU32>>,
}

impl MemoryListener for Faulty {
    fn describe(&self) -> String {
        self.domain.describe()
    }

    fn rank(&self) -> Rank {
        self.domain.rank()
    }

    unsafe fn add(&self, block: &RamBlock) -> Result<(), Refusal> {
        // SAFETY: the caller's promise.
        unsafe { self.domain.add(block) }
    }

    fn remove(&self, block: &RamBlock) -> Result<(), Refusal> {
        self.domain.remove(block)
    }
}

impl DmaDomain for Faulty {
    fn name(&self) -> &str {
        self.domain.name()
    }

    fn fd(&self) -> &StoredFd {
        self.domain.fd()
    }

    fn maps(&self) -> Vec<DmaMap> {
        self.domain.maps()
    }

    fn is_coherent(&self) -> bool {
        self.domain.is_coherent()
    }

    fn maps_device_memory(&self) -> bool {
        self.domain.maps_device_memory()
    }

    unsafe fn map_device_memory(&self, iova: u64, size: u64, vaddr: u64, source: MapSource) -> Result<(), DmaError> {
        // SAFETY: the caller's promise.
        unsafe { self.domain.map_device_memory(iova, size, vaddr, source) }
    }

    fn unmap(&self, iova: u64) -> Result<(), DmaError> {
        self.domain.unmap(iova)
    }

    fn blockers(&self) -> Vec<String> {
        self.domain.blockers()
    }

    fn invalidate(&self) -> Result<(), DmaError> {
        if !self.is_busy {
            return self.domain.invalidate();
        }
        Err(DmaError::Os {
            domain: self.describe(),
            what: "cannot invalidate (test)".into(),
            source: std::io::Error::from_raw_os_error(libc::EBUSY),
            hint: "",
        })
    }

    fn take_back(&self) {
        self.domain.take_back();
    }

    unsafe fn remap(&self, vaddr_of: &dyn Fn(&DmaMap) -> Option<u64>) -> Result<(), DmaError> {
        let Some(left) = &self.left else {
            // SAFETY: the caller's promise.
            return unsafe { self.domain.remap(vaddr_of) };
        };
        // One more than all is never reached again.
        let vaddr_of = |map: &DmaMap| (left.fetch_sub(1, Ordering::Relaxed) != 0).then(|| vaddr_of(map)).flatten();
        // SAFETY: as above, and no address is another one.
        unsafe { self.domain.remap(&vaddr_of) }
    }

    fn save(&self) -> DomainHandles {
        self.domain.save()
    }

    fn mend(&self, later: DomainHandles) -> bool {
        self.domain.mend(later)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use parking_lot::Mutex;
    use theseus_devices::vfio::{invalidate_all, remap_all};
    use theseus_resources::{FdKind, FdStore};

    use super::*;

    /// A domain with one mapping of RAM, as far as the steps of an update know it.
    struct Fake {
        fd: StoredFd,
        map: Mutex<DmaMap>,
        invalid: AtomicBool,
    }

    impl MemoryListener for Fake {
        fn describe(&self) -> String {
            "container 'fake'".into()
        }

        fn rank(&self) -> Rank {
            Rank::Dma
        }

        unsafe fn add(&self, _: &RamBlock) -> Result<(), Refusal> {
            unimplemented!()
        }

        fn remove(&self, _: &RamBlock) -> Result<(), Refusal> {
            unimplemented!()
        }
    }

    impl DmaDomain for Fake {
        fn name(&self) -> &str {
            "fake"
        }

        fn fd(&self) -> &StoredFd {
            &self.fd
        }

        fn maps(&self) -> Vec<DmaMap> {
            vec![self.map.lock().clone()]
        }

        fn is_coherent(&self) -> bool {
            unimplemented!()
        }

        fn maps_device_memory(&self) -> bool {
            false
        }

        unsafe fn map_device_memory(&self, _: u64, _: u64, _: u64, _: MapSource) -> Result<(), DmaError> {
            unimplemented!()
        }

        fn unmap(&self, _: u64) -> Result<(), DmaError> {
            unimplemented!()
        }

        fn blockers(&self) -> Vec<String> {
            Vec::new()
        }

        fn invalidate(&self) -> Result<(), DmaError> {
            self.invalid.store(true, Ordering::Relaxed);
            Ok(())
        }

        fn take_back(&self) {
            self.invalid.store(false, Ordering::Relaxed);
        }

        unsafe fn remap(&self, vaddr_of: &dyn Fn(&DmaMap) -> Option<u64>) -> Result<(), DmaError> {
            let mut map = self.map.lock();
            let DmaMap { iova, size, ref source, .. } = *map;
            let none = DmaError::NoMemory { domain: self.describe(), iova, size, source_of: source.clone() };
            map.vaddr = vaddr_of(&map).ok_or(none)?;
            Ok(())
        }

        fn save(&self) -> DomainHandles {
            unimplemented!()
        }

        fn mend(&self, _: DomainHandles) -> bool {
            unimplemented!()
        }
    }

    fn fake() -> Arc<Fake> {
        let file = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let map = DmaMap { iova: 0, size: 4096, vaddr: 1, flags: 0, source: MapSource::Ram };
        Arc::new(Fake {
            fd: FdStore::new().keep("fake", FdKind::VfioContainer, file),
            map: Mutex::new(map),
            invalid: AtomicBool::new(false),
        })
    }

    #[test]
    fn only_what_a_test_wants_refused_is() {
        let (a, b) = (fake(), fake());
        let over = |busy, refused| DmaFaults { busy, refused }.over(vec![a.clone(), b.clone()]);
        let invalid = || (a.invalid.load(Ordering::Relaxed), b.invalid.load(Ordering::Relaxed));
        let error = invalidate_all(&over(Some(1), None)).err().unwrap().to_string();
        assert!(error.contains("container 'fake': cannot invalidate (test): Device or resource busy"), "{error}");
        assert_eq!(invalid(), (false, false), "the first one has its addresses back");
        let invalidated = invalidate_all(&over(Some(2), Some(0))).unwrap();
        assert_eq!(invalid(), (true, true));
        drop(invalidated);
        assert_eq!(invalid(), (false, false));

        let block = RamBlock { gpa: 0, size: 4096, hva: 7, file: a.fd.clone(), offset: 0 };
        // SAFETY: nothing is mapped.
        let remap =
            |refused| unsafe { remap_all(&over(Some(0), refused), std::slice::from_ref(&block), |_, _, _, _| None) };
        let found = || (a.maps()[0].vaddr, b.maps()[0].vaddr);
        for (refused, after) in [(0, (1, 1)), (1, (7, 1))] {
            let error = remap(Some(refused)).unwrap_err().to_string();
            assert!(error.contains("container 'fake': no memory"), "{error}");
            assert_eq!(found(), after);
        }
        remap(None).unwrap();
        assert_eq!(found(), (7, 7));
    }
}
