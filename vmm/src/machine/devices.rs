//! The machine's set of devices: what its configuration asks for, and what they have around them.

use std::sync::Arc;

use theseus_devices::device::{Buses, Surroundings};
use theseus_devices::interrupt::IrqLine;
use theseus_devices::set::{DecodedSet, DeviceSet};
use theseus_devices::spec::Spec;
use theseus_hypervisor::Vm;
use theseus_resources::Claims;

use super::glue::Pin;
use super::{Host, MachineError};

/// At the guest's boot.
pub(super) fn boot(spec: &Spec, vm: &Arc<Vm>, host: &Host, buses: &Buses) -> Result<DeviceSet, MachineError> {
    let pin = |gsi| pin(vm, gsi);
    Ok(DeviceSet::boot(spec, &surroundings(&pin, host, buses), buses.clone())?)
}

/// The interrupt controllers must be restored before: see [`DecodedSet::restore`].
pub(super) fn restore(
    state: DecodedSet,
    vm: &Arc<Vm>,
    host: &Host,
    claims: &mut Claims,
    buses: &Buses,
) -> Result<DeviceSet, MachineError> {
    let pin = |gsi| pin(vm, gsi);
    Ok(state.restore(&surroundings(&pin, host, buses), claims, buses.clone())?)
}

fn surroundings<'a>(pin: &'a dyn Fn(u32) -> Arc<dyn IrqLine>, host: &'a Host, buses: &'a Buses) -> Surroundings<'a> {
    Surroundings { pin, requests: &host.requests, fd_store: &host.fd_store, pci: &buses.pci }
}

fn pin(vm: &Arc<Vm>, gsi: u32) -> Arc<dyn IrqLine> {
    Arc::new(Pin { vm: vm.clone(), gsi })
}
