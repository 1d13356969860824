//! Every kind of device there is, in one place: what this build can take over is derived from it.
//!
//! An entry is a type that implements [`Migratable`]: a device that cannot be saved does not compile into the catalogue.

use crate::legacy::{cmos::Cmos, i8042::I8042, pm::Pm, serial::SerialDevice};
use crate::migratable::Migratable;
use crate::pci::{config_access::PciConfigAccess, host_bridge::HostBridge};
use crate::vfio::{Passthrough, VfioPci};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The section's kind in the saved state.
    pub kind: &'static str,
    /// The version this build writes; it reads the one before and the one after as well.
    pub version: u16,
}

const fn entry<D: Migratable>() -> Entry {
    Entry { kind: D::KIND, version: D::VERSION }
}

pub const CATALOGUE: &[Entry] = &[
    entry::<SerialDevice>(),
    entry::<Cmos>(),
    entry::<I8042>(),
    entry::<Pm>(),
    entry::<HostBridge>(),
    entry::<PciConfigAccess>(),
    entry::<Passthrough>(),
    entry::<VfioPci>(),
];

/// (kind, version) of every device this build knows.
pub fn supported() -> Vec<(&'static str, u16)> {
    CATALOGUE.iter().map(|entry| (entry.kind, entry.version)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn kinds_are_unique_and_versions_start_at_one() {
        let kinds: HashSet<_> = CATALOGUE.iter().map(|entry| entry.kind).collect();
        assert_eq!(kinds.len(), CATALOGUE.len());
        assert!(supported().iter().all(|(kind, version)| !kind.is_empty() && *version >= 1));
    }
}
