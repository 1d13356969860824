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
use theseus_devices::turn::Turn;
use theseus_devices::vfio::saved::PassthroughHandles;
use theseus_devices::vfio::{self, DmaDomain, Invalidated, Passthrough, VfioPci, VfioPciParts, Wiring};
use theseus_hypervisor::{BareVm, Vm};
use theseus_resources::alloc::Windows;
use theseus_resources::state::Format;
use theseus_resources::{Claims, FdStore, MemoryListeners, RamBlock, StateReader, StateWriter};

use super::glue::{VmInterrupts, VmMemslots};
use super::spec::PassthroughSpec;
use super::{Host, MachineError};
use crate::seams::Seams;

/// How long vm.info waits for a device: longer than a reset of a function takes (pcie_flr).
const A_MOMENT: Duration = Duration::from_millis(500);

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
}

pub(super) struct PassthroughDevices {
    /// Before `registry`: devices hold their groups.
    plugged: Vec<Plugged>,
    registry: Passthrough,
    window64: Range<u64>,
    windows: Mutex<Windows>,
    seams: Arc<dyn Seams>,
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
        let this = Self { plugged, registry, window64, windows: Mutex::new(windows), seams };
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

    /// vCPUs are stopped: from now on interrupts wait in their eventfds, and the old VM is off the groups, so that its
    /// late release does not clear their VM pointer under the new one. Undone by [`Self::resume`].
    pub(super) fn quiesce(&self, vm: &Vm) -> Result<(), MachineError> {
        self.settle(vm);
        for plugged in &self.plugged {
            let device = plugged.device.lock();
            let failed = |source| MachineError::Interrupts { device: device.id().to_owned(), source };
            device.quiesce_irqfds().map_err(failed)?;
        }
        self.registry.group_fds().iter().try_for_each(|group| Ok(vm.vfio_del(group.as_fd())?))
    }

    /// Tries again what the host has refused before: see [`VfioPci::settle`].
    pub(super) fn settle(&self, vm: &Vm) {
        if let Err(error) = self.tell_kvm(vm) {
            log::error!("{error}");
        }
        self.plugged.iter().for_each(|plugged| plugged.device.lock().settle());
    }

    /// Attaches all irqfds, in the one VMM that has the guest, before its vCPUs run. What the host refuses is logged
    /// and tried again: see [`Self::settle`].
    pub(super) fn resume(&self, vm: &Vm) {
        if self.seams.attaches_irqfds() {
            for plugged in &self.plugged {
                let device = plugged.device.lock();
                if let Err(error) = device.attach_irqfds() {
                    log::error!("{}: {error}", device.id());
                }
            }
        }
        self.settle(vm);
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
    pub(super) fn mend(&self, state: PassthroughState, claims: &mut Claims) -> Result<(), MachineError> {
        let PassthroughState { layout, registry, devices } = state;
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

    pub(super) fn save(&self, writer: &mut StateWriter) -> Result<(), MachineError> {
        let Self { plugged, registry, window64, windows: _, seams: _ } = self;
        let layout = Layout {
            window64: (window64.start, window64.end),
            devices: plugged.iter().map(|plugged| (plugged.slot, plugged.id.clone())).collect(),
        };
        writer.add("vfio-layout", &LAYOUT, &layout)?;
        let mut sections = vec![registry.save().encode(REGISTRY)?];
        for (plugged, (_, id)) in plugged.iter().zip(&layout.devices) {
            let name = section(id);
            let device = plugged.device.look().map_err(|held| MachineError::Held { device: id.clone(), held })?;
            let saved = SavedDevice::of(&*device, &name).map_err(|source| MachineError::Device { name, source })?;
            sections.extend([Some(saved.state), saved.handles]);
        }
        let mut sections = sections.into_iter().flatten();
        sections.try_for_each(|SavedSection { format, encoded }| Ok(writer.add_encoded(encoded, &format)?))
    }

    /// Touches neither VFIO nor the interrupts: see [`Self::remap`]. The BARs' memslots come before the interrupt
    /// controllers.
    pub(super) fn restore(
        state: PassthroughState,
        vm: &BareVm,
        buses: &Buses,
        memory: &Arc<MemoryListeners>,
        host: &Host,
        claims: &mut Claims,
    ) -> Result<Self, MachineError> {
        let PassthroughState { layout, registry, devices } = state;
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
        Ok(Self { plugged, registry, window64, windows: Mutex::new(windows), seams })
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

fn section(id: &str) -> String {
    format!("vfio-pci/{id}")
}

impl PassthroughState {
    pub(crate) fn decode(reader: &mut StateReader<'_>) -> Result<Self, MachineError> {
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
