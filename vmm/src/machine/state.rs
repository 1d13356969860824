//! The machine as sections of the saved state.

use serde::{Deserialize, Serialize};
use theseus_api::types::VmConfig;
use theseus_devices::set::DecodedSet;
use theseus_hypervisor::{ClockAnchor, IrqchipState, VcpuShape};
use theseus_resources::ram::RamState;
use theseus_resources::state::Format;
use theseus_resources::survivor;
use theseus_resources::{StateReader, StateWriter};

use super::passthrough::PassthroughState;
use super::{Machine, MachineError};
use crate::boot::MACHINE_VERSION;
use crate::build_info;
use crate::vcpus::Saving;
use crate::vcpus::placement::Placement;
use crate::vcpus::saved::{self, EncodedVcpu};

const MACHINE: Format = Format::new("machine", 1 + build_info::IS_LATER as u16);
const RAM: Format = Format::new("guest-ram", 1);
const IRQCHIP: Format = Format::new("kvm-irqchip", 1);
const CLOCK: Format = Format::new("kvm-clock", 1);
const VCPU: Format = Format::new("vcpu", 1);

/// Of the sections that are not a device's.
pub const FORMATS: &[Format] = &[MACHINE, RAM, IRQCHIP, CLOCK, VCPU, super::passthrough::LAYOUT];

/// What the other sections hang on.
#[derive(Serialize, Deserialize)]
struct MachineSection {
    /// What the guest was booted with: [`MACHINE_VERSION`] of that build.
    machine_version: u32,
    config: VmConfig,
    /// Whether the vCPUs ran before the update, and so will after it.
    running: bool,
    /// None in a dry run, which is made while the guest runs.
    vcpus: Option<u32>,
    /// In a dry run: what each vCPU is, and where and how its thread is scheduled.
    shapes: Vec<VcpuShape>,
    placements: Vec<Placement>,
    /// See [`build_info::IS_LATER`].
    #[cfg(later_build)]
    #[serde(default)]
    of_a_later_version: Option<u16>,
}

/// Everything decoded but the vCPUs, nothing claimed or created yet: what `--check-update` tries, and what a new VMM
/// starts from.
pub struct MachineState {
    pub config: VmConfig,
    pub version: u32,
    pub running: bool,
    pub ram: RamState,
    pub irqchip: IrqchipState,
    pub clock: ClockAnchor,
    /// Of a dry run.
    pub shapes: Vec<(VcpuShape, Placement)>,
    pub devices: DecodedSet,
    pub passthrough: PassthroughState,
}

/// How much of the machine is saved.
pub enum SaveScope<'a> {
    /// No vCPU states, as the guest is running, but where and how each vCPU's thread is scheduled.
    DryRun(Vec<Placement>),
    /// With those that are being saved. A save that [`crate::vcpus::Vcpus::begin_save_alone`] has begun needs no other
    /// thread, neither environment nor log, and of a survivor ([`theseus_resources::survivor`]) no lock.
    Full(Saving<'a>),
}

impl Machine {
    /// Pure. `was_running`: whether the guest is to run again.
    pub fn save(&self, writer: &mut StateWriter, depth: SaveScope<'_>, was_running: bool) -> Result<(), MachineError> {
        let Self {
            config,
            version,
            vcpus,
            passthrough,
            devices,
            memory: _,
            vm,
            ram,
            clock,
            unfilled: _,
            populating: _,
        } = self;
        let (saving, shapes, placements) = match depth {
            SaveScope::Full(saving) => (Some(saving), Vec::new(), Vec::new()),
            SaveScope::DryRun(placements) => (None, vcpus.shapes(), placements),
        };
        let section = MachineSection {
            machine_version: *version,
            config: config.clone(),
            running: was_running,
            vcpus: saving.as_ref().map(|_| vcpus.count()),
            shapes,
            placements,
            #[cfg(later_build)]
            of_a_later_version: Some(1),
        };
        writer.add("machine", &MACHINE, &section)?;
        writer.add("ram", &RAM, &ram.save())?;
        writer.add("irqchip", &IRQCHIP, &vm.save_irqchip()?)?;
        writer.add("clock", &CLOCK, &vm.save_clock(*clock, vcpus.tsc_khz())?)?;
        devices.save(writer)?;
        passthrough.save(writer)?;
        let saved = saving.map(Saving::finish).transpose()?.unwrap_or_default();
        let refused: Vec<_> = saved.iter().flat_map(|vcpu| vcpu.refused.clone()).collect();
        if !refused.is_empty() && (survivor::is_alone() || !crate::test_hooks::skip_state_check()) {
            return Err(MachineError::Refused(refused.join("; ")));
        }
        saved.into_iter().try_for_each(|vcpu| Ok(writer.add_encoded(vcpu.state, &VCPU)?))
    }
}

/// The sections of vCPUs, in order of their index.
pub fn take_vcpus(reader: &mut StateReader<'_>) -> Result<Vec<EncodedVcpu>, MachineError> {
    let mut vcpus = Vec::new();
    loop {
        let name = saved::section(vcpus.len());
        if !reader.has(&name) {
            return Ok(vcpus);
        }
        vcpus.push(reader.take_encoded(&name, &VCPU)?.1);
    }
}

impl MachineState {
    /// `vcpus`: how many [`take_vcpus`] has found.
    pub fn decode(reader: &mut StateReader<'_>, vcpus: usize) -> Result<Self, MachineError> {
        let (_, section): (_, MachineSection) = reader.take("machine", &MACHINE)?;
        let MachineSection { machine_version: version, config, running, vcpus: count, shapes, placements, .. } =
            section;
        let mut placements = placements.into_iter();
        let count = count.unwrap_or(0);
        if vcpus != count as usize {
            return Err(MachineError::Config(format!("the saved state is of {count} vCPUs, and holds {vcpus}")));
        }
        if version > MACHINE_VERSION {
            return Err(MachineError::Config(format!(
                "the guest was booted as version {version} of the machine, this build knows those up to \
                 {MACHINE_VERSION}: update to a later build"
            )));
        }
        Ok(Self {
            config,
            version,
            running,
            ram: reader.take("ram", &RAM)?.1,
            irqchip: reader.take("irqchip", &IRQCHIP)?.1,
            clock: reader.take("clock", &CLOCK)?.1,
            shapes: shapes.into_iter().map(|shape| (shape, placements.next().unwrap_or_default())).collect(),
            devices: DecodedSet::decode(reader)?,
            passthrough: PassthroughState::decode(reader)?,
        })
    }
}
