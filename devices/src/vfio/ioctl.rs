//! The VFIO ioctls this VMM uses, raw: `linux/vfio.h`, one function each, errors as the kernel gives them.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use vfio_bindings::bindings::vfio::*;
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};
use vmm_sys_util::ioctl_io_nr;

const TYPE: u32 = VFIO_TYPE as u32;

ioctl_io_nr!(GET_API_VERSION, TYPE, VFIO_BASE);
ioctl_io_nr!(CHECK_EXTENSION, TYPE, VFIO_BASE + 1);
ioctl_io_nr!(SET_IOMMU, TYPE, VFIO_BASE + 2);
ioctl_io_nr!(GROUP_GET_STATUS, TYPE, VFIO_BASE + 3);
ioctl_io_nr!(GROUP_SET_CONTAINER, TYPE, VFIO_BASE + 4);
ioctl_io_nr!(GROUP_GET_DEVICE_FD, TYPE, VFIO_BASE + 6);
ioctl_io_nr!(DEVICE_GET_INFO, TYPE, VFIO_BASE + 7);
ioctl_io_nr!(DEVICE_GET_REGION_INFO, TYPE, VFIO_BASE + 8);
ioctl_io_nr!(DEVICE_GET_IRQ_INFO, TYPE, VFIO_BASE + 9);
ioctl_io_nr!(DEVICE_SET_IRQS, TYPE, VFIO_BASE + 10);
ioctl_io_nr!(DEVICE_RESET, TYPE, VFIO_BASE + 11);
ioctl_io_nr!(IOMMU_MAP_DMA, TYPE, VFIO_BASE + 13);
ioctl_io_nr!(IOMMU_UNMAP_DMA, TYPE, VFIO_BASE + 14);

/// `argsz` of a kernel structure.
const fn argsz<T>() -> u32 {
    size_of::<T>() as u32
}

fn check(ret: libc::c_int) -> io::Result<u32> {
    u32::try_from(ret).map_err(|_| io::Error::last_os_error())
}

pub(super) fn api_version(container: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: takes no argument.
    check(unsafe { ioctl(&container, GET_API_VERSION()) })
}

pub(super) fn has_extension(container: BorrowedFd<'_>, extension: u32) -> io::Result<bool> {
    // SAFETY: the argument is a plain number.
    check(unsafe { ioctl_with_val(&container, CHECK_EXTENSION(), extension.into()) }).map(|ret| ret > 0)
}

pub(super) fn set_iommu(container: BorrowedFd<'_>, iommu: u32) -> io::Result<()> {
    // SAFETY: the argument is a plain number.
    check(unsafe { ioctl_with_val(&container, SET_IOMMU(), iommu.into()) }).map(drop)
}

/// The flags of the group.
pub(super) fn group_status(group: BorrowedFd<'_>) -> io::Result<u32> {
    let mut status = vfio_group_status { argsz: argsz::<vfio_group_status>(), flags: 0 };
    // SAFETY: the structure is the one this ioctl writes, with its size in argsz.
    check(unsafe { ioctl_with_mut_ref(&group, GROUP_GET_STATUS(), &mut status) })?;
    Ok(status.flags)
}

pub(super) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let fd = container.as_raw_fd();
    // SAFETY: reads one int.
    check(unsafe { ioctl_with_ref(&group, GROUP_SET_CONTAINER(), &fd) }).map(drop)
}

/// Opens the device called `name` (its PCI address); the new fd is close-on-exec.
pub(super) fn device_fd(group: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    // SAFETY: reads a NUL-terminated string.
    let fd = unsafe { ioctl_with_ptr(&group, GROUP_GET_DEVICE_FD(), name.as_ptr()) };
    check(fd)?;
    // SAFETY: a new fd (not negative, just checked) that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(super) fn device_info(device: BorrowedFd<'_>) -> io::Result<vfio_device_info> {
    let mut info = vfio_device_info { argsz: argsz::<vfio_device_info>(), ..Default::default() };
    // SAFETY: the structure is the one this ioctl writes, with its size in argsz.
    check(unsafe { ioctl_with_mut_ref(&device, DEVICE_GET_INFO(), &mut info) })?;
    Ok(info)
}

/// The region's description and, behind it, its capability chain as raw bytes (`cap_offset` counts from the start).
pub(super) fn region_info(device: BorrowedFd<'_>, index: u32) -> io::Result<(vfio_region_info, Vec<u8>)> {
    let plain = vfio_region_info { argsz: argsz::<vfio_region_info>(), index, ..Default::default() };
    let mut info = plain;
    // SAFETY: the structure is the one this ioctl writes, with its size in argsz.
    check(unsafe { ioctl_with_mut_ref(&device, DEVICE_GET_REGION_INFO(), &mut info) })?;
    // argsz now says how much room the capabilities need. u64s: the structure's alignment.
    let mut buffer = vec![0u64; (info.argsz as usize).max(size_of::<vfio_region_info>()).div_ceil(8)];
    let head = buffer.as_mut_ptr().cast::<vfio_region_info>();
    // SAFETY: the buffer is aligned for the structure and at least as large.
    unsafe { head.write(vfio_region_info { argsz: info.argsz.max(plain.argsz), ..plain }) };
    // SAFETY: argsz is not more than the buffer holds.
    check(unsafe { ioctl_with_mut_ptr(&device, DEVICE_GET_REGION_INFO(), head) })?;
    // SAFETY: written above, by us and by the kernel.
    let info = unsafe { head.read() };
    Ok((info, buffer.iter().flat_map(|word| word.to_ne_bytes()).collect()))
}

pub(super) fn irq_info(device: BorrowedFd<'_>, index: u32) -> io::Result<vfio_irq_info> {
    let mut info = vfio_irq_info { argsz: argsz::<vfio_irq_info>(), index, ..Default::default() };
    // SAFETY: the structure is the one this ioctl writes, with its size in argsz.
    check(unsafe { ioctl_with_mut_ref(&device, DEVICE_GET_IRQ_INFO(), &mut info) })?;
    Ok(info)
}

/// Makes vectors `0..eventfds.len()` of interrupt `index` signal these eventfds; none disables the index.
/// `Ok(n)` with n > 0: nothing was enabled, the host has only n vectors to give.
pub(super) fn set_irqs(device: BorrowedFd<'_>, index: u32, eventfds: &[BorrowedFd<'_>]) -> io::Result<u32> {
    let data = if eventfds.is_empty() { VFIO_IRQ_SET_DATA_NONE } else { VFIO_IRQ_SET_DATA_EVENTFD };
    let too_many = |_| io::Error::from_raw_os_error(libc::E2BIG);
    let count = u32::try_from(eventfds.len()).map_err(too_many)?;
    let size = size_of::<vfio_irq_set>() + size_of_val(eventfds);
    let mut words = vec![u32::try_from(size).map_err(too_many)?, data | VFIO_IRQ_SET_ACTION_TRIGGER, index, 0, count];
    words.extend(eventfds.iter().map(|fd| fd.as_raw_fd() as u32));
    // SAFETY: the words are a vfio_irq_set (five u32) followed by `count` ints, `argsz` bytes in all.
    check(unsafe { ioctl_with_ptr(&device, DEVICE_SET_IRQS(), words.as_ptr()) })
}

pub(super) fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes no argument.
    check(unsafe { ioctl(&device, DEVICE_RESET()) }).map(drop)
}

/// # Safety
/// The device may write wherever `vaddr..vaddr + size` points: it must be guest memory or a BAR.
pub(super) unsafe fn map_dma(
    container: BorrowedFd<'_>,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
) -> io::Result<()> {
    let map = vfio_iommu_type1_dma_map { argsz: argsz::<vfio_iommu_type1_dma_map>(), flags, vaddr, iova, size };
    // SAFETY: the structure is the one this ioctl reads; what it maps is the caller's promise.
    check(unsafe { ioctl_with_ref(&container, IOMMU_MAP_DMA(), &map) }).map(drop)
}

/// Unmaps, or with the VADDR flag invalidates, what lies in the range. Returns how many bytes that were.
pub(super) fn unmap_dma(container: BorrowedFd<'_>, flags: u32, iova: u64, size: u64) -> io::Result<u64> {
    let argsz = argsz::<vfio_iommu_type1_dma_unmap>();
    let mut unmap = vfio_iommu_type1_dma_unmap { argsz, flags, iova, size, ..Default::default() };
    // SAFETY: the structure is the one this ioctl reads and writes. Taking addresses away from a device is always safe.
    check(unsafe { ioctl_with_mut_ref(&container, IOMMU_UNMAP_DMA(), &mut unmap) })?;
    Ok(unmap.size)
}
