//! A VFIO container: one IOMMU domain, and the list of what is mapped in it.
//!
//! The list is what an update lives on: the kernel takes a new address only for exactly the iova and size it was given
//! (`vfio_dma_do_map` with `VFIO_DMA_MAP_FLAG_VADDR`), and tells nobody what those were.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use theseus_resources::fd_store::{Claims, FdStoreError};
use theseus_resources::survivor::look;
use theseus_resources::{FdKind, FdStore, Slot, StoredFd};
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_VADDR, VFIO_TYPE1v2_IOMMU, VFIO_UNMAP_ALL, VFIO_UPDATE_VADDR,
};

use super::ioctl;

/// What a DMA mapping points to: how the next image finds the same pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MapSource {
    /// Guest RAM: the iova is the guest physical address.
    Ram,
    /// A passed-through BAR (peer-to-peer), `offset` bytes into VFIO region `region` of `device`.
    Bar { device: String, region: u32, offset: u64 },
}

/// One mapping as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DmaMap {
    pub iova: u64,
    pub size: u64,
    /// In the image that mapped or remapped it last.
    pub vaddr: u64,
    /// `VFIO_DMA_MAP_FLAG_*`
    pub flags: u32,
    pub source: MapSource,
}

/// A piece of guest RAM as this process has it mapped. `gpa`, `size` and `hva` are bytes, multiples of the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    pub gpa: u64,
    pub size: u64,
    pub hva: u64,
}

impl RamRange {
    /// The address in this process of `gpa..gpa + size`, if all of it is in this range.
    pub fn hva_of(&self, gpa: u64, size: u64) -> Option<u64> {
        let offset = gpa.checked_sub(self.gpa)?;
        (offset.checked_add(size)? <= self.size).then(|| self.hva.checked_add(offset))?
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    #[error("cannot open /dev/vfio/vfio: {0} (is the module vfio loaded, and may this user open it?)")]
    Open(io::Error),
    #[error("container '{name}': the kernel speaks VFIO API {version}, not 0")]
    Api { name: String, version: u32 },
    #[error("container '{name}': {what}: {source}{}", hint(source))]
    Os { name: String, what: String, source: io::Error },
    #[error("container '{name}': no memory in this image for the DMA mapping {iova:#x}+{size:#x} ({source_of:?})")]
    NoMemory { name: String, iova: u64, size: u64, source_of: MapSource },
    #[error("container '{name}': its saved state is wrong: {source}")]
    FdStore { name: String, source: FdStoreError },
}

/// What an operator can do about the usual errors of the DMA ioctls.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            " (guest RAM is locked: raise RLIMIT_MEMLOCK above the guest's memory, `ulimit -l` or LimitMEMLOCK=, or give CAP_IPC_LOCK)"
        }
        Some(libc::EEXIST) => " (the range overlaps one that is already mapped)",
        Some(libc::ENOSPC) => " (too many DMA mappings: raise vfio_iommu_type1.dma_entry_limit)",
        Some(libc::EBUSY) => " (the container holds a mediated device)",
        _ => "",
    }
}

/// The type1 ioctls of a container, apart so that the logic around them can be tested without an IOMMU.
pub(super) trait Type1: Send + Sync {
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

/// See the module. Dropping it only closes the fd: a device that the next image has adopted goes on.
pub struct Container {
    name: String,
    fd: StoredFd,
    type1: Box<dyn Type1>,
    maps: Mutex<Vec<DmaMap>>,
}

/// A container in the saved state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerState {
    name: String,
    slot: Slot,
    maps: Vec<DmaMap>,
}

impl Container {
    /// Opens a new container; it is of use once a group is in it and [`Container::set_iommu`] was called.
    pub(super) fn open(fd_store: &FdStore, name: &str) -> Result<Self, ContainerError> {
        let file =
            std::fs::File::options().read(true).write(true).open("/dev/vfio/vfio").map_err(ContainerError::Open)?;
        let fd = fd_store.keep(format!("container {name}"), FdKind::VfioContainer, OwnedFd::from(file));
        let this = Self { name: name.to_owned(), type1: Box::new(fd.clone()), fd, maps: Mutex::default() };
        let version = ioctl::api_version(this.fd.as_fd()).map_err(|e| this.os("VFIO_GET_API_VERSION", e))?;
        if version != VFIO_API_VERSION {
            return Err(ContainerError::Api { name: name.to_owned(), version });
        }
        Ok(this)
    }

    /// Chooses type1 (v2); the kernel wants a group in the container before.
    pub(super) fn set_iommu(&self) -> Result<(), ContainerError> {
        ioctl::set_iommu(self.fd.as_fd(), VFIO_TYPE1v2_IOMMU)
            .map_err(|e| self.os("cannot use the type1 IOMMU (is vfio_iommu_type1 loaded?)", e))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn fd(&self) -> &StoredFd {
        &self.fd
    }

    /// What is mapped now.
    pub fn maps(&self) -> Vec<DmaMap> {
        look(&self.maps).clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<DmaMap>> {
        // The list is changed in single steps, so a panic elsewhere leaves it whole.
        self.maps.lock()
    }

    fn os(&self, what: impl Into<String>, source: io::Error) -> ContainerError {
        ContainerError::Os { name: self.name.clone(), what: what.into(), source }
    }

    /// Lets the devices of this container reach `size` bytes at `vaddr` under `iova`, to read and to write.
    ///
    /// # Safety
    /// `vaddr..vaddr + size` must be what `source` says, shared with the guest, and stay so until it is unmapped.
    pub unsafe fn map(&self, iova: u64, size: u64, vaddr: u64, source: MapSource) -> Result<(), ContainerError> {
        let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
        let mut maps = self.lock();
        // SAFETY: the caller's promise.
        unsafe { self.type1.map(flags, vaddr, iova, size) }
            .map_err(|e| self.os(format!("cannot map {iova:#x}+{size:#x} for DMA"), e))?;
        maps.push(DmaMap { iova, size, vaddr, flags, source });
        Ok(())
    }

    /// Takes the mapping that starts at `iova` away; none is no error.
    pub fn unmap(&self, iova: u64) -> Result<(), ContainerError> {
        let mut maps = self.lock();
        let Some(at) = maps.iter().position(|map| map.iova == iova) else { return Ok(()) };
        let size = maps[at].size;
        self.type1.unmap(0, iova, size).map_err(|e| self.os(format!("cannot unmap {iova:#x}+{size:#x}"), e))?;
        maps.remove(at);
        Ok(())
    }

    /// Why this container could not be carried through an update; empty if it could. Only answers truly once the IOMMU
    /// is set, which is always so after construction (`vfio_iommu_type1_check_extension`).
    pub fn probe(&self) -> Vec<String> {
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
                Ok(false) => reasons.push(format!("container '{}': the kernel cannot {what}", self.name)),
                Err(e) => {
                    reasons.push(format!("container '{}': cannot ask for VFIO extension {extension}: {e}", self.name))
                }
            }
        }
        reasons
    }

    /// Marks all addresses invalid: DMA that is mapped goes on, and the next image may name its own addresses.
    pub(super) fn invalidate(&self) -> Result<(), ContainerError> {
        let done = self.type1.unmap(VFIO_DMA_UNMAP_FLAG_VADDR | VFIO_DMA_UNMAP_FLAG_ALL, 0, 0);
        done.map(drop).map_err(|e| match e.raw_os_error() {
            Some(libc::EINVAL) => self.os("cannot invalidate its addresses: one of them is invalid already", e),
            _ => self.os("cannot invalidate its addresses", e),
        })
    }

    /// Gives every mapping a new address, in a new image. Mappings whose address is valid, from a remap that got half
    /// way, are invalidated first. Stops at the first failure; it may be called again.
    ///
    /// # Safety
    /// `vaddr_of` must answer with an address where this process has the very pages the mapping was made for.
    pub unsafe fn remap(&self, vaddr_of: impl Fn(&DmaMap) -> Option<u64>) -> Result<(), ContainerError> {
        for map in self.lock().iter_mut() {
            let DmaMap { iova, size, .. } = *map;
            let vaddr = vaddr_of(map).ok_or_else(|| ContainerError::NoMemory {
                name: self.name.clone(),
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

    /// Gives every mapping its address in this process back, after an update that did not happen. Goes on after a
    /// failure: what cannot be mapped keeps its DMA, and is logged.
    pub(super) fn restore_vaddrs(&self) {
        for map in self.lock().iter() {
            // SAFETY: the recorded address is the one it was mapped with in this process, and is still mapped.
            if let Err(e) = unsafe { self.set_vaddr(map, map.vaddr) } {
                let DmaMap { iova, size, .. } = map;
                log::error!("{}", self.os(format!("cannot map {iova:#x}+{size:#x} back after a refused update"), e));
            }
        }
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

    pub(super) fn save(&self) -> ContainerState {
        let Self { name, fd, type1: _, maps: _ } = self;
        ContainerState { name: name.clone(), slot: fd.slot(), maps: self.maps() }
    }

    /// Touches nothing in the kernel: the container is in use.
    pub(super) fn restore(state: ContainerState, claims: &mut Claims) -> Result<Self, ContainerError> {
        let ContainerState { name, slot, maps } = state;
        match claims.claim(slot, FdKind::VfioContainer) {
            Ok(fd) => Ok(Self { name, type1: Box::new(fd.clone()), fd, maps: Mutex::new(maps) }),
            Err(source) => Err(ContainerError::FdStore { name, source }),
        }
    }

    /// Takes a later state of the same container.
    pub(super) fn mend(&self, state: ContainerState) -> bool {
        let ContainerState { name, slot, maps } = state;
        let is_same = name == self.name && slot == self.fd.slot();
        if is_same {
            *self.lock() = maps;
        }
        is_same
    }

    #[cfg(test)]
    pub(super) fn with(name: &str, fd: StoredFd, type1: Box<dyn Type1>) -> Self {
        Self { name: name.to_owned(), fd, type1, maps: Mutex::default() }
    }
}
