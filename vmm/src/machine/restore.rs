//! The machine in a new image. Until the update commits, nothing of the outside world is consumed and no guest code runs, so that the
//! state it came from stays true.

use std::sync::Arc;

use theseus_hypervisor::BareVm;
use theseus_resources::{Claims, GuestRam};

use super::build::map_ram;
use super::devices::{Buses, Devices, RestoreParts};
use super::passthrough::PassthroughDevices;
use super::state::MachineState;
use super::{Host, Machine, MachineError};
use crate::memory_errors;
use crate::update::arbiter::Way;
use crate::update::timeline::{Phase, Timeline};
use crate::vcpus::{Shared, Start, Vcpus};

impl Machine {
    /// Order matters: memslots, those of BARs too, before the interrupt controllers (cost), these before vCPUs, TSC offsets before the clock,
    /// the clock before the kvmclock MSRs, all LAPICs and then the IRQ chip before routes, routes before irqfds.
    pub fn restore(
        state: MachineState,
        host: &Host,
        claims: &mut Claims,
        timeline: &Timeline,
        way: Way,
    ) -> Result<Self, MachineError> {
        let MachineState { config, running: _, ram, vm_fd, irqchip, clock, mut vcpus, devices, passthrough } = state;
        let ram = Arc::new(GuestRam::restore(ram, claims)?);
        let watched = memory_errors::watch(&ram);
        timeline.pass(Phase::Claim).map_err(MachineError::Config)?;

        let vm = BareVm::new(&host.hypervisor, Some(vm_fd))?;
        map_ram(&vm, &ram)?;
        timeline.pass(Phase::Vm).map_err(MachineError::Config)?;

        let buses = Buses::new();
        let shared = Shared {
            hypervisor: host.hypervisor.clone(),
            pio: buses.pio.clone(),
            mmio: buses.mmio.clone(),
            requests: host.requests.clone(),
        };
        if way != Way::Forward {
            vcpus
                .iter_mut()
                .filter_map(|(state, _)| state.mend())
                .for_each(|what| log::error!("on the way back: {what}"));
        }
        let kicked: Vec<u32> =
            vcpus.iter().filter(|(state, _)| state.may_have_been_kicked()).map(|(state, _)| state.index).collect();
        let starts =
            vcpus.into_iter().map(|(state, placement)| Start::Restore(Box::new(state), placement, way)).collect();
        let threads = Vcpus::start(&shared, starts)?;

        // While the threads start:
        let pci = Arc::new(theseus_devices::pci::bus::PciBus::new());
        let passthrough = PassthroughDevices::restore(passthrough, &vm, &buses, &pci, &host.vault, claims)?;
        timeline.pass(Phase::Passthrough).map_err(MachineError::Config)?;

        let vm = vm.create_irqchip()?;
        let vcpus = threads.create(&vm)?;
        if let Some(error) = vm.restore_clock(&clock)? {
            log::debug!("kvmclock is off by {error} ns");
        }
        vcpus.restore_late()?;
        timeline.pass(Phase::Vcpus).map_err(MachineError::Config)?;

        // A kick too many is legal, one too few a guest that waits for a spin lock for ever.
        for index in kicked {
            vm.kick_halted(index)?;
        }
        vm.restore_irqchip(&irqchip)?;
        vm.commit_routes()?;
        let parts = RestoreParts { vm: &vm, vault: &host.vault, claims, requests: &host.requests };
        let devices = Devices::restore(devices, pci, parts)?;
        devices.plug(&buses)?;
        timeline.pass(Phase::Devices).map_err(MachineError::Config)?;

        Ok(Self {
            config,
            vcpus,
            passthrough,
            devices,
            vm,
            ram,
            clock: Some(clock),
            populating: None,
            _watched: watched,
        })
    }
}
