//! What a guest does to the devices that this VMM emulates, and what the other side of the serial port does meanwhile:
//! ports, MMIO, configuration space both ways. Whatever it was, the devices go over to another image as they are.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tempfile::TempDir;
use theseus_devices::device::{Buses, Operation};
use theseus_devices::legacy::pm::{self, Pm};
use theseus_devices::legacy::serial::{self, SerialDevice, UNSENT_MAX};
use theseus_devices::set::{DecodedSet, DeviceSet};
use theseus_devices::spec::{ConsoleConfig, Spec};
use theseus_resources::{FdStore, StateReader, StateWriter, layout};

use crate::devices::surrounded;
use crate::input::Input;

/// What a state of these devices takes, beside output that waits: bytes.
const STATE_MAX: usize = 16 << 10;

thread_local! {
    static FOLDER: TempDir = tempfile::tempdir().expect("a folder for sockets");
}

struct Machine {
    set: DeviceSet,
    buses: Buses,
    fd_store: FdStore,
    /// Of the serial port's socket, where it has one.
    path: Option<PathBuf>,
    /// Who is at the other end.
    client: Option<UnixStream>,
}

impl Machine {
    fn boot(choice: u8) -> Self {
        let path = (choice & 1 != 0).then(|| FOLDER.with(|folder| folder.path().join("serial")));
        let console = path.clone().map_or(ConsoleConfig::Null, ConsoleConfig::Socket);
        let spec = Spec { ram_size: u64::from(choice >> 1) << 27, console, revision: 2 };
        let (fd_store, buses) = (FdStore::new(), Buses::empty());
        let set = surrounded(&fd_store, &buses.pci, |around| DeviceSet::boot(&spec, around, buses.clone()));
        let set = set.expect("the devices of a boot");
        set.resume();
        Self { set, buses, fd_store, path, client: None }
    }

    fn serial<T>(&self, with: impl FnOnce(&mut SerialDevice) -> T) -> T {
        let serial = self.set.get::<Mutex<SerialDevice>>(serial::NAME).expect("there is one");
        let mut serial = serial.lock();
        with(&mut serial)
    }

    fn state(&self) -> Vec<u8> {
        let mut writer = StateWriter::new("fuzz");
        self.set.save(&mut writer).expect("all devices can be saved");
        writer.finish().expect("and written")
    }

    /// In another image. What it would be saved as there is what it was saved as here.
    fn carried(self) -> Self {
        assert!(self.set.blockers(Operation::Update).is_empty());
        self.set.quiesce().expect("devices stand still");
        let (state, aml) = (self.state(), self.set.describe());
        assert!(state.len() <= STATE_MAX + UNSENT_MAX, "a state of {} bytes", state.len());
        let Self { set, buses: _, fd_store, path, client } = self;
        let (fd_store, mut claims) = { fd_store }.handed_over().expect("descriptors go over");
        drop(set);
        let buses = Buses::empty();
        let mut reader = StateReader::new(&state).expect("the state");
        let decoded = DecodedSet::decode(&mut reader).expect("its devices");
        reader.finish().expect("nothing is left over");
        let restored = surrounded(&fd_store, &buses.pci, |around| decoded.restore(around, &mut claims, buses.clone()));
        let set = restored.expect("the devices");
        claims.finish().expect("all descriptors are claimed");
        let new = Self { set, buses, fd_store, path, client };
        assert_eq!(sections(&new.state()), sections(&state));
        assert_eq!(new.set.describe(), aml);
        new.set.resume();
        new
    }

    /// What is at the other end of the serial port's socket does something.
    fn client(&mut self, input: &mut Input<'_>) -> Option<()> {
        match input.u8()? {
            choice @ 0..64 => {
                let bytes = input.take(choice.into())?;
                let _ = self.client.as_mut().map(|client| client.write(bytes));
            }
            64..96 => self.client = None,
            96..128 => {
                self.client = self.path.as_ref().and_then(|path| connect(path).ok());
            }
            128..160 => {
                let mut buf = vec![0; 64 << 10];
                while self.client.as_mut().is_some_and(|client| client.read(&mut buf).is_ok_and(|count| count > 0)) {}
            }
            _ => self.serial(SerialDevice::handle_ready),
        }
        Some(())
    }

    /// Does the next thing. None at the end of the input.
    fn step(&mut self, input: &mut Input<'_>) -> Option<bool> {
        let choice = input.u8()?;
        let mut data = [0; 8];
        let data = &mut data[..1 + usize::from(choice >> 5)];
        match choice & 0x1F {
            0..6 => self.buses.pio.read(port(input)?, data),
            6..14 => {
                let port = port(input)?;
                data.copy_from_slice(input.take(data.len())?);
                self.buses.pio.write(port, data);
            }
            14 => self.buses.mmio.read(address(input)?, data),
            15 | 16 => {
                let address = address(input)?;
                data.copy_from_slice(input.take(data.len())?);
                assert!(self.buses.mmio.write_unless(address, data, &|| true), "nobody else is at it");
            }
            17 => {
                // As a guest that sends a long string: `rep outsb`.
                let (port, byte) = (port(input)?, [input.u8()?]);
                (0..u16::from(input.u8()?) * 16).for_each(|_| self.buses.pio.write(port, &byte));
            }
            18 | 19 => {
                let address = input.u32()? | 1 << 31;
                self.buses.pio.write(layout::PCI_CONFIG_ADDRESS.into(), &address.to_le_bytes());
                self.buses.pio.read(u64::from(layout::PCI_CONFIG_ADDRESS) + 4, data);
                self.buses.pio.write(u64::from(layout::PCI_CONFIG_ADDRESS) + 4, data);
            }
            20 => self.set.get::<Mutex<Pm>>(pm::NAME).expect("there is one").lock().press_power_button(),
            21 => self.serial(SerialDevice::reset),
            22..28 => self.client(input)?,
            _ => return Some(true),
        }
        Some(false)
    }
}

/// Does not wait where too many wait already.
fn connect(path: &Path) -> rustix::io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// Of a device, or of nobody.
fn port(input: &mut Input<'_>) -> Option<u64> {
    let choice = input.u8()?;
    let (base, size) = match choice & 7 {
        0..3 => (layout::SERIAL_PORT, 8),
        3 => (layout::CMOS_PORT, 2),
        4 => (layout::I8042_PORT, 5),
        5 => (layout::PM_BASE, 8),
        6 => (layout::PCI_CONFIG_ADDRESS, 8),
        _ => return input.u16().map(Into::into),
    };
    Some(u64::from(base + u16::from(choice >> 3) % size))
}

/// Of ECAM, or of nobody.
fn address(input: &mut Input<'_>) -> Option<u64> {
    match input.u8()? {
        0..224 => Some(layout::ECAM_BASE + u64::from(input.u32()?) % (layout::ECAM_SIZE + 8)),
        _ => input.u64(),
    }
}

/// A state by section, which says more where two differ.
fn sections(state: &[u8]) -> Vec<(String, Vec<u8>)> {
    let reader = StateReader::new(state).expect("a state");
    reader.sections().map(|section| (section.name.to_string(), section.data.to_vec())).collect()
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let Some(mut machine) = input.u8().map(Machine::boot) else { return };
    while let Some(goes_over) = machine.step(&mut input) {
        if goes_over {
            machine = machine.carried();
        }
    }
    machine.carried();
}
