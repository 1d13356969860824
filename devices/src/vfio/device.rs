//! A VFIO device fd: its regions, its MSI-X interrupt, its reset.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use theseus_resources::fd_store::{Claims, FdStoreError};
use theseus_resources::{FdKind, FdStore, StoredFd};
use vfio_bindings::bindings::vfio::*;

use super::ioctl;
use super::saved::{DeviceHandles, RegionHandles};
use crate::pci::bar::PAGE;
use crate::pci::regs::{COMMAND, DISABLE_INTX};

/// One region of the device file: a BAR or the configuration space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub index: u32,
    /// Bytes; 0: the device does not have it.
    pub size: u64,
    /// Where it starts in the device file.
    pub offset: u64,
    /// What may be mapped, as (offset in the region, size), in order.
    pub mappable: Vec<(u64, u64)>,
}

impl Region {
    fn save(&self) -> RegionHandles {
        let Self { index, size, offset, mappable } = self.clone();
        RegionHandles { index, size, offset, mappable }
    }

    fn restore(handles: RegionHandles) -> Self {
        let RegionHandles { index, size, offset, mappable } = handles;
        Self { index, size, offset, mappable }
    }
}

/// VFIO_DEVICE_SET_IRQS, apart so that what follows from it can be tested without a device.
pub(super) trait Irqs: Send + Sync {
    /// As [`ioctl::set_irqs`].
    fn set(&self, index: u32, eventfds: &[BorrowedFd<'_>]) -> io::Result<u32>;
}

impl Irqs for StoredFd {
    fn set(&self, index: u32, eventfds: &[BorrowedFd<'_>]) -> io::Result<u32> {
        ioctl::set_irqs(self.as_fd(), index, eventfds)
    }
}

/// See the module. Dropping it only closes the fd.
pub(super) struct VfioDevice {
    bdf: String,
    irqs: Box<dyn Irqs>,
    fd: StoredFd,
    /// Regions 0 to 5.
    bars: Vec<Region>,
    config: Region,
    /// MSI-X vectors, 0 without MSI-X.
    vectors: u32,
    /// VFIO has MSI-X on.
    signals: AtomicBool,
}

/// A request to the device that failed; the caller adds the device's name.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub(super) struct DeviceError {
    pub what: String,
    pub source: io::Error,
}

/// Two saved states of one guest that are not of one device.
#[derive(Debug, thiserror::Error)]
#[error("it was device {was} when it was made ready, and is another one now ({is}): start the update again")]
pub(super) struct OtherDevice {
    was: String,
    is: String,
}

fn os(what: &str) -> impl FnOnce(io::Error) -> DeviceError {
    move |source| DeviceError { what: what.to_owned(), source }
}

impl VfioDevice {
    /// Takes a new device fd, resets the device if it can be reset, and asks what it has.
    pub(super) fn new(fd_store: &FdStore, bdf: &str, fd: OwnedFd) -> Result<Self, DeviceError> {
        let fd = fd_store.keep(format!("device {bdf}"), FdKind::VfioDevice, fd);
        let info = ioctl::device_info(fd.as_fd()).map_err(os("VFIO_DEVICE_GET_INFO"))?;
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(os("not a PCI device")(io::ErrorKind::Unsupported.into()));
        }
        if info.flags & VFIO_DEVICE_FLAGS_RESET != 0 {
            // The kernel has reset it at open, too: a failure is no reason to refuse the device.
            if let Err(e) = ioctl::reset(fd.as_fd()) {
                log::warn!("device {bdf}: cannot be reset: {e}");
            }
        }
        let bars = (VFIO_PCI_BAR0_REGION_INDEX..=VFIO_PCI_BAR5_REGION_INDEX)
            .map(|index| region(fd.as_fd(), index))
            .collect::<Result<_, _>>()?;
        let config = region(fd.as_fd(), VFIO_PCI_CONFIG_REGION_INDEX)?;
        let irq =
            ioctl::irq_info(fd.as_fd(), VFIO_PCI_MSIX_IRQ_INDEX).map_err(os("VFIO_DEVICE_GET_IRQ_INFO of MSI-X"))?;
        let vectors = if irq.flags & VFIO_IRQ_INFO_EVENTFD != 0 { irq.count } else { 0 };
        let irqs = Box::new(fd.clone());
        Ok(Self { bdf: bdf.to_owned(), irqs, fd, bars, config, vectors, signals: AtomicBool::new(false) })
    }

    pub(super) fn bdf(&self) -> &str {
        &self.bdf
    }

    pub(super) fn fd(&self) -> &StoredFd {
        &self.fd
    }

    pub(super) fn bars(&self) -> &[Region] {
        &self.bars
    }

    pub(super) fn config(&self) -> &Region {
        &self.config
    }

    pub(super) fn vectors(&self) -> u32 {
        self.vectors
    }

    /// What the device does not answer reads as all ones, as on the bus.
    pub(super) fn read(&self, region: &Region, offset: u64, data: &mut [u8]) {
        let done = self.at(region, offset, data.len()).and_then(|at| Ok(rustix::io::pread(&self.fd, &mut *data, at)?));
        if !matches!(done, Ok(n) if n == data.len()) {
            log::debug!(
                "device {}: region {}: read of {} bytes at {offset:#x}: {done:?}",
                self.bdf,
                region.index,
                data.len()
            );
            data.fill(0xFF);
        }
    }

    /// What the device does not take is dropped, as on the bus.
    pub(super) fn write(&self, region: &Region, offset: u64, data: &[u8]) {
        let done = self.at(region, offset, data.len()).and_then(|at| Ok(rustix::io::pwrite(&self.fd, data, at)?));
        if !matches!(done, Ok(n) if n == data.len()) {
            log::debug!(
                "device {}: region {}: write of {} bytes at {offset:#x}: {done:?}",
                self.bdf,
                region.index,
                data.len()
            );
        }
    }

    fn at(&self, region: &Region, offset: u64, len: usize) -> io::Result<u64> {
        let inside = offset.checked_add(len as u64).is_some_and(|end| end <= region.size);
        let at = region.offset.checked_add(offset).filter(|_| inside);
        at.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Whether the device signals eventfds: it does not where VFIO has refused to.
    pub(super) fn signals(&self) -> bool {
        self.signals.load(Ordering::Relaxed)
    }

    /// Enables MSI-X with an eventfd for each vector; they stay the kernel's until [`VfioDevice::disable_msix`].
    pub(super) fn enable_msix(&self, eventfds: &[BorrowedFd<'_>]) -> Result<(), DeviceError> {
        let mut wanted = eventfds;
        let done = loop {
            let got = match self.irqs.set(VFIO_PCI_MSIX_IRQ_INDEX, wanted) {
                Ok(0) => break Ok(()),
                Ok(got) => got as usize,
                Err(error) => break Err(error),
            };
            // Nothing is enabled then (vfio_msi_enable). Go on with what the host has, as a driver there would; that
            // may have become less again.
            wanted = match wanted.get(..got) {
                Some(fewer) if got < wanted.len() => fewer,
                _ => break Err(io::ErrorKind::InvalidData.into()),
            };
        };
        if done.is_ok() && wanted.len() < eventfds.len() {
            let (got, all) = (wanted.len(), eventfds.len());
            log::warn!("device {}: the host has only {got} of {all} MSI-X vectors: the rest stay silent", self.bdf);
        }
        match done {
            Ok(()) => self.signals.store(true, Ordering::Relaxed),
            // A try that failed leaves INTx as the end of MSI-X does.
            Err(_) if !self.signals() => self.silence_intx(),
            Err(_) => {}
        }
        done.map_err(os("cannot enable MSI-X (VFIO_DEVICE_SET_IRQS)"))
    }

    pub(super) fn disable_msix(&self) -> Result<(), DeviceError> {
        let done = self.irqs.set(VFIO_PCI_MSIX_IRQ_INDEX, &[]);
        done.map_err(os("cannot disable MSI-X (VFIO_DEVICE_SET_IRQS)"))?;
        self.signals.store(false, Ordering::Relaxed);
        self.silence_intx();
        Ok(())
    }

    /// Sets DisINTx in the device. Nobody here handles its INTx, and a line that nobody handles the host's kernel
    /// switches off in the end, for all who share it.
    ///
    /// To be called whenever MSI-X has ended: that clears the physical bit (pci_intx_for_msi, which vfio_msi_disable
    /// does not undo). VFIO lets it follow its virtual one only when that changes (vfio_basic_config_write): so clear
    /// and set. A reset of the function keeps it (pci_dev_restore).
    pub(super) fn silence_intx(&self) {
        let at = u64::from(COMMAND) + 1;
        let mut high = [0];
        self.read(&self.config, at, &mut high);
        self.write(&self.config, at, &[high[0] & !DISABLE_INTX]);
        self.write(&self.config, at, &[high[0] | DISABLE_INTX]);
    }

    #[cfg(any(test, feature = "fakes"))]
    pub(super) fn with(
        bdf: &str,
        fd: StoredFd,
        irqs: Box<dyn Irqs>,
        bars: Vec<Region>,
        config: Region,
        vectors: u32,
    ) -> Self {
        Self { bdf: bdf.to_owned(), irqs, fd, bars, config, vectors, signals: AtomicBool::new(false) }
    }

    pub(super) fn save(&self) -> DeviceHandles {
        let Self { bdf, irqs: _, fd, bars, config, vectors, signals: _ } = self;
        DeviceHandles {
            bdf: bdf.clone(),
            fd: fd.slot(),
            bars: bars.iter().map(Region::save).collect(),
            config: config.save(),
            vectors: *vectors,
            signals: self.signals(),
        }
    }

    /// Takes later handles of the same device.
    pub(super) fn mend(&self, later: DeviceHandles) -> Result<(), OtherDevice> {
        let DeviceHandles { bdf, fd, bars, config, vectors, signals } = later;
        let is_same = bdf == self.bdf
            && fd == self.fd.slot()
            && bars.into_iter().map(Region::restore).eq(self.bars.iter().cloned())
            && Region::restore(config) == self.config
            && vectors == self.vectors;
        if !is_same {
            return Err(OtherDevice { was: self.bdf.clone(), is: bdf });
        }
        self.signals.store(signals, Ordering::Relaxed);
        Ok(())
    }

    /// Touches nothing in the kernel: the device is in use.
    pub(super) fn restore(handles: DeviceHandles, claims: &mut Claims) -> Result<Self, FdStoreError> {
        let DeviceHandles { bdf, fd, bars, config, vectors, signals } = handles;
        let fd = claims.claim(fd, FdKind::VfioDevice)?;
        let (bars, config) = (bars.into_iter().map(Region::restore).collect(), Region::restore(config));
        let signals = AtomicBool::new(signals);
        Ok(Self { bdf, irqs: Box::new(fd.clone()), fd, bars, config, vectors, signals })
    }
}

fn region(device: BorrowedFd<'_>, index: u32) -> Result<Region, DeviceError> {
    let (info, caps) = match ioctl::region_info(device, index) {
        Ok(answer) => answer,
        // A region the device does not have (vfio_pci_ioctl_get_region_info for an index it does not know).
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Default::default(),
        Err(e) => return Err(os(&format!("VFIO_DEVICE_GET_REGION_INFO of region {index}"))(e)),
    };
    let mappable = if info.flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
        Vec::new()
    } else if info.flags & VFIO_REGION_INFO_FLAG_CAPS != 0 {
        sparse_areas(&caps, info.cap_offset).unwrap_or_else(|| vec![(0, info.size)])
    } else {
        vec![(0, info.size)]
    };
    Ok(Region { index, size: info.size, offset: info.offset, mappable: whole_pages(mappable, info.size) })
}

/// The areas of the sparse-mmap capability, if the chain that starts at `at` has one.
fn sparse_areas(caps: &[u8], mut at: u32) -> Option<Vec<(u64, u64)>> {
    let u32_at = |at: usize| Some(u32::from_ne_bytes(caps.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_ne_bytes(caps.get(at..at.checked_add(8)?)?.try_into().ok()?));
    // The kernel's chain ends; 64 is more than there are kinds.
    for _ in 0..64 {
        let head = at as usize;
        let id = u32_at(head)? & 0xFFFF;
        if id == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = u32_at(head.checked_add(8)?)? as usize;
            let areas = (0..count).map(|n| {
                let area = head.checked_add(16)?.checked_add(n.checked_mul(16)?)?;
                Some((u64_at(area)?, u64_at(area.checked_add(8)?)?))
            });
            return areas.collect();
        }
        at = u32_at(head.checked_add(4)?)?;
        if at == 0 {
            break;
        }
    }
    None
}

/// Shrinks the areas to whole pages inside a region of `size` bytes, in order and not empty.
fn whole_pages(areas: Vec<(u64, u64)>, size: u64) -> Vec<(u64, u64)> {
    let mut pages: Vec<_> = areas
        .into_iter()
        .filter_map(|(start, len)| {
            let end = start.checked_add(len)?.min(size) / PAGE * PAGE;
            let start = start.checked_next_multiple_of(PAGE)?;
            (start < end).then(|| (start, end - start))
        })
        .collect();
    pages.sort_unstable();
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_capability_is_found_behind_another() {
        let mut caps = vec![0u8; 32];
        let mut cap = |id: u16, next: u32, rest: &[u8]| {
            caps.extend_from_slice(&id.to_ne_bytes());
            caps.extend_from_slice(&1u16.to_ne_bytes());
            caps.extend_from_slice(&next.to_ne_bytes());
            caps.extend_from_slice(rest);
        };
        cap(VFIO_REGION_INFO_CAP_MSIX_MAPPABLE as u16, 40, &[]);
        let mut areas = [1u32, 0].map(u32::to_ne_bytes).concat();
        areas.extend([0x1000u64, 0x2000].map(u64::to_ne_bytes).concat());
        cap(VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16, 0, &areas);
        assert_eq!(sparse_areas(&caps, 32), Some(vec![(0x1000, 0x2000)]));
        assert_eq!(sparse_areas(&caps[..60], 32), None, "cut off");
        assert_eq!(sparse_areas(&caps, 4000), None);
    }

    #[test]
    fn areas_are_whole_pages_inside_the_region() {
        assert_eq!(whole_pages(vec![(0, 0x20)], 0x20), [], "a BAR below a page cannot be mapped");
        assert_eq!(whole_pages(vec![(0x3000, 0x9000), (0x10, 0x1FF0)], 0x4800), [(0x1000, 0x1000), (0x3000, 0x1000)]);
        assert_eq!(whole_pages(vec![(u64::MAX, 2)], 0x1000), []);
    }
}
