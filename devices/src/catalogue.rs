//! Every kind of device there is, in one place: what this build can make at a boot and take over is derived from it.
//!
//! An entry is a type that implements [`Catalogued`], and so [`migratable::Migratable`]: a device that cannot be saved
//! does not compile into the catalogue. A new device is its own folder, and a line here.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use theseus_resources::state::{Format, Kind, StateError};
use theseus_resources::{Claims, StateReader};

use crate::device::{Catalogued, Device, DeviceError, Surroundings};
use crate::host_bridge::{config_access::PciConfigAccess, function::HostBridge};
use crate::legacy::{cmos::Cmos, i8042::I8042, pm::Pm, serial::SerialDevice};
use crate::migratable::{self, Handles, MigrateError, Saved};
use crate::spec::Spec;
use crate::vfio::VfioPci;
use crate::vfio::saved::{PassthroughHandles, VfioPciHandles};

/// In the order in which a machine gets them.
pub(crate) const DEVICES: &[Entry] = &[
    entry::<Cmos>(),
    entry::<I8042>(),
    entry::<Pm>(),
    entry::<SerialDevice>(),
    entry::<PciConfigAccess>(),
    entry::<HostBridge>(),
    #[cfg(feature = "test-devices")]
    entry::<crate::counting::Counting>(),
];

/// Of the section that lists the others.
pub(crate) const MANIFEST: Format = Format::new("device-manifest", 1);

/// Which devices a guest has.
#[derive(Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) devices: Vec<Listed>,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Listed {
    /// The name of the device, and of its sections.
    pub(crate) name: String,
    pub(crate) kind: String,
}

/// Kinds that are made ready before the guest stands still, and have their own order (vmm/src/machine/passthrough.rs).
const PASSTHROUGH: &[Option<Kind>] =
    &[PassthroughHandles::KIND, Some(migratable::state_kind::<VfioPci>()), VfioPciHandles::KIND];

/// A device whose state was read, and which is not made yet.
pub(crate) trait Decoded {
    fn restore(
        self: Box<Self>,
        around: &Surroundings<'_>,
        claims: &mut Claims,
    ) -> Result<Arc<dyn Device>, MigrateError>;
}

impl<D: Catalogued> Decoded for Saved<D> {
    fn restore(
        self: Box<Self>,
        around: &Surroundings<'_>,
        claims: &mut Claims,
    ) -> Result<Arc<dyn Device>, MigrateError> {
        Ok(D::restore(*self, D::parts(around, claims))?.share())
    }
}

/// Devices by name.
type Named = Vec<(String, Arc<dyn Device>)>;
type Boot = fn(&Spec, &Surroundings<'_>) -> Result<Named, DeviceError>;
type Decode = fn(&str, &mut StateReader<'_>) -> Result<Box<dyn Decoded>, StateError>;

pub(crate) struct Entry {
    /// Of its sections in the saved state.
    pub(crate) state: Kind,
    pub(crate) handles: Option<Kind>,
    pub(crate) boot: Boot,
    pub(crate) decode: Decode,
}

const fn entry<D: Catalogued + 'static>() -> Entry {
    let (state, handles) = (migratable::state_kind::<D>(), D::Handles::KIND);
    Entry { state, handles, boot: boot::<D>, decode: decode::<D> }
}

fn boot<D: Catalogued>(spec: &Spec, around: &Surroundings<'_>) -> Result<Named, DeviceError> {
    Ok(D::boot(spec, around)?.into_iter().map(|(name, device)| (name, device.share())).collect())
}

fn decode<D: Catalogued + 'static>(name: &str, reader: &mut StateReader<'_>) -> Result<Box<dyn Decoded>, StateError> {
    Ok(Box::new(migratable::take::<D>(reader, name)?))
}

/// Of every section of a device that this build knows.
pub fn kinds() -> Vec<Kind> {
    let devices = DEVICES.iter().flat_map(|entry| [Some(entry.state), entry.handles]);
    let all = devices.chain(PASSTHROUGH.iter().copied());
    all.flatten().chain([Kind::of::<Manifest>(MANIFEST)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn kinds_are_unique_and_versions_start_at_one() {
        let formats: Vec<_> = kinds().into_iter().map(|kind| kind.format).collect();
        let names: HashSet<_> = formats.iter().map(|format| format.kind).collect();
        assert_eq!(names.len(), formats.len());
        assert!(formats.iter().all(|format| !format.kind.is_empty() && format.version >= 1));
    }
}
