//! The state of the running guest, for whoever is to take it over.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use theseus_resources::state::StateError;
use theseus_resources::{StateWriter, StoredFd};

use super::UpdateContext;
use super::preflight::Requirements;
use super::saved::Handover;
use super::sealed;
use crate::build_info;
use crate::machine::MachineError;
use crate::machine::state::SaveScope;

/// What the target is rehearsed with, and the new VMM makes itself ready with.
pub(crate) struct Rehearsed {
    pub state: OwnedFd,
    pub bytes: Vec<u8>,
    /// For the true state, in bytes, about.
    pub room: usize,
    /// The stored fds that the state names, in the same order.
    pub fds: Vec<StoredFd>,
}

/// Why the state of the running guest cannot be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotRehearsed {
    #[error("the present state cannot be saved: {0}")]
    Machine(#[from] MachineError),
    #[error("the present state cannot be saved: {0}")]
    State(#[from] StateError),
    #[error("the present state cannot be saved: cannot keep it: {0}")]
    NotKept(#[from] std::io::Error),
}

/// A vCPU's part of a state, in bytes, about.
const VCPU: usize = 16 << 10;

/// The state as it is now, with the guest running: all of it but the vCPUs.
pub(super) fn rehearse(subject: &UpdateContext<'_>, needs: &Requirements) -> Result<Rehearsed, NotRehearsed> {
    let mut writer = StateWriter::new(&build_info::this().build_id);
    if let Some(machine) = &subject.machine {
        let scope = SaveScope::DryRun(needs.placements.clone());
        machine.save_frame(&mut writer, scope, machine.vcpus.is_running())?;
        machine.save(&mut writer, None)?;
    }
    // Afterwards: a guest that has MSI-X made just now has its eventfds in the state.
    let (records, fds) = subject.host.fd_store.offer(&BTreeSet::new());
    Handover::new(subject, None, records, None)?.encode(&mut writer)?;
    let bytes = writer.finish()?;
    let room = bytes.len() + needs.placements.len() * VCPU;
    Ok(Rehearsed { state: sealed::seal("rehearsal", &bytes)?, bytes, room, fds })
}
