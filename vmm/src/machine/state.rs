//! The machine as sections of the saved state.

use serde::{Deserialize, Serialize};
use theseus_devices::migratable::handles_name;
use theseus_devices::set::DecodedSet;
use theseus_hypervisor::{ClockAnchor, ClockHandles, ClockState, IrqchipState, VcpuHandles, VcpuShape, VcpuState};
use theseus_resources::ram::{RamHandles, RamState};
use theseus_resources::state::{Format, Kind};
use theseus_resources::{StateReader, StateWriter};

use super::passthrough::PassthroughChange;
use super::{Machine, MachineError};
use crate::boot::MACHINE_VERSION;
use crate::build_info;
use crate::vcpus::Saving;
use crate::vcpus::placement::Placement;
use crate::vcpus::saved::{self, EncodedVcpu, PlacementHandles, SavedVcpu};

const MACHINE: Format = Format::new("machine", 1 + build_info::IS_LATER as u16);
const MACHINE_HANDLES: Format = Format::new("machine-handles", 1);
const RAM: Format = Format::new("guest-ram", 1);
const RAM_HANDLES: Format = Format::new("guest-ram-handles", 1);
const IRQCHIP: Format = Format::new("kvm-irqchip", 1);
const CLOCK: Format = Format::new("kvm-clock", 1);
const CLOCK_HANDLES: Format = Format::new("kvm-clock-handles", 1);
const VCPU: Format = Format::new("vcpu", 1);
const VCPU_HANDLES: Format = Format::new("vcpu-handles", 1);

/// Of the sections that are not a device's.
pub(crate) const KINDS: &[Kind] = &[
    Kind::of::<MachineSection>(MACHINE),
    Kind::of::<MachineHandles>(MACHINE_HANDLES),
    Kind::of::<RamState>(RAM),
    Kind::of::<RamHandles>(RAM_HANDLES),
    Kind::of::<IrqchipState>(IRQCHIP),
    Kind::of::<ClockState>(CLOCK),
    Kind::of::<ClockHandles>(CLOCK_HANDLES),
    Kind::of::<VcpuState>(VCPU),
    Kind::of::<VcpuHandles>(VCPU_HANDLES),
    Kind::of::<super::passthrough::Layout>(super::passthrough::LAYOUT),
];

/// What the other sections hang on.
#[derive(Serialize, Deserialize)]
struct MachineSection {
    /// What the guest was booted with: [`MACHINE_VERSION`] of that build.
    machine_version: u32,
    /// Whether the vCPUs ran before the update, and so will after it.
    running: bool,
    /// None in a dry run, which is made while the guest runs.
    vcpus: Option<u32>,
    /// In a dry run: what each vCPU is.
    shapes: Vec<VcpuShape>,
    /// See [`build_info::IS_LATER`].
    #[cfg(later_build)]
    #[serde(default)]
    of_a_later_version: Option<u16>,
}

#[derive(Serialize, Deserialize)]
struct MachineHandles {
    /// In a dry run: where and how the thread of each vCPU is scheduled.
    placements: Vec<PlacementHandles>,
}

/// Everything decoded but the vCPUs, nothing claimed or created yet: what `--check-update` tries, and what a new VMM
/// starts from.
pub(crate) struct MachineState {
    pub version: u32,
    pub running: bool,
    pub ram: RamState,
    pub ram_handles: RamHandles,
    pub irqchip: IrqchipState,
    pub clock: ClockAnchor,
    /// Of a dry run.
    pub shapes: Vec<(VcpuShape, Placement)>,
    pub devices: DecodedSet,
    pub passthrough: PassthroughChange,
}

/// How much of the machine is saved.
pub(crate) enum SaveScope {
    /// No vCPU states, as the guest is running, but where and how each vCPU's thread is scheduled.
    DryRun(Vec<Placement>),
    Full,
}

impl Machine {
    /// The first part: what the guest does not change, so that it can be written while it still runs. Pure.
    /// `was_running`: whether the guest is to run again.
    pub(crate) fn save_frame(
        &self,
        writer: &mut StateWriter,
        scope: SaveScope,
        was_running: bool,
    ) -> Result<(), MachineError> {
        let Self { version, vcpus, ram, .. } = self;
        let (count, shapes, placements) = match scope {
            SaveScope::Full => (Some(vcpus.count()), Vec::new(), Vec::new()),
            SaveScope::DryRun(placements) => (None, vcpus.shapes(), placements),
        };
        let section = MachineSection {
            machine_version: *version,
            running: was_running,
            vcpus: count,
            shapes,
            #[cfg(later_build)]
            of_a_later_version: Some(1),
        };
        let handles = MachineHandles { placements: placements.into_iter().map(Into::into).collect() };
        writer.add("machine", &MACHINE, &section)?;
        writer.add(&handles_name("machine"), &MACHINE_HANDLES, &handles)?;
        let (ram, handles) = ram.save();
        writer.add("ram", &RAM, &ram)?;
        Ok(writer.add(&handles_name("ram"), &RAM_HANDLES, &handles)?)
    }

    /// The rest, with the states of the vCPUs if the guest stands still. Pure. What
    /// [`crate::vcpus::Vcpus::begin_save_alone`] has begun needs no other thread, neither environment nor log, and of a
    /// survivor ([`theseus_resources::survivor`]) no lock.
    pub(crate) fn save(&self, writer: &mut StateWriter, saving: Option<Saving<'_>>) -> Result<(), MachineError> {
        let Self { version: _, vcpus, passthrough, devices, memory: _, vm, ram: _, clock, unfilled: _, populating: _ } =
            self;
        writer.add("irqchip", &IRQCHIP, &vm.save_irqchip()?)?;
        let clock = vm.save_clock(*clock, vcpus.tsc_khz())?;
        writer.add(&handles_name("clock"), &CLOCK_HANDLES, &clock.handles())?;
        devices.save(writer)?;
        passthrough.save(writer)?;
        let saved = saving.map(Saving::finish).transpose()?.unwrap_or_default();
        let refused: Vec<_> = saved.iter().flat_map(|vcpu| vcpu.refused.clone()).collect();
        if !refused.is_empty() {
            return Err(MachineError::Refused(refused.join("; ")));
        }
        writer.add("clock", &CLOCK, &clock.state(saved.iter().map(|vcpu| vcpu.tsc_offset)))?;
        for SavedVcpu { encoded: EncodedVcpu { state, handles }, .. } in saved {
            writer.add_encoded(state, &VCPU)?;
            writer.add_encoded(handles, &VCPU_HANDLES)?;
        }
        Ok(())
    }
}

/// The sections of vCPUs, in order of their index.
pub(crate) fn take_vcpus(reader: &mut StateReader<'_>) -> Result<Vec<EncodedVcpu>, MachineError> {
    let mut vcpus = Vec::new();
    loop {
        let name = saved::section(vcpus.len());
        if !reader.has(&name) {
            return Ok(vcpus);
        }
        let (_, state) = reader.take_encoded(&name, &VCPU)?;
        let (_, handles) = reader.take_encoded(&handles_name(&name), &VCPU_HANDLES)?;
        vcpus.push(EncodedVcpu { state, handles });
    }
}

impl MachineState {
    /// `vcpus`: how many [`take_vcpus`] has found.
    pub(crate) fn decode(reader: &mut StateReader<'_>, vcpus: usize) -> Result<Self, MachineError> {
        let (_, section): (_, MachineSection) = reader.take("machine", &MACHINE)?;
        let MachineSection { machine_version: version, running, vcpus: count, shapes, .. } = section;
        let (_, handles) = reader.take(&handles_name("machine"), &MACHINE_HANDLES)?;
        let MachineHandles { placements } = handles;
        let mut placements = placements.into_iter().map(Placement::from);
        let count = count.unwrap_or(0);
        if vcpus != count as usize {
            return Err(MachineError::SavedVcpus { said: count, found: vcpus });
        }
        if version > MACHINE_VERSION {
            return Err(MachineError::MachineVersion(version));
        }
        // The guest's clocks go on from the anchor.
        let (_, _): (_, ClockState) = reader.take("clock", &CLOCK)?;
        let (_, clock) = reader.take(&handles_name("clock"), &CLOCK_HANDLES)?;
        Ok(Self {
            version,
            running,
            ram: reader.take("ram", &RAM)?.1,
            ram_handles: reader.take(&handles_name("ram"), &RAM_HANDLES)?.1,
            irqchip: reader.take("irqchip", &IRQCHIP)?.1,
            clock: ClockAnchor::restore(clock),
            shapes: shapes.into_iter().map(|shape| (shape, placements.next().unwrap_or_default())).collect(),
            devices: DecodedSet::decode(reader)?,
            passthrough: PassthroughChange::decode(reader)?,
        })
    }
}
