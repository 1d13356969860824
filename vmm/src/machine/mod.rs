//! The booted machine: RAM, the KVM VM, its vCPUs and its devices. Built at the guest's boot ([`build`]) or restored
//! from the state of an earlier image ([`restore`]).

mod build;
mod devices;
mod draft;
mod error;
mod fits;
mod glue;
mod passthrough;
mod populate;
pub(crate) mod restore;
pub(crate) mod spec;
pub(crate) mod state;
#[cfg(test)]
mod survivor_tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use theseus_api::types::{DeviceNode, Resource, SERIAL_ID};
use theseus_devices::device::{Buses, DeviceError, Operation};
use theseus_devices::legacy::{pm, pm::Pm, serial, serial::SerialDevice};
use theseus_devices::set::DeviceSet;
use theseus_devices::vfio::Invalidated;
use theseus_hypervisor::{ClockAnchor, Hypervisor, ReadyVm};
use theseus_resources::{FdStore, GuestRam, MemoryListeners, layout};

use crate::seams::Seams;
use crate::vcpus::{Shared, Vcpus};
pub(crate) use error::MachineError;
use passthrough::PassthroughDevices;
use populate::Populating;

/// What outlives every machine of this process.
#[derive(Clone)]
pub(crate) struct Host {
    pub hypervisor: Arc<Hypervisor>,
    pub fd_store: FdStore,
    pub requests: Arc<dyn theseus_devices::interrupt::GuestRequests>,
    pub seams: Arc<dyn Seams>,
}

impl Host {
    fn for_vcpus(&self, buses: &Buses) -> Shared {
        let Self { hypervisor, fd_store: _, requests, seams } = self.clone();
        Shared { hypervisor, pio: buses.pio.clone(), mmio: buses.mmio.clone(), requests, seams }
    }
}

/// Fields are dropped in this order: vCPU threads end before what they use goes away.
pub(crate) struct Machine {
    /// [`MACHINE_VERSION`](crate::boot::MACHINE_VERSION) of the build that the guest was booted in.
    version: u32,
    pub vcpus: Vcpus,
    passthrough: PassthroughDevices,
    devices: DeviceSet,
    /// Who has to know of `ram`.
    memory: Arc<MemoryListeners>,
    pub vm: ReadyVm,
    pub ram: Arc<GuestRam>,
    /// What the guest's clock was set by in this image; None in the image it booted in.
    clock: Option<ClockAnchor>,
    /// Page tables that a new VMM had no time to fill.
    unfilled: bool,
    populating: Option<Populating>,
}

/// Lets vCPUs go on that were stopped for nothing, after a panic too.
struct Stopped<'a> {
    vcpus: &'a mut Vcpus,
    ran: bool,
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        if self.ran
            && let Err(error) = self.vcpus.resume()
        {
            log::error!("the guest cannot go on: {error}");
        }
    }
}

impl Machine {
    /// The number of bytes of RAM that the guest has.
    pub(crate) fn memory_size(&self) -> u64 {
        self.ram.size()
    }

    /// Why `operation` cannot be now, each with its remedy. Empty if it can.
    pub(crate) fn blockers(&self, operation: Operation) -> Vec<String> {
        let mut reasons = self.devices.blockers(operation);
        if operation == Operation::Update {
            reasons.extend(self.passthrough.blockers());
        }
        reasons
    }

    /// Stops the vCPUs, and then what devices do by themselves; all of it or, on an error, nothing. Where a vCPU does
    /// not come, the error names the devices that are being accessed.
    pub(crate) fn pause(&mut self, within: Duration) -> Result<(), MachineError> {
        let ran = self.vcpus.is_running();
        let held = |source| MachineError::Stuck { source, held: self.passthrough.held() };
        self.vcpus.pause(within).map_err(held)?;
        let stopped = Stopped { vcpus: &mut self.vcpus, ran };
        self.devices.quiesce()?;
        std::mem::forget(stopped);
        Ok(())
    }

    /// The guest goes on. What the host has refused before is tried again first.
    pub(crate) fn resume(&mut self) -> Result<(), MachineError> {
        self.passthrough.settle(&self.vm);
        self.devices.resume();
        Ok(self.vcpus.resume()?)
    }

    /// While the guest runs, right before it is paused so that another VMM may have it: what the pause need not hold.
    /// From now on interrupts wait in their eventfds. Undone by [`Self::activate`], after an error too.
    pub(crate) fn prepare_quiesce(&self) -> Result<(), MachineError> {
        self.passthrough.draft()?;
        self.passthrough.withhold_interrupts()
    }

    /// In a pause, after [`Self::prepare_quiesce`], so that another VMM may have the guest. Undone by
    /// [`Self::activate`].
    pub(crate) fn quiesce(&self) -> Result<(), MachineError> {
        // What has come to stand in the way since it was asked before.
        let reasons = self.devices.blockers(Operation::Update);
        if !reasons.is_empty() {
            return Err(DeviceError::Blocked(Operation::Update, reasons).into());
        }
        self.passthrough.quiesce(&self.vm)
    }

    /// No DMA address of this process is valid any more; what was mapped goes on. Undone by dropping it.
    pub(crate) fn invalidate(&self) -> Result<Option<Invalidated>, MachineError> {
        self.passthrough.invalidate()
    }

    /// In the new VMM: the DMA addresses are those of this process from now on.
    pub(crate) fn remap(&self) -> Result<(), MachineError> {
        self.passthrough.remap(&self.memory.blocks(), &self.vm)
    }

    /// In the one VMM that has the guest: interrupts arrive again, and if it is to run, it does.
    pub(crate) fn activate(&mut self, running: bool) -> Result<(), MachineError> {
        if self.vcpus.is_running() {
            // It was not stopped: its devices are in use.
            self.passthrough.attach_irqfds();
            return Ok(());
        }
        self.passthrough.resume(&self.vm);
        if running {
            self.devices.resume();
            self.vcpus.resume()?;
        }
        Ok(())
    }

    /// Of the devices that were passed through.
    pub(crate) fn passthrough_ids(&self) -> Vec<String> {
        self.passthrough.ids()
    }

    /// Of their DMA containers.
    pub(crate) fn container_names(&self) -> Vec<String> {
        self.passthrough.container_names()
    }

    /// Fills what is missing of this process's page tables, in the background.
    pub(crate) fn populate(&mut self) {
        if self.unfilled {
            self.populating = Populating::start(self.ram.clone());
        }
    }

    /// An NMI to every vCPU, as a button on the front panel would give.
    pub(crate) fn nmi(&self) -> Result<(), MachineError> {
        Ok(self.vm.broadcast_nmi()?)
    }

    /// Ends the guest and gives its devices back.
    pub(crate) fn shut_down(self) {
        let Self { version: _, vcpus, passthrough, devices, memory, vm, ram, clock: _, unfilled: _, populating } = self;
        drop(populating);
        // Nothing may touch the devices any more before they are released.
        drop(vcpus);
        passthrough.release(&vm);
        drop((passthrough, devices, memory, vm, ram));
    }

    /// What is on the guest's buses, for vm.info.
    pub(crate) fn device_tree(&self) -> BTreeMap<String, DeviceNode> {
        let serial = self.serial().map(|_| DeviceNode {
            id: SERIAL_ID.into(),
            resources: vec![Resource::PioAddressRange { base: layout::SERIAL_PORT, size: serial::SERIAL_SIZE as u16 }],
            pty: self.pty(),
            ..Default::default()
        });
        self.passthrough.tree().into_iter().chain(serial).map(|node| (node.id.clone(), node)).collect()
    }

    pub(crate) fn serial(&self) -> Option<Arc<Mutex<SerialDevice>>> {
        self.devices.get(serial::NAME)
    }

    pub(crate) fn power_management(&self) -> Option<Arc<Mutex<Pm>>> {
        self.devices.get(pm::NAME)
    }

    /// The terminal that the serial port has made.
    pub(crate) fn pty(&self) -> Option<PathBuf> {
        self.serial()?.lock().pty_path().map(Path::to_path_buf)
    }
}
