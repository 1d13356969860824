//! vCPUs and their threads in the saved state.

use serde::{Deserialize, Serialize};
use theseus_devices::migratable::handles_name;
use theseus_hypervisor::{Vcpu, VcpuHandles, VcpuState};
use theseus_resources::state::{Encoded, StateError};

use super::VcpuError;
use super::placement::Placement;

/// Encoded and decoded by the thread of the vCPU, in parallel with the others.
pub(crate) struct EncodedVcpu {
    pub state: Encoded<VcpuState>,
    pub handles: Encoded<VcpuHandles>,
}

impl EncodedVcpu {
    pub(crate) fn new(index: u32, state: &VcpuState, handles: &VcpuHandles) -> Result<Self, VcpuError> {
        let name = section(index as usize);
        let failed = |source: StateError| VcpuError::State { index, source };
        let handles = Encoded::new(handles_name(&name), handles).map_err(failed)?;
        Ok(Self { state: Encoded::new(name, state).map_err(failed)?, handles })
    }

    /// Those of the vCPU of this index.
    pub(crate) fn decode(&self, index: u32) -> Result<(VcpuState, VcpuHandles), VcpuError> {
        let failed = |source| VcpuError::State { index, source };
        let (state, handles) = (self.state.decode().map_err(failed)?, self.handles.decode().map_err(failed)?);
        state.is_foreign(index).map_or(Ok((state, handles)), |reason| Err(VcpuError::Foreign { index, reason }))
    }
}

pub(crate) struct SavedVcpu {
    pub encoded: EncodedVcpu,
    /// As in the handles.
    pub tsc_offset: u64,
    /// Why KVM would not take it back.
    pub refused: Vec<String>,
}

/// The name of the section with the state.
pub(crate) fn section(index: usize) -> String {
    format!("vcpu{index}")
}

/// [`Placement`].
#[derive(Serialize, Deserialize)]
pub(crate) struct PlacementHandles {
    /// The kernel's CPU mask, in bytes; empty if unknown.
    #[serde(with = "serde_bytes")]
    affinity: Vec<u8>,
    /// SCHED_*
    policy: i32,
    /// Of the realtime policies.
    priority: i32,
    nice: i32,
    /// Path below /sys/fs/cgroup of the thread's own (threaded, v2) cgroup, where it is not that of the process.
    cgroup: Option<String>,
}

impl From<Placement> for PlacementHandles {
    fn from(placement: Placement) -> Self {
        let Placement { affinity, policy, priority, nice, cgroup } = placement;
        Self { affinity, policy, priority, nice, cgroup }
    }
}

impl From<PlacementHandles> for Placement {
    fn from(handles: PlacementHandles) -> Self {
        let PlacementHandles { affinity, policy, priority, nice, cgroup } = handles;
        Self { affinity, policy, priority, nice, cgroup }
    }
}

/// Does what a save and a restore will do in the pause of an update, for the first time in this process: the code and
/// the heap that it needs are there then.
pub(crate) fn warm(vcpu: &Vcpu) {
    let warm = |(state, handles): &(Box<_>, _)| EncodedVcpu::new(vcpu.index(), state, handles)?.decode(vcpu.index());
    std::hint::black_box(vcpu.fresh().map(warm));
}
