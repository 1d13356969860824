//! The whole saved state: what the update itself hands over, and the machine.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use theseus_api::access::PeersHandles;
use theseus_api::types::{BuildInfo, VmConfig};
use theseus_resources::fd_store::Record;
use theseus_resources::state::{Format, Kind, StateError};
use theseus_resources::{Slot, StateReader, StateWriter};

use super::UpdateContext;
use crate::build_info;
use crate::logging::{LogConfig, LogHandles};
use crate::machine::MachineError;
use crate::machine::state::{self, MachineState};
use crate::sandbox::ConfinementHandles;
use crate::supervisor::SupervisorHandles;
use crate::vcpus::saved::EncodedVcpu;

const HANDOVER: Format = Format::new("handover", 4);
/// The name of its section.
const NAME: &str = "handover";
/// From this version on it may come ahead of the machine, in a state of its own.
pub(crate) const AHEAD: u16 = 4;

/// Whether a build that writes sections of these kinds and versions takes a handover that comes ahead.
pub(crate) fn takes_ahead(writes: &[(String, u16)]) -> bool {
    writes.iter().any(|(kind, version)| kind == HANDOVER.kind && *version >= AHEAD)
}

/// What the new VMM needs beside the machine: all of it this host's.
#[derive(Serialize, Deserialize)]
pub(crate) struct Handover {
    /// Every stored fd.
    pub fd_store: Vec<Record>,
    pub from: BuildHandles,
    /// How the target was named, which is where it looks for the next one.
    #[serde(default)]
    pub target: Option<PathBuf>,
    #[serde(default)]
    pub supervisor: SupervisorHandles,
    #[serde(default)]
    pub confinement: ConfinementHandles,
    #[serde(default)]
    pub events: Option<Slot>,
    /// How this process logs: parsing the command line again would cost a part of the pause.
    pub log: LogHandles,
    pub kvm: Slot,
    pub api: Option<ApiSlots>,
    #[serde(default)]
    pub peers: PeersHandles,
    /// The configuration of the VM, if there is one: JSON as the API has it, which reads its own of earlier builds
    /// anyway. The machine does not know it.
    pub config: Option<String>,
    /// Whether there is a machine in this state.
    pub booted: bool,
    /// Whether the VM was shut down, rather than not booted yet.
    pub was_shut_down: bool,
}

/// Which build has written the state.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct BuildHandles {
    pub version: String,
    pub build_id: String,
}

impl From<BuildHandles> for BuildInfo {
    fn from(handles: BuildHandles) -> Self {
        let BuildHandles { version, build_id } = handles;
        Self { version, build_id }
    }
}

#[derive(Serialize, Deserialize)]
pub(crate) struct ApiSlots {
    pub listener: Slot,
    /// Connections that stand between two requests.
    pub idle: Vec<Slot>,
    /// The one that waits for the answer to this update.
    pub caller: Option<Slot>,
    /// Whether that one is to be closed after its answer.
    #[serde(default)]
    pub caller_ends: bool,
}

/// Of every section that this build writes.
pub(crate) fn kinds() -> Vec<Kind> {
    let devices = theseus_devices::catalogue::kinds();
    [Kind::of::<Handover>(HANDOVER)].into_iter().chain(state::KINDS.iter().copied()).chain(devices).collect()
}

pub(crate) fn formats() -> Vec<Format> {
    kinds().into_iter().map(|kind| kind.format).collect()
}

/// A saved state as this build takes it: every section read and written again.
pub(crate) fn reread(reader: &StateReader<'_>) -> Result<Vec<u8>, StateError> {
    let kinds = kinds();
    let mut writer = StateWriter::new(reader.build_id());
    for section in reader.sections() {
        let unknown = || StateError::Section { name: section.name.to_string(), reason: "is of an unknown kind".into() };
        let kind = kinds.iter().find(|kind| kind.format.kind == section.kind).ok_or_else(unknown)?;
        writer.add_encoded((kind.reread)(section)?, &kind.format)?;
    }
    writer.finish()
}

/// What goes over beside the machine.
pub(crate) struct Beside {
    pub handover: Handover,
    pub config: Option<VmConfig>,
    /// The handover's, until they have been taken over.
    pub fd_store: Option<Vec<Record>>,
}

pub(crate) struct Saved {
    pub beside: Beside,
    pub machine: Option<MachineState>,
}

impl Handover {
    pub(crate) fn new(
        subject: &UpdateContext<'_>,
        target: Option<PathBuf>,
        fd_store: Vec<Record>,
        api: Option<ApiSlots>,
    ) -> Result<Self, StateError> {
        let BuildInfo { version, build_id } = build_info::this();
        Ok(Self {
            fd_store,
            from: BuildHandles { version: version.clone(), build_id: build_id.clone() },
            target,
            supervisor: subject.supervisor.save(),
            confinement: subject.confinement.save(),
            events: subject.events.slot(),
            log: LogConfig::in_use().save(),
            kvm: subject.host.hypervisor.kept().slot(),
            api,
            peers: subject.peers.save(),
            config: subject.config.map(serde_json::to_string).transpose().map_err(wrong_config)?,
            booted: subject.machine.is_some(),
            was_shut_down: subject.was_shut_down,
        })
    }

    fn vm_config(&self) -> Result<Option<VmConfig>, StateError> {
        let config = self.config.as_deref().map(serde_json::from_str).transpose().map_err(wrong_config)?;
        if self.booted && config.is_none() {
            return Err(wrong_config("a guest runs, and there is none"));
        }
        Ok(config)
    }

    pub(crate) fn encode(&self, writer: &mut StateWriter) -> Result<(), MachineError> {
        Ok(writer.add(NAME, &HANDOVER, self)?)
    }
}

fn wrong_config(error: impl std::fmt::Display) -> StateError {
    StateError::Section { name: NAME.into(), reason: format!("config: {error}") }
}

impl Beside {
    /// One that has come ahead.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let mut reader = StateReader::new(bytes)?;
        let this = Self::take(&mut reader)?;
        reader.finish()?;
        Ok(this)
    }

    fn take(reader: &mut StateReader<'_>) -> Result<Self, StateError> {
        let (_, mut handover): (_, Handover) = reader.take(NAME, &HANDOVER)?;
        let fd_store = Some(std::mem::take(&mut handover.fd_store));
        Ok(Self { config: handover.vm_config()?, handover, fd_store })
    }
}

/// A state whose vCPUs can go ahead of the rest, as they are on the longest way.
pub(crate) struct Opened<'a> {
    reader: StateReader<'a>,
    vcpus: Vec<EncodedVcpu>,
    count: usize,
}

impl<'a> Opened<'a> {
    pub(crate) fn new(mut reader: StateReader<'a>) -> Result<Self, MachineError> {
        let vcpus = state::take_vcpus(&mut reader)?;
        Ok(Self { reader, count: vcpus.len(), vcpus })
    }

    /// In order of their index; none the second time.
    pub(crate) fn take_vcpus(&mut self) -> Vec<EncodedVcpu> {
        std::mem::take(&mut self.vcpus)
    }

    /// Decodes everything else; nothing is claimed or created. A section that is left over is an error.
    /// `ahead`: a handover that has come before, for a state without one.
    pub(crate) fn decode(self, ahead: Option<Beside>) -> Result<Saved, MachineError> {
        let Self { mut reader, vcpus: _, count } = self;
        let beside = match ahead {
            Some(ahead) if !reader.has(NAME) => ahead,
            _ => Beside::take(&mut reader)?,
        };
        let machine = beside.handover.booted.then(|| MachineState::decode(&mut reader, count)).transpose()?;
        reader.finish()?;
        Ok(Saved { beside, machine })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What makes an update of one step, and the way back later, possible at all.
    #[test]
    fn every_section_can_go_a_step_there_and_back() {
        for format in formats() {
            let Format { kind, version, .. } = format;
            assert!((version - 1..=version + 1).all(|found| format.can_read(found)), "'{kind}', version {version}");
        }
    }
}
