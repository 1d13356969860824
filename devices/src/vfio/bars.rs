//! A BAR of a passed-through device: which parts of it the guest reaches directly (a memslot) and which are trapped
//! (the bus).
//!
//! Parts below a page, the pages of the MSI-X table and of the pending bits, I/O ports, and what VFIO does not let
//! anybody map are trapped; all the rest is mapped from the device fd once, at build, and put before the guest while
//! the BAR decodes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use theseus_resources::mapping::{self, Mapping};
use theseus_resources::rate::Rate;

use super::device::{DeviceError, Region, VfioDevice};
use super::dma::{DmaDomain, MapSource};
use super::saved::{BarHandles, BarState};
use super::signals;
use crate::bus::{BusDevice, SharedDevice};
use crate::pci::bar::{BarAddress, BarRegister, PAGE};
use crate::pci::config::PhysicalConfig;
use crate::pci::msix::Msix;
use crate::pci::msix_capability::{MsixInBar, MsixLayout};
use crate::pci::placed_bar::{AddressSpace, BarMemory, PlaceError, PlacedBar};
use crate::pci::regs::*;
use crate::rate_limited_log::RateLimitedLog;
use crate::turn::{Turn, TurnGuard};

/// A guest moves its BARs as often as it likes.
static STUCK: Rate = Rate::new(10, Duration::from_secs(60));

/// A mapping of a piece of a BAR in this process.
#[derive(Debug)]
struct Mapped(Mapping);

impl Mapped {
    fn new(device: &VfioDevice, region: &Region, offset: u64, size: u64) -> Result<Self, DeviceError> {
        let error =
            |source| DeviceError { what: format!("cannot map BAR {}: {offset:#x}+{size:#x}", region.index), source };
        let at = region.offset.checked_add(offset).ok_or_else(|| error(std::io::ErrorKind::InvalidInput.into()))?;
        let len = usize::try_from(size).map_err(|_| error(std::io::ErrorKind::InvalidInput.into()))?;
        let mapping = Mapping::new(device.fd(), at, len).map_err(|e| error(e.into()))?;
        mapped().insert(mapping.address(), len);
        Ok(Self(mapping))
    }
}

// SAFETY: mapped by `new` until it is dropped, whole pages of a device.
unsafe impl BarMemory for Mapped {
    fn hva(&self) -> u64 {
        self.0.address()
    }

    fn size(&self) -> u64 {
        self.0.len() as u64
    }
}

/// All of them in this process: address and size.
static MAPPED: Mutex<BTreeMap<u64, usize>> = Mutex::new(BTreeMap::new());

fn mapped() -> MutexGuard<'static, BTreeMap<u64, usize>> {
    MAPPED.lock()
}

/// At the end of the process: while a BAR is mapped its device stays in use, and the mapping ends only with all of the
/// memory.
///
/// # Safety
/// Nobody may use a device any more, or mind to be ended for it.
pub unsafe fn unmap_bars() {
    for (hva, size) in MAPPED.try_lock().iter().flat_map(|mapped| mapped.iter()) {
        // SAFETY: the caller's promise.
        unsafe { mapping::abandon(*hva, *size) };
    }
}

/// The memslots over it are removed before (see `Drop for PlacedBar`). The device does not notice.
impl Drop for Mapped {
    fn drop(&mut self) {
        mapped().remove(&self.0.address());
    }
}

/// See the module.
pub(super) struct Bar {
    placed: PlacedBar<Mapped>,
    region: u32,
    /// iovas of the peer-to-peer mappings in the domain, while it decodes.
    dma: Vec<u64>,
    /// Those that could not be taken away when the BAR was: tried again by [`Bar::settle`].
    leftover_dma: Vec<u64>,
}

/// What a BAR is built on.
pub(super) struct BarParts<'a> {
    pub device: &'a Arc<VfioDevice>,
    pub msix: &'a Arc<Turn<Msix>>,
    pub layout: &'a MsixLayout,
    pub space: &'a AddressSpace,
}

impl Bar {
    /// Maps what can be mapped. Nothing is before the guest yet.
    pub(super) fn new(register: BarRegister, region: &Region, parts: &BarParts<'_>) -> Result<Self, DeviceError> {
        let here = parts.layout.in_bar(register.index);
        let mappable = if register.is_io() { &[][..] } else { &region.mappable };
        let (direct, trapped) = split(register.size, mappable, &here.ranges());
        let direct =
            direct.into_iter().map(|(offset, size)| Ok((offset, Mapped::new(parts.device, region, offset, size)?)));
        let trapped = trapped.into_iter().map(|(start, size)| {
            let (device, region, msix) = (parts.device.clone(), region.clone(), parts.msix.clone());
            let trap = Trap { device, region, start, msix, here: here.clone() };
            (start, size, Arc::new(trap) as SharedDevice)
        });
        let direct = direct.collect::<Result<_, DeviceError>>()?;
        let placed = PlacedBar::new(register, direct, trapped.collect(), parts.space.clone());
        Ok(Self { placed, region: region.index, dma: Vec::new(), leftover_dma: Vec::new() })
    }

    pub(super) fn register(&self) -> &BarRegister {
        &self.placed.register
    }

    pub(super) fn address(&self) -> Option<u64> {
        self.placed.address()
    }

    /// None while it does not decode.
    pub(super) fn shown(&self) -> Option<BarAddress> {
        self.placed.shown()
    }

    pub(super) fn save(&self) -> (BarState, BarHandles) {
        // (Memslots end with their VM.)
        let Self { placed, region, dma, leftover_dma } = self;
        let state = BarState { register: placed.register.save(), address: placed.address() };
        (state, BarHandles { region: *region, dma: dma.clone(), leftover_dma: leftover_dma.clone() })
    }

    /// In a new image: brings one that is new, or was put somewhere by an earlier state, to where it was before the
    /// guest in the old image. Its peer-to-peer mappings are in the domain still. True if it had to be put elsewhere.
    pub(super) fn place_again(&mut self, address: Option<u64>, handles: BarHandles) -> Result<bool, PlaceError> {
        let BarHandles { region: _, dma, leftover_dma } = handles;
        let moves = self.address() != address;
        if moves {
            self.placed.take_away();
            self.placed.settle();
            if let Some(address) = address {
                self.placed.put(address)?;
            }
        }
        (self.dma, self.leftover_dma) = (dma, leftover_dma);
        Ok(moves)
    }

    /// Takes away what could not be taken away before. False if something is left still.
    pub(super) fn settle(&mut self, domain: &dyn DmaDomain) -> bool {
        self.leftover_dma.retain(|iova| domain.unmap(*iova).is_err());
        self.placed.settle() && self.leftover_dma.is_empty()
    }

    /// Where this process has `offset..offset + size` of the BAR mapped.
    pub(super) fn vaddr(&self, offset: u64, size: u64) -> Option<u64> {
        self.placed.vaddr(offset, size)
    }

    pub(super) fn region(&self) -> u32 {
        self.region
    }

    /// Puts the BAR before the guest at `address`. On failure nothing of it is.
    pub(super) fn map(&mut self, address: u64) -> Result<(), PlaceError> {
        self.placed.put(address)
    }

    /// Lets the other devices of the domain reach the BAR (peer-to-peer) where they do not yet. Not all domains can:
    /// then they do not. False if the host has refused something.
    pub(super) fn map_dma(&mut self, device: &str, domain: &dyn DmaDomain, complaints: &mut RateLimitedLog) -> bool {
        let Some(address) = self.address().filter(|_| domain.maps_device_memory()) else { return true };
        let mut is_whole = true;
        for (offset, mapping) in self.placed.direct() {
            let iova = address.saturating_add(*offset);
            if self.dma.contains(&iova) {
                continue;
            }
            let source = MapSource::Bar { device: device.to_owned(), region: self.region, offset: *offset };
            // SAFETY: the mapping lives until this Bar is dropped.
            match unsafe { domain.map_device_memory(iova, mapping.size(), mapping.hva(), source) } {
                Ok(()) => self.dma.push(iova),
                Err(e) => {
                    is_whole = false;
                    complaints.warn(|| format!("device '{device}': no peer-to-peer DMA to BAR {}: {e}", self.region));
                }
            }
        }
        is_whole
    }

    /// Takes the BAR away from the guest and from the other devices. False if something of it is left.
    pub(super) fn unmap(&mut self, domain: &dyn DmaDomain) -> bool {
        let is_gone = self.placed.take_away();
        for iova in std::mem::take(&mut self.dma) {
            if let Err(e) = domain.unmap(iova) {
                STUCK.warn(|| format!("BAR {}: {e}", self.region));
                self.leftover_dma.push(iova);
            }
        }
        is_gone && self.leftover_dma.is_empty()
    }
}

/// The BARs the device has, without an address yet.
pub(super) fn discover_bars(device: &VfioDevice) -> Vec<BarRegister> {
    let mut found = Vec::new();
    let mut upper_half = false;
    for (index, region) in (0u8..).zip(device.bars()) {
        if std::mem::take(&mut upper_half) || region.size == 0 {
            continue;
        }
        let mut data = [0; 4];
        PhysicalConfig::read(device, BAR0 + 4 * u16::from(index), &mut data);
        let low = u32::from_le_bytes(data);
        let flags = low & if low & BAR_IO != 0 { BAR_IO_FLAGS } else { BAR_MEMORY_FLAGS };
        let is_64bit = low & BAR_IO == 0 && low & BAR_MEMORY_TYPE == BAR_MEMORY_64 && index < 5;
        // Below 16 bytes the address bits would reach into the flags.
        let least = if low & BAR_IO != 0 { 4 } else { 16 };
        let Some(size) = region.size.max(least).checked_next_power_of_two() else { continue };
        upper_half = is_64bit;
        found.push(BarRegister { index, flags, size, address: 0, is_64bit });
    }
    found
}

type Pieces = Vec<(u64, u64)>;

/// Splits a BAR of `size` bytes into what is mapped and what is trapped, both as (offset, size). `mappable` are whole
/// pages in order; the pages of the `cuts` are trapped.
fn split(size: u64, mappable: &[(u64, u64)], cuts: &[Range<u64>]) -> (Pieces, Pieces) {
    let mut direct: Vec<Range<u64>> =
        mappable.iter().map(|(start, len)| *start..start.saturating_add(*len).min(size)).collect();
    for cut in cuts {
        let (from, to) = (cut.start / PAGE * PAGE, cut.end.next_multiple_of(PAGE));
        direct = direct.into_iter().flat_map(|r| [r.start..r.end.min(from), r.start.max(to)..r.end]).collect();
    }
    direct.retain(|range| !range.is_empty());
    let mut trapped = Vec::new();
    let mut at = 0;
    for range in &direct {
        trapped.push((at, range.start.saturating_sub(at)));
        at = at.max(range.end);
    }
    trapped.push((at, size.saturating_sub(at)));
    trapped.retain(|(_, len)| *len > 0);
    (direct.into_iter().map(|range| (range.start, range.end - range.start)).collect(), trapped)
}

/// Answers for a trapped part of a BAR.
struct Trap {
    device: Arc<VfioDevice>,
    region: Region,
    /// Where in the BAR the part starts.
    start: u64,
    msix: Arc<Turn<Msix>>,
    here: MsixInBar,
}

impl Trap {
    /// What the host has refused is tried again at each access.
    fn settled<'a>(&self, mut msix: TurnGuard<'a, Msix>) -> TurnGuard<'a, Msix> {
        let _ = signals::settle(&self.device, &mut msix);
        msix
    }
}

impl BusDevice for Trap {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let msix = self.settled(self.msix.lock());
        let device = |at, data: &mut [u8]| self.device.read(&self.region, at, data);
        self.here.read(&msix, self.start.saturating_add(offset), data, device);
    }

    fn write(&self, offset: u64, data: &[u8], is_wanted: &dyn Fn() -> bool) -> bool {
        let Some(msix) = self.msix.lock_unless(is_wanted) else { return false };
        let mut msix = self.settled(msix);
        let device = |at, data: &[u8]| self.device.write(&self.region, at, data);
        self.here.write(&mut msix, self.start.saturating_add(offset), data, device);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pages_of_table_and_pba_are_cut_out() {
        let cuts = [0x2000..0x2030, 0x3800..0x3808];
        let (direct, trapped) = split(0x8000, &[(0, 0x8000)], &cuts);
        assert_eq!(direct, [(0, 0x2000), (0x4000, 0x4000)]);
        assert_eq!(trapped, [(0x2000, 0x2000)]);
    }

    #[test]
    fn a_bar_of_only_the_table_or_below_a_page_is_all_trapped() {
        assert_eq!(split(0x1000, &[(0, 0x1000)], std::slice::from_ref(&(0..0x30))), (vec![], vec![(0, 0x1000)]));
        assert_eq!(split(0x20, &[], &[]), (vec![], vec![(0, 0x20)]));
    }

    #[test]
    fn sparse_areas_leave_holes() {
        let (direct, trapped) =
            split(0x8000, &[(0x1000, 0x1000), (0x4000, 0x2000)], std::slice::from_ref(&(0x5000..0x5010)));
        assert_eq!(direct, [(0x1000, 0x1000), (0x4000, 0x1000)]);
        assert_eq!(trapped, [(0, 0x1000), (0x2000, 0x2000), (0x5000, 0x3000)]);
    }
}
