//! A VFIO container with the type1 IOMMU: one IOMMU domain, and the list of what is mapped in it.
//!
//! The list is what an update lives on: the kernel takes a new address only for exactly the iova and size it was given
//! (`vfio_dma_do_map` with `VFIO_DMA_MAP_FLAG_VADDR`), and tells nobody what those were.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use parking_lot::{Mutex, MutexGuard};
use theseus_resources::fd_store::Claims;
use theseus_resources::memory_listener::{MemoryListener, RamBlock, Rank, Refusal};
use theseus_resources::survivor::look;
use theseus_resources::{FdKind, FdStore, StoredFd};
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_CC_IOMMU, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_VADDR, VFIO_TYPE1v2_IOMMU, VFIO_UNMAP_ALL, VFIO_UPDATE_VADDR,
};

use super::{DmaDomain, DmaError, DmaMap, MapSource};
use crate::vfio::ioctl;
use crate::vfio::saved::{ContainerHandles, DomainHandles};

/// What an operator can do about the usual errors of the DMA ioctls.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            " (guest RAM is locked: raise RLIMIT_MEMLOCK above the guest's memory, `ulimit -l` or LimitMEMLOCK=, or \
             give CAP_IPC_LOCK)"
        }
        Some(libc::EEXIST) => " (the range overlaps one that is already mapped)",
        Some(libc::ENOSPC) => " (too many DMA mappings: raise vfio_iommu_type1.dma_entry_limit)",
        Some(libc::EBUSY) => " (the container holds a mediated device)",
        _ => "",
    }
}

/// The type1 ioctls of a container, apart so that the logic around them can be tested without an IOMMU.
pub(in crate::vfio) trait Type1: Send + Sync {
    fn has_extension(&self, extension: u32) -> io::Result<bool>;
    /// # Safety
    /// As [`ioctl::map_dma`].
    unsafe fn map(&self, flags: u32, vaddr: u64, iova: u64, size: u64) -> io::Result<()>;
    fn unmap(&self, flags: u32, iova: u64, size: u64) -> io::Result<u64>;
}

impl Type1 for StoredFd {
    fn has_extension(&self, extension: u32) -> io::Result<bool> {
        ioctl::has_extension(self.as_fd(), extension)
    }

    unsafe fn map(&self, flags: u32, vaddr: u64, iova: u64, size: u64) -> io::Result<()> {
        // SAFETY: passed on to the caller.
        unsafe { ioctl::map_dma(self.as_fd(), flags, vaddr, iova, size) }
    }

    fn unmap(&self, flags: u32, iova: u64, size: u64) -> io::Result<u64> {
        ioctl::unmap_dma(self.as_fd(), flags, iova, size)
    }
}

/// See the module.
pub(crate) struct Container {
    name: String,
    fd: StoredFd,
    type1: Box<dyn Type1>,
    maps: Mutex<Vec<DmaMap>>,
}

impl Container {
    /// Opens a new container; it is of use once a group is in it and [`Container::set_iommu`] was called.
    pub(in crate::vfio) fn open(fd_store: &FdStore, name: &str) -> Result<Self, DmaError> {
        let file = std::fs::File::options().read(true).write(true).open("/dev/vfio/vfio").map_err(DmaError::Open)?;
        let fd = fd_store.keep(format!("container {name}"), FdKind::VfioContainer, OwnedFd::from(file));
        let this = Self { name: name.to_owned(), type1: Box::new(fd.clone()), fd, maps: Mutex::default() };
        let version = ioctl::api_version(this.fd.as_fd()).map_err(|e| this.os("VFIO_GET_API_VERSION", e))?;
        if version != VFIO_API_VERSION {
            return Err(DmaError::Api { name: name.to_owned(), version });
        }
        Ok(this)
    }

    /// Chooses type1 (v2); the kernel wants a group in the container before.
    pub(in crate::vfio) fn set_iommu(&self) -> Result<(), DmaError> {
        ioctl::set_iommu(self.fd.as_fd(), VFIO_TYPE1v2_IOMMU)
            .map_err(|e| self.os("cannot use the type1 IOMMU (is vfio_iommu_type1 loaded?)", e))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<DmaMap>> {
        // The list is changed in single steps, so a panic elsewhere leaves it whole.
        self.maps.lock()
    }

    fn os(&self, what: impl Into<String>, source: io::Error) -> DmaError {
        DmaError::Os { domain: self.describe(), what: what.into(), hint: hint(&source), source }
    }

    /// Lets the devices of this container reach `size` bytes at `vaddr` under `iova`, to read and to write.
    ///
    /// # Safety
    /// `vaddr..vaddr + size` must be what `source` says, shared with the guest, and stay so until it is unmapped.
    unsafe fn map(&self, iova: u64, size: u64, vaddr: u64, source: MapSource) -> Result<(), DmaError> {
        let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
        let mut maps = self.lock();
        // SAFETY: the caller's promise.
        unsafe { self.type1.map(flags, vaddr, iova, size) }
            .map_err(|e| self.os(format!("cannot map {iova:#x}+{size:#x} for DMA"), e))?;
        maps.push(DmaMap { iova, size, vaddr, flags, source });
        Ok(())
    }

    /// EINVAL means "is valid" as well as "is not what you say": so invalidate just this range and try once more.
    unsafe fn set_vaddr(&self, map: &DmaMap, vaddr: u64) -> io::Result<()> {
        let DmaMap { iova, size, .. } = *map;
        // SAFETY: the caller's promise.
        let set = || unsafe { self.type1.map(VFIO_DMA_MAP_FLAG_VADDR, vaddr, iova, size) };
        match set() {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                self.type1.unmap(VFIO_DMA_UNMAP_FLAG_VADDR, iova, size)?;
                set()
            }
            done => done,
        }
    }

    /// Touches nothing in the kernel: the container is in use.
    pub(in crate::vfio) fn restore(handles: ContainerHandles, claims: &mut Claims) -> Result<Self, DmaError> {
        let ContainerHandles { name, fd, maps } = handles;
        let maps = maps.into_iter().map(DmaMap::restore).collect();
        match claims.claim(fd, FdKind::VfioContainer) {
            Ok(fd) => Ok(Self { name, type1: Box::new(fd.clone()), fd, maps: Mutex::new(maps) }),
            Err(source) => Err(DmaError::FdStore { domain: described(&name), source }),
        }
    }

    #[cfg(any(test, feature = "fakes"))]
    pub(in crate::vfio) fn with(name: &str, fd: StoredFd, type1: Box<dyn Type1>) -> Self {
        Self { name: name.to_owned(), fd, type1, maps: Mutex::default() }
    }
}

fn described(name: &str) -> String {
    format!("container '{name}'")
}

impl MemoryListener for Container {
    fn describe(&self) -> String {
        described(&self.name)
    }

    fn rank(&self) -> Rank {
        Rank::Dma
    }

    unsafe fn add(&self, block: &RamBlock) -> Result<(), Refusal> {
        // SAFETY: the caller's promise.
        Ok(unsafe { self.map(block.gpa, block.size, block.hva, MapSource::Ram) }?)
    }

    fn remove(&self, block: &RamBlock) -> Result<(), Refusal> {
        Ok(self.unmap(block.gpa)?)
    }
}

impl DmaDomain for Container {
    fn name(&self) -> &str {
        &self.name
    }

    fn fd(&self) -> &StoredFd {
        &self.fd
    }

    fn maps(&self) -> Vec<DmaMap> {
        look(&self.maps).clone()
    }

    fn is_coherent(&self) -> bool {
        self.type1.has_extension(VFIO_DMA_CC_IOMMU).unwrap_or(false)
    }

    fn maps_device_memory(&self) -> bool {
        true
    }

    unsafe fn map_device_memory(&self, iova: u64, size: u64, vaddr: u64, source: MapSource) -> Result<(), DmaError> {
        // SAFETY: the caller's promise.
        unsafe { self.map(iova, size, vaddr, source) }
    }

    fn unmap(&self, iova: u64) -> Result<(), DmaError> {
        let mut maps = self.lock();
        let Some(at) = maps.iter().position(|map| map.iova == iova) else { return Ok(()) };
        let size = maps[at].size;
        self.type1.unmap(0, iova, size).map_err(|e| self.os(format!("cannot unmap {iova:#x}+{size:#x}"), e))?;
        maps.remove(at);
        Ok(())
    }

    /// Only answers truly once the IOMMU is set, which is always so after construction
    /// (`vfio_iommu_type1_check_extension`).
    fn blockers(&self) -> Vec<String> {
        let wanted = [
            (VFIO_UNMAP_ALL, "invalidate all mappings at once (Linux 5.12 or later can)"),
            (
                VFIO_UPDATE_VADDR,
                "update addresses: does it hold a mediated device, or is it iommufd's compatibility container?",
            ),
        ];
        let mut reasons = Vec::new();
        for (extension, what) in wanted {
            match self.type1.has_extension(extension) {
                Ok(true) => {}
                Ok(false) => reasons.push(format!("{}: the kernel cannot {what}", self.describe())),
                Err(e) => reasons.push(format!("{}: cannot ask for VFIO extension {extension}: {e}", self.describe())),
            }
        }
        reasons
    }

    fn invalidate(&self) -> Result<(), DmaError> {
        let done = self.type1.unmap(VFIO_DMA_UNMAP_FLAG_VADDR | VFIO_DMA_UNMAP_FLAG_ALL, 0, 0);
        done.map(drop).map_err(|e| match e.raw_os_error() {
            Some(libc::EINVAL) => {
                // Put that right as well, or no later update could succeed.
                self.take_back();
                self.os("cannot invalidate its addresses: one of them is invalid already", e)
            }
            _ => self.os("cannot invalidate its addresses", e),
        })
    }

    fn take_back(&self) {
        for map in self.lock().iter() {
            // SAFETY: the recorded address is the one it was mapped with in this process, and is still mapped.
            if let Err(e) = unsafe { self.set_vaddr(map, map.vaddr) } {
                let DmaMap { iova, size, .. } = map;
                log::error!("{}", self.os(format!("cannot map {iova:#x}+{size:#x} back after a refused update"), e));
            }
        }
    }

    /// Mappings whose address is valid, from a remap that got half way, are invalidated first.
    unsafe fn remap(&self, vaddr_of: &dyn Fn(&DmaMap) -> Option<u64>) -> Result<(), DmaError> {
        for map in self.lock().iter_mut() {
            let DmaMap { iova, size, .. } = *map;
            let vaddr = vaddr_of(map).ok_or_else(|| DmaError::NoMemory {
                domain: self.describe(),
                iova,
                size,
                source_of: map.source.clone(),
            })?;
            // SAFETY: the caller's promise.
            unsafe { self.set_vaddr(map, vaddr) }
                .map_err(|e| self.os(format!("cannot remap {iova:#x}+{size:#x}"), e))?;
            map.vaddr = vaddr;
        }
        Ok(())
    }

    fn save(&self) -> DomainHandles {
        let Self { name, fd, type1: _, maps } = self;
        let maps = look(maps).iter().map(DmaMap::save).collect();
        DomainHandles::Type1(ContainerHandles { name: name.clone(), fd: fd.slot(), maps })
    }

    fn mend(&self, later: DomainHandles) -> bool {
        let DomainHandles::Type1(ContainerHandles { name, fd, maps }) = later;
        let is_same = name == self.name && fd == self.fd.slot();
        if is_same {
            *self.lock() = maps.into_iter().map(DmaMap::restore).collect();
        }
        is_same
    }
}
