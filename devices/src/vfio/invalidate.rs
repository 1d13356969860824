//! The step of an update that makes way for the next image's addresses, over all containers, with its undo.

use std::sync::Arc;

use super::container::{Container, ContainerError};

/// All addresses of these containers are invalid; DMA goes on. Dropping it, which happens only when the update failed,
/// maps the old addresses back.
#[must_use = "dropping it maps the old addresses back"]
pub struct Invalidated(Vec<Arc<Container>>);

/// The container that refused. All containers are as they were before.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct InvalidateError {
    pub container: String,
    pub reason: ContainerError,
}

/// Invalidates the addresses of every container, or of none.
pub fn invalidate_all(containers: &[Arc<Container>]) -> Result<Invalidated, InvalidateError> {
    let mut done = Invalidated(Vec::with_capacity(containers.len()));
    for container in containers {
        if let Err(reason) = container.invalidate() {
            // EINVAL: a range of it was invalid before. Put that right as well, or no later update could succeed.
            if matches!(&reason, ContainerError::Os { source, .. } if source.raw_os_error() == Some(libc::EINVAL)) {
                container.restore_vaddrs();
            }
            return Err(InvalidateError { container: container.name().to_owned(), reason });
        }
        done.0.push(container.clone());
    }
    Ok(done)
}

impl Drop for Invalidated {
    fn drop(&mut self) {
        for container in self.0.iter().rev() {
            container.restore_vaddrs();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io;

    use parking_lot::Mutex;
    use theseus_resources::{FdKind, FdStore};
    use vfio_bindings::bindings::vfio::{
        VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_VADDR, VFIO_UNMAP_ALL,
    };

    use super::super::container::{MapSource, Type1};
    use super::*;

    /// The rules of vfio_iommu_type1.c about addresses: iova -> (size, address if valid).
    #[derive(Default)]
    struct Kernel {
        maps: Mutex<BTreeMap<u64, (u64, Option<u64>)>>,
        mdev: bool,
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

    fn container(fd_store: &FdStore, name: &str, mdev: bool) -> (Arc<Container>, Arc<Kernel>) {
        let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let kernel = Arc::new(Kernel { mdev, ..Default::default() });
        let fd = fd_store.keep(name, FdKind::VfioContainer, fd);
        let container = Arc::new(Container::with(name, fd, Box::new(kernel.clone())));
        for iova in [0, 0x10_0000] {
            // SAFETY: this kernel maps nothing.
            unsafe { container.map(iova, 0x1000, iova + 0x7000_0000, MapSource::Ram) }.unwrap();
        }
        (container, kernel)
    }

    fn vaddrs(kernel: &Kernel) -> Vec<Option<u64>> {
        kernel.maps.lock().values().map(|(_, vaddr)| *vaddr).collect()
    }

    const OLD: [Option<u64>; 2] = [Some(0x7000_0000), Some(0x7010_0000)];

    #[test]
    fn drop_maps_all_back() {
        let fd_store = FdStore::new();
        let ((a, ka), (b, kb)) = (container(&fd_store, "a", false), container(&fd_store, "b", false));
        let guard = invalidate_all(&[a, b]).unwrap();
        assert_eq!((vaddrs(&ka), vaddrs(&kb)), (vec![None; 2], vec![None; 2]));
        drop(guard);
        assert_eq!((vaddrs(&ka), vaddrs(&kb)), (OLD.to_vec(), OLD.to_vec()));
    }

    #[test]
    fn a_second_container_that_refuses_leaves_both_whole() {
        let fd_store = FdStore::new();
        let ((a, ka), (b, kb)) = (container(&fd_store, "a", false), container(&fd_store, "b", false));
        Type1::unmap(&kb, VFIO_DMA_UNMAP_FLAG_VADDR, 0x10_0000, 0x1000).unwrap();
        let refused = invalidate_all(&[a.clone(), b.clone()]).err().unwrap();
        assert_eq!(refused.container, "b");
        assert_eq!((vaddrs(&ka), vaddrs(&kb)), (OLD.to_vec(), OLD.to_vec()));
        drop(invalidate_all(&[a, b]).expect("the next one works"));
    }

    #[test]
    fn a_mediated_device_is_named_and_left_alone() {
        let fd_store = FdStore::new();
        let ((a, ka), (b, kb)) = (container(&fd_store, "a", false), container(&fd_store, "b", true));
        assert!(a.probe().is_empty());
        assert_eq!(b.probe().len(), 1);
        let refused = invalidate_all(&[a, b]).err().unwrap();
        assert!(refused.to_string().contains("mediated device"), "{refused}");
        assert_eq!((vaddrs(&ka), vaddrs(&kb)), (OLD.to_vec(), OLD.to_vec()));
    }

    #[test]
    fn remap_covers_every_container_and_ranges_done_already() {
        let fd_store = FdStore::new();
        let (a, kernel) = container(&fd_store, "a", false);
        std::mem::forget(invalidate_all(std::slice::from_ref(&a)).unwrap());
        // SAFETY: this kernel maps nothing.
        unsafe { Type1::map(&kernel, VFIO_DMA_MAP_FLAG_VADDR, 0xBAD0_0000, 0, 0x1000) }.unwrap();
        // SAFETY: as above.
        unsafe { a.remap(|map| Some(map.iova + 0x5000_0000)) }.unwrap();
        assert_eq!(vaddrs(&kernel), [Some(0x5000_0000), Some(0x5010_0000)]);
        // SAFETY: as above.
        let missing = unsafe { a.remap(|map| (map.iova == 0).then_some(0x6000_0000)) };
        assert!(matches!(missing, Err(ContainerError::NoMemory { iova: 0x10_0000, .. })));
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
}
