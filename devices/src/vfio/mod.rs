//! VFIO passthrough: physical PCI devices in the guest, and what it takes to keep them running while the VMM is
//! replaced.
//!
//! | file | what |
//! |---|---|
//! | [`registry`] | [`Passthrough`]: all containers and groups of a VM, and the update's steps over them |
//! | [`container`] | [`Container`]: an IOMMU domain and the list of its DMA mappings |
//! | [`invalidate`] | making way for the next image's addresses, with its undo |
//! | [`group`], [`device`] | the fds of groups and devices |
//! | [`pci`] | [`VfioPci`]: the device on the guest's bus |
//! | [`config`], [`bars`] | its configuration space and its BARs |
//! | [`signals`] | its MSI-X and VFIO's in line |
//! | [`wiring`] | what a device is wired to in this process |
//!
//! The fds are the device: a group can be opened only once, so they go over to the new VMM in the FdStore, and it builds
//! its objects around them without asking the kernel for anything. Hence dropping any of these objects only closes fds.
//!
//! Written on raw ioctls: the objects of the `vfio-ioctls` crate cannot be built again from fds, and detach when
//! dropped.

pub mod bars;
pub mod config;
pub mod container;
pub mod device;
pub mod group;
pub mod invalidate;
mod ioctl;
pub mod pci;
pub mod registry;
mod signals;
mod wiring;

pub use bars::unmap_bars;
pub use container::{Container, ContainerError, DmaMap, MapSource, RamRange};
pub use group::Group;
pub use invalidate::{InvalidateError, Invalidated, invalidate_all};
pub use pci::{VfioPci, VfioPciParts, VfioPciState};
pub use registry::{AttachError, DeviceConfig, Passthrough, PassthroughState};
pub use wiring::{PassthroughError, Wiring};
