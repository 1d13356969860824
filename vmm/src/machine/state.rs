//! The machine as sections of the saved state.

use serde::{Deserialize, Serialize};
use theseus_api::types::VmConfig;
use theseus_hypervisor::{ClockAnchor, IrqchipState, VcpuShape, VcpuState, vcpu};
use theseus_resources::ram::RamState;
use theseus_resources::{StateReader, StateWriter};

use super::devices::DevicesState;
use super::passthrough::PassthroughState;
use super::{Machine, MachineError};
use crate::build_info;
use crate::vcpus::placement::Placement;

const MACHINE: (&str, u16) = ("machine", 1 + build_info::IS_B as u16);
const RAM: (&str, u16) = ("guest-ram", 1);
const IRQCHIP: (&str, u16) = ("kvm-irqchip", 1);
const CLOCK: (&str, u16) = ("kvm-clock", 1);
const VCPU: (&str, u16) = ("vcpu", 1);

/// (kind, version) of the sections that are not a device's.
pub const VERSIONS: &[(&str, u16)] = &[MACHINE, RAM, IRQCHIP, CLOCK, VCPU, super::passthrough::LAYOUT];

/// What the other sections hang on.
#[derive(Serialize, Deserialize)]
struct MachineSection {
    config: VmConfig,
    /// Whether the vCPUs ran before the update, and so will after it.
    running: bool,
    has_serial: bool,
    /// None in a dry run, which is made while the guest runs.
    vcpus: Option<u32>,
    /// In a dry run: what each vCPU is, and where and how its thread is scheduled.
    shapes: Vec<VcpuShape>,
    placements: Vec<Placement>,
    /// See [`build_info::IS_B`].
    #[cfg(later_build)]
    #[serde(default)]
    of_a_later_version: Option<u16>,
}

/// Everything decoded, nothing claimed or created yet: what `--check-update` tries, and what a new VMM starts from.
pub struct MachineState {
    pub config: VmConfig,
    pub running: bool,
    pub ram: RamState,
    pub irqchip: IrqchipState,
    pub clock: ClockAnchor,
    /// Of a dry run.
    pub shapes: Vec<(VcpuShape, Placement)>,
    pub vcpus: Vec<VcpuState>,
    pub devices: DevicesState,
    pub passthrough: PassthroughState,
}

/// A dry run takes no vCPU states, as the guest is running.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    DryRun,
    Full,
}

impl Machine {
    /// Pure. `was_running`: whether the guest is to run again; `placements`: in a dry run, of each vCPU.
    pub fn save(
        &self,
        writer: &mut StateWriter,
        depth: Depth,
        was_running: bool,
        placements: Vec<Placement>,
    ) -> Result<(), MachineError> {
        let Self { config, vcpus, passthrough, devices, vm, ram, clock, unfilled: _, populating: _, _watched } = self;
        let (states, shapes) = match depth {
            Depth::Full => (vcpus.save()?, Vec::new()),
            Depth::DryRun => (Vec::new(), vcpus.shapes()),
        };
        let memory = vm.memory();
        let refused: Vec<_> = states.iter().flat_map(|state| vcpu::reasons(state, &memory)).collect();
        if !refused.is_empty() && !crate::test_hooks::skip_state_check() {
            return Err(MachineError::Refused(refused.join("; ")));
        }
        let tsc_khz = states.first().map_or(0, |state| state.tsc_khz);
        let section = MachineSection {
            config: config.clone(),
            running: was_running,
            has_serial: devices.serial.is_some(),
            vcpus: (depth == Depth::Full).then_some(states.len() as u32),
            shapes,
            placements,
            #[cfg(later_build)]
            of_a_later_version: Some(1),
        };
        writer.add("machine", MACHINE.0, MACHINE.1, &section)?;
        writer.add("ram", RAM.0, RAM.1, &ram.save())?;
        writer.add("irqchip", IRQCHIP.0, IRQCHIP.1, &vm.save_irqchip()?)?;
        writer.add("clock", CLOCK.0, CLOCK.1, &vm.save_clock(*clock, tsc_khz)?)?;
        for state in &states {
            writer.add(&format!("vcpu{}", state.index), VCPU.0, VCPU.1, state)?;
        }
        devices.save(writer)?;
        passthrough.save(writer)
    }
}

impl MachineState {
    pub fn decode(reader: &mut StateReader<'_>) -> Result<Self, MachineError> {
        let section: MachineSection = reader.take("machine", MACHINE.0, MACHINE.1)?;
        let MachineSection { config, running, has_serial, vcpus, shapes, placements, .. } = section;
        let mut placements = placements.into_iter();
        let mut states = Vec::new();
        for index in 0..vcpus.unwrap_or(0) {
            let state: VcpuState = reader.take(&format!("vcpu{index}"), VCPU.0, VCPU.1)?;
            if state.index != index {
                return Err(MachineError::Config(format!("section 'vcpu{index}' holds vCPU {}", state.index)));
            }
            if state.owed.iter().any(|write| !matches!(write.data.len(), 1..=8)) {
                return Err(MachineError::Config(format!(
                    "section 'vcpu{index}' holds a write of no size that there is"
                )));
            }
            states.push(state);
        }
        Ok(Self {
            config,
            running,
            ram: reader.take("ram", RAM.0, RAM.1)?,
            irqchip: reader.take("irqchip", IRQCHIP.0, IRQCHIP.1)?,
            clock: reader.take("clock", CLOCK.0, CLOCK.1)?,
            shapes: shapes.into_iter().map(|shape| (shape, placements.next().unwrap_or_default())).collect(),
            vcpus: states,
            devices: DevicesState::decode(reader, has_serial)?,
            passthrough: PassthroughState::decode(reader)?,
        })
    }
}
