//! The PCI host bridge: its function in slot 0, and the two mechanisms by which vCPUs reach configuration spaces.

pub(crate) mod config_access;
mod ecam;
pub mod function;
