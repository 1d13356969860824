//! VFIO passthrough: physical PCI devices in the guest, and what it takes to keep them running while the VMM is
//! replaced.
//!
//! | file | what |
//! |---|---|
//! | [`registry`] | [`Passthrough`]: all DMA domains and groups of a VM, and the update's steps over them |
//! | [`dma`] | [`DmaDomain`]: what devices reach, and what becomes of it in an update |
//! | [`group`], [`device`] | the fds of groups and devices |
//! | [`pci`] | [`VfioPci`]: the device on the guest's bus |
//! | [`config`], [`bars`] | its configuration space and its BARs |
//! | [`signals`] | its MSI-X and VFIO's in line |
//! | [`wiring`] | what a device is wired to in this process |
//! | [`sysfs`] | what this host says of a device |
//! | [`saved`] | all of it in the saved state |
//!
//! The fds are the device: a group can be opened only once, so they go over to the new VMM in the FdStore, and it
//! builds its objects around them without asking the kernel for anything. Hence dropping any of these objects only
//! closes fds.
//!
//! Written on raw ioctls: the objects of the `vfio-ioctls` crate cannot be built again from fds, and detach when
//! dropped.

mod bars;
mod config;
mod device;
mod dma;
#[cfg(any(test, feature = "fakes"))]
pub mod fake;
mod group;
mod ioctl;
mod pci;
mod registry;
pub mod saved;
mod signals;
mod sysfs;
mod wiring;

pub use bars::unmap_bars;
pub use dma::invalidate::{InvalidateError, Invalidated, invalidate_all, remap_all};
pub use dma::{DmaDomain, DmaError, DmaMap, MapSource};
pub use pci::{VfioPci, VfioPciParts};
pub use registry::{AttachError, DeviceConfig, Passthrough};
pub use wiring::Wiring;
