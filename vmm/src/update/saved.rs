//! The whole saved state: what the update itself hands over, and the machine.

use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};
use theseus_api::types::{BuildInfo, VmConfig};
use theseus_resources::vault::Record;
use theseus_resources::{Slot, StateReader, StateWriter};

use crate::log_config::LogConfig;
use crate::machine::MachineError;
use crate::machine::state::{self, MachineState};
use crate::supervisor::Supervisor;

const HANDOVER: (&str, u16) = ("handover", 1);

/// What the new image needs beside the machine.
#[derive(Serialize, Deserialize)]
pub struct Handover {
    /// Every kept fd.
    pub vault: Vec<Record>,
    pub from: BuildInfo,
    /// The target, for a report of the way back.
    #[serde(default)]
    pub to: BuildInfo,
    /// The binary that is running now, kept for the way back.
    pub old_binary: Slot,
    #[serde(default)]
    pub supervisor: Supervisor,
    #[serde(default)]
    pub events: Option<Slot>,
    /// How this process logs: parsing the command line again would cost a part of the pause.
    pub log: LogConfig,
    pub timeline: Slot,
    pub kvm: Slot,
    /// Lets the parked helper go.
    pub release: Slot,
    pub api: Option<ApiSlots>,
    /// The configuration of a VM that is created or shut down, but not booted.
    pub config: Option<VmConfig>,
    /// Whether there is a machine in this state.
    pub booted: bool,
    /// Whether the VM was shut down, rather than not booted yet.
    pub was_shut_down: bool,
}

#[derive(Serialize, Deserialize)]
pub struct ApiSlots {
    pub listener: Slot,
    /// Connections that stand between two requests.
    pub idle: Vec<Slot>,
    /// The one that waits for the answer to this update.
    pub caller: Option<Slot>,
}

/// (kind, version) of every section that this build writes. It reads the versions before and after them too.
pub fn versions() -> Vec<(&'static str, u16)> {
    let devices = theseus_devices::catalogue::supported();
    [HANDOVER].into_iter().chain(state::VERSIONS.iter().copied()).chain(devices).collect()
}

pub struct Saved {
    pub handover: Handover,
    pub machine: Option<MachineState>,
}

impl Handover {
    pub fn encode(&self, writer: &mut StateWriter) -> Result<(), MachineError> {
        Ok(writer.add("handover", HANDOVER.0, HANDOVER.1, self)?)
    }
}

impl Saved {
    /// Decodes everything; nothing is claimed or created. A section that is left over is an error.
    pub fn decode(mut reader: StateReader) -> Result<Self, MachineError> {
        let handover: Handover = reader.take("handover", HANDOVER.0, HANDOVER.1)?;
        let machine = handover.booted.then(|| MachineState::decode(&mut reader)).transpose()?;
        reader.finish()?;
        Ok(Self { handover, machine })
    }
}

/// The whole of a state's memfd; its offset stays where it is, as others read it too.
pub fn read(fd: BorrowedFd<'_>) -> std::io::Result<Vec<u8>> {
    let size = rustix::fs::fstat(fd)?.st_size;
    let mut bytes = vec![0; usize::try_from(size).map_err(std::io::Error::other)?];
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pread(fd, &mut bytes[done..], done as u64)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    Ok(bytes)
}
