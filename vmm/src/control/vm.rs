//! The VM's life as the API sees it.

use theseus_api::types::{VmConfig, VmState};

use crate::machine::Machine;

/// ```text
///   None --create--> Created --boot--> Booted (Running or Paused) --shutdown--> ShutDown --boot--> Booted
///     ^                 '----delete-------+--------------------------------------'
/// ```
pub(crate) enum Vm {
    None,
    Created(VmConfig),
    Booted { machine: Box<Machine>, config: VmConfig },
    ShutDown(VmConfig),
}

impl Vm {
    pub(crate) fn machine(&self) -> Option<&Machine> {
        if let Self::Booted { machine, .. } = self { Some(machine) } else { None }
    }

    pub(crate) fn machine_mut(&mut self) -> Option<&mut Machine> {
        if let Self::Booted { machine, .. } = self { Some(machine) } else { None }
    }

    pub(crate) fn config(&self) -> Option<&VmConfig> {
        match self {
            Self::None => None,
            Self::Created(config) | Self::ShutDown(config) | Self::Booted { config, .. } => Some(config),
        }
    }

    /// None where there is no VM.
    pub(crate) fn state(&self) -> Option<VmState> {
        match self {
            Self::None => None,
            Self::Created(_) => Some(VmState::Created),
            Self::Booted { machine, .. } if machine.vcpus.is_running() => Some(VmState::Running),
            Self::Booted { .. } => Some(VmState::Paused),
            Self::ShutDown(_) => Some(VmState::Shutdown),
        }
    }
}
