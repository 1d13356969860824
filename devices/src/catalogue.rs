//! Every kind of device there is, in one place: what this build can make at a boot and take over is derived from it.
//!
//! An entry is a type that implements [`Catalogued`], and so [`Migratable`]: a device that cannot be saved does not
//! compile into the catalogue. A new device is its own folder, and a line here.

use std::sync::Arc;

use theseus_resources::state::StateError;
use theseus_resources::{Claims, StateReader};

use crate::device::{Catalogued, Device, DeviceError, Surroundings};
use crate::host_bridge::{config_access::PciConfigAccess, function::HostBridge};
use crate::legacy::{cmos::Cmos, i8042::I8042, pm::Pm, serial::SerialDevice};
use crate::migratable::{Migratable, MigrateError};
use crate::spec::Spec;
use crate::vfio::{Passthrough, VfioPci};

/// In the order in which a machine gets them.
pub const DEVICES: &[Entry] = &[
    entry::<Cmos>(),
    entry::<I8042>(),
    entry::<Pm>(),
    entry::<SerialDevice>(),
    entry::<PciConfigAccess>(),
    entry::<HostBridge>(),
    #[cfg(feature = "test-devices")]
    entry::<crate::counting::Counting>(),
];

/// (kind, version) of the section that lists the others.
pub const MANIFEST: (&str, u16) = ("device-manifest", 1);

/// Kinds that are made ready before the guest stands still, and have their own order (vmm/src/machine/passthrough.rs).
const PASSTHROUGH: &[(&str, u16)] = &[of::<Passthrough>(), of::<VfioPci>()];

/// A device whose state was read, and which is not made yet.
pub trait Decoded {
    fn restore(
        self: Box<Self>,
        around: &Surroundings<'_>,
        claims: &mut Claims,
    ) -> Result<Arc<dyn Device>, MigrateError>;
}

struct State<D: Migratable>(D::State);

impl<D: Catalogued> Decoded for State<D> {
    fn restore(
        self: Box<Self>,
        around: &Surroundings<'_>,
        claims: &mut Claims,
    ) -> Result<Arc<dyn Device>, MigrateError> {
        Ok(D::restore(self.0, D::parts(around, claims))?.share())
    }
}

/// Devices by name.
type Named = Vec<(String, Arc<dyn Device>)>;
type Boot = fn(&Spec, &Surroundings<'_>) -> Result<Named, DeviceError>;
type Decode = fn(&str, &mut StateReader<'_>) -> Result<Box<dyn Decoded>, StateError>;

pub struct Entry {
    /// The kind of its sections in the saved state.
    pub kind: &'static str,
    /// The version this build writes; it reads the one before and the one after as well.
    pub version: u16,
    pub boot: Boot,
    pub decode: Decode,
}

const fn entry<D: Catalogued + 'static>() -> Entry {
    Entry { kind: D::KIND, version: D::VERSION, boot: boot::<D>, decode: decode::<D> }
}

const fn of<D: Migratable>() -> (&'static str, u16) {
    (D::KIND, D::VERSION)
}

fn boot<D: Catalogued>(spec: &Spec, around: &Surroundings<'_>) -> Result<Named, DeviceError> {
    Ok(D::boot(spec, around)?.into_iter().map(|(name, device)| (name, device.share())).collect())
}

fn decode<D: Catalogued + 'static>(name: &str, reader: &mut StateReader<'_>) -> Result<Box<dyn Decoded>, StateError> {
    Ok(Box::new(State::<D>(reader.take(name, D::KIND, D::VERSION)?)))
}

/// (kind, version) of every section of a device that this build knows.
pub fn supported() -> Vec<(&'static str, u16)> {
    let devices = DEVICES.iter().map(|entry| (entry.kind, entry.version));
    devices.chain(PASSTHROUGH.iter().copied()).chain([MANIFEST]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn kinds_are_unique_and_versions_start_at_one() {
        let kinds: HashSet<_> = supported().into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds.len(), supported().len());
        assert!(supported().iter().all(|(kind, version)| !kind.is_empty() && *version >= 1));
    }
}
