//! All that the guest sees on a bus: legacy devices, PCI, VFIO passthrough. A folder (or file) per device.

pub mod bus;
pub mod catalogue;
#[cfg(feature = "test-devices")]
mod counting;
pub mod device;
pub mod host_bridge;
pub mod interrupt;
pub mod legacy;
pub mod migratable;
pub mod pci;
mod rate_limited_log;
pub mod set;
pub mod spec;
pub mod turn;
pub mod vfio;
