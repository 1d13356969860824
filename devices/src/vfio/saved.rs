//! Passed-through devices in the saved state. What the guest sees of one is its state; VFIO itself, with all that was
//! asked of the kernel when a device was opened, is handles.

use serde::{Deserialize, Serialize};
use theseus_resources::Slot;
use theseus_resources::state::Format;

use crate::migratable::{HostHandles, MigrateError};
use crate::pci::saved::{BarRegisterState, ConfigSpaceState, DecodingState, MsixHandles, MsixLayoutState, MsixState};

/// What the guest sees of a [`super::VfioPci`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VfioPciState {
    /// Its name in this VM.
    pub(super) id: String,
    pub(super) config: FilterState,
    pub(super) layout: MsixLayoutState,
    pub(super) msix: MsixState,
    pub(super) bars: Vec<BarState>,
    pub(super) decoding: DecodingState,
}

/// [`super::config::ConfigFilter`]: the guest's view is carried, not computed again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FilterState {
    pub space: ConfigSpaceState,
    /// Where the MSI-X capability is.
    pub msix: u16,
    /// Where the power management capability is, if there is one.
    pub pm: Option<u16>,
}

/// What the guest sees of a [`super::bars::Bar`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BarState {
    pub(super) register: BarRegisterState,
    /// Where it is before the guest; None: it does not decode.
    pub(super) address: Option<u64>,
}

/// What this host has of a [`super::VfioPci`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VfioPciHandles {
    /// Its number.
    pub(super) group: u32,
    pub(super) device: DeviceHandles,
    pub(super) msix: MsixHandles,
    /// In the order of the state's.
    pub(super) bars: Vec<BarHandles>,
}

/// [`super::device::VfioDevice`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DeviceHandles {
    /// Its PCI address on the host.
    pub bdf: String,
    pub fd: Slot,
    /// Regions 0 to 5.
    pub bars: Vec<RegionHandles>,
    pub config: RegionHandles,
    /// MSI-X vectors that the device has.
    pub vectors: u32,
    /// VFIO has MSI-X on.
    pub signals: bool,
}

/// [`super::device::Region`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RegionHandles {
    pub index: u32,
    /// Bytes; 0: the device does not have it.
    pub size: u64,
    /// Where it starts in the device file.
    pub offset: u64,
    /// What may be mapped, as (offset in the region, size), in order.
    pub mappable: Vec<(u64, u64)>,
}

/// What VFIO and the DMA domain have of a [`super::bars::Bar`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BarHandles {
    /// The index of VFIO's region for it.
    pub(super) region: u32,
    /// iovas of the peer-to-peer mappings in the domain, while it is before the guest.
    pub(super) dma: Vec<u64>,
    /// Those that could not be taken away when the BAR was.
    pub(super) leftover_dma: Vec<u64>,
}

/// [`super::Passthrough`]: containers with what is mapped in them, and groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassthroughHandles {
    pub(super) containers: Vec<ContainerHandles>,
    pub(super) groups: Vec<GroupHandles>,
}

/// A DMA domain, by the way it was made.
pub enum DomainHandles {
    /// [`super::dma::type1`]
    Type1(ContainerHandles),
}

/// [`super::dma::type1::Container`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerHandles {
    /// As devices name it.
    pub(super) name: String,
    pub(super) fd: Slot,
    /// Just as they were made: the kernel takes a new address for nothing else.
    pub(super) maps: Vec<MapHandles>,
}

/// [`super::DmaMap`]. Its address here is nothing to the next image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MapHandles {
    pub iova: u64,
    /// In bytes.
    pub size: u64,
    /// `VFIO_DMA_MAP_FLAG_*`
    pub flags: u32,
    pub source: SourceHandles,
}

/// [`super::MapSource`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum SourceHandles {
    Ram,
    Bar { device: String, region: u32, offset: u64 },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct GroupHandles {
    /// Of the IOMMU group on the host.
    pub number: u32,
    pub fd: Slot,
    /// The name of the one that it is in.
    pub container: String,
}

impl HostHandles for VfioPciHandles {
    const FORMAT: Format = Format::new("vfio-pci-handles", 1);

    fn upgrade(_: u16, handles: Self) -> Result<Self, MigrateError> {
        Ok(handles)
    }
}

impl HostHandles for PassthroughHandles {
    const FORMAT: Format = Format::new("vfio-handles", 1);

    fn upgrade(_: u16, handles: Self) -> Result<Self, MigrateError> {
        Ok(handles)
    }
}
