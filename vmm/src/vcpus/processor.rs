//! What a vCPU's thread works on. It has it locked whenever it does something: another thread may save it while it
//! waits for a command, or is dead.

use theseus_hypervisor::vcpu::reasons;
use theseus_hypervisor::{ReadyVm, Vcpu};

use super::VcpuError;
use super::owed::Owed;
use super::saved::{EncodedVcpu, SavedVcpu};

pub(super) struct Processor {
    pub index: u32,
    pub vcpu: Vcpu,
    pub vm: ReadyVm,
    pub owed: Owed,
}

impl Processor {
    pub(super) fn save(&self) -> Result<SavedVcpu, VcpuError> {
        let index = self.index;
        let (mut state, handles) = self.vcpu.save().map_err(|source| VcpuError::Hypervisor { index, source })?;
        state.owed.clone_from(&self.owed.0);
        let refused = reasons(&state, &self.vm.memory());
        let encoded = EncodedVcpu::new(index, &state, &handles)?;
        Ok(SavedVcpu { encoded, tsc_offset: handles.tsc_offset, refused })
    }
}
