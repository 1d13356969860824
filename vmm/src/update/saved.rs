//! The whole saved state: what the update itself hands over, and the machine.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
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
use crate::supervisor::SupervisorHandles;
use crate::vcpus::saved::EncodedVcpu;

const HANDOVER: Format = Format::new("handover", 3);

/// What the new VMM needs beside the machine: all of it this host's.
#[derive(Serialize, Deserialize)]
pub struct Handover {
    /// Every stored fd.
    pub fd_store: Vec<Record>,
    pub from: BuildHandles,
    /// How the target was named, which is where it looks for the next one.
    #[serde(default)]
    pub target: Option<PathBuf>,
    #[serde(default)]
    pub supervisor: SupervisorHandles,
    #[serde(default)]
    pub events: Option<Slot>,
    /// How this process logs: parsing the command line again would cost a part of the pause.
    pub log: LogHandles,
    pub kvm: Slot,
    pub api: Option<ApiSlots>,
    #[serde(default)]
    pub peers: PeersHandles,
    /// The configuration of the VM, if there is one: JSON as the API has it, which reads its own of earlier builds anyway.
    /// The machine does not know it.
    pub config: Option<String>,
    /// Whether there is a machine in this state.
    pub booted: bool,
    /// Whether the VM was shut down, rather than not booted yet.
    pub was_shut_down: bool,
}

/// Which build has written the state.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct BuildHandles {
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
pub struct ApiSlots {
    pub listener: Slot,
    /// Connections that stand between two requests.
    pub idle: Vec<Slot>,
    /// The one that waits for the answer to this update.
    pub caller: Option<Slot>,
}

/// Of every section that this build writes.
pub fn kinds() -> Vec<Kind> {
    let devices = theseus_devices::catalogue::kinds();
    [Kind::of::<Handover>(HANDOVER)].into_iter().chain(state::KINDS.iter().copied()).chain(devices).collect()
}

pub fn formats() -> Vec<Format> {
    kinds().into_iter().map(|kind| kind.format).collect()
}

/// A saved state as this build takes it: every section read and written again.
pub fn reread(reader: &StateReader<'_>) -> Result<Vec<u8>, StateError> {
    let kinds = kinds();
    let mut writer = StateWriter::new(reader.build_id());
    for section in reader.sections() {
        let unknown = || StateError::Section { name: section.name.to_string(), reason: "is of an unknown kind".into() };
        let kind = kinds.iter().find(|kind| kind.format.kind == section.kind).ok_or_else(unknown)?;
        writer.add_encoded((kind.reread)(section)?, &kind.format)?;
    }
    writer.finish()
}

pub struct Saved {
    pub handover: Handover,
    pub config: Option<VmConfig>,
    pub machine: Option<MachineState>,
}

impl Handover {
    pub fn new(
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

    pub fn encode(&self, writer: &mut StateWriter) -> Result<(), MachineError> {
        Ok(writer.add("handover", &HANDOVER, self)?)
    }
}

fn wrong_config(error: impl std::fmt::Display) -> StateError {
    StateError::Section { name: "handover".into(), reason: format!("config: {error}") }
}

/// A state whose vCPUs can go ahead of the rest, as they are on the longest way.
pub struct Opened<'a> {
    reader: StateReader<'a>,
    vcpus: Vec<EncodedVcpu>,
    count: usize,
}

impl<'a> Opened<'a> {
    pub fn new(mut reader: StateReader<'a>) -> Result<Self, MachineError> {
        let vcpus = state::take_vcpus(&mut reader)?;
        Ok(Self { reader, count: vcpus.len(), vcpus })
    }

    /// In order of their index; none the second time.
    pub fn take_vcpus(&mut self) -> Vec<EncodedVcpu> {
        std::mem::take(&mut self.vcpus)
    }

    /// Decodes everything else; nothing is claimed or created. A section that is left over is an error.
    pub fn decode(self) -> Result<Saved, MachineError> {
        let Self { mut reader, vcpus: _, count } = self;
        let (_, handover): (_, Handover) = reader.take("handover", &HANDOVER)?;
        let machine = handover.booted.then(|| MachineState::decode(&mut reader, count)).transpose()?;
        reader.finish()?;
        Ok(Saved { config: handover.vm_config()?, handover, machine })
    }
}

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::WRITE);

/// A memfd for a state that is still to come, made before the pause: most of its cost is its pages.
pub struct Blank(File);

impl Blank {
    /// `name`: in /proc; `room`: how many bytes it will be, about.
    pub fn new(name: &str, room: usize) -> std::io::Result<Self> {
        let memfd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        if room > 0 {
            rustix::fs::fallocate(&memfd, FallocateFlags::empty(), 0, room as u64)?;
        }
        Ok(Self(memfd.into()))
    }

    /// With these bytes, that nobody can change any more.
    pub fn seal(&self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_all_at(bytes, 0)?;
        rustix::fs::ftruncate(&self.0, bytes.len() as u64)?;
        Ok(rustix::fs::fcntl_add_seals(&self.0, SEALS | SealFlags::SEAL)?)
    }
}

impl AsFd for Blank {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A memfd with these bytes.
pub fn seal(name: &str, bytes: &[u8]) -> std::io::Result<OwnedFd> {
    let blank = Blank::new(name, bytes.len())?;
    blank.seal(bytes)?;
    Ok(blank.0.into())
}

/// The bytes of a sealed memfd. Read rather than mapped: to unmap it would interrupt every CPU that runs a thread of this
/// process. Refuses what is not sealed: its bytes could change, or end, under us.
pub fn unseal(fd: BorrowedFd<'_>) -> std::io::Result<Vec<u8>> {
    if !rustix::fs::fcntl_get_seals(fd)?.contains(SEALS) {
        return Err(std::io::Error::other("its memfd is not sealed"));
    }
    let len = usize::try_from(rustix::fs::fstat(fd)?.st_size).map_err(std::io::Error::other)?;
    let mut bytes = vec![0; len];
    // Its offset is where its writer has left it.
    File::from(fd.try_clone_to_owned()?).read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
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

    #[test]
    fn what_is_sealed_is_read_back() {
        let fd = seal("state", &[7; 5000]).unwrap();
        assert_eq!(unseal(fd.as_fd()).unwrap(), [7; 5000]);
        assert!(rustix::io::write(&fd, &[1]).is_err());
        let open = rustix::fs::memfd_create("t", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(unseal(open.as_fd()).is_err(), "nobody promises that it stays as it is");
        assert!(unseal(seal("state", &[]).unwrap().as_fd()).unwrap().is_empty());
        let blank = Blank::new("state", 10_000).unwrap();
        blank.seal(&[1, 2]).unwrap();
        assert_eq!(unseal(blank.as_fd()).unwrap(), [1, 2]);
        assert!(blank.seal(&[3]).is_err(), "once only");
    }
}
