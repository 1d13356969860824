//! What is mapped in a domain.

use crate::vfio::saved::{MapHandles, SourceHandles};

/// What a DMA mapping points to: how the next image finds the same pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapSource {
    /// Guest RAM: the iova is the guest physical address.
    Ram,
    /// A passed-through BAR (peer-to-peer), `offset` bytes into VFIO region `region` of `device`.
    Bar {
        /// Its id in this VM.
        device: String,
        /// The BAR's index.
        region: u32,
        /// In bytes.
        offset: u64,
    },
}

/// One mapping as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// The first address by which devices reach it.
    pub iova: u64,
    /// In bytes.
    pub size: u64,
    /// In this image; 0 before [`super::DmaDomain::remap`].
    pub vaddr: u64,
    /// `VFIO_DMA_MAP_FLAG_*`
    pub flags: u32,
    /// How its pages are found again.
    pub source: MapSource,
}

impl DmaMap {
    pub(super) fn save(&self) -> MapHandles {
        let Self { iova, size, vaddr: _, flags, source } = self.clone();
        let source = match source {
            MapSource::Ram => SourceHandles::Ram,
            MapSource::Bar { device, region, offset } => SourceHandles::Bar { device, region, offset },
        };
        MapHandles { iova, size, flags, source }
    }

    pub(super) fn restore(handles: MapHandles) -> Self {
        let MapHandles { iova, size, flags, source } = handles;
        let source = match source {
            SourceHandles::Ram => MapSource::Ram,
            SourceHandles::Bar { device, region, offset } => MapSource::Bar { device, region, offset },
        };
        Self { iova, size, vaddr: 0, flags, source }
    }
}
