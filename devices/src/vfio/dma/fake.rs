//! Containers over a kernel that keeps the rules of vfio_iommu_type1.c about addresses.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use theseus_resources::memory_listener::{MemoryListener, RamBlock};
use theseus_resources::{FdKind, FdStore};
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_VADDR, VFIO_UNMAP_ALL,
};

use super::type1::{Container, Type1};

/// The rules of vfio_iommu_type1.c about addresses: iova -> (size, address if valid).
#[derive(Default)]
pub(crate) struct Kernel {
    pub(super) maps: Mutex<BTreeMap<u64, (u64, Option<u64>)>>,
    mdev: bool,
    /// New mappings are refused while this is set.
    pub(in crate::vfio) refuses: AtomicBool,
}

fn error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl Type1 for Arc<Kernel> {
    fn has_extension(&self, extension: u32) -> io::Result<bool> {
        Ok(!self.mdev || extension == VFIO_UNMAP_ALL)
    }

    unsafe fn map(&self, flags: u32, vaddr: u64, iova: u64, size: u64) -> io::Result<()> {
        let mut maps = self.maps.lock();
        if flags & VFIO_DMA_MAP_FLAG_VADDR == 0 {
            if self.refuses.load(Ordering::Relaxed) {
                return Err(error(libc::ENOMEM));
            }
            if maps.contains_key(&iova) {
                return Err(error(libc::EEXIST));
            }
            maps.insert(iova, (size, Some(vaddr)));
            return Ok(());
        }
        assert_eq!(flags, VFIO_DMA_MAP_FLAG_VADDR, "no other flag may be set");
        match maps.get_mut(&iova) {
            None => Err(error(libc::ENOENT)),
            Some((old, None)) if *old == size => {
                maps.insert(iova, (size, Some(vaddr)));
                Ok(())
            }
            Some(_) => Err(error(libc::EINVAL)),
        }
    }

    fn unmap(&self, flags: u32, iova: u64, size: u64) -> io::Result<u64> {
        let mut maps = self.maps.lock();
        if flags & VFIO_DMA_UNMAP_FLAG_VADDR == 0 {
            return maps.remove(&iova).map(|(size, _)| size).ok_or(error(libc::ENOENT));
        }
        if self.mdev {
            return Err(error(libc::EBUSY));
        }
        let all = flags & VFIO_DMA_UNMAP_FLAG_ALL != 0;
        assert!(!all || (iova, size) == (0, 0));
        let hit = |start: &u64| all || *start == iova;
        if maps.iter().any(|(start, (_, vaddr))| hit(start) && vaddr.is_none()) {
            return Err(error(libc::EINVAL));
        }
        maps.iter_mut().filter(|(start, _)| hit(start)).for_each(|(_, map)| map.1 = None);
        Ok(0)
    }
}

pub(crate) fn block(fd_store: &FdStore, gpa: u64) -> RamBlock {
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = fd_store.keep("ram", FdKind::GuestMemory, fd);
    RamBlock { gpa, size: 0x1000, hva: gpa + 0x7000_0000, file, offset: 0 }
}

pub(crate) fn container(fd_store: &FdStore, name: &str, mdev: bool) -> (Arc<Container>, Arc<Kernel>) {
    let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let kernel = Arc::new(Kernel { mdev, ..Default::default() });
    let fd = fd_store.keep(name, FdKind::VfioContainer, fd);
    let container = Arc::new(Container::with(name, fd, Box::new(kernel.clone())));
    for gpa in [0, 0x10_0000] {
        // SAFETY: this kernel maps nothing.
        unsafe { container.add(&block(fd_store, gpa)) }.unwrap();
    }
    (container, kernel)
}
