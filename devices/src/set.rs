//! The devices that a machine has, by name. What is saved of them begins with a manifest, so that a restore knows what
//! there was.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use theseus_resources::{Claims, StateReader, StateWriter};

use crate::catalogue::{self, Decoded, Listed, MANIFEST, Manifest};
use crate::device::{Buses, Device, DeviceError, Operation, Place, Surroundings};
use crate::migratable::{MigrateError, SavedDevice, SavedSection};
use crate::spec::Spec;

/// Of the section that lists the others.
const MANIFEST_NAME: &str = "devices";

struct Member {
    name: String,
    device: Arc<dyn Device>,
}

/// See the module. In the order in which they were inserted, which is that of their AML, too.
pub struct DeviceSet {
    members: Vec<Member>,
    buses: Buses,
    /// Between quiesce and resume, and before the first of these.
    is_quiet: AtomicBool,
}

/// Lets those go on that were stopped, or may have been half.
struct Undo<'a>(&'a [Member]);

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        self.0.iter().rev().for_each(|member| member.device.resume());
    }
}

impl DeviceSet {
    /// Without devices. It is quiet: what is inserted stands still until [`Self::resume`].
    pub fn new(buses: Buses) -> Self {
        Self { members: Vec::new(), buses, is_quiet: AtomicBool::new(true) }
    }

    /// All that `spec` says, of all kinds that there are.
    ///
    /// # Errors
    /// A device cannot be made. Those before it stay on `buses`, which are of no use then.
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
    ///
    /// # Errors
    /// Its name or one of its places is another device's.
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
        if !self.is_quiet.load(Ordering::SeqCst) {
            device.resume();
        }
        self.members.push(Member { name, device });
        Ok(())
    }

    /// Takes it away from the guest.
    ///
    /// # Errors
    /// There is none of this name, or it has [`Device::blockers`]: it stays.
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

    /// In the order in which they were inserted.
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

    /// All of them or, on an error, none. Nothing where they are quiet already.
    pub fn quiesce(&self) -> Result<(), DeviceError> {
        if self.is_quiet.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut undo = Undo(&[]);
        for (at, Member { name, device }) in self.members.iter().enumerate() {
            undo.0 = &self.members[..=at];
            device.quiesce().map_err(|source| DeviceError::Migrate { name: name.clone(), source })?;
        }
        std::mem::forget(undo);
        self.is_quiet.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// In the order opposite to that of [`Self::quiesce`].
    pub fn resume(&self) {
        self.is_quiet.store(false, Ordering::SeqCst);
        self.members.iter().rev().for_each(|member| member.device.resume());
    }

    /// The AML of all devices, for the scope `\_SB_` of the DSDT.
    pub fn describe(&self) -> Vec<u8> {
        let mut aml = Vec::new();
        self.members.iter().for_each(|member| member.device.describe(&mut aml));
        aml
    }

    /// Pure.
    ///
    /// # Errors
    /// A device cannot be saved now, or not be written.
    pub fn save(&self, writer: &mut StateWriter) -> Result<(), DeviceError> {
        let mut devices = Vec::new();
        let mut sections = Vec::new();
        for Member { name, device } in &self.members {
            let failed = |source| DeviceError::Migrate { name: name.clone(), source };
            let SavedDevice { state, handles } = device.save(name).map_err(failed)?;
            devices.push(Listed { name: name.clone(), kind: state.format.kind.to_owned() });
            sections.extend([Some(state), handles].into_iter().flatten());
        }
        writer.add(MANIFEST_NAME, &MANIFEST, &Manifest { devices })?;
        for SavedSection { format, encoded } in sections {
            writer.add_encoded(encoded, &format)?;
        }
        Ok(())
    }
}

/// The decoded states of a set; nothing is claimed or made yet.
pub struct DecodedSet(Vec<(String, Box<dyn Decoded>)>);

impl DecodedSet {
    /// Takes the sections of all devices that the manifest lists.
    ///
    /// # Errors
    /// This build has no such kind of device, or a section is missing or cannot be read.
    pub fn decode(reader: &mut StateReader<'_>) -> Result<Self, DeviceError> {
        let (_, manifest): (_, Manifest) = reader.take(MANIFEST_NAME, &MANIFEST)?;
        let decode = |Listed { name, kind }: Listed| {
            let entry = catalogue::DEVICES.iter().find(|entry| entry.state.format.kind == kind);
            let entry = entry.ok_or_else(|| DeviceError::UnknownKind { name: name.clone(), kind })?;
            let decoded = (entry.decode)(&name, reader)?;
            Ok((name, decoded))
        };
        Ok(Self(manifest.devices.into_iter().map(decode).collect::<Result<_, DeviceError>>()?))
    }

    /// The interrupt controllers must be restored before: pending interrupts are raised again.
    ///
    /// # Errors
    /// As of [`DeviceSet::boot`]. What was claimed for devices is spent.
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

#[cfg(test)]
mod tests {
    use acpi_tables::AmlSink;
    use parking_lot::Mutex;
    use theseus_resources::FdStore;

    use super::*;
    use crate::bus::LockedDevice;
    use crate::interrupt::{GuestRequests, IrqLine};
    use crate::legacy::cmos::{self, Cmos};
    use crate::legacy::test_parts::{Asked, Pulses};
    use crate::migratable::with_slots;
    use crate::spec::ConsoleConfig;

    /// At two ranges of ports, and against everything that it is told to be against.
    struct Fake {
        places: [u64; 2],
        against: Option<Operation>,
        quiet: Mutex<Vec<&'static str>>,
        fails: bool,
    }

    struct Registers;

    impl LockedDevice for Registers {
        fn read(&mut self, _: u64, data: &mut [u8]) {
            data.fill(1);
        }

        fn write(&mut self, _: u64, _: &[u8]) {}
    }

    impl Device for Fake {
        fn places(self: Arc<Self>) -> Vec<Place> {
            self.places.map(|base| Place::Pio { base, len: 4, device: Arc::new(Mutex::new(Registers)) }).into()
        }

        fn quiesce(&self) -> Result<(), MigrateError> {
            self.quiet.lock().push("quiesce");
            if self.fails { Err(MigrateError::State("it goes on".into())) } else { Ok(()) }
        }

        fn resume(&self) {
            self.quiet.lock().push("resume");
        }

        fn reset(&self) {}

        fn blockers(&self, operation: Operation) -> Vec<String> {
            (self.against == Some(operation)).then(|| "it is busy: wait".to_owned()).into_iter().collect()
        }

        fn save(&self, name: &str) -> Result<SavedDevice, MigrateError> {
            SavedDevice::of(&Cmos::new(0), name)
        }

        fn describe(&self, _: &mut dyn AmlSink) {}
    }

    fn fake(places: [u64; 2]) -> Fake {
        Fake { places, against: None, quiet: Mutex::default(), fails: false }
    }

    fn read(buses: &Buses, port: u64) -> u8 {
        let mut byte = [0];
        buses.pio.read(port, &mut byte);
        byte[0]
    }

    #[test]
    fn all_of_a_device_is_there_or_nothing() {
        let buses = Buses::empty();
        let mut set = DeviceSet::new(buses.clone());
        set.insert("a".into(), Arc::new(fake([0x100, 0x200]))).unwrap();
        assert!(matches!(set.insert("a".into(), Arc::new(fake([0x300, 0x400]))), Err(DeviceError::Twice(_))));
        assert!(matches!(set.insert("b".into(), Arc::new(fake([0x300, 0x202]))), Err(DeviceError::Bus(_))));
        assert_eq!([0x100, 0x200, 0x300].map(|port| read(&buses, port)), [1, 1, 0xFF]);
        set.insert("b".into(), Arc::new(fake([0x300, 0x400]))).unwrap();
        assert!(set.get::<Fake>("b").is_some() && set.get::<Mutex<Cmos>>("b").is_none());
        set.remove("a").unwrap();
        assert_eq!([0x100, 0x200, 0x300].map(|port| read(&buses, port)), [0xFF, 0xFF, 1]);
        assert!(matches!(set.remove("a"), Err(DeviceError::Missing(_))));
    }

    #[test]
    fn who_blocks_is_named() {
        let mut set = DeviceSet::new(Buses::empty());
        set.insert("a".into(), Arc::new(fake([0, 4]))).unwrap();
        set.insert("b".into(), Arc::new(Fake { against: Some(Operation::Unplug), ..fake([8, 12]) })).unwrap();
        assert_eq!(set.blockers(Operation::Update), [""; 0]);
        assert_eq!(set.blockers(Operation::Unplug), ["device 'b': it is busy: wait"]);
        assert!(set.remove("b").err().unwrap().to_string().contains("it is busy"));
        assert_eq!(set.names().collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn where_one_fails_all_go_on() {
        let (a, b) = (Arc::new(fake([0, 4])), Arc::new(Fake { fails: true, ..fake([8, 12]) }));
        let mut set = DeviceSet::new(Buses::empty());
        set.insert("a".into(), a.clone()).unwrap();
        set.insert("b".into(), b.clone()).unwrap();
        set.quiesce().expect("they have not begun");
        assert_eq!(a.quiet.lock().as_slice(), [""; 0]);
        set.resume();
        let late = Arc::new(fake([16, 20]));
        set.insert("c".into(), late.clone()).unwrap();
        assert_eq!(late.quiet.lock().as_slice(), ["resume"], "plugged into what runs");
        assert_eq!(set.quiesce().unwrap_err().to_string(), "b: it goes on");
        let all = ["resume", "quiesce", "resume"];
        assert_eq!((a.quiet.lock().as_slice(), b.quiet.lock().as_slice()), (&all[..], &all[..]));
        assert_eq!(late.quiet.lock().as_slice(), ["resume"], "behind the one that failed");
    }

    fn spec(console: ConsoleConfig) -> Spec {
        Spec {
            ram_size: 1 << 30,
            console,
            revision: 0,
            #[cfg(feature = "test-devices")]
            counting: true,
        }
    }

    fn pin(_: u32) -> Arc<dyn IrqLine> {
        Arc::new(Pulses::default())
    }

    /// Of all kinds that there are.
    #[test]
    fn only_handles_name_descriptors_and_none_is_forgotten() {
        let buses = Buses::empty();
        let requests: Arc<dyn GuestRequests> = Arc::new(Asked::default());
        let fd_store = FdStore::new();
        let around = Surroundings { pin: &pin, requests: &requests, fd_store: &fd_store, pci: &buses.pci };
        let set = DeviceSet::boot(&spec(ConsoleConfig::Pty), &around, buses.clone()).unwrap();
        let mut writer = StateWriter::new("id");
        set.save(&mut writer).unwrap();
        let bytes = writer.finish().unwrap();
        assert_eq!(with_slots(&bytes), ["serial.handles"]);

        let (mut without, handles) = (StateWriter::new("id"), "serial.handles");
        for section in StateReader::new(&bytes).unwrap().sections().filter(|section| section.name != handles) {
            let kinds = catalogue::kinds();
            let kind = kinds.iter().find(|kind| kind.format.kind == section.kind).unwrap();
            without.add_encoded((kind.reread)(section).unwrap(), &kind.format).unwrap();
        }
        let bytes = without.finish().unwrap();
        let Err(error) = DecodedSet::decode(&mut StateReader::new(&bytes).unwrap()) else { panic!("it was decoded") };
        assert!(error.to_string().starts_with("section 'serial.handles': is missing"), "{error}");
    }

    #[test]
    fn the_manifest_says_what_there_is() {
        let buses = Buses::empty();
        let requests: Arc<dyn GuestRequests> = Arc::new(Asked::default());
        let fd_store = FdStore::new();
        let around = Surroundings { pin: &pin, requests: &requests, fd_store: &fd_store, pci: &buses.pci };
        let spec = spec(ConsoleConfig::Off);
        let set = DeviceSet::boot(&spec, &around, buses.clone()).unwrap();
        let names: Vec<_> = set.names().map(str::to_owned).collect();
        assert!(!names.iter().any(|name| name == "serial"), "it is off: {names:?}");
        let cmos = set.get::<Mutex<Cmos>>(cmos::NAME).unwrap();
        cmos.lock().write(0, &[0x40]);
        cmos.lock().write(1, &[0x5A]);
        let mut writer = StateWriter::new("id");
        set.save(&mut writer).unwrap();
        let bytes = writer.finish().unwrap();
        let mut reader = StateReader::new(&bytes).unwrap();
        let decoded = DecodedSet::decode(&mut reader).unwrap();
        reader.finish().unwrap();

        let buses = Buses::empty();
        let around = Surroundings { pci: &buses.pci, ..around };
        let restored = decoded.restore(&around, &mut Claims::default(), buses.clone()).unwrap();
        assert_eq!(restored.names().collect::<Vec<_>>(), names);
        assert_eq!(read(&buses, theseus_resources::layout::CMOS_PORT as u64 + 1), 0x5A);

        let mut writer = StateWriter::new("id");
        let listed = Manifest { devices: vec![Listed { name: "x".into(), kind: "of-tomorrow".into() }] };
        writer.add(MANIFEST_NAME, &MANIFEST, &listed).unwrap();
        let bytes = writer.finish().unwrap();
        let Err(error) = DecodedSet::decode(&mut StateReader::new(&bytes).unwrap()) else { panic!("it was decoded") };
        assert!(
            error.to_string().starts_with("device 'x' is a 'of-tomorrow', which this build does not have"),
            "{error}"
        );
    }
}
