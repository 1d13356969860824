//! What of a domain is saved.

use serde::{Deserialize, Serialize};
use theseus_resources::Slot;

/// What a DMA mapping points to: how the next image finds the same pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MapSource {
    /// Guest RAM: the iova is the guest physical address.
    Ram,
    /// A passed-through BAR (peer-to-peer), `offset` bytes into VFIO region `region` of `device`.
    Bar { device: String, region: u32, offset: u64 },
}

/// One mapping as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DmaMap {
    pub iova: u64,
    pub size: u64,
    /// In the image that mapped or remapped it last.
    pub vaddr: u64,
    /// `VFIO_DMA_MAP_FLAG_*`
    pub flags: u32,
    pub source: MapSource,
}

/// A container in the saved state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerState {
    pub(super) name: String,
    pub(super) slot: Slot,
    pub(super) maps: Vec<DmaMap>,
}

/// What a domain is in the saved state, by the way it was made.
pub enum DomainState {
    Type1(ContainerState),
}
