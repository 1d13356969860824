//! A passed-through PCI device as the guest sees it.
//!
//! ```text
//! config space  --ConfigFilter-->  VFIO config region
//! BAR pages     --memslot------->  mmap of the VFIO region        (while COMMAND decodes, at the BAR's address)
//! MSI-X table   --trap---------->  Msix: eventfd -> irqfd -> guest
//! ```
//!
//! The device must have MSI-X: INTx and MSI are not supported yet, and hidden.
//!
//! In an update the device is in use when its object is built again: [`Migratable::restore`] makes no request to VFIO
//! but mmap, and dropping the object makes none at all. What ends a device for good is [`VfioPci::release`].

use std::ops::Range;
use std::sync::Arc;

use theseus_resources::alloc::Windows;
use theseus_resources::fd_store::Claims;
use theseus_resources::state::Format;

use super::bars::{Bar, BarParts, discover_bars};
use super::config::{ConfigError, ConfigFilter};
use super::device::{DeviceError, VfioDevice};
use super::group::Group;
use super::saved::{BarHandles, BarState, VfioPciHandles, VfioPciState};
use super::signals;
use super::wiring::{PassthroughError, Wiring};
use crate::migratable::{Migratable, MigrateError, Saved};
use crate::pci::PciDevice;
use crate::pci::bar::{BarAddress, BarRegister};
use crate::pci::config::PhysicalConfig;
use crate::pci::decoding::Decoding;
use crate::pci::msix::Msix;
use crate::pci::msix_capability::MsixLayout;
use crate::pci::placement::{Decoded, place, reserve, vacate};
use crate::pci::regs::*;
use crate::rate_limited_log::RateLimitedLog;
use crate::turn::{Turn, TurnGuard};

/// See the module.
pub struct VfioPci {
    id: String,
    group: Arc<Group>,
    device: Arc<VfioDevice>,
    filter: ConfigFilter,
    layout: MsixLayout,
    msix: Arc<Turn<Msix>>,
    bars: Vec<Bar>,
    /// Says which BARs are before the guest.
    decoding: Decoding,
    /// Memslots or mappings of BARs that were refused: tried again by [`VfioPci::settle`].
    dirty: bool,
    complaints: RateLimitedLog,
}

/// What the restore of a [`VfioPci`] needs.
pub struct VfioPciParts<'a> {
    /// On the fds of the device and of its vectors.
    pub claims: &'a mut Claims,
    /// The groups of the VM, by number.
    pub groups: &'a dyn Fn(u32) -> Option<Arc<Group>>,
    /// In which its BARs' addresses are taken again.
    pub windows: &'a mut Windows,
    /// In the new image.
    pub wiring: Wiring,
}

impl PhysicalConfig for VfioDevice {
    fn read(&self, offset: u16, data: &mut [u8]) {
        VfioDevice::read(self, self.config(), offset.into(), data);
    }

    fn write(&self, offset: u16, data: &[u8]) {
        VfioDevice::write(self, self.config(), offset.into(), data);
    }
}

impl VfioPci {
    /// Gives the device's BARs addresses in `windows`. It comes up as after a reset: nothing decodes, MSI-X is off.
    pub(super) fn new(
        id: &str,
        device: VfioDevice,
        group: Arc<Group>,
        wiring: Wiring,
        windows: &mut Windows,
    ) -> Result<Self, PassthroughError> {
        let (mut filter, layout) = ConfigFilter::new(&device)?;
        if device.vectors() == 0 {
            return Err(ConfigError::NoMsix.into());
        }
        let mut registers = discover_bars(&device);
        let fits =
            |bar: u8, range: Range<u64>| registers.iter().any(|r| r.index == bar && !r.is_io() && range.end <= r.size);
        let (table, pba) = layout.ranges();
        if !fits(layout.table_bar, table) || !fits(layout.pba_bar, pba) {
            return Err(ConfigError::BadMsix(layout).into());
        }
        // The BARs below are put before the guest when it asks for it, and not where the host has them.
        PhysicalConfig::write(&device, COMMAND, &[0, 0]);
        // VFIO clears it at open (vfio_pci_core_enable).
        device.silence_intx();

        place(windows, &mut registers)?;
        filter.set_bars(&registers);
        let device = Arc::new(device);
        let msix = Msix::new(id, layout.vectors, wiring.interrupts.clone(), wiring.fd_store.clone());
        let msix = Arc::new(Turn::new(msix));
        let parts = BarParts { device: &device, msix: &msix, layout: &layout, space: &wiring.space };
        let regions =
            registers.iter().filter_map(|register| Some((*register, device.bars().get(usize::from(register.index))?)));
        let bars: Result<Vec<_>, _> = regions.map(|(register, region)| Bar::new(register, region, &parts)).collect();
        let bars = bars.inspect_err(|_| vacate(windows, &registers))?;
        let decoding = Decoding::new(Decoded::new(windows));
        Ok(Self {
            id: id.to_owned(),
            group,
            device,
            filter,
            layout,
            msix,
            bars,
            decoding,
            dirty: false,
            complaints: RateLimitedLog::default(),
        })
    }

    /// Its name in this VM: no two devices have one.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The device's PCI address on the host.
    pub fn host_bdf(&self) -> &str {
        self.device.bdf()
    }

    /// Its BARs that decode now.
    pub fn bars(&self) -> impl Iterator<Item = BarAddress> + '_ {
        self.bars.iter().filter_map(Bar::shown)
    }

    /// The one that it was opened from. Held here, it stays open.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    fn msix(&self) -> TurnGuard<'_, Msix> {
        self.msix.lock()
    }

    /// What accesses to its MSI-X table and the pages around it wait for, beside the device itself: never for long, as
    /// nobody has it while the function is being reset.
    pub fn msix_turn(&self) -> Arc<Turn<Msix>> {
        self.msix.clone()
    }

    /// Where this process has a part of a BAR mapped, for [`super::remap_all`]. None: not all of it is mapped.
    pub fn bar_vaddr(&self, region: u32, offset: u64, size: u64) -> Option<u64> {
        self.bars.iter().find(|bar| bar.region() == region)?.vaddr(offset, size)
    }

    /// The orderly end of a device that no other image has taken over: interrupts off, bus mastering off, unmapped, its
    /// addresses given back.
    pub fn release(&mut self, windows: &mut Windows) {
        if self.device.signals()
            && let Err(e) = self.device.disable_msix()
        {
            log::warn!("device '{}': {e}", self.id);
        }
        self.msix().release();
        for bar in &mut self.bars {
            bar.unmap(&**self.group.domain());
            vacate(windows, &[*bar.register()]);
        }
        PhysicalConfig::write(&*self.device, COMMAND, &[0, DISABLE_INTX]);
        self.decoding.command = 0;
    }

    /// Where a BAR is to be now, if anywhere.
    fn wanted(&self, bar: &Bar) -> Option<u64> {
        self.decoding.address(bar.register(), self.filter.bar_address(bar.register()))
    }

    fn unmap_stale(&mut self) {
        for n in 0..self.bars.len() {
            if self.bars[n].address() != self.wanted(&self.bars[n]) {
                self.dirty |= !self.bars[n].unmap(&**self.group.domain());
            }
        }
    }

    fn map_missing(&mut self) {
        for n in 0..self.bars.len() {
            let wanted = self.wanted(&self.bars[n]);
            let bar = &mut self.bars[n];
            if let Some(address) = wanted.filter(|_| bar.address().is_none())
                && let Err(e) = bar.map(address)
            {
                self.dirty = true;
                self.complaints.warn(|| format!("device '{}': BAR {n} at {address:#x}: {e}", self.id));
            }
            self.dirty |= !bar.map_dma(&self.id, &**self.group.domain(), &mut self.complaints);
        }
    }

    /// Tries again what the host has refused: at each access to the device, before a save, and when the guest goes on.
    /// In a new image only once the guest is its own, as it asks things of VFIO.
    pub fn settle(&mut self) {
        let msix = self.msix.clone();
        let mut msix = msix.lock();
        if let Err(e) = signals::settle(&self.device, &mut msix) {
            self.complaints.warn(|| format!("device '{}': {e}", self.id));
        }
        drop(msix);
        if std::mem::take(&mut self.dirty) {
            for bar in &mut self.bars {
                self.dirty |= !bar.settle(&**self.group.domain());
            }
            self.map_missing();
        }
    }

    fn set_msix_control(&mut self, control: u16) {
        let done = signals::set_control(&self.device, &mut self.msix(), control);
        if let Err(e) = done {
            self.complaints.warn(|| format!("device '{}': {e}", self.id));
        }
    }
}

impl PciDevice for VfioPci {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.settle();
        if u64::from(offset).saturating_add(data.len() as u64) > self.device.config().size {
            data.fill(0xFF);
            return;
        }
        self.filter.read(&*self.device, offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        if u64::from(offset).saturating_add(data.len() as u64) > self.device.config().size {
            return;
        }
        self.settle();
        let control = self.filter.msix_control();
        let physical = self.filter.write(&*self.device, offset, data);
        let power = self.filter.power_register();
        let power_changes = self.decoding.write(power, offset, data);
        // Off before the device stops decoding, on after it has started: a guest access in between would find the
        // mapping there and nothing behind it, and KVM_RUN would fail.
        self.unmap_stale();
        if let Some(physical) = physical {
            PhysicalConfig::write(&*self.device, offset, &physical);
        }
        if let Some(at) = power.filter(|_| power_changes) {
            // A device need not take every state.
            let mut control = [0];
            PhysicalConfig::read(&*self.device, at, &mut control);
            self.decoding.set_power(control[0]);
        }
        self.map_missing();
        if self.filter.msix_control() != control {
            self.set_msix_control(self.filter.msix_control());
        }
    }
}

impl Migratable for VfioPci {
    const FORMAT: Format = Format::new("vfio-pci", 1);
    type State = VfioPciState;
    type Handles = VfioPciHandles;
    type Parts<'a> = VfioPciParts<'a>;

    fn save(&self) -> Result<Saved<Self>, MigrateError> {
        let Self { id, group, device, filter, layout, msix: _, bars, decoding, dirty: _, complaints: _ } = self;
        let (bars, bar_handles) = bars.iter().map(Bar::save).unzip();
        let (msix, vectors) = self.msix.look().map_err(|held| MigrateError::State(held.to_string()))?.save();
        let state = VfioPciState {
            id: id.clone(),
            config: filter.save(),
            layout: layout.save(),
            msix,
            bars,
            decoding: decoding.save(),
        };
        let (group, device) = (group.number(), device.save());
        Ok(Saved { state, handles: VfioPciHandles { group, device, msix: vectors, bars: bar_handles } })
    }

    fn upgrade(_: u16, state: Self::State) -> Result<Self::State, MigrateError> {
        Ok(state)
    }

    /// Comes up with its irqfds detached: [`Msix::resume_irqfds`] is a later step.
    fn restore(saved: Saved<Self>, parts: VfioPciParts<'_>) -> Result<Self, MigrateError> {
        let Saved { state, handles } = saved;
        let VfioPciState { id, config, layout, msix, bars, decoding } = state;
        let VfioPciHandles { group, device, msix: vectors, bars: bar_handles } = handles;
        let VfioPciParts { claims, groups, windows, wiring } = parts;
        let wrong = |what: String| MigrateError::State(what);
        let group = groups(group).ok_or_else(|| wrong(format!("group {group} is not in the saved state")))?;
        let filter = ConfigFilter::restore(config)?;
        let device = Arc::new(VfioDevice::restore(device, claims)?);
        let msix = Msix::restore(&id, (msix, vectors), wiring.interrupts.clone(), wiring.fd_store.clone(), claims);
        let msix = Arc::new(Turn::new(msix.map_err(|e| wrong(e.to_string()))?));
        let layout = MsixLayout::restore(layout);
        let mut this = Self {
            id,
            group,
            device: device.clone(),
            filter,
            layout,
            msix: msix.clone(),
            bars: Vec::new(),
            decoding: Decoding::restore(decoding),
            dirty: true,
            complaints: RateLimitedLog::default(),
        };
        let parts = BarParts { device: &device, msix: &msix, layout: &layout, space: &wiring.space };
        for (BarState { register, address }, handles) in pairs(bars, bar_handles)? {
            let register = BarRegister::restore(register);
            let index = handles.region;
            reserve(windows, &register).map_err(|e| wrong(format!("BAR {index}: {e}")))?;
            let region = device.bars().iter().find(|region| region.index == index);
            let region = region.ok_or_else(|| wrong(format!("BAR {index} has no region")))?;
            let mut bar = Bar::new(register, region, &parts)
                .map_err(|DeviceError { what, source }| MigrateError::Os { what, source })?;
            bar.place_again(address, handles).map_err(|e| wrong(format!("BAR {index}: {e}")))?;
            this.bars.push(bar);
        }
        Ok(this)
    }
}

impl VfioPci {
    /// Brings a device that was restored from an earlier state of its guest to a later one, before anything of it is in
    /// use. Returns which BARs had to be put elsewhere: that takes time.
    ///
    /// # Errors
    /// The state is of another device, makes no sense, or a BAR cannot be put where it says. The device may be in part
    /// as it says: it is of no use then.
    pub fn mend(&mut self, later: Saved<Self>, claims: &mut Claims) -> Result<Vec<u8>, MigrateError> {
        let Saved { state, handles } = later;
        let VfioPciState { id, config, layout, msix, bars, decoding } = state;
        let VfioPciHandles { group, device, msix: vectors, bars: bar_handles } = handles;
        let wrong = |what: String| MigrateError::State(what);
        let decoding = Decoding::restore(decoding);
        let is_same = id == self.id
            && group == self.group.number()
            && MsixLayout::restore(layout) == self.layout
            && decoding.windows == self.decoding.windows;
        if !is_same || bars.len() != self.bars.len() {
            return Err(wrong("it is another device than the one that was made ready".into()));
        }
        let filter = ConfigFilter::restore(config)?;
        self.device.mend(device).map_err(|e| wrong(e.to_string()))?;
        self.filter = filter;
        self.msix().mend(msix, vectors, claims).map_err(|e| wrong(e.to_string()))?;
        self.decoding = decoding;
        let mut moved = Vec::new();
        for (bar, (BarState { register, address }, handles)) in self.bars.iter_mut().zip(pairs(bars, bar_handles)?) {
            let region = handles.region;
            if BarRegister::restore(register) != *bar.register() || region != bar.region() {
                return Err(wrong(format!("BAR {region} is another one than the one that was made ready")));
            }
            if bar.place_again(address, handles).map_err(|e| wrong(format!("BAR {region}: {e}")))? {
                moved.push(bar.register().index);
            }
        }
        Ok(moved)
    }
}

/// Each BAR with its handles.
fn pairs(
    states: Vec<BarState>,
    handles: Vec<BarHandles>,
) -> Result<impl Iterator<Item = (BarState, BarHandles)>, MigrateError> {
    if states.len() == handles.len() {
        return Ok(states.into_iter().zip(handles));
    }
    Err(MigrateError::State(format!("{} BARs, and handles of {}", states.len(), handles.len())))
}

#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
