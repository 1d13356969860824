//! A vCPU's section of the saved state.

use theseus_hypervisor::VcpuState;
use theseus_resources::state::Encoded;

use super::VcpuError;

/// Encoded and decoded by the thread of the vCPU, in parallel with the others.
pub type EncodedVcpu = Encoded<VcpuState>;

pub struct SavedVcpu {
    pub state: EncodedVcpu,
    /// Why KVM would not take it back.
    pub refused: Vec<String>,
}

/// The name of that section.
pub fn section(index: usize) -> String {
    format!("vcpu{index}")
}

/// The state of the vCPU of this index.
pub fn decode(encoded: &EncodedVcpu, index: u32) -> Result<VcpuState, VcpuError> {
    let state = encoded.decode().map_err(|source| VcpuError::State { index, source })?;
    state.is_foreign(index).map_or(Ok(state), |reason| Err(VcpuError::Foreign { index, reason }))
}
