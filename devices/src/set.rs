//! The devices that a machine has, by name. What is saved of them begins with a manifest, so that a restore knows what
//! there was.

use std::any::Any;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use theseus_resources::{Claims, StateReader, StateWriter};

use crate::catalogue::{self, Decoded, MANIFEST};
use crate::device::{Buses, Device, DeviceError, Operation, Place, Surroundings};
use crate::migratable::MigrateError;
use crate::spec::Spec;

/// Of the section that lists the others.
const MANIFEST_NAME: &str = "devices";

#[derive(Serialize, Deserialize)]
struct Listed {
    /// The name of the device, and of its section.
    name: String,
    kind: String,
}

struct Member {
    name: String,
    device: Arc<dyn Device>,
}

/// See the module. In the order in which they were inserted, which is that of their AML, too.
pub struct DeviceSet {
    members: Vec<Member>,
    buses: Buses,
}

impl DeviceSet {
    pub fn new(buses: Buses) -> Self {
        Self { members: Vec::new(), buses }
    }

    /// All that `spec` says, of all kinds that there are.
    pub fn boot(spec: &Spec, around: &Surroundings<'_>, buses: Buses) -> Result<Self, DeviceError> {
        let mut set = Self::new(buses);
        for entry in catalogue::DEVICES {
            for (name, device) in (entry.boot)(spec, around)? {
                set.insert(name, device)?;
            }
        }
        Ok(set)
    }

    /// Puts it where the guest expects it; all of it or, on an error, nothing.
    pub fn insert(&mut self, name: String, device: Arc<dyn Device>) -> Result<(), DeviceError> {
        if self.members.iter().any(|member| member.name == name) {
            return Err(DeviceError::Twice(name));
        }
        let mut plugged = Vec::new();
        for place in device.clone().places() {
            match plug(&self.buses, place) {
                Ok(place) => plugged.push(place),
                Err(error) => {
                    plugged.into_iter().for_each(|place| unplug(&self.buses, place));
                    return Err(error);
                }
            }
        }
        self.members.push(Member { name, device });
        Ok(())
    }

    /// Takes it away from the guest. Refused where the device says why.
    pub fn remove(&mut self, name: &str) -> Result<Arc<dyn Device>, DeviceError> {
        let at = self.members.iter().position(|member| member.name == name);
        let at = at.ok_or_else(|| DeviceError::Missing(name.to_owned()))?;
        let reasons = self.members[at].device.blockers(Operation::Unplug);
        if !reasons.is_empty() {
            return Err(DeviceError::Blocked(Operation::Unplug, reasons));
        }
        let Member { name: _, device } = self.members.remove(at);
        device.clone().places().into_iter().map(at_of).for_each(|place| unplug(&self.buses, place));
        Ok(device)
    }

    /// The device `name`, if it is a `D`.
    pub fn get<D: Device>(&self, name: &str) -> Option<Arc<D>> {
        let member = self.members.iter().find(|member| member.name == name)?;
        let any: Arc<dyn Any + Send + Sync> = member.device.clone();
        any.downcast().ok()
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|member| member.name.as_str())
    }

    /// Why `operation` cannot be now, with the names of the devices.
    pub fn blockers(&self, operation: Operation) -> Vec<String> {
        let of = |member: &Member| {
            let name = member.name.clone();
            member.device.blockers(operation).into_iter().map(move |reason| format!("device '{name}': {reason}"))
        };
        self.members.iter().flat_map(of).collect()
    }

    /// All of them or, on an error, none.
    pub fn quiesce(&self) -> Result<(), DeviceError> {
        for (at, Member { name, device }) in self.members.iter().enumerate() {
            if let Err(source) = device.quiesce() {
                self.members[..at].iter().rev().for_each(|member| member.device.resume());
                return Err(DeviceError::Migrate { name: name.clone(), source });
            }
        }
        Ok(())
    }

    /// In the order opposite to that of [`Self::quiesce`].
    pub fn resume(&self) {
        self.members.iter().rev().for_each(|member| member.device.resume());
    }

    pub fn describe(&self) -> Vec<u8> {
        let mut aml = Vec::new();
        self.members.iter().for_each(|member| member.device.describe(&mut aml));
        aml
    }

    /// Pure.
    pub fn save(&self, writer: &mut StateWriter) -> Result<(), DeviceError> {
        let mut manifest = Vec::new();
        let mut sections = Vec::new();
        for Member { name, device } in &self.members {
            let failed = |source| DeviceError::Migrate { name: name.clone(), source };
            let saved = device.save(name).map_err(failed)?;
            manifest.push(Listed { name: name.clone(), kind: saved.kind.to_owned() });
            sections.push(saved);
        }
        writer.add(MANIFEST_NAME, MANIFEST.0, MANIFEST.1, &manifest)?;
        for saved in sections {
            writer.add_encoded(saved.encoded, saved.kind, saved.version)?;
        }
        Ok(())
    }
}

/// The decoded states of a set; nothing is claimed or made yet.
pub struct DecodedSet(Vec<(String, Box<dyn Decoded>)>);

impl DecodedSet {
    pub fn decode(reader: &mut StateReader<'_>) -> Result<Self, DeviceError> {
        let manifest: Vec<Listed> = reader.take(MANIFEST_NAME, MANIFEST.0, MANIFEST.1)?;
        let decode = |Listed { name, kind }: Listed| {
            let entry = catalogue::DEVICES.iter().find(|entry| entry.kind == kind);
            let entry = entry.ok_or_else(|| DeviceError::UnknownKind { name: name.clone(), kind })?;
            let decoded = (entry.decode)(&name, reader)?;
            Ok((name, decoded))
        };
        Ok(Self(manifest.into_iter().map(decode).collect::<Result<_, DeviceError>>()?))
    }

    /// The interrupt controllers must be restored before: pending interrupts are raised again.
    pub fn restore(
        self,
        around: &Surroundings<'_>,
        claims: &mut Claims,
        buses: Buses,
    ) -> Result<DeviceSet, DeviceError> {
        let mut set = DeviceSet::new(buses);
        for (name, decoded) in self.0 {
            let failed = |source: MigrateError| DeviceError::Migrate { name: name.clone(), source };
            let device = decoded.restore(around, claims).map_err(failed)?;
            set.insert(name, device)?;
        }
        Ok(set)
    }
}

/// Where a device was put.
enum At {
    Pio(u64),
    Mmio(u64),
    Pci(u8),
}

fn at_of(place: Place) -> At {
    match place {
        Place::Pio { base, .. } => At::Pio(base),
        Place::Mmio { base, .. } => At::Mmio(base),
        Place::Pci { slot, .. } => At::Pci(slot),
    }
}

fn plug(buses: &Buses, place: Place) -> Result<At, DeviceError> {
    Ok(match place {
        Place::Pio { base, len, device } => buses.pio.insert(base, len, device).map(|()| At::Pio(base))?,
        Place::Mmio { base, len, device } => buses.mmio.insert(base, len, device).map(|()| At::Mmio(base))?,
        Place::Pci { slot, device } => buses.pci.add(Some(slot), device).map(At::Pci)?,
    })
}

fn unplug(buses: &Buses, at: At) {
    match at {
        At::Pio(base) => buses.pio.remove(base),
        At::Mmio(base) => buses.mmio.remove(base),
        At::Pci(slot) => drop(buses.pci.remove(slot)),
    }
}
