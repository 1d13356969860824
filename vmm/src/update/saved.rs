//! The whole saved state: what the update itself hands over, and the machine.

use std::fs::File;
use std::io::Write;
use std::ops::Deref;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};
use theseus_api::access::Peers;
use theseus_api::types::{BuildInfo, VmConfig};
use theseus_resources::vault::Record;
use theseus_resources::{Slot, StateReader, StateWriter};

use crate::logging::LogConfig;
use crate::machine::MachineError;
use crate::machine::state::{self, MachineState};
use crate::supervisor::Supervisor;

const HANDOVER: (&str, u16) = ("handover", 3);

/// What the new VMM needs beside the machine.
#[derive(Serialize, Deserialize)]
pub struct Handover {
    /// Every kept fd.
    pub vault: Vec<Record>,
    pub from: BuildInfo,
    /// How the target was named, which is where it looks for the next one.
    #[serde(default)]
    pub target: Option<PathBuf>,
    #[serde(default)]
    pub supervisor: Supervisor,
    #[serde(default)]
    pub events: Option<Slot>,
    /// How this process logs: parsing the command line again would cost a part of the pause.
    pub log: LogConfig,
    pub kvm: Slot,
    pub api: Option<ApiSlots>,
    #[serde(default)]
    pub peers: Peers,
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
    pub fn decode(mut reader: StateReader<'_>) -> Result<Self, MachineError> {
        let handover: Handover = reader.take("handover", HANDOVER.0, HANDOVER.1)?;
        let machine = handover.booted.then(|| MachineState::decode(&mut reader)).transpose()?;
        reader.finish()?;
        Ok(Self { handover, machine })
    }
}

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::WRITE);

/// A memfd with these bytes, that nobody can change any more. `name`: in /proc.
pub fn seal(name: &str, bytes: &[u8]) -> std::io::Result<OwnedFd> {
    let memfd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(memfd);
    file.write_all(bytes)?;
    rustix::fs::fcntl_add_seals(&file, SEALS | SealFlags::SEAL)?;
    Ok(file.into())
}

/// The bytes of a sealed memfd, mapped rather than read: neither copies nor page faults in an update's pause.
pub struct Sealed {
    bytes: NonNull<u8>,
    len: usize,
}

impl Sealed {
    /// Refuses what is not sealed: its bytes could change, or end, under us.
    pub fn map(fd: BorrowedFd<'_>) -> std::io::Result<Self> {
        if !rustix::fs::fcntl_get_seals(fd)?.contains(SEALS) {
            return Err(std::io::Error::other("its memfd is not sealed"));
        }
        let len = usize::try_from(rustix::fs::fstat(fd)?.st_size).map_err(std::io::Error::other)?;
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: a new mapping.
        let bytes = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ, flags, fd, 0) }?;
        Ok(Self { bytes: NonNull::new(bytes.cast()).ok_or(std::io::ErrorKind::OutOfMemory)?, len })
    }
}

impl Deref for Sealed {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped as long as self, and sealed, so that it neither changes nor ends.
        unsafe { std::slice::from_raw_parts(self.bytes.as_ptr(), self.len) }
    }
}

impl Drop for Sealed {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, not used afterwards.
        let _ = unsafe { rustix::mm::munmap(self.bytes.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_is_sealed_is_read_back() {
        let fd = seal("state", &[7; 5000]).unwrap();
        assert_eq!(&Sealed::map(fd.as_fd()).unwrap()[..], [7; 5000]);
        assert!(rustix::io::write(&fd, &[1]).is_err());
        let open = rustix::fs::memfd_create("t", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(Sealed::map(open.as_fd()).is_err(), "nobody promises that it stays as it is");
        assert!(Sealed::map(seal("state", &[]).unwrap().as_fd()).is_err(), "an empty one");
    }
}
