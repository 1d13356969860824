//! What a vCPU's thread works on. It has it locked whenever it does something: another thread may save or restore it
//! while it waits for a command, or is dead.

use theseus_hypervisor::vcpu::reasons;
use theseus_hypervisor::{ReadyVm, Vcpu, VcpuState};

use super::VcpuError;
use super::owed::Owed;
use super::saved::{EncodedVcpu, SavedVcpu};

pub(super) struct Processor {
    pub index: u32,
    pub vcpu: Vcpu,
    pub vm: ReadyVm,
    pub owed: Owed,
    /// Of which the late part is still to be restored.
    early: Option<VcpuState>,
}

impl Processor {
    pub(super) fn new(index: u32, vcpu: Vcpu, vm: ReadyVm) -> Self {
        Self { index, vcpu, vm, owed: Owed::default(), early: None }
    }

    pub(super) fn save(&self) -> Result<SavedVcpu, VcpuError> {
        let (mut state, handles) = self.vcpu.save().map_err(|source| self.error(source))?;
        state.owed.clone_from(&self.owed.0);
        let refused = reasons(&state, &self.vm.memory());
        let encoded = EncodedVcpu::new(self.index, &state, &handles)?;
        Ok(SavedVcpu { encoded, tsc_offset: handles.tsc_offset, refused })
    }

    pub(super) fn restore_early(&mut self, encoded: &EncodedVcpu) -> Result<(), VcpuError> {
        let (mut state, handles) = encoded.decode(self.index)?;
        self.owed.0 = std::mem::take(&mut state.owed);
        let state = self.early.insert(state);
        let restored = self.vcpu.restore_early(state, &handles);
        restored.map_err(|source| self.error(source))
    }

    /// Once the VM's clock is set.
    pub(super) fn restore_late(&mut self) -> Result<(), VcpuError> {
        let Some(state) = self.early.take() else { return Ok(()) };
        let restored = self.vcpu.restore_late(&state).and_then(|()| {
            // A kick too many is legal, one too few a guest that waits for a spin lock for ever.
            if state.may_have_been_kicked() { self.vm.kick_halted(self.index) } else { Ok(()) }
        });
        restored.map_err(|source| self.error(source))
    }

    fn error(&self, source: theseus_hypervisor::Error) -> VcpuError {
        VcpuError::Hypervisor { index: self.index, source }
    }
}
