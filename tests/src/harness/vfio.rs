//! Meddling with a VFIO container of the VMM from outside, to make the kernel refuse for real.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use anyhow::{Context, Result, bail};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_UNMAP_FLAG_VADDR, VFIO_TYPE, vfio_iommu_type1_dma_map,
    vfio_iommu_type1_dma_unmap,
};

use crate::harness::proc;

/// `_IO(VFIO_TYPE, VFIO_BASE + number)`
const fn request(number: u32) -> libc::Ioctl {
    (((VFIO_TYPE as u32) << 8) | (VFIO_BASE + number)) as libc::Ioctl
}

const MAP_DMA: libc::Ioctl = request(13);
const UNMAP_DMA: libc::Ioctl = request(14);

/// One range of one container of another process, invalidated until it is put right again.
pub struct InvalidRange {
    container: OwnedFd,
    iova: u64,
    size: u64,
    vaddr: u64,
}

impl InvalidRange {
    /// Invalidates the mapping of guest RAM at 0 in the `index`th container of `pid`, in the order of descriptors.
    pub fn new(pid: u32, index: usize) -> Result<Self> {
        let containers = proc::fds_to(pid, "/dev/vfio/vfio")?;
        let number =
            *containers.get(index).with_context(|| format!("process {pid} has containers {containers:?} only"))?;
        let container = steal(pid, number)?;
        let (from, to, _, _) = proc::maps(pid)?
            .into_iter()
            .find(|(_, _, offset, name)| *offset == 0 && name.starts_with("/memfd:guest-ram"))
            .context("the VMM does not map guest-ram")?;
        let range = Self { container, iova: 0, size: to - from, vaddr: from };
        let mut unmap = vfio_iommu_type1_dma_unmap {
            argsz: size_of::<vfio_iommu_type1_dma_unmap>() as u32,
            flags: VFIO_DMA_UNMAP_FLAG_VADDR,
            iova: range.iova,
            size: range.size,
            ..Default::default()
        };
        // SAFETY: a whole request of the size it says, without trailing data.
        let done = unsafe { libc::ioctl(range.container.as_raw_fd(), UNMAP_DMA, &mut unmap) };
        if done < 0 {
            let error = io::Error::last_os_error();
            bail!(
                "invalidating {:#x}+{:#x} from outside: {error}: is RAM mapped as one range?",
                range.iova,
                range.size
            );
        }
        Ok(range)
    }

    /// Whether the VMM, when it was refused, has made the range valid again: the kernel then refuses an address for it.
    pub fn is_valid_again(&self) -> bool {
        let map = vfio_iommu_type1_dma_map {
            argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
            flags: VFIO_DMA_MAP_FLAG_VADDR,
            vaddr: self.vaddr,
            iova: self.iova,
            size: self.size,
        };
        // SAFETY: a whole request of the size it says.
        let done = unsafe { libc::ioctl(self.container.as_raw_fd(), MAP_DMA, &map) };
        done < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
    }
}

/// A copy of descriptor `number` of process `pid`.
fn steal(pid: u32, number: i32) -> Result<OwnedFd> {
    let owned = |fd: libc::c_long| -> io::Result<OwnedFd> {
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    };
    // SAFETY: plain system calls with numbers only.
    let pidfd = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) }).context("pidfd_open")?;
    // SAFETY: likewise.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) }).context("pidfd_getfd")
}
