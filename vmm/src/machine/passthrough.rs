//! The passed-through devices of a machine: their place on the PCI bus, and the update's steps over all of them.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use theseus_api::types::{DeviceNode, PciBarType, Resource};
use theseus_devices::device::Buses;
use theseus_devices::migratable::{self, Handles, Migratable, Saved, SavedDevice, SavedSection};
use theseus_devices::pci::bar::{BarAddress, BarKind};
use theseus_devices::pci::msix::Msix;
use theseus_devices::pci::placed_bar::AddressSpace;
use theseus_devices::turn::{Turn, TurnGuard};
use theseus_devices::vfio::saved::PassthroughHandles;
use theseus_devices::vfio::{self, DmaDomain, Invalidated, Passthrough, VfioPci, VfioPciParts, Wiring};
use theseus_hypervisor::{BareVm, Vm};
use theseus_resources::alloc::Windows;
use theseus_resources::state::Format;
use theseus_resources::survivor;
use theseus_resources::{Claims, FdStore, MemoryListeners, RamBlock, StateReader, StateWriter};

use super::draft::Draft;
use super::glue::{VmInterrupts, VmMemslots};
use super::spec::PassthroughSpec;
use super::{Host, MachineError};
use crate::seams::Seams;

/// How long vm.info waits for a device: longer than a reset of a function takes (pcie_flr).
const A_MOMENT: Duration = Duration::from_millis(500);

/// How long an update waits for a device before it stops the guest.
const BEFORE_PAUSE: Duration = Duration::from_secs(5);

struct Plugged {
    /// On PCI bus 0.
    slot: u8,
    /// As the device has them, which a vCPU may be in a long access to.
    id: String,
    host_bdf: String,
    device: Arc<Turn<VfioPci>>,
    msix: Arc<Turn<Msix>>,
}

impl Plugged {
    fn new(slot: u8, device: Arc<Turn<VfioPci>>) -> Self {
        let (id, host_bdf, msix) = {
            let device = device.lock();
            (device.id().to_owned(), device.host_bdf().to_owned(), device.msix_turn())
        };
        Self { slot, id, host_bdf, device, msix }
    }

    fn save(&self) -> Result<Saved<VfioPci>, MachineError> {
        let device = self.device.look().map_err(|held| MachineError::Held { device: self.id.clone(), held })?;
        device.save().map_err(|source| MachineError::Device { name: section(&self.id), source })
    }

    fn encode(&self, saved: &Saved<VfioPci>) -> Result<Vec<SavedSection>, MachineError> {
        let SavedDevice { state, handles } = SavedDevice::written(saved, &section(&self.id))?;
        Ok([Some(state), handles].into_iter().flatten().collect())
    }

    /// Before all vCPUs, and however long it takes: without its interrupts the guest is lost.
    fn own_msix(&self) -> TurnGuard<'_, Msix> {
        loop {
            match self.msix.lock_first(A_MOMENT) {
                Ok(msix) => return msix,
                Err(held) => log::warn!("device '{}': its MSI-X: {held}", self.id),
            }
        }
    }
}

pub(super) struct PassthroughDevices {
    /// Before `registry`: devices hold their groups.
    plugged: Vec<Plugged>,
    registry: Passthrough,
    window64: Range<u64>,
    windows: Mutex<Windows>,
    /// None until a first update.
    drafts: Mutex<Option<Drafts>>,
    seams: Arc<dyn Seams>,
}

/// As all of it was right before a pause.
struct Drafts {
    registry: Draft<PassthroughHandles>,
    /// In the order of those that are plugged.
    devices: Vec<Draft<Saved<VfioPci>>>,
}

/// What the other sections of passed-through devices hang on.
#[derive(Serialize, Deserialize)]
pub(super) struct Layout {
    window64: (u64, u64),
    /// (PCI slot, id), one for each section `vfio-pci/ID`.
    devices: Vec<(u8, String)>,
}

pub(super) const LAYOUT: Format = Format::new("vfio-layout", 1);

/// The name of containers and groups.
const REGISTRY: &str = "vfio";

/// In a state that follows another one of the same guest.
pub(crate) enum PassthroughChange {
    /// It is the same.
    None,
    To(PassthroughState),
}

/// Decoded; nothing is claimed yet.
pub(crate) struct PassthroughState {
    layout: Layout,
    registry: PassthroughHandles,
    devices: Vec<Saved<VfioPci>>,
}

fn wiring(vm: &Arc<Vm>, buses: &Buses, fd_store: &FdStore) -> Wiring {
    Wiring {
        fd_store: fd_store.clone(),
        interrupts: Arc::new(VmInterrupts(vm.clone())),
        space: AddressSpace {
            memslots: Arc::new(VmMemslots(vm.clone())),
            mmio: buses.mmio.clone(),
            pio: buses.pio.clone(),
        },
    }
}

impl PassthroughDevices {
    /// At the guest's boot.
    pub(super) fn build(
        specs: &[PassthroughSpec],
        window64: Range<u64>,
        vm: &Arc<Vm>,
        buses: &Buses,
        memory: &Arc<MemoryListeners>,
        host: &Host,
    ) -> Result<Self, MachineError> {
        let (fd_store, seams) = (&host.fd_store, host.seams.clone());
        let registry = Passthrough::new(fd_store.clone(), memory.clone());
        let mut windows = Windows::with_window64(window64.clone());
        let mut plugged: Vec<Plugged> = Vec::new();
        for PassthroughSpec { path, id, container } in specs {
            let config = vfio::DeviceConfig { path: path.clone(), id: id.clone(), container: container.clone() };
            let device = registry.attach(&config, wiring(vm, buses, fd_store), &mut windows)?;
            let slot = buses.pci.add(None, device.clone())?;
            plugged.push(Plugged::new(slot, device));
        }
        let (windows, drafts) = (Mutex::new(windows), Mutex::default());
        let this = Self { plugged, registry, window64, windows, drafts, seams };
        this.tell_kvm(vm)?;
        Ok(this)
    }

    /// KVM learns of the groups; only after their devices were opened.
    fn tell_kvm(&self, vm: &Vm) -> Result<(), MachineError> {
        self.registry.group_fds().iter().try_for_each(|group| Ok(vm.vfio_add(group.as_fd())?))
    }

    /// Why the containers could not be carried through an update; empty if they could.
    pub(super) fn blockers(&self) -> Vec<String> {
        self.registry.blockers()
    }

    pub(super) fn ids(&self) -> Vec<String> {
        self.plugged.iter().map(|plugged| plugged.id.clone()).collect()
    }

    /// The devices that somebody is in an access to, and for how long.
    pub(super) fn held(&self) -> Vec<String> {
        let held = |plugged: &Plugged| {
            let held = plugged.device.held().or_else(|| plugged.msix.held())?;
            Some(format!("device '{}': {held}", plugged.id))
        };
        self.plugged.iter().filter_map(held).collect()
    }

    pub(super) fn container_names(&self) -> Vec<String> {
        self.registry.domains().iter().map(|domain| domain.name().to_owned()).collect()
    }

    /// For vm.info.
    pub(super) fn tree(&self) -> Vec<DeviceNode> {
        let node = |plugged: &Plugged| {
            // Without them where a vCPU is in an access that does not end: an answer all the same.
            let device = plugged.device.lock_first(A_MOMENT);
            DeviceNode {
                id: plugged.id.clone(),
                resources: device.map(|device| device.bars().map(bar).collect()).unwrap_or_default(),
                pci_bdf: Some(format!("0000:00:{:02x}.0", plugged.slot)),
                host_bdf: Some(plugged.host_bdf.clone()),
                ..Default::default()
            }
        };
        self.plugged.iter().map(node).collect()
    }

    /// From now on interrupts wait in their eventfds. The guest may run meanwhile, and had better: KVM takes irqfds off
    /// one after the other, each with a grace period (irqfd_shutdown). Undone by [`Self::attach_irqfds`], after an error
    /// too.
    pub(super) fn withhold_interrupts(&self) -> Result<(), MachineError> {
        for Plugged { id, device, msix, .. } in &self.plugged {
            let held = |held| MachineError::Held { device: id.clone(), held };
            // What the host has refused before it may not refuse now. What it refuses still is tried again by the VMM in
            // which the guest goes on.
            device.lock_first(BEFORE_PAUSE).map_err(held)?.settle();
            let mut msix = msix.lock_first(BEFORE_PAUSE).map_err(held)?;
            let failed = |source| MachineError::Interrupts { device: id.clone(), source };
            msix.quiesce_irqfds().map_err(failed)?;
        }
        Ok(())
    }

    /// vCPUs are stopped: from now on the old VM is off the groups, so that its late release does not clear their VM
    /// pointer under the new one. Undone by [`Self::resume`].
    pub(super) fn quiesce(&self, vm: &Vm) -> Result<(), MachineError> {
        self.registry.group_fds().iter().try_for_each(|group| Ok(vm.vfio_del(group.as_fd())?))
    }

    /// Tries again what the host has refused before: see [`VfioPci::settle`].
    pub(super) fn settle(&self, vm: &Vm) {
        if let Err(error) = self.tell_kvm(vm) {
            log::error!("{error}");
        }
        self.plugged.iter().for_each(|plugged| plugged.device.lock().settle());
    }

    /// Attaches all irqfds, in the one VMM that has the guest, which may run. What the host refuses is logged and tried
    /// again: see [`Self::settle`].
    pub(super) fn attach_irqfds(&self) {
        if !self.seams.attaches_irqfds() {
            return;
        }
        for plugged in &self.plugged {
            if let Err(error) = plugged.own_msix().resume_irqfds() {
                log::error!("{}: {error}", plugged.id);
            }
        }
    }

    /// The end of a pause, before the vCPUs run.
    pub(super) fn resume(&self, vm: &Vm) {
        self.attach_irqfds();
        self.settle(vm);
    }

    /// [`DmaDomain::is_coherent`] of all; so it is where there is none.
    pub(super) fn are_coherent(&self) -> bool {
        self.registry.domains().iter().all(|domain| domain.is_coherent())
    }

    fn domains(&self) -> Vec<Arc<dyn DmaDomain>> {
        self.seams.dma_domains(self.registry.domains())
    }

    /// None where there is nothing to invalidate.
    pub(super) fn invalidate(&self) -> Result<Option<Invalidated>, MachineError> {
        if self.plugged.is_empty() {
            return Ok(None);
        }
        Ok(Some(vfio::invalidate_all(&self.domains())?))
    }

    /// Takes a later state of the same guest, while none of it is in use.
    pub(super) fn mend(&self, change: PassthroughChange, claims: &mut Claims) -> Result<(), MachineError> {
        let PassthroughChange::To(PassthroughState { layout, registry, devices }) = change else { return Ok(()) };
        self.registry.mend(registry).map_err(|source| MachineError::Device { name: REGISTRY.into(), source })?;
        let here = self.plugged.iter().map(|plugged| (plugged.slot, &plugged.id));
        if !here.eq(layout.devices.iter().map(|(slot, id)| (*slot, id))) {
            return Err(MachineError::OtherDevices);
        }
        for (plugged, state) in self.plugged.iter().zip(devices) {
            let moved = plugged.device.lock().mend(state, claims);
            let moved = moved.map_err(|source| MachineError::Device { name: section(&plugged.id), source })?;
            if !moved.is_empty() {
                log::info!("device '{}': the guest has moved BARs {moved:?} while it was being updated", plugged.id);
            }
        }
        Ok(())
    }

    /// In the new VMM, after the routes are set: addresses for the DMA mappings, and groups for KVM. Interrupts come
    /// after the word: [`Self::resume`].
    pub(super) fn remap(&self, ram: &[RamBlock], vm: &Vm) -> Result<(), MachineError> {
        let bar_vaddr = |id: &str, region, offset, size| {
            let plugged = self.plugged.iter().find(|plugged| plugged.id == id)?;
            plugged.device.lock().bar_vaddr(region, offset, size)
        };
        self.tell_kvm(vm)?;
        // SAFETY: the same memfd at the same offsets, and the same regions of the same device fds, as this machine
        // restored them.
        Ok(unsafe { vfio::remap_all(&self.domains(), ram, bar_vaddr) }?)
    }

    /// The orderly end: devices quiet and given back.
    pub(super) fn release(&self, vm: &Vm) {
        let mut windows = self.windows.lock();
        for plugged in &self.plugged {
            plugged.device.lock().release(&mut windows);
        }
        for group in self.registry.group_fds() {
            if let Err(error) = vm.vfio_del(group.as_fd()) {
                log::warn!("{error}");
            }
        }
        self.registry.release();
    }

    /// Encodes all of it ahead of [`Self::save`].
    pub(super) fn draft(&self) -> Result<(), MachineError> {
        let registry = Draft::new(self.registry.save(), &encode_registry)?;
        let draft = |plugged: &Plugged| Draft::new(plugged.save()?, &|saved| plugged.encode(saved));
        let devices = self.plugged.iter().map(draft).collect::<Result<_, _>>()?;
        *self.drafts.lock() = Some(Drafts { registry, devices });
        Ok(())
    }

    pub(super) fn save(&self, writer: &mut StateWriter) -> Result<(), MachineError> {
        let Self { plugged, registry, window64, windows: _, drafts, seams: _ } = self;
        let layout = Layout {
            window64: (window64.start, window64.end),
            devices: plugged.iter().map(|plugged| (plugged.slot, plugged.id.clone())).collect(),
        };
        writer.add("vfio-layout", &LAYOUT, &layout)?;
        // Not by a survivor: whoever drafted may have died of it.
        let drafts = (!survivor::is_alone()).then(|| drafts.lock());
        let drafts = drafts.as_deref().and_then(Option::as_ref);
        let of_registry = drafts.map(|drafts| &drafts.registry);
        let mut sections = Draft::sections(of_registry, &registry.save(), &encode_registry)?;
        for (n, plugged) in plugged.iter().enumerate() {
            let draft = drafts.and_then(|drafts| drafts.devices.get(n));
            sections.extend(Draft::sections(draft, &plugged.save()?, &|saved| plugged.encode(saved))?);
        }
        let mut sections = sections.into_iter();
        sections.try_for_each(|SavedSection { format, encoded }| Ok(writer.add_encoded(encoded, &format)?))
    }

    /// Touches neither VFIO nor the interrupts: see [`Self::remap`]. The BARs' memslots come before the interrupt
    /// controllers.
    pub(super) fn restore(
        state: PassthroughChange,
        vm: &BareVm,
        buses: &Buses,
        memory: &Arc<MemoryListeners>,
        host: &Host,
        claims: &mut Claims,
    ) -> Result<Self, MachineError> {
        let PassthroughChange::To(PassthroughState { layout, registry, devices }) = state else {
            return Err(MachineError::OtherDevices);
        };
        let (fd_store, seams) = (&host.fd_store, host.seams.clone());
        let registry = Passthrough::restore(registry, fd_store.clone(), memory.clone(), claims)
            .map_err(|source| MachineError::Device { name: REGISTRY.into(), source })?;
        let window64 = layout.window64.0..layout.window64.1;
        let mut windows = Windows::with_window64(window64.clone());
        let mut plugged = Vec::new();
        for ((slot, id), state) in layout.devices.into_iter().zip(devices) {
            let parts = VfioPciParts {
                claims,
                groups: &|number| registry.group(number),
                windows: &mut windows,
                wiring: wiring(vm.handle(), buses, fd_store),
            };
            let device =
                VfioPci::restore(state, parts).map_err(|source| MachineError::Device { name: section(&id), source })?;
            let device = Arc::new(Turn::new(device));
            buses.pci.add(Some(slot), device.clone())?;
            plugged.push(Plugged::new(slot, device));
        }
        let (windows, drafts) = (Mutex::new(windows), Mutex::default());
        Ok(Self { plugged, registry, window64, windows, drafts, seams })
    }
}

fn bar(bar: BarAddress) -> Resource {
    let BarAddress { index, address, size, kind, prefetchable } = bar;
    let type_ = match kind {
        BarKind::Io => PciBarType::Io,
        BarKind::Memory32 => PciBarType::Mmio32,
        BarKind::Memory64 => PciBarType::Mmio64,
    };
    Resource::PciBar { index: index.into(), base: address, size, type_, prefetchable }
}

fn encode_registry(handles: &PassthroughHandles) -> Result<Vec<SavedSection>, MachineError> {
    Ok(handles.encode(REGISTRY)?.into_iter().collect())
}

fn section(id: &str) -> String {
    format!("vfio-pci/{id}")
}

impl PassthroughChange {
    pub(crate) fn decode(reader: &mut StateReader<'_>) -> Result<Self, MachineError> {
        // The names of all their sections begin with it.
        if reader.take_unchanged(REGISTRY) { Ok(Self::None) } else { PassthroughState::decode(reader).map(Self::To) }
    }
}

impl PassthroughState {
    fn decode(reader: &mut StateReader<'_>) -> Result<Self, MachineError> {
        let (_, layout): (_, Layout) = reader.take("vfio-layout", &LAYOUT)?;
        let registry = PassthroughHandles::take(reader, REGISTRY)?;
        let devices = layout
            .devices
            .iter()
            .map(|(_, id)| Ok(migratable::take(reader, &section(id))?))
            .collect::<Result<_, MachineError>>()?;
        Ok(Self { layout, registry, devices })
    }
}
